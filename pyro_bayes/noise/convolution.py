"""Rules of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.noise.estimator import affine
from pyro_bayes.noise.gaussian_tensor import rule
from pyro_bayes.noise.local import Slopes

_OPTIONS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}


def _convolution(operator: Callable[..., Tensor], dims: int, transposed: bool) -> None:
    names = _TRANSPOSED_OPTIONS if transposed else _OPTIONS

    def convolution(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        channel = -dims - 1
        options = {**_DEFAULTS, **dict(zip(names, args, strict=False)), **kwargs}
        batched = input.dim() == dims + 2
        known = batched and not isinstance(options["padding"], str)
        return affine(
            operator.__name__,
            lambda x, w, b: operator(x, w, b, *args, **kwargs),
            (input,),
            weight,
            bias,
            example=0 if batched else None,
            into={int(not transposed): (0, channel)},
            out={int(transposed): channel},
            channel=channel,
            slopes=_slopes(options, dims, transposed) if known else None,
        )

    rule(operator)(convolution)


def _slopes(options: dict[str, Any], dims: int, transposed: bool) -> Slopes:
    def each(name: str) -> list[int]:
        value = options[name]
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        return values * (dims if len(values) == 1 else 1)

    def slopes(
        grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        found: Any = torch.ops.aten.convolution_backward(
            grad,
            input,
            weight,
            [grad.shape[1]],
            each("stride"),
            each("padding"),
            each("dilation"),
            transposed,
            each("output_padding"),
            options["groups"],
            needed,
        )
        return found  # type: ignore[no-any-return]

    return slopes


_FORWARD: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
for _dims in (1, 2, 3):
    _convolution(_FORWARD[_dims - 1], _dims, transposed=False)
    _convolution(_TRANSPOSED[_dims - 1], _dims, transposed=True)
