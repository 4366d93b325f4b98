"""What the nets are compared on: the same minibatches, and the same steps without Bayes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.likelihoods.predictive import Predictive


def minibatches(x: Tensor, y: Tensor, *, size: int, seed: int) -> DataLoader[Any]:
    """Makes a loader, in a new order on each pass over the data.

    The same seed gives the same minibatches.

    Arguments:
        x: The inputs, of shape :math:`(N, *)`.
        y: The targets, of shape :math:`(N, *)`.
        size: The number of examples of a minibatch, at most :math:`N`. A last, smaller one is
            left out, since it would weigh its examples more.
        seed: The seed of the orders.
    """
    order = RandomSampler(range(len(y)), generator=torch.Generator().manual_seed(seed))
    # Indices of whole batches: taking examples one by one would last longer than a step.
    sampler = BatchSampler(order, min(size, len(y)), drop_last=True)
    return DataLoader(TensorDataset(x, y), sampler=sampler, batch_size=None)


def progress(title: str, steps: int) -> Any:
    """Makes a bar of training steps, which is shown after a second, on terminals only."""
    return tqdm(desc=title, total=steps, unit="step", delay=1.0, disable=None)


def train(
    net: nn.Module,
    likelihood: Likelihood,
    loader: DataLoader[Any],
    epochs: int,
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
) -> None:
    """Trains a net by maximum likelihood.

    Arguments:
        net: The net.
        likelihood: The likelihood.
        loader: The minibatches.
        epochs: The number of passes over them.
        optimizer: The optimiser of both.
        scheduler: The scheduler of the learning rate by steps.
    """
    with progress("without Bayes", epochs * len(loader)) as bar:
        for _ in range(epochs):
            for x, y in loader:
                loss = -likelihood.log_prob(net(x), y).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                bar.set_postfix_str(f"NLL {loss.item():.4g}", refresh=False)
                bar.update()


def predict(net: nn.Module, likelihood: Likelihood, x: Tensor) -> Predictive:
    """Predicts with one net, as if it were the only draw of a Bayesian one.

    Arguments:
        net: The net.
        likelihood: The likelihood that it was trained with.
        x: The inputs, of shape :math:`(N, *)`.
    """
    with torch.no_grad():
        return Predictive(likelihood.distribution(net(x)[None], batch_dims=2))
