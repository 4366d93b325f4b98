"""The inputs of a base: the tensors in them, how many examples they have, and copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments."""


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Yields the tensors in a value: in containers, and in the attributes of plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and not isinstance(value, type | nn.Module):
        yield from tensors_in(getattr(value, "__dict__", ()), depth - 1)
        slots = getattr(type(value), "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield from tensors_in(getattr(value, name, None), depth - 1)


def batch_size(inputs: Inputs, batch_dim: int) -> int | None:
    """Returns how many examples the first tensor among the inputs has, that has several if any."""
    sizes = [t.shape[batch_dim] for t in tensors_in(inputs) if t.dim() > batch_dim]
    return next((size for size in sizes if size > 1), sizes[0] if sizes else None)


def copied(inputs: Inputs, changed: Mapping[int, Tensor] | None = None) -> Inputs:
    """Returns a copy of inputs, which a network may change in place."""
    memo: dict[int, Any] = {}
    for tensor in tensors_in(inputs):
        new = (changed or {}).get(id(tensor))
        own = tensor.detach().clone() if new is None else new
        memo[id(tensor)] = own.requires_grad_(tensor.requires_grad)
    copies: Inputs = copy.deepcopy(inputs, memo)
    return copies


def changed(inputs: Inputs, batch_dim: int, *, integers: bool) -> Inputs | None:
    """Returns inputs with other values, `None` if none can be changed.

    Real numbers move a little. Integers, which may be indices, only change places.
    """
    generator = torch.Generator().manual_seed(2)
    others: dict[int, Tensor] = {}
    for tensor in tensors_in(inputs):
        value = tensor.detach()
        if value.layout is not torch.strided or value.dtype == torch.bool or not value.numel():
            continue
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator).to(value)
            others[id(tensor)] = value * (1 + 0.01 * noise) + 0.001 * noise
        elif integers and not value.is_complex():
            moved = value.roll(1, min(batch_dim, value.dim() - 1)) if value.dim() else value
            if torch.equal(moved, value):
                moved = value.flatten().roll(1).view(value.shape)
            if not torch.equal(moved, value):
                others[id(tensor)] = moved
    return copied(inputs, others) if others else None
