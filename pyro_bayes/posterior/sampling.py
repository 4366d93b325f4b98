"""Draws of the weights for predictions: the same for a seed, in chunks of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_bayes.posterior.gpu import kernels
from pyro_bayes.posterior.layout import Flat

_KEPT = 2**22  # draws of up to so many elements are kept from batch to batch


class WeightDraws:
    """Draws of the weights, the same whenever one begins with the first, and in any chunks.

    Chunks use the same memory. If all draws are wanted again, and few enough, they are kept.

    Arguments:
        posterior: The parameters of each dtype and device.
        total: The number of draws.
        seed: The seed.
        again: Whether all draws may be wanted several times.

    Example:
        >>> from pyro_bayes.posterior.layout import Layout
        >>> layout = Layout({"w": torch.zeros(2), "b": torch.zeros(())})
        >>> flat = Flat(layout, torch.zeros(3), torch.zeros(3))
        >>> draws = WeightDraws([flat], total=5, seed=0, again=False)
        >>> {name: tuple(draw.shape) for name, draw in draws.stacked(draws.rows(0, 3)).items()}
        {'w': (3, 2), 'b': (3,)}
    """

    def __init__(self, posterior: Sequence[Flat], total: int, seed: int, again: bool) -> None:
        self._groups = [_Group(flat) for flat in posterior]
        self.total, self._seed = total, seed
        self.size = sum([len(group.mean) for group in self._groups])
        self.on_cpu = all([group.mean.is_cpu for group in self._groups])
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
        return [g.buffer[place : place + count, : len(g.mean)] for g in self._groups]

    def stacked(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns draws of shape `(count, *)` by name."""
        stacked: dict[str, Tensor] = {}
        for group, part in zip(self._groups, rows, strict=True):
            stacked.update(zip(group.layout.names, group.layout.split(part), strict=True))
        return stacked

    def each(self, rows: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Returns one draw after the other, by name."""
        for row in zip(*[part.unbind() for part in rows], strict=True):
            draw: dict[str, Tensor] = {}
            for group, part in zip(self._groups, row, strict=True):
                draw.update(zip(group.layout.names, group.layout.views(part), strict=True))
            yield draw


class _Group:
    """Parameters of one type on one device."""

    def __init__(self, posterior: Flat) -> None:
        self.layout, self.mean, logvar = posterior
        self._scale = logvar.mul(0.5).exp_()
        self._generator = torch.Generator(self.mean.device)
        # A CPU draws 16 numbers at a time, so that rows of whole 16 may be drawn at once.
        self.buffer = self.mean.new_empty(0, -(-len(self.mean) // 16) * 16)

    def begin(self, seed: int) -> None:
        self._first, self._drawn = seed, 0
        self._generator.manual_seed(seed)

    def draw(self, count: int) -> None:
        if len(self.buffer) < count:
            self.buffer = self.mean.new_empty(count, self.buffer.shape[1])
        rows = self.buffer[:count]
        device = kernels(self.mean)
        if device:
            device.rows(self.mean, self._scale, rows, self._first, self._drawn)
            self._drawn += count
            return
        for part in [rows] if rows.is_cpu else rows.unbind():
            part.normal_(generator=self._generator)
        used = rows[:, : len(self.mean)]
        torch.addcmul(self.mean, self._scale, used, out=used)
