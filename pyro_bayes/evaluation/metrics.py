"""Scores of predictions: what torchmetrics has not, or needs care with."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count
from pyro_bayes.base.extras import require
from pyro_bayes.base.state import where_double


def brier_score(probs: Tensor, labels: Tensor) -> Tensor:
    r"""Computes the Brier score of each example, from 0 to 2.

    .. math:: \sum_c (p_c - [y = c])^2

    This is the original one, a sum over all classes: with two of them, it is twice the squared
    error of the probability of one.

    Arguments:
        probs: The predicted probabilities, of shape :math:`(*, C)`.
        labels: The true classes, integers from 0 to :math:`C - 1`, of shape :math:`(*)`.

    Returns:
        The scores, of shape :math:`(*)`.

    References:
        | Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)
        | https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2

    Example:
        >>> brier_score(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0]))
        tensor([0.1400])
    """
    truth = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - truth).square().sum(-1)


def calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> Tensor:
    r"""Computes the expected calibration error (ECE), in bins of equal width.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N}
              \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    The bins are those of torchmetrics, but a confidence of 1 is in the last of them, where
    torchmetrics gives it one of its own.

    Arguments:
        confidence: The probabilities of the predicted classes, of shape :math:`(N)`.
        correct: Whether the predictions are right, of shape :math:`(N)`.
        bins: The number of bins.

    Returns:
        The error, a 0-dim tensor.

    Raises:
        ImportError: If the extra `metrics` is not installed.
        ValueError: If an argument is of the wrong shape or out of range.

    References:
        | On Calibration of Modern Neural Networks (Guo et al., 2017)
        | https://arxiv.org/abs/1706.04599

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 1, 1, 0])
        >>> calibration_error(confidence, correct)
        tensor(0.1000)
    """
    require("torchmetrics", extra="metrics")
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = _checked(confidence, correct, bins)
    below_one = torch.nextafter(confidence.new_tensor(1.0), confidence.new_tensor(0.0))
    return binary_calibration_error(
        confidence.minimum(below_one), correct, n_bins=bins, validate_args=False
    )


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> Tensor:
    r"""Computes the expected calibration error, in bins of equal numbers of examples.

    Equal confidences are in the same bin, so that the order of examples does not matter.

    Arguments:
        confidence: The probabilities of the predicted classes, of shape :math:`(N)`.
        correct: Whether the predictions are right, of shape :math:`(N)`.
        bins: The number of bins.

    Returns:
        The error, a 0-dim tensor.

    Raises:
        ValueError: If an argument is of the wrong shape or out of range.

    References:
        | Measuring Calibration in Deep Learning (Nixon et al., 2019)
        | https://arxiv.org/abs/1904.01685

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 1, 1, 0])
        >>> adaptive_calibration_error(confidence, correct, bins=2)
        tensor(0.1000)
    """
    confidence, correct = _checked(confidence, correct, bins)
    ranks = torch.arange(1, bins, dtype=torch.double) * len(confidence) / bins
    edges = confidence.sort().values[ranks.ceil().long() - 1]
    places = torch.bucketize(confidence, edges)
    gaps = confidence.new_zeros(bins).index_add(0, places, correct - confidence)
    return gaps.abs().sum() / len(confidence)


def pit_deviation(pit: Tensor) -> Tensor:
    r"""Computes how far PIT values are from uniform: the Kolmogorov-Smirnov distance.

    .. math:: \sup_u \left| \frac{1}{N} \sum_i [u_i \leq u] - u \right|

    It is the largest error in the probability of a half-line that the predictions make on average.
    Of :math:`N` uniform values, it is about :math:`0.87 / \sqrt N`.

    Arguments:
        pit: The values of the predictive distribution function at the targets, of shape
            :math:`(N)`.

    Returns:
        The distance, a 0-dim tensor between 0 and 1.

    References:
        | Statistical Theory: The Prequential Approach (Dawid, 1984)
        | https://doi.org/10.2307/2981683

    Example:
        >>> pit_deviation(torch.tensor([0.25, 0.75])), pit_deviation(torch.tensor([0.0, 0.0]))
        (tensor(0.2500), tensor(1.))
    """
    ordered, count = pit.sort().values, len(pit)
    steps = torch.arange(count + 1, dtype=pit.dtype, device=pit.device) / count
    return torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    r"""Computes how well a score tells two sets apart: the area under the ROC curve.

    .. math:: P(s_\mathrm{in} < s_\mathrm{out}) + \frac{1}{2} P(s_\mathrm{in} = s_\mathrm{out})

    It is torchmetrics' value for the ranks of the scores: of scores beyond 0 and 1, torchmetrics
    would take sigmoids, which round large ones to the same.

    Arguments:
        inside: The scores of examples like those trained on, of shape :math:`(N)`.
        outside: The scores of other examples, which should be higher, of shape :math:`(M)`.

    Returns:
        The area, a 0-dim tensor between 0 and 1; 0.5 if the score knows nothing, and nan if there
        is none.

    Raises:
        ImportError: If the extra `metrics` is not installed.
        ValueError: If one of the sets is empty.

    References:
        | A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
          Networks (Hendrycks and Gimpel, 2017)
        | https://arxiv.org/abs/1610.02136

    Example:
        >>> auroc(torch.tensor([1.0, 20.0]), torch.tensor([20.0, 30.0, 40.0]))
        tensor(0.9167)
    """
    require("torchmetrics", extra="metrics")
    from torchmetrics.functional.classification import binary_auroc

    if not len(inside) or not len(outside):
        raise ValueError(
            "Expected a score inside and one outside at least; got"
            f" {len(inside)} and {len(outside)}."
        )
    scores = where_double(torch.cat([inside, outside]))
    if scores.isnan().any():
        return scores.new_tensor(torch.nan)
    values, ranks = scores.unique(return_inverse=True)
    labels = (torch.arange(len(scores), device=scores.device) >= len(inside)).long()
    # In double precision, ranks stay distinct.
    area = binary_auroc(ranks.double() / len(values), labels, validate_args=False)
    return area.float().to(inside.device)


def _checked(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Returns confidences in single precision or more, and whether predictions are right."""
    if confidence.dim() != 1 or len(confidence) == 0 or correct.shape != confidence.shape:
        raise ValueError(
            "Expected confidence and correct to be of one shape (N,), with a number for each of N"
            f" examples; got {tuple(confidence.shape)} and {tuple(correct.shape)}."
        )
    check_count("bins", bins)
    wide = torch.promote_types(confidence.dtype, torch.float32)
    return confidence.to(wide), correct.long()
