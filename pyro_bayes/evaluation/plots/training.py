"""Figures of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pyro_bayes.evaluation.plots.canvas import BLUE, GREEN, GREY, ORANGE, begin, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Losses(Protocol):
    """Losses by epoch in nats per datum, as the history of a training run has them.

    Those of validation may be missing, an empty sequence.
    """

    @property
    def nll(self) -> Sequence[float]:
        """The mean negative log-likelihood."""

    @property
    def kl(self) -> Sequence[float]:
        """The KL divergence over the number of data."""

    @property
    def loss(self) -> Sequence[float]:
        """What was minimised."""

    @property
    def validation(self) -> Sequence[float]:
        """The negative log-likelihood of other data."""


def training_curves(history: Losses, *, ax: Axes | None = None) -> Axes:
    """Draws the losses of a training run, epoch by epoch.

    Arguments:
        history: The losses, as :func:`pyro_bayes.fit` returns them.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ImportError: If the extra `plot` is not installed.
        ValueError: If there is no epoch.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(nll=[2.0, 1.0], kl=[0.1, 0.2], loss=[2.1, 1.2], validation=[])
        >>> ax = training_curves(history)
        >>> ax.get_ylabel()
        'nats per datum'
    """
    ax, _ = begin(ax)
    if not history.loss:
        raise ValueError("Expected a history of at least one epoch; got none.")
    from matplotlib.ticker import MaxNLocator

    for name, losses, style in (
        ("loss", history.loss, {"color": GREY, "linewidth": 2.5, "alpha": 0.6}),
        ("NLL", history.nll, {"color": BLUE}),
        ("KL / N", history.kl, {"color": ORANGE}),
        ("validation NLL", history.validation, {"color": GREEN, "linestyle": "--"}),
    ):
        if losses:
            (line,) = ax.plot(range(1, len(losses) + 1), losses, label=name, **style)
    ax.set(xlabel="epoch", ylabel="nats per datum")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, line)
