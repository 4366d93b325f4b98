"""Random numbers: the state of all that training draws from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def state(device: torch.device, loaders: Sequence[Any]) -> dict[str, Any]:
    """Returns the states of torch's, Python's and NumPy's global generators, and of loaders.

    Arguments:
        device: The device that training runs on.
        loaders: The loaders, whose own generators (and their samplers') count too.

    Returns:
        A dictionary of tensors, numbers and nested containers of them.
    """
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "loaders": [generator.get_state() for generator in generators(loaders)],
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")  # what was not imported was not drawn from
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        found["numpy"] = (str(name), keys.tolist(), *rest)
    return found


def restore(saved: dict[str, Any], device: torch.device, loaders: Sequence[Any]) -> None:
    """Sets the states that :func:`state` returned.

    Arguments:
        saved: The states.
        device: The device that training runs on.
        loaders: The loaders.
    """
    torch.set_rng_state(saved["torch"])
    random.setstate(saved["python"])
    for generator, value in zip(generators(loaders), saved["loaders"], strict=True):
        generator.set_state(value)
    if device.type == "cuda" and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"], device)
    if "numpy" in saved:
        import numpy

        numpy.random.set_state(saved["numpy"])


def generators(loaders: Sequence[Any]) -> list[torch.Generator]:
    """Returns the generators that loaders and their samplers own, each once."""
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    owners = list(reversed(loaders))
    while owners:
        owner = owners.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        # A sampler of batches may hold another sampler, in either place.
        owners += [getattr(owner, name, None) for name in ("batch_sampler", "sampler")]
    return list(found.values())


@contextmanager
def apart(seed: int, device: torch.device) -> Iterator[None]:
    """Draws torch's random numbers from a seed, and leaves the global generators as they were.

    Arguments:
        seed: The seed.
        device: The device whose generator counts beside the CPU's.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
