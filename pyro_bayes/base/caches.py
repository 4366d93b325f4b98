"""What modules remember of values that they computed of their weights."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.base.torch_private import tree_leaves

_OWN = frozenset(vars(nn.Module()))
_NONE: Any = object()
_CAUGHT = frozenset({"KeyError", "LookupError", "Exception", "BaseException"})


def dictionaries(module: nn.Module) -> list[str]:
    """Returns the names of a module's attributes that may be caches: plain dictionaries.

    Arguments:
        module: The module, without its submodules.
    """
    if type(module).__module__.startswith("torch."):
        return []
    return [key for key, value in vars(module).items() if _may_be(value) and key not in _OWN]


def as_empty(attribute: str, present: Any) -> Refilled | None:
    """Returns what stands for a dictionary while a context is open, if it may be a cache.

    Arguments:
        attribute: The name of the module and of its attribute, for messages.
        present: What the attribute is.
    """
    if not _may_be(present):
        return None
    own = [(key, value) for key, value in dict.items(present) if not _is_computed(value)]
    held = dict(present.held) if isinstance(present, Refilled) else {}
    held.update((key, value) for key, value in dict.items(present) if _is_computed(value))
    return _make(_kind(present), getattr(present, "default_factory", None), attribute, held, own)


class Refilled(dict[Any, Any]):
    """A dictionary without the tensors that were in it, so that a cache computes them again.

    A module that looks for a key before it sets it has a cache. What it computes is dropped when
    the context closes. What is set without a look is the module's own state, and stays. A module
    that needs the value of a key without being ready to miss it gets that from before, and a
    warning.

    Attributes:
        attribute: The name of the module and of its attribute, for messages.
        held: The tensors that were in it.
    """

    attribute: str
    held: dict[Any, Any]

    def note(self, attribute: str, held: dict[Any, Any]) -> None:
        """Begins to note what is looked for.

        Arguments:
            attribute: The name of the module and of its attribute, for messages.
            held: The tensors that were in it.
        """
        self.attribute, self.held = attribute, held
        self._asked: set[Any] = set()
        self._filled: set[Any] = set()
        self._removed: set[Any] = set()
        self._counted = self._read = False

    # Looks at one key

    def __contains__(self, key: object) -> bool:
        found = dict.__contains__(self, key)
        if not found:
            self._asked.add(key)
        return found

    def __missing__(self, key: Any) -> Any:
        caller = getattr(inspect.currentframe(), "f_back", None)
        caught = caller is None or not _CAUGHT.isdisjoint(caller.f_code.co_names)
        if key in self.held and not caught:
            return self._former(key)
        self._asked.add(key)
        raise KeyError(key)

    def _former(self, key: Any) -> Any:
        value = self.held[key]
        warnings.warn(
            f"Expected '{self.attribute}' to be a cache, since it held tensors; got a module that"
            f" needs its key {key!r}, and so the value from before the context. If that was"
            " computed of weights, outputs have too small a variance: compute it in each call."
            " Keep constants in buffers.",
            stacklevel=3,
        )
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        """Returns the value of a key that has been set since, or the default."""
        return dict.get(self, key) if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Sets a key unless it has been set since, and returns its value."""
        if key not in self:
            self[key] = default
        return dict.get(self, key)

    # Looks at all

    def __len__(self) -> int:
        self._counted = True
        return dict.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        self._read = True
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        self._read = True
        return super().__reversed__()

    def keys(self) -> Any:
        """Returns all keys."""
        self._counted = True
        return super().keys()

    def values(self) -> Any:
        """Returns all values."""
        self._read = True
        return super().values()

    def items(self) -> Any:
        """Returns all pairs."""
        self._read = True
        return super().items()

    def copy(self) -> Any:
        """Returns a plain copy."""
        self._counted = True
        kind = OrderedDict if isinstance(self, OrderedDict) else dict
        return kind(dict(zip(dict.keys(self), dict.values(self), strict=True)))

    def __eq__(self, other: object) -> bool:
        self._counted = True
        return super().__eq__(other)

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        new = self.copy()
        new.update(other)
        return new

    def __ror__(self, other: Any) -> Any:
        self._counted = True
        return other.__class__(other) | self.copy()

    def __reduce__(self) -> Any:
        if not self.held:
            return self.copy().__reduce_ex__(4)
        factory = getattr(self, "default_factory", None)
        # Copies may be made of leaves only.
        held = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self.held.items()}
        return _make, (_kind(self), factory, self.attribute, held, [*dict.items(self)])

    # Changes

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._counted or self._read or key in self._asked:
            self._filled.add(key)
        super().__setitem__(key, value)

    def update(self, *others: Any, **more: Any) -> None:
        """Sets several keys."""
        for key, value in dict(*others, **more).items():
            self[key] = value

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __delitem__(self, key: Any) -> None:
        if dict.__contains__(self, key):
            super().__delitem__(key)
        elif key not in self.held or key in self._removed:
            raise KeyError(key)
        self._removed.add(key)

    def pop(self, key: Any, default: Any = _NONE) -> Any:
        """Removes a key, and returns its value if it has been set since, or the default."""
        if key not in self:
            if default is _NONE:
                raise KeyError(key)
            return default
        value = dict.__getitem__(self, key)
        del self[key]
        return value

    def popitem(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        """Removes a pair that has been set since, and returns it."""
        self._counted = True
        key, value = super().popitem(*args, **options)
        self._removed.add(key)
        return key, value

    def clear(self) -> None:
        """Removes all."""
        self._removed.update(self.held, dict.keys(self))
        super().clear()

    # The end

    def give_back(
        self, attributes: dict[str, Any], key: str, before: dict[Any, Any], known: set[str]
    ) -> list[str]:
        """Puts the dictionary that stood there into its place again.

        Arguments:
            attributes: The attributes of the module.
            key: The name of the attribute.
            before: The dictionary.
            known: The names of the dictionaries that are known to be caches, or were warned of.

        Returns:
            What to warn of, if a module missed what was in it or may miss what was dropped.
        """
        present = attributes.get(key)
        if present is not self:
            if not isinstance(present, dict) or not _keeps_draws(present):
                return []
            attributes[key] = before
            return self._doubts([*dict.values(present)], known)
        attributes[key] = before
        own = dict(zip(dict.keys(self), dict.values(self), strict=True))
        dropped = {k for k in own if k in self._filled and _is_computed(own[k])}
        for name in self._removed - own.keys():
            if dict.__contains__(before, name):
                del before[name]
        for name, value in own.items():
            if name not in dropped and dict.get(before, name, _NONE) is not value:
                before[name] = value
        missing = self.held.keys() - own.keys() - self._removed
        missed = missing & self._asked
        if self._read or (self._counted and not self._filled):
            missed = missing
        messages: list[str] = self._doubts([own[name] for name in dropped], known)
        if missed:
            messages.append(
                f"Expected '{self.attribute}' to be a cache, since it held tensors and was asked"
                f" for the keys {sorted(missed, key=repr)}; got none for them. In a context it is"
                " empty, so that nothing computed of other weights is used: keep constants in"
                " buffers."
            )
        return messages

    def _doubts(self, dropped: list[Any], known: set[str]) -> list[str]:
        """Returns a warning, the first time that values are dropped that may be no weights'."""
        tensors = [v for v in tree_leaves(dropped) if isinstance(v, Tensor)]
        if not tensors or self.attribute in known:
            return []
        known.add(self.attribute)
        if all([v.requires_grad for v in tensors]):
            return []
        return [
            f"Expected '{self.attribute}' to be a cache of what is computed of weights, since it"
            " was looked into before it was filled; got tensors without a gradient, which do not"
            " tell. It is empty at the beginning of each context, and afterwards as before. If it"
            " is a state, such as the memory of a recurrent network, keep it in an attribute or a"
            " buffer."
        ]


class _Ordered(Refilled, OrderedDict[Any, Any]):
    pass


class _Default(Refilled, defaultdict[Any, Any]):
    def __missing__(self, key: Any) -> Any:
        self._asked.add(key)
        return defaultdict.__missing__(self, key)

    def copy(self) -> Any:
        return defaultdict(self.default_factory, super().copy())


_TYPES: dict[Any, type[Refilled]] = {dict: Refilled, OrderedDict: _Ordered, defaultdict: _Default}


def _make(
    kind: type, factory: Any, attribute: str, held: dict[Any, Any], own: Iterable[tuple[Any, Any]]
) -> Refilled:
    new = _Default(factory) if kind is defaultdict else _TYPES[kind]()
    new.note(attribute, held)
    for key, value in own:
        new[key] = value
    return new


def _may_be(value: Any) -> bool:
    return type(value) in _TYPES or isinstance(value, Refilled)


def _kind(value: Any) -> Any:
    return next(kind for kind in (OrderedDict, defaultdict, dict) if isinstance(value, kind))


def warn(messages: list[str]) -> None:
    """Warns of what modules missed.

    Arguments:
        messages: What to warn of, if anything.
    """
    for message in messages:
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
