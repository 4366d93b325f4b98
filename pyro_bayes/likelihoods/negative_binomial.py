"""Counts with overdispersion."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, distributions
from torch.distributions import Distribution

from pyro_bayes.likelihoods.likelihood import Likelihood
from pyro_bayes.likelihoods.special import betainc, wide


class NegativeBinomial(Likelihood):
    r"""Counts whose variance is above their mean, and whose log-mean is the output.

    .. math:: p(y \mid f) = \prod_k \frac{\Gamma(y_k + r_k)}{y_k! \, \Gamma(r_k)}
              \left(\frac{r_k}{r_k + m_k}\right)^{r_k} \left(\frac{m_k}{r_k + m_k}\right)^{y_k},
              \qquad m = e^f

    The variance is :math:`m + m^2 / r`. Output and target have the same shape, :math:`(B, *)`. The
    target may be of any real dtype. A learned :math:`r` is the parameter `log_total_count`.

    Arguments:
        total_count: The number :math:`r`: one, or a tensor of the shape of one example's target.
            The larger it is, the closer to :class:`Poisson`.
        learn: Whether it is learned, by maximum likelihood and from `total_count` on.

    Raises:
        TypeError: If `total_count` is not of numbers.
        ValueError: If it is not positive and finite.

    Example:
        >>> NegativeBinomial(1.0).log_prob(torch.zeros(3), torch.tensor([0, 1, 2]))
        tensor([-0.6931, -1.3863, -2.0794])
    """

    def __init__(self, total_count: float | Tensor, *, learn: bool = False) -> None:
        super().__init__()
        self._set_positive("total_count", total_count, learn)

    @property
    def total_count(self) -> Tensor:
        r"""The number :math:`r`, of the shape that it was given with."""
        return self.log_total_count.exp()  # type: ignore[operator]

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        log_mean = self.as_real(output, batch_dims)
        count = self._get_positive("total_count", log_mean, batch_dims)
        noise = _NegativeBinomial(count, logits=log_mean - count.log(), validate_args=False)
        return self.per_example(noise, batch_dims)


class _NegativeBinomial(distributions.NegativeBinomial, TorchDistributionMixin):
    """The negative binomial distribution, with a distribution function, for large counts too."""

    def log_prob(self, value: Tensor) -> Tensor:
        count, logits, y = wide(self.total_count), wide(self.logits), wide(value)
        ways = (count + y).lgamma() - count.lgamma() - (y + 1).lgamma()
        log_prob = ways + count * F.logsigmoid(-logits) + y * F.logsigmoid(logits)
        return log_prob.to(self.logits.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        logits = wide(self.logits)
        below = betainc(
            self.total_count, value.clamp_min(0).floor() + 1, torch.sigmoid(-logits),
            complement=torch.sigmoid(logits),
        )  # fmt: skip
        return torch.where(value < 0, 0.0, below.to(value.dtype))
