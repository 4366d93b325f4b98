"""The objective for Pyro: the model that :class:`pyro_bayes.ELBO` is the bound of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_bayes.base.checks import check_batch
from pyro_bayes.base.swap import Swap
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.model import BayesianModel
from pyro_bayes.prediction.batches import arguments, called
from pyro_bayes.pyro_bridge import store
from pyro_bayes.pyro_bridge.particles import Particles
from pyro_bayes.training.objective import check_parts

_store_names: weakref.WeakKeyDictionary[Likelihood, str] = weakref.WeakKeyDictionary()


def svi_model(bnn: BayesianModel, likelihood: Likelihood, num_data: int) -> Callable[..., Tensor]:
    r"""Returns the Pyro model that :class:`ELBO` is the bound of.

    Its sites are those of the weights and `"y"`, in a plate `"data"` of size `num_data`, which
    scales minibatches to :math:`N`. So the loss of SVI is :math:`N` times that of :class:`ELBO`;
    with the guide `bnn.exact_kl()` and :class:`pyro.infer.Trace_ELBO`, it is so on each draw. What
    the likelihood learns are `pyro.param` statements of the same parameters, under the name of the
    likelihood's class (with a number, if another living likelihood has it).

    Arguments:
        bnn: The model.
        likelihood: The likelihood.
        num_data: The number :math:`N` of examples in the whole training set, not in a batch.

    Returns:
        A function of `x`, as in :meth:`ELBO.forward`, and of the targets `y`. Without them, it
        samples targets, as for :class:`pyro.infer.Predictive`. It can be pickled, as spawned
        processes need.

    Raises:
        TypeError: If an argument is of the wrong type, as a loss function instead of a likelihood.
        ValueError: If `num_data` is not a positive integer.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_bayes.likelihoods import Gaussian
        >>> bnn = BayesianModel(torch.nn.Linear(3, 1))
        >>> model = svi_model(bnn, Gaussian(0.1, learn=True), num_data=100)
        >>> guide = bnn.exact_kl(local_trick=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(20, 3), torch.randn(20, 1))
    """
    check_parts(bnn, likelihood, num_data)
    return _Model(bnn, likelihood, num_data)


class _Model:
    """A Pyro model of a network and a likelihood.

    It is an object, because functions that a function returns cannot be pickled.

    Arguments:
        bnn: The model of the network.
        likelihood: The likelihood.
        num_data: The number of examples.
    """

    def __init__(self, bnn: BayesianModel, likelihood: Likelihood, num_data: int) -> None:
        self._bnn, self._likelihood, self._num_data = bnn, likelihood, num_data

    def __call__(self, x: Any, y: Tensor | None = None) -> Tensor:
        args, kwargs = arguments(x)
        with self._bnn.lift() as net, _stated(self._likelihood):
            output = called(net, args, kwargs)
            batch_dims = 2 if isinstance(net, Particles) else 1
            if y is None:
                distribution = self._likelihood.distribution(output, batch_dims=batch_dims)
                size = total = distribution.batch_shape[-1]
            else:
                size = y.shape[0] if isinstance(y, Tensor) and y.dim() else 1
                total = self._num_data
                check_batch(size, total)
            with pyro.plate("data", total, subsample=torch.arange(size)):
                return self._likelihood.sample("y", output, y, batch_dims=batch_dims)


@contextmanager
def _stated(likelihood: Likelihood) -> Iterator[None]:
    """Makes the `pyro.param` statements of a likelihood, and holds their values in it."""
    trained = {n: p for n, p in likelihood.named_parameters() if p.requires_grad}
    if trained and likelihood not in _store_names:
        _store_names[likelihood] = store.claim(type(likelihood).__name__, likelihood)
    name = _store_names.get(likelihood)
    values = {n: store.statement(f"{name}.likelihood.{n}", p) for n, p in trained.items()}
    with Swap(likelihood, {n: [n] for n in trained})(values):
        yield
