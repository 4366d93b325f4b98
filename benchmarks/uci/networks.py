"""One network per split, as one module: how all splits train, and predict, at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.uci.data import Splits, load, split
from pyro_bayes import ELBO, BayesianModel, fit
from pyro_bayes.likelihoods import HeteroscedasticGaussian
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.priors import Empirical
from pyro_bayes.priors.choice import PriorVar

PRIORS: dict[str, PriorVar] = {
    "unit": 1.0,
    "wide": 10.0,
    "input": {
        "weight1": Empirical(each=(0, 1), least=0.0),
        "weight2": Empirical(each=(0, 2), least=0.0),
        "bias1": Empirical(each=0, least=0.0),
        "bias2": Empirical(each=(0, 2), least=0.0),
    },
    "tensor": Empirical(each=0, least=0.0),
    "empirical": Empirical(each=0),
}
"""The variances of the prior: one number; what maximises the ELBO for each input and each output of
each network, or for each of its tensors, without a least variance; or with the default one."""


@dataclass(frozen=True)
class Setting:
    """How networks are trained; the same for all datasets.

    Arguments:
        steps: The number of steps of Adam, whose learning rate falls to 0 along a cosine.
        learning_rate: The learning rate in the beginning.
        batch_size: The largest number of examples in a batch.
        init_logvar: The initial value of log σ².
        prior: The variances of the prior, one of :data:`PRIORS`.
        draws: The number of draws of the weights that predict.
        seed: The seed.
    """

    steps: int = 3000
    learning_rate: float = 0.01
    batch_size: int = 500
    init_logvar: float = -9.0
    prior: str = "unit"
    draws: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """What came of the splits. What is of shape `(K)` is of each, and in the targets' units.

    Arguments:
        rmse: The root-mean-square error of the predictive mean.
        log_likelihood: The mean log-density, in nats.
        elbo: The mean over the last tenth of the training of the ELBO per datum, in nats; that of
            all splits together, divided by their number.
        seconds: The seconds of the processor.
    """

    rmse: Tensor
    log_likelihood: Tensor
    elbo: float
    seconds: float


class Networks(nn.Module):
    """K networks with a hidden layer of ReLU units, each with inputs of its own.

    Arguments:
        count: The number K of networks.
        inputs: The number D of inputs.
        hidden: The number of hidden units.
    """

    def __init__(self, count: int, inputs: int, hidden: int = 50) -> None:
        super().__init__()
        first, last = inputs**-0.5, hidden**-0.5  # as nn.Linear does
        self.weight1 = nn.Parameter(torch.empty(count, inputs, hidden).uniform_(-first, first))
        self.bias1 = nn.Parameter(torch.empty(count, 1, hidden).uniform_(-first, first))
        self.weight2 = nn.Parameter(torch.empty(count, hidden, 2).uniform_(-last, last))
        self.bias2 = nn.Parameter(torch.tensor([0.0, -1.0]).repeat(count, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes means and raw scales, of shape `(B, K)`, of inputs of shape `(B, K, D)`."""
        hidden = torch.baddbmm(self.bias1, x.transpose(0, 1), self.weight1).relu()
        mean, scale = torch.baddbmm(self.bias2, hidden, self.weight2).unbind(-1)
        return mean.T, scale.T


class Shuffled:
    """Batches of equal size, in another order each time.

    Arguments:
        tensors: What to take batches of, along the first dimension.
        batch_size: The largest size of a batch.
    """

    def __init__(self, *tensors: Tensor, batch_size: int) -> None:
        self._tensors = tensors
        self._count = math.ceil(len(tensors[0]) / batch_size)
        self._size = len(tensors[0]) // self._count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self._count == 1:
            yield self._tensors
            return
        order = torch.randperm(len(self._tensors[0]))
        for start in range(0, self._count * self._size, self._size):
            rows = order[start : start + self._size]
            yield tuple(tensor[rows] for tensor in self._tensors)


def evaluate(splits: Splits, setting: Setting) -> Scores:
    """Trains a network for each split, and predicts.

    The splits share nothing: the ELBO of all is the sum of theirs.

    Arguments:
        splits: The splits.
        setting: How to train.
    """
    torch.manual_seed(setting.seed)
    start = time.process_time()
    size, count, inputs = splits.x.shape
    bnn = BayesianModel(
        Networks(count, inputs), setting.init_logvar, prior_var=PRIORS[setting.prior]
    )
    likelihood = HeteroscedasticGaussian()
    objective = ELBO(bnn, likelihood, num_data=size, local_trick=True)
    loader = Shuffled(splits.x, splits.y, batch_size=setting.batch_size)
    epochs = math.ceil(setting.steps / len(loader))
    optimizer = torch.optim.Adam(objective.parameters(), lr=setting.learning_rate)
    scheduler = CosineAnnealingLR(optimizer, epochs * len(loader))
    history = fit(
        objective, loader, epochs, optimizer=optimizer, scheduler=scheduler, progress=False
    )
    last = history.loss[-math.ceil(epochs / 10) :]
    elbo = -sum(last) / len(last) / count - splits.scale.log().mean().item()

    output = bnn.predict(splits.x_test, setting.draws, statistics="samples").samples
    flat = tuple(part.flatten(1) for part in output)  # each row of each split is an example
    predictive = Predictive(likelihood.distribution(flat, batch_dims=2))
    errors = predictive.mean.view_as(splits.y_test) - splits.y_test
    log_probs = predictive.log_prob(splits.y_test.flatten()).view_as(splits.y_test)
    return Scores(
        errors.square().mean(0).sqrt() * splits.scale,
        log_probs.mean(0) - splits.scale.log(),
        elbo,
        time.process_time() - start,
    )


def run(name: str, folder: Path | None, setting: Setting, validation: bool, count: int) -> Scores:
    """Trains and tests on one dataset, with one thread.

    Arguments:
        name: The name of the dataset.
        folder: Where it is; OpenML if it is `None`.
        setting: How to train.
        validation: Whether to leave the test part alone, see :func:`split`.
        count: The number of splits.
    """
    torch.set_num_threads(1)  # the tensors are small
    return evaluate(split(*load(name, folder), validation=validation, count=count), setting)
