"""Figures of calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count
from pyro_bayes.evaluation.plots.canvas import COLORS, GREY, begin, finish, vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROUNDING = 1e-5  # by which a mean of probabilities in single precision may be above 1


def reliability(
    confidence: Tensor,
    correct: Tensor,
    *,
    bins: int = 15,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws how often predictions are right, by how confident they are.

    A point is the mean confidence and the accuracy of a bin, and its bar the 95 % Wilson interval
    of the accuracy: of calibrated predictions, 19 of 20 bars meet the diagonal. Points above it are
    underconfident. The steps below are the shares of examples.

    Arguments:
        confidence: The probabilities of the predicted classes, of shape :math:`(N)`.
        correct: Whether the predictions are right, of shape :math:`(N)`.
        bins: The number of bins of equal width.
        label: The entry in the legend.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.
        TypeError: If an argument is not a tensor.
        ValueError: If an argument is of the wrong shape or out of range.

    References:
        | Probable Inference, the Law of Succession, and Statistical Inference (Wilson, 1927)
        | https://doi.org/10.1080/01621459.1927.10502953

    Example:
        >>> confidence = torch.rand(1000)
        >>> ax = reliability(confidence, torch.rand(1000) < confidence)
        >>> ax.get_xlabel()
        'confidence'
    """
    ax, index = begin(ax, size=(4.2, 4.2))
    check_count("bins", bins)
    confidence, correct = vectors(confidence=confidence, correct=correct)
    confidence = _probabilities("confidence", confidence)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    places = torch.bucketize(confidence, edges[1:-1], right=True)
    counts = places.bincount(minlength=bins)
    filled = counts > 0
    x, y = (
        (torch.zeros_like(edges[1:]).index_add(0, places, values) / counts)[filled]
        for values in (confidence, correct)
    )
    low, high = _wilson(y, counts[filled])
    if index == 0:
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="calibrated")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    color = COLORS[index % len(COLORS)]
    shares = counts / len(confidence)
    ax.stairs(shares.numpy(), edges.numpy(), fill=True, color=color, alpha=0.25)
    points = ax.errorbar(
        x.numpy(),
        y.numpy(),
        torch.stack([y - low, high - y]).numpy(),
        color=color,
        marker="osD^vP"[index % 6],
        markersize=4.5,
        linestyle="none",
        capsize=2,
        elinewidth=1,
        label=label,
        clip_on=False,
        zorder=3,
    )
    # Points may be anywhere: the legend is above.
    return finish(ax, points[0], loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def pit_histogram(
    pit: Tensor, *, bins: int = 20, label: str | None = None, ax: Axes | None = None
) -> Axes:
    r"""Draws where targets fall in their predictive distributions.

    The values :math:`F(y)` of calibrated predictions are uniform. A histogram like a U is
    overconfident, one like a hill underconfident, and a slope is a bias. The band has 95 % of the
    bins of calibrated predictions in it.

    Arguments:
        pit: The values of the predictive distribution function at the targets (randomised for
            counts), of any shape.
        bins: The number of bins.
        label: The entry in the legend.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.
        ValueError: If the values are not between 0 and 1, or `bins` is not a positive integer.

    References:
        | Probabilistic Forecasts, Calibration and Sharpness (Gneiting et al., 2007)
        | https://doi.org/10.1111/j.1467-9868.2007.00587.x

    Example:
        >>> pit_histogram(torch.rand(500)).get_ylabel()
        'density'
    """
    ax, index = begin(ax)
    check_count("bins", bins)
    (values,) = vectors(pit=pit.flatten())
    values = _probabilities("pit", values)
    count = len(values)
    if index == 0:
        chance = 1.96 * ((bins - 1) / count) ** 0.5
        low, high = max(0.0, 1 - chance), 1 + chance
        ax.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0, label="calibrated (95%)")
        ax.axhline(1, color=GREY, linewidth=1)
        ax.set(xlim=(0, 1), xlabel="PIT value F(y)", ylabel="density")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    places = torch.bucketize(values, edges[1:-1], right=True)
    heights = places.bincount(minlength=bins) * bins / count
    color = COLORS[index % len(COLORS)]
    steps = ax.stairs(heights.numpy(), edges.numpy(), color=color, linewidth=1.5, label=label)
    if index == 0:
        ax.stairs(heights.numpy(), edges.numpy(), fill=True, color=color, alpha=0.25)
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.15 * heights.max().item()))
    return finish(ax, steps)


def _wilson(shares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the 95 % score intervals of binomial shares."""
    z = 1.96
    centre = (shares + z**2 / (2 * counts)) / (1 + z**2 / counts)
    reach = (shares * (1 - shares) / counts + (z / (2 * counts)) ** 2).sqrt()
    reach = z * reach / (1 + z**2 / counts)
    return torch.minimum(centre - reach, shares), torch.maximum(centre + reach, shares)


def _probabilities(name: str, values: Tensor) -> Tensor:
    if values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING:
        raise ValueError(
            f"Expected {name} to be between 0 and 1; got values from {values.min().item():g} to"
            f" {values.max().item():g}."
        )
    return values.clamp(0, 1)
