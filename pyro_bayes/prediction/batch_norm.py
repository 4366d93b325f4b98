"""Batch norm under the posterior: its running statistics, and whether they are stale."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from pyro_bayes.base.freshness import Model, is_fresh, mark, running_norms
from pyro_bayes.base.state import Buffers
from pyro_bayes.prediction.batches import arguments, called, each_batch


class Reparameterized(Model, Protocol):
    """What is known of a model here: that its base can hold a draw."""

    def reparameterize(self) -> AbstractContextManager[nn.Module]:
        """Holds a draw in the base, as :meth:`pyro_bayes.BayesianModel.reparameterize` does."""


def update_batch_norm(bnn: Reparameterized, loader: Iterable[Any]) -> None:
    r"""Computes the running statistics of batch norms anew, under the posterior as it is now.

    What training leaves are running averages over the last few draws, from posteriors that have
    since changed. This replaces them by the averages over all batches, each with a draw of its own,
    for a network that predicts in evaluation mode. All other modules are in evaluation mode
    meanwhile. After an error, the statistics are as before. A network without batch norm is left
    alone.

    Predictions in evaluation mode warn when the statistics are stale: when a parameter, or the
    statistics themselves, have changed since this call, or, without one, since the model was made.
    Conversions and copies keep that knowledge; a state dict is trusted when it is loaded.

    Arguments:
        bnn: The model.
        loader: The batches of the training set, of inputs or of pairs (x, y), whose y is left out.
            Several passes over the data average over more draws.

    Raises:
        ValueError: If there is no batch, one has more than two parts, or statistics are not finite.
        TypeError: If a batch is not of tensors.

    See Also:
        :func:`torch.optim.swa_utils.update_bn`, for networks without a posterior.

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> bnn = BayesianModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        >>> update_batch_norm(bnn, [torch.randn(20, 3) for _ in range(10)])
        >>> bnn.base[1].num_batches_tracked
        tensor(10)
    """
    norms = running_norms(bnn)
    if not norms:
        return
    buffers, momenta = Buffers(norms), [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        for x in each_batch(loader):
            with bnn.reparameterize() as base, torch.no_grad():
                base.eval()
                for norm in norms:
                    norm.train()
                called(base, *arguments(x))
        if not all(buffer.isfinite().all() for norm in norms for buffer in norm.buffers()):
            raise ValueError(
                "Expected statistics that are finite; got nan or inf. Are the inputs and the"
                " posterior finite?"
            )
    except BaseException:
        buffers.restore()
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    mark(bnn)


def warn_if_stale(model: Model) -> None:
    """Warns if a batch norm is about to use statistics of other parameters.

    Arguments:
        model: The model.

    Warns:
        UserWarning: If so.
    """
    if any(not norm.training for norm in running_norms(model)) and not is_fresh(model):
        warnings.warn(
            "Expected batch norms whose running statistics belong to the posterior; got some from"
            " before it last changed. Call"
            " `pyro_bayes.prediction.batch_norm.update_batch_norm(bnn, loader)` after training.",
            stacklevel=3,
        )
