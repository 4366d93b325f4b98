"""The figures: calibration on the left, single predictions on the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical

if TYPE_CHECKING:
    from pyro_bayes.demo.digits import Reliability

# Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#777777"
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": _ORANGE, "marker": "s", "linestyle": "--"},
    {"color": _BLUE, "marker": "o", "linestyle": "-"},
)


def draw_digits(
    path: Path,
    curves: Mapping[str, Reliability],
    images: Tensor,
    labels: Tensor,
    probs: Tensor,
) -> None:
    """Draws the reliability of both nets, and the digits of which the Bayesian net is least sure.

    Arguments:
        path: The file.
        curves: The reliability by the name of the net, first without Bayes.
        images: The images to test, of shape :math:`(N, 64)`.
        labels: Their labels, of shape :math:`(N,)`.
        probs: The Bayesian net's predictions, of shape :math:`(N, 10)`.
    """
    figure = _figure()
    grid = figure.add_gridspec(4, 2, width_ratios=(1, 1.1))
    upper = figure.add_subplot(grid[:3, 0])
    lower = figure.add_subplot(grid[3, 0], sharex=upper)
    _diagonal(upper, 0, 1, "calibrated")
    for (name, curve), style in zip(curves.items(), _STYLES, strict=True):
        # How far the accuracy of a calibrated net strays by chance.
        chance = (curve.confidence * (1 - curve.confidence) / curve.count) ** 0.5
        points = style | {"linestyle": "none", "capsize": 2, "elinewidth": 1, "label": name}
        upper.errorbar(curve.confidence, curve.accuracy, chance, **points)
        lower.plot(curve.confidence, curve.count, **style)
    upper.set(
        title="Calibration (bars: ± one standard error if calibrated)",
        ylabel="accuracy",
        xlim=(-0.02, 1.02),
        ylim=(-0.05, 1.05),
    )
    upper.legend(loc="upper left")
    upper.tick_params(labelbottom=False)
    lower.set(
        xlabel="confidence (largest predicted probability)",
        ylabel="images",
        yscale="log",
        ylim=(0.6, 2 * len(labels)),
    )
    lower.grid(alpha=0.3)
    figure.align_ylabels([upper, lower])

    right = figure.add_subfigure(grid[:, 1])
    right.suptitle("Most uncertain to the Bayesian net (orange: misclassified)")
    order = Categorical(probs).entropy().argsort(descending=True)
    for axes, i in zip(right.subplots(3, 4).flat, order.tolist(), strict=False):
        axes.imshow(images[i].reshape(8, 8).numpy(), cmap="gray_r")
        axes.set_axis_off()
        (first, second), (guess, other) = (top.tolist() for top in probs[i].topk(2))
        axes.set_title(
            f"true {labels[i]}\n{guess}: {first:.0%}, {other}: {second:.0%}",
            fontsize=10,
            color="black" if guess == labels[i] else _ORANGE,
        )
    _save(figure, path)


def draw_regression(
    path: Path,
    target: str,
    levels: Mapping[str, Tensor],
    truth: Tensor,
    prediction: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Draws the calibration of both nets, and predictions of the Bayesian net.

    Arguments:
        path: The file.
        target: What the target is called.
        levels: By the name of the net, first without Bayes, the predicted probability of a target
            below the true one, of shape :math:`(M,)`.
        truth: The true targets, of shape :math:`(M,)`.
        prediction: The Bayesian net's means for the first rows and the lower and upper ends of
            its 90 % intervals, each of shape :math:`(R,)`.
    """
    figure = _figure()
    left, right = figure.subplots(1, 2)
    _diagonal(left, 0, 1, "calibrated (90% band)")
    nominal = torch.linspace(0, 1, 101, dtype=torch.float64)
    chance = 1.645 * (nominal * (1 - nominal) / len(truth)).sqrt()
    band = (nominal - chance).numpy(), (nominal + chance).numpy()
    left.fill_between(nominal.numpy(), *band, color=_GREY, alpha=0.2, linewidth=0)
    for (name, level), style in zip(levels.items(), _STYLES, strict=True):
        observed = (level[:, None] <= nominal).double().mean(0)
        left.plot(nominal.numpy(), observed.numpy(), label=name, markevery=10, **style)
    left.set(
        title="Calibration of the predicted quantiles",
        xlabel="predicted probability of a smaller target",
        ylabel="share of test rows with a smaller target",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    _legend_below(left)

    mean, low, high = (p.numpy() for p in prediction)
    x = truth[: len(mean)].numpy()
    _diagonal(right, min(x.min(), mean.min()), max(x.max(), mean.max()), "prediction = truth")
    inside = (low < x) & (x < high)
    for rows, color, label in (
        (inside, _BLUE, "truth in 90% interval"),
        (~inside, _ORANGE, "outside"),
    ):
        errors = [(mean - low)[rows], (high - mean)[rows]]
        right.errorbar(
            x[rows], mean[rows], errors, color=color, label=label, fmt="o", markersize=4, alpha=0.7
        )
    right.set_title(f"Predictions of the Bayesian net for {len(mean)} test rows")
    # A column's name may be long, or contain what Matplotlib takes for mathematics.
    target = target if len(target) <= 40 else f"{target[:39]}…"
    right.set_xlabel(f"true {target}", parse_math=False)
    right.set_ylabel(f"predicted {target}", parse_math=False)
    _legend_below(right)
    _save(figure, path)


def _figure() -> Figure:
    return Figure(figsize=(12, 5.6), dpi=100, layout="constrained")


def _diagonal(axes: Axes, start: float, end: float, label: str) -> None:
    axes.plot([start, end], [start, end], color=_GREY, linewidth=1, label=label)
    axes.grid(alpha=0.3)


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path)
