"""The batch norms of a module."""

from __future__ import annotations

from typing import Any

from torch import nn

_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


def batch_norms(module: nn.Module) -> list[Any]:
    """Returns the batch norms that keep running statistics.

    Arguments:
        module: The module.
    """
    modules = module.modules()
    return [m for m in modules if isinstance(m, _NORMS) and m.running_mean is not None]
