"""Rules of normalisations, which scale and shift elementwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.noise.estimator import aligned, draw_linear, example_dim, handed
from pyro_bayes.noise.gaussian_tensor import RULES, rule
from pyro_bayes.noise.local import LinearOperator


@rule(F.layer_norm)
def _layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    normed = F.layer_norm(handed("layer_norm", input), normalized_shape, None, None, eps)
    leading = input.dim() - len(normalized_shape)
    return _scaled("layer_norm", normed, weight, bias, leading=leading)


@rule(F.rms_norm)
def _rms_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    normed = F.rms_norm(handed("rms_norm", input), normalized_shape, None, eps)
    return _scaled("rms_norm", normed, weight, None, leading=input.dim() - len(normalized_shape))


@rule(F.group_norm)
def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    normed = F.group_norm(handed("group_norm", input), num_groups, None, None, eps)
    return _scaled("group_norm", normed, weight, bias, trailing=input.dim() - 2)


@rule(F.batch_norm, F.instance_norm)
def _batch_norm(
    operator: Callable[..., Tensor],
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    normed = operator(
        handed(operator.__name__, input), running_mean, running_var, None, None, *args, **kwargs
    )
    return _scaled(operator.__name__, normed, weight, bias, trailing=input.dim() - 2)


for _operator in (F.batch_norm, F.instance_norm):
    RULES[_operator] = partial(_batch_norm, _operator)


def _scaled(
    operator: str,
    normed: Tensor,
    weight: Any,
    bias: Any,
    *,
    leading: int = 1,
    trailing: int = 0,
) -> Any:
    """Scales and shifts what was normalised."""
    weight, bias = (v if v is None else v.view(*v.shape, *[1] * trailing) for v in (weight, bias))
    scaling = LinearOperator(operator, _multiply_add, {}, aligned(weight))
    example = example_dim((weight, bias), normed, leading)
    return draw_linear(scaling, (normed,), weight, bias, example=example)


def _multiply_add(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    product = x if weight is None else x * weight
    return product if bias is None else product + bias
