"""Affine maps with local noise, each one node of the autograd graph with closed-form gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Slopes(Protocol):
    """The gradients of a map that is linear in its input, and in its weight and bias.

    Arguments:
        grad: The gradient of its output.
        input: The input.
        weight: The weight.
        needed: Of which to return gradients: input, weight and bias.

    Returns:
        The gradients, differentiable; `None` or anything else where none is needed.
    """

    def __call__(
        self, grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, bool, bool], /
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


class Map(NamedTuple):
    """A map of an input, a weight and a bias or `None`, with its gradients."""

    apply: Callable[..., Tensor]
    slopes: Slopes


class LocalNoise(torch.autograd.Function):
    r"""Returns :math:`f(x, \mu_w, \mu_b) + \sqrt{f(x^2, \sigma_w^2, \sigma_b^2)} \odot \epsilon`.

    Arguments:
        map: The map :math:`f`.
        draw: Returns the noise :math:`\epsilon` for an output.
        x: The input.
        weight: The mean of the weight.
        bias: The mean of the bias, or `None`.
        weight_variance: The variance of the weight.
        bias_variance: The variance of the bias, or `None`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        map: Map,
        draw: Callable[[Tensor], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_variance: Tensor,
        bias_variance: Tensor | None,
    ) -> Tensor:
        output = map.apply(x, weight, bias)
        scale = map.apply(x * x, weight_variance, bias_variance)
        # See `estimator.noisy` about a variance of zero.
        scale.clamp_min_(torch.finfo(scale.dtype).tiny).sqrt_()
        epsilon = draw(output)
        output.addcmul_(epsilon, scale)
        ratio = torch.div(epsilon, scale, out=scale)
        ctx.map = map
        ctx.save_for_backward(x, weight, weight_variance, bias_variance, ratio)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        x, weight, weight_variance, bias_variance, ratio = ctx.saved_tensors
        square = x * x
        if torch.is_grad_enabled():
            # Second derivatives go through the scale. Where it stands for none, they are none.
            tiny = torch.finfo(ratio.dtype).tiny
            variance = ctx.map.apply(square, weight_variance, bias_variance)
            scale = variance.clamp_min(tiny).sqrt()
            epsilon = (ratio * scale).detach()
            ratio = torch.where(scale > 2 * tiny**0.5, epsilon / scale, 0.0)
        _, _, of_x, *of_means = ctx.needs_input_grad[:5]
        of_variances = ctx.needs_input_grad[5:]
        slopes = ctx.map.slopes
        first, *means = slopes(grad, x, weight, (of_x, *of_means))
        second, *variances = slopes(grad * ratio, square, weight_variance, (of_x, *of_variances))
        if of_x:  # the square root halves what the square doubles
            first = first.addcmul_(second, x)
        halves = (
            v.mul_(0.5) if v is not None and of else None
            for v, of in zip(variances, of_variances, strict=True)
        )
        return None, None, first, *means, *halves
