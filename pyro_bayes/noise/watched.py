"""Noise that is watched: what operators meet, and other noise for some of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_bayes.noise.context import ContextNoise

Calls: TypeAlias = dict[tuple[str, ...], list[tuple[Tensor, ...]]]
"""What each operator met besides its Gaussian tensors, call by call."""


class WatchedNoise(ContextNoise):
    """The noise of several calls, of which some examples have another."""

    watched = True

    def __init__(self, noise: ContextNoise) -> None:
        super().__init__(noise.estimator, noise.batch_dim, seed=0)
        self._other = ContextNoise(noise.estimator, noise.batch_dim, seed=1)
        self.chosen: Tensor | None = None
        """Which examples have the other noise."""
        self.only: frozenset[str] | None = None
        """The parameters whose noise is another, all by default."""

    def begin(self, size: int) -> None:
        """Begins a call."""
        self.batch_size = self._other.batch_size = size
        self.uses, self._seen = {}, {}
        self.pinned, self.ruled, self.handed = set(), set(), set()
        self.parameters: dict[tuple[str, ...], Sequence[str]] = {}
        self.inputs: Calls = {}

    def met(
        self, source: tuple[str, ...], parameters: Sequence[str], inputs: Sequence[Tensor]
    ) -> None:
        self.parameters[source] = parameters
        if self.chosen is None and not self.is_transformed():
            call = tuple(x.detach().clone() for x in inputs)
            self.inputs.setdefault(source, []).append(call)

    def normal(self, source: tuple[str, ...], like: Tensor, example: int | None = 0) -> Tensor:
        own = super().normal(source, like, example)
        mask = None if example is None else self._mask(like.shape[example])
        if mask is None or not self._is_wanted(self.parameters[source]):
            return own
        shape = [-1 if d == example else 1 for d in range(like.dim())]
        return torch.where(mask.view(shape), self._other.normal(source, like, example), own)

    def signs(self, source: tuple[str, ...], count: int, size: int, like: Tensor) -> Tensor:
        own, mask = super().signs(source, count, size, like), self._mask(count)
        if mask is None or not self._is_wanted(source[:1]):
            return own
        other = self._other.signs(self._sharing[source], count, size, like)
        return torch.where(mask.unsqueeze(-1), other, own)

    def _mask(self, count: int) -> Tensor | None:
        """Returns which rows have the other noise."""
        each = self.rows_per_example(count)
        if self.chosen is None or each is None:
            return None
        chosen = self.chosen
        return chosen.repeat_interleave(each) if self.batch_dim == 0 else chosen.repeat(each)

    def _is_wanted(self, parameters: Sequence[str]) -> bool:
        return self.only is None or not self.only.isdisjoint(parameters)
