"""Elements that carry no information: they keep their means, and have no variance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import is_transformed
from pyro_bayes.posterior.layout import Flat, Layout


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


def hold_by_name(mean: Tensor, logvar: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what :func:`hold` does of one parameter.

    Arguments:
        mean: The means.
        logvar: The log-variances, of the same shape.
        mask: Which elements are fixed, likewise.
    """
    return torch.where(mask, mean.detach(), mean), logvar.masked_fill(mask, -math.inf)


def warn_of_use(layout: Layout, gradients: Sequence[Tensor | None]) -> None:
    """Warns once if a network uses elements that are taken not to be used.

    Arguments:
        layout: Where parameters lie.
        gradients: The gradients of draws or means, by parameter.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # no value can be looked at
    layout.checked = True
    for name, gradient in zip(layout.names, gradients, strict=True):
        if name not in layout.masks or gradient is None:
            continue
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if (gradient[layout.masks[name]].abs() > 0).any():
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
        ctx.fixed = layout.fixed
        return mean.view_as(mean), logvar.index_fill(-1, ctx.fixed, -math.inf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if g is None else g.index_fill(-1, ctx.fixed, 0.0) for g in grads)
