"""Gaussian noise whose scale depends on the input."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch.nn.functional as F
from torch.distributions import Distribution

from pyro_bayes.base.checks import check_positive
from pyro_bayes.likelihoods.likelihood import Likelihood


class HeteroscedasticGaussian(Likelihood):
    r"""Gaussian noise, whose scale the network gives for each example.

    .. math:: p(y \mid f) = \prod_k \mathcal{N}(y_k \mid m_k, s_k^2), \qquad
              s = s_{\min} + \log(1 + e^r)

    The output is a pair :math:`(m, r)` of tensors of the target's shape :math:`(B, *)`, or one
    tensor whose last dimension holds the :math:`K` means and then the :math:`K` values of
    :math:`r`: a target of shape :math:`(B, K)` needs an output of shape :math:`(B, 2K)`.

    Warning:
        The mean is slow to learn where the scale starts large, since the gradient of the mean is
        divided by :math:`s^2`.

    Arguments:
        min_scale: The least standard deviation :math:`s_{\min}`, in the unit of the target. It
            keeps an example that is fitted exactly from an infinite density.

    Raises:
        ValueError: If `min_scale` is not positive and finite.

    References:
        | What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?
          (Kendall and Gal, 2017)
        | https://arxiv.org/abs/1703.04977

    Example:
        >>> likelihood = HeteroscedasticGaussian()
        >>> likelihood.log_prob(torch.zeros(3, 2), torch.zeros(3, 1))
        tensor([-0.5526, -0.5526, -0.5526])
    """

    def __init__(self, *, min_scale: float = 1e-4) -> None:
        super().__init__()
        check_positive("min_scale", min_scale)
        self.min_scale = min_scale

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        if isinstance(output, tuple | list):
            if len(output) != 2:
                raise ValueError(
                    f"Expected an output of a mean and a scale; got {len(output)} parts."
                )
            mean, raw = (self.as_real(part, batch_dims) for part in output)
            if mean.shape != raw.shape:
                raise ValueError(
                    "Expected an output of a mean and a scale of one shape; got"
                    f" {tuple(mean.shape)} and {tuple(raw.shape)}."
                )
        else:
            both = self.as_real(output, batch_dims)
            if both.dim() == batch_dims or both.shape[-1] % 2:
                raise ValueError(
                    "Expected an output whose last dimension holds means and as many scales, or a"
                    f" pair of tensors; got the shape {tuple(both.shape)}."
                )
            mean, raw = both.chunk(2, -1)
        scale = F.softplus(raw) + self.min_scale
        return self.per_example(dist.Normal(mean, scale, validate_args=False), batch_dims)
