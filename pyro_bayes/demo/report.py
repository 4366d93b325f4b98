"""The scores of two nets on the same test data, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_bayes.base.tables import print_table


@dataclass(frozen=True)
class Score:
    """How one net predicts the test data.

    Arguments:
        log_likelihoods: The log predictive density of each test example in nats, of shape
            :math:`(N,)`.
        error: The error, as it is printed.
        calibration: The measure of calibration, as it is printed.
    """

    log_likelihoods: Tensor
    error: str
    calibration: str


def show(title: str, scores: dict[str, Score], *, error: str, calibration: str) -> None:
    """Prints a table of scores.

    Arguments:
        title: The line above the table.
        scores: The scores by name: the net without Bayes, the Bayesian net, and others.
        error: What the error is.
        calibration: What the measure of calibration is.
    """
    headers = ("", "log-likelihood", error, calibration)
    rows = [
        (name, _mean(score.log_likelihoods), score.error, score.calibration)
        for name, score in scores.items()
    ]
    print_table(title, headers, rows, right=headers[1:])
    plain, bayesian, *_ = (score.log_likelihoods for score in scores.values())
    gain = _mean(bayesian - plain, sign="+")
    print(
        "Log-likelihood in nats per example, ± a standard error.\n"
        f"The Bayesian net gains {gain} over the same net without Bayes.\n"
    )


def _mean(values: Tensor, *, sign: str = "") -> str:
    error = values.std().item() / len(values) ** 0.5
    return f"{values.mean().item():{sign}.3f} ± {error:.3f}"
