"""Nested modules that hold values under dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def plant(root: M, values: Mapping[str, Any], *, node: type[nn.Module] = nn.Module) -> M:
    """Sets each value under its dotted name, with new submodules on the way.

    Arguments:
        root: The module at the top, without submodules yet.
        values: The values by dotted name, for instance parameters.
        node: The class of the submodules.

    Returns:
        The root.

    Example:
        >>> tree = plant(nn.Module(), {"fc.weight": nn.Parameter(torch.zeros(2))})
        >>> [name for name, _ in tree.named_parameters()]
        ['fc.weight']
    """
    nodes: dict[str, nn.Module] = {"": root}

    def find(path: str) -> nn.Module:
        if path not in nodes:
            above, _, last = path.rpartition(".")
            nodes[path] = node()
            find(above).add_module(last, nodes[path])
        return nodes[path]

    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        setattr(find(path), leaf, value)
    return root
