"""The predictive distribution: an even mixture over draws from the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from pyro_bayes.base.checks import check_count, check_level, check_levels, is_number
from pyro_bayes.base.state import draw_seed, seeded
from pyro_bayes.likelihoods.targets import domain_of, elementary, fit_target

_QUANTILE_SAMPLES = 1000


class Predictive:
    r"""The predictive distribution of each example: an even mixture over :math:`S` draws.

    .. math:: p(y \mid x) = \frac{1}{S} \sum_s p(y \mid f_{\theta_s}(x)),
              \qquad \theta_s \sim q(\theta)

    Its variance is the sum of an aleatoric part, the noise of the likelihood, and an epistemic
    part, what the data left open about the network (the law of total variance):

    .. math:: \mathrm{Var}[y] = \frac{1}{S} \sum_s \mathrm{Var}[y \mid \theta_s]
              + \frac{1}{S} \sum_s \left(\mathrm{E}[y \mid \theta_s] - \mathrm{E}[y]\right)^2

    For classes, the entropy is the sum of the expected entropy and the mutual information of target
    and weights. All tensors are of the shape of the targets, :math:`(B, *)`, if not said otherwise.

    Arguments:
        mixture: The likelihoods of all draws, a distribution of batch shape :math:`(S, B)`.

    Attributes:
        mixture: The likelihoods of all draws.

    Raises:
        ValueError: If the batch shape is another.

    References:
        | Decomposition of Uncertainty in Bayesian Deep Learning (Depeweg et al., 2018)
        | https://arxiv.org/abs/1710.07283

    Example:
        >>> from torch.distributions import Normal
        >>> predictive = Predictive(Normal(torch.tensor([[-1.0], [1.0]]), 2.0))  # S = 2, B = 1
        >>> predictive.aleatoric, predictive.epistemic, predictive.variance
        (tensor([4.]), tensor([1.]), tensor([5.]))
        >>> predictive.interval(0.9)
        (tensor([-3.6775]), tensor([3.6775]))
    """

    def __init__(self, mixture: Distribution) -> None:
        if len(mixture.batch_shape) != 2:
            raise ValueError(
                "Expected a distribution whose batch dimensions are draws and examples, (S, B);"
                f" got the batch shape {tuple(mixture.batch_shape)}."
            )
        self.mixture = mixture

    def __repr__(self) -> str:
        draws, examples = self.mixture.batch_shape
        kind = type(elementary(self.mixture)).__name__.lstrip("_")
        shape = tuple(self.mixture.event_shape)
        return (
            f"{type(self).__name__}({kind}, num_samples={draws}, examples={examples},"
            f" target_shape={shape})"
        )

    @property
    def num_samples(self) -> int:
        """The number :math:`S` of draws."""
        return self.mixture.batch_shape[0]

    # Numbers

    @cached_property
    def mean(self) -> Tensor:
        """The mean."""
        return self._numbers("mean").mean.mean(0)

    @property
    def variance(self) -> Tensor:
        """The variance, aleatoric and epistemic."""
        return self.aleatoric + self.epistemic

    @cached_property
    def aleatoric(self) -> Tensor:
        """The mean over draws of the likelihood's variance."""
        return self._numbers("aleatoric").variance.mean(0)

    @cached_property
    def epistemic(self) -> Tensor:
        """The variance over draws of the likelihood's mean, that of the mixture (not of S - 1)."""
        return self._numbers("epistemic").mean.var(0, correction=0)

    def cdf(self, y: Tensor) -> Tensor:
        r"""Computes :math:`P(Y \le y)`, of each element of a target by itself.

        Arguments:
            y: The targets, of shape :math:`(B, *)`.

        Returns:
            The probabilities, of shape :math:`(B, *)`.

        Raises:
            AttributeError: If the targets are classes.
            NotImplementedError: If the likelihood has no distribution function, as a flow.
            ValueError: If `y` does not fit.
        """
        self._numbers("cdf")
        return self._cdf(fit_target(y, self.mixture))

    @torch.no_grad()
    def quantile(self, levels: float | Sequence[float] | Tensor) -> Tensor:
        r"""Computes quantiles, of each element of a target by itself.

        They are exact up to rounding, by bisection of the mixture's distribution function; for
        counts, the least integer with at least that probability. Where there is no distribution
        function, they are the quantiles of 1000 samples.

        Arguments:
            levels: One level between 0 and 1, or :math:`L` of them.

        Returns:
            The quantiles, of shape :math:`(B, *)` or :math:`(L, B, *)`.

        Raises:
            AttributeError: If the targets are classes.
            ValueError: If a level is not between 0 and 1.
        """
        self._numbers("quantile")
        levels = levels.tolist() if isinstance(levels, Tensor) else levels
        several = check_levels("levels", levels, least=1)
        try:
            quantiles = torch.stack([self._search(level) for level in several])
        except NotImplementedError:
            samples = self.sample(_QUANTILE_SAMPLES, torch.Generator().manual_seed(0))
            quantiles = torch.quantile(samples, samples.new_tensor(several), dim=0)
        return quantiles if isinstance(levels, Iterable) else quantiles[0]

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        r"""Computes central intervals, of each element of a target by itself.

        Arguments:
            level: The probability of an interval.

        Returns:
            The lower and the upper ends, each of shape :math:`(B, *)`.

        Raises:
            AttributeError: If the targets are classes.
            ValueError: If the level is not between 0 and 1.
        """
        check_level("level", level)
        low, high = self.quantile(((1 - level) / 2, (1 + level) / 2))
        return low, high

    # Classes

    @cached_property
    def probs(self) -> Tensor:
        r"""The probabilities of classes, of shape :math:`(B, *, C)`, or of 1 instead of 0."""
        return self._classes("probs").probs.mean(0)

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of the mixture in nats, of each element of a target by itself."""
        kind = type(self._classes("entropy"))
        entropy: Tensor = kind(probs=self.probs, validate_args=False).entropy()
        return entropy

    @cached_property
    def mutual_information(self) -> Tensor:
        """The epistemic part of the entropy, all but the mean over draws of their entropies."""
        entropies: Tensor = self._classes("mutual_information").entropy()
        return (self.entropy - entropies.mean(0)).clamp_min(0)

    # Both

    def log_prob(self, y: Tensor) -> Tensor:
        r"""Computes the log-density or log-probability of targets, :math:`\log p(y_i \mid x_i)`.

        Arguments:
            y: The targets, of shape :math:`(B, *)`.

        Returns:
            The logarithms of means over draws, in nats, of shape :math:`(B)`.

        Raises:
            TypeError: If `y` is not a tensor.
            ValueError: If it does not fit.
        """
        return self._log_probs(y).logsumexp(0) - math.log(self.num_samples)

    def log_prob_standard_error(self, y: Tensor) -> Tensor:
        r"""Estimates the Monte Carlo standard error of :meth:`log_prob`, from the finite draws.

        It is the standard error of the mean density over the mean density. Where a few draws make
        up most of that mean, it is too low, and the log-probability is too low as well.

        Arguments:
            y: The targets, of shape :math:`(B, *)`.

        Returns:
            The standard errors in nats, of shape :math:`(B)`.

        Raises:
            TypeError: If `y` is not a tensor.
            ValueError: If it does not fit, or there is one draw only.
        """
        if self.num_samples < 2:
            raise ValueError("Expected at least 2 draws, whose spread the error is; got 1.")
        weights = self._log_probs(y).softmax(0) * self.num_samples
        return (weights.var(0) / self.num_samples).sqrt()

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        r"""Samples targets.

        One sample has one draw of the weights for all examples, so that what examples have in
        common is kept.

        Arguments:
            n: The number of samples.
            generator: Where the seed comes from, torch's global generator by default.

        Returns:
            Independent samples, of shape :math:`(n, B, *)`.

        Raises:
            ValueError: If `n` is not a positive integer.
        """
        check_count("n", n)
        with seeded(draw_seed(generator)), torch.no_grad():
            draw, order = torch.randint(self.num_samples, (n,)).sort(stable=True)
            counts = draw.bincount(minlength=self.num_samples)
            rank = torch.arange(n) - (counts.cumsum(0) - counts)[draw]  # among those of its draw
            samples: Tensor = self.mixture.sample(torch.Size([int(counts.max())]))
            back = order.argsort()
        return samples[rank[back].to(samples.device), draw[back].to(samples.device)]

    def _log_probs(self, y: Tensor) -> Tensor:
        log_probs: Tensor = self.mixture.log_prob(fit_target(y, self.mixture))
        return log_probs

    def _cdf(self, y: Tensor) -> Tensor:
        probabilities: Tensor = elementary(self.mixture).cdf(y)
        return probabilities.mean(0)

    def _search(self, level: float) -> Tensor:
        domain = domain_of(self.mixture)
        if domain is None:
            raise NotImplementedError
        # Counts are searched from -1 on, which none is below.
        lowest: Any = -1 if domain.is_discrete else getattr(domain, "lower_bound", None)
        highest: Any = getattr(domain, "upper_bound", None)
        low = high = torch.zeros_like(elementary(self.mixture).mean[0])
        low = low + lowest if is_number(lowest) else self._double(low - 1, lambda p: p >= level)
        high = high + highest if is_number(highest) else self._double(high + 1, lambda p: p < level)
        return self._count(level, low, high) if domain.is_discrete else self._root(level, low, high)

    def _count(self, level: float, low: Tensor, high: Tensor) -> Tensor:
        """Returns the least integers in (low, high] with at least a probability, by bisection."""
        for _ in range(128):
            if (high <= low + 1).all():
                break
            middle = ((low + high) / 2).floor()
            below = self._cdf(middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def _root(self, level: float, low: Tensor, high: Tensor) -> Tensor:
        """Returns the numbers in (low, high) with a probability, by Newton's method in brackets."""
        precision = 4 * torch.finfo(low.dtype).eps
        point = (low + high) / 2
        for attempt in range(128):
            error = self._cdf(point) - level
            step = error / elementary(self.mixture).log_prob(point).exp().mean(0)
            done = (error.abs() <= precision) | (step.abs() <= precision * point.abs())
            if done.all():
                break
            low, high = torch.where(error < 0, point, low), torch.where(error < 0, high, point)
            # A bisection now and then bounds the number of steps.
            inside = (point - step > low) & (point - step < high) & (attempt % 4 < 3)
            point = torch.where(done, point, torch.where(inside, point - step, (low + high) / 2))
        return point

    def _double(self, end: Tensor, inside: Callable[[Tensor], Tensor]) -> Tensor:
        """Doubles the ends of intervals for as long as their probabilities are inside."""
        for _ in range(128):
            if not (more := inside(self._cdf(end))).any():
                break
            end = torch.where(more, 2 * end, end)
        return end

    def _numbers(self, name: str) -> Distribution:
        if isinstance(elementary(self.mixture), Categorical):
            raise AttributeError(
                f"Expected targets that are numbers for `{name}`; got classes. They have `probs`,"
                " `entropy` and `mutual_information`."
            )
        return self.mixture

    def _classes(self, name: str) -> Bernoulli | Categorical:
        element = elementary(self.mixture)
        if not isinstance(element, Bernoulli | Categorical):
            raise AttributeError(
                f"Expected targets that are classes for `{name}`; got numbers, of"
                f" {type(element).__name__}. They have `mean`, `variance`, `aleatoric`,"
                " `epistemic` and `quantile`."
            )
        return element
