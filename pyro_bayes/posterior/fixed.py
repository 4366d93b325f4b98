"""Elements that carry no information: they keep their means, and have no variance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.fixed import FixedElements
from pyro_bayes.base.torch_private import is_batched, is_transformed
from pyro_bayes.posterior.layout import Flat, Layout


class Fixed:
    """The elements of a posterior that carry no information, as they are in the base now.

    Arguments:
        elements: What tells which they are.
        layouts: Where parameters lie.
    """

    def __init__(self, elements: FixedElements, layouts: Sequence[Layout]) -> None:
        self._elements, self._layouts = elements, layouts
        self._devices: list[torch.device] = []

    def place(self, devices: list[torch.device]) -> None:
        """Notes where flat tensors are from now on.

        Arguments:
            devices: The device of each layout.
        """
        self._devices = devices
        masks = self._elements.masks()
        for layout, device in zip(self._layouts, devices, strict=True):
            layout.fix(masks, device)

    def mask(self, name: str) -> Tensor | None:
        """Returns which elements of a parameter are fixed, if there are any."""
        return self._masks().get(name)

    def hold(self, flats: list[Flat]) -> list[Flat]:
        """Does what :func:`hold` does of each dtype and device."""
        self._masks()
        return [hold(flat) for flat in flats]

    def hold_by_name(
        self, pairs: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Does what :func:`hold` does of means and log-variances by name."""
        with torch.enable_grad():  # as of leaves, a gradient may be asked for later
            for name, mask in self._masks().items():
                mean, logvar = pairs[name]
                held = torch.where(mask, mean.detach(), mean), logvar.masked_fill(mask, -math.inf)
                pairs[name] = held
        return pairs

    def _masks(self) -> dict[str, Tensor]:
        # A compiler would guard what is looked at.
        if not torch.compiler.is_compiling() and self._elements.changed():
            self.place(self._devices)
        return {name: mask for layout in self._layouts for name, mask in layout.masks.items()}


def hold(posterior: Flat) -> Flat:
    r"""Returns a posterior whose fixed elements have no variance and get no gradient.

    Their :math:`\log \sigma^2` is :math:`-\infty`.

    Arguments:
        posterior: The posterior.

    Example:
        >>> layout = Layout({"w": torch.zeros(2)})
        >>> layout.fix({"w": torch.tensor([True, False])}, None)
        >>> hold(Flat(layout, torch.ones(2), torch.zeros(2))).logvar
        tensor([-inf, 0.])
    """
    layout, mean, logvar = posterior
    if layout.fixed is None:
        return posterior
    if is_transformed():
        values = mean.detach().index_select(-1, layout.fixed)
        mean = mean.index_copy(-1, layout.fixed, values)
        return Flat(layout, mean, logvar.index_fill(-1, layout.fixed, -math.inf))
    return Flat(layout, *_Hold.apply(layout, mean, logvar))


def warn_of_use(layout: Layout, gradients: Sequence[Tensor | None]) -> None:
    """Warns once if a network uses elements that are taken not to be used.

    Arguments:
        layout: Where parameters lie.
        gradients: The gradients of draws or means, by parameter.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # no value can be looked at
    for name, gradient in zip(layout.names, gradients, strict=True):
        if name not in layout.masks or gradient is None:
            continue
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if (gradient[layout.masks[name]].abs() > 0).any():
            layout.checks = 0
            warnings.warn(
                f"Expected the padding row or the pruned elements of '{name}' to have no effect on"
                " the loss; got a gradient of them, which is dropped: they are not random, and do"
                " not train. If the network uses the row, as in F.linear(h, embedding.weight), set"
                " embedding.padding_idx = None. If only a penalty uses it, ignore this.",
                stacklevel=2,
            )


class _Hold(torch.autograd.Function):
    """The means, of which nothing is copied, and the log-variances."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.fixed = layout, layout.fixed
        return mean.view_as(mean), logvar.index_fill(-1, ctx.fixed, -math.inf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.layout.checks and grads[0] is not None and not torch.is_grad_enabled():
            ctx.layout.checks -= 1
            if not is_batched(grads):
                warn_of_use(ctx.layout, ctx.layout.split(grads[0]))
        return None, *(None if g is None else g.index_fill(-1, ctx.fixed, 0.0) for g in grads)
