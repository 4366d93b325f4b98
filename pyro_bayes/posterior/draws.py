"""Draws of the weights for predictions: the same for a seed, in chunks of any size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.posterior.flat import gather, scatter
from pyro_bayes.posterior.gpu import kernels

_KEPT = 2**22  # draws of up to so many elements are kept from batch to batch


class WeightDraws:
    """Draws of the weights, the same whenever one begins with the first, and in any chunks.

    Chunks use the same memory. If all draws are wanted again, and few enough, they are kept.

    Arguments:
        posterior: The means and log-variances by name.
        total: The number of draws.
        seed: The seed.
        again: Whether all draws may be wanted several times.

    Example:
        >>> posterior = {"w": (torch.zeros(2), torch.zeros(2)), "b": (torch.ones(()),) * 2}
        >>> draws = WeightDraws(posterior, total=5, seed=0, again=False)
        >>> {name: tuple(draw.shape) for name, draw in draws.stacked(draws.rows(0, 3)).items()}
        {'w': (3, 2), 'b': (3,)}
    """

    def __init__(
        self,
        posterior: Mapping[str, tuple[Tensor, Tensor]],
        total: int,
        seed: int,
        again: bool,
    ) -> None:
        kinds: dict[Any, list[str]] = {}
        for name, (mean, _) in posterior.items():
            kinds.setdefault((mean.dtype, mean.device), []).append(name)
        self._groups = [_Group({n: posterior[n] for n in names}) for names in kinds.values()]
        self.total, self._seed = total, seed
        self.size = sum([len(group.means) for group in self._groups])
        self.on_cpu = all([group.means.is_cpu for group in self._groups])
        # What is kept is of one piece: many small ones would scatter what is not kept.
        self._keeps = again and total * sum([g.buffer.shape[1] for g in self._groups]) <= _KEPT
        self._kept = False

    def rows(self, start: int, count: int) -> list[Tensor]:
        """Returns the first draws, or those that come next, one in a row, for each type."""
        if not self._kept:
            for i, group in enumerate(self._groups):
                if start == 0:
                    group.begin(self._seed - i)
                group.draw(self.total if self._keeps else count)
            self._kept = self._keeps
        place = start if self._keeps else 0
        return [g.buffer[place : place + count, : len(g.means)] for g in self._groups]

    def stacked(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns draws of shape `(count, *)` by name."""
        found = {}
        for group, part in zip(self._groups, rows, strict=True):
            columns = part.split([mean.numel() for mean in group.like], dim=1)
            for name, like, column in zip(group.names, group.like, columns, strict=True):
                found[name] = column.view(len(part), *like.shape)
        return found

    def each(self, rows: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Returns one draw after the other, by name."""
        for row in zip(*[part.unbind() for part in rows], strict=True):
            found: dict[str, Tensor] = {}
            for group, part in zip(self._groups, row, strict=True):
                found.update(zip(group.names, scatter(part, group.like), strict=True))
            yield found


class _Group:
    """Parameters of one type on one device."""

    def __init__(self, posterior: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.names = list(posterior)
        self.like, logvars = zip(*posterior.values(), strict=True)
        self.means, self._scales = gather(self.like), gather(logvars).mul(0.5).exp_()
        self._generator = torch.Generator(self.means.device)
        # A CPU draws 16 numbers at a time, so that rows of whole 16 may be drawn at once.
        self.buffer = self.means.new_empty(0, -(-len(self.means) // 16) * 16)

    def begin(self, seed: int) -> None:
        self._seed, self._drawn = seed, 0
        self._generator.manual_seed(seed)

    def draw(self, count: int) -> None:
        if len(self.buffer) < count:
            self.buffer = self.means.new_empty(count, self.buffer.shape[1])
        rows = self.buffer[:count]
        device = kernels([self.means], [self._scales])
        if device:
            device.rows(self.means, self._scales, rows, self._seed, self._drawn)
            self._drawn += count
            return
        for part in [rows] if rows.is_cpu else rows.unbind():
            part.normal_(generator=self._generator)
        used = rows[:, : len(self.means)]
        torch.addcmul(self.means, self._scales, used, out=used)
