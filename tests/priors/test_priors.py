"""Priors of all kinds: their divergence, the front ends that share them, copies and refusals."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import trace
from torch import nn
from torch.distributions import Gumbel

from pyro_bayes import ELBO, BayesianModel, likelihoods, priors, svi_model

DOUBLE = {"dtype": torch.double}


def rows(name, p):
    """A joint prior of the rows of weights."""
    if p.dim() < 2:
        return dist.Laplace(0.0, 0.5)
    n = p.shape[-1]
    return dist.MultivariateNormal(torch.zeros(n), torch.eye(n) + 0.3).expand(p.shape[:-1])


class Mixed(nn.Module):
    """Two parameters with a name each, and little else."""

    def __init__(self, size=5):
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1.0, 1.0, size, **DOUBLE))
        self.b = nn.Parameter(torch.linspace(0.1, 0.7, 6, **DOUBLE).reshape(2, 3))

    def forward(self, x):
        return (x * self.a.sum() + self.b.sum())[:, None]


def tensors(name, p):
    return priors.Gaussian(torch.rand_like(p) + 0.5, torch.randn_like(p))


KINDS = {
    "normal": dist.Normal(0.3, 0.5),
    "normal of the shape": lambda name, p: dist.Normal(p.detach() / 2, 0.5 + p.detach().abs()),
    "Gaussian": tensors,
    "Gaussian around the base": priors.Gaussian(0.2, mean="base"),
    "empirical around the base": {"a": priors.Gaussian("empirical", mean="base"), "b": tensors},
    "scaling": priors.fan_in(2.0, bias_var=0.3),
    "Laplace": dist.Laplace(0.1, 0.4),
    "Gumbel": Gumbel(0.1, 0.8),
    "rows": rows,
    "Student's t": dist.StudentT(3.0, 0.1, 0.4),
    "mixture": priors.ScaleMixture(0.4, 1.0, 0.01),
    "horseshoe": priors.Horseshoe(0.3),
    "hierarchical": priors.Hierarchical(dist.HalfNormal(1.0)),
    "hierarchical by row": {"b": priors.Hierarchical(each=0), "": dist.Normal(0.0, 2.0)},
    "by pattern": {"b": dist.Laplace(0.0, 1.0), "": priors.Gaussian(0.3)},
}
every_kind = pytest.mark.parametrize("prior", KINDS.values(), ids=KINDS)
ESTIMATED = {"Student's t", "mixture"}
# Those whose divergence depends on no draw at all, in any ELBO but Trace_ELBO with `bnn.guide`.
RANDOM = {*ESTIMATED, "horseshoe", "hierarchical", "hierarchical by row"}
STEADY = {k: v for k, v in KINDS.items() if k not in RANDOM}


def make(prior, **kwargs):
    torch.manual_seed(1)
    bnn = BayesianModel(Mixed(), init_logvar=-2.0, prior=prior, **kwargs)
    with torch.no_grad():
        for mean, logvar in bnn.guide.posterior().values():
            mean += 0.3 * torch.randn_like(mean)
            logvar += 0.5 * torch.randn_like(logvar)
    return bnn


# Divergences


def mixture(x):
    wide, narrow = (dist.Normal(0.0, torch.tensor(s, **DOUBLE)).log_prob(x) for s in (1.0, 0.1))
    return torch.logaddexp(wide + math.log(0.4), narrow + math.log(0.6))


SCALARS = {
    "Laplace": (dist.Laplace(0.1, 0.4), None),
    "Gumbel": (Gumbel(0.1, 0.8), None),
    "normal": (dist.Normal(0.3, 0.5), None),
    "Student's t": (dist.StudentT(3.0, 0.1, 0.4), None),
    "Cauchy": (dist.Cauchy(0.0, 0.3), None),
    "mixture": (priors.ScaleMixture(0.4, 1.0, 0.01), mixture),
}
KNOWN = ("Laplace", "Gumbel", "normal")


def integral(density, mean, logvar):
    """The divergence of one Gaussian, by the rule of midpoints, and its two derivatives."""
    z = torch.linspace(-9, 9, 20_001, **DOUBLE)
    z = (z[1:] + z[:-1]) / 2
    weights = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    def value(m, v):
        points = m + math.exp(v / 2) * z
        log_q = -0.5 * z.square() - 0.5 * v - 0.5 * math.log(2 * math.pi)
        return (weights * (log_q - density(points))).sum().item()

    h = 0.01
    by_mean = (value(mean + h, logvar) - value(mean - h, logvar)) / (2 * h)
    by_logvar = (value(mean, logvar + h) - value(mean, logvar - h)) / (2 * h)
    return value(mean, logvar), by_mean, by_logvar


@pytest.fixture
def even_draws(monkeypatch):
    """Makes the draws of an estimate the midpoints of intervals of one probability."""

    def even(like):
        levels = (torch.arange(len(like), **DOUBLE) + 0.5) / len(like)
        draws = torch.special.ndtri(levels).to(like)
        return draws.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like)

    monkeypatch.setattr(torch, "randn_like", even)


@pytest.mark.parametrize("name", SCALARS)
def test_divergence_and_gradient_are_the_integrals(even_draws, name):
    prior, density = SCALARS[name]
    pairs = [(0.05, -2.0), (0.45, -6.0), (-1.5, 0.5)]
    base = nn.ParameterDict({"w": torch.tensor([m for m, _ in pairs], **DOUBLE)})
    bnn = BayesianModel(base, prior=prior)
    with torch.no_grad():
        bnn.logvars.w.copy_(torch.tensor([v for _, v in pairs], **DOUBLE))
    kind = "exact" if name in KNOWN else "Monte Carlo"
    assert bnn.summary().rows[0].divergence == kind
    found = bnn.kl_divergence(num_samples=1 if name in KNOWN else 40_001)
    integrals = [integral(density or prior.log_prob, *pair) for pair in pairs]
    assert found.item() == pytest.approx(sum(value for value, *_ in integrals), rel=1e-4)
    gradients = torch.stack(torch.autograd.grad(found, [*bnn.parameters()]), -1)
    expected = torch.tensor([derivatives for _, *derivatives in integrals], **DOUBLE)
    torch.testing.assert_close(gradients, expected, rtol=5e-3, atol=5e-3)


def test_joint_normal_prior():
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], **DOUBLE)
    own = dist.MultivariateNormal(torch.tensor([0.2, -0.1], **DOUBLE), covariance)
    base = nn.ParameterDict({"w": torch.tensor([0.4, -1.0], **DOUBLE)})
    bnn = BayesianModel(base, init_logvar=-1.0, prior=lambda name, p: own)
    q = dist.MultivariateNormal(base.w.detach(), torch.eye(2, **DOUBLE) * math.exp(-1))
    expected = torch.distributions.kl_divergence(q, own)
    torch.testing.assert_close(bnn.kl_divergence().detach(), expected)


def test_hierarchical_divergence_is_the_integral():
    hyper = dist.Gamma(torch.tensor(2.0, **DOUBLE), torch.tensor(3.0, **DOUBLE))
    base = nn.ParameterDict({"w": torch.linspace(-1, 1, 6, **DOUBLE).reshape(2, 3)})
    bnn = BayesianModel(base, init_logvar=-1.0, prior=priors.Hierarchical(hyper, each=1))
    a, t = (p for p in bnn.guide.prior_scales.parameters())
    with torch.no_grad():
        a.copy_(torch.tensor([[-0.3, 0.2, 1.0]], **DOUBLE))
        t.copy_(torch.tensor([[-2.0, -1.0, -3.0]], **DOUBLE))

    def by_integration(a, t, mean, logvar):
        u = torch.linspace(-8, 8, 4001, **DOUBLE)[:, None] * (t / 2).exp() + a  # log σ_p
        q = dist.Normal(a, (t / 2).exp())
        s = u.exp()
        n, moments = len(mean), (mean.square() + logvar.exp()).sum(0)
        log_p = -0.5 * moments / s.square() - n * u - 0.5 * n * math.log(2 * math.pi)
        log_q = -0.5 * (logvar + 1 + math.log(2 * math.pi)).sum(0)
        inner = q.log_prob(u) - (hyper.log_prob(s) + u) + log_q - log_p
        return torch.trapezoid(q.log_prob(u).exp() * inner, u, dim=0).sum()

    mean, logvar = bnn.guide.posterior()["w"]
    leaves = a, t, mean, logvar
    expected = by_integration(*leaves)
    torch.testing.assert_close(bnn.kl_divergence(), expected, rtol=1e-8, atol=0)
    every = [*bnn.parameters()]
    found, wanted = (torch.autograd.grad(v, every) for v in (bnn.kl_divergence(), expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_scale_of_a_hierarchical_prior_has_its_posterior():
    # y = θ + little noise: the marginal posterior of the deviation is one integral.
    y, noise = 0.6 * torch.randn(40, **DOUBLE), 0.05
    base = nn.ParameterDict({"w": y.clone()})
    bnn = BayesianModel(base, init_logvar=-6.0, prior=priors.Hierarchical(dist.HalfCauchy(0.1)))
    mean, logvar = bnn.guide.posterior()["w"]
    optimizer = torch.optim.LBFGS(bnn.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        nll = ((y - mean).square() + logvar.exp()).sum() / (2 * noise**2)
        loss = nll + bnn.kl_divergence()
        loss.backward()
        return loss

    optimizer.step(closure)
    u = torch.linspace(-4, 2, 2001, **DOUBLE)
    s = u.exp()[:, None]
    logs = dist.Normal(0.0, (s.square() + noise**2).sqrt()).log_prob(y).sum(-1)
    logs = logs + dist.HalfCauchy(torch.tensor(0.1, **DOUBLE)).log_prob(u.exp()) + u
    weights = (logs - logs.logsumexp(0)).exp()
    center = (weights * u).sum()
    deviation = (weights * (u - center).square()).sum().sqrt()
    a, t = (p.item() for p in bnn.guide.prior_scales.parameters())
    assert a == pytest.approx(center.item(), abs=0.1 * deviation.item())
    assert math.exp(t / 2) == pytest.approx(deviation.item(), rel=0.05)


# Front ends


def losses(bnn, front_end, x, y, draws):
    likelihood = likelihoods.Gaussian(0.5)
    objective = ELBO(bnn, likelihood, num_data=len(y))
    model = svi_model(bnn, likelihood, num_data=len(y))
    guide = bnn.exact_kl() if "exact" in front_end else bnn.guide
    elbo = TraceMeanField_ELBO() if "mean field" in front_end else Trace_ELBO()
    for _ in range(draws):
        if front_end == "facade":
            yield objective(x, y) * len(y)
        else:
            yield elbo.differentiable_loss(model, guide, x, y)


@every_kind
def test_expected_losses_of_front_ends_agree(prior, recwarn):
    bnn = make(prior, name="bnn")
    x, y = torch.randn(8, **DOUBLE), torch.randn(8, 1, **DOUBLE)
    fronts = ["facade", "Trace_ELBO", "mean field", "exact", "exact mean field"]
    steady = any(prior is own for own in STEADY.values())
    means, errors = [], []
    for front in fronts:
        torch.manual_seed(0)
        draws = 1 if steady and front != "Trace_ELBO" else 50
        values = [*losses(bnn, front, x, y, draws)]
        gradients = torch.autograd.grad(values[0], [*bnn.parameters()], allow_unused=True)
        assert all(g is not None and g.isfinite().all() for g in gradients)
        values = torch.stack(values).detach()
        if steady and front != "Trace_ELBO":  # the draws are the same
            means.append(values[0])
            errors.append(values.new_zeros(()))
        else:
            means.append(values.mean())
            errors.append(values.std() / len(values) ** 0.5)
    if steady:
        for value in means[2:]:
            torch.testing.assert_close(value, means[0])
        torch.manual_seed(0)
        means[0] = torch.stack([*losses(bnn, "facade", x, y, 50)]).detach().mean()
        assert abs(means[1] - means[0]) < 4.5 * 2**0.5 * errors[1]
        return
    for value, error in zip(means[1:], errors[1:], strict=True):
        assert abs(value - means[0]) < 4.5 * (error.square() + errors[0].square()).sqrt()


@every_kind
@pytest.mark.parametrize("local_trick", [False, True])
def test_one_pass_has_the_divergence(even_draws, prior, local_trick):
    bnn = make(prior)
    expected = bnn.kl_divergence()
    torch.testing.assert_close(sum(bnn.kl_divergences().values()), expected)
    with bnn.reparameterize_with_kl(local_trick, check_examples=False) as (_, kl):
        torch.testing.assert_close(kl, expected)
    found = torch.autograd.grad(kl, [*bnn.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(expected, [*bnn.parameters()]))


def test_estimates_are_reproducible_and_follow_the_number_of_draws():
    bnn = make(KINDS["Student's t"])
    values = []
    for num_samples in (1, 1, 100):
        torch.manual_seed(3)
        values.append(bnn.kl_divergence(num_samples=num_samples).item())
    assert values[0] == values[1] != values[2]
    spread = [
        torch.tensor([bnn.kl_divergence(num_samples=n).item() for _ in range(100)]).std()
        for n in (1, 100)
    ]
    assert 7 < spread[0] / spread[1] < 14


@every_kind
def test_prior_sites_and_draws(prior):
    bnn = make(prior, name="bnn")

    def model():
        with bnn.lift():
            pass

    run = trace(model).get_trace()
    run.compute_log_prob()
    for name in ("a", "b"):
        site = run.nodes[f"bnn.{name}"]
        rule = bnn.guide.priors.rules[name]
        if isinstance(rule, priors.parameter.NormalPrior):
            variance = torch.as_tensor(bnn.guide.priors.present(name))
            own = dist.Normal(torch.as_tensor(rule.center).to(variance), variance.sqrt())
        else:
            scale = run.nodes.get(f"bnn.{name}_prior_scale", {}).get("value")
            own = rule.elements(torch.zeros((), **DOUBLE), scale)
        torch.testing.assert_close(site["log_prob"], own.log_prob(site["value"]).sum())
    drawn = bnn.sample_prior()
    assert {n: (d.shape, d.dtype) for n, d in drawn.items()} == {
        n: (p.shape, p.dtype) for n, p in bnn.base.named_parameters()
    }
    several = Predictive(model, num_samples=3, parallel=True)()
    assert several["bnn.b"].shape == (3, 2, 3)
    assert several["bnn.b"][0].ne(several["bnn.b"][1]).all()


@pytest.mark.parametrize("name", ["normal of the shape", "rows", "horseshoe", "hierarchical"])
def test_particles_are_independent_draws(name):
    prior = KINDS[name]
    bnn = make(prior, name="bnn")

    def model():
        with bnn.lift():
            pass

    vectorized = {"vectorize_particles": True, "max_plate_nesting": 1}
    together = Trace_ELBO(num_particles=144, **vectorized).loss(model, bnn.guide)
    alone = torch.tensor([Trace_ELBO().loss(model, bnn.guide) for _ in range(144)])
    assert abs(together - alone.mean()) < 5 * 2**0.5 * alone.std() / 12


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros((), **DOUBLE))
        self.offset = nn.Parameter(torch.zeros((), **DOUBLE))

    def forward(self, x):
        return self.slope * x + self.offset


@pytest.mark.parametrize(
    "prior",
    [
        {"slope": dist.StudentT(3.0, 0.0, 0.3), "": priors.ScaleMixture(0.3, 1.0, 0.01)},
        {"slope": dist.Laplace(0.0, 0.2), "": priors.Gaussian(0.1, mean=0.5)},
    ],
    ids=["Student's t and mixture", "Laplace and Gaussian"],
)
def test_nuts_has_the_same_prior(prior):
    bnn = BayesianModel(Line(), prior=prior)
    x = torch.tensor([-1.0, 0.0, 1.0], **DOUBLE)
    y = torch.tensor([-0.4, 0.2, 0.9], **DOUBLE)

    def model():
        with bnn.lift() as net:
            mean = net(x)
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    mcmc = MCMC(NUTS(model), num_samples=120, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = torch.stack([mcmc.get_samples()[n] for n in ("slope", "offset")], -1)
    grid = torch.linspace(-3, 3, 601, **DOUBLE)
    slope, offset = torch.meshgrid(grid, grid, indexing="ij")
    logs = dist.Normal(slope[..., None] * x + offset[..., None], 0.7).log_prob(y).sum(-1)
    for name, value in (("slope", slope), ("offset", offset)):
        own = {**{"offset": prior[""]}, **prior}[name]
        density = {True: getattr(own, "log_prob", None)}.get(hasattr(own, "log_prob"))
        if isinstance(own, priors.ScaleMixture):
            wide, narrow = (dist.Normal(0.0, s).log_prob(value) for s in (1.0, 0.1))
            logs = logs + torch.logaddexp(wide + math.log(0.3), narrow + math.log(0.7))
        elif isinstance(own, priors.Gaussian):
            logs = logs + dist.Normal(0.5, 0.1**0.5).log_prob(value)
        else:
            logs = logs + density(value)
    weights = (logs - logs.logsumexp((0, 1))).exp()
    for i, value in enumerate((slope, offset)):
        mean = (weights * value).sum()
        deviation = (weights * (value - mean).square()).sum().sqrt()
        assert abs(draws[:, i].mean() - mean) < 5 * deviation / 60**0.5
        assert draws[:, i].std() == pytest.approx(deviation.item(), rel=0.4)


# A posterior as the prior


@pytest.mark.parametrize("parts", [2, 10])
def test_data_in_parts_give_the_posterior_of_all(parts):
    # With orthogonal inputs, the mean-field posterior is the exact one.
    x = torch.linalg.qr(torch.randn(60, 3, **DOUBLE))[0].reshape(3, 20, 3)
    x = torch.cat([torch.linalg.qr(torch.randn(6, 3, **DOUBLE))[0] for _ in range(10)])
    y = x @ torch.tensor([0.5, -1.0, 2.0], **DOUBLE) + 0.5 * torch.randn(60, **DOUBLE)
    prior_var = torch.tensor([[2.0, 0.5, 1.0]], **DOUBLE)
    net = nn.Linear(3, 1, bias=False, dtype=torch.double)
    bnn = BayesianModel(net, init_logvar=-2.0, prior=priors.Gaussian(prior_var, mean=0.3))
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        optimizer = torch.optim.LBFGS(bnn.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(xs=xs, ys=ys, optimizer=optimizer):
            optimizer.zero_grad()
            mean, logvar = bnn.guide.posterior()["weight"]
            squares = (ys - xs @ mean[0]).square().sum() + (xs.square() @ logvar[0].exp()).sum()
            loss = squares / (2 * 0.25) + bnn.kl_divergence()
            loss.backward()
            return loss

        optimizer.step(closure)
        bnn.update_prior()
        assert abs(bnn.kl_divergence()) < 1e-9
    precision = x.square().sum(0) / 0.25 + 1 / prior_var[0]
    mean = (x.T @ y / 0.25 + 0.3 / prior_var[0]) / precision
    torch.testing.assert_close(bnn.means.weight[0].detach(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        bnn.logvars.weight[0].exp().detach(), 1 / precision, rtol=1e-3, atol=0
    )


def test_former_posterior_by_name():
    former = make(KINDS["Gaussian"])
    net = nn.ModuleDict({"head": nn.Linear(2, 2, dtype=torch.double)})
    net.register_parameter("a", nn.Parameter(torch.zeros(5, **DOUBLE)))
    bnn = BayesianModel(net, prior=former.as_prior(new=priors.Gaussian(0.5)))
    shown = {row.parameter: row.prior for row in bnn.summary().rows}
    assert shown["head.weight"] == shown["head.bias"] == "N(0, 0.5)"
    mean, logvar = former.guide.posterior()["a"]
    with torch.no_grad():
        former.means.a.add_(1)  # it was a copy
        bnn.means.a.copy_(mean - 1)
        bnn.logvars.a.copy_(logvar)
    assert abs(bnn.kl_divergences()["a"]) < 1e-9


def test_update_ends_hierarchical_scales():
    bnn = make(KINDS["hierarchical"], name="bnn")
    before = len([*bnn.parameters()])
    bnn.update_prior()
    assert before == 6
    assert len([*bnn.parameters()]) == 2
    assert [*bnn.guide()] == ["bnn.a", "bnn.b"]
    assert abs(bnn.kl_divergence()) < 1e-9
    other = make(KINDS["hierarchical"], name="bnn")
    other.load_state_dict(bnn.state_dict())
    assert [*other.guide()] == ["bnn.a", "bnn.b"]
    assert abs(other.kl_divergence()) < 1e-9


# Copies, conversions and files


def pickled(bnn):
    file = io.BytesIO()
    torch.save(bnn, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(bnn):
    other = BayesianModel(Mixed(), prior_var=3.0)
    other.load_state_dict(bnn.state_dict())
    return other


@every_kind
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state"])
def test_copies_have_the_prior(even_draws, prior, way):
    bnn = make(prior)
    if way == "state":
        bnn.update_prior()
        with torch.no_grad():
            bnn.means.a.add_(1.0)
    other = {"deepcopy": copy.deepcopy, "pickle": pickled, "state": loaded}[way](bnn)
    torch.testing.assert_close(other.kl_divergence(), bnn.kl_divergence())
    before = bnn.kl_divergence()
    other.update_prior()
    torch.testing.assert_close(bnn.kl_divergence(), before)


@every_kind
def test_conversions_reach_the_prior(even_draws, prior):
    bnn = make(prior)
    before = bnn.kl_divergence(num_samples=50)
    single = bnn.float().kl_divergence(num_samples=50)
    assert single.dtype == torch.float
    torch.testing.assert_close(single.double(), before, rtol=1e-4, atol=1e-4)
    assert bnn.prior()["a"].dtype == torch.float
    assert bnn.bfloat16().kl_divergence().dtype == torch.float
    assert bnn.double().kl_divergence().dtype == torch.double


def test_state_of_another_prior_is_refused():
    bnn, other = make(priors.Gaussian(mean="base")), make(None)
    with pytest.raises(RuntimeError, match=r"Missing key.*a:prior.mean"):
        bnn.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prior_scales"):
        make(None).load_state_dict(make(KINDS["hierarchical"]).state_dict())


# Elements that are not random


@pytest.mark.parametrize(
    "prior", [*SCALARS.values(), (priors.Hierarchical(), None)], ids=[*SCALARS, "hierarchical"]
)
def test_padding_is_in_no_divergence(even_draws, prior):
    table = nn.Embedding(4, 3, padding_idx=1, dtype=torch.double)
    bnn = BayesianModel(nn.Sequential(table, Mixed()), prior=prior[0])
    rest = nn.Embedding.from_pretrained(table.weight.detach()[[0, 2, 3]], freeze=False)
    plain = BayesianModel(nn.Sequential(rest, Mixed()), prior=prior[0])
    torch.testing.assert_close(bnn.kl_divergence(), plain.kl_divergence())
    torch.testing.assert_close(bnn.kl_divergences(), plain.kl_divergences())
    assert (bnn.prior()["0.weight"][1] == 0).all()
    assert (bnn.sample_prior()["0.weight"][1] == 0).all()

    def model():
        with bnn.lift():
            pass

    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        for guide in (bnn.guide, bnn.exact_kl()):
            assert math.isfinite(elbo.loss(model, guide))


# Refusals

ERRORS = {
    "both": (
        dict(prior=dist.Laplace(0.0, 1.0), prior_var=1.0),
        ValueError,
        "prior or prior_var.*both",
    ),
    "number": (dict(prior=1.0), TypeError, "got 1.0. A variance is prior_var"),
    "class": (dict(prior=dist.Laplace), TypeError, "Laplace, a class"),
    "module": (dict(prior=nn.Linear(1, 1)), TypeError, "Linear, a module.*former.as_prior"),
    "word": (dict(prior="laplace"), TypeError, "'laplace'"),
    "support": (dict(prior=dist.HalfCauchy(1.0)), ValueError, "'a' .*over all real.*HalfCauchy"),
    "interval": (dict(prior=dist.Uniform(-1.0, 1.0)), ValueError, "over all real"),
    "shape": (dict(prior=dist.Normal(torch.zeros(5), 1.0)), ValueError, "'b' .*shape .2, 3.*5"),
    "learned": (
        dict(prior=dist.Laplace(0.0, torch.tensor(1.0, requires_grad=True))),
        ValueError,
        "fixed.*requires a gradient.*Hierarchical",
    ),
    "nothing matches": (
        dict(prior={"c": dist.Laplace(0.0, 1.0), "": dist.Normal(0.0, 1.0)}),
        ValueError,
        "'c', which matches none",
    ),
    "no pattern": (dict(prior={"a": dist.Normal(0.0, 1.0)}), ValueError, "matches 'b'"),
    "function": (dict(prior=lambda name, p: 1.0), TypeError, "got 1.0"),
    "function of functions": (
        dict(prior=lambda name, p: lambda: 1.0),
        TypeError,
        "return a distribution",
    ),
    "variance": (lambda: priors.Gaussian(-1.0), ValueError, "var to be a positive"),
    "variances": (
        lambda: priors.Gaussian(torch.tensor([1.0, 0.0])),
        ValueError,
        "var to be positive; got 0",
    ),
    "range": (dict(prior=priors.Gaussian(1e-320)), ValueError, "var to be between"),
    "mean": (
        lambda: priors.Gaussian(mean="zero"),
        ValueError,
        "mean to be a finite number.*'zero'",
    ),
    "shape of the mean": (
        dict(prior=priors.Gaussian(mean=torch.zeros(5))),
        ValueError,
        "mean of 'b'",
    ),
    "names": (dict(prior=priors.Gaussian(mean={"a": torch.zeros(5)})), ValueError, "none for 'b'"),
    "each": (dict(prior=priors.Hierarchical(each=1)), ValueError, "each=1 for 'a'"),
    "each word": (lambda: priors.Horseshoe(each="row"), ValueError, "'tensor', 'element', a dim"),
    "hyperprior": (
        lambda: priors.Hierarchical(dist.Normal(0.0, 1.0)),
        ValueError,
        "positive numbers",
    ),
    "hyperprior's shape": (
        lambda: priors.Hierarchical(dist.HalfCauchy(torch.ones(2))),
        ValueError,
        "one positive number",
    ),
    "weight": (lambda: priors.ScaleMixture(1.5, 1.0, 0.1), ValueError, "pi to be"),
    "scale": (lambda: priors.Horseshoe(0.0), ValueError, "scale to be positive"),
    "gain": (lambda: priors.fan_in(-1.0), ValueError, "gain to be positive"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        arguments() if callable(arguments) else BayesianModel(Mixed(), **arguments)


def test_former_posteriors_that_do_not_fit():
    former = make(None)
    with pytest.raises(
        ValueError, match=r"former posterior to have 'a' of shape \(4,\); got \(5,\)"
    ):
        BayesianModel(Mixed(4), prior=former.as_prior())
    with pytest.raises(ValueError, match=r"none of these names but .*'a'"):
        BayesianModel(nn.Linear(2, 1), prior=former.as_prior())
    with pytest.raises(TypeError, match=r"new to be a distribution.*got 0\.3\. A variance"):
        former.as_prior(new=0.3)
    with pytest.raises(ValueError, match="without parameters of its own"):
        former.kl_divergence(prior=priors.Hierarchical())
    with pytest.raises(ValueError, match="num_samples"):
        former.kl_divergence(num_samples=0)


def test_joint_prior_with_padding_is_refused():
    with pytest.raises(ValueError, match="independent elements in the prior of 'weight'"):
        BayesianModel(nn.Embedding(4, 3, padding_idx=1), prior=rows_of_three)
    table = nn.Embedding(4, 3)
    bnn = BayesianModel(table, prior=rows_of_three)
    table.padding_idx = 1
    with pytest.raises(ValueError, match="independent elements"):
        bnn.kl_divergence()
    with pytest.raises(ValueError, match="independent elements"):
        bnn.sample_prior()


def rows_of_three(name, p):
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3)).expand([4])
