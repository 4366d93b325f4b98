"""Outputs under flipout: each example has its own signs of one perturbation of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of, perturbation_of
from pyro_bayes.noise.local import LinearOperator


def perturbed(
    operator: LinearOperator,
    inputs: Sequence[Tensor],
    weight: Any,
    bias: Any,
    mean: Tensor,
    example: int | None,
    count: int,
) -> Tensor:
    """Returns the output of a linear operator, see :func:`pyro_bayes.noise.estimator.draw_linear`.

    Arguments:
        operator: The operator.
        inputs: What the weight is multiplied by.
        weight: The weight; it or the bias is a Gaussian tensor.
        bias: The bias, or `None`.
        mean: The output's mean.
        example: The dimension of inputs and output that counts examples, if there is one.
        count: Its size, 1 if there is none.
    """
    output, shares = mean, False
    if isinstance(weight, GaussianTensor):
        signed = list(inputs)
        for dim, (which, target) in operator.into.items():
            signed[which] = _flipped(signed[which], weight.signs(dim, count), example, target)
        shares = _shares_signs(bias, weight, operator.out)
        bias_perturbation = perturbation_of(bias) if shares else None
        product = operator.apply(*signed, perturbation_of(weight), bias_perturbation)
        for dim, target in operator.out.items():
            product = _flipped(product, weight.signs(dim, count), example, target)
        output = mean + product
    if isinstance(bias, GaussianTensor) and not shares:
        trailing = -operator.channel - 1
        output = output + elementwise_perturbation(bias, mean, example, count, trailing)
    return output


def elementwise_perturbation(
    value: GaussianTensor,
    like: Tensor,
    example: int | None,
    count: int | None,
    trailing: int = 0,
) -> Tensor:
    """Returns the deviation from the mean under the examples' signs, to be broadcast to an output.

    Arguments:
        value: The Gaussian tensor.
        like: The output.
        example: The dimension of the output that counts examples, if there is one. If the tensor
            has that dimension, its size must be 1.
        count: Its size, 1 if there is none, or `None` to go without signs.
        trailing: The number of dimensions of the output on the right that the tensor lacks.
    """
    product = with_trailing(perturbation_of(value), trailing)
    product = product.view((1,) * (like.dim() - product.dim()) + product.shape)
    if count is None:
        return product
    if example is not None and count > 1:
        product = product.expand([count if d == example else -1 for d in range(like.dim())])
    dims = mean_of(value).dim()
    for dim in range(dims):
        product = _flipped(product, value.signs(dim, count), example, dim - dims - trailing)
    return product


def with_trailing(value: Tensor, count: int) -> Tensor:
    """Returns a view with dimensions of size 1 on the right."""
    return value.view(*value.shape, *[1] * count) if count else value


def _shares_signs(bias: Any, weight: GaussianTensor, out: Mapping[int, int]) -> bool:
    """Lets a bias have the weight's signs along the output, and tells whether it has them.

    The perturbations are independent, so that an example's are jointly what they are with signs of
    their own.
    """
    if not isinstance(bias, GaussianTensor) or len(out) != 1 or not (weight.axes and bias.axes):
        return False
    (dim,) = out
    own, other = bias.axes[0], weight.axes[dim]
    if own is None or other is None or own.size != other.size:
        return False
    if own.lines != (None,) or other.lines != (None,):
        return False
    return bias.noise.share(own.source[0], other.source[0])


def _flipped(value: Tensor, signs: Tensor | None, example: int | None, dim: int) -> Tensor:
    """Multiplies a tensor by each example's signs along one of its dimensions."""
    if signs is None:
        return value
    dims = value.dim()
    dim = dim % dims
    if dim == example:  # the tensor has one value for all examples
        return value * signs.view([-1 if d == example else 1 for d in range(dims)])
    count, size = signs.shape
    if size != value.shape[dim]:  # the groups of a convolution share a weight's dimension
        signs = signs.repeat(1, value.shape[dim] // size)
    if dims == 2 and example == 0:
        return value * signs
    shape = [1] * dims
    shape[dim] = value.shape[dim]
    if example is not None:
        shape[example] = count
    return value * (signs if example is None or example < dim else signs.T).reshape(shape)
