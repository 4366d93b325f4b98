"""Putting tensors in the place of a module's parameters, and giving the module back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_MISSING: Any = object()


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
        self._layers: list[Mapping[str, Tensor]] = []
        self.prepare()

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
            if key == "training"
            or (isinstance(value, Tensor) and _is_computed(m, key, value))
            or (type(value) is list and any(id(_referent(item)) in own for item in value))
        ]
        self._places, self._originals, self._expected = places, originals, expected

    def _verify(self) -> None:
        if all(c.get(k, _MISSING) is v for c, k, v in self._expected):
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

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self._module

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """The module's own parameters by first name."""
        return self._originals

    @property
    def is_open(self) -> bool:
        """Whether any context is open."""
        return bool(self._layers)

    def copy(self) -> nn.Module:
        """Returns a deep copy of the module with its own parameters, also while a swap is open."""
        # A computed weight has a graph, which torch refuses to copy.
        values = (d.get(k) for d, k in self._attributes)
        memo = {id(v): v.detach().clone() for v in values if isinstance(v, Tensor)}
        with self(dict(self._originals)):
            return copy.deepcopy(self._module, memo)

    @contextmanager
    def __call__(self, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Holds values in the place of parameters while the context is open.

        Contexts may be nested, and left in any order: a place holds the value of the latest that
        is open, and the parameter again when none is. On the way out, also by exception, each
        submodule is in the mode (training or evaluation) it was in, and weights that are computed
        from parameters, as by weight norm, are those from before. Other attributes are the
        network's own state, and stay what the network made them.

        Arguments:
            values: The tensors by the first names of the parameters they stand for.

        Yields:
            The module.

        Raises:
            RuntimeError: If the module has lost or replaced one of its parameters.
        """
        if not self._layers:
            self._verify()
        attributes = [(d, k, d.get(k, _MISSING)) for d, k in self._attributes]
        self._layers.append(values)
        try:
            for name, value in values.items():
                for container, key in self._places[name]:
                    container[key] = value
            yield self._module
        finally:
            self._layers = [layer for layer in self._layers if layer is not values]
            for name in values:
                below: Tensor = self._originals[name]
                for layer in self._layers:
                    below = layer.get(name, below)
                for container, key in self._places[name]:
                    container[key] = below
            for container, key, value in attributes:
                if value is not _MISSING:
                    container[key] = value


def _is_computed(module: nn.Module, key: str, value: Tensor) -> bool:
    """Tells whether an attribute is a weight that a module computes, from `weight_orig` or such."""
    return value.requires_grad or any(p.startswith(f"{key}_") for p in module._parameters)


def _referent(item: Any) -> Any:
    return item() if isinstance(item, weakref.ref) else item
