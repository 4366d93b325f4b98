"""Prior variances by pattern, and those that the posterior makes most probable."""

import copy
import io
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyro_bayes import ELBO, BayesianModel, svi_model
from pyro_bayes.likelihoods import Gaussian
from pyro_bayes.posterior.layout import Flat
from pyro_bayes.priors import Empirical

RULES = {
    "tensor": ("empirical", {n: () for n in ("0.weight", "0.bias", "2.weight", "2.bias")}),
    "each": (
        {"*.weight": Empirical(each=1), "": "empirical"},
        {"0.weight": (1,), "2.weight": (1,), "0.bias": (), "2.bias": ()},
    ),
    "negative": (
        {"*.weight": Empirical(each=(-2, -1)), "": Empirical(each=-1)},
        {"0.weight": (0, 1), "2.weight": (0, 1), "0.bias": (0,), "2.bias": (0,)},
    ),
    "mixed": ({"0.": "empirical", "2.": 0.3}, {"0.weight": (), "0.bias": ()}),
    "least": (  # is some groups' variance, not all
        {"*.weight": Empirical(each=1, least=1.2), "": 0.3},
        {"0.weight": (1,), "2.weight": (1,)},
    ),
}
every_rule = pytest.mark.parametrize(("prior_var", "groups"), RULES.values(), ids=RULES)


@pytest.fixture
def bnn(net):
    return make(net, "empirical")


def make(net, prior_var, **kwargs):
    bnn = BayesianModel(net.double(), init_logvar=-2.0, prior_var=prior_var, **kwargs)
    with torch.no_grad():
        for mean, logvar in bnn.guide.posterior().values():
            mean += torch.randn_like(mean)
            logvar += 0.5 * torch.randn_like(logvar)
    return bnn


def grouped(tensor, dims):
    """One row per group."""
    rest = [d for d in range(tensor.dim()) if d not in dims]
    return tensor.permute(*dims, *rest).reshape(math.prod(tensor.shape[d] for d in dims), -1)


def least(bnn, name):
    return bnn.guide.priors.rules[name].empirical.least


def by_hand(bnn, groups):
    total = 0.0
    for name, (mean, logvar) in bnn.guide.posterior().items():
        if name in groups:
            m, v = grouped(mean, groups[name]), grouped(logvar.exp(), groups[name])
            variance = (m**2 + v).mean(1, keepdim=True).clamp_min(least(bnn, name))
            p = Normal(0.0, variance.sqrt())
            total += kl_divergence(Normal(m, v.sqrt()), p).sum()
        else:
            total += kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0, 0.3**0.5)).sum()
    return total


@every_rule
def test_divergence_is_the_closed_form(net, prior_var, groups):
    bnn = make(net, prior_var)
    torch.testing.assert_close(bnn.kl_divergence(), by_hand(bnn, groups))
    other = BayesianModel(net, prior_var=7.0)  # with the same means
    other.load_state_dict(bnn.state_dict())
    torch.testing.assert_close(other.kl_divergence(prior_var), by_hand(bnn, groups))
    assert other.kl_divergence(1.0) == other.kl_divergence(prior_var=1)


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_divergence_is_the_least_over_variances(net, bound):
    bnn = make(net, Empirical(least=bound))
    for name, (mean, logvar) in bnn.guide.posterior().items():
        q = Normal(mean.detach(), (logvar.detach() / 2).exp())
        log_var = torch.zeros((), dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_var], line_search_fn="strong_wolfe", max_iter=100)

        def loss(q=q, log_var=log_var):
            return kl_divergence(q, Normal(0, (log_var / 2).exp())).sum()

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            loss().backward()
            return loss()

        optimizer.step(closure)
        log_var = log_var.detach().clamp_min(math.log(bound) if bound else -math.inf)
        found = bnn.kl_divergences()[name]
        torch.testing.assert_close(found, loss(log_var=log_var))
        present = bnn.guide.priors.present(name)
        torch.testing.assert_close(present, log_var.exp(), rtol=1e-4, atol=0)


def test_least_is_between_the_variances(net):
    """What the rule "least" tests."""
    bnn = make(net, *RULES["least"][:1])
    active = torch.cat([bnn.guide.priors.present(n).flatten() for n in RULES["least"][1]]) == 1.2
    assert 0 < active.sum() < len(active)


@every_rule
def test_gradient_is_that_of_finite_differences(net, prior_var, groups):
    bnn = make(net, prior_var)
    parameters = list(bnn.parameters())
    ((layout, *_),) = bnn.guide.flats()

    def divergence(mean, logvar):
        return bnn.guide.priors.kl_divergence([Flat(layout, mean, logvar)])

    values = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(divergence, values)
    assert torch.autograd.gradgradcheck(divergence, values)
    direct = torch.autograd.grad(bnn.kl_divergence(), parameters)
    torch.testing.assert_close(direct, torch.autograd.grad(divergence(*values), values))
    batched = torch.vmap(divergence)(*(v.detach().expand(3, *v.shape) for v in values))
    torch.testing.assert_close(batched, bnn.kl_divergence().detach().expand(3))


@every_rule
@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_front_ends_agree(net, data, prior_var, groups, local_trick):
    bnn = make(net, prior_var, name="bnn")
    x, y = (d.double() for d in data)
    likelihood = Gaussian(0.5)
    objective = ELBO(bnn, likelihood, num_data=100, local_trick=local_trick)
    trained = list(bnn.guide.parameters())
    torch.manual_seed(0)
    loss = objective(x, y) * 100
    expected = torch.autograd.grad(loss, trained)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        model = svi_model(bnn, likelihood, num_data=100)
        found = elbo.differentiable_loss(model, bnn.exact_kl(local_trick), x, y)
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(torch.autograd.grad(found, trained), expected)


@every_rule
def test_sites_have_the_present_variance(net, prior_var, groups):
    bnn = make(net, prior_var)

    def model():
        with bnn.lift():
            pass

    with torch.no_grad():
        bnn.guide.posterior()["0.weight"][0].mul_(2)
    guide_trace = poutine.trace(bnn.guide).get_trace()
    trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
    trace.compute_log_prob()
    guide_trace.compute_log_prob()
    loss, expected = 0.0, 0.0
    for name, (mean, logvar) in bnn.guide.posterior().items():
        value = trace.nodes[name]["value"]
        variance = torch.full_like(mean, 0.3)
        if name in groups:
            m, v = mean.detach(), logvar.detach().exp()
            rest = tuple(d for d in range(mean.dim()) if d not in groups[name])
            variance = (m**2 + v).mean(rest, keepdim=True) if rest else m**2 + v
            variance = variance.clamp_min(least(bnn, name)).expand_as(mean)
        torch.testing.assert_close(trace.nodes[name]["fn"].variance, variance)
        density = Normal(0.0, variance.sqrt()).log_prob(value).sum()
        torch.testing.assert_close(trace.nodes[name]["log_prob"], density)
        loss = loss - trace.nodes[name]["log_prob"]
        expected = expected - density  # the variance is fixed
    trained = list(bnn.guide.parameters())
    found = torch.autograd.grad(loss, trained, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, trained))
    loss = TraceMeanField_ELBO().differentiable_loss(model, bnn.guide)
    torch.testing.assert_close(loss, bnn.kl_divergence())
    gradients = (torch.autograd.grad(kl, trained) for kl in (loss, bnn.kl_divergence()))
    torch.testing.assert_close(*gradients)


def test_estimates_of_draws_are_unbiased(bnn):
    def model():
        with bnn.lift():
            pass

    expected = torch.autograd.grad(bnn.kl_divergence(), list(bnn.guide.parameters()))
    draws = []
    for _ in range(300):
        loss = Trace_ELBO().differentiable_loss(model, bnn.guide)
        grads = torch.autograd.grad(loss, list(bnn.guide.parameters()))
        draws.append(torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)]))
    draws = torch.stack(draws)
    exact = torch.cat([bnn.kl_divergence().detach().reshape(1), *(g.flatten() for g in expected)])
    errors = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert errors.abs().max() < 4.5
    assert errors.square().mean() < 2


def test_training_finds_the_evidence_of_a_linear_model():
    # With y = θ + noise, the posterior is exact, and the best prior variance is known.
    torch.manual_seed(0)
    y = 0.8 * torch.randn(400, dtype=torch.double) + 0.5 * torch.randn(400, dtype=torch.double)

    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(400, dtype=torch.double))

        def forward(self):
            return self.theta

    bnn = BayesianModel(Means(), init_logvar=-2.0, prior_var="empirical")
    mean, logvar = bnn.guide.posterior()["theta"]
    optimizer = torch.optim.LBFGS(bnn.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        nll = ((y - mean) ** 2 + logvar.exp()).sum() / (2 * 0.25)
        loss = nll + bnn.kl_divergence()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = y.square().mean() - 0.25  # maximises the density of y ~ N(0, σ_p² + 0.25)
    present = bnn.guide.priors.present("theta")
    torch.testing.assert_close(present, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "prior"])
def test_copies_follow_their_own_posterior(net, way):
    bnn = make(net, RULES["each"][0], name="bnn")
    if way == "deepcopy":
        other = copy.deepcopy(bnn)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(bnn, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif way == "prior":
        assert "follow" not in bnn.prior.state_dict()
        other = bnn
        prior = copy.deepcopy(bnn.prior)
        assert prior()["0.weight"].shape == (8, 3)
    else:
        other = make(copy.deepcopy(net), RULES["each"][0], name="bnn")
        other.load_state_dict(bnn.state_dict())
    torch.testing.assert_close(other.kl_divergence(), bnn.kl_divergence())

    def variance(model):
        trace = poutine.trace(model.prior).get_trace()
        return trace.nodes["bnn.0.weight"]["fn"].variance

    torch.testing.assert_close(variance(other), variance(bnn))
    before = variance(bnn)
    with torch.no_grad():
        other.guide.posterior()["0.weight"][0].add_(1)
    assert (variance(other) > before).all()
    assert torch.equal(variance(bnn), before) == (other is not bnn)


def test_values_from_the_param_store_count(bnn):
    before = bnn.kl_divergence().item()
    bnn.guide()
    state = pyro.get_param_store().get_state()
    changed = {k: (v * 3).detach() for k, v in state["params"].items()}
    pyro.get_param_store().set_state({"params": changed, "constraints": state["constraints"]})
    trace = poutine.trace(bnn.prior).get_trace()
    mean = bnn.means.get_parameter("0.weight").detach()
    logvar = bnn.logvars.get_parameter("0.weight").detach()
    assert torch.equal(changed[f"{bnn.guide.store_name}.mean"][: mean.numel()], mean.flatten())
    expected = (mean**2 + logvar.exp()).mean().expand_as(mean)
    torch.testing.assert_close(trace.nodes["0.weight"]["fn"].variance, expected)
    assert bnn.kl_divergence().item() != before


def test_predictive_and_nuts_use_the_present_variance(net):
    bnn = make(net, "empirical")
    variance = bnn.guide.priors.present("0.weight")
    draws = Predictive(bnn.prior, num_samples=500)()["0.weight"]
    assert draws.square().mean().item() == pytest.approx(variance.item(), rel=0.1)
    assert draws.shape == (500, 8, 3)
    draws = Predictive(bnn.prior, num_samples=500, parallel=True)()["0.weight"]
    assert draws.square().mean().item() == pytest.approx(variance.item(), rel=0.1)
    kernel = NUTS(bnn.prior, step_size=0.5, adapt_step_size=False, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    value = {name: draw[-1] for name, draw in mcmc.get_samples().items()}
    energy = kernel.potential_fn(value)
    expected = sum(
        -Normal(0.0, bnn.guide.priors.present(n).sqrt()).log_prob(v).sum() for n, v in value.items()
    )
    torch.testing.assert_close(energy, expected)
    torch.testing.assert_close(bnn.guide.priors.present("0.weight"), variance)


def test_particles_and_svi(net, data):
    bnn = make(net, RULES["each"][0])
    x, y = (d.double() for d in data)
    model = svi_model(bnn, Gaussian(0.5), num_data=len(x))
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    for guide in (bnn.guide, bnn.exact_kl(True)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
        losses = [svi.step(x, y) for _ in range(30)]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(net, dtype):
    bnn = make(net, RULES["each"][0]).to(dtype)
    expected = make_double(bnn).kl_divergence()
    found = bnn.kl_divergence()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    found.backward()
    assert all(p.grad.isfinite().all() for p in bnn.parameters())
    assert bnn.prior()["0.weight"].dtype == torch.float32


def make_double(bnn):
    return copy.deepcopy(bnn).double()


def test_close_to_the_prior_no_digit_is_lost():
    prior_var = Empirical(least=0.0)
    bnn = BayesianModel(nn.Linear(50, 50, bias=False), init_logvar=-3.0, prior_var=prior_var)
    with torch.no_grad():
        mean, logvar = bnn.guide.posterior()["weight"]
        mean.zero_()
        logvar += 1e-3 * torch.randn_like(logvar)
    expected = make_double(bnn).kl_divergence()
    torch.testing.assert_close(bnn.kl_divergence().double(), expected, rtol=1e-3, atol=0)


def test_nothing_left_of_a_tensor(net):
    bnn = BayesianModel(net, init_logvar=-300.0, prior_var=Empirical(least=0.0))
    with torch.no_grad():
        for mean, _ in bnn.guide.posterior().values():
            mean.zero_()
    kl = bnn.kl_divergence()
    kl.backward()
    assert kl.isfinite()
    for name, (mean, logvar) in bnn.guide.posterior().items():
        assert torch.equal(mean.grad, torch.zeros_like(mean)), name
        assert (logvar.grad <= 0).all()  # it grows again


def test_patterns(net):
    bnn = BayesianModel(net, prior_var={"0.weight": 2.0, "*.bias": 0.5, "": "empirical"})
    assert [row.prior.partition(" e")[0][:7] for row in bnn.summary().rows] == [
        "N(0, 2)",
        "N(0, 0.",
        "N(0, 0.",
        "N(0, 0.",
    ]
    priors = {row.parameter: row.prior for row in bnn.summary().rows}
    assert priors["0.bias"] == priors["2.bias"] == "N(0, 0.5)"
    present = bnn.guide.priors.present("2.weight").item()
    assert priors["2.weight"] == f"N(0, {present:.3g}), empirical"
    several = BayesianModel(net, prior_var={"*.weight": Empirical(each=1, least=0.0), "": 1.0})
    low, high = several.guide.priors.present("0.weight").aminmax()
    row = several.summary().rows[0]
    assert row.prior == f"N(0, {low:.3g} to {high:.3g}), empirical"


def test_numbers_by_pattern_share_the_fast_path(net):
    one, two = (
        BayesianModel(copy.deepcopy(net), init_logvar=-2.0, prior_var=value)
        for value in (0.3, {"0.": 0.3, "2.": 0.3})
    )
    assert one.kl_divergence() == two.kl_divergence()
    assert str(one.guide.priors) == str(two.guide.priors) == "N(0, 0.3)"


def test_tied_parameters_match_by_any_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    bnn = BayesianModel(net, prior_var={"1.weight": 2.0, "": 1.0})
    variances = {name: rule.number for name, rule in bnn.guide.priors.rules.items()}
    assert variances == {"0.weight": 2.0, "0.bias": 1.0, "1.bias": 1.0}


ERRORS = {
    "word": ("empiric", ValueError, "'empirical'.*; got 'empiric'"),
    "number in it": ({"": -1.0}, ValueError, "prior_var .*; got -1.0"),
    "missing": ({"0.": 1.0}, ValueError, "pattern for each .*'2.weight'"),
    "nothing": (
        {"3.": 1.0, "": 1.0},
        ValueError,
        "pattern of prior_var .*'3.', which matches none. The closest",
    ),
    "behind": (
        {"": 1.0, "0.": 2.0},
        ValueError,
        "pattern of prior_var .*'0.', all .* before wider ones.$",
    ),
    "key": ({1: 1.0}, TypeError, "prior_var"),
    "beyond single precision": ({"0.": 1.0, "2.": 1e-40}, ValueError, "'2.weight'.*got 1e-40"),
    "above single precision": (1e300, ValueError, "float32, where .*got 1e\\+300"),
    "dimension": (Empirical(each=1), ValueError, "each=1 for '0.bias'"),
}


@pytest.mark.parametrize(("prior_var", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(net, prior_var, error, match):
    with pytest.raises(error, match=match):
        BayesianModel(net, prior_var=prior_var)
    if prior_var is not None:
        with pytest.raises(error, match=match):
            BayesianModel(net).kl_divergence(prior_var)


def test_a_narrow_posterior_does_not_narrow_the_prior():
    net = nn.Linear(100, 100)  # whose initial weights have a variance of 1 / 300
    numbers = [
        BayesianModel(net, prior_var=prior_var).kl_divergence().item()
        for prior_var in ("empirical", Empirical(), 0.3, Empirical(least=0.0))
    ]
    assert numbers[0] == numbers[1] == pytest.approx(numbers[2], rel=1e-6)
    assert numbers[3] < 0.8 * numbers[0]


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "0", None, True])
def test_errors_of_least(value):
    with pytest.raises(ValueError, match="Expected least to be"):
        Empirical(least=value)


@pytest.mark.parametrize("each", ["0", 1.0, True, (0, "1"), None])
def test_errors_of_each(each):
    with pytest.raises(ValueError, match="Expected each to be"):
        Empirical(each=each)
