"""The result of an evaluation: one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pyro_bayes.base.tables import print_table, text_table


@dataclass(frozen=True)
class Row:
    """One metric.

    Arguments:
        metric: The name.
        value: The value.
        monte_carlo_error: The standard error from the finite number of draws: how far the value
            would be off with other draws, on the same examples.
        standard_error: The standard error from the finite number of examples: how far it would be
            off on other examples, with the same draws.
    """

    metric: str
    value: float
    monte_carlo_error: float
    standard_error: float


_HEADERS = ("metric", "value", "± draws", "± examples")


class Evaluation(Mapping[str, float]):
    """The metrics of a model, a mapping from their names to their values.

    Arguments:
        rows: One row per metric.
        examples: What was known about each example, by name, each tensor of shape :math:`(N, *)`.
        ood: The uncertainties of each example out of distribution, each of shape :math:`(M)`.
        num_samples: The number :math:`S` of draws.

    Attributes:
        rows: One row per metric, with both errors.
        examples: `"y"`, `"log_prob"`, the uncertainties `"total"`, `"aleatoric"` and `"epistemic"`,
            and either `"predicted"`, `"confidence"`, `"correct"` and `"brier"` or `"mean"`,
            `"crps"`, `"pit"`, and `"in@…"` and `"width@…"` of each interval. In the order of the
            loader, they are what the figures are drawn from. If labels may be missing, `"labelled"`
            tells which are there, and the scores of other elements are NaN.
        ood: The three uncertainties; empty if there was no such loader.
        num_samples: The number of draws.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        examples: Mapping[str, Tensor],
        ood: Mapping[str, Tensor],
        num_samples: int,
    ) -> None:
        self.rows = tuple(rows)
        self.examples, self.ood, self.num_samples = dict(examples), dict(ood), num_samples

    @property
    def num_examples(self) -> int:
        """The number :math:`N` of examples."""
        return len(self.examples["y"])

    def __getitem__(self, metric: str) -> float:
        values = {row.metric: row.value for row in self.rows}
        if metric not in values:
            raise KeyError(f"Expected one of {', '.join(values)}; got {metric!r}.")
        return values[metric]

    def __iter__(self) -> Iterator[str]:
        return (row.metric for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as plain numbers, ready for JSON or a data frame."""
        rows = [asdict(row) for row in self.rows]
        return {"num_examples": self.num_examples, "num_samples": self.num_samples, "rows": rows}

    def print(self) -> None:
        """Prints the table.

        Raises:
            ImportError: If the extra `rich` is not installed; `print(evaluation)` needs nothing.
        """
        print_table(self._title, _HEADERS, self._cells(), right=_HEADERS[1:])

    def __repr__(self) -> str:
        return f"{self._title}\n{text_table(_HEADERS, self._cells(), right=_HEADERS[1:])}"

    @property
    def _title(self) -> str:
        return f"Evaluation on {self.num_examples} examples, {self.num_samples} draws"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.metric,
                f"{row.value:.4g}",
                f"{row.monte_carlo_error:.2g}",
                f"{row.standard_error:.2g}",
            )
            for row in self.rows
        ]
