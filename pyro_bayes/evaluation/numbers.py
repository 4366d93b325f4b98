"""Scores of predicted numbers: of their means, intervals and distribution functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from pyro_bayes.base.state import draw_seed, seeded
from pyro_bayes.evaluation.bootstrap import Bootstrap
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import elementary


def score(
    predictive: Predictive,
    y: Tensor,
    draws: Bootstrap,
    levels: Sequence[float],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Compares predicted numbers with their targets.

    Arguments:
        predictive: The prediction.
        y: The targets, of shape :math:`(B, *)`.
        draws: The views of the draws.
        levels: The probabilities of intervals.
        generator: Where one sample of each draw comes from, where there is no closed form, and the
            place of a count within its step of the distribution function.

    Returns:
        The `"mean"`, the `"crps"`, the `"pit"`, and for each level whether the target is `"in@…"`
        its interval, and the `"width@…"` of that, each of shape :math:`(1 + R, B, *)`.
    """
    element = elementary(predictive.mixture)
    tails = [tail for level in levels for tail in ((1 - level) / 2, (1 + level) / 2)]
    ends = predictive.quantile(tails) if tails else y.new_zeros(0, *y.shape)
    place = torch.rand(draws.views, *y.shape, generator=generator).to(y)
    with seeded(draw_seed(generator)):
        samples = element.sample()
    try:
        pit, moves = _exact(element, y, place, ends, tails, draws)
    except NotImplementedError:  # flows have no distribution function
        pit, moves = _sampled(samples, y, place, tails, draws)
    scores = {"mean": draws.means(element.mean), "pit": pit}
    if isinstance(element, Normal):
        scores["crps"] = gaussian_crps(element.loc, element.scale, y, draws)
    else:
        scores["crps"] = sample_crps(samples, y, draws)
    for i, level in enumerate(levels):
        low, high = ((ends + moves)[:, j] for j in (2 * i, 2 * i + 1))
        scores |= {f"in@{level:g}": (low <= y) & (y <= high), f"width@{level:g}": high - low}
    return scores


def gaussian_crps(mean: Tensor, scale: Tensor, y: Tensor, draws: Bootstrap) -> Tensor:
    r"""Computes the continuous ranked probability score under an even mixture of Gaussians.

    .. math:: \mathrm{E}|X - y| - \frac{1}{2} \mathrm{E}|X - X'|
              = \frac{1}{S} \sum_s A(\mu_s - y, \sigma_s)
              - \frac{1}{2 S^2} \sum_{st} A(\mu_s - \mu_t, \sqrt{\sigma_s^2 + \sigma_t^2})

    where :math:`A(\mu, \sigma) = 2 \sigma \varphi(\mu / \sigma) + \mu (2 \Phi(\mu / \sigma) - 1)`
    is the mean of :math:`|\mathcal{N}(\mu, \sigma^2)|`.

    Arguments:
        mean: The means, of shape :math:`(S, *)`.
        scale: The standard deviations, of shape :math:`(S, *)`.
        y: The targets, of shape :math:`(*)`.
        draws: The views of the draws.

    Returns:
        The scores in the unit of the target, of shape :math:`(1 + R, *)`.

    References:
        | The Continuous Ranked Probability Score for Circular Variables and Its Application to
          Mesoscale Forecast Ensemble Verification (Grimit et al., 2006)
        | https://doi.org/10.1256/qj.05.235
    """
    pairs = draws.pair_means(
        lambda m, s, other, r: _absolute_mean(m - other, torch.hypot(s, r)), mean, scale
    )
    return draws.means(_absolute_mean(mean - y, scale)) - pairs / 2


def sample_crps(samples: Tensor, y: Tensor, draws: Bootstrap) -> Tensor:
    r"""Estimates the continuous ranked probability score from samples, without bias.

    .. math:: \frac{1}{S} \sum_s |x_s - y| - \frac{1}{2 S (S - 1)} \sum_{st} |x_s - x_t|

    With :math:`S^2` instead of :math:`S (S - 1)`, as torchmetrics has it, it would be too high.

    Arguments:
        samples: One sample of each draw, of shape :math:`(S, *)`.
        y: The targets, of shape :math:`(*)`.
        draws: The views of the draws.

    Returns:
        The scores in the unit of the target, of shape :math:`(1 + R, *)`.

    References:
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting and Raftery, 2007)
        | https://doi.org/10.1198/016214506000001437
    """
    pairs = draws.pair_means(lambda a, b: (a - b).abs(), samples)
    return draws.means((samples - y).abs()) - pairs / 2 * draws.size / (draws.size - 1)


def _absolute_mean(mean: Tensor, scale: Tensor) -> Tensor:
    ratio = mean / (math.sqrt(2) * scale)
    return math.sqrt(2 / math.pi) * scale * (-ratio.square()).exp() + mean * ratio.erf()


def _exact(
    element: Distribution,
    y: Tensor,
    place: Tensor,
    ends: Tensor,
    tails: Sequence[float],
    draws: Bootstrap,
) -> tuple[Tensor, Tensor]:
    """Returns PIT values, and how far views move the ends of intervals."""
    pit = draws.means(element.cdf(y))
    discrete = element.support is not None and element.support.is_discrete
    if discrete:
        pit = pit - place * draws.means(element.log_prob(y).exp())
    if not tails:
        return pit.clamp(0, 1), ends
    reach, moves = ends.amax(0) - ends.amin(0) + discrete, []
    for end, tail in zip(ends, tails, strict=True):
        # To the first order: other draws move the distribution function by little.
        below, density = draws.means(element.cdf(end)), element.log_prob(end).exp().mean(0)
        if discrete:
            before = draws.means(element.cdf(end - 1))
            up = ((tail - below) / density).ceil().clamp_min(0)
            move = up - ((before - tail) / density + 1).floor().clamp_min(0)
        else:
            move = (below[0] - below) / density
        moves.append(move.nan_to_num().clamp(-reach, reach))
        moves[-1][0] = 0  # whatever the rounding
    return pit.clamp(0, 1), torch.stack(moves, 1)


def _sampled(
    samples: Tensor, y: Tensor, place: Tensor, tails: Sequence[float], draws: Bootstrap
) -> tuple[Tensor, Tensor]:
    """Returns the same, estimated from one sample of each draw."""
    below, ties = (draws.means(hits.to(y)) for hits in (samples < y, samples == y))
    pit = (draws.size * below + place * (draws.size * ties + 1)) / (draws.size + 1)
    if not tails:
        return pit, samples[:0]
    levels = samples.new_tensor(tails)
    views = (samples[draws.indices(view).to(samples.device)] for view in range(draws.views))
    quantiles = torch.stack([view.quantile(levels, 0) for view in views])
    return pit, quantiles - quantiles[0]
