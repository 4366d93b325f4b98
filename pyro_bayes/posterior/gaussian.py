"""The formulas of Gaussian elements: a draw, its log-density and a divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.kept import Kept
from pyro_bayes.base.torch_private import is_transformed


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


def spread(logvar: Tensor, values: Tensor, weight: float) -> Tensor:
    r"""Makes values proportional to :math:`(\sigma^2)^w` a function of :math:`\log \sigma^2`.

    Unlike operators, it allows for as many backward passes as there are.

    Arguments:
        logvar: The log-variances :math:`\log \sigma^2`, of any shape.
        values: The values at these log-variances, of the same shape, without a gradient.
        weight: The exponent :math:`w`, 0.5 for deviations and 1 for variances.

    Returns:
        The values, of the same shape, differentiable by the log-variances.

    Example:
        >>> spread(torch.zeros(2), torch.tensor([1.0, -1.0]), 0.5)
        tensor([ 1., -1.])
    """
    if is_transformed():
        return values * (weight * (logvar - logvar.detach()).nan_to_num(0.0)).exp()
    return _Spread.apply(logvar, values, weight)  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logvar: Tensor, values: Tensor, weight: float) -> Tensor:
        ctx.kept, ctx.values, ctx.weight = Kept(logvar), values, weight
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        (logvar,), values, weight = ctx.kept.tensors, ctx.values, ctx.weight
        if torch.is_grad_enabled():
            values = values * (weight * (logvar - logvar.detach()).nan_to_num(0.0)).exp()
        return weight * grad * values, None, None


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


def divergence_terms(
    mean: Tensor, logvar: Tensor, precision: float | Tensor, prior_mean: Tensor | None = None
) -> Tensor:
    r"""Returns :math:`D_{KL}(\mathcal{N}(\mu, \sigma^2) \| \mathcal{N}(\mu_p, \sigma_p^2))`.

    .. math:: \frac{1}{2} \left[ e^a - 1 - a + \frac{(\mu - \mu_p)^2}{\sigma_p^2} \right],
              \qquad a = \log \frac{\sigma^2}{\sigma_p^2}

    Each is a sum of non-negative terms, so that a posterior close to the prior keeps its small
    divergence. A precision of 0 stands for no prior at all, :math:`\log p = 0`: the term is the
    negative entropy :math:`-\frac{1}{2} \log 2 \pi e \sigma^2`.

    Arguments:
        mean: The means :math:`\mu`, of any shape.
        logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
        precision: The precision :math:`1 / \sigma_p^2 \ge 0` of the prior, a number or a tensor.
        prior_mean: The mean :math:`\mu_p` of the prior, of the same shape; 0 by default.

    Returns:
        The divergences in nats, of the same shape.

    Example:
        >>> divergence_terms(torch.ones(2), torch.zeros(2), 1.0)
        tensor([0.5000, 0.5000])
    """
    deviation = mean if prior_mean is None else mean - prior_mean
    a = logvar + log_precision(precision)
    excess = torch.expm1(logvar + _log(precision))
    terms: Tensor = 0.5 * (excess - a + deviation.square() * precision)
    return terms


def log_precision(precision: float | Tensor) -> Any:
    r"""Returns :math:`\log (1 / \sigma_p^2)`, and :math:`\log 2 \pi` where there is no prior.

    Arguments:
        precision: The precision, a number or a tensor; 0 where there is no prior.
    """
    if isinstance(precision, Tensor):
        return torch.where(precision > 0, precision, 2 * math.pi).log()
    return math.log(precision or 2 * math.pi)


def _log(precision: float | Tensor) -> Any:
    if isinstance(precision, Tensor):
        return precision.log()
    return math.log(precision) if precision else -math.inf
