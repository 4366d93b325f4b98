"""Putting tensors in the place of a module's parameters, and giving the module back."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.base import caches
from pyro_bayes.base.torch_private import parametrization_cache

_MISSING: Any = object()
_LIKE_WEIGHTS = frozenset({"training", "merged", "merged_adapters"})
"""Attributes that say what is in the weights, and go back with them."""
_swaps: weakref.WeakSet[Swap] = weakref.WeakSet()


class Swap:
    """The places at which the parameters of a module stand, prepared once.

    A parameter stands wherever a submodule registers it, several times if it is tied, and in the
    lists of parameters that recurrent layers keep. A swap writes to these places only: the
    parameters themselves are not touched.

    It writes to the private `nn.Module._parameters`: torch has no public call that swaps parameters
    and stays open while the user computes.

    Arguments:
        module: The module.
        names: The names of each parameter, aliases included, by its first name.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> swap = Swap(net, {"weight": ["weight"]})
        >>> with swap({"weight": torch.zeros(1, 2)}):
        ...     net.weight
        tensor([[0., 0.]])
        >>> isinstance(net.weight, nn.Parameter)
        True
    """

    def __init__(self, module: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
        self._module = module
        self._names = names
        self._layers: list[_Layer] = []
        self._known: set[str] = set()  # the dictionaries that are caches, or were warned of
        self.prepare()
        _swaps.add(self)

    def prepare(self) -> None:
        """Looks the places up anew, after parameters have rightly been replaced.

        Raises:
            RuntimeError: If a name has no parameter any more.
        """
        modules = dict(self._module.named_modules(remove_duplicate=False))
        distinct = list(self._module.modules())
        lists = [
            (m.__dict__, key, value)
            for m in distinct
            for key, value in m.__dict__.items()
            if type(value) is list
        ]
        places: dict[str, list[tuple[Any, Any]]] = {}
        originals: dict[str, nn.Parameter] = {}
        # What must still be there when the places are used: (container, key, expected).
        expected: list[tuple[Any, Any, Any]] = [
            (m._modules, key, child) for m in distinct for key, child in m._modules.items()
        ]
        for name, aliases in self._names.items():
            places[name] = []
            for alias in aliases:
                path, _, leaf = alias.rpartition(".")
                if path not in modules or modules[path]._parameters.get(leaf) is None:
                    raise RuntimeError(
                        f"Expected the base to have the parameter '{alias}', as it had when it"
                        " was wrapped; got none. Wrap the changed module in a new BayesianModel."
                    )
                places[name].append((modules[path]._parameters, leaf))
            container, leaf = places[name][0]
            original = originals[name] = container[leaf]
            expected += [(c, k, original) for c, k in places[name]]
            for owner, key, value in lists:
                entries = [(value, i) for i, item in enumerate(value) if item is original]
                places[name] += entries
                expected += [(owner, key, value)] if entries else []
        # What forward may leave behind: modes, computed weights, and the lists of parameters (or of
        # references to them) that a recurrent layer renews when it meets others than before.
        own = {id(p) for p in originals.values()}
        self._attributes = [
            (m.__dict__, key)
            for m in distinct
            for key, value in m.__dict__.items()
            if key in _LIKE_WEIGHTS
            or (isinstance(value, Tensor) and _is_computed(m, key, value))
            or (type(value) is list and any(id(_referent(item)) in own for item in value))
        ]
        self._lists = [
            (d, k) for d, k in self._attributes if type(d[k]) is list and k in _LIKE_WEIGHTS
        ]
        self._caches = [
            (m.__dict__, key, f"{name}.{key}" if name else key)
            for name, m in self._module.named_modules()
            for key in caches.dictionaries(m)
        ]
        self._registries = [d for m in distinct for d in (m._parameters, m._modules)]
        self._count = sum(map(len, self._registries))
        self._places, self._originals, self._expected = places, originals, expected

    def _verify(self) -> None:
        intact = all([c.get(k, _MISSING) is v for c, k, v in self._expected])
        if intact and sum(map(len, self._registries)) == self._count:
            return
        before = self._originals
        self.prepare()
        changed = [name for name, p in before.items() if self._originals[name] is not p]
        if changed:
            self._originals = before
            self._expected.append(({}, changed[0], before[changed[0]]))
            raise RuntimeError(
                "Expected the base to keep the parameters it was wrapped with; got others at"
                f" {changed}. Wrap the changed module in a new BayesianModel."
            )
        own = {id(p) for p in before.values()}
        new = [
            n for n, p in self._module.named_parameters() if p.requires_grad and id(p) not in own
        ]
        if new:
            self._count = -1
            raise RuntimeError(
                "Expected the base to have the parameters it was wrapped with; got new ones at"
                f" {new}, which are no part of the model. Wrap the changed module in a new"
                " BayesianModel, or freeze them: parameter.requires_grad_(False)."
            )

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self._module

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """The module's own parameters by first name."""
        return self._originals

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The values that the latest open context holds."""
        return self._layers[-1].values

    @property
    def is_open(self) -> bool:
        """Whether any context is open."""
        self.heal()
        return bool(self._layers)

    def heal(self) -> None:
        """Closes what interrupted contexts left open."""
        for layer in [*self._layers] if self._layers else ():
            if layer.stay is not None and layer.stay() is None:
                self._close(layer)

    def only_of(self, thread: threading.Thread) -> None:
        """Closes the contexts of all other threads, which a fork has left behind.

        Arguments:
            thread: The thread.
        """
        for layer in [*self._layers]:
            if layer.thread is not thread:
                self._close(layer)

    def copy(self) -> nn.Module:
        """Returns a deep copy of the module with its own parameters, also while a swap is open."""
        # A computed weight has a graph, which torch refuses to copy.
        values = (d.get(k) for d, k in self._attributes)
        memo = {id(v): v.detach().clone() for v in values if isinstance(v, Tensor)}
        with self(dict(self._originals)):
            return copy.deepcopy(self._module, memo)

    @contextmanager
    def __call__(
        self, values: Mapping[str, Tensor], *, owner: nn.Module | None = None
    ) -> Iterator[nn.Module]:
        """Holds values in the place of parameters while the context is open.

        Contexts may be nested, and left in any order: a place holds the value of the latest that
        is open, and the parameter again when none is. On the way out, also by exception, each
        submodule is in the mode (training or evaluation) it was in, and weights that are computed
        from parameters, as by weight norm, are those from before. Dictionaries in which modules
        keep what they computed are empty in the context, and then as before. Other attributes are
        the network's own state, and stay what the network made them.

        Arguments:
            values: The tensors by the first names of the parameters they stand for.
            owner: A module whose mode is given back, too.

        Yields:
            The module.

        Raises:
            RuntimeError: If the module has lost or replaced one of its parameters, or has new ones.
        """
        if self._layers:
            self.heal()
        if not self._layers:
            self._verify()
        # A compiled function is neither interrupted nor left behind.
        stay = None if torch.compiler.is_compiling() else _Stay()
        thread = None if stay is None else threading.current_thread()
        layer = self._layer(stay, thread, values, owner)
        has_gradients = torch.is_grad_enabled()
        try:
            try:
                self._open(layer)
                yield self._module
            except (Exception, KeyboardInterrupt):
                # An interrupt within `torch.no_grad()` itself leaves gradients off.
                torch.set_grad_enabled(has_gradients)
                raise
            finally:
                self._close(layer)
        finally:  # the first time may have been interrupted
            self._close(layer)

    def _layer(
        self,
        stay: _Stay | None,
        thread: threading.Thread | None,
        values: Mapping[str, Tensor],
        owner: nn.Module | None,
    ) -> _Layer:
        places = self._attributes
        if owner is not None:
            places = [*places, (owner.__dict__, "training")]
        attributes = [(d, k, d.get(k, _MISSING)) for d, k in places]
        refilled: list[Any] = []
        if self._caches:
            refilled = [
                (d, k, caches.as_empty(name, d.get(k)), d.get(k)) for d, k, name in self._caches
            ]
        computed = parametrization_cache()
        return _Layer(
            None if stay is None else weakref.ref(stay),
            thread,
            values,
            attributes,
            [(d, k, [*d.get(k, ())]) for d, k in self._lists] if self._lists else [],
            [entry for entry in refilled if entry[2] is not None] if refilled else [],
            None if computed is None else dict(computed),
        )

    def _open(self, layer: _Layer) -> None:
        self._layers.append(layer)
        for name, value in layer.values.items():
            for container, key in self._places[name]:
                container[key] = value
        for attributes, key, cache, _ in layer.caches:
            attributes[key] = cache
        if layer.computed is not None:
            _set_computed({})

    def _close(self, layer: _Layer) -> None:
        """Gives back what a layer holds, unless that was done: as often as it is interrupted."""
        if layer not in self._layers:
            return
        rest: Sequence[_Layer] = ()
        if len(self._layers) > 1:
            rest = [other for other in self._layers if other is not layer]
        for name in layer.values:
            below: Tensor = self._originals[name]
            for other in rest:
                below = other.values.get(name, below)
            for container, key in self._places[name]:
                container[key] = below
        for attributes, key, value in layer.attributes:
            if value is not _MISSING:
                attributes[key] = value
        for attributes, key, items in layer.lists:
            attributes[key][:] = items
        missed: list[str] = []
        for attributes, key, cache, before in layer.caches:
            missed += cache.give_back(attributes, key, before, self._known)
        if parametrization_cache() is not None:
            _set_computed(layer.computed or {})
        self._layers.remove(layer)
        if missed:
            caches.warn(missed)


class _Stay:
    """Lives as long as the generator of a context does."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False, slots=True)
class _Layer:
    """What one open context holds, and what it gives back.

    Arguments:
        stay: What lives as long as the context.
        thread: The thread that opened it.
        values: The values by name.
        attributes: What modules had as attributes.
        lists: What was in attributes that are lists.
        caches: Dictionaries that are empty while the context is open, and what they stand for.
        computed: The weights that parametrizations had computed, if they keep them.
    """

    stay: weakref.ref[_Stay] | None
    thread: threading.Thread | None
    values: Mapping[str, Tensor]
    attributes: list[tuple[dict[str, Any], str, Any]]
    lists: list[tuple[dict[str, Any], str, list[Any]]]
    caches: list[tuple[dict[str, Any], str, caches.Refilled, dict[Any, Any]]]
    computed: dict[Any, Any] | None


def _set_computed(values: dict[Any, Any]) -> None:
    computed = parametrization_cache()
    if computed is not None:
        computed.clear()
        computed.update(values)


def _after_fork() -> None:
    for swap in [*_swaps]:
        swap.only_of(threading.current_thread())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _is_computed(module: nn.Module, key: str, value: Tensor) -> bool:
    """Tells whether an attribute is a weight that a module computes, from `weight_orig` or such."""
    return value.requires_grad or any(p.startswith(f"{key}_") for p in module._parameters)


def _referent(item: Any) -> Any:
    return item() if isinstance(item, weakref.ref) else item
