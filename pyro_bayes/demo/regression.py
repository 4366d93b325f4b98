"""A column of a table, regressed on the others through plain PyTorch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import BayesianRidge
from sklearn.metrics import root_mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pyro_bayes import BayesianModel
from pyro_bayes.demo import figure, report
from pyro_bayes.demo.loop import minibatches, progress
from pyro_bayes.demo.table import InputError, Table

_BATCH_SIZE = 64
_LEARNING_RATE = 0.01
_MAX_TEST_ROWS = 10_000
_TAILS = (0.05, 0.95)


class Regressor(nn.Module):
    """A net that returns a Gaussian, whose standard deviation it learns as a parameter.

    Arguments:
        features: The number of features :math:`D`.
        hidden: The number of hidden units.
    """

    def __init__(self, features: int, hidden: int = 50) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Normal:
        """Predicts the target.

        Arguments:
            x: The features, of shape :math:`(N, D)`.

        Returns:
            The distribution of the target, of batch shape :math:`(N,)`.
        """
        return Normal(self.mean(x).squeeze(-1), self.log_scale.exp())


@dataclass(frozen=True)
class Split:
    """A table in two parts, standardised by the mean and standard deviation of the first.

    Arguments:
        x: The standardised features to learn from, of shape :math:`(N, D)`.
        y: The standardised target to learn from, of shape :math:`(N,)`.
        x_test: The standardised features to test, of shape :math:`(M, D)`.
        y_test: The target to test in its own unit, of shape :math:`(M,)`.
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


def run(table: Table, *, seed: int, steps: int | None, draws: int, path: Path) -> None:
    """Trains both nets, prints their scores and draws the figure.

    Arguments:
        table: The table.
        seed: The seed of the split and of the minibatches.
        steps: The number of training steps. By default, 500 or 30 passes over the data, whichever
            is more, but not more than 5000.
        draws: The number of draws of the net that predictions are averaged over.
        path: The figure's file.

    Raises:
        InputError: If the table cannot be split and standardised.
    """
    data = split(table, seed)
    if steps is None:
        steps = min(max(500, 30 * len(data.y) // _BATCH_SIZE), 5000)
    net = Regressor(data.x.shape[1])
    plain = copy.deepcopy(net)
    # The prior keeps the mean of 50 hidden units in the range of a standardised target.
    bnn = BayesianModel(net, init_logvar=-4.0, exclude_params="log_scale", prior_var=0.05)

    train_plain(plain, data, steps=steps, seed=seed)
    train_bayesian(bnn, data, steps=steps, seed=seed)

    with torch.no_grad():
        predictions = {
            "without Bayes": mixture(data, [plain(data.x_test)]),
            "Bayesian": predict(bnn, data, draws=draws),
            "linear model": mixture(data, [linear(data)]),
        }
    # Where the truth falls in the predicted distribution: uniform, if that is calibrated.
    levels = {name: p.cdf(data.y_test) for name, p in predictions.items()}
    scores = {
        name: report.Score(
            prediction.log_prob(data.y_test),
            f"{root_mean_squared_error(data.y_test, prediction.mean):#.4g}",
            f"{_covered(levels[name]):.1%}",
        )
        for name, prediction in predictions.items()
    }
    report.show(
        f"Regression of {table.name}: {len(data.y)} rows to learn from, {len(data.y_test)} to test",
        scores,
        error="RMSE",
        calibration="90% interval covers",
    )
    intervals = summarise(predictions["Bayesian"])
    nets = {name: levels[name] for name in ("without Bayes", "Bayesian")}
    figure.draw_regression(path, table.name, nets, data.y_test, intervals)


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
            feature to test is too far from it.
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
    for column, distance in zip(compress(table.columns, varies), abs(x_test).max(0), strict=True):
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
        single(target_scaler.transform(y)).squeeze(-1),
        single(x_test),
        table.target[test],
        target_scaler.mean_.item(),
        target_scaler.scale_.item(),
    )


def train_plain(net: Regressor, data: Split, *, steps: int, seed: int) -> None:
    """Trains a net by maximum likelihood.

    Arguments:
        net: The net.
        data: The data.
        steps: The number of steps.
        seed: The seed of the minibatches.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    with progress("Regression without Bayes", steps) as advance:
        for i in minibatches(len(data.y), size=_BATCH_SIZE, steps=steps, seed=seed):
            loss = -net(data.x[i]).log_prob(data.y[i]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(f"log-likelihood {-loss.item():.2f} nats per row")


def train_bayesian(bnn: BayesianModel, data: Split, *, steps: int, seed: int) -> None:
    """Trains a net's posterior by the negative ELBO of one row, in the same steps.

    Arguments:
        bnn: The Bayesian net.
        data: The data.
        steps: The number of steps.
        seed: The seed of the minibatches.
    """
    count = len(data.y)
    optimizer = torch.optim.Adam(bnn.parameters(), lr=_LEARNING_RATE)
    with progress("Regression, Bayesian", steps) as advance:
        for i in minibatches(count, size=_BATCH_SIZE, steps=steps, seed=seed):
            with bnn.reparameterize(local_trick=True) as net:
                nll = -net(data.x[i]).log_prob(data.y[i]).mean()
            loss = nll + bnn.kl_divergence() / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(f"ELBO {-loss.item():.2f} nats per row")


def predict(bnn: BayesianModel, data: Split, *, draws: int) -> MixtureSameFamily:
    """Averages the predictive density over draws of the net.

    Arguments:
        bnn: The Bayesian net.
        data: The data.
        draws: The number of draws.

    Returns:
        The density of the target to test in its own unit.
    """
    predictions = []
    for _ in range(draws):
        with torch.no_grad(), bnn.reparameterize() as net:
            predictions.append(net(data.x_test))
    return mixture(data, predictions)


def linear(data: Split) -> Normal:
    """Predicts with Bayesian linear regression, which any net should beat that is worth its cost.

    Arguments:
        data: The data.

    Returns:
        The density of the standardised target to test.
    """
    model = BayesianRidge().fit(data.x.numpy(), data.y.numpy())
    mean, deviation = model.predict(data.x_test.numpy(), return_std=True)
    return Normal(torch.as_tensor(mean), torch.as_tensor(deviation))


def mixture(data: Split, predictions: list[Normal]) -> MixtureSameFamily:
    """Averages the densities of standardised predictions, and changes them to the target's unit.

    Arguments:
        data: The data.
        predictions: The predictions of one or more nets, of batch shape :math:`(M,)`.

    Returns:
        The mixture, of batch shape :math:`(M,)`, in double precision.
    """
    loc = torch.stack([p.loc for p in predictions], -1).double()
    scale = torch.stack([p.scale for p in predictions], -1).double()
    components = Normal(data.location + data.scale * loc, data.scale * scale)
    return MixtureSameFamily(Categorical(torch.ones_like(loc)), components)


def summarise(prediction: MixtureSameFamily, rows: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the means and the central 90 % intervals of the first rows.

    Arguments:
        prediction: The prediction, an even mixture of Gaussians, of batch shape :math:`(M,)`.
        rows: The largest number of rows :math:`R` to return.

    Returns:
        The mean, the lower end and the upper end, each of shape :math:`(R,)`. The ends are those
        of samples.
    """
    parts = prediction.component_distribution
    samples = Normal(parts.mean[:rows], parts.stddev[:rows]).sample(torch.Size([50]))
    low, high = samples.movedim(1, 0).flatten(1).quantile(samples.new_tensor(_TAILS), dim=1)
    return prediction.mean[:rows], low, high


def _covered(levels: Tensor) -> float:
    low, high = _TAILS
    return ((levels > low) & (levels < high)).double().mean().item()
