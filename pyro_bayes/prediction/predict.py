"""Predictions: statistics of what a base computes, over draws of its weights."""

from __future__ import annotations

import math
import operator
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pyro_bayes.posterior.sampling import WeightDraws
from pyro_bayes.prediction.statistics import Result, Tally, joined
from pyro_bayes.pyro_bridge.module import PosteriorModule

Function: TypeAlias = Callable[..., Any]

_STATISTICS = ("mean", "variance", "samples")
_DELAY = 3.0  # seconds until the progress bar appears

_quiet = threading.RLock()  # validation and filters of warnings are settings of the whole process
_noted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_costs: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Cost]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Prediction:
    r"""Statistics of an output over :math:`S` draws of the weights.

    Each has the structure of the output: a tensor, or tuples, lists or dictionaries of tensors.
    What was not asked for is `None`.

    Arguments:
        mean: The mean over draws.
        variance: The unbiased variance over draws. It is epistemic: what the data left open about
            the network. The noise of the likelihood comes on top.
        quantiles: The quantiles over draws by level.
        samples: The outputs of all draws, each tensor of shape :math:`(S, *)`.
        num_samples: The number :math:`S` of draws.
    """

    mean: Any
    variance: Any
    quantiles: Mapping[float, Any]
    samples: Any
    num_samples: int

    @property
    def standard_error(self) -> Any:
        r"""The Monte Carlo standard error of the mean, :math:`\sqrt{\text{variance} / S}`."""
        return tree_map_only(Tensor, lambda v: (v / self.num_samples).sqrt(), self.variance)


def predict(
    model: PosteriorModule,
    x: Any,
    num_samples: int,
    statistics: str | Sequence[str],
    quantiles: float | Sequence[float],
    function: Function | None,
    chunk_size: int | None,
    generator: torch.Generator | None,
    progress: bool,
) -> Prediction:
    """Computes what :meth:`pyro_bayes.BayesianModel.predict` describes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    levels = tuple(quantiles) if isinstance(quantiles, Iterable) else (quantiles,)
    _check(num_samples, names, levels, function, chunk_size, generator)
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    call = _evaluation(x, function)
    tally = partial(Tally, total=num_samples, keys=(*names, *levels))
    total = num_samples * (1 if call else operator.length_hint(x)) or None
    bar = tqdm(total=total, unit="draw", delay=_DELAY) if progress else nullcontext()
    with model.lock(), torch.no_grad(), bar:
        draws = WeightDraws(model.guide.flats(), num_samples, seed, again=call is None)
        run = _Run(model, draws, tally, chunk_size)
        run.bar = bar if progress else None
        run.kind = _kind(x) if function is None else None
        results = run(call) if call else joined(list(map(run, batches(x, function))))
    fields = {key: run.rebuild([r[key] for r in results]) for key in results[0]}
    mean, variance, samples = (fields.get(name) for name in _STATISTICS)
    return Prediction(mean, variance, {q: fields[q] for q in levels}, samples, num_samples)


def _evaluation(x: Any, function: Function | None) -> Function | None:
    """Returns what to evaluate, a function of the base, or `None` if `x` is a run of batches."""
    call = function or (lambda base, *args, **kwargs: base(*args, **kwargs))
    if type(x) is tuple:
        return lambda base: call(base, *x)
    if isinstance(x, (Tensor, tuple)):  # a named tuple, as a packed sequence, is one argument
        return lambda base: call(base, x)
    if isinstance(x, Mapping):
        return lambda base: call(base, **x)
    if isinstance(x, nn.Module) or not (isinstance(x, Iterable) or (callable(x) and not function)):
        raise TypeError(
            "Expected x to be a tensor, a tuple or a dictionary of arguments, an iterable of"
            " batches, or, without another function, a function of the base; got"
            f" {type(x).__name__}. Put any other argument in a tuple: predict((argument,))."
        )
    return x if callable(x) else None


def _kind(x: Any) -> Any:
    """Returns what inputs of the same shapes have in common, or `None` if it cannot be told."""
    leaves, spec = tree_flatten(x)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return str(spec), *((leaf.shape, leaf.dtype) for leaf in leaves)


def batches(x: Iterable[Any], function: Function | None) -> Iterator[Function]:
    """Yields what to evaluate for each batch, a function of the base."""
    for batch in x:
        parts = tuple(batch) if type(batch) is list else batch
        if function is None and (isinstance(parts, Mapping) or type(parts) is tuple):
            if isinstance(parts, Mapping) or len(parts) not in (1, 2):
                raise ValueError(
                    "Expected batches to be x or pairs (x, y), of which y is left out; got a"
                    f" {type(batch).__name__} of {len(batch)}. Say what is what with function:"
                    " predict(batches, function=lambda net, a, b, y: net(a, b))."
                )
            parts = parts[:1]
        call = _evaluation(parts, function)
        if call is None:
            raise TypeError(f"Expected batches of tensors; got one of {type(batch).__name__}.")
        yield call


def _check_output(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor | None) or (leaf is not None and leaf.is_complex()):
            raise TypeError(
                "Expected outputs that are tensors of real numbers, nested or not; got"
                f" {leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__}. Say what to"
                " compute of it with function, as of a distribution in"
                " predict(c, function=lambda flow, c: flow(c).log_prob(y))."
            )
    if all(leaf is None for leaf in leaves):
        raise TypeError("Expected outputs with tensors in them; got none.")


class _Run:
    """Evaluates functions of a base with the same draws, and returns statistics of each tensor."""

    bar: Any = None
    kind: Any = None

    def __init__(
        self, model: PosteriorModule, draws: WeightDraws, tally: Function, size: int | None
    ) -> None:
        self._model, self._base, self._draws = model, model.swap.module, draws
        self._tally, self._chunk_size, self._failed = tally, size, False
        self._buffers = [
            (module, key, buffer, buffer.clone())
            for module in self._base.modules()
            for key, buffer in module.named_buffers(recurse=False)
            if 0 not in buffer.stride()  # what is expanded cannot be written to
        ]
        self._structure: Any = None

    def __call__(self, call: Function) -> list[Result]:
        tallies: list[Tally] = []
        for outputs in self._outputs(call):
            tallies = tallies or [self._tally(output[0]) for output in outputs]
            for tally, values in zip(tallies, outputs, strict=True):
                tally.add(values)
            if self.bar is not None:
                self.bar.update(len(outputs[0]))
        return [tally.result() for tally in tallies]

    def _outputs(self, call: Function) -> Iterator[tuple[Tensor, ...]]:
        start, total = 0, self._draws.total
        known = _costs.setdefault(self._base, {})
        cost = known.get(self.kind)
        wanted, first = self._chunk_size is None and total > 4, None
        if self._structure is None and not (wanted and cost):
            # A plain call shows what outputs are, and what they cost.
            rows = self._draws.rows(0, 1)
            with _Calls() if wanted else nullcontext() as calls:
                first = next(self._loop(call, rows))
            if calls is not None:
                cost = calls.cost
                if self.kind is not None:  # counting takes longer than the call
                    known[self.kind] = cost
        if wanted and cost is not None:
            self._chunk_size = cost.chunk_size(self._draws.size, total, self._draws.on_cpu)
        step = min(self._chunk_size or 1, total)
        # In a chunk, which later calls begin with, the first draw's output is another by rounding.
        if first is not None and (step == 1 or not wanted):
            start = 1
            yield first
        for place in range(start, total, step):
            rows = self._draws.rows(place, min(step, total - place))
            batched = self._batched(call, rows) if step > 1 and not self._failed else None
            yield from self._loop(call, rows) if batched is None else [batched]

    def _loop(self, call: Function, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        for values in self._draws.each(rows):
            yield tuple([output.unsqueeze(0) for output in self._evaluate(call, values)])

    def rebuild(self, tensors: Iterable[Tensor]) -> Any:
        rest, (spec, places) = iter(tensors), self._structure
        return tree_unflatten([next(rest) if place else None for place in places], spec)

    def _evaluate(self, call: Function, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        try:
            with self._model.hold(values) as base:
                leaves, spec = tree_flatten(call(base))
            found = spec, [isinstance(leaf, Tensor) for leaf in leaves]
            if self._structure is None:
                _check_output(leaves)
                self._structure = found
            if found != self._structure:
                raise ValueError(f"Expected outputs alike for all draws; got {spec} and others.")
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        finally:
            for module, key, buffer, value in self._buffers:
                if getattr(module, key, None) is not buffer:
                    setattr(module, key, buffer)
                buffer.copy_(value)

    def _batched(self, call: Function, rows: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        # Checks of distributions branch on data. That an operator has no batching rule makes a loop
        # of it alone, which takes less time than one of the whole base.
        try:
            with _quiet, pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop because")
                batched = torch.vmap(partial(self._evaluate, call), randomness="different")
                return tuple(batched(self._draws.stacked(rows)))
        except Exception as error:  # what is not vmap's comes again from the loop
            self._failed = True
            if self._base not in _noted:
                _noted.add(self._base)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(
                    "Expected a base that torch.vmap can batch over draws; got"
                    f" {type(self._base).__name__}, which failed{_where(error, self._base)}"
                    f" ({reason}). It is called once per draw, as by chunk_size=1, with the same"
                    " results in the time of a loop.",
                    stacklevel=6,
                )
            return None


def _where(error: BaseException, base: nn.Module) -> str:
    """Says which submodule of a base an error came from, if it was one."""
    names = {id(module): name for name, module in base.named_modules()}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    callers = [frame.f_locals.get("self") for frame in frames]
    module = next((m for m in reversed(callers) if names.get(id(m))), None)
    return "" if module is None else f" in '{names[id(module)]}' ({type(module).__name__})"


class _Cost(TorchDispatchMode):
    """Counts the operators of an evaluation, and the elements that they compute."""

    supports_higher_order_operators = True
    _elements = _operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if isinstance(output, Tensor) and not getattr(func, "is_view", False):
            self._elements += output.numel()
            self._operators += 1
        if func is torch.ops.aten.bmm.default:  # what is expanded will be copied, which is slow
            self._elements += sum(2 * arg.numel() for arg in args if 0 in arg.stride())
        return output

    def chunk_size(self, size: int, count: int, on_cpu: bool) -> int:
        """Returns how many of `count` draws of `size` elements to evaluate at once, 1 for a loop.

        Batching saves overhead, and loses the cache. On a CPU, it paid for operators of up to
        60000 elements, and most with a million in all draws together.
        """
        limit, best, most = (2**16, 2**20, 2**25) if on_cpu else (2**20, 2**24, 2**28)
        elements = self._elements + size
        share = elements / max(self._operators, 1)
        largest = int(min(best // share, most // elements))
        if share > limit or largest < 4:
            return 1
        return math.ceil(count / math.ceil(count / largest))


class _Calls(TorchFunctionMode):
    """Counts within torch's functions; outside of them, compilers would meet the counter."""

    def __init__(self) -> None:
        self.cost = _Cost()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Nor may operators of higher order, which have rules for modes that they know.
        uncounted = getattr(func, "namespace", "") == "higher_order"
        with nullcontext() if uncounted or torch.compiler.is_compiling() else self.cost:
            return func(*args, **kwargs or {})


def _check(draws: Any, names: Any, levels: Any, function: Any, size: Any, source: Any) -> None:
    def whole(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1

    least = "2 for a variance (statistics='mean' takes 1)" if "variance" in names else "1"
    enough = whole(draws) and draws >= int(least[0])
    known = bool(names or levels) and all(name in _STATISTICS for name in names)
    within = all(isinstance(level, float) and 0 < level < 1 for level in levels)
    for passed, expected, got in (
        (enough, f"num_samples to be an integer of at least {least}", draws),
        (known, f"statistics to be among {_STATISTICS}", names),
        (within, "quantiles to be numbers between 0 and 1", levels),
        (function is None or callable(function), "function to be callable", function),
        (size is None or whole(size), "chunk_size to be an integer of at least 1", size),
        (isinstance(source, torch.Generator | None), "generator to be a torch.Generator", source),
    ):
        if not passed:
            raise ValueError(f"Expected {expected}; got {got!r}.")
