"""Trains and tests on every dataset, and writes the table.

The protocol is that of Hernández-Lobato and Adams (2015): 20 splits of 90 % and 10 %, one hidden
layer of 50 ReLU units, mean and standard error over splits of the root-mean-square error and of
the log-density of the test targets, in their own units.

References:
    | Probabilistic Backpropagation for Scalable Learning of Bayesian Neural Networks
      (Hernández-Lobato and Adams, 2015)
    | https://arxiv.org/abs/1502.05336
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.section import Section, publish, table
from benchmarks.uci import published
from benchmarks.uci.data import SHAPES, Missing
from benchmarks.uci.networks import PRIORS, Scores, Setting, run

README = Path(__file__).parents[1] / "README.md"
MARK = "uci"
OURS = "**pyro_bayes**"
COSTLY_FIRST = ("wine", "kin8nm", "power", "concrete", "energy", "boston", "yacht")


def measure(options: argparse.Namespace, setting: Setting) -> dict[str, Scores]:
    """Trains and tests on each dataset, in several processes.

    Arguments:
        options: The options of the command line.
        setting: How to train.
    """
    results = {}
    for name, scores in _runs(options, setting):
        _tell(name, scores)
        results[name] = scores
    return {name: results[name] for name in options.datasets}


def _runs(options: argparse.Namespace, setting: Setting) -> Iterator[tuple[str, Scores]]:
    names = sorted(options.datasets, key=COSTLY_FIRST.index)
    arguments = options.data, setting, options.validate, options.splits
    if options.processes == 1:
        for name in names:
            yield name, run(name, *arguments)
        return
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        futures = {name: pool.submit(run, name, *arguments) for name in names}
        for name, future in futures.items():
            yield name, future.result()


def report(
    results: Mapping[str, Scores], setting: Setting, path: Path | None, part: str = "Test"
) -> Iterator[str]:
    """Yields the tables and what they say, in Markdown.

    Arguments:
        results: The scores by dataset.
        setting: How the networks were trained.
        path: The file of published numbers, if there is one.
        part: What was predicted.
    """
    names = list(results)
    for metric, title in (("LL", f"{part} log-likelihood"), ("RMSE", f"{part} RMSE")):
        methods = published.read(path, metric) if path else []
        rows = [[OURS, *(_cell(_values(results[name], metric)) for name in names)]]
        rows += [[_label(m), *(m.cell(name) for name in names)] for m in methods]
        yield f"**{title}**, mean ± standard error over splits."
        yield table(["", *(f"`{name}`" for name in names)], rows)
        if metric == "LL" and methods:
            yield compare(results, methods)
    used = ", ".join(f"{f.name} {getattr(setting, f.name)}" for f in fields(setting))
    minutes = sum(scores.seconds for scores in results.values()) / 60
    yield f"Setting: {used}. torch {torch.__version__}; {minutes:.0f} minutes of one core in all."


def compare(results: Mapping[str, Scores], methods: Sequence[published.Method]) -> str:
    """Returns in Markdown how the log-likelihoods compare with those published.

    Arguments:
        results: The scores by dataset.
        methods: The published log-likelihoods.
    """
    rows = []
    ensembles = published.ensembles(methods)
    for name, scores in results.items():
        mean, error = _moments(scores.log_likelihood)
        best = published.best_mean_field(methods, name)
        gap = mean - best.means[name]
        verdict = "above" if gap >= 0 else "within" if gap >= -error else "**below**"
        versus = mean - ensembles.means[name]
        rows.append([
            f"`{name}`", f"{best.name.split(' (')[0]}, {best.means[name]:.2f}", f"{gap:+.2f}",
            f"{error:.2f}", verdict, f"{versus:+.2f}",
        ])  # fmt: skip
    header = ["", "best mean-field row", "ours minus it", "our standard error", "", "ours minus"
              " deep ensembles"]  # fmt: skip
    return table(header, rows, labels=2)


def _values(scores: Scores, metric: str) -> Tensor:
    return scores.rmse if metric == "RMSE" else scores.log_likelihood


def _moments(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def _cell(values: Tensor) -> str:
    mean, error = _moments(values)
    return f"**{mean:.2f} ± {error:.2f}**" if abs(mean) >= 0.2 else f"**{mean:.3f} ± {error:.3f}**"


def _label(method: published.Method) -> str:
    return f"{method.name}, mean field" if method.is_mean_field else method.name


def _tell(name: str, scores: Scores) -> None:
    parts = (f"{label} {_moments(values)[0]:.3f} ± {_moments(values)[1]:.3f}" for label, values in
             (("log-likelihood", scores.log_likelihood), ("RMSE", scores.rmse)))  # fmt: skip
    print(f"  {name}: ELBO {scores.elbo:.4f}, {', '.join(parts)}; {scores.seconds:.0f} s of a core",
          file=sys.stderr, flush=True)  # fmt: skip


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uci", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="the folder with NAME.npz; by default OpenML, over the network")
    add("--published", type=Path, help="the file of published numbers to set beside ours")
    add("--datasets", nargs="+", choices=SHAPES, default=list(SHAPES), help="the datasets (all)")
    add("--splits", type=int, default=20, help="the number of splits (20)")
    add("--processes", type=int, default=min(os.cpu_count() or 1, len(SHAPES)),
        help="the number of processes (one per core)")  # fmt: skip
    add("--validate", action="store_true", help="leave the test parts alone, and score on the last"
        " ninth of the training parts, to choose a setting")  # fmt: skip
    add("--output", type=Path, help=f"the file with the marks of the section {MARK!r}; by default"
        " the README of this folder, if all is measured and compared")  # fmt: skip
    for field in fields(Setting):
        choices = PRIORS if field.name == "prior" else None
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), choices=choices,
            help=f"({field.default})")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.splits < 2 or options.processes < 1:
        parser.error("Expected --splits to be at least 2, and --processes at least 1.")
    given = {f.name: getattr(options, f.name) for f in fields(Setting)}
    setting = replace(Setting(), **{k: v for k, v in given.items() if v is not None})
    standard = setting == Setting() and options.splits == 20 and not options.validate
    if standard and options.published and set(options.datasets) == set(SHAPES):
        options.output = options.output or README
    return options, setting


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the report, and writes it to the README of the benchmarks."""
    options, setting = _options(arguments)
    section = Section(options.output, MARK) if options.output else None
    if section:
        section.surroundings()  # raises before the work is done
    try:
        results = measure(options, setting)
    except Missing as error:
        raise SystemExit(str(error)) from error
    predicted = "Validation" if options.validate else "Test"
    publish(report(results, setting, options.published, predicted), section)


if __name__ == "__main__":
    main()
