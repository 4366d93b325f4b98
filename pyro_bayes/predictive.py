"""The predictive distribution: an even mixture over draws from the posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent


class Predictive:
    r"""An even mixture of the likelihoods of :math:`S` draws.

    .. math:: p(y \mid x) = \frac{1}{S} \sum_s p(y \mid f_{\theta_s}(x))

    Arguments:
        mixture: The likelihoods of all draws, a distribution of batch shape :math:`(S, B)`.
    """

    def __init__(self, mixture: Distribution) -> None:
        self.mixture = mixture

    @property
    def num_samples(self) -> int:
        """The number :math:`S` of draws."""
        return self.mixture.batch_shape[0]

    @cached_property
    def mean(self) -> Tensor:
        return self._moment("mean").mean(0)

    @property
    def variance(self) -> Tensor:
        return self.aleatoric + self.epistemic

    @cached_property
    def aleatoric(self) -> Tensor:
        return self._moment("variance").mean(0)

    @cached_property
    def epistemic(self) -> Tensor:
        return self._moment("mean").var(0, correction=0)

    @cached_property
    def probs(self) -> Tensor:
        return self._classes().probs.mean(0)

    @cached_property
    def entropy(self) -> Tensor:
        base = self._classes()
        return type(base)(probs=self.probs).entropy()

    @cached_property
    def mutual_information(self) -> Tensor:
        return (self.entropy - self._classes().entropy().mean(0)).clamp_min(0)

    def log_prob(self, y: Tensor) -> Tensor:
        found: Tensor = self.mixture.log_prob(y)
        return found.logsumexp(0) - math.log(self.num_samples)

    def log_prob_standard_error(self, y: Tensor) -> Tensor:
        weights = (self.mixture.log_prob(y) - self.log_prob(y)).exp()
        return (weights.var(0) / self.num_samples).sqrt()

    def quantile(self, levels: float | Sequence[float]) -> Tensor:
        raise NotImplementedError

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        low, high = self.quantile(((1 - level) / 2, (1 + level) / 2))
        return low, high

    def cdf(self, y: Tensor) -> Tensor:
        return self._base.cdf(y).mean(0)

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        index = torch.randint(self.num_samples, (n,), generator=generator)
        counts = index.bincount(minlength=self.num_samples)
        most = int(counts.max())
        every = self.mixture.sample(torch.Size([most]))
        return torch.cat([every[:k, s] for s, k in enumerate(counts.tolist())])

    @property
    def _base(self) -> Distribution:
        base = self.mixture
        while isinstance(base, Independent):
            base = base.base_dist
        return base

    def _classes(self) -> Bernoulli | Categorical:
        base = self._base
        if not isinstance(base, Bernoulli | Categorical):
            raise AttributeError(f"Expected classes; got {type(base).__name__}.")
        return base

    def _moment(self, name: str) -> Tensor:
        if isinstance(self._base, Categorical):
            raise AttributeError("Expected a number as target; got classes. Use `probs`.")
        return getattr(self.mixture, name)
