"""Rules of sums and products with deterministic tensors, and of what is set beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_bayes.noise.estimator import aligned, draw_linear, handed, spread
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of, rule
from pyro_bayes.noise.local import LinearOperator


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply)
def _mul(input: Any, other: Any) -> Any:
    gaussian, factor = (input, other) if isinstance(input, GaussianTensor) else (other, input)
    gaussian = _unexpanded(gaussian, factor)
    if gaussian is None or not _is_constant(factor):
        return NotImplemented
    if _keeps_shape(gaussian, factor):
        return NotImplemented if _may_depend(factor, gaussian) else gaussian.times(factor)
    example = _outer_example(gaussian, factor)
    if example is NotImplemented:
        return NotImplemented
    product = LinearOperator("mul", lambda x, w, _: x * w, {}, aligned(gaussian))
    return draw_linear(product, (factor,), gaussian, example=example)


@rule(torch.add, Tensor.add)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    other = other if alpha == 1 else other * alpha
    gaussian, term = (input, other) if isinstance(input, GaussianTensor) else (other, input)
    gaussian = _unexpanded(gaussian, term)
    if gaussian is None or not _is_constant(term):
        return NotImplemented
    if _keeps_shape(gaussian, term):
        return NotImplemented if _may_depend(term, gaussian) else gaussian.plus(term)
    example = _outer_example(gaussian, term)
    if example is NotImplemented:
        return NotImplemented
    return spread("add", gaussian, term, example)


@rule(Tensor.add_)
def _add_in_place(input: Any, other: Any, *, alpha: float = 1) -> Any:
    gaussian = (
        other if isinstance(input, Tensor) and not isinstance(input, GaussianTensor) else None
    )
    gaussian = None if gaussian is None else _unexpanded(gaussian, input)
    if gaussian is None or _keeps_shape(gaussian, input):
        return NotImplemented
    example = _outer_example(gaussian, input)
    if example is NotImplemented:
        return NotImplemented
    return input.add_(
        spread("add", gaussian, torch.zeros_like(input), example, [input]), alpha=alpha
    )


@rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Any, dim: int = 0, *, out: Any = None) -> Any:
    """Class tokens and the like, which are expanded to examples, are drawn for each of them."""
    others = [t for t in tensors if not isinstance(t, GaussianTensor)]
    if not others or out is not None:
        return NotImplemented

    def piece(value: Any) -> Any:
        original = value.original if isinstance(value, GaussianTensor) else None
        example = 0 if original is None else original.noise.batch_dim
        if original is None or example >= value.dim() or dim % value.dim() == example:
            return handed("cat", value)
        own = mean_of(original).shape
        if own[example] != 1 or own[:example] + own[example + 1 :] != _without(value, example):
            return handed("cat", value)
        zeros = torch.zeros_like(mean_of(value))
        return spread("cat", original, zeros, example, others)

    return torch.cat([piece(value) for value in tensors], dim)


def _without(value: Tensor, dim: int) -> torch.Size:
    return value.shape[:dim] + value.shape[dim + 1 :]


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _add(input, -other, alpha=alpha)


@rule(Tensor.__rsub__)
def _rsub(input: Any, other: Any) -> Any:
    return _add(-input, other)


@rule(torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__)
def _neg(input: Any) -> Any:
    return _mul(input, -1)


@rule(torch.div, torch.divide, Tensor.div, Tensor.divide)
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None or isinstance(other, GaussianTensor):
        return NotImplemented
    return _mul(input, 1 / other)


def _unexpanded(gaussian: GaussianTensor, other: Any) -> GaussianTensor | None:
    """Returns what was expanded, if the other operand expands it likewise."""
    if gaussian.original is None:
        return gaussian
    if not isinstance(other, Tensor) or isinstance(other, GaussianTensor):
        return None
    shape = torch.broadcast_shapes(other.shape, mean_of(gaussian).shape)
    same = torch.broadcast_shapes(other.shape, mean_of(gaussian.original).shape) == shape
    return gaussian.original if same else None


def _is_constant(value: Any) -> bool:
    deterministic = isinstance(value, (Tensor, int, float))
    return deterministic and not isinstance(value, GaussianTensor)


def _may_depend(value: Tensor | float, gaussian: GaussianTensor) -> bool:
    """Whether a tensor may have been made of the parameter's draw, as a norm of its weights is.

    What the parameter met before any operator had its draw is a constant, such as a mask.
    """
    noise = gaussian.noise
    if not isinstance(value, Tensor) or gaussian.parameter not in noise.handed:
        return False
    return not noise.has_met(gaussian.key, value)


def _keeps_shape(gaussian: GaussianTensor, other: Tensor | float) -> bool:
    """Whether arithmetic with a constant leaves a parameter a parameter."""
    if not isinstance(other, Tensor):
        return True
    shape = mean_of(gaussian).shape
    return bool(torch.broadcast_shapes(other.shape, shape) == shape)


def _outer_example(gaussian: GaussianTensor, other: Tensor) -> Any:
    """The dimension that counts examples when a parameter is broadcast over an activation."""
    own = mean_of(gaussian).shape
    shape = torch.broadcast_shapes(other.shape, own)
    if other.shape != shape:
        return NotImplemented
    aligned = (1,) * (len(shape) - len(own)) + tuple(own)
    example = gaussian.noise.batch_dim
    return example if example < len(shape) and aligned[example] == 1 else None
