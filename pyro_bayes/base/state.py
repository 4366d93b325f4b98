"""What a call must leave as it was: modes, buffers and random numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Modes


@contextmanager
def preserve_modes(module: nn.Module) -> Iterator[None]:
    """Gives each submodule its mode (training or evaluation) back when the context is left.

    Arguments:
        module: The module.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            if part.training != training:  # Pyro's modules take long to set an attribute
                part.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keeps a module in evaluation mode, and gradients off, while the context is open.

    Arguments:
        module: The module.
    """
    with torch.no_grad(), preserve_modes(module):
        module.eval()
        yield


# Buffers


class Buffers:
    """The buffers of modules as they are now, which :meth:`restore` gives back.

    That goes for values, sizes and the tensors themselves: a buffer that was resized, replaced,
    filled for the first time or registered in the meantime is as before.

    It reads and writes the private `nn.Module._buffers`: torch has no public call that tells a
    buffer which is `None` from one that does not exist.

    Arguments:
        modules: The modules, without their submodules.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> buffers = Buffers([norm])
        >>> norm(torch.ones(3, 2)), buffers.restore()
        (..., None)
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [(module._buffers, dict(module._buffers)) for module in modules]
        tensors = {
            id(buffer): buffer
            for _, buffers in self._places
            for buffer in buffers.values()
            if buffer is not None and not _is_expanded(buffer)
        }
        # An alias has the size, the strides and the memory that the buffer has now.
        self._values = [(b, b.detach(), b.detach().clone()) for b in tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the modules their buffers back."""
        for place, buffers in self._places:
            if place.keys() != buffers.keys() or any(place[k] is not buffers[k] for k in place):
                place.clear()
                place.update(buffers)
        for buffer, alias, value in self._values:
            # A graph may hold what has not changed.
            if not _is_as_before(buffer, alias, value):
                buffer.data = alias
                buffer.copy_(value)


def _is_as_before(buffer: Tensor, alias: Tensor, value: Tensor) -> bool:
    if buffer.layout is not torch.strided or not buffer.is_cpu:  # others would be waited for
        return False
    kinds = [(t.shape, t.dtype, t.stride(), t.device) for t in (buffer, alias)]
    same = kinds[0] == kinds[1] and buffer.data_ptr() == alias.data_ptr()
    return same and buffer.requires_grad == alias.requires_grad and torch.equal(buffer, value)


def _is_expanded(buffer: Tensor) -> bool:
    """Returns whether several elements are one number in memory, which cannot be written to."""
    if buffer.layout is not torch.strided:
        return False
    return any(n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Gives a module its buffers, and torch its random numbers, back when the context is left.

    Arguments:
        module: The module.
    """
    buffers = Buffers(module.modules())
    try:
        with preserve_random_state():
            yield
    finally:
        buffers.restore()


def fingerprint(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    """Returns numbers that are others once a value has changed.

    They are sums over the values: fused optimisers change tensors without counting that.

    Arguments:
        tensors: The tensors.
    """
    numbers: list[float] = []
    for tensor in tensors:
        if not tensor.is_meta:
            values = where_double(tensor.detach())
            numbers.append(float(values.sum(dtype=torch.double)))
            numbers.append(float(torch.linalg.vector_norm(values, dtype=torch.double)))
    return tuple(numbers)


def where_double(x: Tensor) -> Tensor:
    """Returns a tensor where double precision exists: as it is, or on the CPU for Apple's GPUs.

    Arguments:
        x: The tensor.
    """
    return x.cpu() if x.device.type == "mps" else x


# Random numbers


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draws a seed.

    Arguments:
        generator: Where it comes from, torch's global generator by default.
    """
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Gives torch's global generators their state back when the context is left."""
    with torch.random.fork_rng(_cuda_devices()):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Gives torch's global generators a seed while the context is open, and then their state back.

    Distributions take no generator.

    Arguments:
        seed: The seed.
    """
    with preserve_random_state():
        torch.default_generator.manual_seed(seed)
        if _cuda_devices():
            torch.cuda.manual_seed_all(seed)
        yield


def random_state(device: torch.device, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Returns the states of torch's, Python's and NumPy's global generators, and of others.

    Arguments:
        device: The device whose global generator counts beside the CPU's.
        generators: The others.

    Returns:
        A dictionary of tensors, numbers and nested containers of them.
    """
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "loaders": [generator.get_state() for generator in generators],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")  # what was not imported was not drawn from
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (str(name), keys.tolist(), *rest)
    return states


def restore_random_state(
    states: dict[str, Any], device: torch.device, generators: Sequence[torch.Generator]
) -> None:
    """Sets the states that :func:`random_state` returned.

    Arguments:
        states: The states.
        device: The device.
        generators: The others.
    """
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    for generator, state in zip(generators, states["loaders"], strict=True):
        generator.set_state(state)
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])


def _cuda_devices() -> list[int]:
    """Returns the devices whose generators may have been used."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
