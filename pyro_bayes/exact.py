"""The exact KL divergence in SVI: a guide whose sites are Gaussian tensors instead of draws."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_bayes.gaussian_tensor import GaussianTensor
from pyro_bayes.guide import MeanField
from pyro_bayes.noise import ContextNoise
from pyro_bayes.prior import distinct_sites


class ExactKL:
    r"""A guide with which a Monte Carlo ELBO has the exact KL divergence.

    The value of a site is a :class:`~pyro_bayes.gaussian_tensor.GaussianTensor`. The guide's
    log-density of it is 0, and the prior's is :math:`-D_{KL}(q \| p)`, in closed form. So the sites
    keep their scales and masks, and the ELBO its expectation: only the noise of
    :math:`\log p(\theta) - \log q(\theta)` is gone.

    Arguments:
        guide: The guide whose parameters are used.
        noise: The kind of noise inside of the lifted base.

    Example:
        >>> from pyro_bayes.prior import GaussianPrior
        >>> parameters = {"w": torch.nn.Parameter(torch.ones(2))}
        >>> prior = GaussianPrior(parameters, variance=1.0)
        >>> guide = MeanField(prior, parameters, init_logvar=0.0, store_name="doc")
        >>> trace = pyro.poutine.trace(ExactKL(guide, ContextNoise("weights"))).get_trace()
        >>> replayed = pyro.poutine.trace(pyro.poutine.replay(prior, trace)).get_trace()
        >>> -replayed.log_prob_sum(), trace.log_prob_sum()
        (tensor(1., ...), tensor(0.))
    """

    def __init__(self, guide: MeanField, noise: ContextNoise) -> None:
        self._guide, self._noise = guide, noise

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Makes one sample statement per site; the arguments of the model are ignored.

        Returns:
            The Gaussian tensor of each site by the name of the site.
        """
        noise = self._noise.fresh()
        values = {}
        with distinct_sites():
            for site, name in self._guide.sites.items():
                mean, logvar = self._guide.statements(site)
                value = GaussianTensor.of(mean, logvar, name, noise)
                values[site] = pyro.sample(site, _Site(_Undrawn(value), mean.dim()))
        return values


class _Undrawn(dist.Normal):
    """A normal distribution whose draw is a Gaussian tensor."""

    def __init__(self, value: GaussianTensor) -> None:
        self.value = value
        self.loc, self._logvar = value.posterior
        torch.distributions.Distribution.__init__(self, self.loc.shape, validate_args=False)

    @lazy_property
    def scale(self) -> Tensor:
        return (0.5 * self._logvar).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Undrawn:
        new = type(self).__new__(type(self))
        new.value, new.loc = self.value, self.loc.expand(batch_shape)
        new._logvar = self._logvar.expand(batch_shape)
        torch.distributions.Distribution.__init__(new, batch_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.value if shape == self.value.shape else self.value.batched(shape)


class _Site(dist.Independent):
    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):
            return value.posterior[0].new_zeros(()).expand(self.batch_shape)
        return super().log_prob(value)  # type: ignore[no-any-return]
