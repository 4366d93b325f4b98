"""What is timed: the plain net, ours, and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import peers
import pyro
import torch
from nets import DATASET_SIZE, LOGVAR, PRIOR_VAR, LogDensity, Problem
from pyro.infer import SVI, Predictive, Trace_ELBO
from running import Predict, Running, adam_options, draws, optimised
from timing import reason
from torch import Tensor, nn
from zuko.bayesian import BayesianModel as ZukoModel

from pyro_bayes import ELBO, BayesianModel

Estimator = bool | Literal["flipout"]


@dataclass(frozen=True)
class Contender:
    """A way to train a network.

    Arguments:
        title: Its name in tables.
        start: Builds the network of a problem and makes it ready to be trained.
        options: Further arguments of `start`.
    """

    title: str
    start: Callable[..., Running]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, problem: Problem) -> Running:
        """Makes a network ready to be trained.

        Returns:
            What can be done with it. If that failed, each call raises the error.
        """
        return self.start(problem, **self.options)


def plain(problem: Problem, captured: bool = False) -> Running:
    """Trains the plain net."""
    net = problem.build()
    x, y = problem.examples(problem.batch)
    step = optimised(problem, net.parameters(), lambda: problem.loss.nll(net(x), y), captured)
    if captured:
        return Running(step, {})
    return Running(step, {"as many forward passes": lambda z, n: draws(lambda: net(z), n)})


def plain_likelihood(problem: Problem) -> Running:
    """Trains the plain net with the likelihood of `elbo` as its loss."""
    net, x, y = _observed(problem)
    likelihood = problem.loss.likelihood().to(problem.device)

    def loss() -> Tensor:
        return -likelihood.log_prob(net(x), y).mean()

    return Running(optimised(problem, net.parameters(), loss), {})


def elbo(problem: Problem, local_trick: Estimator) -> Running:
    """Trains with `ELBO`."""
    net, x, y = _observed(problem)
    bnn = BayesianModel(net, LOGVAR, prior_var=PRIOR_VAR)
    likelihood = problem.loss.likelihood().to(problem.device)
    objective = ELBO(bnn, likelihood, DATASET_SIZE, local_trick=local_trick)
    step = optimised(problem, objective.parameters(), lambda: objective(x, y))
    return Running(step, {})


def _observed(problem: Problem) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a network whose outputs are for a likelihood, its inputs and targets."""
    net = problem.build()
    x, y = problem.examples(problem.batch)
    if isinstance(net, LogDensity):  # a flow itself returns a distribution of features
        y, x = net.split(x)
        net = net.flow
    return net, x, y


def ours(
    problem: Problem, local_trick: Estimator, captured: bool = False, apart: bool = False
) -> Running:
    """Trains with `bnn.reparameterize_with_kl`, or with the two calls that it stands for."""
    bnn = BayesianModel(problem.build(), LOGVAR, prior_var=PRIOR_VAR)
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        if apart:
            with bnn.reparameterize(local_trick=local_trick) as model:
                nll = problem.loss.nll(model(x), y)
            return nll + bnn.kl_divergence() / DATASET_SIZE
        with bnn.reparameterize_with_kl(local_trick=local_trick) as (model, kl):
            nll = problem.loss.nll(model(x), y)
        return nll + kl / DATASET_SIZE

    step = optimised(problem, bnn.parameters(), loss, captured)
    return Running(step, {} if local_trick or captured or apart else _predict(bnn))


def _predict(bnn: BayesianModel) -> dict[str, Predict]:
    def at_once(x: Tensor, count: int) -> Any:
        # One draw has no variance.
        statistics = ("mean", "variance") if count > 1 else "mean"
        return bnn.predict(x, num_samples=count, statistics=statistics)

    return {"`bnn.predict`": at_once, "loop of `reparameterize`": looped(bnn)}


def looped(bnn: Any) -> Predict:
    """Returns a function that averages over draws of the weights, one at a time."""

    def draw(x: Tensor) -> Tensor:
        with bnn.reparameterize() as model:
            output: Tensor = model(x)
        return output

    return lambda x, n: draws(lambda: draw(x), n)


def svi(problem: Problem, exact: bool) -> Running:
    """Trains with Pyro's SVI, and `bnn.guide` or `bnn.exact_kl()`."""
    bnn = BayesianModel(problem.build(), LOGVAR, prior_var=PRIOR_VAR, name=f"svi_{exact}")
    x, y = problem.examples(problem.batch)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        with bnn.lift() as net:
            output: Tensor = net(x)
        if y is not None:
            with pyro.plate("data", DATASET_SIZE, subsample=x):
                pyro.sample("y", problem.loss.distribution(output), obs=y)
        return output

    optimizer = pyro.optim.Adam(adam_options(problem))
    trainer = SVI(model, bnn.exact_kl() if exact else bnn.guide, optimizer, Trace_ELBO())

    def predict(x: Tensor, count: int) -> Any:
        sites = ("_RETURN",)
        many = Predictive(model, guide=bnn.guide, num_samples=count, return_sites=sites,
                          parallel=True)  # fmt: skip
        with torch.no_grad():
            return torch.var_mean(many(x)["_RETURN"], 0, correction=0)

    ways: dict[str, Predict] = {} if exact else {"`Predictive`, in parallel": predict}
    return Running(lambda: trainer.step(x, y), ways)


def zuko_model(problem: Problem, local_trick: bool) -> Running:
    """Trains with `zuko.bayesian`."""
    bnn = ZukoModel(problem.build(), LOGVAR)
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        with bnn.reparameterize(local_trick=local_trick) as model:
            nll = problem.loss.nll(model(x), y)
        return nll + bnn.kl_divergence(PRIOR_VAR) / DATASET_SIZE

    ways = {} if local_trick else {"loop of `reparameterize`": looped(bnn)}
    return Running(optimised(problem, bnn.parameters(), loss), ways)


PLAIN = "plain"
CONTENDERS = {
    PLAIN: Contender("plain net", plain),
    "plain-likelihood": Contender("plain net, likelihood of `ELBO`", plain_likelihood),
    "weights": Contender("pyro_bayes, draws of weights", ours, {"local_trick": False}),
    "weights-apart": Contender(
        "pyro_bayes, the same in two calls", ours, {"local_trick": False, "apart": True}
    ),
    "local": Contender("pyro_bayes, local noise", ours, {"local_trick": True}),
    "flipout": Contender("pyro_bayes, flipout", ours, {"local_trick": "flipout"}),
    "elbo": Contender("pyro_bayes, `ELBO`, draws of weights", elbo, {"local_trick": False}),
    "elbo-local": Contender("pyro_bayes, `ELBO`, local noise", elbo, {"local_trick": True}),
    "svi": Contender("pyro_bayes, SVI", svi, {"exact": False}),
    "svi-exact": Contender("pyro_bayes, SVI with `exact_kl`", svi, {"exact": True}),
    "zuko": Contender("zuko, draws of weights", zuko_model, {"local_trick": False}),
    "zuko-local": Contender("zuko, local noise", zuko_model, {"local_trick": True}),
    "pyro": Contender("Pyro, `PyroSample` and `AutoNormal`", peers.pyro_recipe),
    "tyxe": Contender("TyXe", peers.tyxe_model, {"local": False}),
    "tyxe-local": Contender("TyXe, local noise", peers.tyxe_model, {"local": True}),
    "bayesian-torch": Contender(
        "bayesian-torch", peers.bayesian_torch_model, {"kind": "Reparameterization"}
    ),
    "bayesian-torch-flipout": Contender(
        "bayesian-torch, flipout", peers.bayesian_torch_model, {"kind": "Flipout"}
    ),
    "torchbnn": Contender("torchbnn", peers.torchbnn_model),
    "blitz": Contender("blitz", peers.blitz_model),
    "posteriors": Contender("posteriors", peers.posteriors_model),
}
CAPTURED = {
    "plain-graph": Contender("plain net, as a CUDA graph", plain, {"captured": True}),
    "weights-graph": Contender(
        "pyro_bayes, draws of weights, as a CUDA graph",
        ours,
        {"local_trick": False, "captured": True},
    ),
    "local-graph": Contender(
        "pyro_bayes, local noise, as a CUDA graph", ours, {"local_trick": True, "captured": True}
    ),
}


def start(
    names: Sequence[str], problem: Problem, seed: int = 0
) -> tuple[dict[str, Running], dict[str, str]]:
    """Makes a network ready to be trained, in several ways.

    Arguments:
        names: The names of the contenders.
        problem: The network, its batch and its loss.
        seed: The seed of each network and its data.

    Returns:
        What can be done with each, and why some could not be made ready.
    """
    pyro.clear_param_store()
    running, failures = {}, {}
    for name in names:
        torch.manual_seed(seed)
        try:
            running[name] = (CONTENDERS | CAPTURED)[name](problem)
        except Exception as error:
            failures[name] = reason(error)
    return running, failures
