"""The parameters that optimisers see: flat ones, and parameters by name in the same memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.base.kept import Kept
from pyro_bayes.posterior.layout import Layout, Part

_DATA: Any = Tensor.data
_GRAD: Any = Tensor.grad


class Leaf(nn.Parameter):
    """A parameter whose memory others share: what is assigned to `.data` is copied into it."""

    cleared: tuple[weakref.ref[Tensor], int, frozenset[int]] | None = None
    """A gradient and its version, of which some parameters, by index, have none."""
    frozen: frozenset[int] = frozenset()
    """The indices of parameters that are not to train, while others do: a wish that is refused."""

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)

    def requires_grad_(self, requires_grad: bool = True) -> Leaf:
        self.frozen = frozenset()
        super().requires_grad_(requires_grad)
        return self

    def check_frozen(self, names: Sequence[str]) -> None:
        """Raises a `RuntimeError` if some parameters are frozen and others not.

        Arguments:
            names: The names of the parameters.
        """
        if self.frozen and self.requires_grad:
            raise RuntimeError(
                "Expected all parameters of a flat posterior to train or none; got"
                f" requires_grad=False for {[names[i] for i in sorted(self.frozen)]}. To freeze"
                " parameters by name, make the model with named leaves:"
                " BayesianModel(net, leaves='named')."
            )

    def adopt(self, values: Tensor) -> None:
        """Takes a tensor's memory in the place of its own.

        Arguments:
            values: The tensor.
        """
        _DATA.__set__(self, values)


class NamedView(Leaf):
    """One parameter in a flat leaf, a differentiable view: its gradient is a part of the leaf's.

    Arguments:
        leaf: The flat leaf.
        index: Which of its parameters this is.
        count: How many it has.
        part: Where it lies.
    """

    def __new__(cls, leaf: Leaf, index: int, count: int, part: Part) -> NamedView:
        with torch.inference_mode(False), torch.enable_grad():
            if part.order is None:
                view = leaf[part.offset : part.offset + part.size].view(part.shape)
            else:
                view = leaf.as_strided(part.shape, part.stride, part.offset)
            return view.as_subclass(cls)

    def __init__(self, leaf: Leaf, index: int, count: int, part: Part) -> None:
        self.leaf, self._index, self._count, self._part = leaf, index, count, part
        self._former: list[weakref.ref[NamedView]] = []

    def keep(self, former: Iterable[NamedView]) -> None:
        """Keeps the views that this one takes the place of, for as long as others hold them.

        Arguments:
            former: The views.
        """
        self._former = [weakref.ref(view) for view in former]

    def former(self) -> list[NamedView]:
        """Returns the views that this one has taken the place of."""
        views = (reference() for reference in self._former)
        return [view for view in views if view is not None]

    @property
    def data(self) -> Tensor:
        """The values, without a gradient, in a storage of their own."""
        return alias(self.leaf, self._part)

    @data.setter
    def data(self, values: Tensor) -> None:
        own = self.data
        if values.shape != own.shape or values.dtype != own.dtype or values.device != own.device:
            raise TypeError(
                f"Expected values of shape {tuple(own.shape)}, {own.dtype} on {own.device}; got"
                f" {tuple(values.shape)}, {values.dtype} on {values.device}. Convert the whole"
                " model, as in bnn.double()."
            )
        own.copy_(values)

    def detach(self) -> Tensor:
        """Returns the values, without a gradient, in a storage of their own."""
        return self.data

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """True, since optimisers may change its values by themselves."""
        return True

    @property
    def grad(self) -> Tensor | None:
        """The gradient, a part of the leaf's; `None` if the leaf has none, or this was cleared."""
        grad = self.leaf.grad
        if grad is None or self._index in self._cleared(grad):
            return None
        return self._of(grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        leaf = self.leaf
        if value is None:
            if leaf.grad is None:
                return
            cleared = self._cleared(leaf.grad) | {self._index}
            if len(cleared) == self._count:
                leaf.grad, leaf.cleared = None, None
                return
            own = leaf.grad.detach()
            own[self._part.offset : self._part.offset + self._part.size].zero_()
            leaf.cleared = (weakref.ref(leaf.grad), own._version, cleared)
            return
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        self._of(leaf.grad.detach()).copy_(value)

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter trains, which goes for all of a leaf or none."""
        return self.leaf.requires_grad and self._index not in self.leaf.frozen

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        leaf, own = self.leaf, {self._index}
        frozen = leaf.frozen if leaf.requires_grad else frozenset(range(self._count))
        frozen = frozen - own if value else frozen | own
        trains = len(frozen) < self._count
        nn.Parameter.requires_grad_(leaf, trains)
        leaf.frozen = frozen if trains else frozenset()

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

    def _of(self, flat: Tensor) -> Tensor:
        """The part of a flat tensor, which may be a part of another itself."""
        shape, stride, offset = self._part.shape, self._part.stride, self._part.offset
        return flat.as_strided(shape, stride, flat.storage_offset() + offset)

    def _cleared(self, grad: Tensor) -> frozenset[int]:
        cleared = self.leaf.cleared
        if cleared is None or cleared[0]() is not grad or cleared[1] != grad._version:
            return frozenset()
        return cleared[2]


def whole_leaves(parameters: Iterable[Tensor]) -> list[Leaf]:
    """Returns the flat leaves all of whose parts are among some parameters.

    Arguments:
        parameters: The parameters.
    """
    counts: dict[int, int] = {}
    views = [p for p in parameters if isinstance(p, NamedView)]
    for view in views:
        counts[id(view.leaf)] = counts.get(id(view.leaf), 0) + view.numel()
    return [view.leaf for view in views if counts[id(view.leaf)] == view.leaf.numel()]


def alias(flat: Tensor, part: Part) -> Tensor:
    """Returns a parameter in a flat tensor, in its memory but with a storage of its own.

    So whoever saves or copies it does not write the memory of all.

    Arguments:
        flat: The flat tensor, the first in its storage.
        part: Where the parameter lies.
    """
    flat = _DATA.__get__(flat)
    if flat.is_cpu and flat.is_shared():  # between processes, the storage itself is what is shared
        return flat.as_strided(part.shape, part.stride, part.offset)
    try:
        width = flat.element_size()
        piece = flat.untyped_storage()[part.offset * width : (part.offset + part.size) * width]
        own = torch.empty(0, dtype=flat.dtype, device=flat.device)
        own.set_(piece, 0, part.shape, part.stride)
    except (NotImplementedError, RuntimeError, TypeError):  # what has no memory, on the meta device
        return flat.as_strided(part.shape, part.stride, part.offset)
    return own


def joined(layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """Returns a flat tensor with the values of parameters, in their memory if that is of one piece.

    Arguments:
        layout: Where each is to lie.
        tensors: The parameters.
    """
    first, shared = tensors[0], tensors[0].is_cpu and tensors[0].is_shared()
    pairs = list(zip(tensors, layout.parts, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()} if shared else {0, 1}
    if len(storages) > 1 or any(t.storage_offset() != part.offset for t, part in pairs):
        return layout.flatten(tensors)
    return first.as_strided((layout.size,), (1,), 0)


def whole(flat: Tensor) -> Tensor:
    """Returns a flat tensor with a storage of its own, which others may replace.

    Tensors that alias the former storage keep the memory, whatever becomes of the new one.

    Arguments:
        flat: The flat tensor.
    """
    return alias(flat, Part("", flat.shape, flat.stride(), None, 0, flat.numel()))


class Join(torch.autograd.Function):
    """A flat tensor that named leaves are the parts of, as a function of them."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, flat: Tensor, *leaves: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.kept = Kept(*leaves)  # so that leaves that changed meanwhile are refused
        return flat.view_as(flat)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        _ = ctx.kept.tensors
        parts: Sequence[Tensor] = (
            ctx.layout.split(grad) if torch.is_grad_enabled() else ctx.layout.views(grad)
        )
        needed = ctx.needs_input_grad[2:]
        return None, None, *(p if n else None for p, n in zip(parts, needed, strict=True))
