"""The networks that are timed, with their batches and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import torch
import zuko
from torch import Tensor, nn

from pyro_bayes.likelihoods import Categorical, Density, Gaussian, Likelihood

BATCH, DATASET_SIZE, PRIOR_VAR, LOGVAR, LEARNING_RATE = 64, 10_000, 0.1, -9.0, 1e-4


@dataclass(frozen=True)
class Loss:
    """What the outputs of a network are compared with.

    Arguments:
        name: Its name.
        targets: Returns random targets for a number of examples.
        nll: Returns the mean negative log-likelihood, up to a factor and a constant, as it is
            written in a PyTorch loop.
        distribution: Returns the distribution of the targets given the outputs, as it is written
            in a Pyro model.
        likelihood: Returns the likelihood, as :class:`pyro_bayes.ELBO` takes it.
    """

    name: str
    targets: Callable[[int], Tensor]
    nll: Callable[[Tensor, Tensor], Tensor]
    distribution: Callable[[Tensor], Any]
    likelihood: Callable[[], Likelihood]


GAUSSIAN = Loss(
    "Gaussian",
    lambda n: torch.randn(n, 1),
    nn.functional.mse_loss,
    lambda mean: dist.Normal(mean, 1.0).to_event(1),
    lambda: Gaussian(1.0),
)
CATEGORICAL = Loss(
    "categorical",
    lambda n: torch.randint(10, (n,)),
    nn.functional.cross_entropy,
    lambda logits: dist.Categorical(logits=logits),
    Categorical,
)
DENSITY = Loss(
    "density",
    lambda n: torch.empty(n, 0),
    lambda log_density, _: -log_density.mean(),
    lambda log_density: dist.Unit(log_density),
    Density,
)


@dataclass(frozen=True)
class Problem:
    """A network, its batch and its loss.

    Arguments:
        name: A short name.
        title: What it is, in a few words.
        make: Returns the network, a module of one argument.
        shape: The shape of one example.
        loss: The loss.
        batch: The number of examples of a step.
        queries: The number of examples to predict.
        draws: The number of draws of a prediction.
        device: Where the network and its data are.
        fused: Whether it is trained with `Adam(…, fused=True)`.
    """

    name: str
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Loss
    batch: int = BATCH
    queries: int = 100
    draws: int = 200
    device: str = "cpu"
    fused: bool = False

    def build(self) -> nn.Module:
        """Returns the network."""
        return self.make().to(self.device)

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns random inputs and targets."""
        x, y = torch.randn(count, *self.shape), self.loss.targets(count)
        return x.to(self.device), y.to(self.device)

    def size(self) -> int:
        """Returns the number of parameters."""
        return sum(parameter.numel() for parameter in self.make().parameters())


class Encoder(nn.Module):
    """A transformer encoder that classifies sequences."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits.

        Arguments:
            x: The sequences, of shape (N, T, width).
        """
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


class LogDensity(nn.Module):
    """The log-density of a conditional flow, so that it is a module of one argument."""

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        self.flow = zuko.flows.NSF(features, context, transforms=3, hidden_features=(64, 64))
        self.features = features

    def forward(self, z: Tensor) -> Tensor:
        """Returns the log-density of each example.

        Arguments:
            z: The features, and behind them the context, of shape (N, features + context).
        """
        x, context = self.split(z)
        density: Tensor = self.flow(context).log_prob(x)
        return density

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features and the context."""
        x, context = z.tensor_split([self.features], dim=-1)
        return x, context


def dense(*sizes: int) -> nn.Sequential:
    """Returns a net of linear layers with ReLU between them."""
    layers = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Returns a net of four convolutions and a linear layer."""
    channels = (3, 16, 32, 64, 64)
    layers: list[nn.Module] = []
    for i, (n, k) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(n, k, 3, stride=min(i + 1, 2), padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def square(parameters: float) -> Problem:
    """Returns a net of two square layers.

    Arguments:
        parameters: About how many parameters it shall have.
    """
    width = round((parameters / 2) ** 0.5)
    loss = replace(GAUSSIAN, targets=lambda n: torch.randn(n, width))
    return Problem("square", "", lambda: dense(width, width, width), (width,), loss)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("small", "10-64-1, batch 64", lambda: dense(10, 64, 1), (10,), GAUSSIAN),
        Problem(
            "mlp", "784-1024-1024-10, batch 128", lambda: dense(784, 1024, 1024, 10),
            (784,), CATEGORICAL, 128, queries=20, draws=100,
        ),
        Problem(
            "deep", "twenty layers of width 64, batch 64", lambda: dense(*[64] * 20, 10),
            (64,), CATEGORICAL,
        ),
        Problem(
            "cnn", "four convolutions on 3×32×32, batch 64", convolutional,
            (3, 32, 32), CATEGORICAL, queries=16,
        ),
        Problem(
            "encoder", "two transformer layers (width 64, 4 heads, 32 steps), batch 16",
            lambda: Encoder(64, 4, 128, 2), (32, 64), CATEGORICAL, 16,
        ),
        Problem(
            "flow", "neural spline flow, three transforms of 64×64, batch 256",
            lambda: LogDensity(2, 3), (5,), DENSITY, 256,
        ),
    )
}  # fmt: skip
REGRESSION = Problem("regression", "5-50-1, batch 100", lambda: dense(5, 50, 1), (5,), GAUSSIAN)
