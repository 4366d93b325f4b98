"""The steps of a training loop: which examples they see, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor


def minibatches(count: int, *, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Draws minibatches without replacement, in a new order on each pass over the data.

    The same seed gives the same minibatches.

    Arguments:
        count: The number of examples :math:`N`.
        size: The number of examples of a minibatch, at most :math:`N`.
        steps: The number of minibatches.
        seed: The seed of the orders.

    Yields:
        The indices of the examples, of shape `(size,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)

    def endless() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(count, generator=generator)
            # A last, smaller minibatch would weigh its examples more.
            yield from order[: count // size * size].split(size)

    return islice(endless(), steps)


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar on stderr while the context is open, if that is a terminal.

    Arguments:
        title: What stands in front of the bar.
        steps: The number of steps.

    Yields:
        A function that advances the bar by one step and shows a metric beside it.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda metric: None
        return
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[metric]}"),
        console=console,
    )
    with bar:
        task = bar.add_task(title, total=steps, metric="")
        yield lambda metric: bar.update(task, advance=1, metric=metric)
