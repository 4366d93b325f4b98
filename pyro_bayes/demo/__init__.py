"""Two real data sets, each learned by a Bayesian net and by the same net without Bayes.

`python -m pyro_bayes.demo` classifies the digits of scikit-learn through Pyro's SVI, and regresses
its diabetes data through a plain PyTorch loop. `--data FILE.csv --target COLUMN` regresses a column
of your own table instead. Either prints the test scores and draws a figure per data set. It needs
the extra `demo`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pyro
import torch

from pyro_bayes.base.extras import require
from pyro_bayes.demo.table import InputError, read

_SMOKE_ROWS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Arguments:
        argv: The command line arguments, those of the process by default.

    Returns:
        The exit code: 0, or 2 after one line on stderr if the input cannot be used.
    """
    try:
        arguments = _parse(argv)
        for package in ("matplotlib", "numpy", "rich", "sklearn", "torchmetrics"):
            require(package, extra="demo")
        with _one_thread():
            _run(arguments)
    except (ImportError, InputError) as error:
        print(*str(error).splitlines(), file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from pyro_bayes.demo import digits, regression

    own = None if arguments.data is None else read(arguments.data, arguments.target)
    _prepare(arguments.output)
    seed, smoke = arguments.seed, arguments.smoke
    draws = 10 if smoke else 200
    paths = [arguments.output / "regression.png"]
    if own is None:
        paths.insert(0, arguments.output / "digits.png")
        pyro.set_rng_seed(seed)
        digits.run(seed=seed, epochs=8 if smoke else 600, draws=draws, path=paths[0])
    pyro.set_rng_seed(seed)
    table = regression.diabetes() if own is None else own
    regression.run(
        table.sample(_SMOKE_ROWS, seed) if smoke else table,
        seed=seed,
        epochs=20 if smoke else None,
        draws=draws,
        path=paths[-1],
    )
    print(
        "Both nets have the same initial weights, minibatches, optimiser and number of steps;\n"
        "there is no weight decay, and neither is stopped early. This is one split of the data:\n"
        "--seed N makes another, and shows how much of a difference is chance."
    )
    for path in paths:
        print(f"Figure: {path}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: in nets this small, several wait longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m pyro_bayes.demo",
        description="Compares Bayesian nets with the same nets trained without Bayes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE.csv", help="regress a table of your own")
    add("--target", metavar="COLUMN", help="the column of the table to predict")
    add("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="for the figures")
    add("--seed", type=_seed, default=0, help="of the split, the initialisation and the draws")
    add(
        "--smoke", action="store_true", help="train for a few steps on a few rows, as a quick check"
    )
    arguments = parser.parse_args(argv)
    if (arguments.data is None) != (arguments.target is None):
        option = "--target" if arguments.data is None else "--data"
        raise InputError(f"Expected --data and --target together; got {option} alone.")
    return arguments


def _seed(text: str) -> int:
    # NumPy's generator, which Pyro seeds too, takes no others.
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"Expected an integer from 0 to 2**32 - 1; got {text!r}.")
    return int(text)


def _prepare(folder: Path) -> None:
    """Makes the folder of the figures before any time is spent on training."""
    problem = "it is not writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
    except OSError as error:
        problem = error.strerror or str(error)
    raise InputError(f"Expected --output to be a folder to write to; got '{folder}' ({problem}).")
