"""Whether the examples of a batch meet in a network, and which operators see none of them.

Local noise and flipout give each example noise of its own. That is right as long as an example's
output depends on its own noise only. Graph layers, attention over the batch or batch norm in
training mode mix the noise of examples that have the same weights, and the variance comes out too
small. And noise that no example owns must not be told by the example: that of learned queries,
position embeddings, and weights that are computed of others.

A network is asked once: it is called a few times with the same inputs, and other noise for some of
the examples. The outputs of the others must not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bayes.base.state import undisturbed
from pyro_bayes.base.torch_private import is_transformed, tree_leaves
from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of
from pyro_bayes.noise.inputs import Inputs, batch_size, changed, copied, tensors_in

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
        drawn: The parameters that some operator needs as one draw, and others do not.
    """

    shared: frozenset[tuple[str, ...]]
    drawn: frozenset[str]


class ExamplesMeetError(ValueError):
    """The noise of an example reaches the output of another."""


class Examples:
    """What is known of the examples of one network, for each estimator and mode."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._asked: set[tuple[object, ...]] = set()
        self._busy = False

    def is_known(self, base: nn.Module, noise: ContextNoise) -> bool:
        """Tells whether it is known that examples do not meet, or cannot be known.

        Arguments:
            base: The base.
            noise: The noise of the context.
        """
        key = noise.estimator, noise.batch_dim, base.training
        return key in self._verdicts or (*key, False) in self._asked

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
        handle = base.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def look(
        self,
        base: nn.Module,
        values: Mapping[str, Tensor],
        noise: ContextNoise,
        hold: Hold,
        inputs: Inputs,
        function: Callable[..., Any] | None = None,
    ) -> None:
        """Sees that examples do not meet, unless it is known, and tells the noise what is known.

        Arguments:
            base: The base.
            values: What it holds in the place of its parameters.
            noise: The noise of the context.
            hold: Holds other values.
            inputs: The arguments of the base.
            function: A function of the base and of them; by default, the base's own.

        Raises:
            ExamplesMeetError: If they meet.
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
        self._busy = True
        try:
            verdict = trial.verdict()
        finally:
            self._busy = False
        self._asked.add(question)
        if verdict is not None:
            self._verdicts[question[:-1]] = verdict


class _Watched(ContextNoise):
    """The noise of several calls, of which some examples have another."""

    watched = True

    def __init__(self, noise: ContextNoise) -> None:
        super().__init__(noise.estimator, noise.batch_dim, seed=0)
        self._other = ContextNoise(noise.estimator, noise.batch_dim, seed=1)
        self.chosen: Tensor | None = None
        """Which examples have the other noise."""
        self.only: frozenset[str] | None = None
        """The parameters whose noise is another, all by default."""

    def begin(self, size: int) -> None:
        """Begins a call."""
        self.batch_size = self._other.batch_size = size
        self.uses, self.pinned, self.handed, self._seen = {}, set(), set(), {}
        self.parameters: dict[tuple[str, ...], Sequence[str]] = {}
        self.inputs: dict[tuple[str, ...], list[Tensor]] = {}

    def met(
        self, source: tuple[str, ...], parameters: Sequence[str], inputs: Sequence[Tensor]
    ) -> None:
        self.parameters[source] = parameters
        if self.chosen is None:
            self.inputs.setdefault(source, []).extend(x.detach().clone() for x in inputs)

    def normal(self, source: tuple[str, ...], like: Tensor, example: int | None = 0) -> Tensor:
        own = super().normal(source, like, example)
        mask = None if example is None else self._mask(like.shape[example])
        if mask is None or not self._is_wanted(self.parameters[source]):
            return own
        shape = [-1 if d == example else 1 for d in range(like.dim())]
        return torch.where(mask.view(shape), self._other.normal(source, like, example), own)

    def signs(self, source: tuple[str, ...], count: int, size: int, like: Tensor) -> Tensor:
        own, mask = super().signs(source, count, size, like), self._mask(count)
        if mask is None or not self._is_wanted(source[:1]):
            return own
        other = self._other.signs(self._sharing[source], count, size, like)
        return torch.where(mask.unsqueeze(-1), other, own)

    def _mask(self, count: int) -> Tensor | None:
        """Returns which rows have the other noise."""
        each = self.rows_of_example(count)
        if self.chosen is None or each is None:
            return None
        chosen = self.chosen
        return chosen.repeat_interleave(each) if self.batch_dim == 0 else chosen.repeat(each)

    def _is_wanted(self, parameters: Sequence[str]) -> bool:
        return self.only is None or not self.only.isdisjoint(parameters)


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
        self._noise = _Watched(noise)
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
        except ExamplesMeetError:
            raise
        except Exception:  # the call that comes has it again
            return None
        if first is None:
            return None
        noise = self._noise
        shared = {s for s, inputs in noise.inputs.items() if _are_equal(inputs, before.get(s, ()))}
        drawn = {
            name
            for name, uses in (noise.uses or {}).items()
            if noise.estimator in uses and any(use.startswith("one draw") for use in uses)
        }
        verdict = Verdict(frozenset(shared), frozenset(drawn))
        if shared or drawn:
            noise.shared, self._drawn = verdict.shared, verdict.drawn
            first = self._run()
        if first is not None and self._meet(first):
            raise ExamplesMeetError(self._message(first))
        return verdict

    _drawn: frozenset[str] = frozenset()

    def _changed_inputs(self) -> dict[tuple[str, ...], list[Tensor]]:
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

    def _message(self, first: Sequence[Tensor]) -> str:
        names = sorted({name for group in self._noise.parameters.values() for name in group})
        guilty = []
        for name in names[:_NAMED]:
            self._noise.only = frozenset([name])
            if self._meet(first):
                guilty.append(name)
        kind = repr("flipout") if self._noise.estimator == "flipout" else "True"
        return (
            f"Expected examples that do not meet, with local_trick={kind}; got a"
            f" {type(self._base).__name__} in which the noise of an example reaches the outputs of"
            " others, as in graph layers, attention over the batch, pooling of sets, or batch norm"
            f" in training mode (through the parameters {guilty[:5]}). Examples that share weights"
            " would have noise of their own, and outputs a wrong variance. Use local_trick=False,"
            " which is exact, or exclude these parameters. If another dimension counts examples,"
            " pass batch_dim; check_examples=False does not look."
        )


_NAMED = 50
"""How many parameters to ask for what made examples meet."""


def _wide(value: GaussianTensor, noise: ContextNoise) -> GaussianTensor:
    """Returns a Gaussian tensor of the same means, with deviations that rounding does not hide."""
    mean = mean_of(value).detach()
    size = float(mean.float().square().mean()) if mean.numel() else 0.0
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
    alike = len(first) == len(second)
    return alike and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )
