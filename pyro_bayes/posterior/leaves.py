"""The parameters that optimisers see: flat ones, and parameters by name in the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.posterior.layout import Layout, Part

_DATA: Any = Tensor.data  # type: ignore[misc]
_GRAD: Any = Tensor.grad  # type: ignore[misc]


class Leaf(nn.Parameter):
    """A parameter whose memory others share: what is assigned to `.data` is copied into it."""

    cleared: tuple[int, int, frozenset[int]] | None = None
    """The identity and version of a gradient of which some parameters, by index, have none."""

    @property
    def data(self) -> Tensor:
        """The values, without a gradient."""
        values: Tensor = _DATA.__get__(self)
        return values

    @data.setter
    def data(self, values: Tensor) -> None:
        own = self.data
        same = own.shape == values.shape and own.dtype == values.dtype
        if same and own.device == values.device and own.layout == values.layout:
            own.copy_(values)
        else:
            self.adopt(values)

    def adopt(self, values: Tensor) -> None:
        """Takes a tensor's memory in the place of its own.

        Arguments:
            values: The tensor.
        """
        _DATA.__set__(self, values)


class NamedView(Leaf):
    """One parameter in a flat leaf: its values and its gradient are a part of the leaf's.

    Arguments:
        leaf: The flat leaf.
        index: Which of its parameters this is.
        count: How many it has.
        part: Where it lies.
    """

    def __new__(cls, leaf: Leaf, index: int, count: int, part: Part) -> NamedView:
        return torch.Tensor._make_subclass(cls, alias(leaf, part), False)

    def __init__(self, leaf: Leaf, index: int, count: int, part: Part) -> None:
        self._leaf, self._index, self._count, self._part = leaf, index, count, part

    def attach(self, leaf: Leaf) -> None:
        """Becomes a part of another leaf, or of the same one in new memory.

        Arguments:
            leaf: The leaf.
        """
        self._leaf = leaf
        self.adopt(alias(leaf, self._part))

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The gradient, a part of the leaf's; `None` if the leaf has none, or this was cleared."""
        grad = self._leaf.grad
        if grad is None or self._index in self._cleared(grad):
            return None
        return grad.as_strided(self._part.shape, self._part.stride, self._part.offset)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        leaf = self._leaf
        if value is None:
            if leaf.grad is None:
                return
            cleared = self._cleared(leaf.grad) | {self._index}
            if len(cleared) == self._count:
                leaf.grad, leaf.cleared = None, None
                return
            own = leaf.grad.detach()
            own[self._part.offset : self._part.offset + self._part.size].zero_()
            leaf.cleared = (id(leaf.grad), own._version, cleared)
            return
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        part = self._part
        leaf.grad.detach().as_strided(part.shape, part.stride, part.offset).copy_(value)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the flat leaf trains."""
        return self._leaf.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if bool(value) != self._leaf.requires_grad:
            raise RuntimeError(
                f"Expected all parameters of a flat posterior to train or none; got"
                f" requires_grad={value} for one of them. To freeze parameters by name, make the"
                " model with named leaves: BayesianModel(net, leaves='named')."
            )

    def requires_grad_(self, requires_grad: bool = True) -> NamedView:
        self.requires_grad = requires_grad
        return self

    def register_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "Expected hooks on parameters that autograd knows; got one on a part of a flat"
            " parameter. Make the model with named leaves: BayesianModel(net, leaves='named')."
        )

    register_post_accumulate_grad_hook = register_hook

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.data.clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)

    def _cleared(self, grad: Tensor) -> frozenset[int]:
        cleared = self._leaf.cleared
        if cleared is None or cleared[:2] != (id(grad), grad._version):
            return frozenset()
        return cleared[2]


def alias(flat: Tensor, part: Part) -> Tensor:
    """Returns a parameter in a flat tensor, in its memory but with a storage of its own.

    So whoever saves or copies it does not write the memory of all.

    Arguments:
        flat: The flat tensor, the first in its storage.
        part: Where the parameter lies.
    """
    flat = _DATA.__get__(flat)
    try:
        width = flat.element_size()
        piece = flat.untyped_storage()[part.offset * width : (part.offset + part.size) * width]
        own = torch.empty(0, dtype=flat.dtype, device=flat.device)
        own.set_(piece, 0, part.shape, part.stride)  # type: ignore[call-overload]
    except (NotImplementedError, RuntimeError, TypeError):  # what has no memory, on the meta device
        return flat.as_strided(part.shape, part.stride, part.offset)
    return own


def whole(flat: Tensor) -> Tensor:
    """Returns a flat tensor with a storage of its own, which others may replace.

    Tensors that alias the former storage keep the memory, whatever becomes of the new one.

    Arguments:
        flat: The flat tensor.
    """
    if flat.is_shared() and flat.is_cpu:
        return flat  # between processes, the storage itself is what is shared
    return alias(flat, Part("", flat.shape, flat.stride(), None, 0, flat.numel()))


class Join(torch.autograd.Function):
    """A flat tensor that named leaves are the parts of, as a function of them."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, flat: Tensor, *leaves: Tensor) -> Tensor:
        ctx.layout = layout
        return flat.view_as(flat)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        parts: Sequence[Tensor] = (
            ctx.layout.split(grad) if torch.is_grad_enabled() else ctx.layout.views(grad)
        )
        needed = ctx.needs_input_grad[2:]
        return None, None, *(p if n else None for p, n in zip(parts, needed, strict=True))
