"""Handwritten digits, classified through Pyro's SVI."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Trace_ELBO
from pyro.optim.lr_scheduler import PyroLRScheduler
from sklearn.calibration import calibration_curve
from sklearn.datasets import load_digits
from sklearn.metrics import zero_one_loss
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from pyro_bayes import BayesianModel
from pyro_bayes.demo import figure, report
from pyro_bayes.demo.loop import minibatches, progress

_BATCH_SIZE = 256
_LEARNING_RATE = 0.02
_LAST_LEARNING_RATE = 0.004
_BINS = 15


@dataclass(frozen=True)
class Digits:
    """Labelled images.

    Arguments:
        images: The images, of shape :math:`(N, 64)`.
        labels: The digits that they show, of shape :math:`(N,)`.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Reliability:
    """How often a net is right, by how confident it is.

    Arguments:
        confidence: The mean confidence of each of :math:`K` bins that are not empty.
        accuracy: The share of right predictions in each bin.
        count: The number of predictions in each bin.
    """

    confidence: NDArray[Any]
    accuracy: NDArray[Any]
    count: NDArray[Any]

    @property
    def error(self) -> float:
        """The expected calibration error."""
        gap = np.abs(self.accuracy - self.confidence)
        return float(np.average(gap, weights=self.count))


def run(*, seed: int, steps: int, draws: int, path: Path) -> None:
    """Trains both nets, prints their scores and draws the figure.

    Arguments:
        seed: The seed of the split and of the minibatches.
        steps: The number of training steps.
        draws: The number of draws of the net that predictions are averaged over.
        path: The figure's file.
    """
    train, test = load(seed)
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    plain = copy.deepcopy(net)
    # With a narrower prior, a factorised posterior over 7510 weights stays underconfident after
    # 1347 images.
    bnn = BayesianModel(net, init_logvar=-4.0, prior_var=10.0)

    train_plain(plain, train, steps=steps, seed=seed)
    train_bayesian(bnn, train, steps=steps, seed=seed)

    with torch.no_grad():
        predictions = {
            "without Bayes": plain(test.images).log_softmax(-1),
            "Bayesian": predict(bnn, test.images, draws=draws),
        }
    curves = {name: reliability(p, test.labels) for name, p in predictions.items()}
    scores = {
        name: report.Score(
            -nn.functional.nll_loss(log_probs, test.labels, reduction="none"),
            f"{zero_one_loss(test.labels, log_probs.argmax(-1)):.1%}",
            f"{curves[name].error:.3f}",
        )
        for name, log_probs in predictions.items()
    }
    report.show(
        f"Digits: {len(train.labels)} images to learn from, {len(test.labels)} to test",
        scores,
        error="misclassified",
        calibration=f"calibration error ({_BINS} bins)",
    )
    figure.draw_digits(path, curves, test.images, test.labels, predictions["Bayesian"].exp())


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


def train_plain(net: nn.Module, train: Digits, *, steps: int, seed: int) -> None:
    """Trains a net by maximum likelihood.

    Arguments:
        net: The net.
        train: The digits to learn from.
        steps: The number of steps.
        seed: The seed of the minibatches.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    scheduler = ExponentialLR(optimizer, _decay(steps))
    with progress("Digits without Bayes", steps) as advance:
        for i in minibatches(len(train.labels), size=_BATCH_SIZE, steps=steps, seed=seed):
            loss = nn.functional.cross_entropy(net(train.images[i]), train.labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            advance(f"log-likelihood {-loss.item():.3f} nats per image")


def train_bayesian(bnn: BayesianModel, train: Digits, *, steps: int, seed: int) -> None:
    """Trains a net's posterior by stochastic variational inference, in the same steps.

    Arguments:
        bnn: The Bayesian net.
        train: The digits to learn from.
        steps: The number of steps.
        seed: The seed of the minibatches.
    """
    count = len(train.labels)

    def model(indices: Tensor) -> None:
        with bnn.lift() as net:
            logits = net(train.images[indices])
        with pyro.plate("data", count, subsample=indices):
            pyro.sample("label", dist.Categorical(logits=logits), obs=train.labels[indices])

    optimizer = PyroLRScheduler(
        ExponentialLR,
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": _LEARNING_RATE},
            "gamma": _decay(steps),
        },
    )
    svi = SVI(model, bnn.guide, optimizer, Trace_ELBO())
    with progress("Digits, Bayesian", steps) as advance:
        for i in minibatches(count, size=_BATCH_SIZE, steps=steps, seed=seed):
            loss = svi.step(i)
            optimizer.step()
            advance(f"ELBO {-loss / count:.2f} nats per image")


def _decay(steps: int) -> float:
    return float((_LAST_LEARNING_RATE / _LEARNING_RATE) ** (1 / steps))


def predict(bnn: BayesianModel, images: Tensor, *, draws: int) -> Tensor:
    """Averages the predicted probabilities over draws of the net.

    Arguments:
        bnn: The Bayesian net.
        images: The images, of shape :math:`(N, 64)`.
        draws: The number of draws.

    Returns:
        The logarithms of the averages, of shape :math:`(N, 10)`.
    """
    log_probs = []
    for _ in range(draws):
        with torch.no_grad(), bnn.reparameterize() as net:
            log_probs.append(net(images).log_softmax(-1))
    return torch.stack(log_probs).logsumexp(0) - math.log(draws)


def reliability(log_probs: Tensor, labels: Tensor) -> Reliability:
    """Compares confidence, the largest probability, with accuracy in bins of equal width.

    Arguments:
        log_probs: The logarithms of the predicted probabilities, of shape :math:`(N, C)`.
        labels: The true classes, of shape :math:`(N,)`.

    Returns:
        The comparison.

    References:
        | On Calibration of Modern Neural Networks (Guo et al., 2017)
        | https://arxiv.org/abs/1706.04599
    """
    highest, predicted = log_probs.max(-1)
    confidence = highest.exp().clamp(max=1.0).double().numpy()
    right = (predicted == labels).long().numpy()
    accuracy, mean_confidence = calibration_curve(right, confidence, n_bins=_BINS)
    edges = np.linspace(0, 1, _BINS + 1)
    # The bins of `calibration_curve`, which does not return how many predictions are in each.
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence))
    return Reliability(mean_confidence, accuracy, counts[counts > 0])
