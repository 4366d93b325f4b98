"""Rules of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.estimator import affine
from pyro_bayes.gaussian_tensor import rule


def _convolution(operator: Callable[..., Tensor], dims: int, transposed: bool) -> None:
    def convolution(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        channel = -dims - 1
        return affine(
            operator.__name__,
            lambda x, w, b: operator(x, w, b, *args, **kwargs),
            (input,),
            weight,
            bias,
            example=0 if input.dim() == dims + 2 else None,
            into={int(not transposed): (0, channel)},
            out={int(transposed): channel},
            channel=channel,
        )

    rule(operator)(convolution)


_FORWARD: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
for _dims in (1, 2, 3):
    _convolution(_FORWARD[_dims - 1], _dims, transposed=False)
    _convolution(_TRANSPOSED[_dims - 1], _dims, transposed=True)
