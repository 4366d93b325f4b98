"""Rules of linear and bilinear maps and of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.noise.estimator import draw_linear, example_dim
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of, rule
from pyro_bayes.noise.local import LinearOperator


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    flat_grad = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
    flat_input = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    return (
        grad.matmul(weight) if needed[0] else None,
        flat_grad.t().mm(flat_input) if needed[1] else None,
        flat_grad.sum(0) if needed[2] else None,
    )


_LINEAR = LinearOperator("linear", F.linear, {1: (0, -1)}, {0: -1}, gradients=_gradients)


@rule(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return linear(input, weight, bias, example_dim((weight, bias), input, input.dim() - 1))


def linear(input: Any, weight: Any, bias: Any, example: int | None) -> Any:
    """A linear layer whose input has one dimension that counts examples, or none."""
    if mean_of(weight).dim() < 2:
        return NotImplemented
    return draw_linear(_LINEAR, (input,), weight, bias, example=example)


_BILINEAR = LinearOperator("bilinear", F.bilinear, {1: (0, -1), 2: (1, -1)}, {0: -1})


@rule(F.bilinear)
def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    example = example_dim((weight, bias), input1, input1.dim() - 1)
    return draw_linear(_BILINEAR, (input1, input2), weight, bias, example=example)


@rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm)
def _matmul(input: Any, other: Any = None, *, mat2: Any = None, out: Any = None) -> Any:
    other = mat2 if other is None else other
    if out is not None:
        return NotImplemented
    if isinstance(input, GaussianTensor) and isinstance(other, GaussianTensor):
        return NotImplemented
    if isinstance(other, GaussianTensor):
        return _times_matrix("matmul", lambda x, w, _: torch.matmul(x, w), input, other)
    out = {d: d - input.dim() for d in range(input.dim() - 1)}
    if other.dim() == 1:
        example, into, out = None, -1, {d: v + 1 for d, v in out.items()}
    else:
        example = example_dim((input,), other, other.dim() - max(input.dim(), 2))
        into = -2
    product = LinearOperator(
        "matmul", lambda x, w, _: torch.matmul(w, x), {input.dim() - 1: (0, into)}, out
    )
    return draw_linear(product, (other,), input, example=example)


@rule(Tensor.__rmatmul__)
def _rmatmul(input: Any, other: Any) -> Any:
    return _matmul(other, input)


@rule(torch.addmm, Tensor.addmm)
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(input, GaussianTensor) and (input.dim() != 1 or isinstance(beta, Tensor)):
        return NotImplemented
    return _plus_product("addmm", torch.addmm, (input, mat1, mat2), beta, alpha)


@rule(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    add = _plus_matmul  # which broadcasts
    return _plus_product("baddbmm", add, (input, batch1, batch2), beta, alpha)


def _plus_product(
    operator: str,
    apply: Callable[..., Tensor],
    args: tuple[Any, Any, Any],
    beta: float,
    alpha: float,
) -> Any:
    """A product with a matrix, or a stack of them, on the right, and what is added to it."""
    bias, left, right = args
    if isinstance(left, GaussianTensor):
        return NotImplemented
    bias, weight = bias * beta, _matrix(right) * alpha

    def apply_or_multiply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.matmul(x, w) if b is None else apply(b, x, w)

    return _times_matrix(operator, apply_or_multiply, left, weight, bias)


def _times_matrix(
    operator: str, apply: Callable[..., Tensor], input: Any, weight: Any, bias: Any = None
) -> Any:
    """A product with a matrix, or a stack of them, on the right."""
    weight = _matrix(weight)
    last = weight.dim() - 1
    leading = input.dim() - (weight.dim() if weight.dim() > 2 else 1)
    contracted = max(last - 1, 0)
    out = {d: d - weight.dim() + (last == 0) for d in range(last + 1) if d != contracted}
    product = LinearOperator(operator, apply, {contracted: (0, -1)}, out)
    example = example_dim((weight, bias), input, leading)
    return draw_linear(product, (input,), weight, bias, example=example)


def _plus_matmul(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left, right) + bias


def _matrix(weight: Any) -> Any:
    """Returns the one matrix that was expanded to a stack, and anything else as it is."""
    original = weight.original if isinstance(weight, GaussianTensor) else None
    if original is None or original.shape[:-2].numel() != 1:
        return weight
    return original.view(original.shape[-2:])
