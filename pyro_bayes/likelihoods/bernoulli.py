"""Yes or no."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, distributions
from torch.distributions import Distribution

from pyro_bayes.likelihoods.likelihood import Likelihood


class Bernoulli(Likelihood):
    r"""Targets that are 0 or 1, whose logits are the output: one, or several labels at a time.

    .. math:: p(y \mid f) = \prod_k \sigma(f_k)^{y_k} (1 - \sigma(f_k))^{1 - y_k}

    Output and target have the same shape, :math:`(B, *)`. The target may be of numbers or bools.

    Example:
        >>> Bernoulli().log_prob(torch.zeros(2), torch.tensor([0, 1]))
        tensor([-0.6931, -0.6931])
    """

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        logits = self.as_real(output, batch_dims)
        noise = _Bernoulli(logits=logits, validate_args=False)
        return self.per_example(noise, batch_dims)


class _Bernoulli(distributions.Bernoulli, TorchDistributionMixin):
    """The Bernoulli distribution, with a distribution function."""

    def cdf(self, value: Tensor) -> Tensor:
        steps = torch.where(value < 1, torch.sigmoid(-self.logits), 1.0)
        return torch.where(value < 0, 0.0, steps)
