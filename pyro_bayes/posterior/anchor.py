"""How a divergence that follows draws shares the nodes of these in the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

Posterior = Mapping[str, tuple[Tensor, Tensor]]
Group = tuple[tuple[str, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
Serves = Literal["all", "each"]
Totals = list[tuple[int, float, float, float]]
"""Of each block: its size and the sums of μ², σ² and log σ²."""


class Shared:
    """What a node of draws and the divergence that sends it a gradient tell each other.

    Attributes:
        totals: What the divergence can be computed from; none if it is to look at the parameters.
        prior_var: The variance of the prior that the divergence is from, once there is one.
    """

    def __init__(self) -> None:
        self.totals: Totals = []
        self.prior_var: float | None = None


class Anchor:
    """Where the gradient of a posterior's divergence can go: to the nodes of draws from it.

    Arguments:
        groups: The parameters of each node, with the output that takes the gradient, and what it
            shares with the divergence.
        serves: Whether this output is a single number, for the divergence of all parameters, or a
            vector, for that of each.
    """

    def __init__(self, groups: Sequence[tuple[Group, Tensor, Shared]], serves: Serves) -> None:
        self.groups, self.serves = groups, serves
        self._parameters = [p for (_, m, v), _, _ in groups for p in (*m, *v)]
        self._ids, self._state = set(map(id, self._parameters)), self._look()

    def takes(self, serves: Serves, posterior: Posterior, prior_var: float) -> bool:
        """Tells whether a divergence can send its gradient here, and if so, from which prior.

        It cannot if another divergence does, from another prior.
        """
        if serves != self.serves or not self.is_of(posterior):
            return False
        for _, _, shared in self.groups:
            if shared.prior_var not in (None, prior_var):
                return False
            shared.prior_var = prior_var
        return True

    def is_of(self, posterior: Posterior) -> bool:
        """Tells whether the posterior is the one that was drawn from, and has not changed since."""
        found = {id(p) for pair in posterior.values() for p in pair}
        return found == self._ids and self._look() == self._state

    def _look(self) -> tuple[list[int], list[Any]]:
        kinds = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        return versions(self._parameters), kinds


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
