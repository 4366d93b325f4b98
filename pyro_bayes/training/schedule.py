"""Schedules of the weight of the KL divergence."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pyro_bayes.base.checks import check_count


class Schedule(nn.Module, ABC):
    """A weight that depends on the number of steps so far, which is a buffer and saved as such.

    To write one, compute :attr:`weight` from `count`.
    """

    count: Tensor
    """The number of steps so far, a 0-dim tensor of integers."""

    def __init__(self) -> None:
        """Makes the schedule, whose class describes the arguments."""
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight at the present step, a 0-dim tensor."""

    def step(self) -> None:
        """Counts one step of the optimiser."""
        self.count += 1


class LinearWarmup(Schedule):
    r"""A weight that rises from 0 to 1 in equal steps, and stays there.

    .. math:: w = \min(t / T, 1)

    A network then fits the data before the prior pulls on it. What it ends in is an ELBO only with
    the weight 1, so train on for long after the warm-up.

    Arguments:
        steps: The number :math:`T` of steps of the optimiser after which the weight is 1.

    Raises:
        ValueError: If `steps` is not a positive integer.

    References:
        | Ladder Variational Autoencoders (Sønderby et al., 2016)
        | https://arxiv.org/abs/1602.02282

    Example:
        >>> warmup = LinearWarmup(4)
        >>> warmup.step()
        >>> warmup.weight
        tensor(0.2500)
    """

    def __init__(self, steps: int) -> None:
        """Makes the schedule, whose class describes the arguments."""
        super().__init__()
        check_count("steps", steps)
        self.steps = int(steps)

    @property
    def weight(self) -> Tensor:
        """The weight at the present step, a 0-dim tensor."""
        return (self.count / self.steps).clamp(max=1)
