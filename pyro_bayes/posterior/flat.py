"""Several tensors as few flat ones: small ones side by side, large ones in blocks.

An operation on many small tensors costs a call for each. A sequence of operations on a large one
brings it from memory again and again, unless it goes through blocks that a core's cache holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd import forward_ad

BLOCK = 2**17

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def parts(tensors: Sequence[Tensor]) -> tuple[slice, ...]:
    """Returns which of several tensors to put side by side.

    Arguments:
        tensors: The tensors, of one device.

    Example:
        >>> parts([torch.empty(size) for size in (10, 20, 2**18, 30)])
        (slice(0, 2, None), slice(2, 3, None), slice(3, 4, None))
    """
    sizes = tuple([tensor.numel() for tensor in tensors])
    return _slices(sizes, BLOCK if tensors[0].device.type == "cpu" else sum(sizes))


@lru_cache(maxsize=256)
def _slices(sizes: Sequence[int], limit: int) -> tuple[slice, ...]:
    slices, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            slices.append(slice(start, i))
            start, total = i, 0
        total += size
    return (*slices, slice(start, len(sizes)))


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors side by side as a flat, contiguous one, a single one as it is if possible."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    return _flatten_dense_tensors(tensors)  # type: ignore[no-any-return]


def scatter(side_by_side: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the tensors of which a flat one consists, in the same memory.

    Arguments:
        side_by_side: The flat tensor.
        like: Tensors of the wanted shapes.
    """
    # Autograd, if it knew that these are views of one tensor, would not let them change in place.
    with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
        if len(like) == 1:
            return (side_by_side.view(like[0].shape),)
        found: Sequence[Tensor] = _unflatten_dense_tensors(side_by_side, like)
        if all([tensor.numel() for tensor in like]):
            return found
        # Some releases of torch forget the shapes of what is empty.
        return [part.view(tensor.shape) for part, tensor in zip(found, like, strict=True)]


def room(tensors: Sequence[Tensor], parts: Sequence[slice], count: int) -> Sequence[Any]:
    """Returns for each part some flat tensors of its size, without values.

    They are of one piece of memory: allocators take many smaller ones anew from the system in
    each step of a training.

    Arguments:
        tensors: The tensors.
        parts: Which of them are side by side.
        count: The number of flat tensors for each part.
    """
    sizes = [sum([tensor.numel() for tensor in tensors[part]]) for part in parts]
    if len(sizes) == 1:
        return [[tensors[0].new_empty(sizes[0]) for _ in range(count)]]
    rows = tensors[0].new_empty(count, sum(sizes)).unbind()
    return [*zip(*(row.split(sizes) for row in rows), strict=True)]


def blocks(*flat: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Returns, block by block, the elements that flat tensors of one size have at a place.

    Example:
        >>> [len(a) for a, b in blocks(torch.empty(2**17 + 1), torch.empty(2**17 + 1))]
        [131072, 1]
    """
    if len(flat[0]) <= BLOCK or flat[0].device.type != "cpu":
        return (flat,)
    return zip(*(tensor.split(BLOCK) for tensor in flat), strict=True)


def keeps_graph() -> bool:
    """Tells whether the backward pass at work leaves its graph for another."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def transformed() -> bool:
    """Tells whether a compiler, a `torch.func` transform or forward differentiation is at work."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return forward_ad._current_level >= 0
