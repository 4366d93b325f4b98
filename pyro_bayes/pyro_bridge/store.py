"""One model's names in Pyro's param store, and the rule that store and model never disagree.

The model's :class:`torch.nn.Parameter` objects hold the truth. The store refers to the same
objects, so that training through either is seen by both. When the store was loaded or set, its
entries are foreign tensors: their values are copied into the model's parameters, which then take
their place in the store again. No parameter is ever replaced, so no optimiser loses its target.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from pyro_bayes.base.mutex import Mutex

_owners: dict[str, weakref.ref[Any]] = {}
_registered: dict[int, weakref.ref[nn.Parameter]] = {}
_mutex = Mutex("the names of models and their values in Pyro's param store")
_OWN = re.compile(r"(mean|logvar)(_\d+)?$|(means|logvars|prior_scales|base|likelihood)\.")


def claim(name: str, owner: object) -> str:
    """Gives an owner a name that no other living owner has.

    What owners that died left in the store is removed, so that it is never taken for a new owner's
    and does not pile up. Values that were loaded into the store stay.

    Arguments:
        name: The wished name.
        owner: Who is to have it, for as long as it lives.

    Returns:
        The name itself if it is free, or else `name_1`, `name_2`, …
    """
    with _mutex.turn():
        claimed, number = name, 0
        while _owners.get(claimed, lambda: None)() is not None:
            number += 1
            claimed = f"{name}_{number}"
        _owners[claimed] = weakref.ref(owner)
        dead = [name for name, reference in [*_owners.items()] if reference() is None]
        for name in dead:
            del _owners[name]
        _remove([claimed, *dead])
    return claimed


def _remove(names: Sequence[str]) -> None:
    """Removes from the store what former owners of some names registered there."""
    store = pyro.get_param_store()
    for key, held in list(store.named_parameters()):
        if _registered.get(id(held), lambda: None)() is not held:
            continue
        owners = [name for name in (*names, *_owners) if key.startswith(f"{name}.")]
        owner = max(owners, key=len, default="")  # a name may begin with another
        if owner in names and _OWN.match(key.removeprefix(f"{owner}.")):
            del store[key]


def is_empty() -> bool:
    """Tells whether the store holds nothing."""
    return not _held()


def pull(parameters: Callable[[], Mapping[str, nn.Parameter]]) -> None:
    """Copies values that were loaded or set in the store into the model's own parameters.

    Arguments:
        parameters: Returns the model's parameters by their full names in the store.

    Raises:
        ValueError: If the store holds a value of another shape.
    """
    held = _held()
    if not held:
        return
    foreign = {n: p for n, p in parameters().items() if held.get(n, p) is not p}
    if not foreign:
        return
    for name, parameter in foreign.items():
        _check_shape(name, held[name], parameter)
    with torch.no_grad(), _mutex.turn():
        for name, parameter in foreign.items():
            if name in held and held[name] is not parameter:
                parameter.copy_(held[name])
                register({name: parameter})


def take(name: str, values: Callable[[], Mapping[str, Tensor]]) -> None:
    """Moves values out of the store that a model of another kind of leaves has left there.

    Arguments:
        name: What stands in front of the names in the store.
        values: Returns where they go, by the names behind that.

    Raises:
        ValueError: If the store holds a value of another shape.
    """
    held = _held()
    if all(id(value) in _registered for value in held.values()):
        return
    for key, own in values().items():
        full = f"{name}.{key}"
        if full in held:
            _check_shape(full, held[full], own)
            with torch.no_grad():
                own.copy_(held[full])
            del pyro.get_param_store()[full]


def _check_shape(name: str, value: Tensor, own: Tensor) -> None:
    if value.shape != own.shape:
        raise ValueError(
            f"Expected the param store's '{name}' to have shape {tuple(own.shape)}; got"
            f" {tuple(value.shape)}. It belongs to another model: load a matching file, or"
            " call pyro.clear_param_store()."
        )


def register(parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts the parameters themselves, not copies, in the store.

    Arguments:
        parameters: The model's parameters by their full names in the store.
    """
    # `pyro.param` would store a contiguous copy of a parameter with other strides.
    store = pyro.get_param_store()
    for name, parameter in parameters.items():
        if name in store:
            del store[name]
        _registered[id(parameter)] = weakref.ref(parameter, partial(_forget, id(parameter)))
    real: dict[str, constraints.Constraint] = dict.fromkeys(parameters, constraints.real)
    store.set_state({"params": dict(parameters), "constraints": real})


def replace(parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts parameters in the place of those that the store has under their names.

    Arguments:
        parameters: The model's parameters by their full names in the store.
    """
    held = pyro.get_param_store()
    register({name: parameter for name, parameter in parameters.items() if name in held})


def _held() -> Mapping[str, Tensor]:
    """The unconstrained values in the store by name, without a copy."""
    return pyro.get_param_store().named_parameters().mapping  # type: ignore[attr-defined, no-any-return]


def _forget(key: int, _: Any) -> None:
    _registered.pop(key, None)


def statement(name: str, parameter: nn.Parameter) -> Tensor:
    """Makes a `pyro.param` statement, after a pull, and registers what the store lacks.

    As in Pyro's own modules, nothing is registered if the setting `module_local_params` is on.

    Arguments:
        name: The full name in the store.
        parameter: The parameter.

    Returns:
        An alias of the parameter, or what a Pyro handler put in its place.
    """
    if _held().get(name) is not parameter:
        pull(lambda: {name: parameter})
        if not pyro.settings.get("module_local_params"):
            register({name: parameter})
    # The weak reference that Pyro's optimisers follow sits on an alias: on the parameter itself it
    # would keep the user's module from being pickled.
    alias = parameter.view_as(parameter)
    alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    value: Tensor = _param(name, alias, constraint=constraints.real, event_dim=None, name=name)
    return value


_param = effectful(lambda name, value, **_: value, type="param")


def allow_module_local(module: PyroModule) -> None:
    """Lets a Pyro module work when `module_local_params` is switched on after it was made.

    Arguments:
        module: The root of a tree of Pyro modules.
    """
    # Pyro makes this attribute only if the setting is on at construction.
    vars(module._pyro_context).setdefault("param_state", {"params": {}, "constraints": {}})
