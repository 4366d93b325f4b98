"""Figures of the posterior, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bayes.evaluation.plots.canvas import BLUE, GREY, begin, finish
from pyro_bayes.model import BayesianModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scale_histogram(bnn: BayesianModel, *, ax: Axes | None = None) -> Axes:
    r"""Draws how wide the posterior is, layer by layer.

    The lines are the prior's deviations, where a layer has several all of them, and none where a
    prior has no deviation, as Cauchy's: a layer whose :math:`\sigma` is there has learned nothing
    from the data. One whose :math:`\sigma` is a single
    peak may not have moved from its start.

    Arguments:
        bnn: The model.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> ax = scale_histogram(BayesianModel(nn.Linear(3, 2)))
        >>> ax.get_xscale()
        'log'
    """
    posterior = _random(bnn)
    scales = {name: (0.5 * logvar).exp() for name, (_, logvar) in posterior.items()}
    lines = {name: bnn.guide.priors.deviations(name) for name in posterior}
    return _ridges(ax, scales, "posterior deviation σ", lines=lines, name="prior")


def signal_histogram(bnn: BayesianModel, *, ax: Axes | None = None) -> Axes:
    r"""Draws how far posterior means are from 0, in deviations, layer by layer.

    Parameters on the left of the line, where :math:`|\mu| / \sigma = 1`, are mostly noise, and
    could often be pruned.

    Arguments:
        bnn: The model.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015)
        | https://arxiv.org/abs/1505.05424

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> ax = signal_histogram(BayesianModel(nn.Linear(3, 2)))
        >>> ax.get_xlabel()
        'signal-to-noise ratio |μ|/σ'
    """
    posterior = _random(bnn)
    ratios = {n: mean.abs() * (-0.5 * logvar).exp() for n, (mean, logvar) in posterior.items()}
    lines = dict.fromkeys(ratios, torch.tensor(1.0))
    return _ridges(ax, ratios, "signal-to-noise ratio |μ|/σ", lines=lines, name="|μ| = σ")


def _random(bnn: BayesianModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns means and log-variances of the elements that are random, by parameter."""
    pairs = {}
    for name, (mean, logvar) in bnn.guide.posterior().items():
        free = ~logvar.isneginf()
        if free.any():
            pairs[name] = mean[free], logvar[free]
    return pairs


def _ridges(
    ax: Axes | None,
    values: Mapping[str, Tensor],
    label: str,
    *,
    lines: Mapping[str, Tensor],
    name: str,
) -> Axes:
    """Draws a histogram of logarithms per layer, one above the other, the first on top."""
    layers: dict[str, list[Tensor]] = {}
    marks: dict[str, set[float]] = {}
    for parameter, numbers in values.items():
        layer = parameter.rpartition(".")[0] or "(base)"
        parts = layers.setdefault(layer, [])
        parts.append(numbers.detach().to("cpu", torch.double).flatten())
        marks.setdefault(layer, set()).update(lines[parameter].flatten().tolist())
    ax, _ = begin(ax, size=(4.8, 1.2 + 0.4 * len(layers)))
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = {layer: torch.cat(parts).log10() for layer, parts in layers.items()}
    marked = [math.log10(mark) for mark in set().union(*marks.values())]
    every = torch.cat([*rows.values(), torch.tensor(marked, dtype=torch.double)])
    every = every[every.isfinite()]
    # torch.quantile takes no more than 16 million numbers.
    low, high = every.kthvalue(1 + len(every) // 1000).values.item(), every.max().item()
    edges = torch.linspace(low - 0.1, high + 0.1, 61, dtype=torch.double)
    for place, (layer, logs) in enumerate(reversed(rows.items())):
        # What is below the range, a mean of 0 first of all, counts in the first bin.
        heights = torch.histogram(logs.clamp(edges[0], edges[-1]), edges).hist
        ax.axhline(place, color=GREY, linewidth=0.5)
        ridge = ax.stairs(
            (place + 0.85 * heights / heights.max()).numpy(),
            (10**edges).numpy(),
            baseline=place,
            fill=True,
            color=BLUE,
            alpha=0.6,
        )
        if len(marked) > 1:
            ends = place, place + 0.85
            ax.vlines(sorted(marks[layer]), *ends, color=GREY, linewidth=1, linestyle="--")
    if len(marked) == 1:
        ax.axvline(10 ** marked[0], color=GREY, linewidth=1, linestyle="--")
    for mark in sorted(marks[next(iter(rows))] or set().union(*marks.values()))[-1:]:
        ax.annotate(
            name,
            (mark, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, 2),
            textcoords="offset points",
            color=GREY,
            ha="center",
            fontsize="small",
        )
    ax.set_yticks(range(len(rows)), reversed(rows), va="bottom")
    ax.tick_params(axis="y", length=0)
    ax.set(xscale="log", xlabel=label, ylabel="layer", ylim=(0, len(rows)))
    if high - low < 1.5:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    return finish(ax, ridge)
