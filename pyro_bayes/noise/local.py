"""Outputs of linear operators with local noise, each one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_bayes.noise.context import ContextNoise


class Gradients(Protocol):
    """The gradients of an operator that is linear in its input, and in its weight and bias.

    Arguments:
        grad: The gradient of its output.
        input: The input.
        weight: The weight.
        needed: Which gradients to return: those of input, weight and bias.

    Returns:
        The gradients, differentiable; `None` or anything else where none is needed.
    """

    def __call__(
        self, grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, bool, bool], /
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


class LinearOperator(NamedTuple):
    """An operator that is linear in its weight and its bias.

    Arguments:
        name: Its name.
        apply: The operator, a function of the inputs, the weight and the bias; the weight or the
            bias may be `None`.
        into: By dimension of the weight, the input and its dimension that it is contracted with.
        out: By dimension of the weight, the dimension of the output that it becomes.
        channel: The dimension of the output that the last dimension of the bias becomes, counted
            from the right.
        gradients: Its gradients in closed form, if it has one input.
    """

    name: str
    apply: Callable[..., Tensor]
    into: Mapping[int, tuple[int, int]]
    out: Mapping[int, int]
    channel: int = -1
    gradients: Gradients | None = None


class LocalNoise(torch.autograd.Function):
    r"""Returns :math:`f(x, \mu_w, \mu_b) + \sqrt{f(x^2, \sigma_w^2, \sigma_b^2)} \odot \epsilon`.

    Arguments:
        operator: The operator :math:`f`, whose gradients are known.
        noise: The noise of the context.
        source: What the noise :math:`\epsilon` belongs to.
        example: The dimension of the output that counts examples, if there is one.
        x: The input.
        weight: The mean of the weight.
        bias: The mean of the bias, or `None`.
        weight_variance: The variance of the weight.
        bias_variance: The variance of the bias, or `None`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: LinearOperator,
        noise: ContextNoise,
        source: tuple[str, ...],
        example: int | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_variance: Tensor,
        bias_variance: Tensor | None,
    ) -> Tensor:
        output = operator.apply(x, weight, bias)
        scale = operator.apply(x * x, weight_variance, bias_variance)
        # See `estimator._with_noise` about a variance of zero.
        scale.clamp_min_(torch.finfo(scale.dtype).tiny).sqrt_()
        epsilon = noise.normal(source, output, example)
        output.addcmul_(epsilon, scale)
        # The derivative with respect to the variance, in the scale's memory.
        of_variance = torch.div(epsilon, scale.add_(scale), out=scale)
        ctx.operator = operator
        ctx.save_for_backward(x, weight, weight_variance, bias_variance, of_variance)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        x, weight, weight_variance, bias_variance, of_variance = ctx.saved_tensors
        operator, square = ctx.operator, x * x
        if torch.is_grad_enabled():
            # Second derivatives go through the scale. Where it stands for none, they are none.
            tiny = torch.finfo(of_variance.dtype).tiny
            variance = operator.apply(square, weight_variance, bias_variance)
            scale = variance.clamp_min(tiny).sqrt()
            half_epsilon = (of_variance * scale).detach()
            of_variance = torch.where(scale > 2 * tiny**0.5, half_epsilon / scale, 0.0)
        of_x, *of_means = ctx.needs_input_grad[4:7]
        needed = (of_x, *ctx.needs_input_grad[7:])
        of_input, *means = operator.gradients(grad, x, weight, (of_x, *of_means))
        of_square, *variances = operator.gradients(
            grad * of_variance, square, weight_variance, needed
        )
        if of_x:
            of_input = of_input.addcmul_(of_square, x, value=2)
        return None, None, None, None, of_input, *means, *variances


class AddNoise(torch.autograd.Function):
    """The sum of a mean and noise of some variance, and the noise's deviation."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        scale = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt_()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, epsilon)
        return torch.addcmul(mean, scale, epsilon), scale

    @staticmethod
    def backward(ctx: Any, grad: Any, of_scale: Any) -> tuple[Tensor | None, ...]:
        scale, epsilon = ctx.saved_tensors
        if grad is not None and of_scale is None and not torch.is_grad_enabled():
            return grad, torch.mul(grad, epsilon).div_(scale).mul_(0.5), None
        # Second derivatives come back to the scale. Where it stands for none, they are none.
        terms = [grad * epsilon] if grad is not None else []
        terms += [of_scale] if of_scale is not None else []
        some = scale > 2 * torch.finfo(scale.dtype).tiny ** 0.5
        return grad, torch.where(some, sum(terms) / (2 * scale), 0.0) if terms else None, None
