"""Pyro's own guides and enumeration over a lifted base, against closed forms."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from pyro_bayes import BayesianModel
from pyro_bayes.priors import Hierarchical

either = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])


def regression(bnn, scale):
    def model(x, y=None):
        with bnn.lift() as net:
            mean = net(x).squeeze(-1)
        noise = scale() if callable(scale) else scale
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


def multivariate(model, x, y, mean, root, deviations):
    guide = AutoMultivariateNormal(model)
    guide(x, y)
    tril = torch.linalg.cholesky(root @ root.T + deviations.square().diag())
    guide.loc, guide.scale = nn.Parameter(mean), tril.diag()
    guide.scale_tril = tril / tril.diag().unsqueeze(-1)
    return guide


def low_rank(model, x, y, mean, root, deviations):
    guide = AutoLowRankMultivariateNormal(model, rank=root.shape[-1])
    guide(x, y)
    guide.loc, guide.scale = nn.Parameter(mean), deviations
    guide.cov_factor = nn.Parameter(root / deviations.unsqueeze(-1))
    return guide


def laplace(model, x, y, mean, root, deviations):
    guide = AutoLaplaceApproximation(model)
    guide(x, y)
    guide.loc = nn.Parameter(mean)
    return guide.laplace_approximation(x, y)


@either
@pytest.mark.parametrize("make", [multivariate, low_rank, laplace])
def test_every_draw_of_the_exact_posterior_has_the_evidence(make, vectorize):
    # The data are those whose posterior covariance is root root' + deviations².
    root, deviations = torch.tensor([[0.5], [-0.4], [0.3]]), torch.tensor([0.2, 0.3, 0.4])
    precision = (root @ root.T + deviations.square().diag()).inverse()
    prior_var, noise = 2.0, 0.5
    x = noise * torch.linalg.cholesky(precision - torch.eye(3) / prior_var).T
    y = torch.tensor([1.0, -0.5, 0.3])
    mean = precision.inverse() @ x.T @ y / noise**2
    covariance = prior_var * x @ x.T + noise**2 * torch.eye(3)
    evidence = MultivariateNormal(torch.zeros(3), covariance).log_prob(y)

    model = regression(BayesianModel(nn.Linear(3, 1, bias=False), prior_var=prior_var), noise)
    guide = make(model, x, y, mean, root, deviations)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
    losses = torch.tensor([elbo.loss(model, guide, x, y) for _ in range(5)])
    torch.testing.assert_close(losses, (-evidence).expand(5), rtol=1e-4, atol=1e-3)


def test_delta_is_least_where_ridge_regression_is():
    x, y = torch.randn(8, 3), torch.randn(8)
    prior_var, noise = 0.3, 0.5
    ridge = (x.T @ x + noise**2 / prior_var * torch.eye(3)).inverse() @ x.T @ y
    model = regression(BayesianModel(nn.Linear(3, 1, bias=False), prior_var=prior_var), noise)
    guide = AutoDelta(model)
    guide(x, y)
    guide.weight = nn.Parameter(ridge.unsqueeze(0))
    loss = Trace_ELBO().differentiable_loss(model, guide, x, y)
    likelihood, prior = Normal(x @ ridge, noise).log_prob(y), Normal(0, prior_var**0.5)
    expected = -likelihood.sum() - prior.log_prob(ridge).sum()
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, list(guide.parameters()))
    assert gradient.abs().max() < 1e-4


@either
def test_random_deviations_have_sites_for_every_guide(vectorize):
    x, y = torch.randn(8, 3), torch.randn(8)
    prior = Hierarchical(scale=dist.HalfCauchy(0.3))
    bnn = BayesianModel(nn.Linear(3, 1, bias=False), prior=prior)

    def model():
        with bnn.lift(event_dim=2) as net:
            mean = net(x)[..., 0]
        pyro.factor("y", Normal(mean, 0.5).log_prob(y).sum(-1))

    guide = AutoDelta(model)
    weight, scale = (guide()[name] for name in ("weight", "weight_prior_scale"))
    joint = Normal((x @ weight.T).squeeze(-1), 0.5).log_prob(y).sum()
    joint += Normal(0.0, scale).log_prob(weight).sum() + prior.scale.log_prob(scale)
    # As many particles as examples: the deviations do not make the input suspicious.
    elbo = Trace_ELBO(len(x), 0, vectorize_particles=vectorize)
    assert elbo.loss(model, guide) == pytest.approx(-joint.item(), rel=1e-5)


FIRST = torch.tensor([0.3, 0.7])
NEXT = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
NOISE = torch.tensor([0.2, 1.5])
discrete = {"infer": {"enumerate": "parallel"}}


def each(net, x, y):
    mean = net(x).squeeze(-1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(FIRST), **discrete)
        pyro.sample("y", dist.Normal(mean, NOISE[z]), obs=y)


def common(net, x, y):
    z = pyro.sample("z", dist.Categorical(FIRST), **discrete)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(net(x).squeeze(-1), NOISE[z]), obs=y)


def chain(net, x, y):
    z, means = None, net(x)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Categorical(FIRST if z is None else NEXT[z]), **discrete)
        pyro.sample(f"y{t}", dist.Normal(means[..., t, 0], NOISE[z]), obs=y[t])


def log_states(kind, states):
    """Returns the log-probability of the states of all data."""
    first = states[0]
    if kind is each:
        return FIRST[list(states)].log().sum()
    if kind is common:
        return FIRST[first].log() if len(set(states)) == 1 else -torch.inf
    return FIRST[first].log() + sum(NEXT[a, b].log() for a, b in itertools.pairwise(states))


@either
@pytest.mark.parametrize("kind", [each, common, chain])
def test_enumerated_variables_are_summed_over(net, kind, vectorize):
    bnn = BayesianModel(net)
    x, y = torch.randn(4, 3), torch.randn(4)

    def model():
        with bnn.lift() as lifted:
            kind(lifted, x, y)

    guide = AutoDelta(poutine.block(model, expose=[*bnn.guide.sites]))
    plates = 0 if kind is chain else 1
    elbo = TraceEnum_ELBO(2, plates, vectorize_particles=vectorize)
    values = guide()
    mean = torch.func.functional_call(net, values, (x,)).squeeze(-1)
    joint = [
        Normal(mean, NOISE[list(states)]).log_prob(y).sum() + log_states(kind, states)
        for states in itertools.product(range(2), repeat=len(x))
    ]
    prior = sum(Normal(0.0, 1.0).log_prob(value).sum() for value in values.values())
    expected = -(torch.stack(joint).logsumexp(0) + prior).item()
    assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_outputs_that_share_an_enumerated_variable_are_joint(net, local_trick):
    bnn = BayesianModel(net, init_logvar=-1.0)
    x, y = torch.randn(6, 3), torch.randn(6)

    def model():
        with bnn.lift() as lifted:
            common(lifted, x, y)

    def loss(guide):
        pyro.set_rng_seed(1)
        return TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide)

    with pytest.warns(UserWarning, match="One draw of the weights"):
        found = loss(bnn.exact_kl(local_trick))
    assert found == pytest.approx(loss(bnn.exact_kl()))


GUIDES = {
    "guide": lambda bnn: bnn.guide,
    "exact": lambda bnn: bnn.exact_kl(),
    "local noise": lambda bnn: bnn.exact_kl(True),
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_guides_join_in_a_list(make):
    x, y = torch.randn(8, 2), torch.randn(8)
    bnn = BayesianModel(nn.Linear(2, 1), init_logvar=-1.0, prior_var=0.05)
    model = regression(bnn, lambda: pyro.sample("noise", dist.LogNormal(0.0, 1.0)))
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["noise"])))
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["weight"]), init_scale=0.5))
    guide.append(poutine.block(make(bnn), hide=["weight"]))
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True)
    losses = torch.tensor([elbo.loss(model, guide, x, y) for _ in range(20)])
    assert {"noise", "weight"} <= set(guide.median())

    weight = guide[1].get_posterior()
    mean, logvar = bnn.guide.posterior()["bias"]
    bias = Normal(mean, (0.5 * logvar).exp())
    noise = guide.median()["noise"]
    squares = (x @ weight.mean + mean - y).square() + logvar.exp()
    squares = squares + (x @ weight.covariance_matrix * x).sum(-1)
    fit = -0.5 * squares / noise**2 - noise.log() - 0.5 * torch.tensor(2 * torch.pi).log()
    divergence = torch.distributions.kl_divergence(bias, Normal(0.0, 0.05**0.5)).sum()
    prior = MultivariateNormal(torch.zeros(2), 0.05 * torch.eye(2))
    divergence = divergence + torch.distributions.kl_divergence(weight, prior)
    expected = divergence - fit.sum() - dist.LogNormal(0.0, 1.0).log_prob(noise)
    assert (losses.mean() - expected).abs() < 4.5 * losses.std() / 20**0.5
