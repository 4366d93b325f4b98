"""Whether the examples of a batch meet in a network, and which operators see none of them.

Local noise and flipout give each example noise of its own. That is right as long as an example's
output depends on its own noise only. Graph layers, attention over the batch or batch norm in
training mode mix the noise of examples that have the same weights, and the variance comes out too
small. And noise that no example owns must not be told by the example: that of learned queries,
position embeddings, and weights that are computed of others.

A network is asked once: it is called a few times with the same inputs, and other noise for some of
the examples. If the outputs of the others change, the parameters behind it become one draw.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bayes.base.state import undisturbed
from pyro_bayes.base.torch_private import is_transformed, remove_hook, tree_leaves
from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of
from pyro_bayes.noise.inputs import Inputs, batch_size, changed, copied, tensors_in
from pyro_bayes.noise.watched import Calls, WatchedNoise

Hold: TypeAlias = Callable[[Mapping[str, Tensor]], AbstractContextManager[nn.Module]]

_SCALE = 0.1
"""The deviations in these calls, relative to the size of the means."""
_RATIO = 1e-4
"""The part of an example's change that others may share by rounding."""
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


class Examples:
    """What is known of the examples of one network, for each estimator and mode."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._asked: set[tuple[object, ...]] = set()
        self._busy = False

    def is_known(self, base: nn.Module, noise: ContextNoise) -> bool:
        """Tells whether it is known if examples meet, or cannot be known.

        Arguments:
            base: The base.
            noise: The noise of the context.
        """
        key = noise.estimator, noise.batch_dim, base.training
        return key in self._verdicts or (*key, False) in self._asked

    def warning(self, base: nn.Module, noise: ContextNoise) -> str | None:
        """Returns what a user is to know.

        Arguments:
            base: The base.
            noise: The noise of the context.
        """
        verdict = self._verdicts.get((noise.estimator, noise.batch_dim, base.training))
        return None if verdict is None else verdict.warning

    @contextmanager
    def watch(
        self, base: nn.Module, values: Mapping[str, Tensor], noise: ContextNoise, hold: Hold
    ) -> Iterator[None]:
        """Watches the calls of a base while a context is open.

        Each call tells the noise how many examples there are. The first looks whether they meet.

        Arguments:
            base: The base.
            values: What it holds in the place of its parameters.
            noise: The noise of the context.
            hold: Holds other values.
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._busy:
                noise.batch_size = batch_size((args, kwargs), noise.batch_dim)
                self.look(module, values, noise, hold, (args, kwargs))

        # A compiler would take a hook for a change of the network.
        if torch.compiler.is_compiling():
            yield
            return
        try:
            try:
                base.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                yield
            finally:
                remove_hook(base, before)
        finally:  # the first time may have been interrupted
            remove_hook(base, before)

    def look(
        self,
        base: nn.Module,
        values: Mapping[str, Tensor],
        noise: ContextNoise,
        hold: Hold,
        inputs: Inputs,
        function: Callable[..., Any] | None = None,
    ) -> None:
        """Looks whether examples meet, unless it is known, and tells the noise what is known.

        Arguments:
            base: The base.
            values: What it holds in the place of its parameters.
            noise: The noise of the context.
            hold: Holds other values.
            inputs: The arguments of the base.
            function: A function of the base and of them; by default, the base's own.

        Warns:
            UserWarning: If they meet, once.
        """
        key = noise.estimator, noise.batch_dim, base.training
        question = *key, function is None
        if key not in self._verdicts and question not in self._asked and noise.check_examples:
            self._ask(question, _Trial(base, values, noise, hold, inputs, function))
        verdict = self._verdicts.get(key)
        if verdict is not None:
            noise.shared = verdict.shared
            noise.pinned |= verdict.drawn

    def _ask(self, question: tuple[object, ...], trial: _Trial) -> None:
        # One example meets no other. Within a transform, its inputs cannot be changed.
        if trial.size < 2 or is_transformed():
            return
        try:
            self._busy = True
            verdict = trial.verdict()
        finally:
            self._busy = False
        self._asked.add(question)
        if verdict is not None:
            self._verdicts[question[:-1]] = verdict
            if verdict.warning is not None:
                warnings.warn(verdict.warning, stacklevel=5)


class _Trial:
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
        self.size = batch_size(inputs, noise.batch_dim) or 0

    def verdict(self) -> Verdict | None:
        """Returns what the calls tell, `None` if it cannot be told."""
        try:
            before = self._changed_inputs()
            first = self._run()
        except Exception:  # the call that comes has it again
            return None
        if first is None:
            return None
        noise = self._noise
        drawn = {
            name
            for name, each in (noise.uses or {}).items()
            if noise.estimator in each and any(use.startswith("one draw") for use in each)
        }
        if noise.estimator == "local":  # whose calls are not independent, nor the same
            uses = Counter(
                key for source, calls in noise.inputs.items() for key in source[1:] * len(calls)
            )
            drawn |= {
                name
                for source, names in noise.parameters.items()
                for key, name in zip(source[1:], names, strict=True)
                if uses[key] > 1
            }
        shared = set()
        for source, calls in noise.inputs.items():
            same = [_are_equal(a, b) for a, b in zip(calls, before.get(source, ()), strict=False)]
            if same and all(same):
                shared.add(source)
            elif any(same):  # as a layer that is called on the examples and on constants
                drawn.update(noise.parameters[source])
        noise.shared, self._drawn = frozenset(shared), frozenset(drawn)
        if shared or drawn:
            first = self._run()
        if first is None or not self._meet(first):
            return Verdict(noise.shared, self._drawn)
        every = frozenset(name for group in noise.parameters.values() for name in group)
        for _ in range(_ROUNDS):
            guilty = self._guilty(first)
            self._drawn |= guilty or every
            first = self._run()
            if first is None or not self._meet(first):
                break
        else:
            self._drawn |= every
        return Verdict(noise.shared, self._drawn, self._warning(self._drawn - drawn))

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
        with undisturbed(self._base), self._hold(self._values) as base:
            output = self._call(base, *args, **kwargs)
        if any(isinstance(leaf, Distribution) for leaf in tree_leaves(output)):
            return None  # which computes with the network when asked
        found = [t.detach() for t in tensors_in(output) if t.is_floating_point() and t.dim()]
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
        dims = [self._dim(output, is_first=i == 0) for i, output in enumerate(first)]
        for a, b, dim in zip(first, second, dims, strict=False):
            if a.shape != b.shape or a.numel() == 0:
                continue
            change = (b - a).abs()
            if dim is not None:
                change = change.movedim(dim, 0).reshape(self.size, -1).amax(1)
                own, others = change[chosen].max(), change[~chosen].max()
                if others > _RATIO * own:
                    return True
            elif dims.count(None) == len(dims) and change.any():
                return True  # whatever it is, it is not one output for each example
        return False

    def _dim(self, output: Tensor, *, is_first: bool) -> int | None:
        """Returns the dimension of an output that counts examples, positions maybe with them."""
        alike = [dim for dim, size in enumerate(output.shape) if size == self.size]
        if not alike:
            return 0 if output.shape[0] % self.size == 0 and self._noise.batch_dim == 0 else None
        if len(alike) == 1:
            return alike[0]
        time_first = self._noise.batch_dim in alike and output.dim() > 2
        return (self._noise.batch_dim if time_first else alike[0]) if is_first else None

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
            " Use local_trick=False to say so yourself. If another dimension counts examples, pass"
            " batch_dim; check_examples=False does not look."
        )


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


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
