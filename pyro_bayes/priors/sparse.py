"""Priors with much weight near 0 and heavy tails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

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


@dataclass(frozen=True)
class Horseshoe:
    r"""The horseshoe: a Gaussian whose deviation is half-Cauchy for each element.

    .. math:: \theta_i \mid \lambda_i \sim \mathcal{N}(0, \lambda_i^2 \tau^2), \qquad
              \lambda_i \sim \mathrm{C}^+(0, 1)

    The :math:`\lambda_i` are integrated out. The density has a pole at 0 and tails like those of a
    Cauchy distribution: it leaves large weights as they are and pulls small ones to 0. Its
    divergence is estimated with draws.

    Arguments:
        scale: The global scale :math:`\tau`.

    References:
        | The Horseshoe Estimator for Sparse Signals (Carvalho et al., 2010)
        | https://doi.org/10.1093/biomet/asq017

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> bnn = BayesianModel(torch.nn.Linear(3, 1), prior=Horseshoe(0.1))
        >>> bnn.prior()["weight"].shape
        torch.Size([1, 3])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def of(self, name: str, parameter: Tensor) -> ParameterPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.
        """
        scale = torch.tensor(self.scale, dtype=torch.double)
        label = f"Horseshoe({self.scale:g})"
        return prior_of_distribution(name, parameter, HorseshoeDistribution(scale), label)


class HorseshoeDistribution(TorchDistribution):
    r"""The horseshoe distribution of one number, see :class:`Horseshoe`.

    .. math:: p(x) = \frac{e^z E_1(z)}{\tau \sqrt{2 \pi^3}}, \qquad z = \frac{x^2}{2 \tau^2}

    Arguments:
        scale: The scale :math:`\tau`, of any shape.

    Example:
        >>> HorseshoeDistribution(torch.tensor(1.0)).log_prob(torch.tensor(1.0))
        tensor(-2.1439)
    """

    arg_constraints: ClassVar[Any] = {"scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, scale: Tensor, validate_args: bool | None = None) -> None:
        """Makes the distribution, whose class describes the arguments."""
        self.scale = scale
        super().__init__(scale.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HorseshoeDistribution:
        return HorseshoeDistribution(self.scale.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        normal, up, down = self.scale.new_empty((3, *shape)).normal_()
        ratio = up / down  # of two normal numbers, it is Cauchy's
        draws: Tensor = self.scale * normal * ratio
        return draws

    def log_prob(self, value: Tensor) -> Tensor:
        z = 0.5 * (value / self.scale).square()
        # At 0, where the density has a pole, the least number that has a gradient counts.
        z = z.clamp_min(torch.finfo(z.dtype).tiny ** 0.5)
        log: Tensor = _LogScaledE1.apply(z)
        log_prob: Tensor = log - self.scale.log() - 0.5 * math.log(2 * math.pi**3)
        return log_prob


class _LogScaledE1(torch.autograd.Function):
    r""":math:`\log(e^z E_1(z))`, whose derivative is :math:`1 - 1 / (z e^z E_1(z))`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.where(z < 1, _series(z.clamp_max(1.0)), _fraction(z.clamp_min(1.0)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Tensor:
        z, _ = ctx.saved_tensors
        log: Any = _LogScaledE1.apply(z)
        return grad * (1 - (-log).exp() / z)  # type: ignore[no-any-return]


def _series(z: Tensor) -> Tensor:
    total, term = torch.zeros_like(z), torch.ones_like(z)
    for k in range(1, 19 if z.dtype == torch.double else 11):
        term = term * -z / k
        total = total - term / k
    return (total - z.log() - 0.5772156649015329).log() + z


def _fraction(z: Tensor) -> Tensor:
    value = z
    for k in range(60 if z.dtype == torch.double else 16, 0, -1):
        value = z + k / (1 + k / value)
    return -value.log()
