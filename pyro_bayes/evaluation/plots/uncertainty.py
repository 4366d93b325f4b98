"""Figures of uncertainty: what it is made of, and what it knows of errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_bayes.base.checks import check_level
from pyro_bayes.evaluation.plots.canvas import COLORS, GREY, begin, finish, vectors
from pyro_bayes.likelihoods.predictive import Predictive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


def regression_band(
    x: Tensor,
    predictive: Predictive,
    *,
    level: float = 0.9,
    data: tuple[Tensor, Tensor] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draws a predicted curve, and what its uncertainty is made of.

    The outer band is the central interval of the predictive distribution. The inner one is the
    interval of the mean under the posterior, :math:`m \pm z \sqrt{\mathrm{epistemic}}`: what more
    data would shrink. The rest is noise of the target.

    Arguments:
        x: The inputs, of shape :math:`(B)` or :math:`(B, 1)`, in any order.
        predictive: The prediction at them, of one number each.
        level: The probability of both intervals.
        data: Inputs and targets to draw as points, such as those trained on.
        label: The entry of the mean in the legend.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.
        ValueError: If an argument is of the wrong shape, not finite, or out of range.

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> from pyro_bayes.likelihoods import Gaussian
        >>> bnn, x = BayesianModel(nn.Linear(1, 1), init_logvar=-2.0), torch.linspace(-1, 1, 20)
        >>> predictive = Gaussian(0.1).predictive(bnn, x.unsqueeze(-1))
        >>> ax = regression_band(x, predictive)
    """
    ax, index = begin(ax)
    check_level("level", level)
    low, high = predictive.interval(level)
    reach = Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)) * predictive.epistemic.sqrt()
    inputs, mean, low, high, reach = vectors(
        x=_column(x),
        mean=_column(predictive.mean),
        low=_column(low),
        high=_column(high),
        reach=_column(reach),
    )
    order = inputs.argsort()
    t, m, r = (values[order].numpy() for values in (inputs, mean, reach))
    color = COLORS[index % len(COLORS)]
    ax.fill_between(
        t,
        low[order].numpy(),
        high[order].numpy(),
        color=color,
        alpha=0.18,
        linewidth=0,
        label=f"{level:.0%}: epistemic and aleatoric",
    )
    band = f"{level:.0%}: epistemic"
    ax.fill_between(t, m - r, m + r, color=color, alpha=0.38, linewidth=0, label=band)
    (line,) = ax.plot(t, m, color=color, linewidth=1.5, label=label or "mean")
    if data is not None:
        points = vectors(x=_column(data[0]), y=_column(data[1]))
        ax.plot(*(p.numpy() for p in points), ".", color="black", markersize=4, label="data")
    if index == 0:
        ax.set(xlabel="x", ylabel="y", xlim=(t[0], t[-1]))
    return finish(ax, line)


def rejection_curve(
    uncertainty: Tensor, error: Tensor, *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws the mean error of what is left when the most uncertain predictions are rejected.

    It falls as far as uncertainty knows where errors are: to the dashed line if it ranks examples
    by their errors, and not at all if it knows nothing. Equal uncertainties are rejected in random
    order, on average.

    Arguments:
        uncertainty: The uncertainty of each prediction, of shape :math:`(N)`.
        error: Its error, such as whether it is wrong or the squared error, of shape :math:`(N)`.
        label: The entry in the legend.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.
        ValueError: If an argument is of the wrong shape, or not finite.

    Example:
        >>> uncertainty = torch.rand(200)
        >>> ax = rejection_curve(uncertainty, torch.rand(200) < uncertainty)
        >>> ax.get_xlabel()
        'share rejected'
    """
    ax, index = begin(ax)
    uncertainty, error = vectors(uncertainty=uncertainty, error=error)
    if index == 0:
        ax.axhline(error.mean().item(), color=GREY, linewidth=1, label="none rejected")
        best = _rejection(error, error)
        ax.plot(*best, color=GREY, linewidth=1, linestyle="--", label="by the error itself")
        ax.set(xlim=(0, 1), xlabel="share rejected", ylabel="mean error of the rest")
    color = COLORS[index % len(COLORS)]
    (line,) = ax.plot(*_rejection(uncertainty, error), color=color, linewidth=1.5, label=label)
    ax.set_ylim(bottom=0)
    return finish(ax, line)


def _column(values: Tensor) -> Tensor:
    return values.squeeze(-1) if values.dim() == 2 else values


def _rejection(uncertainty: Tensor, error: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the shares rejected, from none to all but one, and the mean errors of the rest."""
    _, group, sizes = uncertainty.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(sizes)).double().index_add(0, group, error) / sizes
    kept = torch.arange(1, len(error) + 1)
    risk = means[group.sort().values].cumsum(0) / kept
    return (1 - kept / len(error)).numpy(), risk.numpy()
