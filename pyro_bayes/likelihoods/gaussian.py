"""Gaussian noise."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bayes.likelihoods.likelihood import Likelihood


class Gaussian(Likelihood):
    r"""Gaussian noise of one scale, fixed or learned.

    Arguments:
        scale: The standard deviation, a number or a tensor of the shape of one example's target.
        learn: Whether it is learned, from `scale` on.
    """

    def __init__(self, scale: float | Tensor, *, learn: bool = False) -> None:
        super().__init__()
        log_scale = torch.as_tensor(scale, dtype=torch.get_default_dtype()).log()
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def distribution(self, output: Any, *, batch_dims: int = 1) -> dist.TorchDistribution:
        normal = dist.Normal(output, self.scale, validate_args=False)
        return normal.to_event(output.dim() - batch_dims)
