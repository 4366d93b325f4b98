"""What modules remember of values that they computed of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.base.torch_private import tree_leaves

_OWN = frozenset(vars(nn.Module()))


def dictionaries(module: nn.Module) -> list[str]:
    """Returns the names of a module's attributes that may be caches: plain dictionaries.

    Arguments:
        module: The module, without its submodules.
    """
    if type(module).__module__.startswith("torch."):
        return []
    return [k for k, value in vars(module).items() if type(value) is dict and k not in _OWN]


def as_empty(attribute: str, present: Any) -> Refilled | None:
    """Returns what stands for a dictionary while a context is open, if it may be a cache.

    Arguments:
        attribute: The name of the module and of its attribute, for messages.
        present: What the attribute is.
    """
    if not isinstance(present, dict) or not (
        isinstance(present, Refilled) or not present or any(map(_is_computed, present.values()))
    ):
        return None
    return Refilled(attribute, present)


class Refilled(dict[Any, Any]):
    """A dictionary without the tensors that were in it, so that a cache computes them again.

    A module that asks for a key before it sets it has a cache. What it computes is dropped when the
    context closes. What is set unasked is the module's own state, and stays. A tensor from before
    can still be read by its key, and iterated over, as constants are.

    Arguments:
        attribute: The name of the module and of its attribute, for messages.
        before: The dictionary.
    """

    def __init__(self, attribute: str, before: dict[Any, Any]) -> None:
        super().__init__({k: v for k, v in before.items() if not _is_computed(v)})
        self._attribute, self._before = attribute, before
        self._asked: set[Any] = set()

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        if not found:
            self._asked.add(key)
        return found

    def get(self, key: Any, default: Any = None) -> Any:
        """Returns the value of a key that has been set since, or the default."""
        return super().__getitem__(key) if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Sets a key unless it has been set since, and returns its value."""
        if key not in self:
            self[key] = default
        return super().__getitem__(key)

    def __missing__(self, key: Any) -> Any:
        try:
            return self._before[key]
        except KeyError:
            self._asked.add(key)
            raise

    def _all(self) -> dict[Any, Any]:
        return {**self._before, **self._own()}

    def _own(self) -> dict[Any, Any]:
        return dict(zip(super().keys(), super().values(), strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def keys(self) -> Any:
        """Returns all keys."""
        return self._all().keys()

    def values(self) -> Any:
        """Returns all values."""
        return self._all().values()

    def items(self) -> Any:
        """Returns all pairs."""
        return self._all().items()

    def __reduce__(self) -> Any:
        return Refilled, (self._attribute, self._all())

    def give_back(self, attributes: dict[str, Any], key: str) -> str | None:
        """Puts the dictionary into its place again.

        Arguments:
            attributes: The attributes of the module.
            key: The name of the attribute.

        Returns:
            What to warn of, if a module missed what was in it.
        """
        present, before = attributes.get(key), self._before
        if present is not self:
            if isinstance(present, dict) and _keeps_draws(present):
                attributes[key] = before
            return None
        own = self._own()
        attributes[key] = before
        for name, value in own.items():
            if name not in self._asked or not _is_computed(value):
                before[name] = value
        known = set(before)
        missed = [name for name in self._asked if name in known and name not in own]
        if not missed:
            return None
        return (
            f"Expected '{self._attribute}' to be a cache, since it held tensors and was asked for"
            f" the keys {missed}; got none for them. In a context it is empty, so that nothing"
            " computed of other weights is used: keep constants in buffers."
        )


def warn(messages: list[str | None]) -> None:
    """Warns of what modules missed.

    Arguments:
        messages: What to warn of, if anything.
    """
    for message in messages:
        if message is not None:
            warnings.warn(message, stacklevel=4)


def _is_computed(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, tuple | list | dict) and any(map(_is_computed, tree_leaves(value)))


def _keeps_draws(values: Mapping[Any, Any]) -> bool:
    computed = [v for v in tree_leaves(dict(values)) if _is_computed(v)]
    return bool(computed) and (
        not torch.is_grad_enabled() or any(v.requires_grad for v in computed)
    )
