"""A base and its posterior, tied: copies, conversions and files never part them."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_bayes.base import ownership
from pyro_bayes.base.freshness import is_fresh, mark
from pyro_bayes.base.mutex import Mutex
from pyro_bayes.base.recomputation import Recomputation
from pyro_bayes.base.selection import Choice
from pyro_bayes.base.swap import Swap
from pyro_bayes.base.torch_private import is_assigned
from pyro_bayes.noise.examples import Examples
from pyro_bayes.posterior.layout import Flat
from pyro_bayes.pyro_bridge import store
from pyro_bayes.pyro_bridge.files import check_whole, keep_half
from pyro_bayes.pyro_bridge.guide import MeanField
from pyro_bayes.pyro_bridge.prior import PriorModule, expect_tensors
from pyro_bayes.pyro_bridge.tie import Tie

if TYPE_CHECKING:
    from typing_extensions import Self


class PosteriorModule(PyroModule):
    r"""A base, its prior and its guide, as one module.

    The base's included parameters share their memory with the means, or with a rounded copy if they
    are in half precision, and do not train themselves.
    The tie survives `.to()`, `.double()`, `copy.deepcopy`, pickling and `load_state_dict`. A base
    has one model at a time: a later one takes it over, and the former keeps its posterior. A state
    dict holds each number once: `guide.means`, `guide.logvars`, and of the base what is
    deterministic. Before anything is read, values that were loaded into Pyro's param store arrive.

    Attributes:
        learned_beside: The names of the parameters of the likelihood that the model trains with.

    Arguments:
        base: The module.
        prior: The prior over its included parameters.
        guide: The posterior over them.
        choices: What selection decided about each parameter of the base.
    """

    base: nn.Module
    prior: PriorModule
    guide: MeanField

    def __init__(
        self, base: nn.Module, prior: PriorModule, guide: MeanField, choices: Sequence[Choice]
    ) -> None:
        """Makes the module, whose class describes the arguments."""
        super().__init__()
        self.choices = tuple(choices)
        self._trained: set[str] = set()
        self.learned_beside: tuple[str, ...] = ()
        # `PyroModule.add_module` would rename the prior's sites after the attribute.
        for key, module in {"base": base, "prior": prior, "guide": guide}.items():
            nn.Module.add_module(self, key, module)
        self._pyro_set_supermodule("", self._pyro_context)
        store.allow_module_local(self)
        self.register_state_dict_pre_hook(_before_save)
        self.register_state_dict_post_hook(_drop_included)
        self.register_load_state_dict_pre_hook(_add_included)
        self.register_load_state_dict_post_hook(_after_load)
        self._examples, self._recomputation = Examples(), Recomputation()
        self._make_mutex()
        self._prepare()
        self._take_over()
        mark(self)

    @property
    def means(self) -> nn.Module:
        r"""The posterior means :math:`\mu`, a module with the parameters' own names."""
        self._pull()
        return self._guide.memory.means

    @property
    def logvars(self) -> nn.Module:
        r"""The log-variances :math:`\log \sigma^2`, a module with the parameters' own names."""
        self._pull()
        return self._guide.memory.logvars

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns the parameters that may train: those of the posterior, and deterministic ones.

        The base's included parameters share storage with the means and never get a gradient, so
        they are left out. A module that contains this one does name them: what writes to each of
        a module's parameters in place, as :class:`torch.optim.swa_utils.AveragedModel` does, must
        be told to take buffers too (`use_buffers=True`), or be given the guide alone.

        Arguments:
            prefix: What stands in front of the names.
            recurse: Whether to include those of submodules.
            remove_duplicate: Whether a shared parameter is named once.

        Yields:
            Pairs of name and parameter.
        """
        self._pull()
        stem = f"{prefix}.base." if prefix else "base."
        # Inside a context, other tensors stand in the base.
        own = {
            stem + name: None if c.included else self.swap.originals[c.name]
            for c in self.choices
            for name in (c.name, *c.aliases)
        }
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            present = own.get(name, parameter)
            if present is not None:
                yield name, present

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            # Read past PyroModule, which would make a `pyro.module` statement of the base.
            if name == "base" and "swap" in self.__dict__:
                self._pull()
                self._warn_of_new_owner()
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "swap" not in self.__dict__ or name.startswith("__"):
                raise
        if "_tie" in self.__dict__:
            self._pull()
        try:
            return getattr(modules["base"], name)
        except AttributeError:
            raise AttributeError(
                f"Expected an attribute of {type(self).__name__} or of its base"
                f" {type(modules['base']).__name__}; got '{name}'."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("base", "prior", "guide"):
            raise AttributeError(
                f"Expected '{name}' to stay what it is; got {type(value).__name__}. Wrap another"
                " module in a new BayesianModel."
            )
        super().__setattr__(name, value)

    @property
    def _base(self) -> nn.Module:
        return self._modules["base"]  # type: ignore[return-value]

    @property
    def _prior(self) -> PriorModule:
        return self._modules["prior"]  # type: ignore[return-value]

    @property
    def _guide(self) -> MeanField:
        return self._modules["guide"]  # type: ignore[return-value]

    def _make_mutex(self) -> None:
        name = f"{type(self).__name__} '{self._guide.store_name}' of {type(self._base).__name__}"
        self._mutex = Mutex(name)

    def _prepare(self) -> None:
        """Looks the parameters up, after any of them may have been replaced."""
        self.swap = Swap(self._base, {c.name: (c.name, *c.aliases) for c in self.choices})
        self._tie = Tie(self.swap, self._guide)

    def _keep_tied(self) -> None:
        """Sees that the base is that of the means, whatever became of it since the last use."""
        self.swap.heal()
        self._tie.keep()

    def _flats(self) -> list[Flat]:
        r"""Returns :math:`\mu` and :math:`\log \sigma^2` as flat tensors, as they are by now."""
        self._keep_tied()
        return self._guide.flats()

    def _take_over(self) -> None:
        """Claims the base's parameters, from a former model if there is one."""
        names = {id(original): name for name, original in self.swap.originals.items()}
        trained = ownership.claim(
            self._guide,
            [
                (self.swap.originals[c.name], c.included, c.name in self._trained)
                for c in self.choices
            ],
        )
        self._trained |= {names[id(parameter)] for parameter in trained}
        self._tie.make()

    def _warn_of_new_owner(self) -> None:
        if ownership.is_former(self._guide):
            warnings.warn(
                "Expected `base` to be the network of this model's posterior means; got one that a"
                " later model has taken over. Use `with bnn.mean() as net:` instead.",
                stacklevel=3,
            )

    def _deterministic(self) -> dict[str, nn.Parameter]:
        """Returns the excluded parameters that train, by name."""
        originals = self.swap.originals
        excluded = (c.name for c in self.choices if not c.included)
        return {name: originals[name] for name in excluded if originals[name].requires_grad}

    def _store_key(self, name: str) -> str:
        return f"{self._guide.store_name}.base.{name}"

    def _stored(self) -> dict[str, nn.Parameter]:
        return {self._store_key(name): p for name, p in self._deterministic().items()}

    def _pull(self) -> None:
        self._keep_tied()
        self._guide.pull()
        store.pull(self._stored)

    def _replaced(self) -> None:
        self._prepare()
        memory, originals = self._guide.memory, self.swap.originals
        changed = [n for n in memory.addresses if originals[n].stride() != memory.mean(n).stride()]
        self._take_over()
        store.replace(self._stored())
        if changed and not ownership.is_former(self._guide):
            warnings.warn(
                f"Expected the strides of parameters to stay; got others for {changed}, which keep"
                " those that they had. Convert the base first, as in"
                " BayesianModel(net.to(memory_format=torch.channels_last)).",
                stacklevel=4,
            )

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context that one thread at a time can be in."""
        # A compiled function runs in one thread, and cannot hold a lock.
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._mutex.turn()

    def _check_closed(self) -> None:
        if self.swap.is_open:
            raise RuntimeError(
                "Expected no context of the model to be open while it is converted, copied or"
                " loaded; got one, in which the base holds draws. Leave `reparameterize()` or"
                " `lift()` first."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._check_closed()
        self._pull()
        fresh = is_fresh(self)
        super()._apply(fn, recurse)
        self._replaced()
        mark(self, fresh=fresh)
        return self

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        # As a child of a Pyro module, the model shares its parent's context, so that one run of
        # the parent draws each site once. The names of sites and stored parameters stay its own.
        self._pyro_name = name
        self._pyro_context = context
        for module in self._prior.modules():
            module._pyro_context = context

    def __getstate__(self) -> dict[str, Any]:
        self._check_closed()
        state = dict(super().__getstate__(), _fresh=is_fresh(self))
        return {key: value for key, value in state.items() if key not in ("_mutex", "_tie", "swap")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_mutex()
        self._prepare()
        self._take_over()
        mark(self, fresh=vars(self).pop("_fresh"))

    def __copy__(self) -> Self:
        # A shallow copy has the same base and guide, which stay the original's.
        new = type(self).__new__(type(self))
        for key, value in vars(self).items():
            vars(new)[key] = copy.copy(value) if isinstance(value, dict) else value
        mark(new, fresh=is_fresh(self))
        return new


def _drop_included(
    model: PosteriorModule, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Leaves the base's included parameters out of a state dict: they are the means."""
    if model.learned_beside:
        metadata["learned_beside"] = list(model.learned_beside)
    for choice in model.choices:
        for name in (choice.name, *choice.aliases) if choice.included else ():
            state.pop(f"{prefix}base.{name}", None)


def _add_included(
    model: PosteriorModule, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Puts the means in the base's places again before a state dict is loaded."""
    check_whole(state, prefix, metadata)
    model._check_closed()
    model._pull()
    model._take_over()  # what is loaded must not reach another model's means
    for name in expect_tensors(model._prior, state, f"{prefix}prior."):
        model._guide.drop_scales(name)
    for choice in model.choices:
        mean = state.get(f"{prefix}guide.means.{choice.name}")
        if mean is not None:
            for name in (choice.name, *choice.aliases):
                state.setdefault(f"{prefix}base.{name}", mean.detach())
    if is_assigned(metadata):
        keep_half(state, f"{prefix}base.", model._base)


def _after_load(model: PosteriorModule, keys: Any) -> None:
    model._replaced()
    mark(model)
    # What is missing of the included parameters is missing of the means, and named there.
    missing = set(keys.missing_keys)
    for choice in model.choices:
        for name in (choice.name, *choice.aliases) if choice.included else ():
            ending = f"base.{name}"
            prefixes = [k.removesuffix(ending) for k in missing if k.endswith(ending)]
            named = [p for p in prefixes if f"{p}guide.means.{choice.name}" in missing]
            missing -= {p + ending for p in named}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key in missing]


def _before_save(model: PosteriorModule, *_: Any) -> None:
    model._pull()
