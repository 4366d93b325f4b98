"""The model and guide under Pyro's inference and handlers."""

import gc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    SMCFilter,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.nn import PyroModule
from torch import nn

from pyro_bayes import BayesianModel
from pyro_bayes.posterior import layout
from pyro_bayes.pyro_bridge.guide import MeanField


def make_model(bnn, noise=0.3, batch_size=None):
    def model(x, y=None):
        with bnn.lift() as net:
            mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x), subsample_size=batch_size) as index:
            obs = None if y is None else y.squeeze(-1)[index]
            return pyro.sample("y", dist.Normal(mean[..., index], noise), obs=obs)

    return model


def adam(lr=0.02):
    return pyro.optim.Adam({"lr": lr})


@pytest.fixture
def bnn(net):
    return BayesianModel(net, init_logvar=-4.0)


@pytest.fixture(params=[False, True], ids=["global", "module-local"])
def module_local(request):
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


ELBOS = {
    "trace": lambda: Trace_ELBO(),
    "particles": lambda: Trace_ELBO(num_particles=4),
    "vectorized": lambda: Trace_ELBO(num_particles=8, vectorize_particles=True),
    "mean field": lambda: TraceMeanField_ELBO(),
    "mean field vectorized": lambda: TraceMeanField_ELBO(num_particles=8, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3),
}


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
def test_svi_trains(bnn, data, module_local, elbo):
    model = make_model(bnn, batch_size=6 if module_local else None)
    svi = SVI(model, bnn.guide, adam(0.05), elbo())
    before = {name: p.clone() for name, p in bnn.named_parameters()}
    first = sum(svi.evaluate_loss(*data) for _ in range(8))
    for _ in range(30):
        svi.step(*data)
    assert sum(svi.evaluate_loss(*data) for _ in range(8)) < 0.7 * first
    assert all(not torch.equal(p, before[name]) for name, p in bnn.named_parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_traced_elbo_has_the_same_gradients(net, data):
    # Draws are close to the means. With less noise, the terms of log q that cancel lose digits.
    bnn = BayesianModel(net, init_logvar=-20.0)
    parameters = list(bnn.parameters())

    def gradients(elbo):
        elbo.loss_and_grads(make_model(bnn), bnn.guide, *data)
        found = [parameter.grad for parameter in parameters]
        bnn.zero_grad()
        return found

    traced = gradients(JitTrace_ELBO(ignore_jit_warnings=True))
    torch.testing.assert_close(traced, gradients(Trace_ELBO()), rtol=1e-3, atol=0.1)


def test_particles_and_subsampled_plates_keep_the_expected_loss(bnn, data):
    full, mini = make_model(bnn), make_model(bnn, batch_size=4)
    a = torch.tensor([Trace_ELBO().loss(full, bnn.guide, *data) for _ in range(400)])
    for vectorize in (False, True):
        many = Trace_ELBO(num_particles=200, vectorize_particles=vectorize)
        average = many.loss(full, bnn.guide, *data)
        assert abs(average - a.mean()) < 4 * a.std() * (1 / 200 + 1 / 400) ** 0.5
    b = torch.tensor([Trace_ELBO().loss(mini, bnn.guide, *data) for _ in range(300)])
    assert abs(a.mean() - b.mean()) < 4 * (a.var() / 400 + b.var() / 300).sqrt()


def test_kl_of_the_mean_field_elbo_is_exact(bnn, data):
    def model():
        with bnn.lift():
            pass

    for prior_var in (1.0, 0.3):
        bnn = BayesianModel(bnn.base, prior_var=prior_var)
        losses = [TraceMeanField_ELBO().loss(model, bnn.guide) for _ in range(5)]
        assert max(losses) == min(losses)
        assert losses[0] == pytest.approx(bnn.kl_divergence().item(), rel=1e-5)
    # The prior is not rounded by a conversion there and back.
    bnn.bfloat16().float()
    loss = TraceMeanField_ELBO().loss(model, bnn.guide)
    assert loss == pytest.approx(bnn.kl_divergence().item(), rel=1e-5)


def test_elbo_module_under_a_torch_optimizer(bnn, data, module_local):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.bnn = bnn

        def forward(self, x, y):
            mean = self.bnn(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.3), obs=y.squeeze(-1))

    elbo = Trace_ELBO()(Model(), bnn.guide)
    assert {id(p) for p in bnn.parameters()} <= {id(p) for p in elbo.parameters()}
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = elbo(*data)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])
    stored = set(pyro.get_param_store())
    assert stored == (set() if module_local else {n for n in stored if n.startswith("Bayesian")})


def test_child_of_a_pyro_module_draws_once_per_run(bnn, data):
    class Siamese(PyroModule):
        def __init__(self):
            super().__init__()
            self.bnn = bnn
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.bnn(x) * self.scale, self.bnn(x) * self.scale

    trace = poutine.trace(Siamese()).get_trace(data[0])
    assert torch.equal(*trace.nodes["_RETURN"]["value"])
    sites = [name for name, node in trace.nodes.items() if node["type"] == "sample"]
    assert sites == [name for name, _ in bnn.base.named_parameters()]


def test_model_that_ran_can_become_a_child(bnn, data):
    SVI(make_model(bnn), bnn.guide, adam(), Trace_ELBO()).step(*data)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.bnn = bnn

        def forward(self, x):
            return self.bnn(x)

    model = Model()
    guide_trace = poutine.trace(bnn.guide).get_trace()
    output = poutine.replay(model, trace=guide_trace)(data[0])
    draws = {name: guide_trace.nodes[name]["value"] for name, _ in bnn.base.named_parameters()}
    torch.testing.assert_close(output, torch.func.functional_call(bnn.base, draws, data[0]))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(bnn, data, module_local, parallel):
    SVI(make_model(bnn), bnn.guide, adam(), Trace_ELBO()).step(*data)
    predictive = Predictive(make_model(bnn), guide=bnn.guide, num_samples=40, parallel=parallel)
    draws = predictive(data[0])
    assert draws["y"].shape == (40, 12)
    assert draws["0.weight"].reshape(40, -1).shape == (40, 24)
    assert (draws["y"].std(0) > 0.1).all()


def test_parallel_prediction_equals_the_loop(net, data):
    bnn = BayesianModel(net, init_logvar=-1.0)

    def model(x):
        with bnn.lift() as net:
            pyro.deterministic("mean", net(x).squeeze(-1), event_dim=1)

    draws = {n: s.detach() for n, s in draw_many(bnn, 5).items()}
    loop = torch.stack(
        [
            torch.func.functional_call(net, {n: s[i] for n, s in draws.items()}, data[0])
            for i in range(5)
        ]
    ).squeeze(-1)
    for parallel in (False, True):
        predicted = Predictive(model, draws, return_sites=["mean"], parallel=parallel)(data[0])
        torch.testing.assert_close(predicted["mean"].squeeze(), loop)


def draw_many(bnn, count):
    draws = [bnn.sample_params() for _ in range(count)]
    return {name: torch.stack([d[name] for d in draws]) for name in draws[0]}


def test_vectorized_net_refuses_what_it_cannot_do_right(bnn, data):
    x, _ = data

    def chained():
        with bnn.lift() as net:
            net(net(x).expand(*net(x).shape[:-1], 3))

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(ValueError, match="Expected an input that all 5 particles share"):
        elbo.loss(chained, bnn.guide)

    def item():
        with bnn.lift() as net:
            _ = net.training

    with pytest.raises(AttributeError, match="Expected a call of the network; got its attribute"):
        elbo.loss(item, bnn.guide)

    class Branching(nn.Linear):
        def forward(self, x):
            return x if (self.weight.sum() > 0).item() else super().forward(x)

    branching = BayesianModel(Branching(3, 1))

    def branch():
        with branching.lift() as net:
            net(x)

    with pytest.raises(RuntimeError, match=r"Expected a base that torch.vmap can batch"):
        elbo.loss(branch, branching.guide)


def test_parallel_prediction_aligns_outputs_with_plates():
    class Heteroscedastic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def forward(self, x):
            mean = self.net(x).squeeze(-1)
            return mean, mean.exp().mean()

    bnn = BayesianModel(Heteroscedastic(), init_logvar=-1.0)

    def model(x):
        with bnn.lift() as net:
            mean, scale = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale))

    x = torch.randn(5, 3)
    with pyro.plate("num_particles_vectorized", 5, dim=-2):
        trace = poutine.trace(bnn.guide).get_trace()
        node = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x).nodes["y"]
    mean = node["fn"].mean
    assert mean.shape == (5, 5)
    torch.testing.assert_close(node["fn"].stddev, mean.exp().mean(1, keepdim=True).expand(5, 5))
    # A table of as many rows as draws is an input like any other.
    predictive = Predictive(model, guide=bnn.guide, num_samples=10, parallel=True)
    assert predictive(torch.randn(10, 3))["y"].shape == (10, 10)


def test_vectorized_particles_with_nested_plates(data):
    bnn = BayesianModel(nn.Linear(3, 4), init_logvar=-2.0)
    x, label = data[0], torch.randint(0, 4, (12,))

    def make(event_dim):
        def model():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
                pyro.sample("effect", dist.Normal(0.0, 1.0), obs=torch.zeros(2, 3))
            with bnn.lift(event_dim=event_dim) as net:
                logits = net(x)
            with pyro.plate("data", 12, dim=-1):
                pyro.sample("y", dist.Categorical(logits=logits), obs=label)

        return model

    def losses(**kwargs):
        elbo = Trace_ELBO(num_particles=20, **kwargs)
        return torch.tensor([elbo.loss(make(1), bnn.guide) for _ in range(20)])

    loop, vectorized = losses(), losses(vectorize_particles=True)
    error = ((loop.var() + vectorized.var()) / 20).sqrt()
    assert abs(loop.mean() - vectorized.mean()) < 4 * error
    with pytest.raises(ValueError, match="Expected event_dim for a model with 2 nested plates"):
        Trace_ELBO(num_particles=3, vectorize_particles=True).loss(make(None), bnn.guide)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="Expected event_dim to leave from 0 to 2 dimensions"):
            Trace_ELBO(num_particles=3, vectorize_particles=True).loss(make(wrong), bnn.guide)


def test_chained_nets_are_refused_without_gradients_too(data):
    encoder = BayesianModel(nn.Linear(3, 4), name="encoder")
    decoder = BayesianModel(nn.Linear(4, 1), name="decoder")

    def model():
        with encoder.lift() as f, decoder.lift() as g, pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(g(f(data[0])).squeeze(-1), 1.0), obs=torch.zeros(12))

    def guide():
        encoder.guide()
        decoder.guide()

    svi = SVI(model, guide, adam(), Trace_ELBO(num_particles=5, vectorize_particles=True))
    with pytest.raises(ValueError, match="all 5 particles share"):
        svi.evaluate_loss()


def test_dropout_differs_between_vectorized_particles(data):
    bnn = BayesianModel(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)), init_logvar=-20.0)

    def model():
        with bnn.lift() as net:
            return net(data[0])

    with pyro.plate("num_particles_vectorized", 2, dim=-1):
        output = poutine.replay(model, trace=poutine.trace(bnn.guide).get_trace())()
    assert not torch.equal(output[0] == 0, output[1] == 0)


def test_trace_replay_condition_mask_scale(bnn, data):
    model = make_model(bnn)
    guide_trace = poutine.trace(bnn.guide).get_trace(*data)
    trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*data)
    sites = [n for n, node in trace.nodes.items() if node["type"] == "sample"]
    assert sites[:4] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    trace.compute_log_prob()
    assert all(trace.nodes[n]["log_prob"].shape == () for n in sites[:4])

    zeros = {name: torch.zeros_like(p) for name, p in bnn.base.named_parameters()}
    conditioned = poutine.trace(poutine.condition(model, zeros)).get_trace(*data)
    assert (conditioned.nodes["y"]["fn"].mean == 0).all()

    masked = poutine.trace(poutine.mask(model, mask=False)).get_trace(*data)
    assert masked.log_prob_sum() == 0

    scaled = poutine.trace(
        poutine.scale(poutine.replay(model, trace=guide_trace), scale=2.0)
    ).get_trace(*data)
    torch.testing.assert_close(scaled.log_prob_sum(), 2 * trace.log_prob_sum())


@pytest.mark.parametrize("block", [layout.CHUNK, 1])
def test_log_prob_of_the_sites_is_that_of_prior_and_posterior(bnn, data, block, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", block)
    guide_trace = poutine.trace(bnn.guide).get_trace()
    trace = poutine.trace(poutine.replay(make_model(bnn), trace=guide_trace)).get_trace(*data)
    guide_trace.compute_log_prob()
    trace.compute_log_prob()
    means, logvars = (dict(m.named_parameters()) for m in (bnn.means, bnn.logvars))
    for name, mean in means.items():
        value = guide_trace.nodes[name]["value"]
        q = torch.distributions.Normal(mean, (0.5 * logvars[name]).exp())
        p = torch.distributions.Normal(0.0, 1.0)
        torch.testing.assert_close(guide_trace.nodes[name]["log_prob"], q.log_prob(value).sum())
        density = trace.nodes[name]["log_prob"]
        torch.testing.assert_close(density, p.log_prob(value).sum())
        gradient = torch.autograd.grad(density, value, retain_graph=True)[0]
        torch.testing.assert_close(gradient, -value / 1.0)


def test_facade_and_guide_draw_the_same_under_a_seed(bnn):
    torch.manual_seed(4)
    facade = bnn.sample_params()
    torch.manual_seed(4)
    guide = bnn.guide()
    for name, draw in facade.items():
        torch.testing.assert_close(draw, guide[name])


def test_guide_is_an_auto_normal(bnn, net):
    assert isinstance(bnn.guide, AutoNormal)
    assert isinstance(bnn.guide, MeanField)
    median = bnn.guide.median()
    quantiles = bnn.guide.quantiles([0.025, 0.5, 0.975])
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(median[name], parameter)
        torch.testing.assert_close(quantiles[name][1], parameter)
        width = quantiles[name][2] - quantiles[name][0]
        expected = 2 * 1.959964 * math.exp(-2.0)
        torch.testing.assert_close(width, torch.full_like(width, expected), rtol=1e-4, atol=0)
    median["0.weight"].zero_()
    assert net[0].weight.abs().sum() > 0
    assert bnn.guide.locs.get_parameter("0.weight") is bnn.means.get_parameter("0.weight")
    scales = getattr(bnn.guide.scales, "0").weight
    torch.testing.assert_close(scales, torch.full_like(scales, math.exp(-2.0)))


def test_prior_is_a_pyro_module_of_named_sites(net):
    bnn = BayesianModel(net, prior_var=4.0, name="net")
    assert isinstance(bnn.prior, PyroModule)
    trace = poutine.trace(bnn.prior).get_trace()
    names = [n for n, node in trace.nodes.items() if node["type"] == "sample"]
    assert names == [f"net.{name}" for name, _ in net.named_parameters()]
    site = trace.nodes["net.0.weight"]["fn"]
    assert (site.batch_shape, site.event_shape) == ((), (8, 3))
    torch.testing.assert_close(site.variance, torch.full((8, 3), 4.0))
    bnn.double()
    assert bnn.prior()["0.weight"].dtype == torch.float64


def test_two_models_in_one_pyro_model(data):
    gc.collect()  # models of other tests may hold their names
    x, y = data
    encoder = BayesianModel(nn.Linear(3, 4), name="encoder")
    decoder = BayesianModel(nn.Linear(4, 1), name="decoder")

    def model():
        with encoder.lift() as f, decoder.lift() as g:
            mean = g(f(x).relu()).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y.squeeze(-1))

    def guide():
        encoder.guide()
        decoder.guide()

    svi = SVI(model, guide, adam(), Trace_ELBO())
    losses = [svi.step() for _ in range(80)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert {n.split(".")[0] for n in pyro.get_param_store()} == {"encoder", "decoder"}


def test_deterministic_parameters_train_under_svi(net, data, module_local):
    net[0].bias.requires_grad_(False)
    bnn = BayesianModel(net, include_params="2")
    weight, bias = net[0].weight.clone(), net[0].bias.clone()
    trace = poutine.trace(make_model(bnn)).get_trace(*data)
    params = {n: node for n, node in trace.nodes.items() if node["type"] == "param"}
    assert len(params) == 1
    (site,) = params.values()
    assert site["value"].unconstrained() is net[0].weight
    SVI(make_model(bnn), bnn.guide, adam(), Trace_ELBO()).step(*data)
    assert not torch.equal(net[0].weight, weight)
    assert torch.equal(net[0].bias, bias)


def test_deterministic_parameters_can_be_lifted_by_a_handler(net, data):
    bnn = BayesianModel(net, include_params="2", name="net")
    prior = {"net.base.0.bias": dist.Normal(torch.full((8,), 50.0), 0.01).to_event(1)}
    lifted = poutine.lift(make_model(bnn), prior=prior)
    trace = poutine.trace(lifted).get_trace(*data)
    assert trace.nodes["net.base.0.bias"]["type"] == "sample"
    far = trace.nodes["y"]["fn"].mean
    assert (far - make_trace_mean(bnn, data)).abs().min() > 1


def make_trace_mean(bnn, data):
    return poutine.trace(make_model(bnn)).get_trace(*data).nodes["y"]["fn"].mean


def test_calling_the_model_under_a_handler_is_lift(bnn, data):
    def model():
        return bnn(data[0])

    trace = poutine.trace(model).get_trace()
    values = {n: trace.nodes[n]["value"] for n, _ in bnn.base.named_parameters()}
    expected = torch.func.functional_call(bnn.base, values, data[0])
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)


def test_lift_outside_of_handlers_draws_from_the_prior(net, data):
    bnn = BayesianModel(net, prior_var=100.0)
    with bnn.lift() as lifted:
        assert lifted is net
        assert lifted[0].weight.abs().max() > 5
    assert net[0].weight.abs().max() < 5


def test_lift_twice_teaches(bnn, data):
    def model():
        bnn(data[0])
        bnn(data[0])

    def guide():
        bnn.guide()
        bnn.guide()

    for run in (model, guide):
        with pytest.raises(RuntimeError, match="Expected each site once per run"):
            poutine.trace(run).get_trace()
    assert all(isinstance(p, nn.Parameter) for p in bnn.base.parameters())


def test_lift_inside_a_plate_teaches(bnn, data):
    def model():
        with pyro.plate("data", len(data[0])):
            bnn(data[0])

    with pytest.raises(ValueError, match=r"Expected lift\(\) outside of plates; .*'data'"):
        poutine.trace(model).get_trace()
    assert all(isinstance(p, nn.Parameter) for p in bnn.base.parameters())


def test_nuts_on_the_same_model(data):
    x, y = data[0][:, :1], data[1]
    bnn = BayesianModel(nn.Linear(1, 1))
    model = make_model(bnn, noise=1.0)
    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()
    features = torch.cat([x, torch.ones_like(x)], 1).double()
    precision = features.T @ features + torch.eye(2, dtype=torch.float64)
    exact = torch.linalg.solve(precision, features.T @ y.double()).squeeze(-1)
    sampled = torch.stack([draws["weight"].flatten(), draws["bias"].flatten()]).double()
    covariance = torch.linalg.inv(precision)
    error = (sampled.mean(1) - exact) / (covariance.diag() / 100).sqrt()
    assert error.abs().max() < 5


def test_sites_follow_the_initial_prototype_without_running_the_base():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    statistics = [b.clone() for b in net.buffers()]
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    bnn = BayesianModel(net)
    assert bnn.guide.prototype_trace is not None
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(statistics, net.buffers(), strict=True))
    assert init_to_mean is bnn.guide.init_loc_fn


def test_conditioned_sites_count_for_each_particle(bnn, data):
    conditioned = poutine.condition(make_model(bnn), {"2.bias": torch.zeros(1)})
    guide = poutine.block(bnn.guide, hide=["2.bias"])

    def losses(vectorize):
        elbo = Trace_ELBO(num_particles=200, vectorize_particles=vectorize, max_plate_nesting=1)
        return elbo.loss(conditioned, guide, *data)

    assert losses(True) == pytest.approx(losses(False), rel=0.1)


def test_densities_of_whole_numbers_keep_their_digits():
    prior = BayesianModel(nn.Linear(2, 1, bias=False)).prior
    trace = poutine.trace(poutine.condition(prior, {"weight": torch.ones(1, 2).long()})).get_trace()
    assert trace.log_prob_sum().item() == pytest.approx(-1 - math.log(2 * math.pi))


IMAGE = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 1))


@pytest.mark.parametrize("latent", [None, "after", "before"])
def test_inputs_as_many_as_draws(latent):
    bnn, x = BayesianModel(IMAGE), torch.randn(4, 1, 8, 8)

    def sample(when):
        return pyro.sample("scale", dist.LogNormal(0.0, 1.0)) if latent == when else 1.0

    def model():
        scale = sample("before")
        with bnn.lift() as net:
            mean = (net(x) + net(x)).squeeze(-1)
        scale = scale * sample("after")
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mean, scale))

    def guide():
        bnn.guide()
        sample(latent)

    predictive = Predictive(model, guide=guide, num_samples=4, parallel=True)
    if latent == "before":  # the images may have been made of the latent variable
        with pytest.raises(ValueError, match="all 4 particles share"):
            predictive()
    else:
        assert predictive()["y"].shape == (4, 4)


VARYING = {
    "enumerated": (nn.Linear(3, 1), dist.Categorical(torch.ones(3)),
                   lambda x, z: x + z.unsqueeze(-1).float()),
    "index": (nn.Embedding(12, 1), dist.Poisson(2.0), lambda x, z: z.long().clamp_max(11)),
    "whole": (nn.Linear(12, 1), dist.Normal(0.0, 1.0), lambda x, z: z),
}  # fmt: skip


@pytest.mark.parametrize("particles", [3, 4])
@pytest.mark.parametrize(("module", "prior", "make"), VARYING.values(), ids=VARYING)
def test_inputs_that_vary_are_refused(data, module, prior, make, particles):
    bnn, x = BayesianModel(module), data[0]
    infer = {"enumerate": "parallel"} if prior.has_enumerate_support else {}

    def model():
        with bnn.lift() as net, pyro.plate("data", 12):
            net(make(x, pyro.sample("z", prior, infer=infer)))

    with pyro.plate("num_particles_vectorized", particles, dim=-2):
        trace = poutine.trace(bnn.guide).get_trace()
        run = poutine.enum(poutine.replay(model, trace), first_available_dim=-3)
        with pytest.raises(ValueError, match=f"all {particles} particles share"):
            poutine.trace(run).get_trace()


def test_filter_runs_a_net_per_particle():
    bnn = BayesianModel(nn.Linear(1, 1, bias=False), init_logvar=-4.0)
    nn.init.constant_(bnn.means.weight, 2.0)

    class Walk:
        def __init__(self, statements):
            self.statements = statements

        def init(self, state):
            if self.statements is None:
                with bnn.lift() as net:
                    start = net(torch.ones(1, 1)).reshape(-1)
                state["z"] = pyro.sample("z", dist.Normal(start, 0.1))
            else:
                self.statements()
                pyro.sample("z", dist.Normal(2.0, 0.2))

    walks = Walk(None), Walk(bnn.guide)
    smc = SMCFilter(*walks, num_particles=400, max_plate_nesting=0)
    smc.init()
    assert smc.get_empirical()["z"].mean.item() != 2
    assert len(smc.state["z"].unique()) > 100

    def inside():
        with pyro.plate("particles", 4), bnn.lift():
            pass

    with pytest.raises(ValueError, match="outside of plates"):
        Trace_ELBO().loss(inside, bnn.guide)


def test_divergences_of_replayed_particles_count_each():
    bnn = BayesianModel(nn.Linear(3, 1))
    with pyro.plate("num_particles_vectorized", 5, dim=-1):
        trace = poutine.trace(bnn.exact_kl()).get_trace()
        replayed = poutine.trace(poutine.replay(bnn.prior, trace)).get_trace()
    assert replayed.log_prob_sum().item() == pytest.approx(-5 * bnn.kl_divergence().item())
