r"""Measures how much the ELBO's stochastic gradient varies under each estimator.

After some epochs of training, everything is held fixed, the minibatch included, but the noise of
:meth:`~pyro_bayes.BayesianModel.reparameterize`. What is reported of the gradient :math:`g` of the
mean negative log-likelihood is its variance per element, averaged over the elements of a layer,

.. math:: \frac{1}{P} \sum_{i=1}^P \operatorname{Var}_\epsilon[g_i],

separately for the means :math:`\mu` and for :math:`\log \sigma^2`. The divergence adds no variance,
since it is computed in closed form.

References:
    | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015), table 1
    | https://arxiv.org/abs/1506.02557
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import zuko
from section import Section, publish, table
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

from pyro_bayes import BayesianModel

Batch: TypeAlias = tuple[Tensor, ...]
Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Estimator: TypeAlias = bool | Literal["flipout"]

BATCH_SIZE = 200
BASELINE = "one draw of the weights"
ESTIMATORS: dict[str, Estimator] = {BASELINE: False, "flipout": "flipout", "local noise": True}
SYMBOLS = {"means": "μ", "logvars": "log σ²"}
LAYERS = ("first", "last", "all")
README = Path(__file__).with_name("README.md")
MARK = "gradient-variance"


@dataclass(frozen=True)
class Setting:
    """A network, its data and its training.

    Arguments:
        title: What stands above the table.
        data: Returns the whole dataset.
        build: Returns the network.
        loss: Returns the mean negative log-likelihood of a batch.
        epochs: The numbers of epochs after which gradients are measured, in increasing order.
        prior_var: The variance of the prior.
        init_logvar: The initial value of log σ².
        learning_rate: The learning rate of Adam.
    """

    title: str
    data: Callable[[], Batch]
    build: Callable[[], nn.Module]
    loss: Loss
    epochs: tuple[int, ...]
    prior_var: float = 0.1
    init_logvar: float = -6.0
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Moments:
    """What is kept of a number of draws of the gradient.

    Arguments:
        mean: The mean gradient by kind of parameter.
        variance: The mean variance per element, by kind of parameter and layer.
        error: The standard errors of these variances, relative to them.
    """

    mean: dict[str, Tensor]
    variance: dict[tuple[str, str], float]
    error: dict[tuple[str, str], float]


@dataclass(frozen=True)
class Checkpoint:
    """What is measured at one point of training.

    Arguments:
        nll: The mean negative log-likelihood of the minibatch, averaged over draws of the weights.
        moments: The moments of its gradient, by estimator.
    """

    nll: float
    moments: dict[str, Moments]

    def factor(self, name: str, key: tuple[str, str]) -> float:
        """Returns how many times lower than the baseline's the variance of an estimator is."""
        return self.moments[BASELINE].variance[key] / self.moments[name].variance[key]


def digits() -> Batch:
    """Returns the images of scikit-learn's digits, between 0 and 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images / 16, dtype=torch.float32)
    return x.view(-1, 1, 8, 8), torch.as_tensor(labels)


def moons() -> Batch:
    """Returns the points of two half circles."""
    points, _ = make_moons(1000, noise=0.05, random_state=0)
    return (torch.as_tensor(points, dtype=torch.float32),)


def dense() -> nn.Module:
    """Returns a net with three hidden layers of 200 units."""
    sizes = (64, 200, 200, 200)
    hidden = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, 10))


def convolutional() -> nn.Module:
    """Returns a net with two convolutions."""
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
    )
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 10))


def flow() -> nn.Module:
    """Returns a neural spline flow in two dimensions."""
    return zuko.flows.NSF(features=2, transforms=3, hidden_features=(64, 64))


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean negative log-likelihood of labels."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def density(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean negative log-density of points."""
    loss: Tensor = -model().log_prob(*batch).mean()
    return loss


DENSE = Setting("Digits, 64-200-200-200-10 ReLU net", digits, dense, classification, (10, 30))
SETTINGS = (
    DENSE,
    replace(DENSE, title=f"{DENSE.title}, with a wider prior", prior_var=1.0),
    Setting("Digits, two convolutions", digits, convolutional, classification, (10, 30)),
    Setting("Two moons, neural spline flow", moons, flow, density, (20, 100), init_logvar=-7.0),
)


def checkpoints(setting: Setting, draws: int) -> Iterator[Checkpoint]:
    """Trains a network with local noise, and measures its gradients at each checkpoint.

    Arguments:
        setting: The network, its data and its training.
        draws: The number of draws of each gradient.

    Yields:
        What was measured after each of the numbers of epochs.
    """
    data = setting.data()
    bnn = BayesianModel(
        setting.build(), init_logvar=setting.init_logvar, prior_var=setting.prior_var
    )
    optimizer = torch.optim.Adam(bnn.parameters(), lr=setting.learning_rate)
    batch = _rows(data, torch.randperm(len(data[0]))[:BATCH_SIZE])
    for epoch in range(1, max(setting.epochs) + 1):
        train(bnn, setting.loss, data, optimizer)
        if epoch in setting.epochs:
            with torch.random.fork_rng():
                moments = {
                    name: measure(bnn, setting.loss, batch, estimator, draws)
                    for name, estimator in ESTIMATORS.items()
                }
                nll = mean_loss(bnn, setting.loss, batch)
            yield Checkpoint(nll, moments)


def train(bnn: BayesianModel, loss: Loss, data: Batch, optimizer: torch.optim.Adam) -> None:
    """Trains a network with local noise for one epoch."""
    count = len(data[0])
    for indices in torch.randperm(count).split(BATCH_SIZE):
        with bnn.reparameterize(local_trick=True) as model:
            nll = loss(model, _rows(data, indices))
        optimizer.zero_grad()
        (nll + bnn.kl_divergence() / count).backward()
        optimizer.step()


def mean_loss(bnn: BayesianModel, loss: Loss, batch: Batch) -> float:
    """Returns a batch's mean negative log-likelihood, averaged over draws of the weights."""
    losses = []
    for _ in range(20):
        with torch.no_grad(), bnn.reparameterize() as model:
            losses.append(loss(model, batch))
    return torch.stack(losses).mean().item()


def measure(
    bnn: BayesianModel, loss: Loss, batch: Batch, estimator: Estimator, draws: int
) -> Moments:
    """Draws the gradient at the same point again and again.

    Welford's algorithm averages, over draws, terms of which each has the variance of one draw as
    its expectation, so that their own spread tells the error of the average.

    Arguments:
        bnn: The network.
        loss: Returns the mean negative log-likelihood of a batch.
        batch: The batch.
        estimator: The argument `local_trick`.
        draws: The number of draws.
    """
    layers = _layers(bnn)
    mean = {kind: torch.zeros((), dtype=torch.float64) for kind in SYMBOLS}
    terms: list[list[float]] = []
    for n in range(draws):
        row = []
        for kind, gradient in _gradient(bnn, loss, batch, estimator).items():
            before = gradient - mean[kind]
            mean[kind] = mean[kind] + before / (n + 1)
            product = before * (gradient - mean[kind])
            row += [product[layers[layer]].mean().item() for layer in LAYERS]
        if n > 0:
            terms.append(row)
    keys = [(kind, layer) for kind in SYMBOLS for layer in LAYERS]
    values = torch.tensor(terms, dtype=torch.float64)
    variance = values.mean(0)
    error = values.std(0) / math.sqrt(len(terms)) / variance
    by_key = [dict(zip(keys, moment.tolist(), strict=True)) for moment in (variance, error)]
    return Moments(mean, *by_key)


def _gradient(
    bnn: BayesianModel, loss: Loss, batch: Batch, estimator: Estimator
) -> dict[str, Tensor]:
    with bnn.reparameterize(local_trick=estimator) as model:
        value = loss(model, batch)
        gradients = torch.autograd.grad(value, list(bnn.guide.parameters()))  # μ, log σ²
    return {kind: g.double() for kind, g in zip(SYMBOLS, gradients, strict=True)}


def _layers(bnn: BayesianModel) -> dict[str, slice]:
    """Returns where the parameters of each layer are in the flattened gradient."""
    sizes: dict[str, int] = {}
    for name, parameter in bnn.guide.means.named_parameters():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    first, *_, last = sizes.values()
    return {"first": slice(first), "last": slice(-last, None), "all": slice(None)}


def _rows(data: Batch, indices: Tensor) -> Batch:
    return tuple(part[indices] for part in data)


def variances(setting: Setting, points: Sequence[Checkpoint]) -> str:
    """Returns the table of variances of one network, in Markdown."""
    header = ["gradient of", "estimator"] + [
        f"epoch {epoch}: {layer}" if layer == LAYERS[0] else layer
        for epoch in setting.epochs
        for layer in LAYERS
    ]
    rows = [
        [symbol, name] + [_cell(point, name, (kind, layer)) for point in points for layer in LAYERS]
        for kind, symbol in SYMBOLS.items()
        for name in ESTIMATORS
    ]
    nll = " and ".join(f"{p.nll:.2f}" for p in points)
    title = (
        f"**{setting.title}.** prior_var={setting.prior_var:g},"
        f" init_logvar={setting.init_logvar:g}. Negative log-likelihood of the minibatch: {nll}"
        " nats per example."
    )
    return f"{title}\n\n{table(header, rows, labels=2)}"


def agreement(results: Mapping[Setting, Sequence[Checkpoint]], draws: int) -> str:
    """Returns the table that compares the estimators' mean gradients, in Markdown."""
    pairs = list(combinations(ESTIMATORS, 2))
    header = ["network", "epoch", "gradient of"] + [f"{a}, {b}" for a, b in pairs]
    rows = [
        [setting.title, str(epoch), symbol]
        + [f"{_distance(point, kind, pair, draws):.2f}" for pair in pairs]
        for setting, points in results.items()
        for epoch, point in zip(setting.epochs, points, strict=True)
        for kind, symbol in SYMBOLS.items()
    ]
    return table(header, rows, labels=3)


def _distance(point: Checkpoint, kind: str, pair: tuple[str, str], draws: int) -> float:
    """Returns how far two mean gradients are apart, relative to what noise alone would do."""
    a, b = (point.moments[name] for name in pair)
    difference = a.mean[kind] - b.mean[kind]
    variance = (a.variance[kind, "all"] + b.variance[kind, "all"]) / draws
    return (difference.square().mean() / variance).sqrt().item()


def _cell(point: Checkpoint, name: str, key: tuple[str, str]) -> str:
    variance = f"{point.moments[name].variance[key]:.1e}"
    if name == BASELINE:
        return variance
    factor = point.factor(name, key)
    return f"{variance} ({factor:.{0 if factor >= 99.5 else 1}f}×)"


def errors(points: Iterable[Checkpoint]) -> str:
    """Returns the largest standard error of the variances of each estimator, in words."""
    largest = {
        name: max(max(p.moments[name].error.values()) for p in points) for name in ESTIMATORS
    }
    return ", ".join(f"{error:.0%} ({name})" for name, error in largest.items())


def report(settings: Sequence[Setting], draws: int, seed: int) -> Iterator[str]:
    """Measures the gradients of some networks.

    Arguments:
        settings: The networks, their data and their training.
        draws: The number of draws of each gradient, at least 3.
        seed: The seed of each network's data, training and draws.

    Yields:
        The parts of the report, in Markdown.
    """
    results: dict[Setting, list[Checkpoint]] = {}
    for setting in settings:
        torch.manual_seed(seed)
        results[setting] = list(checkpoints(setting, draws))
        yield variances(setting, results[setting])
    yield agreement(results, draws)
    worst = errors([point for points in results.values() for point in points])
    yield f"{draws} draws, seed {seed}. Largest standard errors of the variances: {worst}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the report, and writes it to the README of this folder."""
    parser = argparse.ArgumentParser(description="Variance of the ELBO's gradient, by estimator.")
    parser.add_argument("--draws", type=int, default=400, help="draws of each gradient (400)")
    parser.add_argument("--seed", type=int, default=0, help="the seed (0)")
    parser.add_argument("--smoke", action="store_true", help="three draws after one epoch")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the file with the marks of the section {MARK!r}, between which the report is"
        " written; by default the README of this folder, or with --smoke none",
    )
    options = parser.parse_args(arguments)
    if options.draws < 3:
        parser.error(f"Expected --draws to be at least 3; got {options.draws}.")
    path = options.output or (None if options.smoke else README)
    section = Section(path, MARK) if path else None
    if section:
        section.surroundings()  # raises before the work is done

    torch.set_num_threads(1)  # the nets are small
    settings = [replace(s, epochs=(1,)) for s in SETTINGS] if options.smoke else SETTINGS
    publish(report(settings, 3 if options.smoke else options.draws, options.seed), section)


if __name__ == "__main__":
    main()
