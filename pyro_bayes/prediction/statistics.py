"""Statistics of a tensor over draws that come in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Result: TypeAlias = dict[str | float, Tensor]

_BLOCK = 16_000_000  # torch.quantile takes no more elements at once


class RunningStatistics:
    """The statistics of one tensor over draws that come in chunks.

    Means and squared deviations are merged chunk by chunk, which is stable, and keeps no draws.
    Quantiles are exact, and keep all draws as samples do. See `Algorithms for Computing the Sample
    Variance <https://doi.org/10.1080/00031305.1983.10483115>`_ (Chan, Golub and LeVeque, 1983).

    Arguments:
        like: The tensor of one draw.
        total: The number of draws.
        keys: The names of the statistics, and the levels of quantiles.

    Example:
        >>> running = RunningStatistics(torch.empty(()), 3, ("mean", "variance", 0.5))
        >>> running.add(torch.tensor([1.0, 2.0])), running.add(torch.tensor([6.0]))
        (None, None)
        >>> running.result()
        {'mean': tensor(3.), 'variance': tensor(7.), 0.5: tensor(2.)}
    """

    def __init__(self, like: Tensor, total: int, keys: Sequence[str | float]) -> None:
        self._keys, self._shape, self._count = keys, like.shape, 0
        self._levels = [key for key in keys if isinstance(key, float)]
        self._dtype = torch.get_default_dtype()
        if like.is_floating_point():
            self._dtype = torch.promote_types(like.dtype, torch.float32)
        keeps = self._levels or "samples" in keys
        self._samples = like.new_empty(total, *like.shape) if keeps else None

    def add(self, values: Tensor) -> None:
        """Adds the values of several draws, of shape `(count, *)`."""
        before, more, shape = self._count, len(values), values.shape[1:]
        if shape != self._shape:
            raise ValueError(f"Expected outputs of one shape, {self._shape}; got {shape}.")
        self._count += more
        if self._samples is not None:
            self._samples[before : self._count] = values
        values = values.to(self._dtype)
        mean = values.mean(0)
        if before == 0:
            self._mean, self._squares = mean, _squares(values, mean)
            return
        if more > 1:
            self._squares.add_(_squares(values, mean))
        change = mean.sub_(self._mean)
        self._mean.add_(change, alpha=more / self._count)
        self._squares.addcmul_(change, change, value=before * more / self._count)

    def result(self) -> Result:
        """Returns the statistics by name or level."""
        results: Result = {"mean": self._mean, "variance": self._squares / max(self._count - 1, 1)}
        if self._samples is not None:
            results["samples"] = self._samples
            levels = self._mean.new_tensor(self._levels)
            columns = self._samples.reshape(self._count, -1)
            blocks = columns.split(max(1, _BLOCK // self._count), dim=1) if self._levels else ()
            parts = [torch.quantile(block.to(levels.dtype), levels, dim=0) for block in blocks]
            for level, *values in zip(self._levels, *parts, strict=True):
                results[level] = torch.cat(values).view(self._shape)
        return {key: results[key] for key in self._keys}


def _squares(values: Tensor, mean: Tensor) -> Tensor:
    return (values - mean).square_().sum(0)  # in less time than torch's variance


def joined(batches: Sequence[Sequence[Result]]) -> list[Result]:
    """Joins the statistics of batches along the dimension that counts examples.

    Arguments:
        batches: The statistics of each tensor, of each batch.

    Raises:
        ValueError: If a tensor has no such dimension.
    """
    joint = []
    for results in zip(*batches, strict=True):
        dims = {key: int(key == "samples") for key in results[0]}
        if any(results[0][key].dim() <= dim for key, dim in dims.items()):
            raise ValueError("Expected outputs with a dimension for examples; got a scalar.")
        joint.append({key: torch.cat([r[key] for r in results], d) for key, d in dims.items()})
    return joint
