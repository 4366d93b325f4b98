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
from pyro.distributions import TorchDistribution
from pyro.infer import SVI, Predictive, Trace_ELBO
from timing import reason
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
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


def plain(problem: Problem, captured: bool = False) -> Running:
    """Trains the plain net."""
    net = problem.build()
    x, y = problem.examples(problem.batch)
    step = optimised(net.parameters(), lambda: problem.loss.nll(net(x), y), captured)
    if captured:
        return Running(step, {})
    return Running(step, {"as many forward passes": lambda z, n: draws(lambda: net(z), n)})


def floor(problem: Problem, local: bool) -> Running:
    """Does what no such posterior can do without, and nothing else.

    That is the plain net's forward and backward pass, Adam on two tensors per parameter, and one
    normal number per weight. With local noise, it is one normal number per output of each layer
    with weights instead, and each of these layers' forward and backward pass once more.
    """
    net = problem.build()
    x, y = problem.examples(problem.batch)
    parameters = list(net.parameters())
    others = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    calls = _layer_calls(net, x) if local else []
    sizes = [size for *_, size in calls] or [parameter.numel() for parameter in parameters]
    noise = torch.empty(sum(sizes), device=problem.device)
    optimizer = torch.optim.Adam([*parameters, *others], lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        noise.normal_()
        problem.loss.nll(net(x), y).backward()
        for layer, inputs, options, _ in calls:
            _first(layer(*inputs, **options)).sum().backward()
        for parameter, other in zip(parameters, others, strict=True):
            other.grad = parameter.grad
        optimizer.step()

    def at_once(x: Tensor, count: int) -> Any:
        stacked = {n: p.new_empty(count, *p.shape).normal_() for n, p in net.named_parameters()}
        with torch.no_grad():
            outputs = torch.vmap(lambda p: functional_call(net, p, (x,)))(stacked)
            return torch.var_mean(outputs, 0, correction=0)

    return Running(step, {} if local else {"numbers and `vmap` alone": at_once})


def svi_floor(problem: Problem) -> Running:
    """Does what no SVI with one site per parameter can do without, and nothing else.

    That is the plain net's forward and backward pass, one normal number per weight, and what Pyro
    does for a site in the guide and in the model, two parameters per site and an optimiser for
    each. Nothing computes what is drawn, and densities are as good as constant, though they need
    gradients.
    """
    net = problem.build()
    x, y = problem.examples(problem.batch)
    parameters = dict(net.named_parameters())
    others = {name: torch.zeros_like(p).requires_grad_() for name, p in parameters.items()}
    prior = {name: p.new_zeros(()).requires_grad_() for name, p in parameters.items()}
    noise = torch.empty(sum(p.numel() for p in parameters.values()), device=problem.device)

    def guide(x: Tensor, y: Tensor) -> None:
        noise.normal_()
        for name, parameter in parameters.items():
            value = pyro.param(f"floor.{name}", parameter)
            other = pyro.param(f"floor.other.{name}", others[name])
            pyro.sample(name, _Known(value, other))

    def model(x: Tensor, y: Tensor) -> None:
        for name, parameter in parameters.items():
            pyro.sample(name, _Known(parameter, prior[name]))
        output = net(x)
        with pyro.plate("data", DATASET_SIZE, subsample=x):
            pyro.sample("y", problem.loss.likelihood(output), obs=y)

    trainer = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())
    return Running(lambda: trainer.step(x, y), {})


class _Known(TorchDistribution):
    """A distribution whose draw is at hand, and whose log-density depends on nothing but a sum."""

    has_rsample = True

    def __init__(self, value: Tensor, summed: Tensor) -> None:
        self._value, self._log_prob = value, summed.sum()
        super().__init__(event_shape=value.shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._value

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob


def _layer_calls(net: nn.Module, x: Tensor) -> list[tuple[nn.Module, Any, Any, int]]:
    """Returns each layer with weights, its arguments and the size of its output."""
    calls: list[tuple[nn.Module, Any, Any, int]] = []

    def record(layer: nn.Module, inputs: Any, options: Any, output: Any) -> None:
        def cut(value: Any) -> Any:
            return value.detach().requires_grad_(value.requires_grad)

        inputs, options = tree_map_only(Tensor, cut, (inputs, options))
        calls.append((layer, inputs, options, _first(output).numel()))

    layers = [m for m in net.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in layers]
    net(x)
    for hook in hooks:
        hook.remove()
    return calls


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def ours(problem: Problem, local_trick: Estimator, captured: bool = False) -> Running:
    """Trains with `bnn.reparameterize`."""
    bnn = BayesianModel(problem.build(), LOGVAR, prior_var=PRIOR_VAR)
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        with bnn.reparameterize(local_trick=local_trick) as model:
            nll = problem.loss.nll(model(x), y)
        return nll + bnn.kl_divergence() / DATASET_SIZE

    step = optimised(bnn.parameters(), loss, captured)
    return Running(step, {} if local_trick or captured else _predict(bnn))


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
    "floor": Contender("*floor of draws of weights*", floor, {"local": False}),
    "floor-local": Contender("*floor of local noise*", floor, {"local": True}),
    "floor-svi": Contender("*floor of SVI*", svi_floor),
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
            running[name] = (CONTENDERS | CAPTURED)[name](problem)
        except Exception as error:
            failures[name] = reason(error)
    return running, failures
