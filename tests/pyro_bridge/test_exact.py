"""SVI with the exact KL divergence, and with local noise or flipout."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import infer, poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.importance import vectorized_importance_weights
from torch import nn

from pyro_bayes import BayesianModel
from pyro_bayes.noise.gaussian_tensor import GaussianTensor

ESTIMATORS = [False, True, "flipout"]
ELBOS = [Trace_ELBO, TraceMeanField_ELBO]
N = 30
every_estimator = pytest.mark.parametrize("local_trick", ESTIMATORS)


@pytest.fixture
def bnn(net):
    return BayesianModel(net, init_logvar=-2.0, prior_var=0.5, name="bnn")


@pytest.fixture
def model(bnn, data):
    x, y = data

    def model():
        with bnn.lift() as net:
            mean = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y.squeeze(-1))

    return model


def losses(elbo, model, guide, count):
    with torch.no_grad():
        return torch.tensor([elbo.loss(model, guide) for _ in range(count)])


@every_estimator
@pytest.mark.parametrize("elbo", ELBOS)
def test_divergence_is_exact(bnn, local_trick, elbo):
    def model():
        with bnn.lift():
            pass

    loss = elbo().loss(model, bnn.exact_kl(local_trick))
    assert loss == pytest.approx(bnn.kl_divergence().item(), rel=1e-6)


@every_estimator
@pytest.mark.parametrize("elbo", ELBOS)
def test_loss_and_gradients_are_those_of_the_facade(bnn, model, data, local_trick, elbo):
    x, y = data
    guide = bnn.exact_kl(local_trick)
    trained = list(bnn.guide.parameters())
    torch.manual_seed(3)
    loss = elbo().differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, trained)
    torch.manual_seed(3)
    with bnn.reparameterize(local_trick) as net:
        likelihood = dist.Normal(net(x).squeeze(-1), 0.5)
        nll = -likelihood.log_prob(y.squeeze(-1)).sum() * N / len(x)
    expected_loss = nll + bnn.kl_divergence()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, torch.autograd.grad(expected_loss, trained))


HANDLERS = {
    "scale": lambda f: poutine.scale(f, 0.1),
    "masked": lambda f: poutine.mask(f, torch.tensor(False)),
}


@pytest.mark.parametrize("local_trick", [False, True])
@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
@pytest.mark.parametrize("elbo", ELBOS)
def test_expected_loss_is_that_of_the_guide(bnn, model, local_trick, handler, elbo):
    model = handler(model)
    ordinary = losses(elbo(), model, handler(bnn.guide), 150)
    exact = losses(elbo(), model, handler(bnn.exact_kl(local_trick)), 150)
    error = ((ordinary.var() + exact.var()) / 150).sqrt()
    assert (ordinary.mean() - exact.mean()).abs() <= 4.5 * error


def test_variance_is_lower(bnn, data):
    def prior():
        with bnn.lift() as net:
            pyro.factor("loss", -net(data[0]).square().mean())

    ordinary = losses(Trace_ELBO(), prior, bnn.guide, 150)
    exact, local = (losses(Trace_ELBO(), prior, bnn.exact_kl(t), 150) for t in (False, True))
    assert exact.var() < 0.2 * ordinary.var()
    assert local.var() < exact.var()


@every_estimator
def test_vectorised_particles_have_noise_of_their_own(bnn, model, local_trick):
    guide = bnn.exact_kl(local_trick)
    one = losses(Trace_ELBO(), model, guide, 300)
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    many = losses(elbo, model, guide, 60)
    error = (one.var() / 300 + many.var() / 60).sqrt()
    assert (one.mean() - many.mean()).abs() <= 4.5 * error
    assert 0.5 < many.var() * 20 / one.var() < 2
    loss = elbo.differentiable_loss(model, guide)
    grads = torch.autograd.grad(loss, list(bnn.guide.parameters()))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_vectorised_noise_is_fixed_in_a_run(bnn, local_trick):
    x = torch.randn(4, 3)

    def model():
        with bnn.lift() as net:
            first, second = net(x).squeeze(-1), net(x).squeeze(-1)
        assert torch.equal(first, second)
        assert first.shape == (5, 4)
        assert len(first[:, 0].unique()) == 5
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(first, 1.0), obs=torch.zeros(4))

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    elbo.loss(model, bnn.exact_kl(local_trick))


@every_estimator
def test_svi_trains_the_guide(bnn, model, local_trick):
    guide, adam = bnn.exact_kl(local_trick), pyro.optim.Adam({"lr": 1e-2})
    before = [p.detach().clone() for p in bnn.guide.parameters()]
    svi = SVI(model, guide, adam, Trace_ELBO())
    start = losses(Trace_ELBO(), model, guide, 50).mean()
    for _ in range(100):
        svi.step()
    assert losses(Trace_ELBO(), model, guide, 50).mean() < start
    assert not any(map(torch.equal, before, bnn.guide.parameters()))


@pytest.mark.parametrize("parallel", [False, True])
@every_estimator
def test_predictive_draws_from_the_posterior(bnn, local_trick, parallel):
    x = torch.randn(4, 3)

    def model():
        with bnn.lift() as net:
            mean = net(x).squeeze(-1)
        with pyro.plate("data", 4):
            return pyro.sample("y", dist.Normal(mean, 0.01))

    draws = Predictive(model, guide=bnn.exact_kl(local_trick), num_samples=300, parallel=parallel)()
    ordinary = Predictive(model, guide=bnn.guide, num_samples=300)()
    assert type(draws["y"]) is torch.Tensor
    ratio = draws["y"].var(0).mean() / ordinary["y"].var(0).mean()
    assert 0.6 < ratio < 1.7


def test_two_models_of_which_one_is_exact(net):
    first = BayesianModel(net, name="first", init_logvar=-2.0)
    second = BayesianModel(nn.Linear(3, 1), name="second", init_logvar=-2.0)
    exact = first.exact_kl(True)

    def model():
        with first.lift() as a, second.lift() as b:
            pyro.factor("f", (a(torch.ones(2, 3)) + b(torch.ones(2, 3))).sum())

    def guide():
        exact()
        second.guide()

    def ordinary():
        first.guide()
        second.guide()

    found, expected = (losses(Trace_ELBO(), model, g, 400) for g in (guide, ordinary))
    error = ((found.var() + expected.var()) / 400).sqrt()
    assert (found.mean() - expected.mean()).abs() <= 4.5 * error


def test_sites_are_gaussian_tensors(bnn):
    trace = poutine.trace(bnn.exact_kl(True)).get_trace()
    assert set(trace.stochastic_nodes) == set(bnn.guide.sites)
    value = trace.nodes["bnn.0.weight"]["value"]
    assert isinstance(value, GaussianTensor)
    assert value.shape == bnn.base[0].weight.shape
    fn = trace.nodes["bnn.0.weight"]["fn"]
    torch.testing.assert_close(fn.log_prob(torch.zeros(8, 3)), expected_density(bnn))


def expected_density(bnn):
    mean, logvar = bnn.guide.posterior()["0.weight"]
    return torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(torch.zeros(8, 3)).sum()


@pytest.mark.parametrize("arguments", [{"local_trick": "yes"}, {"batch_dim": -1}])
def test_errors_come_at_once(bnn, arguments):
    with pytest.raises(ValueError, match=r"Expected .*; got"):
        bnn.exact_kl(**arguments)


def test_values_of_a_guide_that_draws_weights_are_draws():
    bnn, x = BayesianModel(nn.Linear(3, 2), init_logvar=-1.0), torch.randn(4, 3)
    value = poutine.trace(bnn.exact_kl()).get_trace().nodes["weight"]["value"]
    assert torch.equal(F.linear(x, value), F.linear(x, value.detach()))


@pytest.mark.parametrize("parallel", [False, True])
@every_estimator
def test_predicted_samples_explain_the_predictions(local_trick, parallel):
    bnn, x = BayesianModel(nn.Linear(3, 1), init_logvar=-1.0), torch.randn(4, 3)

    def model():
        with bnn.lift() as net, pyro.plate("data", 4):
            pyro.deterministic("mean", net(x).squeeze(-1))

    guide = bnn.exact_kl(local_trick)
    sites = ["weight", "bias", "mean"]
    predict = Predictive(model, guide=guide, num_samples=7, parallel=parallel, return_sites=sites)
    samples = predict()
    assert all(type(value) is torch.Tensor for value in samples.values())
    weight, bias = samples["weight"].reshape(7, 3), samples["bias"].reshape(7, 1)
    torch.testing.assert_close(samples["mean"].reshape(7, 4), weight @ x.T + bias)


def test_divergence_has_its_gradient_after_one_without():
    bnn = BayesianModel(nn.Linear(3, 1))
    trace = pyro.poutine.trace(bnn.exact_kl()).get_trace()
    prior = pyro.poutine.replay(bnn.prior, trace)
    with torch.no_grad():
        pyro.poutine.trace(prior).get_trace().log_prob_sum()
    density = pyro.poutine.trace(prior).get_trace().log_prob_sum()
    torch.testing.assert_close(density, -bnn.kl_divergence())
    density.backward()
    torch.testing.assert_close(bnn.guide.means.weight.grad, -bnn.base.weight.detach())


class OtherPrior(poutine.messenger.Messenger):
    """Replaces the prior of a site by a normal distribution."""

    def _pyro_sample(self, msg):
        if msg["name"] == "bnn.0.weight":
            msg["fn"] = dist.Normal(torch.zeros(8, 3), 0.1).to_event(2)


ONE = {"bnn.0.weight": torch.zeros(8, 3)}
ALL = ONE | {
    "bnn.0.bias": torch.zeros(8),
    "bnn.2.weight": torch.zeros(1, 8),
    "bnn.2.bias": torch.zeros(1),
}
HANDLED = {
    "another prior": (OtherPrior(), None, "own prior"),
    "one conditioned": (lambda m: poutine.condition(m, ONE), None, "entropy of the guide"),
    "all conditioned": (lambda m: poutine.condition(m, ALL), None, "entropy of the guide"),
    "hidden": (lambda m: poutine.block(m, hide=["bnn.2.bias"]), None, "entropy of the guide"),
    "scaled model": (lambda m: poutine.scale(m, 0.1), None, "one scale and mask"),
    "scaled guide": (None, lambda g: poutine.scale(g, 0.1), "one scale and mask"),
    "masked model": (lambda m: poutine.mask(m, torch.tensor(False)), None, "one scale and mask"),
    "intervention": (lambda m: poutine.do(m, ONE), None, None),
    "masked guide": (None, lambda g: poutine.mask(g, False), None),
    "conditioned and hidden": (
        lambda m: poutine.condition(m, ONE), lambda g: poutine.block(g, hide=[*ONE]), None
    ),
}  # fmt: skip
"""Handlers of the model and the guide, and what the refusal says, if it is not right."""


@pytest.mark.parametrize(("of_model", "of_guide", "message"), HANDLED.values(), ids=HANDLED)
@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide")
def test_handlers_are_right_or_refused(bnn, model, of_model, of_guide, message):
    exact, ordinary = bnn.exact_kl(), bnn.guide
    if of_guide is not None:
        exact, ordinary = of_guide(exact), of_guide(ordinary)
    model = model if of_model is None else of_model(model)
    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            Trace_ELBO().loss(model, exact)
        return
    found, expected = (
        losses(Trace_ELBO(), model, exact, 60),
        losses(Trace_ELBO(), model, ordinary, 60),
    )
    error = ((found.var() + expected.var()) / 60).sqrt()
    assert (found.mean() - expected.mean()).abs() <= 4.5 * error


def importance(model, guide):
    return infer.Importance(model, guide, 3).run().get_log_normalizer()


def vectorised(model, guide):
    return vectorized_importance_weights(model, guide, num_samples=3, max_plate_nesting=1)[0].exp()


class Filtered:
    def __init__(self, f):
        self.f = f

    def init(self, state):
        self.f()


PARTICLES = {"num_particles": 3, "max_plate_nesting": 1}
WEIGHTED = {
    "Importance": importance,
    "importance weights": vectorised,
    "PSIS": lambda m, g: infer.importance.psis_diagnostic(m, g, **PARTICLES),
    "Renyi": lambda m, g: infer.RenyiELBO(num_particles=3).loss(m, g),
    "Renyi's gradient": lambda m, g: infer.RenyiELBO(
        vectorize_particles=True, **PARTICLES
    ).loss_and_grads(m, g),
    "tail-adaptive": lambda m, g: infer.TraceTailAdaptive_ELBO(
        vectorize_particles=True, **PARTICLES
    ).loss_and_grads(m, g),
    "tensor Monte Carlo": lambda m, g: infer.TraceTMC_ELBO(max_plate_nesting=1).loss(
        m, infer.config_enumerate(g, "parallel", num_samples=3)
    ),
    "filter": lambda m, g: infer.SMCFilter(Filtered(m), Filtered(g), 3, 1).init(),
}


@pytest.mark.filterwarnings("ignore:Not enough tail samples")
@pytest.mark.parametrize("estimate", WEIGHTED.values(), ids=WEIGHTED)
def test_importance_weights_are_refused(bnn, model, estimate):
    estimate(model, bnn.guide)
    with pytest.raises(RuntimeError, match="no densities of draws"):
        estimate(model, bnn.exact_kl())


def test_other_sums_of_log_densities_are_right(bnn, data):
    x, y = data

    def make(enumerate):
        def model():
            with bnn.lift() as net:
                mean = net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.3), infer=enumerate)
                pyro.sample("y", dist.Normal(mean + z, 0.5), obs=y.squeeze(-1))

        return model

    def beside(guide):
        def joint():
            guide()
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(0.5))

        return joint

    enumerated = make({"enumerate": "parallel"})
    for elbo, model, wrap in (
        (infer.TraceGraph_ELBO(), make({}), beside),
        (infer.TraceEnum_ELBO(max_plate_nesting=1), enumerated, lambda guide: guide),
    ):
        found = losses(elbo, model, wrap(bnn.exact_kl()), 60)
        expected = losses(elbo, model, wrap(bnn.guide), 60)
        error = ((found.var() + expected.var()) / 60).sqrt()
        assert (found.mean() - expected.mean()).abs() <= 4.5 * error


def test_wake_sleep_replaces_values_by_draws(bnn, model):
    elbo = infer.ReweightedWakeSleep(model_has_params=False, **PARTICLES)
    found, expected = (
        torch.tensor([elbo.loss(model, guide)[0] for _ in range(60)])
        for guide in (bnn.exact_kl(), bnn.guide)
    )
    error = ((found.var() + expected.var()) / 60).sqrt()
    assert (found.mean() - expected.mean()).abs() <= 4.5 * error
