"""Batches: what they are, and how a loader of them is read.

*Inputs* are what a network is called with: a tensor, a tuple of positional arguments or a mapping
of keyword arguments. A *batch* is a pair (x, y) of inputs and targets or, where targets do not
matter, inputs alone. Collate functions make lists of tuples, so a list in a batch stands for a
tuple. A named tuple, such as a packed sequence, is one argument unless it is a pair.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
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
from pyro_bayes.base.checks import check_batch, check_finite
from pyro_bayes.base.torch_private import tree_flatten, tree_map_only


def arguments(x: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns inputs as the positional and the keyword arguments of a call.

    Arguments:
        x: The inputs. What is neither a tuple, a list nor a mapping is one argument.

    Example:
        >>> arguments([1, 2]), arguments({"a": 1}), arguments(1)
        (((1, 2), {}), ((), {'a': 1}), ((1,), {}))
    """
    if isinstance(x, Mapping):
        return (), x
    return (tuple(x) if type(x) in (list, tuple) else (x,)), {}


def called(net: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls a network.

    Arguments:
        net: The network.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Raises:
        TypeError: If the inputs are of another precision than the network's parameters, and it
            cannot be called with them.
    """
    try:
        return net(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(net, nn.Module) and "type" in str(error):
            _check_precision((args, dict(kwargs)), net, error)
        raise


def _check_precision(inputs: Any, net: nn.Module, error: Exception) -> None:
    here = {p.dtype for p in net.parameters() if p.is_floating_point()}
    tensors = (leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor))
    other = {leaf.dtype for leaf in tensors if leaf.is_floating_point()} - here
    if other and len(here) == 1:
        dtype, got = next(iter(here)), next(iter(other))
        raise TypeError(
            f"Expected inputs of {dtype}, as the network's parameters are; got some of {got}"
            f" ({error}). Pass x.to({dtype}), or convert the model by bnn.to({got})."
        ) from error


def parts(batch: Any) -> Any:
    """Returns all parts of a batch, as the inputs of a function of them.

    Arguments:
        batch: The batch: any number of parts in a tuple, a list or a mapping, or a tensor.

    Example:
        >>> parts([["a", "b"], "y"])
        (('a', 'b'), 'y')
    """
    if type(batch) in (list, tuple) or _is_pair(batch):
        return tuple(_plain(part) for part in batch)
    return _plain(batch)


def inputs(batch: Any) -> Any:
    """Returns the inputs of a batch.

    Arguments:
        batch: A pair (x, y), a tuple or a list with x alone, or x itself: a tensor or a mapping.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it has more than two parts.

    Example:
        >>> inputs([["a", "b"], "y"])
        ('a', 'b')
    """
    x = parts(batch)
    if type(x) is tuple:
        if len(x) not in (1, 2):
            raise ValueError(
                "Expected batches to be x or pairs (x, y), of which y is left out; got a"
                f" {type(batch).__name__} of {len(x)}. Let the loader's `collate_fn` make pairs"
                " ((a, b), y), or tell predict() what is what:"
                " predict(batches, function=lambda net, a, b, y: net(a, b))."
            )
        return _as_inputs(x[0])
    if not isinstance(x, Tensor | Mapping | tuple):
        raise TypeError(f"Expected batches of tensors; got one of {type(batch).__name__}.")
    return x


def each_batch(
    loader: Any,
    read: Callable[[Any], Any] = inputs,
    *,
    name: str = "loader",
    device: torch.device | None = None,
) -> Iterator[Any]:
    """Yields what is read of each batch of a loader, by default the inputs.

    Arguments:
        loader: The batches.
        read: What to return of a batch, :func:`inputs` or :func:`parts`.
        name: The name of the argument, for messages.
        device: Where tensors go; by default, they stay where they are.

    Raises:
        TypeError: If it does not give batches.
        ValueError: If there is none, or one has more than two parts.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor | Mapping):
        raise TypeError(
            f"Expected {name} to give batches, pairs (x, y) or x; got {type(loader).__name__}. Pass"
            f" one batch in a list: {name}=[x]."
        )
    empty = True
    for batch in loader:
        empty = False
        yield _moved(read(batch), device)
    if empty:
        raise EmptyLoaderError(name)


class EmptyLoaderError(ValueError):
    """A loader has no batch.

    Arguments:
        name: The name of the argument.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Expected {name} to have at least one batch; got none. Is the dataset empty, or"
            " smaller than a batch with drop_last=True?"
        )


def signature(x: Any) -> Any:
    """Returns what inputs of the same shapes have in common, or `None` if it cannot be told.

    Arguments:
        x: The inputs.
    """
    leaves, structure = tree_flatten(x)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return str(structure), *((leaf.shape, leaf.dtype) for leaf in leaves)


class Batch(NamedTuple):
    """A pair.

    Arguments:
        x: The inputs.
        y: The target, a tensor whose first dimension counts examples.
    """

    x: Any
    y: Tensor


class Batches:
    """The pairs of a loader, checked as they come, on a device.

    Arguments:
        loader: What gives pairs (x, y), anew each time that it is iterated.
        name: The name of the argument, for messages.
        num_data: The number of examples that the objective was told, `None` if it does not apply.
        device: Where the batches go.

    Attributes:
        loader: The loader.
        count: The number of batches, `None` if it is not known.
        targets: The targets that are in memory, with what messages call them.

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
            raise EmptyLoaderError(name)
        self.targets: list[tuple[str, Tensor]] = []
        if isinstance(loader, list | tuple):
            for index, batch in enumerate(loader):
                y = self._pair(batch, index).y
                self.targets.append((f"y of batch {index} of {name}", y))
        dataset, rows = getattr(loader, "dataset", None), _rows(loader)
        tensors = [] if rows is None else _tensors(dataset, rows)
        for number, values in enumerate(tensors):
            check_finite(f"tensor {number} of {name}'s dataset", values)
        if len(tensors) == 2 and getattr(loader, "collate_fn", None) is default_collate:
            self.targets.append((f"y of {name}'s dataset", tensors[1]))
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
            pair = self._pair(batch, index)
            yield Batch(*_moved(tuple(pair), self._device))
        if index < 0:
            raise EmptyLoaderError(self._name)

    def set_epoch(self, epoch: int) -> None:
        """Tells samplers that shuffle by the epoch's number, as a `DistributedSampler`, which."""
        batches = getattr(self.loader, "batch_sampler", None)
        for owner in (self.loader, getattr(self.loader, "sampler", None), batches):
            getattr(owner, "set_epoch", _nothing)(epoch)

    def _pair(self, batch: Any, index: int) -> Batch:
        where = f"batch {index} of {self._name}"
        if not _is_pair(batch):
            size = f" of {len(batch)}" if isinstance(batch, Sized) else ""
            raise TypeError(
                f"Expected {where} to be a pair (x, y), where x is a tensor, a tuple or a"
                f" dictionary; got a {type(batch).__name__}{size}. Let the loader's `collate_fn`"
                " make such pairs."
            )
        x, y = _as_inputs(batch[0]), batch[1]
        if not isinstance(y, Tensor) or y.dim() == 0 or len(y) == 0:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"Expected y of {where} to be a tensor whose first dimension counts examples, at"
                f" least one; got {got}."
            )
        for part, value in (("x", x), ("y", y)):
            for leaf in tree_flatten(value)[0]:
                check_finite(f"{part} of {where}", leaf)
        if self._num_data is not None:
            check_batch(len(y), self._num_data)
        return Batch(x, y)


def generators(loaders: Sequence[Any]) -> list[torch.Generator]:
    """Returns the generators of random numbers that loaders and their samplers own, each once.

    Arguments:
        loaders: The loaders.
    """
    owned: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    owners = list(reversed(loaders))
    while owners:
        owner = owners.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            owned[id(generator)] = generator
        # A sampler of batches may hold another sampler, in either place.
        owners += [getattr(owner, name, None) for name in ("batch_sampler", "sampler")]
    return list(owned.values())


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) == 2


def _plain(value: Any) -> Any:
    """Returns a tuple for a list, and a dictionary for another mapping."""
    if type(value) is list:
        return tuple(value)
    is_other = isinstance(value, Mapping) and not isinstance(value, dict)
    return dict(value) if is_other else value


def _as_inputs(x: Any) -> Any:
    """Returns a tensor, a tuple or a dictionary: what is nothing of these is one argument."""
    x = _plain(x)
    return x if isinstance(x, Tensor | tuple | dict) else (x,)


def _moved(values: Any, device: torch.device | None) -> Any:
    if device is None:
        return values
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), values)


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
