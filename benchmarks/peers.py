"""The peers, each used as its documentation shows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from nets import DATASET_SIZE, DENSITY, GAUSSIAN, LEARNING_RATE, LOGVAR, PRIOR_VAR, Problem
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from running import Predict, Running, adam_options, draws, optimised
from timing import Unable
from torch import Tensor, nn
from torch.func import functional_call

PRIOR_SD, SD = PRIOR_VAR**0.5, torch.tensor(LOGVAR / 2).exp().item()


def called(net: nn.Module) -> dict[str, Predict]:
    """Returns the way to predict with a net that draws its weights at each call."""
    return {"loop of calls": lambda x, n: draws(lambda: net(x), n)}


def _check_classes(net: nn.Module) -> None:
    """Refuses what `PyroModule` cannot be mixed with."""
    if any(type(type(module)) is not type for module in net.modules()):
        raise Unable("`PyroModule` of an abstract class")


class _Regression(PyroModule):
    def __init__(self, net: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.net = net
        self.distribution = problem.loss.distribution

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        output: Tensor = self.net(x)
        if y is not None:
            with pyro.plate("data", DATASET_SIZE, subsample=x):
                pyro.sample("y", self.distribution(output), obs=y)
        return output


def pyro_recipe(problem: Problem) -> Running:
    """Trains with Pyro alone: a `PyroSample` for each parameter, `AutoNormal` and SVI.

    References:
        | Example: Bayesian regression, of Pyro's documentation of `pyro.nn.PyroModule`
        | https://docs.pyro.ai/en/stable/nn.html
    """
    net = problem.build()
    _check_classes(net)
    to_pyro_module_(net)
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            normal = dist.Normal(value.new_tensor(0.0), value.new_tensor(PRIOR_SD))
            prior = normal.expand(value.shape).to_event(value.dim())
            setattr(module, name, PyroSample(prior))
    model = _Regression(net, problem)
    guide = AutoNormal(model, init_scale=SD)
    x, y = problem.examples(problem.batch)
    svi = SVI(model, guide, pyro.optim.Adam(adam_options(problem)), Trace_ELBO())

    def predict(x: Tensor, count: int) -> Any:
        many = Predictive(model, guide=guide, num_samples=count, return_sites=("_RETURN",))
        with torch.no_grad():
            return torch.var_mean(many(x)["_RETURN"], 0, correction=0)

    return Running(lambda: svi.step(x, y), {"`Predictive`": predict})


def tyxe_model(problem: Problem, local: bool) -> Running:
    """Trains with `tyxe.VariationalBNN`, by the step that its method `fit` makes.

    TyXe needs a function that Pyro 1.9 no longer has; it is given back.
    """
    import pyro.util

    if not hasattr(pyro.util, "deep_getattr"):
        pyro.util.deep_getattr = lambda obj, name: functools.reduce(getattr, name.split("."), obj)
    import tyxe

    net = problem.build()
    _check_classes(net)
    zero, sd = (torch.tensor(value, device=problem.device) for value in (0.0, PRIOR_SD))
    # Guides of the same class would share parameters in Pyro's store.
    guide = type(f"Guide_{local}", (tyxe.guides.AutoNormal,), {})
    means = tyxe.guides.PretrainedInitializer.from_net(net)
    bnn = tyxe.VariationalBNN(
        net,
        tyxe.priors.IIDPrior(dist.Normal(zero, sd)),
        _tyxe_likelihood(tyxe.likelihoods, problem),
        functools.partial(guide, init_scale=SD, init_loc_fn=means),
    )
    x, y = problem.examples(problem.batch)
    optimizer = pyro.optim.Adam(adam_options(problem))
    svi = SVI(bnn.model, bnn.guide, optimizer, loss=TraceMeanField_ELBO())

    def step() -> None:
        messenger = tyxe.poutine.local_reparameterization
        with messenger() if local else contextlib.nullcontext():
            svi.step((x,), y)

    ways = {"`bnn.predict`": lambda x, n: bnn.predict(x, num_predictions=n)}
    return Running(step, {} if local else ways)


def _tyxe_likelihood(likelihoods: Any, problem: Problem) -> Any:
    if problem.loss.name == GAUSSIAN.name:
        return likelihoods.HomoskedasticGaussian(DATASET_SIZE, scale=1.0)
    if problem.loss.name != DENSITY.name:
        return likelihoods.Categorical(DATASET_SIZE)

    class Density(likelihoods.Likelihood):
        def predictive_distribution(self, predictions: Tensor) -> Any:
            return dist.Unit(predictions)

        def aggregate_predictions(self, predictions: Tensor, dim: int = 0) -> Tensor:
            return predictions.mean(dim)

    return Density(DATASET_SIZE)


def bayesian_torch_model(problem: Problem, kind: str) -> Running:
    """Trains with bayesian-torch: `dnn_to_bnn`, `get_kl_loss`, and a plain PyTorch loop."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    net = nn.Sequential(problem.build())  # layers are replaced in what holds them
    parameters = {
        "prior_mu": 0.0,
        "prior_sigma": PRIOR_SD,
        "posterior_mu_init": 0.0,
        "posterior_rho_init": LOGVAR / 2,
        "type": kind,
        "moped_enable": False,
        "moped_delta": 0.5,
    }
    try:
        dnn_to_bnn(net, parameters)
    except AttributeError as error:
        raise Unable(f"no layer for {_lacking(net)[0]}") from error
    net.to(problem.device)
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        nll = problem.loss.nll(net(x), y)
        divergence: Tensor = get_kl_loss(net)
        return nll + divergence / DATASET_SIZE

    ways = called(net) if kind == "Reparameterization" else {}
    return Running(optimised(problem, net.parameters(), loss), ways)


def torchbnn_model(problem: Problem) -> Running:
    """Trains with layers of torchbnn and `BKLLoss`."""
    import torchbnn

    def linear(m: nn.Linear) -> nn.Module:
        layer = torchbnn.BayesLinear(0.0, PRIOR_SD, m.in_features, m.out_features)
        assert isinstance(layer, nn.Module)
        return layer

    def convolution(m: nn.Conv2d) -> nn.Module:
        layer = torchbnn.BayesConv2d(
            0.0, PRIOR_SD, m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding
        )
        assert isinstance(layer, nn.Module)
        return layer

    net = _rebuilt(problem, linear, convolution)
    divergence = torchbnn.BKLLoss(reduction="sum")
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        nll = problem.loss.nll(net(x), y)
        kl: Tensor = divergence(net)
        return nll + kl[0] / DATASET_SIZE

    return Running(optimised(problem, net.parameters(), loss), called(net))


def blitz_model(problem: Problem) -> Running:
    """Trains with layers of blitz and `sample_elbo`."""
    from blitz.modules import BayesianConv2d, BayesianLinear
    from blitz.utils import variational_estimator

    @variational_estimator
    class Net(nn.Sequential):
        pass

    prior = {"prior_sigma_1": PRIOR_SD, "posterior_rho_init": LOGVAR / 2}

    def linear(m: nn.Linear) -> Any:
        return BayesianLinear(m.in_features, m.out_features, **prior)

    def convolution(m: nn.Conv2d) -> Any:
        return BayesianConv2d(
            m.in_channels,
            m.out_channels,
            m.kernel_size,
            stride=m.stride,
            padding=m.padding,
            **prior,
        )

    net: Any = Net(*_rebuilt(problem, linear, convolution)).to(problem.device)
    x, y = problem.examples(problem.batch)

    def loss() -> Tensor:
        weight = 1 / DATASET_SIZE
        elbo: Tensor = net.sample_elbo(x, y, problem.loss.nll, 1, complexity_cost_weight=weight)
        return elbo

    def predict(x: Tensor, count: int) -> Any:
        with torch.no_grad():
            return net.mfvi_forward(x, sample_nbr=count)

    return Running(optimised(problem, net.parameters(), loss), {"`mfvi_forward`": predict})


def _rebuilt(
    problem: Problem,
    linear: Callable[[nn.Linear], nn.Module],
    convolution: Callable[[nn.Conv2d], nn.Module],
) -> nn.Sequential:
    """Returns a net with other layers in the place of `nn.Linear` and `nn.Conv2d`.

    Raises:
        Unable: If there are other modules with parameters.
    """
    net = problem.build()
    lacking = _lacking(net)
    if lacking:
        raise Unable(f"no layer for {lacking[0]}")
    if not isinstance(net, nn.Sequential):
        raise Unable("needs a net of layers")
    layers = [
        linear(m) if isinstance(m, nn.Linear) else convolution(m) if isinstance(m, nn.Conv2d) else m
        for m in net
    ]
    return nn.Sequential(*layers).to(problem.device)


def _lacking(net: nn.Module) -> list[str]:
    """Returns the classes with parameters that are neither `nn.Linear` nor `nn.Conv2d`."""
    kinds = {type(m).__name__: type(m) for m in net.modules() if list(m.parameters(recurse=False))}
    return [name for name, kind in kinds.items() if kind not in (nn.Linear, nn.Conv2d)]


def posteriors_model(problem: Problem) -> Running:
    """Trains with `posteriors.vi.diag`, by the loop of its quickstart."""
    if problem.fused:
        raise Unable("torchopt has no fused Adam")
    import posteriors
    import torchopt

    net = problem.build()

    def log_posterior(params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        output = functional_call(net, params, (x,))
        prior = posteriors.diag_normal_log_prob(params, sd_diag=PRIOR_SD)
        return prior / DATASET_SIZE - problem.loss.nll(output, y), output

    transform = posteriors.vi.diag.build(
        log_posterior,
        torchopt.adam(lr=LEARNING_RATE),
        temperature=1 / DATASET_SIZE,
        init_log_sds=LOGVAR / 2,
    )
    state = transform.init(dict(net.named_parameters()))
    batch = problem.examples(problem.batch)

    def step() -> None:
        nonlocal state
        state, _ = transform.update(state, batch)

    def at_once(x: Tensor, count: int) -> Any:
        with torch.no_grad():
            params = posteriors.vi.diag.sample(state, (count,))
            outputs = torch.vmap(lambda p: functional_call(net, p, (x,)))(params)
            return torch.var_mean(outputs, 0, correction=0)

    def draw(x: Tensor) -> Any:
        return functional_call(net, posteriors.vi.diag.sample(state), (x,))

    def one_by_one(x: Tensor, count: int) -> Any:
        return draws(lambda: draw(x), count)

    return Running(step, {"`sample` and `vmap`": at_once, "loop of `sample`": one_by_one})
