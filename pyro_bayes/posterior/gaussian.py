"""The arithmetic of one Gaussian tensor: a draw, its density and a KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(mean: Tensor, logvar: Tensor, epsilon: Tensor | None = None) -> Tensor:
    r"""Draws :math:`\mu + \sigma \epsilon` with :math:`\epsilon \sim \mathcal{N}(0, I)`.

    The draw is differentiable with respect to both arguments.

    Arguments:
        mean: The means :math:`\mu`, of any shape.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
        epsilon: The noise :math:`\epsilon`, of the same shape; new noise by default.

    Returns:
        One draw, with the shape, dtype and device of the mean.

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


def log_density(logvar: Tensor, epsilon: Tensor) -> Tensor:
    r"""Returns the log-density of a draw under its own Gaussian, summed.

    .. math:: \log \mathcal{N}(\mu + \sigma \epsilon \mid \mu, \sigma^2)
              = -\frac{1}{2} \sum_i \left( \epsilon_i^2 + \log \sigma_i^2 + \log 2 \pi \right)

    Its dependence on the mean through the draw and through the density cancel.

    Arguments:
        logvar: The log-variances :math:`\log \sigma^2`, of any shape.
        epsilon: The noise :math:`\epsilon` of the draw, of the same shape.

    Returns:
        A 0-dim tensor, in nats.

    Example:
        >>> log_density(torch.zeros(2), torch.ones(2))
        tensor(-2.8379)
    """
    constant = epsilon.square().sum() + epsilon.numel() * math.log(2 * math.pi)
    return -0.5 * (logvar.sum() + constant)


def kl_divergence(mean: Tensor, logvar: Tensor, prior_var: float | Tensor) -> Tensor:
    r"""Returns :math:`D_{KL}(\mathcal{N}(\mu, \sigma^2) \| \mathcal{N}(0, \sigma_p^2))`, summed.

    .. math:: \frac{1}{2} \sum_i \left[ e^{a_i} - 1 - a_i + \frac{\mu_i^2}{\sigma_p^2} \right],
              \qquad a_i = \log \frac{\sigma_i^2}{\sigma_p^2}

    Every summand is a sum of non-negative terms, so that nothing cancels between elements and a
    posterior close to the prior keeps its small divergence. Half-precision inputs are summed in
    single precision.

    Arguments:
        mean: The means :math:`\mu`, of any shape.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
        prior_var: The variance :math:`\sigma_p^2 > 0` of the prior, a number or a tensor.

    Returns:
        A 0-dim tensor, in nats.

    Example:
        >>> kl_divergence(torch.zeros(3), torch.zeros(3), prior_var=1.0)
        tensor(0.)
        >>> kl_divergence(torch.ones(2), torch.zeros(2), prior_var=1.0)
        tensor(1.)
    """
    if mean.dtype.itemsize < 4:
        mean, logvar = mean.float(), logvar.float()
    a = logvar - (prior_var.log() if isinstance(prior_var, Tensor) else math.log(prior_var))
    return 0.5 * (torch.expm1(a) - a + mean.square() / prior_var).sum()
