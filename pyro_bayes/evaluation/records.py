"""What is known about each example of a batch, from a prediction and its target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from pyro_bayes.evaluation import numbers
from pyro_bayes.evaluation.bootstrap import Bootstrap
from pyro_bayes.evaluation.metrics import brier_score
from pyro_bayes.evaluation.passes import Records, log_probs
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import elementary, labelled


def score(
    predictive: Predictive,
    y: Tensor,
    draws: Bootstrap,
    *,
    levels: Sequence[float],
    generator: torch.Generator,
) -> Records:
    """Compares a prediction with its targets.

    Arguments:
        predictive: The prediction.
        y: The targets, of shape :math:`(B, *)`.
        draws: The views of the draws.
        levels: The probabilities of intervals.
        generator: Where what is random about it comes from.

    Returns:
        The targets `"y"`, of shape :math:`(1, B, *)`, the log-densities `"log_prob"` and the parts
        of :func:`uncertainties`, of shape :math:`(1 + R, B)`, and of shape :math:`(1 + R, B, *)`
        either `"predicted"`, `"confidence"`, `"correct"` and `"brier"` or what
        :func:`numbers.score` returns. If labels may be missing, `"labelled"`, of shape
        :math:`(1, B, *)`, tells which are there; examples without any are left out, and the scores
        of other elements without one are NaN.
    """
    y, log_prob = log_probs(predictive, y)
    record = {"y": y.unsqueeze(0), "log_prob": draws.log_means(log_prob)}
    record |= uncertainties(predictive, draws)
    element = elementary(predictive.mixture)
    if not isinstance(element, Bernoulli | Categorical):
        return record | numbers.score(predictive, y, draws, levels, generator)
    probs, labels = draws.means(element.probs), y.long()
    there = labelled(y, predictive.mixture)
    if there is not None:
        labels = labels.masked_fill(~there, 0)
    if isinstance(element, Bernoulli):
        probs = torch.stack([1 - probs, probs], -1)
    confidence, predicted = probs.max(-1)
    brier = torch.stack([brier_score(view, labels) for view in probs])
    correct = predicted == labels
    classes = {"y": y.long()[None], "predicted": predicted, "confidence": confidence}
    record |= classes | {"correct": correct, "brier": brier}
    if there is None:
        return record
    record |= {"labelled": there[None], "correct": correct & there}
    record |= {k: record[k].masked_fill(~there, math.nan) for k in ("confidence", "brier")}
    some = there.flatten(1).any(1) if there.dim() > 1 else there
    return {name: column[:, some] for name, column in record.items()}


def uncertainties(predictive: Predictive, draws: Bootstrap) -> Records:
    """Splits the uncertainty of a prediction.

    Of classes, `"total"` is the entropy, `"epistemic"` the mutual information of target and weights
    and `"aleatoric"` the expected entropy, in nats; of numbers, they are variances. They are sums
    over the elements of a target.

    Arguments:
        predictive: The prediction.
        draws: The views of the draws.

    Returns:
        The three, each of shape :math:`(1 + R, B)`.
    """
    element = elementary(predictive.mixture)
    if isinstance(element, Bernoulli | Categorical):
        mixture = type(element)(probs=draws.means(element.probs), validate_args=False)
        total, aleatoric = mixture.entropy(), draws.means(element.entropy())
        epistemic = (total - aleatoric).clamp_min(0)
    else:
        means = element.mean
        centred = means - means.mean(0)
        variance = element.variance
        aleatoric = draws.means(variance.clamp_max(torch.finfo(variance.dtype).max))
        aleatoric = aleatoric.masked_fill(variance.isinf().any(0), math.inf)
        epistemic = draws.means(centred.square()) - draws.means(centred).square()
        total = aleatoric + epistemic
    parts = {"total": total, "aleatoric": aleatoric, "epistemic": epistemic}
    return {name: part.reshape(*part.shape[:2], -1).sum(2) for name, part in parts.items()}
