"""Counts without overdispersion."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, distributions
from torch.distributions import Distribution

from pyro_bayes.likelihoods.likelihood import Likelihood
from pyro_bayes.likelihoods.special import wide


class Poisson(Likelihood):
    r"""Counts, whose log-rate is the output.

    .. math:: p(y \mid f) = \prod_k \frac{e^{y_k f_k} e^{-e^{f_k}}}{y_k!}

    Output and target have the same shape, :math:`(B, *)`. The target may be of any real dtype.

    Example:
        >>> Poisson().log_prob(torch.zeros(3), torch.tensor([0, 1, 2]))
        tensor([-1.0000, -1.0000, -1.6931])
    """

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        log_rate = self.as_real(output, batch_dims)
        return self.per_example(_LogPoisson(log_rate), batch_dims)


class _LogPoisson(distributions.Poisson, TorchDistributionMixin):
    """The Poisson distribution by its log-rate, which may be far from 0."""

    def __init__(self, log_rate: Tensor) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _LogPoisson:
        return _LogPoisson(self.log_rate.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        y, log_rate = wide(value), wide(self.log_rate)
        log_prob = y * log_rate - log_rate.exp() - (y + 1).lgamma()
        return log_prob.to(self.log_rate.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        below = torch.special.gammaincc(value.clamp_min(0).floor() + 1, self.rate)
        return torch.where(value < 0, 0.0, below)
