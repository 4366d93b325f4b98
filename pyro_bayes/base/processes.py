"""The processes that train one model together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def count() -> int:
    """Returns how many processes train together, 1 without :mod:`torch.distributed`."""
    return distributed.get_world_size() if _many() else 1


def rank() -> int:
    """Returns which of them this is."""
    return distributed.get_rank() if _many() else 0


def together(module: nn.Module) -> nn.Module:
    """Returns a module whose backward pass averages gradients over processes.

    Arguments:
        module: The module. Its parameters and buffers become those of process 0.
    """
    return DistributedDataParallel(module) if count() > 1 else module


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the buffers of process 0, as the wrapper does before each forward pass.

    Arguments:
        module: The module.
    """
    for buffer in module.buffers() if count() > 1 else ():
        distributed.broadcast(buffer, 0)


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Returns the sums over processes.

    Arguments:
        values: The numbers of this process, as many in each.
        device: A device that the processes' backend can reach.
    """
    if count() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def gather(value: Any, device: torch.device) -> list[Any]:
    """Returns what each process has, in their order.

    Arguments:
        value: What this one has, any object that can be pickled.
        device: A device that the processes' backend can reach.
    """
    values = [value] * count()
    if count() > 1:
        with _on(device):
            distributed.all_gather_object(values, value)
    return values


def wait(device: torch.device) -> None:
    """Returns once all processes have come here."""
    gather(None, device)


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
