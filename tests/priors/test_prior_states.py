"""What priors make of names, shapes, files and writes to the base."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_bayes import BayesianModel, priors
from pyro_bayes.evaluation import plots
from pyro_bayes.priors.choice import prior_of

DOUBLE = {"dtype": torch.double}
SCALES = {"a": 0.1, "b": 2.0, "c": 0.7}


def make(prior=None, size=4, **kwargs):
    torch.manual_seed(1)
    shapes = {"a": (size,), "b": (2, 3), "c": ()}
    base = nn.ParameterDict({name: torch.randn(shape, **DOUBLE) for name, shape in shapes.items()})
    return BayesianModel(base, init_logvar=-2.0, prior=prior, **kwargs)


def of_name(name, p):
    return dist.Laplace(0.0, torch.tensor(SCALES[name], **DOUBLE))


class OfName:
    def of(self, name, p):
        return prior_of(name, p, of_name)


class WiderMixture(priors.ScaleMixture):
    def of(self, name, p):
        return prior_of(name, p, of_name)


@pytest.mark.parametrize(
    "prior",
    [
        OfName(),
        WiderMixture(0.5, 1.0, 0.1),
        BayesianModel(nn.ParameterDict({"a": torch.zeros(4)})).as_prior(new=of_name),
    ],
    ids=["of a user", "of a subclass", "new beside a former posterior"],
)
def test_priors_that_depend_on_the_name_stay_apart(prior):
    net = make().base
    net["weight"] = nn.Parameter(torch.zeros(1, 2))  # of another dtype
    bnn = BayesianModel(net, init_logvar=-2.0, prior={"weight": dist.Normal(0.0, 1.0), "": prior})
    found = bnn.kl_divergences()
    for name in ("b", "c"):
        mean, logvar = bnn.guide.posterior()[name]
        q = dist.Normal(mean, (logvar / 2).exp())
        torch.testing.assert_close(found[name], kl_divergence(q, of_name(name, mean)).sum())
    torch.testing.assert_close(bnn.kl_divergence(), sum(found.values()))


@pytest.mark.parametrize("each", ["tensor", "element"])
def test_hierarchical_prior_of_a_scalar(each):
    bnn = make(priors.Hierarchical(dist.HalfNormal(1.0), each=each))
    run = pyro.poutine.trace(bnn.prior).get_trace()
    run.compute_log_prob()
    value, scale = (run.nodes[site]["value"] for site in ("c", "c_prior_scale"))
    torch.testing.assert_close(run.nodes["c"]["log_prob"], dist.Normal(0.0, scale).log_prob(value))


class Divergence(nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.bnn = make(prior)

    def forward(self):
        return self.bnn.kl_divergence()


@pytest.mark.parametrize(
    "prior",
    [
        priors.Gaussian(0.3, mean=0.7),
        lambda name, p: priors.Gaussian(p.square() + 0.5, mean=p + 1.0),
        {"a": priors.Gaussian("empirical", mean=2.0), "": dist.Laplace(0.2, 0.5)},
        priors.Hierarchical(),
    ],
    ids=["numbers", "tensors", "empirical and Laplace", "hierarchical"],
)
def test_gradients_of_all_ways_agree(prior):
    module = Divergence(prior)
    leaves = [*module.bnn.parameters()]
    expected = torch.autograd.grad(module(), leaves)
    twice = torch.autograd.grad(module(), leaves, create_graph=True)
    torch.testing.assert_close(twice, expected)
    values = {name: p.detach() for name, p in module.named_parameters()}
    by_name = torch.func.grad(lambda v: torch.func.functional_call(module, v, ()))(values)
    own = [by_name[f"bnn.{name}"] for name, _ in module.bnn.named_parameters()]
    torch.testing.assert_close(own, [*expected])
    direction = [torch.randn_like(g) for g in expected]
    found = torch.autograd.grad(twice, leaves, direction, allow_unused=True)
    step = 1e-6
    with torch.no_grad():
        _ = [p.add_(d, alpha=step) for p, d in zip(leaves, direction, strict=True)]
    moved = torch.autograd.grad(module(), leaves)
    for second, after, before in zip(found, moved, expected, strict=True):
        torch.testing.assert_close(second, (after - before) / step, rtol=1e-3, atol=1e-3)


def test_the_param_store_has_each_prior_scale_once():
    pyro.clear_param_store()
    bnn = make(priors.Hierarchical(), name="bnn")
    Trace_ELBO().loss(bnn.prior, bnn.guide)
    assert {*pyro.get_param_store()} == {*bnn.guide.stored()}


def test_names_of_prior_scales_are_free():
    base = nn.ParameterDict({"w": torch.ones(2), "w_prior_scale": torch.ones(2)})
    with pytest.raises(ValueError, match=r"no parameter .*'w_prior_scale'"):
        BayesianModel(base, prior=priors.Hierarchical())


@pytest.mark.parametrize("prior", [None, dist.Laplace(0.0, 1.0), priors.Hierarchical()])
def test_a_state_that_does_not_fit_leaves_the_prior(prior):
    bnn, other = make(prior), make(size=7)
    other.update_prior()
    before = bnn.guide.priors.describe("a")
    with pytest.raises(RuntimeError, match="size mismatch"):
        bnn.load_state_dict(other.state_dict())
    assert bnn.guide.priors.describe("a") == before
    assert bnn.kl_divergence().isfinite()


def test_what_was_written_to_the_base_counts():
    bnn = make(priors.Gaussian("empirical"))
    base, values = bnn.base, torch.full((4,), 30.0, **DOUBLE)
    base.a.data = values + 1
    torch.testing.assert_close(bnn.as_prior().of("a", base.a).mean, values + 1)
    base.a.data = values + 2
    around = bnn.kl_divergences(prior=priors.Gaussian(math.exp(-2), mean="base"))
    assert abs(around["a"]) < 1e-9
    base.a.data = values + 3
    drawn = torch.stack([bnn.sample_prior()["a"] for _ in range(100)])
    assert drawn.std() == pytest.approx(33, rel=0.2)
    base.a.data = values + 4
    bnn.update_prior()
    assert abs(bnn.kl_divergence()) < 1e-9


def test_a_density_that_was_replaced_has_no_known_divergence():
    own = dist.Laplace(0.0, 1.0)
    assert prior_of("w", torch.zeros(2), own).is_exact
    own.log_prob = dist.Normal(0.0, 0.5).log_prob
    assert not prior_of("w", torch.zeros(2), own).is_exact


@pytest.mark.parametrize("kind", [dist.Laplace, dist.StudentT])
def test_integers_are_refused(kind):
    numbers = (torch.tensor(3),) * len(kind.arg_constraints)
    with pytest.raises(ValueError, match=r"'a' to have real numbers.*integers"):
        make(kind(*numbers))


def test_priors_are_made_on_the_device_of_their_parameter():
    with torch.device("meta"):
        parameter = torch.empty(3)
    assert prior_of("w", parameter, dist.Laplace(0.0, 1.0)).is_exact


def test_histogram_beside_a_prior_without_a_deviation():
    bnn = BayesianModel(nn.Linear(2, 1), prior=dist.Cauchy(0.0, 1.0))
    ax = plots.scale_histogram(bnn)
    assert [line for line in ax.get_lines() if line.get_linestyle() == "--"] == []


def test_former_posterior_of_a_tied_parameter_has_all_its_names():
    net = nn.ModuleDict({"first": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
    net["last"].weight = net["first"].weight
    former = BayesianModel(net).as_prior()
    free = nn.ModuleDict({"first": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
    shown = BayesianModel(free, prior=former).guide.priors
    assert shown.describe("last.weight") == shown.describe("first.weight") != "N(0, 1)"


def test_sites_have_the_empirical_variance_around_the_mean():
    bnn = make(priors.Gaussian("empirical", mean=4.0))
    run = pyro.poutine.trace(bnn.prior).get_trace()
    run.compute_log_prob()
    for name, (mean, logvar) in bnn.guide.posterior().items():
        own = dist.Normal(4.0, ((mean - 4).square() + logvar.exp()).mean().sqrt())
        site = run.nodes[name]
        torch.testing.assert_close(site["log_prob"], own.log_prob(site["value"]).sum())


def test_prior_scales_start_at_the_median():
    bnn = make({"a": priors.Horseshoe(0.3), "": priors.Hierarchical(dist.Gamma(2.0, 3.0))})
    starts = {name: mean for name, (mean, _) in bnn.guide.prior_scales.by_name().items()}
    torch.testing.assert_close(starts["a"].detach(), torch.full((4,), math.log(0.3), **DOUBLE))
    assert starts["b"] == 0  # whose median is not known


@pytest.mark.parametrize(
    ("scaling", "variance"),
    [
        (priors.fan_in(3.0), 9 / 24),
        (priors.he(), 2 / 24),
        (priors.glorot(), 2 / (24 + 36)),
        (priors.radford(), 1 / 24),
    ],
    ids=["fan_in", "he", "glorot", "radford"],
)
def test_scalings_count_the_window_of_a_convolution(scaling, variance):
    assert scaling("weight", torch.zeros(6, 4, 3, 2)).var == pytest.approx(variance)
