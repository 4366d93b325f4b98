"""Schedules of the weight of the KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearWarmup(nn.Module):
    """A weight that rises from 0 to 1 in equal steps, and stays there.

    Arguments:
        steps: After how many steps it is 1.

    Example:
        >>> warmup = LinearWarmup(4)
        >>> warmup.step()
        >>> warmup.weight
        tensor(0.2500)
    """

    count: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @property
    def weight(self) -> Tensor:
        """The weight at the present step."""
        return (self.count / self.steps).clamp(max=1.0)

    def step(self) -> None:
        """Goes one step on."""
        self.count += 1
