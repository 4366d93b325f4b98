"""Whether the running statistics of batch norms belong to the parameters as they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from pyro_bayes.base.state import fingerprint

_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm

_stamps: weakref.WeakKeyDictionary[Model, tuple[float, ...]] = weakref.WeakKeyDictionary()


class Model(Protocol):
    """What is known of a model here: its modules and its parameters."""

    def modules(self) -> Iterator[nn.Module]:
        """Returns its modules."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Returns what the statistics depend on."""


def running_norms(model: Model) -> list[Any]:
    """Returns the batch norms in a model that keep running statistics.

    Arguments:
        model: The model.
    """
    norms = (module for module in model.modules() if isinstance(module, _NORMS))
    return [norm for norm in norms if norm.running_mean is not None]


def mark(model: Model, *, fresh: bool = True) -> None:
    """Notes that the running statistics belong to the parameters as they are now.

    Arguments:
        model: The model.
        fresh: Whether they do. If not, an earlier note is forgotten.
    """
    _stamps.pop(model, None)
    if fresh:
        _stamps[model] = _stamp(model)


def is_fresh(model: Model) -> bool:
    """Returns whether parameters and statistics are as they were when a model was marked.

    Arguments:
        model: The model.
    """
    return _stamps.get(model) == _stamp(model)


def _stamp(model: Model) -> tuple[float, ...]:
    """Returns what differs after a parameter or a statistic has changed."""
    norms = running_norms(model)
    counts = tuple(float(norm.num_batches_tracked) for norm in norms)
    return fingerprint(model.parameters()) + counts if norms else ()
