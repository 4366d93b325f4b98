"""The base inside a Pyro model: where its sites may stand, and what must be computed in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bayes.base.checks import is_number
from pyro_bayes.base.torch_private import open_traces, tree_leaves, tree_map, tree_map_only
from pyro_bayes.noise.context import ContextNoise, ParticleNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, drawn
from pyro_bayes.noise.inputs import Inputs
from pyro_bayes.pyro_bridge.prior_site import Prior

_FILTER = "particles"
"""The plate of :class:`pyro.infer.SMCFilter`, which hands values on from run to run."""

_PARTICLES = (
    *("num_particles_vectorized", "num_sleep_particles_vectorized", "_num_predictive_samples"),
    _FILTER,
)
"""The plates in which Pyro runs a whole model for several draws at once."""

_shared: WeakKeyDictionary[Any, list[Tensor]] = WeakKeyDictionary()
"""By the trace of a run, the inputs that all of its particles are known to share."""


class LiftMessenger(Messenger):
    """Watches the sample sites of a Pyro model while the base is lifted.

    A network outside of plates has one set of parameters. Inside one, each index would have its
    own, and the prior would be counted once per index, so that is an error. Flows compute their
    density with the base, but Pyro asks for it after the model has returned and the base was
    given back, so it is computed at once.

    Attributes:
        depth: The number of plate dimensions to the right of the particles', or `None` if Pyro
            runs the model for one draw.
        filters: Whether the particles are those of a filter.
        observed: The sites that have a given value, as when Pyro predicts.

    Arguments:
        sites: The names of the sites of the base's parameters.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__()
        self._sites = frozenset(sites)
        self.depth: int | None = None
        self.filters = False
        self.observed: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._sites:
            if msg["is_observed"]:
                self.observed.add(msg["name"])
            for frame in msg["cond_indep_stack"]:
                alike = frame.name == _FILTER and msg["value"].shape == msg["fn"].event_shape
                if frame.name not in _PARTICLES or alike:
                    raise ValueError(
                        f"Expected lift() outside of plates; got it inside the plate"
                        f" '{frame.name}', which would give each index parameters of its own. Open"
                        " `with bnn.lift() as net:` first and the plate inside."
                    )
                self.depth, self.filters = -frame.dim - 1, frame.name == _FILTER
            if isinstance(msg["value"], GaussianTensor):
                _check_exact(msg, msg["value"])
        elif isinstance(msg["fn"], ZukoToPyro) and msg["mask"] is not False:
            fn, value = msg["fn"], msg["value"]
            if value not in fn.cache:
                fn.cache[value] = fn.log_prob(value)


def _check_exact(msg: Any, value: GaussianTensor) -> None:
    """Raises a `RuntimeError` unless the divergence counts as the guide's site does."""
    if not isinstance(msg["fn"], Prior):
        raise RuntimeError(
            f"Expected the site '{msg['name']}' to have the model's own prior, with which"
            f" exact_kl() has the divergence in closed form; got {type(msg['fn']).__name__}. Use"
            " `bnn.guide`, which estimates the divergence at the draw."
        )
    here = msg["scale"], msg["mask"]
    there = value.noise.statements.get(value.parameter, here)
    if not all(map(_is_same, here, there)):
        raise RuntimeError(
            f"Expected the site '{msg['name']}' to have one scale and mask in the model and in the"
            f" guide, for exact_kl(); got {here} in the model and {there} in the guide. Put"
            " poutine.scale and poutine.mask around both, or use `bnn.guide`."
        )


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return bool(type(a) is type(b) and a == b) or (is_number(a) and is_number(b) and a == b)


Look: TypeAlias = Callable[[Mapping[str, Tensor], ContextNoise, Inputs], object]
"""Looks whether the examples of inputs meet, with values in the place of parameters."""


class Particles:
    """A module with several draws of its parameters, all evaluated by one call.

    Arguments:
        module: The module.
        hold: Holds values in the place of its parameters while a context is open.
        draws: The draws by name, of shape :math:`(P, *)` or, the same for all particles, :math:`*`.
        batched: The number :math:`P` by the names of those that have its dimension.
        depth: The number of plate dimensions to the right of the particles'.
        event_dim: The number of dimensions of an output that belong to no plate, if it is known.
        sites: The names of the sites of the base's parameters.
        filters: Whether the particles are those of a filter.
    """

    def __init__(
        self,
        module: nn.Module,
        hold: Callable[[Mapping[str, Tensor]], AbstractContextManager[nn.Module]],
        draws: Mapping[str, Tensor],
        batched: Mapping[str, int],
        depth: int,
        event_dim: int | None,
        *,
        sites: Iterable[str] = (),
        filters: bool = False,
        look: Look | None = None,
    ) -> None:
        self._look = look
        self._module, self._hold = module, hold
        self._gaussians = {n: d for n, d in draws.items() if isinstance(d, GaussianTensor)}
        self._draws = {n: d for n, d in draws.items() if n not in self._gaussians}
        self._in_dims = {name: 0 if name in batched else None for name in self._draws}
        self._size = next(iter(batched.values()))
        self._depth, self._event_dim = depth, event_dim
        self._sites, self._filters = frozenset(sites), filters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        r"""Calls the module once per draw, with the same arguments for all.

        As with Pyro's own sites, the particles' dimension stands to the left of the plates'. Plates
        that an output has no dimension for become dimensions of size 1.

        Returns:
            What the module returns, each tensor with a dimension of size :math:`P` on its left.

        Raises:
            ValueError: If an argument may differ between particles, an output may have dimensions
                for some of several plates, or `event_dim` does not fit an output.
            RuntimeError: If the module cannot be batched over draws.
        """
        self._check([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        if self._look is not None and self._gaussians:
            # Whether examples meet is the same for all particles.
            first = {n: d[0] if self._in_dims[n] == 0 else d for n, d in self._draws.items()}
            noise = next(iter(self._gaussians.values())).noise
            own = {
                name: GaussianTensor.of(*value.posterior, name, noise)
                for name, value in self._gaussians.items()
            }
            self._look(first | own, noise, (args, kwargs))

        def call(index: Tensor, draws: dict[str, Tensor]) -> Any:
            gaussians = {
                name: GaussianTensor.of(
                    *value.posterior, name, ParticleNoise(value.noise, self._size, index)
                )
                for name, value in self._gaussians.items()
            }
            with self._hold(draws | gaussians):
                return tree_map(drawn, self._module(*args, **kwargs))

        batched_call = torch.vmap(call, in_dims=(0, self._in_dims), randomness="different")
        try:
            output = batched_call(torch.arange(self._size), self._draws)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"Expected a base that torch.vmap can batch over draws; got"
                f" {type(self._module).__name__}, which failed with: {error}. Use"
                " vectorize_particles=False, or parallel=False in Predictive."
            ) from error
        return tree_map_only(Tensor, self._align, output)

    def _align(self, output: Tensor) -> Tensor:
        plates = output.dim() - 1 - (self._event_dim or 0)
        if self._event_dim is None:
            if self._depth > 1 and plates > 0:
                raise ValueError(
                    f"Expected event_dim for a model with {self._depth} nested plates; got None,"
                    f" and an output of shape {tuple(output.shape[1:])}, which may have dimensions"
                    " for some of the plates only. Say how many of its dimensions belong to no"
                    " plate: `with bnn.lift(event_dim=1) as net:`."
                )
            plates = min(plates, self._depth)
        elif not 0 <= plates <= self._depth:
            raise ValueError(
                f"Expected event_dim to leave from 0 to {self._depth} dimensions of an output to"
                f" plates; got event_dim={self._event_dim} and an output of shape"
                f" {tuple(output.shape[1:])}, which leaves {plates}."
            )
        missing = self._depth - plates
        return output.reshape(-1, *[1] * missing, *output.shape[1:]) if missing > 0 else output

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """Raises a `ValueError` if an input may differ between particles.

        It may if something in this run did, and the input has such a dimension.
        """
        traces = open_traces()
        called = not traces or traces[0] in _shared
        shared = _shared.setdefault(traces[0], []) if traces else []
        # What a filter hands on, or is computed outside of a trace, cannot be seen.
        sizes = {self._size} if called or self._filters else set()
        shapes, whole = set(), self._filters
        for value, counts in self._varying(traces):
            sizes |= counts
            shapes.add(value.shape)
            whole |= not value.is_floating_point()
        for x in inputs:
            if any(x is other for other in shared):
                continue
            # An input of real numbers has features on the right; an index may have none.
            features = 0 if whole and (self._filters or not x.is_floating_point()) else 1
            lead = x.shape[: max(x.dim() - self._depth - features, 0)]
            if not sizes.isdisjoint(lead) or x.shape in shapes:
                raise ValueError(
                    f"Expected an input that all {self._size} particles share; got one of shape"
                    f" {tuple(x.shape)}, of which a dimension on the left may be that of the"
                    " particles or of an enumerated variable: other values in this run have it."
                    " Choose another number of particles, or vectorize_particles=False"
                    " (parallel=False in Predictive)."
                )
        shared += inputs

    def _varying(self, traces: Sequence[Trace]) -> Iterator[tuple[Tensor, set[int]]]:
        """Yields the values that differ between particles or are enumerated, and how often."""
        for trace in traces:
            for name, site in trace.nodes.items():
                value = site.get("value")
                if site["type"] != "sample" or not isinstance(value, Tensor):
                    continue
                if name in self._sites or isinstance(site["fn"], Prior):
                    continue
                event_dim = getattr(site["fn"], "event_dim", 0)  # indices of plates have none
                lead = value.shape[: max(value.dim() - event_dim - self._depth, 0)]
                sizes = {size for size in lead if size > 1}
                if sizes:
                    yield value, sizes

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"Expected a call of the network; got its attribute '{name}', which has several values"
            " when Pyro vectorises over draws. Use vectorize_particles=False, or parallel=False in"
            " Predictive."
        )


def stack(
    values: Mapping[str, Tensor], originals: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Brings the values of sites to their parameters' shapes, behind one dimension for particles.

    Arguments:
        values: The values of the sites by parameter, with any number of dimensions on their left.
        originals: The parameters.

    Returns:
        The values, and the numbers of draws by name where there are several. Gaussian tensors stay
        what they are, unless the estimator is to draw them.
    """
    stacked: dict[str, Tensor] = {}
    batched: dict[str, int] = {}
    for name, value in values.items():
        if isinstance(value, GaussianTensor) and value.noise.estimator == "weights":
            value = drawn(value)
        shape = originals[name].shape
        if value.shape == shape:
            stacked[name] = value
            continue
        draws = math.prod(value.shape[: value.dim() - len(shape)])
        if draws > 1:
            batched[name] = draws
        if isinstance(value, GaussianTensor):
            stacked[name] = GaussianTensor.of(*value.posterior, name, value.noise)
        else:
            stacked[name] = value.reshape((draws, *shape) if draws > 1 else shape)
    return stacked, batched
