"""Predictions: statistics of what a base computes, over draws of its weights."""

from __future__ import annotations

import math
import operator
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import pyro
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_bayes.base.checks import check_count, check_generator, check_levels
from pyro_bayes.base.mutex import Mutex
from pyro_bayes.base.state import Buffers, draw_seed
from pyro_bayes.base.torch_private import (
    TorchDispatchMode,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
)
from pyro_bayes.posterior.layout import Flat
from pyro_bayes.posterior.sampling import WeightDraws
from pyro_bayes.prediction.batches import arguments, called, each_batch, inputs, parts, signature
from pyro_bayes.prediction.statistics import Result, RunningStatistics, joined

Function: TypeAlias = Callable[..., Any]
Hold: TypeAlias = Callable[[Mapping[str, Tensor]], AbstractContextManager[nn.Module]]

_STATISTICS = ("mean", "variance", "samples")
_DELAY = 3.0  # seconds until the progress bar appears

_quiet = Mutex("validation")  # validation and filters of warnings are settings of the whole process
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


@runtime_checkable
class Predictor(Protocol):
    """What likelihoods and scores know of a model: that it predicts.

    :class:`pyro_bayes.BayesianModel` is one.
    """

    @property
    def base(self) -> nn.Module:
        """The network that predicts."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Returns what predictions depend on."""

    def predict(
        self,
        x: Any,
        num_samples: int = 100,
        *,
        statistics: str | Sequence[str] = ("mean", "variance"),
        function: Function | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Computes what :meth:`pyro_bayes.BayesianModel.predict` describes."""


def predict(
    base: nn.Module,
    posterior: Sequence[Flat],
    hold: Hold,
    x: Any,
    num_samples: int,
    *,
    statistics: str | Sequence[str],
    quantiles: float | Sequence[float],
    function: Function | None,
    chunk_size: int | None,
    generator: torch.Generator | None,
    progress: bool,
) -> Prediction:
    """Computes what :meth:`pyro_bayes.BayesianModel.predict` describes.

    Arguments:
        base: The network.
        posterior: The means and log-variances of its parameters, by name.
        hold: Puts values in the place of parameters while a context is open.
        x: As there, like all that follow.
        num_samples: The number of draws.
        statistics: The statistics.
        quantiles: The levels.
        function: What to evaluate.
        chunk_size: How many draws to evaluate at once.
        generator: Where the seed comes from.
        progress: Whether to show a progress bar.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    levels = check_levels("quantiles", quantiles)
    _check(num_samples, names, levels, function, chunk_size, generator)
    seed = draw_seed(generator)
    single = _single(x, function)
    total = num_samples * (1 if single else operator.length_hint(x)) or None
    keys: tuple[str | float, ...] = (*names, *levels)
    bar = tqdm(total=total, unit="draw", delay=_DELAY, disable=not progress)
    with torch.no_grad(), bar:
        draws = WeightDraws(posterior, num_samples, seed, again=single is None)
        run = _Run(base, hold, draws, keys, chunk_size, bar)
        results = []
        for call in [single] if single else _calls(x, function):
            try:
                results.append(run(call))
            except TypeError as error:
                if type(x) is not list or not all(isinstance(part, Tensor) for part in x):
                    raise
                raise TypeError(
                    f"{error} (A list is an iterable of batches: pass tuple(x) if it holds the"
                    " arguments of one call.)"
                ) from error
    statistic = results[0] if single else joined(results)
    fields = {key: run.rebuild([tensor[key] for tensor in statistic]) for key in keys}
    mean, variance, samples = (fields.get(name) for name in _STATISTICS)
    return Prediction(mean, variance, {q: fields[q] for q in levels}, samples, num_samples)


class _Call(NamedTuple):
    """What to evaluate: a function of the base, and the signature of its inputs, if known."""

    function: Function
    signature: Any


def _call(x: Any, function: Function | None) -> _Call:
    """Returns the call of the base, or of a function of the base, with inputs."""
    args, kwargs = arguments(x)
    if function is None:
        return _Call(lambda base: called(base, args, kwargs), signature(x))
    return _Call(lambda base: function(base, *args, **kwargs), None)


def _calls(x: Iterable[Any], function: Function | None) -> Iterator[_Call]:
    """Yields the call of each batch."""
    for batch in each_batch(x, inputs if function is None else parts, name="x"):
        yield _call(batch, function)


def _single(x: Any, function: Function | None) -> _Call | None:
    """Returns the only call, `None` if `x` is an iterable of batches."""
    if isinstance(x, Tensor | tuple | Mapping):
        return _call(x, function)
    is_function = callable(x) and function is None
    if isinstance(x, nn.Module) or not (is_function or isinstance(x, Iterable)):
        raise TypeError(
            "Expected x to be a tensor, a tuple or a dictionary of arguments, an iterable of"
            " batches, or, without another function, a function of the base; got"
            f" {type(x).__name__}. Put any other argument in a tuple: predict((argument,))."
        )
    return _Call(x, None) if callable(x) else None


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

    def __init__(
        self,
        base: nn.Module,
        hold: Hold,
        draws: WeightDraws,
        keys: Sequence[str | float],
        size: int | None,
        bar: Any,
    ) -> None:
        self._base, self._hold, self._draws, self._keys = base, hold, draws, keys
        self._chunk_size, self._bar, self._failed = size, bar, False
        self._buffers = Buffers(base.modules())
        self._structure: Any = None

    def __call__(self, call: _Call) -> list[Result]:
        running: list[RunningStatistics] = []
        for outputs in self._outputs(call):
            running = running or [
                RunningStatistics(output[0], self._draws.total, self._keys) for output in outputs
            ]
            for statistics, values in zip(running, outputs, strict=True):
                statistics.add(values)
            self._bar.update(len(outputs[0]))
        return [statistics.result() for statistics in running]

    def _outputs(self, call: _Call) -> Iterator[tuple[Tensor, ...]]:
        start, total = 0, self._draws.total
        costs = _costs.setdefault(self._base, {})
        cost = costs.get(call.signature)
        wanted, first = self._chunk_size is None and total > 4, None
        if self._structure is None and not (wanted and cost):
            # A plain call shows what outputs are, and what they cost.
            rows = self._draws.rows(0, 1)
            with _Calls() if wanted else nullcontext() as calls:
                first = next(self._loop(call.function, rows))
            if calls is not None:
                cost = calls.cost
                if call.signature is not None:  # counting takes longer than the call
                    costs[call.signature] = cost
        if wanted and cost is not None:
            self._chunk_size = cost.chunk_size(self._draws.size, total, self._draws.on_cpu)
        step = min(self._chunk_size or 1, total)
        # In a chunk, which later calls begin with, the first draw's output is another by rounding.
        if first is not None and (step == 1 or not wanted):
            start = 1
            yield first
        for place in range(start, total, step):
            rows = self._draws.rows(place, min(step, total - place))
            vectorise = step > 1 and not self._failed
            batched = self._batched(call.function, rows) if vectorise else None
            yield from self._loop(call.function, rows) if batched is None else [batched]

    def _loop(self, function: Function, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        for values in self._draws.each(rows):
            yield tuple([output.unsqueeze(0) for output in self._evaluate(function, values)])

    def rebuild(self, tensors: Iterable[Tensor]) -> Any:
        rest, (spec, places) = iter(tensors), self._structure
        return tree_unflatten([next(rest) if place else None for place in places], spec)

    def _evaluate(self, function: Function, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        try:
            with self._hold(values) as base:
                leaves, spec = tree_flatten(function(base))
            structure = spec, [isinstance(leaf, Tensor) for leaf in leaves]
            if self._structure is None:
                _check_output(leaves)
                self._structure = structure
            if structure != self._structure:
                raise ValueError(f"Expected outputs alike for all draws; got {spec} and others.")
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        finally:
            self._buffers.restore()

    def _batched(self, function: Function, rows: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        # Checks of distributions branch on data. That an operator has no batching rule makes a loop
        # of it alone, which takes less time than one of the whole base.
        try:
            with _quiet.turn(), warnings.catch_warnings(), pyro.validation_enabled(False):
                warnings.filterwarnings("ignore", message="There is a performance drop because")
                batched = torch.vmap(partial(self._evaluate, function), randomness="different")
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
    check_count("num_samples", draws)
    if "variance" in names and draws < 2:
        raise ValueError(
            "Expected num_samples to be an integer of at least 2 for a variance"
            f" (statistics='mean' takes 1); got {draws}."
        )
    if not (names or levels) or not all(name in _STATISTICS for name in names):
        raise ValueError(f"Expected statistics to be among {_STATISTICS}; got {names!r}.")
    if function is not None and not callable(function):
        raise TypeError(f"Expected function to be callable; got {function!r}.")
    if size is not None:
        check_count("chunk_size", size)
    check_generator(source)
