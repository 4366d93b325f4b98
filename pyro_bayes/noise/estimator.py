"""How an operator's output is drawn: with local noise, or by flipout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import is_transformed as transformed
from pyro_bayes.noise.gaussian_tensor import (
    GaussianTensor,
    change_of,
    drawn,
    gaussians_in,
    mean_of,
    variance_of,
)
from pyro_bayes.noise.local import LocalNoise, Map, Slopes

_WHOLE = (None, None)


def affine(
    operator: str,
    apply: Callable[..., Tensor],
    inputs: Sequence[Any],
    weight: Any,
    bias: Any = None,
    *,
    example: int | None,
    into: Mapping[int, tuple[int, int]],
    out: Mapping[int, int],
    channel: int = -1,
    slopes: Slopes | None = None,
) -> Any:
    r"""Draws the output of an operator that is linear in its weight and its bias.

    With local noise, its elements are Gaussian with

    .. math:: m = f(x, \mu_w, \mu_b), \qquad v = f(x^2, \sigma_w^2, \sigma_b^2).

    With flipout, example :math:`n` has the weight :math:`\mu + \Delta \odot s_n^{out} s_n^{in}`,
    where :math:`\Delta = \sigma \epsilon` is the same for all examples, and hence the output

    .. math:: f(x_n, \mu_w, \mu_b) + s_n^{out} \odot f(s_n^{in} \odot x_n, \Delta_w, \Delta_b).

    A bias that has signs of its own already, or whose elements are no dimension of the weight,
    has :math:`s_n^b \odot \Delta_b` instead.

    Arguments:
        operator: The name of the operator.
        apply: The operator :math:`f`, a function of the inputs, the weight and the bias, of which
            the latter may be `None`.
        inputs: What the weight is multiplied by.
        weight: The weight, a Gaussian tensor or not.
        bias: The bias, likewise, or `None`.
        example: The dimension of inputs and output that counts examples, if there is one.
        into: By dimension of the weight, the input and its dimension that it is contracted with.
        out: By dimension of the weight, the dimension of the output that it becomes.
        channel: The dimension of the output that the last dimension of the bias becomes, counted
            from the right.
        slopes: The operator's gradients in closed form, if it has one input.

    Returns:
        The output.

    References:
        | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)
        | https://arxiv.org/abs/1506.02557

        | Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches
          (Wen et al., 2018)
        | https://arxiv.org/abs/1803.04386
    """
    inputs = [drawn(x) for x in inputs]
    if any([x.layout is not torch.strided for x in inputs]):
        return NotImplemented
    weight, bias = as_usable(operator, weight), as_usable(operator, bias)
    if slopes is not None and isinstance(weight, GaussianTensor):
        node = _one_node(operator, Map(apply, slopes), inputs[0], weight, bias, example)
        if node is not None:
            return node
    mean = apply(*inputs, mean_of(weight), mean_of(bias))
    gaussians = gaussians_in((weight, bias))
    if not gaussians:
        return mean
    trailing = -channel - 1

    def variance() -> Tensor:
        bias_variance = variance_of(bias) if isinstance(bias, GaussianTensor) else None
        if not isinstance(weight, GaussianTensor):
            return _trail(variance_of(bias), trailing).expand_as(mean)
        with wide(mean) as convert:
            squares = [convert(x).square() for x in inputs]
            return apply(*squares, convert(variance_of(weight)), convert(bias_variance))

    def change() -> Tensor:
        count = 1 if example is None else mean.shape[example]
        total, joins = mean.new_zeros(()), False
        if isinstance(weight, GaussianTensor):
            signed = list(inputs)
            for dim, (which, target) in into.items():
                signed[which] = _flip(signed[which], weight.signs(dim, count), example, target)
            joins = _shares_signs(bias, weight, out)
            total = apply(*signed, change_of(weight), change_of(bias) if joins else None)
            for dim, target in out.items():
                total = _flip(total, weight.signs(dim, count), example, target)
        if isinstance(bias, GaussianTensor) and not joins:
            total = total + elementwise_change(bias, mean, example, trailing)
        return total

    return noisy(operator, mean, gaussians, variance=variance, change=change, example=example)


def _shares_signs(bias: Any, weight: GaussianTensor, out: Mapping[int, int]) -> bool:
    """Lets a bias have the weight's signs along the output, and tells whether it has them.

    The perturbations are independent, so that an example's are jointly what they are with signs of
    their own.
    """
    if not isinstance(bias, GaussianTensor) or len(out) != 1 or not (weight.axes and bias.axes):
        return False
    own, other = bias.axes[0], weight.axes[next(iter(out))]
    if own is None or other is None or own.size != other.size or own.lines + other.lines != _WHOLE:
        return False
    return bias.noise.share(own.source[0], other.source[0])


def _one_node(
    operator: str, map: Map, x: Tensor, weight: GaussianTensor, bias: Any, example: int | None
) -> Tensor | None:
    """What :func:`affine` returns with local noise, in closed form, or `None` if it cannot."""
    mean, noise = mean_of(weight), weight.noise
    plain = x.dtype == mean.dtype and x.dtype.itemsize >= 4 and noise.estimator == "local"
    if not plain or transformed() or torch.is_autocast_enabled(x.device.type):
        return None
    sources = gaussians_in((weight, bias))
    _note(sources)
    source = (operator, *[s.key for s in sources])
    spreads = [variance_of(s) for s in sources]
    given: Any = (x, mean, mean_of(bias), *spreads, *[None] * (2 - len(spreads)))
    return LocalNoise.apply(map, lambda like: noise.normal(source, like, example), *given)  # type: ignore[no-any-return]


def noisy(
    operator: str,
    mean: Tensor,
    sources: Sequence[GaussianTensor],
    *,
    variance: Callable[[], Tensor],
    change: Callable[[], Tensor],
    example: int | None,
) -> Tensor:
    r"""Draws an operator's output as the context's estimator has it.

    That is :math:`m + \sqrt{v} \epsilon` with local noise, and :math:`m + \Delta` with flipout.

    Arguments:
        operator: The name of the operator.
        mean: The mean :math:`m` of the output.
        sources: The Gaussian tensors that the output depends on.
        variance: Returns the variance :math:`v` of the output, of the same shape.
        change: Returns each example's deviation :math:`\Delta` from the mean under its signs.
        example: The dimension of the output that counts examples, if there is one.
    """
    noise = sources[0].noise
    _note(sources)
    if noise.estimator == "flipout":
        return mean + change().to(mean.dtype)
    spread = variance()
    epsilon = noise.normal((operator, *(s.key for s in sources)), mean, example)
    if transformed() or spread.dtype != mean.dtype:
        # The gradient of a square root is infinite at zero, where the variance's own is zero: the
        # smallest normal number makes their product zero instead of NaN.
        scale = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt().to(mean.dtype)
        return torch.addcmul(mean, scale, epsilon)
    return _Noisy.apply(mean, spread, epsilon)[0]  # type: ignore[no-any-return]


def _note(sources: Sequence[GaussianTensor]) -> None:
    for source in sources:
        source.noise.note(source.parameter, source.noise.estimator)


class _Noisy(torch.autograd.Function):
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


def as_usable(operator: str, value: Any) -> Any:
    """Returns a tensor that the estimator can use: its one draw if flipout lost its signs."""
    if not isinstance(value, GaussianTensor):
        return value
    if value.noise.estimator == "flipout" and value.axes is None:
        value.noise.note(value.parameter, f"one draw ({operator})")
        return drawn(value)
    return value


def spread(operator: str, value: Any, term: Tensor, example: int | None) -> Tensor:
    """Draws the sum of a tensor of the output's shape and one that is broadcast to it.

    Arguments:
        operator: The name of the operator.
        value: What is broadcast, a Gaussian tensor or not.
        term: The tensor of the output's shape.
        example: The dimension of the output that counts examples, if there is one.
    """
    value = as_usable(operator, value)
    mean: Tensor = term + mean_of(value)
    if not isinstance(value, GaussianTensor):
        return mean
    return noisy(
        operator,
        mean,
        [value],
        variance=lambda: variance_of(value).expand_as(mean),
        change=lambda: elementwise_change(value, mean, example),
        example=example,
    )


def elementwise_change(
    value: GaussianTensor, like: Tensor, example: int | None, trailing: int = 0
) -> Tensor:
    """Returns the deviation from the mean under the examples' signs, to be broadcast to an output.

    Arguments:
        value: The Gaussian tensor.
        like: The output.
        example: The dimension of the output that counts examples, if there is one. If the tensor
            has that dimension, its size must be 1.
        trailing: The number of dimensions of the output on the right that the tensor lacks.
    """
    count = 1 if example is None else like.shape[example]
    change = _trail(change_of(value), trailing)
    change = change.view((1,) * (like.dim() - change.dim()) + change.shape)
    if example is not None and count > 1:
        change = change.expand(*(count if d == example else -1 for d in range(like.dim())))
    dims = mean_of(value).dim()
    for dim in range(dims):
        target = dim - dims - trailing
        change = _flip(change, value.signs(dim, count), example, target)
    return change


def example_dim(sources: Sequence[Any], leading: int) -> int | None:
    """Returns which of a tensor's leading dimensions counts examples, if it has any.

    Arguments:
        sources: The operator's arguments that may be Gaussian tensors.
        leading: The number of dimensions to the left of the features.
    """
    gaussians = gaussians_in(sources)
    if leading < 1 or not gaussians:
        return None
    return min(gaussians[0].noise.batch_dim, leading - 1)


def aligned(value: Any) -> dict[int, int]:
    """Returns each dimension of an elementwise weight, with the one of the output that it is."""
    dims = 0 if value is None else mean_of(value).dim()
    return {d: d - dims for d in range(dims)}


def _flip(value: Tensor, signs: Tensor | None, example: int | None, dim: int) -> Tensor:
    """Multiplies a tensor by each example's signs along one of its dimensions."""
    if signs is None:
        return value
    dim = dim % value.dim()
    if dim == example:  # the tensor has one value for all examples
        return value * signs.view([-1 if d == example else 1 for d in range(value.dim())])
    # The groups of a convolution share a weight's dimension.
    size = value.shape[dim]
    signs = signs if size == signs.shape[1] else signs.repeat(1, size // signs.shape[1])
    shape = [1] * value.dim()
    shape[dim] = size
    if example is None:
        return value * signs.view(shape)
    shape[example] = len(signs)
    turned = signs if example < dim else signs.T
    return value * (turned if value.dim() == 2 else turned.reshape(shape))


def _trail(value: Tensor, count: int) -> Tensor:
    return value.view(*value.shape, *[1] * count) if count else value


@contextmanager
def wide(output: Tensor) -> Iterator[Callable[[Any], Any]]:
    """Yields a conversion to the precision of variances: single, where half would overflow."""
    if output.dtype != torch.float16:
        yield lambda value: value
    else:
        with torch.autocast(output.device.type, enabled=False):
            yield lambda value: None if value is None else value.float()
