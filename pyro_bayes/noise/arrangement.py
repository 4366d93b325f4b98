"""Rules of operators that only arrange elements: views, slices, transposes.

What repeats elements leaves them dependent: it gets one draw, but for expansions, which rules that
broadcast take for what was expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import add
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import tree_leaves, tree_map
from pyro_bayes.noise.gaussian_tensor import RULES, Axis, GaussianTensor, mean_of

_CONVERSIONS: tuple[Callable[..., Any], ...] = (
    *(torch.clone, Tensor.contiguous, Tensor.clone, Tensor.to),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as),
)
_ARRANGEMENTS: tuple[Callable[..., Any], ...] = (
    *(torch.reshape, torch.transpose, torch.permute, torch.t, torch.chunk, torch.split),
    *(torch.unbind, torch.narrow, torch.select, torch.unsqueeze, torch.squeeze, torch.flatten),
    *(torch.unflatten, torch.movedim, torch.swapaxes, torch.tensor_split, torch.index_select),
    *(Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.permute, Tensor.t, Tensor.chunk),
    *(Tensor.split, Tensor.unbind, Tensor.narrow, Tensor.select, Tensor.unsqueeze),
    *(Tensor.squeeze, Tensor.flatten, Tensor.unflatten, Tensor.movedim, Tensor.swapaxes),
    *(Tensor.tensor_split, Tensor.index_select, Tensor.expand, Tensor.expand_as),
    *(Tensor.view_as, Tensor.reshape_as, Tensor.__getitem__),
    *(Tensor.T.__get__, Tensor.mT.__get__),  # type: ignore[attr-defined]
)

_EXPANSIONS = Tensor.expand, Tensor.expand_as


def _arranged(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    value, *rest = args or (kwargs.pop("input", None),)
    if not isinstance(value, GaussianTensor) or value.original is not None:
        return NotImplemented
    args, kwargs = tuple(map(mean_of, rest)), {k: mean_of(v) for k, v in kwargs.items()}
    indexed = operator in (Tensor.__getitem__, torch.index_select, Tensor.index_select)
    if indexed and _may_repeat(operator, value, args, kwargs):
        return NotImplemented
    token = partial(value.noise.token, value.key) if indexed else _shape
    described = (f"({k}={tree_map(token, v)})" for k, v in (*enumerate(args), *kwargs.items()))
    key = operator.__name__ + "".join(described)

    def apply(x: Tensor) -> Any:
        return operator(x, *args, **kwargs)

    def part(index: int) -> GaussianTensor:
        return _moved(value, lambda x: apply(x)[index], f"{value.key}.{key}[{index}]")

    mean = apply(mean_of(value))
    if operator in _CONVERSIONS:
        return value.through(apply, value.key, value.axes)
    if isinstance(mean, Tensor):
        moved = _moved(value, apply, f"{value.key}.{key}")
        if operator in _EXPANSIONS:
            shape = (1,) * (mean.dim() - value.dim()) + tuple(value.shape)
            original: Any = value.view(shape)
            moved.original = original
        return moved
    return tuple(part(index) for index in range(len(mean)))


for _operator in (*_CONVERSIONS, *_ARRANGEMENTS):
    RULES[_operator] = partial(_arranged, _operator)


def _may_repeat(
    operator: Callable[..., Any], value: GaussianTensor, args: Sequence[Any], kwargs: Any
) -> bool:
    """Tells whether an index may take elements twice."""
    indices = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    lists = [v for v in (args[0] if args and type(args[0]) is tuple else args) if type(v) is list]
    if not lists and all(v.dtype == torch.bool for v in indices):  # slices and masks
        return False
    if torch.compiler.is_compiling():
        return True
    places = torch.arange(value.numel(), device=value.device).view(value.shape)
    try:
        taken = operator(places, *args, **kwargs)
        return bool(taken.numel() > taken.unique().numel())
    except RuntimeError:  # torch.vmap has several indices, whose values it does not show
        return True


def _moved(value: GaussianTensor, operator: Callable[[Tensor], Tensor], key: str) -> GaussianTensor:
    """Applies an operator that only arranges elements, and follows the signs of each dimension.

    An index that varies along one dimension only must come out likewise.
    """
    if value.noise.estimator != "flipout" or value.axes is None:
        return value.through(operator, key, None)
    after: list[Axis | None] = [None] * operator(mean_of(value)).dim()
    for dim, axis in enumerate(value.axes):
        if axis is None or not after:
            continue
        shape = [-1 if d == dim else 1 for d in range(value.dim())]
        index = torch.arange(value.shape[dim], device=value.device).view(shape)
        try:
            moved = operator(index.expand(value.shape))
        except RuntimeError:  # a view that needs memory of its own
            moved = operator(index.expand(value.shape).contiguous())
        varies = [d for d, size in enumerate(moved.shape) if size > 1 and moved.stride(d)]
        if len(varies) > 1:  # a copy takes memory along all dimensions
            varies = [d for d in varies if (moved != moved.narrow(d, 0, 1)).any()]
        if len(varies) > 1:
            return value.through(operator, key, None)
        target = varies[0] if varies else 0
        line = moved[tuple(slice(None) if d == target else 0 for d in range(moved.dim()))]
        lines = tuple(line if i is None else i[line] for i in axis.lines)
        turned, other = Axis(axis.source, axis.size, lines), after[target]
        after[target] = turned if other is None else Axis(*map(add, other, turned))
    return value.through(operator, key, tuple(after))


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value
