"""What a model consists of, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_bayes._extras import require


@dataclass(frozen=True)
class Row:
    r"""One parameter.

    Arguments:
        parameter: The dotted name, with the further names of a tied parameter.
        shape: The shape.
        included: Whether the parameter is Bayesian.
        why: The pattern that decided, or why no pattern could.
        prior: The prior, or whether a deterministic parameter trains.
        signal: The current mean of :math:`|\mu| / \sigma` over the elements; `None` if
            deterministic.
    """

    parameter: str
    shape: tuple[int, ...]
    included: bool
    why: str
    prior: str
    signal: float | None


_HEADERS = ("parameter", "shape", "included", "why", "prior", "mean |μ|/σ")


class Summary:
    """A table of parameters.

    Arguments:
        title: The line above the table.
        rows: One row per parameter.
    """

    def __init__(self, title: str, rows: Sequence[Row]) -> None:
        self.title = title
        self.rows = tuple(rows)

    def print(self) -> None:
        """Prints the table.

        Raises:
            ImportError: If the extra `rich` is not installed.
        """
        require("rich", extra="rich")
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in _HEADERS[:-1]:
            table.add_column(header)
        table.add_column(_HEADERS[-1], justify="right")
        for row in self.rows:
            signal = "" if row.signal is None else f"{row.signal:.3g}"
            included = "yes" if row.included else "no"
            shape = "×".join(map(str, row.shape)) or "()"
            table.add_row(row.parameter, shape, included, row.why, row.prior, signal)
        # Names are never cut: a line that is too long may wrap.
        console = Console(highlight=False, markup=False)
        wide = console.options.update(max_width=10_000)
        needed = console.measure(table, options=wide).maximum
        console.width = max(console.width, needed, len(self.title))
        console.print(self.title, table, sep="\n")

    def __repr__(self) -> str:
        included = sum(row.included for row in self.rows)
        return f"Summary({len(self.rows)} parameters, {included} included)"
