"""Handwritten digits, classified through Pyro's SVI."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Trace_ELBO
from pyro.optim.lr_scheduler import PyroLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from pyro_bayes import BayesianModel, svi_model
from pyro_bayes.demo import figure, plain, report
from pyro_bayes.evaluation import metrics
from pyro_bayes.likelihoods import Categorical
from pyro_bayes.likelihoods.predictive import Predictive

_BATCH_SIZE = 256
_LEARNING_RATE = 0.02
_LAST_LEARNING_RATE = 0.004


@dataclass(frozen=True)
class Digits:
    """Labelled images.

    Arguments:
        images: The images, of shape :math:`(N, 64)`.
        labels: The digits that they show, of shape :math:`(N,)`.
    """

    images: Tensor
    labels: Tensor


def run(*, seed: int, epochs: int, draws: int, path: Path) -> None:
    """Trains both nets, prints their scores and draws the figure.

    Arguments:
        seed: The seed of the split and of the minibatches.
        epochs: The number of passes over the images to learn from.
        draws: The number of draws of the net that predictions are averaged over.
        path: The figure's file.
    """
    train, test = load(seed)
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    other = copy.deepcopy(net)
    # With a narrower prior, a factorised posterior over 7510 weights stays underconfident after
    # 1347 images.
    bnn = BayesianModel(net, init_logvar=-4.0, prior_var=10.0)
    likelihood = Categorical()

    train_plain(other, train, epochs=epochs, seed=seed)
    train_bayesian(bnn, train, epochs=epochs, seed=seed)

    predictions = {
        "without Bayes": plain.predict(other, likelihood, test.images),
        "Bayesian": likelihood.predictive(bnn, test.images, num_samples=draws),
    }
    report.show(
        f"Digits: {len(train.labels)} images to learn from, {len(test.labels)} to test",
        {name: score(prediction, test.labels) for name, prediction in predictions.items()},
        error="misclassified",
        calibration="calibration error (15 bins)",
    )
    figure.draw_digits(path, predictions, test.images, test.labels)


def load(seed: int) -> tuple[Digits, Digits]:
    """Loads the digits of scikit-learn.

    Arguments:
        seed: The seed of the split.

    Returns:
        Three quarters of the images to learn from and one to test, with equal shares of each
        digit. Pixels are standardised by the mean and deviation of all pixels to learn from.
    """
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    mean, scale = x.mean(), x.std()

    def digits(images: NDArray[Any], labels: NDArray[Any]) -> Digits:
        standard = (images - mean) / scale
        return Digits(torch.as_tensor(standard, dtype=torch.float32), torch.as_tensor(labels))

    return digits(x, y), digits(x_test, y_test)


def train_plain(net: nn.Module, train: Digits, *, epochs: int, seed: int) -> None:
    """Trains a net by maximum likelihood.

    Arguments:
        net: The net.
        train: The digits to learn from.
        epochs: The number of passes over them.
        seed: The seed of the minibatches.
    """
    loader = plain.minibatches(train.images, train.labels, size=_BATCH_SIZE, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    scheduler = ExponentialLR(optimizer, _decay(epochs * len(loader)))
    plain.train(net, Categorical(), loader, epochs, optimizer=optimizer, scheduler=scheduler)


def train_bayesian(bnn: BayesianModel, train: Digits, *, epochs: int, seed: int) -> None:
    """Trains a net's posterior by stochastic variational inference, in the same steps.

    Arguments:
        bnn: The Bayesian net.
        train: The digits to learn from.
        epochs: The number of passes over them.
        seed: The seed of the minibatches.
    """
    count = len(train.labels)
    loader = plain.minibatches(train.images, train.labels, size=_BATCH_SIZE, seed=seed)
    steps = epochs * len(loader)
    optimizer = PyroLRScheduler(
        ExponentialLR,
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": _LEARNING_RATE},
            "gamma": _decay(steps),
        },
    )
    svi = SVI(svi_model(bnn, Categorical(), count), bnn.guide, optimizer, Trace_ELBO())
    with plain.progress("Bayesian", steps) as bar:
        for _ in range(epochs):
            for x, y in loader:
                loss = svi.step(x, y)
                optimizer.step()
                bar.set_postfix_str(f"ELBO {-loss / count:.4g}", refresh=False)
                bar.update()


def _decay(steps: int) -> float:
    return float((_LAST_LEARNING_RATE / _LEARNING_RATE) ** (1 / steps))


def score(prediction: Predictive, labels: Tensor) -> report.Score:
    """Scores a prediction.

    Arguments:
        prediction: The prediction.
        labels: The true classes, of shape :math:`(N,)`.
    """
    confidence, predicted = prediction.probs.max(-1)
    right = predicted == labels
    return report.Score(
        prediction.log_prob(labels),
        f"{1 - right.double().mean():.1%}",
        f"{metrics.calibration_error(confidence, right):.3f}",
    )
