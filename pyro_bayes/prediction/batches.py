"""The batches of a loader: pairs (x, y), checked before they are used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from pyro_bayes.base import processes
from pyro_bayes.base.checks import check_batch, is_finite
from pyro_bayes.likelihoods.targets import check_labels


class Batch(NamedTuple):
    """One batch.

    Arguments:
        x: What the network is given: a tensor, a tuple or a dictionary.
        y: The target, a tensor whose first dimension counts examples.
    """

    x: Any
    y: Tensor


class Batches:
    """The batches of a loader, checked as they come, on a device.

    Arguments:
        loader: What gives pairs (x, y), anew each time that it is iterated.
        name: The name of the argument, for messages.
        num_data: The number of examples that the objective was told, `None` if it does not apply.
        device: Where the batches go.

    Raises:
        TypeError: If the loader can be iterated once only, or holds what is no pair.
        ValueError: If it is empty, or what it holds in memory is not finite.
    """

    def __init__(
        self, loader: Iterable[Any], *, name: str, num_data: int | None, device: torch.device
    ) -> None:
        if not isinstance(loader, Iterable) or isinstance(loader, Tensor | Mapping):
            raise TypeError(
                f"Expected {name} to give pairs (x, y), as a DataLoader; got"
                f" {type(loader).__name__}."
            )
        if isinstance(loader, Iterator):
            raise TypeError(
                f"Expected {name} to start anew for each epoch; got a {type(loader).__name__},"
                f" which ends for good. Pass the DataLoader itself, or list({name})."
            )
        self.loader, self._name, self._num_data, self._device = loader, name, num_data, device
        self.count = len(loader) if _is_sized(loader) else None
        if self.count == 0:
            raise ValueError(self._empty())
        self._targets: list[tuple[str, Tensor]] = []
        if isinstance(loader, list | tuple):
            for index, batch in enumerate(loader):
                y = self._check(batch, index).y
                self._targets.append((f"y of batch {index} of {name}", y))
        dataset, rows = getattr(loader, "dataset", None), _rows(loader)
        tensors = [] if rows is None else _tensors(dataset, rows)
        for number, values in enumerate(tensors):
            check_finite(values, f"tensor {number} of {name}'s dataset")
        if len(tensors) == 2 and getattr(loader, "collate_fn", None) is default_collate:
            self._targets.append((f"y of {name}'s dataset", tensors[1]))
        size = None
        if rows is not None and _is_sized(dataset):
            size = len(dataset) if isinstance(rows, slice) else len(rows)
        share = processes.count() > 1 and size is not None and size < (num_data or 0)
        if num_data is not None and size not in (None, num_data) and not share:
            warnings.warn(
                f"Expected num_data to be the number of examples of the training set; got"
                f" {num_data}, and a dataset of {size}. The divergence is weighed as if"
                f" there were {num_data}.",
                UserWarning,
                stacklevel=3,
            )

    def __iter__(self) -> Iterator[Batch]:
        index = -1
        for index, batch in enumerate(self.loader):
            x, y = self._check(batch, index)
            move = tree_map_only(Tensor, lambda t: t.to(self._device, non_blocking=True), (x, y))
            yield Batch(*move)
        if index < 0:
            raise ValueError(self._empty())

    def set_epoch(self, epoch: int) -> None:
        """Tells samplers that shuffle by the epoch's number, as a `DistributedSampler`, which."""
        batches = getattr(self.loader, "batch_sampler", None)
        for owner in (self.loader, getattr(self.loader, "sampler", None), batches):
            getattr(owner, "set_epoch", _nothing)(epoch)

    def check_labels(self, distribution: Distribution) -> None:
        """Raises a `ValueError` unless labels and counts that are in memory are such.

        Arguments:
            distribution: A likelihood's distribution of some of the targets.
        """
        for name, y in self._targets:
            check_labels(name, y, distribution)

    def _check(self, batch: Any, index: int) -> Batch:
        where = f"batch {index} of {self._name}"
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            size = f" of {len(batch)}" if isinstance(batch, Sized) else ""
            raise TypeError(
                f"Expected {where} to be a pair (x, y), where x is a tensor, a tuple or a"
                f" dictionary; got a {type(batch).__name__}{size}. Let the loader's `collate_fn`"
                " make such pairs."
            )
        x, y = batch
        if not isinstance(y, Tensor) or y.dim() == 0 or len(y) == 0:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"Expected y of {where} to be a tensor whose first dimension counts examples, at"
                f" least one; got {got}."
            )
        for part, value in (("x", x), ("y", y)):
            for leaf in tree_flatten(value)[0]:
                check_finite(leaf, f"{part} of {where}")
        if self._num_data is not None:
            check_batch(len(y), self._num_data)
        return Batch(tuple(x) if type(x) is list else x, y)

    def _empty(self) -> str:
        return (
            f"Expected {self._name} to have at least one batch; got none. Is the dataset empty, or"
            " smaller than a batch with drop_last=True?"
        )


def check_finite(value: Any, name: str) -> None:
    """Raises a `ValueError` unless a tensor's numbers are finite; other values pass.

    Arguments:
        value: The tensor.
        name: What messages call it.

    Example:
        >>> check_finite(torch.tensor([1.0, float("nan")]), "x")
        Traceback (most recent call last):
        ...
        ValueError: Expected x to be finite; got nan at [1].
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return
    if not is_finite(value):
        place = (~torch.isfinite(value)).nonzero()[0]
        raise ValueError(
            f"Expected {name} to be finite; got {value[tuple(place)].item()} at {place.tolist()}."
        )


def _rows(loader: Any) -> slice | Tensor | None:
    """Returns which examples of its dataset a loader may take, `None` if that is not known."""
    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(sampler.indices)
    everything = SequentialSampler, RandomSampler, DistributedSampler
    return slice(None) if isinstance(sampler, everything) else None


def _tensors(dataset: Any, rows: slice | Tensor) -> list[Tensor]:
    """Returns what a dataset is known to hold in memory."""
    while isinstance(dataset, Subset):
        rows = torch.as_tensor(dataset.indices)[rows]
        dataset = dataset.dataset
    held = dataset.tensors if isinstance(dataset, TensorDataset) else ()
    return [values[rows] for values in held]


def _is_sized(loader: Any) -> TypeGuard[Sized]:
    # A DataLoader of an iterable dataset has the method but no length.
    try:
        len(loader)
    except TypeError:
        return False
    return True


def _nothing(_: int) -> None:
    pass
