"""What a training run was, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class History:
    """Losses by epoch, in nats per datum, averaged over an epoch's examples while they trained.

    Arguments:
        nll: The mean negative log-likelihood of an example.
        kl: The KL divergence divided by the size of the dataset, without a weight.
        loss: What was minimised: `nll` and the weighted `kl`.
        learning_rate: The learning rate of the optimiser's first group at the end.
        validation: The mean negative log-density of a validation example, if there are any, under
            the mixture over draws: for a well-trained posterior, it is below `nll`, which is the
            mean under single draws.

    Example:
        >>> history = History(nll=[2.0, 1.0], kl=[0.5, 0.25], validation=[1.5, 1.75])
        >>> history.elbo, history.best
        ([-2.5, -1.25], 0)
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def elbo(self) -> list[float]:
        """The evidence lower bound per datum, with the whole divergence."""
        return [-(nll + kl) for nll, kl in zip(self.nll, self.kl, strict=True)]

    @property
    def best(self) -> int | None:
        """The index of the epoch with the lowest validation loss, `None` without validation."""
        losses = [math.inf if math.isnan(loss) else loss for loss in self.validation]
        return losses.index(min(losses)) if losses else None
