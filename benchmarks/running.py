"""What can be done with a network that was made ready, and the steps of its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from nets import LEARNING_RATE, Problem
from torch import Tensor, nn

Predict = Callable[[Tensor, int], Any]


@dataclass(frozen=True)
class Running:
    """What can be done with a network that was made ready.

    Arguments:
        step: Makes one full step of the optimiser.
        predict: The ways to average over a number of draws, given inputs, by description.
    """

    step: Callable[[], object]
    predict: dict[str, Predict]


def optimised(
    problem: Problem,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    captured: bool = False,
) -> Callable[[], None]:
    """Returns one step of a plain PyTorch loop.

    Arguments:
        problem: Says which Adam to use.
        parameters: What Adam trains.
        loss: Computes the loss.
        captured: Whether to capture the step as a CUDA graph.
    """
    options = adam_options(problem) | ({"capturable": True} if captured else {})
    optimizer = torch.optim.Adam(parameters, **options)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return _Captured(step) if captured else step


def adam_options(problem: Problem) -> dict[str, Any]:
    """Returns the arguments of Adam, torch's or Pyro's, and no more than a user would write."""
    return {"lr": LEARNING_RATE, "fused": True} if problem.fused else {"lr": LEARNING_RATE}


class _Captured:
    """A step that was recorded as a CUDA graph, and that each call replays.

    It keeps the step, whose memory the graph reads and writes.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        self.graph.replay()


def draws(draw: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Returns the variance and the mean of outputs, drawn one at a time."""
    with torch.no_grad():
        outputs = torch.stack([draw() for _ in range(count)])
        return torch.var_mean(outputs, 0, correction=0)
