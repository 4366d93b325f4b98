"""Figures of the prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count, check_level
from pyro_bayes.base.state import Buffers
from pyro_bayes.evaluation.plots.canvas import COLORS, begin, finish, vectors
from pyro_bayes.model import BayesianModel
from pyro_bayes.prediction.batches import arguments, called

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def prior_predictive(
    bnn: BayesianModel,
    x: Any,
    num_samples: int = 200,
    *,
    function: Callable[..., Any] | None = None,
    level: float = 0.9,
    lines: int = 5,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draws what the network computes under the prior, before any data.

    If `x` has one number for each example and so has the output, it draws functions: the band is
    the central interval at each input, and the thin lines are the first draws. Otherwise, it draws
    a histogram of all outputs, without the outermost half per cent on either side. The noise of a
    likelihood is not included. Excluded parameters keep their values.

    The network runs in the mode that it is in, and keeps its buffers.

    Arguments:
        bnn: The model.
        x: The inputs: a tensor, a tuple of positional arguments or a dictionary of keyword
            arguments of the base.
        num_samples: The number of draws from the prior.
        function: What to draw instead of `base(x)`: a function of the base and of the inputs that
            returns a tensor, such as the probabilities of classes.
        level: The probability of the central interval.
        lines: The number of draws that are shown as lines.
        label: The entry in the legend.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.
        TypeError: If the output is not a tensor.
        ValueError: If an output is not finite, or an argument is out of range.

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> bnn = BayesianModel(nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)))
        >>> ax = prior_predictive(bnn, torch.linspace(-3, 3, 50).unsqueeze(-1))
        >>> ax.get_ylabel()
        'output'
    """
    ax, index = begin(ax)
    check_count("num_samples", num_samples, least=2)
    check_count("lines", lines, least=0)
    check_level("level", level)
    outputs = _outputs(bnn, x, num_samples, function)
    color = COLORS[index % len(COLORS)]
    (flat,) = vectors(outputs=outputs.flatten())
    if not _is_line(x, outputs[0]):
        start, stop = (end.item() for end in _interval(flat, 0.99))
        stop += 1e-6 * max(1, abs(start))
        edges = torch.linspace(start, stop, 41, dtype=torch.double)
        heights = torch.histogram(flat, edges).hist / len(flat) / (edges[1] - edges[0])
        steps = ax.stairs(
            heights.numpy(), edges.numpy(), fill=True, color=color, alpha=0.4, label=label
        )
        if index == 0:
            ax.set(xlabel="output", ylabel="density")
        return finish(ax, steps)
    (inputs,) = vectors(x=x.flatten())
    order = inputs.argsort()
    t, draws = inputs[order].numpy(), flat.reshape(num_samples, -1)[:, order]
    low, high = _interval(draws, level)
    band = ax.fill_between(
        t, low.numpy(), high.numpy(), color=color, alpha=0.25, linewidth=0, label=label
    )
    before = ax.get_ylim() if index else (math.inf, -math.inf)
    for draw in draws[:lines]:
        ax.plot(t, draw.numpy(), color=color, linewidth=0.8, alpha=0.7)
    # A draw with heavy tails would hide all others.
    bottom, top = low.min().item(), high.max().item()
    margin = 0.25 * max(top - bottom, 1e-6 * max(1, abs(top)))
    ax.set_ylim(min(bottom - margin, before[0]), max(top + margin, before[1]))
    if index == 0:
        ax.set(xlabel="x", ylabel="output", xlim=(t[0], t[-1]))
    return finish(ax, band)


def _outputs(
    bnn: BayesianModel, x: Any, num_samples: int, function: Callable[..., Any] | None
) -> Tensor:
    """Returns what a base computes with draws from the prior, the draws in the first dimension."""
    args, kwargs = arguments(x)
    outputs = []
    with torch.no_grad(), bnn.lock():
        with bnn.mean() as base:
            buffers = Buffers(base.modules())
        for _ in range(num_samples):
            try:
                with bnn.hold(bnn.sample_prior()) as base:
                    output = (
                        called(base, args, kwargs)
                        if function is None
                        else function(base, *args, **kwargs)
                    )
            finally:
                buffers.restore()
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"Expected an output that is a tensor; got {type(output).__name__}. Say with"
                    " function what to draw of it."
                )
            outputs.append(output.detach().clone())
    return torch.stack(outputs)


def _is_line(x: Any, output: Tensor) -> bool:
    """Returns whether inputs and outputs have one number for each example."""
    shapes = (len(x),), (len(x), 1)
    return isinstance(x, Tensor) and x.shape in shapes and output.shape in shapes


def _interval(values: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Returns the ends of the central interval over the first dimension.

    `torch.quantile` takes no more than 16 million numbers.
    """
    rank = round((1 - level) / 2 * (len(values) - 1))
    ordered = values.sort(0).values
    return ordered[rank], ordered[len(values) - 1 - rank]
