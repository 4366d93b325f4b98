"""Times a full step of the optimiser and prediction, ours and the peers', and writes the tables.

Contenders take turns. In each round, each has about 50 ms (one call, if that takes longer), and its
time per call is divided by that of the plain net in the same round, with the same Adam.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import memory
import nets
import torch
from chart import Curve, save
from contenders import CAPTURED, CONTENDERS, PLAIN, start
from nets import PROBLEMS, Problem
from section import Section, publish, table
from timing import Times

README = Path(__file__).with_name("README.md")
MARK, CHART = {"cpu": "speed", "cuda": "speed-cuda"}, "cost.png"
MEMORY = ("mlp", "deep", "cnn", "encoder", "flow")
QUERIES = (nets.REGRESSION, *(PROBLEMS[name] for name in ("mlp", "cnn", "flow")))
OURS = "weights"
TABLES = ("steps", "memory", "predictions", "sizes", "counts")
LONGEST = 20.0  # seconds that a call may take
BEGIN = time.perf_counter()
THREADED = (PLAIN, OURS, "local", "flipout", "svi", "zuko", "zuko-local")
GROWING = (PLAIN, OURS, "local", "zuko")
COUNTING = (OURS, "zuko", "pyro")
PREDICTING = (PLAIN, OURS, "svi", "zuko", "pyro", "tyxe", "bayesian-torch", "torchbnn", "blitz",
              "posteriors")  # fmt: skip
SVI, RECIPE = ("svi", "svi-exact"), "pyro"
ADAMS = {"written": "Adam as users write it", "fused": "`Adam(…, fused=True)`"}


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Arguments:
        problems: The networks.
        contenders: The names of the contenders.
        rounds: The largest number of rounds.
        seconds: About how long the rounds of one table's column may take.
        memory: The names of the networks whose memory is measured.
        queries: The networks that predict.
        sizes: The numbers of parameters of the growing net.
        counts: The growing numbers of draws.
        chart: Where the chart is saved, if anywhere.
        machine: What the report says about the machine.
        threads: On how many threads steps are timed once more, if at all.
        device: Where networks are.
        tables: Which tables to make.
        adams: Which of `ADAMS` the tables of a step have.
    """

    problems: Sequence[Problem]
    contenders: Sequence[str]
    rounds: int
    seconds: float = 24.0
    memory: Sequence[str] = MEMORY
    queries: Sequence[Problem] = QUERIES
    sizes: Sequence[float] = (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)
    counts: Sequence[int] = (1, 10, 100, 1_000, 10_000)
    chart: Path | None = None
    machine: str = ""
    threads: int = 2
    device: str = "cpu"
    tables: Sequence[str] = TABLES
    adams: Sequence[str] = tuple(ADAMS)

    def of(self, names: Sequence[str]) -> list[str]:
        """Returns which of some contenders take part."""
        return [name for name in names if name in self.contenders]


def steps(plan: Plan) -> Iterator[str]:
    """Times a step, with each Adam.

    Yields:
        A table for each Adam, relative to the plain net, and one of SVI, relative to Pyro's recipe,
        each after its title.
    """
    names = [*plan.contenders, *(CAPTURED if plan.device == "cuda" else ())]
    compared = []
    for adam in plan.adams:
        yield (
            f"**A step with {ADAMS[adam]}**, relative to the plain net's step with the same Adam,"
            " whose time is in the first row."
        )
        columns = _timed(plan, names, fused=adam == "fused")
        yield _to_plain(plan, names, columns)
        for name in plan.of(SVI):
            cells = [_to_recipe(times, name) for times in columns]
            compared.append([CONTENDERS[name].title, ADAMS[adam], *cells])
    if compared and RECIPE in plan.contenders:
        yield "**SVI ÷ Pyro's own recipe**: the time of our step divided by that of the recipe."
        yield table(["", "with", *_names(plan.problems)], compared, labels=2)


def _to_recipe(times: Times, name: str) -> str:
    """Returns the ratio, or `cannot` where the recipe cannot run; the first table says why."""
    return times.failures.get(RECIPE, "").partition(":")[0] or times.cell(name, RECIPE)


def _timed(plan: Plan, names: Sequence[str], fused: bool = False) -> list[Times]:
    """Times a step of each network, with contenders in turn."""
    columns = []
    for problem in plan.problems:
        running, failures = start(names, replace(problem, fused=fused))
        times = Times({k: r.step for k, r in running.items()}, plan.rounds, plan.seconds)
        times.failures.update(failures)
        columns.append(times)
        _tell(problem.name)
    return columns


def _to_plain(plan: Plan, names: Sequence[str], columns: Sequence[Times]) -> str:
    cells = [[times.cell(name, PLAIN) for name in names] for times in columns]
    return table(["", *_names(plan.problems)], _rows(names, cells))


def _names(problems: Sequence[Problem]) -> list[str]:
    return [f"`{problem.name}`" for problem in problems]


def _threaded(plan: Plan) -> str:
    names = plan.of(THREADED)
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        return _to_plain(plan, names, _timed(plan, names))
    finally:
        torch.set_num_threads(before)


def peaks(plan: Plan) -> str:
    """Returns the table of peak memory."""
    problems = [p for p in plan.problems if p.name in plan.memory]
    columns = []
    for problem in problems:
        columns.append([memory.measure(problem.name, c, plan.device) for c in plan.contenders])
        _tell(f"memory of {problem.name}")
    return table(["", *_names(problems)], _rows(plan.contenders, columns))


def _rows(names: Sequence[str], columns: Sequence[Sequence[str]]) -> list[list[str]]:
    cells = zip(*columns, strict=True)
    titles = CONTENDERS | CAPTURED
    return [[titles[n].title, *row] for n, row in zip(names, cells, strict=True)]


def predictions(plan: Plan) -> str:
    """Returns the table of the times of a prediction, relative to the first way of ours."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for problem in plan.queries:
        running, failures = start(plan.of(PREDICTING), problem)
        x, _ = problem.examples(problem.queries)
        calls = {
            (name, way): _bound(predict, x, problem.draws)
            for name, run in running.items()
            for way, predict in run.predict.items()
        }
        keys = {f"{name} {way}": (name, way) for name, way in calls}
        times = Times({k: calls[key] for k, key in keys.items()}, plan.rounds, plan.seconds)
        first = next((k for k, (name, _) in keys.items() if name == OURS), "")
        for k, key in keys.items():
            cells.setdefault(key, {})[problem.name] = times.cell(k, first)
        for name, failure in failures.items():
            for key in [key for key in cells if key[0] == name] or [(name, "")]:
                cells.setdefault(key, {})[problem.name] = failure
        _tell(f"predictions of {problem.name}")
    rows = [
        [CONTENDERS[name].title, way, *(row.get(p.name, "") for p in plan.queries)]
        for (name, way), row in cells.items()
    ]
    header = [
        "",
        "by",
        *(f"`{p.name}`, {p.queries} examples, {p.draws} draws" for p in plan.queries),
    ]
    return table(header, rows, labels=2)


def _bound(predict: Callable[..., object], x: torch.Tensor, count: int) -> Callable[[], object]:
    return lambda: predict(x, count)


def sizes(plan: Plan) -> str:
    """Returns the table of the time of a step against the number of parameters."""
    names = plan.of(GROWING)
    others = [name for name in names if name != PLAIN]
    rows: list[list[str]] = []
    curves: dict[str, Curve] = {CONTENDERS[name].title: ([], []) for name in others}
    for size in filter(_fits, plan.sizes):
        problem = replace(nets.square(size), device=plan.device)
        running, failures = start(names, problem)
        times = Times({k: r.step for k, r in running.items()}, plan.rounds, plan.seconds / 4)
        times.failures.update(failures)
        rows.append([f"{problem.size():,}", *(times.cell(name, PLAIN) for name in names)])
        for name in others if PLAIN in times.seconds else []:
            xs, ratios = curves[CONTENDERS[name].title]
            if name in times.seconds:
                xs.append(problem.size())
                ratios.append(times.ratios(name, PLAIN))
        _tell(f"{problem.size()} parameters")
        del running
    if plan.chart and PLAIN in names:
        save(plan.chart, curves)
    return table(["D", *(CONTENDERS[name].title for name in names)], rows, labels=0)


def _fits(parameters: float) -> bool:
    """Whether the nets of all contenders fit in memory at once."""
    return 160 * parameters < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def counts(plan: Plan) -> str:
    """Returns the table of the time of a prediction against the number of draws."""
    names = plan.of(COUNTING)
    problem = replace(nets.REGRESSION, device=plan.device)
    running, _ = start(names, problem)
    x, _ = problem.examples(problem.queries)
    ways = {name: next(iter(run.predict.items())) for name, run in running.items()}
    rows, known = [], dict.fromkeys(ways, 0.0)
    for count in plan.counts:
        calls = {
            name: _bound(predict, x, count)
            for name, (_, predict) in ways.items()
            if known[name] * count < LONGEST
        }
        times = Times(calls, plan.rounds, plan.seconds / 4)
        known |= {name: times.median(name) / count for name in times.seconds}
        times.failures.update({name: f"over {LONGEST:.0f} s" for name in ways if name not in calls})
        rows.append(
            [f"{count:,}"]
            + [times.cell(n, n) for n in ways]
            + [times.cell(n, OURS) for n in ways if n != OURS and OURS in ways]
        )
        _tell(f"{count} draws")
    titles = [f"{CONTENDERS[n].title} ({way})" for n, (way, _) in ways.items()]
    relative = [f"{CONTENDERS[n].title}: ratio" for n in ways if n != OURS and OURS in ways]
    return table(["S", *titles, *relative], rows, labels=0)


def report(plan: Plan) -> Iterator[str]:
    """Measures all that a plan has.

    Yields:
        The parts of the report, in Markdown.
    """
    version = torch.__version__.partition("+")[0]
    where = "the CPU" if plan.device == "cpu" else "one GPU"
    yield f"torch {version} on {where}; {_threads(plan.machine)}."
    rows = [[f"`{p.name}`", p.title, f"{p.size():,}"] for p in plan.problems]
    yield table(["network", "", "parameters"], rows, labels=2)
    if "steps" in plan.tables:
        yield from steps(plan)
        if "written" in plan.adams and plan.threads and plan.device == "cpu":
            yield f"**A step on {plan.threads} threads** with {ADAMS['written']}, for some of them."
            yield _threaded(replace(plan, seconds=plan.seconds / 2))
    if "memory" in plan.tables and any(p.name in plan.memory for p in plan.problems):
        above = (
            "that of the imported libraries" if plan.device == "cpu" else "what was there before"
        )
        yield f"**Peak memory** of building and training, on top of {above}."
        yield peaks(plan)
    ours = CONTENDERS[OURS].title
    if "predictions" in plan.tables:
        yield (
            f"**A prediction: mean and variance over draws**, relative to the first row of {ours}."
        )
        yield predictions(plan)
    if "sizes" in plan.tables and plan.of(GROWING):
        yield (
            f"**A step against the number of parameters D**, with {ADAMS['written']}, relative to"
            " the plain net's."
        )
        yield sizes(plan)
    if "counts" in plan.tables and plan.of(COUNTING):
        yield f"**A prediction against the number of draws S**, for {nets.REGRESSION.title}."
        yield counts(plan)


def _threads(machine: str) -> str:
    threads = torch.get_num_threads()
    return f"{machine}, {threads} thread{'s' * (threads > 1)}"


def _tell(what: str) -> None:
    print(f"  {time.perf_counter() - BEGIN:4.0f} s: {what}", file=sys.stderr, flush=True)


def _plan(options: argparse.Namespace) -> Plan:
    problems = [replace(PROBLEMS[name], device=options.device) for name in options.nets]
    plan = Plan(
        problems, options.contenders, options.rounds, options.seconds, machine=options.machine
    )
    names = {nets.REGRESSION.name, *options.nets}
    queries = [replace(p, device=options.device) for p in plan.queries if p.name in names]
    plan = replace(
        plan, queries=queries, device=options.device, tables=options.tables, adams=options.adam
    )
    if options.smoke:
        queries = [replace(nets.REGRESSION, draws=3)]
        return replace(
            plan,
            rounds=1,
            seconds=0.0,
            memory=(),
            queries=queries,
            sizes=(1e3,),
            counts=(1, 2),
            threads=0,
        )
    return plan


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of a step and a prediction.")
    add = parser.add_argument
    add("--nets", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="the networks (all)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS),
        help="what is timed (all)")  # fmt: skip
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="the tables (all)")
    add("--adam", nargs="+", choices=ADAMS, default=list(ADAMS),
        help="as users write it, or fused, in the tables of a step (both)")  # fmt: skip
    add("--rounds", type=int, default=15, help="the largest number of rounds (15)")
    add("--threads", type=int, default=1, help="threads of PyTorch (1)")
    add("--machine", default="2 cores", help="what the report says about the machine (2 cores)")
    add("--device", choices=tuple(MARK), default="cpu", help="where networks are (cpu)")
    add("--seconds", type=float, default=24.0, help="how long a column of a table takes (24)")
    add("--smoke", action="store_true", help="one round, and no memory")
    add("--output", type=Path, help="the file with the marks of the section; the chart is"
        " saved next to it; by default the README of this folder, if all is measured")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("Expected --rounds and --threads to be at least 1.")
    complete = all(
        set(chosen) == set(every)
        for chosen, every in (
            (options.nets, PROBLEMS),
            (options.contenders, CONTENDERS),
            (options.tables, TABLES),
            (options.adam, ADAMS),
        )
    )
    if complete and not options.smoke:
        options.output = options.output or README
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the report, and writes it to the README of this folder."""
    options = _options(arguments)
    section = Section(options.output, MARK[options.device]) if options.output else None
    if section:
        section.surroundings()  # raises before the work is done
    warnings.simplefilter("ignore")  # those of peers
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)

    plan = _plan(options)
    if section and options.device == "cpu":
        plan = replace(plan, chart=section.path.with_name(CHART))
    publish(report(plan), section)


if __name__ == "__main__":
    main()
