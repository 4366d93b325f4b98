"""A few calls of a network with noise that is watched, to see whether its examples meet."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_bayes.base.state import undisturbed
from pyro_bayes.base.torch_private import tree_leaves
from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of
from pyro_bayes.noise.inputs import Inputs, batch_size, changed, copied, tensors_in
from pyro_bayes.noise.watched import Calls, WatchedNoise

Hold: TypeAlias = Callable[[Mapping[str, Tensor]], AbstractContextManager[nn.Module]]

_SCALE = 0.1
"""The deviations in these calls, relative to the size of the means."""
_RATIO = 1e-4
"""The part of an example's change that others may share by rounding."""
_ROUNDING = 1e-6
"""The part of an output that may change by rounding."""
_FEW = 8
"""Up to so many examples, any two are told apart."""


class Verdict(NamedTuple):
    """What is known of a network.

    Arguments:
        shared: The operators, with their Gaussian tensors, whose input no example changes.
        drawn: The parameters that are one draw in one place, and hence in all, or whose noise makes
            examples meet.
        warning: What a user is to know.
    """

    shared: frozenset[tuple[str, ...]]
    drawn: frozenset[str]
    warning: str | None = None


class Trial:
    """A few calls of a network with the same inputs, or others, and with noise that is watched."""

    def __init__(
        self,
        base: nn.Module,
        values: Mapping[str, Tensor],
        noise: ContextNoise,
        hold: Hold,
        inputs: Inputs,
        function: Callable[..., Any] | None,
    ) -> None:
        self._base, self._hold, self._inputs = base, hold, inputs
        self._call = function or (lambda base, *args, **kwargs: base(*args, **kwargs))
        self._noise = WatchedNoise(noise)
        self._values = {
            name: _wide(value, self._noise) if isinstance(value, GaussianTensor) else value
            for name, value in values.items()
        }
        self._opened = {
            name: value.detach() + _SCALE
            for name, value in base.named_parameters()
            if name not in values and value.requires_grad and _is_gate(value)
        }
        self.size = batch_size(inputs, noise.batch_dim) or 0

    def verdict(self) -> Verdict | None:
        """Returns what the calls tell, `None` if it cannot be told."""
        try:
            copied(self._inputs)
        except Exception as error:
            self.reason = (
                "Expected inputs that can be copied, to see whether examples meet; got"
                f" {type(error).__name__}: {error}. Local noise and flipout take them to be"
                " independent: see bnn.check(), or use local_trick=False."
            )
            return None
        try:
            before = self._changed_inputs()
            first = self._run()
            return None if first is None else self._verdict(before, first)
        except Exception:  # the call that comes has it again, if it is the network's
            return None

    is_lazy = False
    """Whether the network returns what is computed later."""
    reason: str | None = None
    """Why it cannot be told, if that is not the network's error."""

    def _verdict(self, before: Calls, first: list[Tensor]) -> Verdict:
        noise = self._noise
        shared, drawn = self._shared(before)
        noise.shared, self._drawn = shared, drawn
        again = self._run() if shared or drawn else first
        if self.size < 2 or again is None or not self._meet(again):
            return Verdict(shared, drawn)
        every = frozenset(name for group in noise.parameters.values() for name in group)
        for _ in range(_ROUNDS):
            guilty = self._guilty(again)
            self._drawn |= guilty or every
            again = self._run()
            if again is None or not self._meet(again):
                break
        else:
            self._drawn |= every
        return Verdict(shared, self._drawn, self._warning(self._drawn - drawn))

    def _shared(self, before: Calls) -> tuple[frozenset[tuple[str, ...]], frozenset[str]]:
        """Returns the operators that see no example, and the parameters that are one draw."""
        noise = self._noise
        shared: set[tuple[str, ...]] = set()
        own: set[str] = set()
        drawn = {
            name
            for name, each in (noise.uses or {}).items()
            if noise.estimator in each and any(use.startswith("one draw") for use in each)
        }
        for source, calls in noise.inputs.items():
            same = [_are_equal(a, b) for a, b in zip(calls, before.get(source, ()), strict=False)]
            names = noise.parameters[source]
            if same and all(same):
                shared.add(source)
                drawn.update(names)
            else:
                own.update(names)
                if any(same):  # as a layer that is called on the examples and on constants
                    drawn.update(names)
        # What is one draw in all its places need not be told.
        drawn &= own
        if noise.estimator == "local":  # whose calls are neither independent nor the same
            keys: dict[str, Counter[str]] = {}
            for source, calls in noise.inputs.items():
                for key, name in zip(source[1:], noise.parameters[source], strict=True):
                    keys.setdefault(name, Counter())[key] += len(calls)
            drawn |= {name for name, count in keys.items() if name in own and _is_shared(count)}
        return frozenset(shared), frozenset(drawn)

    _drawn: frozenset[str] = frozenset()

    def _changed_inputs(self) -> Calls:
        """Returns what operators met with other inputs, nothing if there are none."""
        for kinds in (True, False):
            inputs = changed(self._inputs, self._noise.batch_dim, integers=kinds)
            if inputs is None:
                continue
            try:
                self._run(inputs)
            except Exception:  # indices in another order may be wrong
                continue
            return self._noise.inputs
        return {}

    def _run(self, inputs: Inputs | None = None) -> list[Tensor] | None:
        args, kwargs = copied(self._inputs) if inputs is None else inputs
        self._noise.begin(self.size)
        self._noise.pinned |= self._drawn
        with (
            undisturbed(self._base),
            _kept(self._base),
            self._hold(self._values | self._opened) as base,
        ):
            output = self._call(base, *args, **kwargs)
        if any(isinstance(leaf, Distribution) and _is_lazy(leaf) for leaf in tree_leaves(output)):
            self.is_lazy = True  # it computes with the network when asked
            return None
        found = [t.detach() for t in tensors_in(output) if t.is_floating_point()]
        # A loss beside outputs is what they are.
        found = [t for t in found if t.dim()] or found
        return [t.nan_to_num() for t in found] or None

    def _meet(self, first: Sequence[Tensor]) -> bool:
        noise = self._noise
        for chosen in _choices(self.size, first[0].device):
            noise.chosen = chosen
            try:
                outputs = self._run()
            finally:
                noise.chosen = None
            if outputs is not None and self._differ(first, outputs, chosen):
                return True
        return False

    def _differ(self, first: Sequence[Tensor], second: Sequence[Tensor], chosen: Tensor) -> bool:
        """Tells whether outputs changed for others than the chosen examples."""
        for i, (a, b) in enumerate(zip(first, second, strict=False)):
            if a.shape != b.shape or a.numel() == 0:
                continue
            change = self._by_example((b - a).abs(), is_first=i == 0) if a.dim() else None
            if change is None:
                if (a != b).any():  # whatever it is, it is not one output for each example
                    return True
                continue
            # Each feature has a unit of its own.
            own, others = change[chosen].amax(0), change[~chosen].amax(0)
            scale = self._by_example(a.abs(), is_first=i == 0)
            rounding = 0.0 if scale is None else _ROUNDING * scale.amax(0)
            if (others > _RATIO * own + rounding).any():
                return True
        return False

    def _by_example(self, output: Tensor, *, is_first: bool) -> Tensor | None:
        """Returns an output as (examples, features), positions being features too."""
        size, time_first = self.size, self._noise.batch_dim > 0
        alike = [dim for dim, length in enumerate(output.shape) if length == size]
        folded = output.shape[0] % size == 0 and (not alike or output.dim() == 2)
        if folded and 0 not in alike:
            turned = output.reshape(-1, size, *output.shape[1:]).movedim(1, 0)
            output = turned if time_first else output.reshape(size, -1, *output.shape[1:])
            return output.flatten(1)
        if not alike:
            return None
        if len(alike) > 1 and not is_first:
            return output.new_zeros(size, 1)
        dim = self._noise.batch_dim if time_first and output.dim() > 2 else alike[0]
        dim = dim if dim in alike else alike[0]
        return output.movedim(dim, 0).reshape(size, -1)

    def _guilty(self, first: Sequence[Tensor]) -> frozenset[str]:
        """Returns the parameters whose noise alone reaches others' outputs, if not too many."""
        names = {name for group in self._noise.parameters.values() for name in group}
        guilty = set()
        for name in names - self._drawn if len(names) <= _NAMED else ():
            self._noise.only = frozenset([name])
            if self._meet(first):
                guilty.add(name)
        self._noise.only = None
        return frozenset(guilty)

    def _warning(self, names: frozenset[str]) -> str:
        kind = repr("flipout") if self._noise.estimator == "flipout" else "True"
        shown = ", ".join(repr(name) for name in sorted(names)[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return (
            f"Expected examples that do not meet, with local_trick={kind}; got a"
            f" {type(self._base).__name__} in which the noise of an example reaches the outputs of"
            " others, as in graph layers, attention over the batch, pooling of sets, or batch norm"
            f" in training mode. The parameters {shown}{more} are one draw instead, which is exact."
            " Exclude them, or use local_trick=False, to be without this warning. If another"
            " dimension counts examples, pass batch_dim. To skip the look, check_examples=False."
        )


_SMALL = 2**16
"""The size up to which deterministic parameters are looked at."""
_ROUNDS = 3
"""How often to look for parameters that others hid."""
_NAMED = 50
"""How many parameters to ask one by one for what made examples meet."""


def _wide(value: GaussianTensor, noise: ContextNoise) -> GaussianTensor:
    """Returns a Gaussian tensor of the same means, with deviations that rounding does not hide."""
    mean = mean_of(value).detach().to(torch.promote_types(value.dtype, torch.float32))
    size = float(mean.square().mean()) if mean.numel() else 0.0
    logvar = torch.full_like(mean, 2 * math.log(_SCALE * (size**0.5 or 1.0)))
    return GaussianTensor.of(mean, logvar, value.parameter, noise)


def _choices(size: int, device: torch.device) -> Iterator[Tensor]:
    """Yields which examples to choose: half of them, and the others."""
    index = torch.arange(size)
    if size <= _FEW:
        halves = [index // 2**bit % 2 == 1 for bit in range((size - 1).bit_length())]
    else:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        halves = [order < size // 2]
    for half in halves:
        yield half.to(device)
        yield ~half.to(device)


def _is_shared(keys: Mapping[str, int]) -> bool:
    """Tells whether local noise meets a parameter in several places, but for parts of it."""
    if sum(keys.values()) == 1:
        return False
    parts = {key.rpartition("[")[0] for key in keys if key.endswith("]")}
    disjoint = len(parts) == 1 and all(key.endswith("]") for key in keys)
    return not disjoint or max(keys.values()) > 1 or "getitem" in next(iter(parts))


def _is_gate(value: Tensor) -> bool:
    """Tells whether a deterministic parameter is all zeros, which would hide what it multiplies."""
    return value.is_floating_point() and 0 < value.numel() <= _SMALL and not value.any()


def _is_lazy(distribution: Distribution) -> bool:
    """Tells whether a distribution may compute with the network when asked, as a flow does."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return not distribution.arg_constraints


@contextmanager
def _kept(base: nn.Module) -> Iterator[None]:
    """Gives modules their attributes, and Python its random numbers, back."""
    attributes = [(vars(module), dict(vars(module))) for module in base.modules()]
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
        for own, values in attributes:
            if own.keys() != values.keys() or any(own[key] is not values[key] for key in values):
                own.clear()
                own.update(values)


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
