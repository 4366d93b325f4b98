"""Comparison of estimators: the moments of a network's outputs, against those of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from pyro_bayes.base.tables import text_table

Sample: TypeAlias = Callable[[str, str | None, int], list[Tensor]]
"""Returns each output under an estimator in several contexts, of shape (S, *), maybe with one
parameter alone that is not at its mean."""

ESTIMATORS: dict[str, bool | Literal["flipout"]] = {"local noise": True, "flipout": "flipout"}
DRAWS = "draws"
_ERRORS = 4.0  # standard errors, beyond which moments differ
_HEADERS = ("estimator", "output", "mean off by", "variance ratio", "±", "agrees", "through")


class Row(NamedTuple):
    r"""One output under one estimator.

    Arguments:
        estimator: The estimator.
        output: The number of the output, among the tensors of what the network returns.
        mean: The root mean square difference of means from those of draws, beyond chance, in
            deviations :math:`\sigma_f` of the output.
        variance_ratio: The variance by that of draws, averaged over elements.
        variance_error: The standard error of that ratio.
        agrees: Whether both moments are those of draws, up to 4 standard errors.
        through: The parameters whose noise alone disagrees, if the moments do.
        remark: Why some parameters are one draw, if examples meet.
    """

    estimator: str
    output: int
    mean: float
    variance_ratio: float
    variance_error: float
    agrees: bool
    through: tuple[str, ...] = ()
    remark: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What :meth:`pyro_bayes.BayesianModel.check` found. Printed, it is a table.

    Arguments:
        rows: One row per estimator and output.
        num_contexts: The number of contexts of each estimator.
    """

    rows: tuple[Row, ...]
    num_contexts: int

    @property
    def agrees(self) -> bool:
        """Whether all estimators agree with draws."""
        return all(row.agrees for row in self.rows)

    def __str__(self) -> str:
        cells = [
            (
                row.estimator,
                str(row.output),
                f"{row.mean:.3f} σ",
                f"{row.variance_ratio:.3f}",
                f"{row.variance_error:.3f}",
                "yes" if row.agrees else "NO",
                ", ".join(row.through),
            )
            for row in self.rows
        ]
        remarks = dict.fromkeys(row.remark for row in self.rows if row.remark)
        table = text_table(_HEADERS, cells, right=_HEADERS[2:5])
        return "\n".join((table, *[r for r in remarks if r]))


def compare(
    sample: Sample, names: Sequence[str], num_contexts: int, remarks: dict[str, str]
) -> Comparison:
    """Compares the moments of outputs under each estimator with those under draws.

    Arguments:
        sample: Returns outputs in several contexts.
        names: The parameters to ask for what disagrees.
        num_contexts: The number of contexts.
        remarks: What else is known of estimators.
    """
    rows = []
    exact = sample(DRAWS, None, num_contexts)
    few = max(num_contexts // 4, 50)
    for estimator in ESTIMATORS:
        outputs = sample(estimator, None, num_contexts)
        found = [_compared(a, b) for a, b in zip(outputs, exact, strict=True)]
        guilty: dict[int, list[str]] = {}
        for name in names if not all(agrees for *_, agrees in found) else ():
            pairs = zip(sample(estimator, name, few), sample(DRAWS, name, few), strict=True)
            for i, (a, b) in enumerate(pairs):
                if not _compared(a, b)[-1]:
                    guilty.setdefault(i, []).append(name)
        for i, (mean, ratio, error, agrees) in enumerate(found):
            through = () if agrees else tuple(guilty.get(i, ()))
            remark = remarks.get(estimator)
            rows.append(Row(estimator, i, mean, ratio, error, agrees, through, remark))
    return Comparison(tuple(rows), num_contexts)


def _compared(outputs: Tensor, exact: Tensor) -> tuple[float, float, float, bool]:
    """Returns the difference of means, the ratio of variances with its error, and whether all fits.

    Elements of an output are correlated, so errors are those among contexts.
    """
    variance = exact.var(0)
    varies = variance > 1e-10 * (variance.max() + exact.mean(0).square())
    if not varies.any():
        same = bool((outputs.var(0) <= variance.max() + 1e-12).all())
        return 0.0, 1.0 if same else math.inf, 0.0, same
    outputs, exact, variance = outputs[:, varies], exact[:, varies], variance[varies]
    ratio, error = 0.0, 0.0
    for i, values in enumerate((exact, outputs)):
        deviations = (values - values.mean(0)).square() / variance
        error += float(deviations.mean(1).var()) / len(values)
        ratio = float(deviations.mean()) * len(values) / (len(values) - 1) if i else ratio
    difference = (outputs.mean(0) - exact.mean(0)).square() / variance
    off, chance = float(difference.mean()), (1 + ratio) / len(outputs)
    agrees = off <= _ERRORS**2 * chance and abs(ratio - 1) <= _ERRORS * math.sqrt(error)
    return math.sqrt(max(off - chance, 0.0)), ratio, math.sqrt(error), agrees
