"""Zuko's normalizing flows as a base, and parity with `zuko.bayesian`."""

import math

import pyro
import pytest
import torch
import zuko
import zuko.bayesian
from pyro import poutine
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_bayes import BayesianModel
from pyro_bayes.noise.gaussian_tensor import drawn
from pyro_bayes.posterior import gaussian

FLOWS = {
    "NSF": lambda: zuko.flows.NSF(2, 3, transforms=2, hidden_features=(16,)),
    "MAF": lambda: zuko.flows.MAF(2, 3, transforms=2, hidden_features=(16,)),
    "NICE": lambda: zuko.flows.NICE(2, 3, transforms=2, hidden_features=(16,)),
    "NAF": lambda: zuko.flows.NAF(2, 3, transforms=1, hidden_features=(16,)),
    "SOSPF": lambda: zuko.flows.SOSPF(2, 3, transforms=1, hidden_features=(16,)),
}


@pytest.fixture
def data():
    c = torch.randn(32, 3)
    return 0.3 * torch.randn(32, 2) + c[:, :2], c


@pytest.fixture(params=FLOWS, ids=str)
def bnn(request):
    return BayesianModel(FLOWS[request.param](), init_logvar=-6.0)


def make_model(bnn):
    def model(x, c):
        with bnn.lift() as flow:
            density = flow(c)
            with pyro.plate("data", len(c)):
                pyro.sample("x", ZukoToPyro(density), obs=x)

    return model


@pytest.mark.parametrize("local_trick", [False, True])
def test_log_prob_is_fixed_in_a_context_and_trains(bnn, data, local_trick):
    x, c = data
    optimizer = torch.optim.Adam(bnn.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with bnn.reparameterize(local_trick) as flow:
            log_prob = flow(c).log_prob(x)
            assert torch.equal(flow(c).log_prob(x), log_prob)
        losses.append(-log_prob.mean())
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None for p in bnn.parameters())
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi(bnn, data, elbo):
    svi = SVI(make_model(bnn), bnn.guide, pyro.optim.Adam({"lr": 3e-3}), elbo())
    before = {name: p.clone() for name, p in bnn.named_parameters()}
    for _ in range(10):
        assert math.isfinite(svi.step(*data))
    for name, parameter in bnn.named_parameters():
        if "means" in name:
            assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize("plate", ["inside", "outside"])
def test_density_of_an_observed_flow_is_that_of_the_draw(bnn, data, plate):
    x, c = data

    def model():
        with bnn.lift() as flow:
            density = ZukoToPyro(flow(c))
            if plate == "inside":
                with pyro.plate("data", len(c)):
                    pyro.sample("x", density, obs=x)
            else:
                pyro.sample("x", density, obs=x)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()  # after the base was given back
    draws = {name: trace.nodes[name]["value"] for name in bnn.guide.sites}
    with bnn.swap(draws):
        expected = bnn.base(c).log_prob(x)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


def test_density_of_a_replayed_flow_is_that_of_the_draw(data):
    bnn = BayesianModel(zuko.flows.MAF(2, transforms=1), init_logvar=-2.0)

    def model():
        with bnn.lift() as flow:
            return pyro.sample("x", ZukoToPyro(flow()))

    first = poutine.trace(model).get_trace()
    second = poutine.trace(poutine.replay(model, trace=first)).get_trace()
    for trace in (first, second):
        trace.compute_log_prob()
    torch.testing.assert_close(
        first.nodes["x"]["log_prob"], second.nodes["x"]["log_prob"], rtol=1e-4, atol=1e-4
    )


def test_log_prob_inside_lift_as_a_factor(bnn, data):
    x, c = data

    def model():
        with bnn.lift() as flow:
            pyro.factor("log_likelihood", flow(c).log_prob(x).sum())

    svi = SVI(model, bnn.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step())


def test_vectorized_flow_teaches(data):
    bnn = BayesianModel(zuko.flows.MAF(2, 3, transforms=1))
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(RuntimeError, match=r"Expected a base that torch.vmap can batch over draws"):
        elbo.loss(make_model(bnn), bnn.guide, *data)


# Parity with zuko.bayesian


def twins(make):
    """One model of each library, with the same means and variances."""
    base = make()
    ours = BayesianModel(make(), init_logvar=-3.0)
    theirs = zuko.bayesian.BayesianModel(base)
    with torch.no_grad():
        for name, mean in ours.means.named_parameters():
            key = name.replace(".", "-")
            logvar = ours.logvars.get_parameter(name)
            mean.normal_(std=0.3)
            logvar.uniform_(-6.0, -1.0)
            theirs.means[key].copy_(mean)
            # zuko bends its parameter u to u/√(1 + (u/18)²), which is undone here.
            theirs.logvars[key].copy_(logvar / (1 - (logvar / 18) ** 2).sqrt())
    return ours, theirs


BASES = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)),
    "flow": lambda: zuko.flows.MAF(1, 3, transforms=1, hidden_features=(8,)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("prior_var", [0.5, 1.0])
def test_same_kl_as_zuko(base, prior_var):
    ours, theirs = twins(BASES[base])
    a, b = (model.double().kl_divergence(prior_var) for model in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("local_trick", [False, True])
@torch.no_grad()
def test_same_expected_loss_as_zuko(base, local_trick):
    ours, theirs = twins(BASES[base])
    x, y = torch.randn(16, 3), torch.randn(16, 1)

    def losses(model, count=1000):
        found = []
        for _ in range(count):
            with model.reparameterize(local_trick) as net:
                out = net(x)
                loss = (out - y).square() if base == "mlp" else out.log_prob(y).clamp_min(-10)
                found.append(loss.mean())
        return torch.stack(found)

    a, b = losses(ours), losses(theirs)
    error = ((a.var() + b.var()) / len(a)).sqrt()
    assert (a.mean() - b.mean()).abs() < 4 * error
    torch.testing.assert_close(a.std(), b.std(), rtol=0.25, atol=0)


CONTINUOUS = {
    "CNF": lambda: zuko.flows.CNF(2, 3, hidden_features=(8,)),
    "UNAF": lambda: zuko.flows.UNAF(2, 3, transforms=1, hidden_features=(8,)),
}


@pytest.mark.parametrize("local_trick", [True, "flipout"])
@pytest.mark.parametrize("flow", CONTINUOUS.values(), ids=CONTINUOUS)
def test_flows_with_autograd_inside_use_one_draw(flow, data, local_trick):
    """Their parameters go through an autograd function, which must see the draw's gradient."""
    base, (x, c) = flow().double(), (t.double() for t in data)
    rows = BayesianModel(base).summary(lambda f: f(c).log_prob(x), local_trick=local_trick).rows
    inside = [row.parameter for row in rows if row.noise.startswith("one draw")]
    bnn = BayesianModel(base, init_logvar=-4.0, include_params=inside)
    trained = list(bnn.guide.parameters())

    def gradients(value):
        return value.detach(), *torch.autograd.grad(value, trained)

    with bnn.reparameterize(local_trick) as model:
        draws = {name: drawn(p) for name, p in model.named_parameters() if name in inside}
        density = gradients(model(c).log_prob(x).mean())
    with bnn.reparameterize(local_trick) as model:
        sample = gradients(model(c).rsample().square().mean())
    posterior = bnn.guide.posterior()
    draws = {n: gaussian.draw(*q, noise_of(draws[n], *q)) for n, q in posterior.items()}
    with bnn.hold(draws) as model:
        expected = gradients(model(c).log_prob(x).mean())
    torch.testing.assert_close(density, expected, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in sample)


def noise_of(draw, mean, logvar):
    return ((draw - mean) / (0.5 * logvar).exp()).detach()


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_densities_are_those_of_the_transformation_without_gradients_too(local_trick):
    """The quadrature inside must meet one integrand, also when nothing is differentiated."""
    bnn = BayesianModel(zuko.flows.UNAF(1, 3, transforms=1, hidden_features=(8,)), init_logvar=-4.0)
    bnn.double()
    x, c = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad(), bnn.reparameterize(local_trick) as flow:
        transform = flow(c).transform
        step = 1e-4
        slope = (transform(x + step) - transform(x - step)).squeeze(-1) / (2 * step)
        torch.testing.assert_close(
            transform.log_abs_det_jacobian(x, transform(x)), slope.log(), rtol=1e-3, atol=1e-3
        )
