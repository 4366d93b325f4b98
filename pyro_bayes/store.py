"""One model's names in Pyro's param store, and the rule that store and model never disagree.

The model's :class:`torch.nn.Parameter` objects hold the truth. The store refers to the same
objects, so that training through either is seen by both. When the store was loaded or set, its
entries are foreign tensors: their values are copied into the model's parameters, which then take
their place in the store again. No parameter is ever replaced, so no optimiser loses its target.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Mapping

import pyro
import torch
from pyro.distributions import constraints
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

_taken: Counter[str] = Counter()
_pulling = threading.Lock()


def unique_name(name: str) -> str:
    """Returns the name itself the first time, then `name_1`, `name_2`, … in order of the calls.

    A name is never given twice in one process, so that what a former model left in the store is
    never taken for a later model's parameters.

    Arguments:
        name: The wished name.

    Returns:
        The name, made unique.
    """
    _taken[name] += 1
    found = name if _taken[name] == 1 else f"{name}_{_taken[name] - 1}"
    return found if found == name or _taken[found] == 0 else unique_name(name)


def pull(parameters: Mapping[str, nn.Parameter]) -> None:
    """Copies values that were loaded or set in the store into the model's own parameters.

    Arguments:
        parameters: The model's parameters by their full names in the store.

    Raises:
        ValueError: If the store holds a value of another shape.
    """
    held = pyro.get_param_store().named_parameters().mapping  # type: ignore[attr-defined]
    foreign = {n: p for n, p in parameters.items() if held.get(n, p) is not p}
    if not foreign:
        return
    for name, parameter in foreign.items():
        if held[name].shape != parameter.shape:
            raise ValueError(
                f"Expected the param store's '{name}' to have shape {tuple(parameter.shape)}; got"
                f" {tuple(held[name].shape)}. It belongs to another model: load a matching file, or"
                " call pyro.clear_param_store()."
            )
    with _pulling, torch.no_grad():
        for name, parameter in foreign.items():
            if name in held and held[name] is not parameter:
                parameter.copy_(held[name])
                register({name: parameter})


def register(parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts the parameters themselves, not copies, in the store.

    Arguments:
        parameters: The model's parameters by their full names in the store.
    """
    # `pyro.param` would store a contiguous copy of a parameter with other strides.
    store = pyro.get_param_store()
    for name in parameters:
        if name in store:
            del store[name]
    real: dict[str, constraints.Constraint] = dict.fromkeys(parameters, constraints.real)
    store.set_state({"params": dict(parameters), "constraints": real})


def statement(name: str, parameter: nn.Parameter) -> Tensor:
    """Makes a `pyro.param` statement, after a pull, and registers what the store lacks.

    As in Pyro's own modules, nothing is registered if the setting `module_local_params` is on.

    Arguments:
        name: The full name in the store.
        parameter: The parameter.

    Returns:
        An alias of the parameter, or what a Pyro handler put in its place.
    """
    pull({name: parameter})
    if not pyro.settings.get("module_local_params") and name not in pyro.get_param_store():
        register({name: parameter})
    # The weak reference that Pyro's optimisers follow sits on an alias: on the parameter itself it
    # would keep the user's module from being pickled.
    alias = parameter.view_as(parameter)
    alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    param = effectful(lambda name, value, **_: value, type="param")
    value: Tensor = param(name, alias, constraint=constraints.real, event_dim=None, name=name)
    return value
