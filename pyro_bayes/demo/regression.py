"""A column of a table, regressed on the others through plain PyTorch."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyro_bayes import ELBO, BayesianModel, fit
from pyro_bayes.demo import figure, plain, report
from pyro_bayes.demo.table import InputError, Table
from pyro_bayes.likelihoods import Gaussian
from pyro_bayes.likelihoods.predictive import Predictive

_BATCH_SIZE = 64
_LEARNING_RATE = 0.01
_MAX_TEST_ROWS = 10_000
_LEVEL = 0.9


@dataclass(frozen=True)
class Split:
    """A table in two parts, standardised by the mean and standard deviation of the first.

    Arguments:
        x: The standardised features to learn from, of shape :math:`(N, D)`.
        y: The standardised target to learn from, of shape :math:`(N, 1)`.
        x_test: The standardised features to test, of shape :math:`(M, D)`.
        y_test: The standardised target to test, of shape :math:`(M, 1)`.
        location: The mean of the target to learn from.
        scale: Its standard deviation.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    location: float
    scale: float


def diabetes() -> Table:
    """Loads the diabetes data of scikit-learn: ten features of 442 patients."""
    data = load_diabetes(scaled=False)
    features, target = torch.as_tensor(data.data), torch.as_tensor(data.target)
    return Table(features, target, data.feature_names, "diabetes progression")


def run(table: Table, *, seed: int, epochs: int | None, draws: int, path: Path) -> None:
    """Trains both nets, prints their scores and draws the figure.

    Arguments:
        table: The table.
        seed: The seed of the split and of the minibatches.
        epochs: The number of passes over the rows to learn from. By default, as many as make 500
            steps, at least 30, but not more than make 5000 steps.
        draws: The number of draws of the net that predictions are averaged over.
        path: The figure's file.

    Raises:
        InputError: If the table cannot be split and standardised.
    """
    data = split(table, seed)
    if epochs is None:
        steps = max(len(data.y) // _BATCH_SIZE, 1)
        epochs = max(1, min(max(30, 500 // steps), 5000 // steps))
    net = nn.Sequential(nn.Linear(data.x.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
    other, noise = copy.deepcopy(net), Gaussian(1.0, learn=True)
    # The prior keeps the mean of 50 hidden units in the range of a standardised target.
    bnn = BayesianModel(net, init_logvar=-4.0, prior_var=0.05)
    likelihood = Gaussian(1.0, learn=True)

    train_plain(other, noise, data, epochs=epochs, seed=seed)
    train_bayesian(bnn, likelihood, data, epochs=epochs, seed=seed)

    predictions = {
        "without Bayes": plain.predict(other, noise, data.x_test),
        "Bayesian": likelihood.predictive(bnn, data.x_test, num_samples=draws),
        "linear model": linear(data),
    }
    report.show(
        f"Regression of {table.name}: {len(data.y)} rows to learn from, {len(data.y_test)} to test",
        {name: score(prediction, data) for name, prediction in predictions.items()},
        error="RMSE",
        calibration=f"{_LEVEL:.0%} interval covers",
    )
    nets = {name: predictions[name].cdf(data.y_test) for name in ("without Bayes", "Bayesian")}
    figure.draw_regression(path, table.name, nets, *_in_own_unit(predictions["Bayesian"], data))


def split(table: Table, seed: int) -> Split:
    """Splits a table, and standardises it.

    Arguments:
        table: The table.
        seed: The seed of the split.

    Returns:
        Three quarters of the rows to learn from and one to test, of that 10000 at most. Features
        that are constant in the former are left out.

    Raises:
        InputError: If the target or all features are constant in the part to learn from, or a
            value to test is too far from it.
    """
    count = len(table.target)
    train, test = train_test_split(
        torch.arange(count).numpy(), test_size=min(count // 4, _MAX_TEST_ROWS), random_state=seed
    )
    x, y = table.features[train], table.target[train, None]
    if y.min() == y.max():
        raise InputError(
            f"Expected the target {table.name!r} to vary; got {y[0].item():g} in all of the"
            f" {len(y)} rows to learn from."
        )
    varies = x.amin(0) < x.amax(0)
    if not varies.any():
        raise InputError(
            f"Expected a feature that varies beside {table.name!r}; got constant columns only in"
            f" the {len(y)} rows to learn from."
        )
    scaler, target_scaler = StandardScaler().fit(x[:, varies]), StandardScaler().fit(y)
    x_test = scaler.transform(table.features[test][:, varies])
    y_test = target_scaler.transform(table.target[test, None])
    distances = [*abs(x_test).max(0), abs(y_test).max()]
    columns = [*compress(table.columns, varies), table.name]
    for column, distance in zip(columns, distances, strict=True):
        # The net computes in single precision, and would overflow.
        if distance > 1e15:
            raise InputError(
                f"Expected similar values in all rows of column {column!r}; got one that is"
                f" {distance:.0e} standard deviations away from the mean of {len(y)} rows."
            )

    def single(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)

    return Split(
        single(scaler.transform(x[:, varies])),
        single(target_scaler.transform(y)),
        single(x_test),
        single(y_test),
        target_scaler.mean_.item(),
        target_scaler.scale_.item(),
    )


def train_plain(
    net: nn.Module, likelihood: Gaussian, data: Split, *, epochs: int, seed: int
) -> None:
    """Trains a net by maximum likelihood.

    Arguments:
        net: The net.
        likelihood: The likelihood, whose scale is learned too.
        data: The data.
        epochs: The number of passes over the rows.
        seed: The seed of the minibatches.
    """
    loader = plain.minibatches(data.x, data.y, size=_BATCH_SIZE, seed=seed)
    optimizer = torch.optim.Adam([*net.parameters(), *likelihood.parameters()], lr=_LEARNING_RATE)
    plain.train(net, likelihood, loader, epochs, optimizer=optimizer)


def train_bayesian(
    bnn: BayesianModel, likelihood: Gaussian, data: Split, *, epochs: int, seed: int
) -> None:
    """Trains a net's posterior by the negative ELBO of one row, in the same steps.

    Arguments:
        bnn: The Bayesian net.
        likelihood: The likelihood, whose scale is learned too.
        data: The data.
        epochs: The number of passes over the rows.
        seed: The seed of the minibatches.
    """
    loader = plain.minibatches(data.x, data.y, size=_BATCH_SIZE, seed=seed)
    objective = ELBO(bnn, likelihood, num_data=len(data.y), local_trick=True)
    optimizer = torch.optim.Adam(objective.parameters(), lr=_LEARNING_RATE)
    fit(objective, loader, epochs, optimizer=optimizer, progress=sys.stderr.isatty())


def linear(data: Split) -> Predictive:
    """Predicts with Bayesian linear regression, which any net should beat that is worth its cost.

    Arguments:
        data: The data.

    Returns:
        The prediction of the standardised target to test.
    """
    model = BayesianRidge().fit(data.x.numpy(), data.y.squeeze(-1).numpy())
    mean, deviation = model.predict(data.x_test.numpy(), return_std=True)
    loc, scale = (torch.as_tensor(values)[None, :, None] for values in (mean, deviation))
    return Predictive(Independent(Normal(loc, scale), 1))


def score(prediction: Predictive, data: Split) -> report.Score:
    """Scores a prediction in the target's own unit.

    Arguments:
        prediction: The prediction of the standardised target to test.
        data: The data.
    """
    low, high = prediction.interval(_LEVEL)
    inside = (low < data.y_test) & (data.y_test < high)
    error = data.scale * (prediction.mean - data.y_test).square().mean().sqrt().item()
    return report.Score(
        prediction.log_prob(data.y_test) - math.log(data.scale),
        f"{error:#.4g}",
        f"{inside.double().mean():.1%}",
    )


def _in_own_unit(prediction: Predictive, data: Split) -> list[Tensor]:
    """Returns targets to test, their predicted means and the ends of their intervals."""
    values = (data.y_test, prediction.mean, *prediction.interval(_LEVEL))
    return [data.location + data.scale * value.double().squeeze(-1) for value in values]
