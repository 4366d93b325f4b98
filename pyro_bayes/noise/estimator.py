"""How an operator's output is drawn: with local noise, or by flipout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.noise.gaussian_tensor import (
    GaussianTensor,
    drawn,
    gaussians_in,
    mean_of,
    perturbation_of,
    variance_of,
)
from pyro_bayes.noise.local import AddNoise, LinearOperator, LocalNoise
from pyro_bayes.posterior.flat import transformed

_PRECISE = (torch.float32, torch.float64)
_WHOLE = (None, None)


def draw_linear(
    operator: LinearOperator,
    inputs: Sequence[Any],
    weight: Any,
    bias: Any = None,
    *,
    example: int | None,
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
        operator: The operator :math:`f`.
        inputs: What the weight is multiplied by.
        weight: The weight, a Gaussian tensor or not.
        bias: The bias, likewise, or `None`.
        example: The dimension of inputs and output that counts examples, if there is one.

    Returns:
        The output, or `NotImplemented` if an input is sparse.

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
    weight, bias = as_usable(operator.name, weight), as_usable(operator.name, bias)
    sources = gaussians_in((weight, bias))
    if not sources:
        return operator.apply(*inputs, weight, bias)
    if sources[0] is weight and _has_closed_form(operator, inputs[0], weight):
        return _closed_form(operator, inputs[0], sources, bias, example)
    mean = operator.apply(*inputs, mean_of(weight), mean_of(bias))
    return noisy(
        operator.name,
        mean,
        sources,
        variance=lambda: _variance(operator, inputs, weight, bias, mean),
        perturbation=lambda: _perturbation(operator, inputs, weight, bias, mean, example),
        example=example,
    )


def _has_closed_form(operator: LinearOperator, x: Tensor, weight: GaussianTensor) -> bool:
    """Whether local noise can be one node of the autograd graph."""
    if operator.gradients is None or weight.noise.estimator != "local":
        return False
    if x.dtype != mean_of(weight).dtype or x.dtype not in _PRECISE:
        return False
    return not (torch.is_autocast_enabled(x.device.type) or transformed())


def _closed_form(
    operator: LinearOperator,
    x: Tensor,
    sources: Sequence[GaussianTensor],
    bias: Any,
    example: int | None,
) -> Tensor:
    """Draws the output with local noise as one node of the autograd graph."""
    weight, noise = sources[0], sources[0].noise
    _note(sources)
    if sources[-1] is weight:  # the bias is no Gaussian tensor
        source, bias_mean, bias_variance = (operator.name, weight.key), bias, None
    else:
        source = (operator.name, weight.key, bias.key)
        bias_mean, bias_variance = mean_of(bias), variance_of(bias)
    moments = (mean_of(weight), bias_mean, variance_of(weight), bias_variance)
    return LocalNoise.apply(operator, noise, source, example, x, *moments)  # type: ignore[no-any-return]


def _variance(
    operator: LinearOperator, inputs: Sequence[Tensor], weight: Any, bias: Any, mean: Tensor
) -> Tensor:
    """Returns the variance of an output with local noise."""
    bias_variance = variance_of(bias) if isinstance(bias, GaussianTensor) else None
    if not isinstance(weight, GaussianTensor):
        return _trail(variance_of(bias), -operator.channel - 1).expand_as(mean)
    with wide(mean) as convert:
        squares = [convert(x).square() for x in inputs]
        return operator.apply(*squares, convert(variance_of(weight)), convert(bias_variance))


def _perturbation(
    operator: LinearOperator,
    inputs: Sequence[Tensor],
    weight: Any,
    bias: Any,
    mean: Tensor,
    example: int | None,
) -> Tensor:
    """Returns the deviation of each example's output from the mean with flipout."""
    count = 1 if example is None else mean.shape[example]
    total: Any = 0
    shared = False
    if isinstance(weight, GaussianTensor):
        signed = list(inputs)
        for dim, (which, target) in operator.into.items():
            signed[which] = _flip(signed[which], weight.signs(dim, count), example, target)
        shared = _shares_signs(bias, weight, operator.out)
        total = operator.apply(
            *signed, perturbation_of(weight), perturbation_of(bias) if shared else None
        )
        for dim, target in operator.out.items():
            total = _flip(total, weight.signs(dim, count), example, target)
    if isinstance(bias, GaussianTensor) and not shared:
        trailing = -operator.channel - 1
        total = total + elementwise_perturbation(bias, mean, example, trailing)
    return total  # type: ignore[no-any-return]


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


def noisy(
    operator: str,
    mean: Tensor,
    sources: Sequence[GaussianTensor],
    *,
    variance: Callable[[], Tensor],
    perturbation: Callable[[], Tensor],
    example: int | None,
) -> Tensor:
    r"""Draws an operator's output as the context's estimator has it.

    That is :math:`m + \sqrt{v} \epsilon` with local noise, and :math:`m + \Delta` with flipout.

    Arguments:
        operator: The name of the operator.
        mean: The mean :math:`m` of the output.
        sources: The Gaussian tensors that the output depends on.
        variance: Returns the variance :math:`v` of the output, of the same shape.
        perturbation: Returns each example's deviation :math:`\Delta` from the mean under its signs.
        example: The dimension of the output that counts examples, if there is one.
    """
    noise = sources[0].noise
    _note(sources)
    if noise.estimator == "flipout":
        return mean + perturbation().to(mean.dtype)
    spread = variance()
    epsilon = noise.normal((operator, *(s.key for s in sources)), mean, example)
    if transformed() or spread.dtype != mean.dtype:
        # The gradient of a square root is infinite at zero, where the variance's own is zero: the
        # smallest normal number makes their product zero instead of NaN.
        scale = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt().to(mean.dtype)
        return torch.addcmul(mean, scale, epsilon)
    return AddNoise.apply(mean, spread, epsilon)[0]  # type: ignore[no-any-return]


def _note(sources: Sequence[GaussianTensor]) -> None:
    noise = sources[0].noise
    if noise.uses is not None:
        for source in sources:
            noise.note(source.parameter, noise.estimator)


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
        perturbation=lambda: elementwise_perturbation(value, mean, example),
        example=example,
    )


def elementwise_perturbation(
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
    perturbation = _trail(perturbation_of(value), trailing)
    perturbation = perturbation.view((1,) * (like.dim() - perturbation.dim()) + perturbation.shape)
    if example is not None and count > 1:
        perturbation = perturbation.expand(
            *(count if d == example else -1 for d in range(like.dim()))
        )
    dims = mean_of(value).dim()
    for dim in range(dims):
        target = dim - dims - trailing
        perturbation = _flip(perturbation, value.signs(dim, count), example, target)
    return perturbation


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
