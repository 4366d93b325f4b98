"""The memory of the process stays the same, however many steps are made."""

import gc
import os
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Importance, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import replay, trace
from torch import nn

from pyro_bayes import ELBO, BayesianModel, likelihoods

STEPS = 200
KEPT = 160_000  # the bytes of one tensor of the weights, the least that a step may keep
X, Y = torch.randn(2, 4, 200)
ESTIMATORS = {"weights": False, "local noise": True, "flipout": "flipout"}
VECTORIZED = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")


def resident():
    """Returns the resident memory in bytes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def growth(step):
    """Returns by how many bytes the memory grows in all steps but the first few."""
    for _ in range(10):
        step()
    before = resident()
    for _ in range(STEPS):
        step()
    return resident() - before


def loss_of(net):
    return (net(X) - Y).square().sum()


def pyro_model(bnn):
    def model():
        with bnn.lift() as net:
            mean = net(X)
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=Y)

    return model


# Each function makes a step of a model.


def trained(module, loss):
    optimizer = torch.optim.Adam(module.parameters())

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def facade(bnn, local_trick):
    def loss():
        with bnn.reparameterize(local_trick) as net:
            return loss_of(net) + bnn.kl_divergence()

    return loss


def in_one_pass(bnn, local_trick):
    def loss():
        with bnn.reparameterize_with_kl(local_trick) as (net, kl):
            return loss_of(net) + kl

    return loss


def objective(bnn, local_trick):
    elbo = ELBO(bnn, likelihoods.Gaussian(1.0), 100, local_trick=local_trick)
    return trained(elbo, lambda: elbo(X, Y))


def svi(bnn, loss, guide=None):
    return SVI(pyro_model(bnn), guide or bnn.guide, pyro.optim.Adam({"lr": 1e-3}), loss).step


def without_step(bnn, loss):
    model = pyro_model(bnn)
    return lambda: loss.loss(model, bnn.guide)


def traces(bnn):
    model = pyro_model(bnn)

    def step():
        guide_trace = trace(bnn.guide).get_trace()
        model_trace = trace(replay(model, guide_trace)).get_trace()
        return model_trace.log_prob_sum() - guide_trace.log_prob_sum()

    return step


def by_estimator(name, make):
    return {
        f"{name}, {estimator}": lambda bnn, trick=trick: make(bnn, trick)
        for estimator, trick in ESTIMATORS.items()
    }


CASES = {
    **by_estimator("facade", lambda bnn, trick: trained(bnn, facade(bnn, trick))),
    **by_estimator("facade without backward", facade),
    **by_estimator("one pass", lambda bnn, trick: trained(bnn, in_one_pass(bnn, trick))),
    **by_estimator("one pass without backward", in_one_pass),
    **by_estimator("ELBO", objective),
    **by_estimator("exact KL", lambda bnn, trick: svi(bnn, Trace_ELBO(), bnn.exact_kl(trick))),
    "SVI": lambda bnn: svi(bnn, Trace_ELBO()),
    "SVI, mean field": lambda bnn: svi(bnn, TraceMeanField_ELBO()),
    "SVI, vectorized": lambda bnn: svi(bnn, Trace_ELBO(**VECTORIZED)),
    "SVI, Renyi": lambda bnn: svi(bnn, RenyiELBO(0.5, num_particles=2)),
    "loss without backward": lambda bnn: without_step(bnn, Trace_ELBO()),
    "importance": lambda bnn: without_step(bnn, RenyiELBO(0, num_particles=2)),
    "importance sampling": lambda bnn: Importance(pyro_model(bnn), bnn.guide, 2).run,
    "guide": lambda bnn: bnn.guide,
    "traces": traces,
    "predictive": lambda bnn: Predictive(pyro_model(bnn), guide=bnn.guide, num_samples=2),
    "predictions": lambda bnn: lambda: bnn.predict(X, num_samples=3),
    "draws": lambda bnn: bnn.sample_params,
    "sampled models": lambda bnn: bnn.sample_model,
    "divergence": lambda bnn: bnn.kl_divergence,
    "divergences": lambda bnn: bnn.kl_divergences,
    "empirical divergence": lambda bnn: lambda: bnn.kl_divergence("empirical"),
    "estimated divergence": lambda bnn: (
        lambda: bnn.kl_divergence(prior=dist.StudentT(3.0, 0.0, 1.0))
    ),
}
NAMED = ["one pass, weights", "SVI", "facade without backward, local noise"]


@pytest.mark.parametrize(
    ("case", "leaves"),
    [*[(case, "flat") for case in CASES], *[(case, "named") for case in NAMED]],
    ids=lambda value: value,
)
def test_memory_stays_the_same(case, leaves):
    bnn = BayesianModel(nn.Linear(200, 200), init_logvar=-4.0, leaves=leaves)
    step = CASES[case](bnn)
    gc.collect()
    gc.disable()  # so that no cycle of references keeps tensors, until they are collected
    try:
        grown = growth(step)
    finally:
        gc.enable()
    assert grown < 0.5 * STEPS * KEPT
