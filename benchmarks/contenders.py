"""What is timed: the plain net, ours, and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import peers
import pyro
import torch
from nets import DATASET_SIZE, LEARNING_RATE, LOGVAR, PRIOR_VAR, Problem
from peers import Predict, Running, draws, optimised
from pyro.infer import SVI, Predictive, Trace_ELBO
from timing import reason
from torch import Tensor
from zuko.bayesian import BayesianModel as ZukoModel

from pyro_bayes import BayesianModel

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


def plain(problem: Problem) -> Running:
    """Trains the plain net."""
    net = problem.build()
    x, y = problem.examples(problem.batch)
    step = optimised(net.parameters(), lambda: problem.loss.nll(net(x), y))
    return Running(step, {"as many forward passes": lambda z, n: draws(lambda: net(z), n)})


def floor(problem: Problem, products: int) -> Running:
    """Does what no posterior of this kind can do without, and nothing else.

    That is Adam on two tensors per parameter, the plain net's forward and backward passes, once for
    each product with a parameter that the estimator needs, and its normal numbers: one per weight,
    or for local noise one per output of a layer with weights.
    """
    net = problem.build()
    x, y = problem.examples(problem.batch)
    parameters = list(net.parameters())
    others = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    if products > 1:
        sizes.clear()
        layers = [m for m in net.modules() if any(True for _ in m.parameters(recurse=False))]
        hooks = [m.register_forward_hook(lambda m, i, o: sizes.append(o.numel())) for m in layers]
        net(x)
        for hook in hooks:
            hook.remove()
    noise = torch.empty(sum(sizes))
    optimizer = torch.optim.Adam([*parameters, *others], lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        noise.normal_()
        for _ in range(products):
            problem.loss.nll(net(x), y).backward()
        for parameter, other in zip(parameters, others, strict=True):
            other.grad = parameter.grad
        optimizer.step()

    return Running(step, {})


def ours(problem: Problem, local_trick: Estimator) -> Running:
    """Trains with `bnn.reparameterize`."""
    bnn = BayesianModel(problem.build(), LOGVAR, prior_var=PRIOR_VAR)
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        with bnn.reparameterize(local_trick=local_trick) as model:
            nll = problem.loss.nll(model(x), y)
        return nll + bnn.kl_divergence() / DATASET_SIZE

    return Running(optimised(bnn.parameters(), loss), {} if local_trick else _predict(bnn))


def _predict(bnn: Any) -> dict[str, Predict]:
    ways: dict[str, Predict] = {"loop of `reparameterize`": looped(bnn)}

    def at_once(x: Tensor, count: int) -> Any:
        # One draw has no variance.
        statistics = ("mean", "variance") if count > 1 else "mean"
        return bnn.predict(x, num_samples=count, statistics=statistics)

    if hasattr(type(bnn), "predict"):
        return {"`bnn.predict`": at_once, **ways}
    return ways


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
                pyro.sample("y", problem.loss.likelihood(output), obs=y)
        return output

    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
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
    return Running(optimised(bnn.parameters(), loss), ways)


PLAIN = "plain"
CONTENDERS = {
    PLAIN: Contender("plain net", plain),
    "floor": Contender("*floor of draws of weights*", floor, {"products": 1}),
    "floor-local": Contender("*floor of local noise*", floor, {"products": 2}),
    "weights": Contender("pyro_bayes, draws of weights", ours, {"local_trick": False}),
    "local": Contender("pyro_bayes, local noise", ours, {"local_trick": True}),
    "flipout": Contender("pyro_bayes, flipout", ours, {"local_trick": "flipout"}),
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


def start(
    names: list[str], problem: Problem, seed: int = 0
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
            running[name] = CONTENDERS[name](problem)
        except Exception as error:
            failures[name] = reason(error)
    return running, failures
