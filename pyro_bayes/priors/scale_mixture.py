"""A mixture of two Gaussians as a prior."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bayes.base.checks import check_positive, is_level
from pyro_bayes.priors.distribution import prior_of_distribution
from pyro_bayes.priors.parameter import ParameterPrior


@dataclass(frozen=True)
class ScaleMixture:
    r"""A mixture of a wide and a narrow Gaussian.

    .. math:: p(\theta_i) = \pi \, \mathcal{N}(\theta_i \mid 0, \sigma_1^2)
              + (1 - \pi) \, \mathcal{N}(\theta_i \mid 0, \sigma_2^2)

    Its divergence is estimated with draws.

    Arguments:
        pi: The weight :math:`\pi` of the first, between 0 and 1.
        var1: The variance :math:`\sigma_1^2` of the first.
        var2: The variance :math:`\sigma_2^2` of the second.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015)
        | https://arxiv.org/abs/1505.05424

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> bnn = BayesianModel(torch.nn.Linear(3, 1), prior=ScaleMixture(0.5, 1.0, 0.0025))
        >>> bnn.kl_divergence(num_samples=10)
        tensor(..., grad_fn=<...>)
    """

    pi: float
    var1: float
    var2: float

    def __post_init__(self) -> None:
        if not (is_level(self.pi) and 0 < self.pi < 1):
            raise ValueError(f"Expected pi to be a number between 0 and 1; got {self.pi!r}.")
        check_positive("var1", self.var1)
        check_positive("var2", self.var2)

    def of(self, name: str, parameter: Tensor) -> ParameterPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.
        """
        weights = torch.tensor([self.pi, 1 - self.pi], dtype=torch.double)
        scales = torch.tensor([self.var1, self.var2], dtype=torch.double).sqrt()
        mixture = dist.MixtureSameFamily(
            dist.Categorical(weights), dist.Normal(torch.zeros_like(scales), scales)
        )
        label = f"{self.pi:g} N(0, {self.var1:g}) + {1 - self.pi:g} N(0, {self.var2:g})"
        return prior_of_distribution(name, parameter, mixture, label)
