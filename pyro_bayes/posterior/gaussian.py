"""The formulas of Gaussian elements: a draw, its log-density and a divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(mean: Tensor, logvar: Tensor, epsilon: Tensor | None = None) -> Tensor:
    r"""Draws :math:`\mu + \sigma \epsilon` with :math:`\epsilon \sim \mathcal{N}(0, I)`.

    Arguments:
        mean: The means :math:`\mu`, of any shape.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
        epsilon: The noise :math:`\epsilon`, of the same shape; new noise by default.

    Returns:
        One draw, of the shape, dtype and device of the mean, differentiable by both arguments.

    References:
        | Auto-Encoding Variational Bayes (Kingma and Welling, 2014)
        | https://arxiv.org/abs/1312.6114

    Example:
        >>> draw(torch.tensor([1.0, 2.0]), torch.full((2,), -80.0))
        tensor([1., 2.])
    """
    if epsilon is None:
        epsilon = torch.randn_like(mean)
    return torch.addcmul(mean, (0.5 * logvar).exp(), epsilon)


def log_densities(value: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    r"""Returns :math:`\log \mathcal{N}(\theta \mid \mu, \sigma^2)` of each element, in nats.

    Arguments:
        value: The values :math:`\theta`, of any shape.
        mean: The means :math:`\mu`, of the same shape.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.

    Example:
        >>> log_densities(torch.ones(2), torch.zeros(2), torch.zeros(2))
        tensor([-1.4189, -1.4189])
    """
    squares = (value - mean).square() * (-logvar).exp()
    return -0.5 * (squares + logvar + math.log(2 * math.pi))


def divergence_terms(mean: Tensor, logvar: Tensor, precision: float | Tensor) -> Tensor:
    r"""Returns :math:`D_{KL}(\mathcal{N}(\mu, \sigma^2) \| \mathcal{N}(0, \sigma_p^2))` by element.

    .. math:: \frac{1}{2} \left[ e^a - 1 - a + \frac{\mu^2}{\sigma_p^2} \right],
              \qquad a = \log \frac{\sigma^2}{\sigma_p^2}

    Each is a sum of non-negative terms, so that a posterior close to the prior keeps its small
    divergence.

    Arguments:
        mean: The means :math:`\mu`, of any shape.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
        precision: The precision :math:`1 / \sigma_p^2 > 0` of the prior, a number or a tensor.

    Returns:
        The divergences in nats, of the same shape.

    Example:
        >>> divergence_terms(torch.ones(2), torch.zeros(2), 1.0)
        tensor([0.5000, 0.5000])
    """
    log = precision.log() if isinstance(precision, Tensor) else math.log(precision)
    a = logvar + log
    return 0.5 * (torch.expm1(a) - a + mean.square() * precision)
