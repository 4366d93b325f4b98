"""The exact KL divergence in SVI: a guide whose sites are Gaussian tensors instead of draws."""

from __future__ import annotations

import warnings
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_mask

from pyro_bayes.base.torch_private import is_enumerated
from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor
from pyro_bayes.noise.tensors import gaussian_tensors
from pyro_bayes.pyro_bridge.guide import MeanField
from pyro_bayes.pyro_bridge.joint import Joint
from pyro_bayes.pyro_bridge.prior import distinct_sites
from pyro_bayes.pyro_bridge.site import Posterior


class ExactKL:
    r"""A guide with which a Monte Carlo ELBO has the exact KL divergence.

    The value of a site is a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor`. The guide's
    log-density of it is 0, and the prior's is :math:`-D_{KL}(q \| p)`, in closed form. So the sites
    keep their scales and masks, and the ELBO its expectation: only the noise of
    :math:`\log p(\theta) - \log q(\theta)` is gone. Where densities are masked altogether, as
    when Pyro predicts, the values are draws.

    Arguments:
        guide: The guide whose parameters are used.
        noise: The kind of noise inside of the lifted base.

    Example:
        >>> from pyro_bayes.pyro_bridge.prior import PriorModule
        >>> parameters = {"w": torch.nn.Parameter(torch.ones(2))}
        >>> prior = PriorModule(parameters)
        >>> guide = MeanField(prior, parameters, init_logvar=0.0, store_name="doc")
        >>> round(pyro.infer.Trace_ELBO().loss(prior, ExactKL(guide, ContextNoise("weights"))), 4)
        1.0
    """

    def __init__(self, guide: MeanField, noise: ContextNoise) -> None:
        self._guide, self._noise = guide, noise

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Makes one sample statement per site; the arguments of the model are ignored.

        Returns:
            The Gaussian tensor of each site by the name of the site, or its draw where densities
            are masked.
        """
        if get_mask() is False:  # as in pyro.infer.Predictive, which hands values on
            return self._guide()  # type: ignore[no-any-return]
        noise = self._fresh_noise()
        with distinct_sites(), _Statements(noise):
            posterior = self._guide.statements()
            joint, priors = Joint(posterior), self._guide.priors
            gaussians, numbers = gaussian_tensors(posterior, noise, priors, "divergences")
            joint.note(priors, numbers)
            noise.divergence = joint.divergence
            sites = {name: Posterior(joint, name, value) for name, value in gaussians.items()}
            return self._guide.sample_sites(sites)

    def _fresh_noise(self) -> ContextNoise:
        """Returns the noise of one run: one draw of the weights where Pyro enumerates.

        A sum over an enumerated variable that several outputs depend on needs their joint
        distribution. Local noise and flipout have that of each example alone.
        """
        if self._noise.estimator == "weights" or not is_enumerated():
            return self._noise.fresh()
        warnings.warn(
            "Expected exact_kl(local_trick=False) where Pyro enumerates; got"
            f" {self._noise.estimator!r} noise, which is independent between examples, so that an"
            " enumerated variable that they share would have a wrong loss. One draw of the weights"
            " is used instead. Leave local_trick out.",
            stacklevel=3,
        )
        return ContextNoise("weights")


class _Statements(Messenger):
    """Notes how the sites of a guide are scaled and masked.

    Arguments:
        noise: Where to note it, for the model to be compared with.
    """

    def __init__(self, noise: ContextNoise) -> None:
        super().__init__()
        self._noise = noise

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, GaussianTensor):
            self._noise.statements[value.parameter] = msg["scale"], msg["mask"]
