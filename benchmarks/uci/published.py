"""What others published, read from a file that the user names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEAN_FIELD = ("VI", "PBP", "hoDVI", "MCVI", "DVI", "dDVI", "Variational inference")
"""How the names of methods with a factorised Gaussian posterior begin."""
ENSEMBLES = "Deep ensembles"


@dataclass(frozen=True)
class Method:
    """The published numbers of one method.

    Arguments:
        name: The name.
        means: The mean over splits by dataset.
        errors: The number behind ±, as printed, where there is one.
    """

    name: str
    means: dict[str, float]
    errors: dict[str, str]

    @property
    def is_mean_field(self) -> bool:
        """Whether the posterior is a factorised Gaussian."""
        return self.name.split(" (")[0] in MEAN_FIELD

    def cell(self, dataset: str) -> str:
        """Returns the mean ± the error of a dataset, empty if there is none."""
        if dataset not in self.means:
            return ""
        error = self.errors[dataset]
        return f"{self.means[dataset]:.2f}" + (f" ± {error}" if error else "")


def read(path: Path, metric: str) -> list[Method]:
    """Reads the numbers of all methods that somebody has looked up in a readable source.

    Arguments:
        path: The file, with the columns dataset, method, metric, mean, err and status.
        metric: `"LL"` or `"RMSE"`.

    Raises:
        ValueError: If the file lacks a column.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    needed = ("dataset", "method", "metric", "mean", "err", "status")
    if not rows or not set(needed) <= set(rows[0]):
        raise ValueError(f"Expected {path} to have the columns {', '.join(needed)}.")
    methods: dict[str, Method] = {}
    for row in rows:
        if row["metric"] == metric and row["status"].startswith("read"):
            method = methods.setdefault(row["method"], Method(row["method"], {}, {}))
            method.means[row["dataset"]] = float(row["mean"])
            method.errors[row["dataset"]] = _short(row["err"])
    return sorted(methods.values(), key=lambda method: not method.is_mean_field)


def best_mean_field(methods: Sequence[Method], dataset: str) -> Method:
    """Returns the mean-field method with the highest log-likelihood on a dataset."""
    candidates = [m for m in methods if m.is_mean_field and dataset in m.means]
    return max(candidates, key=lambda method: method.means[dataset])


def ensembles(methods: Sequence[Method]) -> Method:
    """Returns the numbers of deep ensembles."""
    return next(m for m in methods if m.name.startswith(ENSEMBLES))


def _short(error: str) -> str:
    try:
        return f"{float(error):.2f}"
    except ValueError:
        return ""
