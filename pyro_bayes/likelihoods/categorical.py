"""One of several classes."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch.distributions import Distribution

from pyro_bayes.likelihoods.likelihood import Likelihood


class Categorical(Likelihood):
    r"""Labels of one of :math:`C` classes, whose logits are the output.

    .. math:: p(y \mid f) = \prod_k \frac{e^{f_{k, y_k}}}{\sum_c e^{f_{k, c}}}

    The classes are the last dimension of the output, :math:`(B, *, C)`, and the target holds
    integers from 0 to :math:`C - 1`, of shape :math:`(B, *)`. Networks for images that have the
    classes second need `output.movedim(1, -1)`.

    Example:
        >>> Categorical().log_prob(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])
    """

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        logits = self.as_real(output, batch_dims)
        if logits.dim() == batch_dims or logits.shape[-1] < 2:
            raise ValueError(
                "Expected an output for Categorical whose last dimension holds the logits of two"
                f" or more classes; got the shape {tuple(logits.shape)}. One logit for 0 or 1 is"
                " for Bernoulli()."
            )
        return self.per_example(dist.Categorical(logits=logits, validate_args=False), batch_dims)
