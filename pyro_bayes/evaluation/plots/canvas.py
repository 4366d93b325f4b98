"""What all figures share: axes, colours, and what they refuse to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bayes.base.extras import require

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_MARK = "pyro_bayes series"


def begin(ax: Axes | None, *, size: tuple[float, float] = (4.8, 3.6)) -> tuple[Axes, int]:
    """Returns axes to draw on, those of a new figure if none are given.

    Arguments:
        ax: The axes.
        size: The width and the height of a new figure in inches.

    Returns:
        The axes, and how many series are on them.

    Raises:
        ImportError: If the extra `plot` is not installed.
        TypeError: If `ax` is something else.
    """
    require("matplotlib", extra="plot")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=size, dpi=150, layout="constrained").add_subplot()
        ax.spines[["top", "right"]].set_visible(False)
    if not isinstance(ax, Axes):
        kind = type(ax).__name__
        raise TypeError(f"Expected ax to be one Axes of matplotlib or None; got {kind}.")
    return ax, sum(artist.get_gid() == _MARK for artist in ax.get_children())


def finish(ax: Axes, artist: Artist, **legend: Any) -> Axes:
    """Counts an artist as one more series, and makes the legend.

    Arguments:
        ax: The axes.
        artist: The artist.
        legend: Where the legend is.

    Returns:
        The axes.
    """
    artist.set_gid(_MARK)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small", **legend)
    return ax


def vectors(**tensors: Tensor) -> list[Tensor]:
    """Returns tensors in double precision, on the CPU.

    Arguments:
        tensors: The tensors, by the names of the arguments.

    Raises:
        TypeError: If one is not a tensor.
        ValueError: If they are not of one shape :math:`(N)`, are empty, or hold a number that is
            not finite.
    """
    columns: list[Tensor] = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Expected {name} to be a tensor; got {type(tensor).__name__}.")
        if tensor.dim() != 1 or len(tensor) == 0:
            raise ValueError(
                f"Expected {name} to be of shape (N,), with a number for each of N examples; got"
                f" {tuple(tensor.shape)}."
            )
        if columns and len(tensor) != len(columns[0]):
            raise ValueError(
                f"Expected {' and '.join(tensors)} to be of the same length; got"
                f" {len(columns[0])} and {len(tensor)}."
            )
        values = tensor.detach().to("cpu", torch.double)
        if not values.isfinite().all():
            raise ValueError(f"Expected {name} to be finite; got nan or inf among its numbers.")
        columns.append(values)
    return columns
