"""Rules of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.noise.estimator import draw_linear
from pyro_bayes.noise.gaussian_tensor import rule
from pyro_bayes.noise.local import Gradients, LinearOperator


def _forward(function: Callable[..., Tensor], dims: int) -> None:
    @rule(function)
    def convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return function(x, w, b, stride, padding, dilation, groups)

        batched = input.dim() == dims + 2
        gradients = None
        if batched and not isinstance(padding, str):
            gradients = _gradients(dims, stride, padding, dilation, False, 0, groups)
        channel = -dims - 1
        operator = LinearOperator(
            function.__name__, apply, {1: (0, channel)}, {0: channel}, channel, gradients
        )
        return draw_linear(operator, (input,), weight, bias, example=0 if batched else None)


def _transposed(function: Callable[..., Tensor], dims: int) -> None:
    @rule(function)
    def convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return function(x, w, b, stride, padding, output_padding, groups, dilation)

        batched = input.dim() == dims + 2
        gradients = None
        if batched:
            gradients = _gradients(dims, stride, padding, dilation, True, output_padding, groups)
        channel = -dims - 1
        operator = LinearOperator(
            function.__name__, apply, {0: (0, channel)}, {1: channel}, channel, gradients
        )
        return draw_linear(operator, (input,), weight, bias, example=0 if batched else None)


def _gradients(
    dims: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Gradients:
    def each(value: Any) -> Any:
        values = value if isinstance(value, (tuple, list)) else [value]
        return values if len(values) == dims else [*values] * dims

    def gradients(
        grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return torch.ops.aten.convolution_backward.default(  # type: ignore[no-any-return]
            grad,
            input,
            weight,
            [grad.shape[1]],
            each(stride),
            each(padding),
            each(dilation),
            transposed,
            each(output_padding),
            groups,
            needed,
        )

    return gradients


_forward(F.conv1d, 1)
_forward(F.conv2d, 2)
_forward(F.conv3d, 3)
_transposed(F.conv_transpose1d, 1)
_transposed(F.conv_transpose2d, 2)
_transposed(F.conv_transpose3d, 3)
