"""The distribution of a guide's site, whose draw and log-density come from one pass for all."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_bayes.noise.gaussian_tensor import GaussianTensor
from pyro_bayes.posterior import gaussian
from pyro_bayes.pyro_bridge.expectation import NO_WEIGHTS, NoDensity
from pyro_bayes.pyro_bridge.joint import Joint


class Posterior(dist.Independent):
    r"""The posterior :math:`\mathcal{N}(\mu, \sigma^2 I)` of one parameter, with a draw at hand.

    The first sample is that draw, or a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor`
    that stands for it. In an ELBO, the log-density of a Gaussian tensor is 0; it has none that
    could weigh a draw.

    Arguments:
        joint: The posterior of all parameters.
        name: The name of the parameter.
        draw: The draw.
        log_prob: Its log-density, if it is not a Gaussian tensor.

    Attributes:
        joint: The posterior of all parameters.
        name: The name of the parameter.
    """

    has_rsample = True

    def __init__(
        self, joint: Joint, name: str, draw: Tensor, log_prob: Tensor | None = None
    ) -> None:
        # What the base classes' constructors would do, of which most steps need nothing.
        self.joint, self.name = joint, name
        self._draw: Tensor | None = draw
        self._log_prob = log_prob
        self._batch_shape, self._event_shape = torch.Size(), draw.shape
        self.reinterpreted_batch_ndims = draw.dim()

    @lazy_property
    def base_dist(self) -> SiteNormal:
        return SiteNormal(*self.joint.of(self.name), self._draw, self.joint.fixed(self.name))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Posterior:
        new = type(self).__new__(type(self))
        new.joint, new.name = self.joint, self.name
        new._log_prob = new._draw = None
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if self._draw is not None and not sample_shape:
            return self._draw
        if sample_shape and isinstance(self._draw, GaussianTensor):
            raise RuntimeError(NO_WEIGHTS.format(", from several draws of a site"))
        return super().rsample(sample_shape)

    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):  # an ELBO asks for the parts of the score instead
            return self._zeros(value).as_subclass(NoDensity)
        if value is not self._draw or self._log_prob is None:
            return super().log_prob(value)  # type: ignore[no-any-return]
        return self._log_prob

    def score_parts(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, GaussianTensor):
            return super().score_parts(x, *args, **kwargs)
        log_density = self.joint.log_density(self.name, self._zeros(x))
        no_score: Any = 0
        return ScoreParts(log_density, no_score, log_density)

    def _zeros(self, value: GaussianTensor) -> Tensor:
        return value.posterior[0].new_zeros(()).expand(self.batch_shape)


class SiteNormal(dist.Normal):
    r"""A normal distribution whose first draw may be known, and whose σ is computed if needed.

    Arguments:
        mean: The means :math:`\mu`.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
        draw: The first draw, if it is known.
        fixed: Which elements have no density, and are always their means; none by default.
    """

    def __init__(
        self, mean: Tensor, logvar: Tensor, draw: Tensor | None = None, fixed: Tensor | None = None
    ) -> None:
        self.loc, self.logvar, self.draw, self.fixed = mean, logvar, draw, fixed
        torch.distributions.Distribution.__init__(self, mean.shape, validate_args=False)

    @lazy_property
    def scale(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> SiteNormal:
        mean, logvar = (p.expand(batch_shape) for p in (self.loc, self.logvar))
        draw = self.draw if isinstance(self.draw, GaussianTensor) else None
        fixed = None if self.fixed is None else self.fixed.expand(batch_shape)
        return type(self)(mean, logvar, draw, fixed)

    def log_prob(self, value: Tensor) -> Tensor:
        if self.fixed is None:
            return gaussian.log_densities(value, self.loc, self.logvar)
        logvar = self.logvar.masked_fill(self.fixed, 0.0)
        return gaussian.log_densities(value, self.loc, logvar).masked_fill(self.fixed, 0.0)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        if self.draw is None:
            return super().rsample(sample_shape)
        if shape == self.draw.shape:
            return self.draw
        if isinstance(self.draw, GaussianTensor):
            return self.draw.batched(shape)
        return super().rsample(sample_shape)
