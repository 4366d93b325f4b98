"""The figures: calibration on the left, single predictions on the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pyro_bayes.evaluation import plots
from pyro_bayes.likelihoods.predictive import Predictive

# Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#777777"


def draw_digits(
    path: Path, predictions: Mapping[str, Predictive], images: Tensor, labels: Tensor
) -> None:
    """Draws the reliability of both nets, and the digits of which the Bayesian net is least sure.

    Arguments:
        path: The file.
        predictions: The predictions by the name of the net, one of them `"Bayesian"`.
        images: The images to test, of shape :math:`(N, 64)`.
        labels: Their labels, of shape :math:`(N,)`.
    """
    figure = _figure()
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.1))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    left.suptitle("Calibration (bars: 95% intervals)")
    axes = left.subplots()
    for name, prediction in reversed(list(predictions.items())):
        confidence, predicted = prediction.probs.max(-1)
        plots.reliability(confidence, predicted == labels, label=name, ax=axes)
    axes.grid(alpha=0.3)

    prediction = predictions["Bayesian"]
    right.suptitle("Most uncertain to the Bayesian net (orange: misclassified)")
    order = prediction.entropy.argsort(descending=True)
    for axes, i in zip(right.subplots(3, 4).flat, order.tolist(), strict=False):
        axes.imshow(images[i].reshape(8, 8).numpy(), cmap="gray_r")
        axes.set_axis_off()
        (first, second), (guess, other) = (top.tolist() for top in prediction.probs[i].topk(2))
        axes.set_title(
            f"true {labels[i]}\n{guess}: {first:.0%}, {other}: {second:.0%}",
            fontsize=10,
            color="black" if guess == labels[i] else _ORANGE,
        )
    _save(figure, path)


def draw_regression(
    path: Path,
    target: str,
    pit: Mapping[str, Tensor],
    truth: Tensor,
    mean: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    rows: int = 100,
) -> None:
    """Draws the calibration of both nets, and predictions of the Bayesian net.

    Arguments:
        path: The file.
        target: What the target is called.
        pit: By the name of the net, the predicted probability of a target
            below the true one, of shape :math:`(M,)`.
        truth: The true targets, of shape :math:`(M,)`.
        mean: The Bayesian net's means, of shape :math:`(M,)`.
        low: The lower ends of its 90 % intervals, of shape :math:`(M,)`.
        high: The upper ends, of shape :math:`(M,)`.
        rows: The largest number of predictions to draw.
    """
    figure = _figure()
    left, right = figure.subplots(1, 2)
    for name, values in reversed(list(pit.items())):
        plots.pit_histogram(values, bins=10, label=name, ax=left)
    left.set_title("Calibration: where the truth falls in its prediction")

    x, y, lower, upper = (values[:rows].numpy() for values in (truth, mean, low, high))
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    right.plot(ends, ends, color=_GREY, linewidth=1, label="prediction = truth")
    inside = (lower < x) & (x < upper)
    for shown, color, label in (
        (inside, _BLUE, "truth in 90% interval"),
        (~inside, _ORANGE, "outside"),
    ):
        errors = [(y - lower)[shown], (upper - y)[shown]]
        right.errorbar(
            x[shown], y[shown], errors, color=color, label=label, fmt="o", markersize=4, alpha=0.7
        )
    right.set_title(f"Predictions of the Bayesian net for {len(y)} test rows")
    right.grid(alpha=0.3)
    # A column's name may be long, or contain what Matplotlib takes for mathematics.
    target = target if len(target) <= 40 else f"{target[:39]}…"
    right.set_xlabel(f"true {target}", parse_math=False)
    right.set_ylabel(f"predicted {target}", parse_math=False)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    _save(figure, path)


def _figure() -> Figure:
    return Figure(figsize=(12, 5.6), dpi=100, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path)
