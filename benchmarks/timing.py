"""Times calls in turn, so that what else the machine does falls on all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SLICE, MIN_ROUNDS = 0.05, 3
DASH = "\u2060–\u2060"  # between word joiners, so that no line ends there


class Unable(Exception):  # noqa: N818
    """Says in a few words why something cannot run."""


def reason(error: BaseException) -> str:
    """Returns in a few words why something did not run."""
    if isinstance(error, Unable):
        return f"cannot: {error}"
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    words = str(error).split()[:6]
    return f"cannot: {type(error).__name__} {' '.join(words)}".replace("|", "/")


@dataclass(frozen=True)
class Ratios:
    """The times of a call relative to those of another in the same rounds.

    Arguments:
        values: The ratio in each round.
    """

    values: Sequence[float]

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{short(self.median)} ({short(low)}{DASH}{short(high)})"


def short(value: float) -> str:
    """Returns a positive number to two or three digits."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def duration(seconds: float) -> str:
    """Returns a duration with its unit."""
    return f"{short(seconds)} s" if seconds >= 1 else f"{short(1e3 * seconds)} ms"


class Times:
    """The seconds per call in each round, and why some calls could not run.

    Arguments:
        calls: What is to be timed, by name. A call that raises is left out.
        rounds: The number of rounds.
        limit: About how many seconds all rounds may take. At least three rounds are made, or as
            many as `rounds` if these are fewer.
    """

    def __init__(self, calls: Mapping[str, Call], rounds: int, limit: float) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.failures: dict[str, str] = {}
        repeats = self._warm_up(calls)
        gc.collect()
        start = time.perf_counter()
        names = list(repeats)
        for i in range(rounds if names else 0):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds = _seconds(calls[name], repeats[name]) / repeats[name]
                self.seconds.setdefault(name, []).append(seconds)
            mean = (time.perf_counter() - start) / (i + 1)
            if i + 1 >= MIN_ROUNDS and (i + 2) * mean > limit:
                break

    def _warm_up(self, calls: Mapping[str, Call]) -> dict[str, int]:
        repeats = {}
        for name, call in calls.items():
            try:
                first = _seconds(call, 1)
                best = first if first > 1 else min(_seconds(call, 1) for _ in range(2))
            except Exception as error:
                self.failures[name] = reason(error)
            else:
                repeats[name] = max(1, round(SLICE / best))
        return repeats

    def median(self, name: str) -> float:
        """Returns the median of the seconds per call."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, to: str) -> Ratios:
        """Returns the times of a call relative to those of another."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Ratios([a / b for a, b in pairs])

    def cell(self, name: str, to: str) -> str:
        """Returns a cell of a table: the ratios, or why there are none.

        Arguments:
            name: The call.
            to: The call that it is compared with; its own cell is its time.
        """
        if name not in self.seconds:
            return self.failures[name]
        if name == to or to not in self.seconds:
            return duration(self.median(name))
        return str(self.ratios(name, to))


def _seconds(call: Call, repeats: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
