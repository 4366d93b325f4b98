"""The distribution of a guide's site, whose draw and log-density are made with little work."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_bayes.gaussian_tensor import GaussianTensor


class Posterior(dist.Independent):
    r"""The posterior :math:`\mathcal{N}(\mu, \sigma^2 I)` of one parameter, with a draw at hand.

    The first sample is that draw, or a :class:`~pyro_bayes.gaussian_tensor.GaussianTensor` that
    stands for it. Of the draw :math:`\mu + \sigma \epsilon`, the log-density depends on
    :math:`\log \sigma` only,

    .. math:: \log q = -\frac{1}{2} \sum_i
              \left( \epsilon_i^2 + \log \sigma_i^2 + \log 2 \pi \right),

    since its dependence on :math:`\mu` through the draw and through the density cancel. Of a
    Gaussian tensor, it is 0.

    Arguments:
        mean: The means :math:`\mu`.
        logvar: The log-variances :math:`\log \sigma^2`.
        draw: The draw.
        noise: Its noise :math:`\epsilon`, if it is not a Gaussian tensor.
    """

    def __init__(
        self, mean: Tensor, logvar: Tensor, draw: Tensor, noise: Tensor | None = None
    ) -> None:
        super().__init__(_Normal(mean, logvar, draw), mean.dim(), validate_args=False)
        self._noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> Posterior:
        new = type(self).__new__(type(self))
        new._noise = None
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def log_prob(self, value: Any) -> Tensor:
        normal = self.base_dist
        if isinstance(value, GaussianTensor):
            return value.posterior[0].new_zeros(()).expand(self.batch_shape)
        if value is not normal.draw or self._noise is None:
            return super().log_prob(value)  # type: ignore[no-any-return]
        with torch.no_grad():
            constant = self._noise.square().sum().add_(value.numel() * math.log(2 * math.pi))
        return torch.add(normal.logvar.sum(), constant).mul(-0.5)


class _Normal(dist.Normal):
    """A normal distribution whose first draw is known, and whose σ is computed if needed."""

    def __init__(self, mean: Tensor, logvar: Tensor, draw: Tensor | None) -> None:
        self.loc, self.logvar, self.draw = mean, logvar, draw
        torch.distributions.Distribution.__init__(self, mean.shape, validate_args=False)

    @lazy_property
    def scale(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Normal:
        mean, logvar = (p.expand(batch_shape) for p in (self.loc, self.logvar))
        draw = self.draw if isinstance(self.draw, GaussianTensor) else None
        return type(self)(mean, logvar, draw)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        if self.draw is None:
            return super().rsample(sample_shape)
        if shape == self.draw.shape:
            return self.draw
        if isinstance(self.draw, GaussianTensor):
            return self.draw.batched(shape)
        return super().rsample(sample_shape)
