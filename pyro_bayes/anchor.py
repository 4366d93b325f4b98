"""How a divergence that follows draws shares the nodes of these in the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

Posterior = Mapping[str, tuple[Tensor, Tensor]]
Group = tuple[list[str], tuple[Tensor, ...], tuple[Tensor, ...]]
Serves = Literal["all", "each"]
Moments = list[tuple[int, float, float, float, float]]
"""Of each block: its size, the sums of μ², σ² and log σ², and the largest log σ²."""


class Anchor:
    """Where the gradient of a posterior's divergence can go: to the nodes of draws from it.

    Arguments:
        groups: The parameters of each node, with the two outputs that take the gradient, and what
            the divergence can be computed from, if anything.
        serves: Whether these outputs are single numbers, for the divergence of all parameters, or
            vectors, for that of each.
    """

    def __init__(
        self, groups: Sequence[tuple[Group, Sequence[Tensor], Moments]], serves: Serves
    ) -> None:
        self.groups, self.serves = groups, serves
        self._parameters = [p for (_, m, v), _, _ in groups for p in (*m, *v)]
        self._state = self._look()

    def is_of(self, posterior: Posterior) -> bool:
        """Tells whether the posterior is the one that was drawn from, and has not changed since."""
        pairs = {id(p) for pair in posterior.values() for p in pair}
        return pairs == set(map(id, self._parameters)) and self._look() == self._state

    def _look(self) -> list[Any]:
        kinds = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        return [*versions(self._parameters), *kinds]


class Latest:
    """The anchor of the latest draws of a model, which copies and pickles do without."""

    _anchor: Anchor | None = None

    def put(self, anchor: Anchor | None, originals: Mapping[str, Tensor]) -> None:
        """Keeps an anchor, while the base's own parameters stay what they are."""
        self._anchor, self._versions = anchor, versions([*originals.values()])

    def take(self, originals: Mapping[str, Tensor]) -> Anchor | None:
        """Returns the anchor once, unless the base, whose storage the means share, has changed."""
        anchor, self._anchor = self._anchor, None
        return anchor if anchor and self._versions == versions([*originals.values()]) else None

    def __reduce__(self) -> tuple[type[Latest], tuple[()]]:
        return Latest, ()


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Returns how often each tensor was changed in place."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # what was made in inference mode has no version
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
