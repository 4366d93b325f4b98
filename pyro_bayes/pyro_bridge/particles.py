"""The base inside a Pyro model: where its sites may stand, and what must be computed in time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bayes.base.swap import Swap
from pyro_bayes.base.torch_private import tree_leaves, tree_map, tree_map_only
from pyro_bayes.noise.context import ParticleNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, drawn
from pyro_bayes.pyro_bridge.prior import Prior

_PARTICLES = ("num_particles_vectorized", "_num_predictive_samples")
"""The plates in which Pyro runs a whole model for several draws at once."""


class LiftMessenger(Messenger):
    """Watches the sample sites of a Pyro model while the base is lifted.

    A network outside of plates has one set of parameters. Inside one, each index would have its
    own, and the prior would be counted once per index, so that is an error. Flows compute their
    density with the base, but Pyro asks for it after the model has returned and the base was
    given back, so it is computed at once.

    Attributes:
        depth: The number of plate dimensions to the right of the particles', or `None` if Pyro
            runs the model for one draw.
        observed: The sites that have a given value, as when Pyro predicts.

    Arguments:
        sites: The names of the sites of the base's parameters.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__()
        self._sites = frozenset(sites)
        self.depth: int | None = None
        self.observed: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._sites:
            if msg["is_observed"]:
                self.observed.add(msg["name"])
            for frame in msg["cond_indep_stack"]:
                if frame.name not in _PARTICLES:
                    raise ValueError(
                        f"Expected lift() outside of plates; got it inside the plate"
                        f" '{frame.name}', which would give each index parameters of its own. Open"
                        " `with bnn.lift() as net:` first and the plate inside."
                    )
                self.depth = -frame.dim - 1
            if isinstance(msg["value"], GaussianTensor) and not isinstance(msg["fn"], Prior):
                raise RuntimeError(
                    f"Expected the site '{msg['name']}' to have the model's own prior, with which"
                    " exact_kl() has the divergence in closed form; got"
                    f" {type(msg['fn']).__name__}. Use `bnn.guide`, which estimates the divergence"
                    " at the draw."
                )
        elif isinstance(msg["fn"], ZukoToPyro) and msg["mask"] is not False:
            fn, value = msg["fn"], msg["value"]
            if value not in fn.cache:
                fn.cache[value] = fn.log_prob(value)


class Particles:
    """A module with several draws of its parameters, all evaluated by one call.

    Arguments:
        module: The module.
        swap: The swap of its parameters.
        draws: The draws by name, of shape :math:`(P, *)` or, the same for all particles, :math:`*`.
        batched: The number :math:`P` by the names of those that have its dimension.
        depth: The number of plate dimensions to the right of the particles'.
        event_dim: The number of dimensions of an output that belong to no plate, if it is known.
    """

    def __init__(
        self,
        module: nn.Module,
        swap: Swap,
        draws: Mapping[str, Tensor],
        batched: Mapping[str, int],
        depth: int,
        event_dim: int | None,
    ) -> None:
        self._module, self._swap = module, swap
        self._gaussians = {n: d for n, d in draws.items() if isinstance(d, GaussianTensor)}
        self._draws = {n: d for n, d in draws.items() if n not in self._gaussians}
        self._in_dims = {name: 0 if name in batched else None for name in self._draws}
        self._size = next(iter(batched.values()))
        self._depth, self._event_dim = depth, event_dim

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
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._check(x)

        def call(index: Tensor, draws: dict[str, Tensor]) -> Any:
            gaussians = {
                name: GaussianTensor.of(
                    *value.posterior, name, ParticleNoise(value.noise, self._size, index)
                )
                for name, value in self._gaussians.items()
            }
            with self._swap(draws | gaussians):
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

    def _check(self, x: Tensor) -> None:
        if x.dim() >= max(self._depth, 1) + 2 and len(x) == self._size:
            raise ValueError(
                f"Expected an input that all {self._size} particles share; got one of shape"
                f" {tuple(x.shape)}, whose first dimension may be the particles'. Choose another"
                " number of particles, or vectorize_particles=False (parallel=False in Predictive)."
            )

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
