"""The exact KL divergence in SVI: a guide whose sites are Gaussian tensors instead of draws."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pyro
import torch

from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.tensors import of_posterior
from pyro_bayes.posterior import fused
from pyro_bayes.pyro_bridge.guide import MeanField
from pyro_bayes.pyro_bridge.prior import distinct_sites
from pyro_bayes.pyro_bridge.site import Posterior


class ExactKL:
    r"""A guide with which a Monte Carlo ELBO has the exact KL divergence.

    The value of a site is a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor`. The guide's
    log-density of it is 0, and the prior's is :math:`-D_{KL}(q \| p)`, in closed form. So the sites
    keep their scales and masks, and the ELBO its expectation: only the noise of
    :math:`\log p(\theta) - \log q(\theta)` is gone.

    Arguments:
        guide: The guide whose parameters are used.
        noise: The kind of noise inside of the lifted base.

    Example:
        >>> from pyro_bayes.pyro_bridge.prior import GaussianPrior
        >>> parameters = {"w": torch.nn.Parameter(torch.ones(2))}
        >>> prior = GaussianPrior(parameters, variance=1.0)
        >>> guide = MeanField(prior, parameters, init_logvar=0.0, store_name="doc")
        >>> trace = pyro.poutine.trace(ExactKL(guide, ContextNoise("weights"))).get_trace()
        >>> replayed = pyro.poutine.trace(pyro.poutine.replay(prior, trace)).get_trace()
        >>> round(-replayed.log_prob_sum().item(), 4), trace.log_prob_sum().item()
        (1.0, 0.0)
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
            sites = self._guide.sites
            posterior = {name: self._guide.statements(site) for site, name in sites.items()}
            gaussians, anchor = of_posterior(posterior, noise, "each")
            # What was computed without a gradient does not serve where one is wanted.
            known = lru_cache(lambda variance, _: fused.kl_divergences(posterior, variance, anchor))
            noise.divergences = lambda variance: known(variance, torch.is_grad_enabled())
            for site, name in sites.items():
                values[site] = pyro.sample(site, Posterior(*posterior[name], gaussians[name]))
        return values
