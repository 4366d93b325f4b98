"""Tensors that an autograd node keeps for as many backward passes as there are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Kept:
    """Tensors that a node of the autograd graph needs in the backward pass.

    Autograd frees what `save_for_backward` saved in the first backward pass. What is drawn once in
    a context serves all losses that are computed in it, and each of them may have a backward pass
    of its own. So the node keeps these tensors itself, for as long as it lives. None of them may be
    a differentiable output of the node: that would be a cycle of references.

    Arguments:
        tensors: The tensors, or `None`.

    Example:
        >>> x = torch.zeros(2)
        >>> kept = Kept(x)
        >>> bool(kept.tensors[0] is x)
        True
        >>> _ = x.add_(1)
        >>> kept.tensors
        Traceback (most recent call last):
        RuntimeError: Expected the posterior to stay what it was ... modified by an inplace ...
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = tensors
        self._versions = _versions(tensors)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors.

        Raises:
            RuntimeError: If one of them has changed in place.
        """
        if _versions(self._tensors) != self._versions:
            raise RuntimeError(
                "Expected the posterior to stay what it was from the forward to the backward pass;"
                " got one of the variables needed for gradient computation that has been modified"
                " by an inplace operation. Run all backward passes before the optimiser's step, and"
                " open a new context after it."
            )
        return self._tensors


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    # What was made in inference mode counts no changes, and needs no gradient.
    return [-1 if t is None or t.is_inference() else t._version for t in tensors]
