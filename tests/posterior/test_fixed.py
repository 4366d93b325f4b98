"""Elements that carry no information: padding rows, and what pruning has masked."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn
from torch.nn.utils import prune

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.evaluation import plots
from pyro_bayes.posterior.draws import divergence, draw
from pyro_bayes.posterior.fixed import hold
from pyro_bayes.posterior.layout import Flat, Layout
from pyro_bayes.priors import Empirical
from pyro_bayes.training import diagnose

ESTIMATORS = [False, True, "flipout"]
PRIORS = {
    "number": (0.1, None),
    "each": ({"bag": 2.0, "": 0.1}, None),
    "empirical": (Empirical(least=0.0), ()),
    "rows": (Empirical(each=0, least=0.0), 0),
}
every_leaf = pytest.mark.parametrize("leaves", ["flat", "named"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=-6)
        self.bag = nn.EmbeddingBag(5, 4, padding_idx=-1)
        self.linear, self.out = nn.Linear(4, 3, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return self.out(self.linear(self.embedding(x).mean(1) + self.bag(x % 5)).relu())


def make(leaves="flat", prior_var=1.0, **kwargs):
    net = Net()
    with torch.no_grad():  # so that torch can copy the net
        prune.l1_unstructured(net.linear, "weight", 0.5)
        net.embedding.weight[0] = 0.7
    bnn = BayesianModel(net, -2.0, leaves=leaves, prior_var=prior_var, **kwargs)
    for logvar in bnn.logvars.parameters():
        nn.init.uniform_(logvar, -3, -2.1)
    return bnn


def free(bnn):
    """Which elements are random, by name, in the order of the parameters."""
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in bnn.means.named_parameters()}
    kept["embedding.weight"][0] = False
    kept.get("bag.weight", torch.zeros(1))[-1] = False
    kept["linear.weight_orig"] &= bnn.base.linear.weight_mask.bool()
    return kept


def variances(bnn, kept, prior_var):
    """The variances of the prior, from the free elements alone."""
    prior_var, dim = PRIORS[prior_var]
    each = {}
    for name, keep in kept.items():
        mean, logvar = bnn.means.get_parameter(name), bnn.logvars.get_parameter(name)
        if dim is None:
            number = prior_var if name != "bag.weight" or prior_var == 0.1 else 2.0
            each[name] = torch.full(mean.shape, number if number in (0.1, 2.0) else 0.1)
            continue
        squares = (mean.square() + logvar.exp()).masked_fill(~keep, torch.nan).detach()
        average = squares.nanmean() if dim == () else squares.nanmean(1, keepdim=True)
        each[name] = average.nan_to_num(1.0).expand(mean.shape)
    return each


def by_hand(bnn, prior_var):
    kept = free(bnn)
    priors, total = variances(bnn, kept, prior_var), 0.0
    for name, keep in kept.items():
        mean, logvar = bnn.means.get_parameter(name)[keep], bnn.logvars.get_parameter(name)[keep]
        q, p = dist.Normal(mean, (0.5 * logvar).exp()), priors[name][keep].sqrt()
        total = total + torch.distributions.kl_divergence(q, dist.Normal(0.0, p)).sum()
    return total


def lifted(bnn):
    def model():
        with bnn.lift() as net:
            return net

    return model


@every_leaf
@pytest.mark.parametrize("prior_var", PRIORS)
def test_divergences_are_those_of_the_free_elements(leaves, prior_var):
    bnn = make(leaves, PRIORS[prior_var][0])
    exact = by_hand(bnn, prior_var)
    exact.backward()
    gradients = [p.grad.clone() for p in bnn.parameters()]
    front_ends = {
        "kl_divergence": bnn.kl_divergence(),
        "kl_divergences": sum(bnn.kl_divergences().values()),
        "exact_kl": Trace_ELBO().differentiable_loss(lifted(bnn), bnn.exact_kl()),
        "mean field": TraceMeanField_ELBO().differentiable_loss(lifted(bnn), bnn.guide),
    }
    for trick in ESTIMATORS:
        with bnn.reparameterize_with_kl(trick) as (_, front_ends[trick]):
            pass
    for name, kl in front_ends.items():
        torch.testing.assert_close(kl, exact, msg=lambda text, name=name: f"{name}: {text}")
        for gradient, p in zip(
            gradients, torch.autograd.grad(kl, [*bnn.parameters()]), strict=True
        ):
            torch.testing.assert_close(p, gradient, rtol=1e-4, atol=1e-5)


@every_leaf
@pytest.mark.parametrize("particles", [None, 3])
def test_log_densities_are_those_of_the_free_elements(leaves, particles):
    bnn = make(leaves, 0.1)
    plate = pyro.plate("num_particles_vectorized", particles or 1, dim=-1)
    with plate if particles else pyro.poutine.messenger.Messenger():
        guide = poutine.trace(bnn.guide).get_trace()
        model = poutine.trace(poutine.replay(bnn.prior, guide)).get_trace()
    kept, q, p = free(bnn), 0.0, 0.0
    for name, keep in kept.items():
        value = guide.nodes[name]["value"][..., keep]
        mean, logvar = bnn.means.get_parameter(name)[keep], bnn.logvars.get_parameter(name)[keep]
        q = q + dist.Normal(mean, (0.5 * logvar).exp()).log_prob(value).sum()
        p = p + dist.Normal(0.0, 0.1**0.5).log_prob(value).sum()
    torch.testing.assert_close(guide.log_prob_sum(), q)
    torch.testing.assert_close(model.log_prob_sum(), p)
    differences = q - p, guide.log_prob_sum() - model.log_prob_sum()
    exact, own = (
        torch.autograd.grad(number, [*bnn.parameters()], retain_graph=True)
        for number in differences
    )
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)
    draw = guide.nodes["embedding.weight"]["value"]
    (of_draw,) = torch.autograd.grad(guide.log_prob_sum(), draw, retain_graph=True)
    assert not of_draw[..., 0, :].any()
    assert of_draw[..., 1:, :].all()


@every_leaf
def test_fixed_elements_keep_their_value_and_get_no_gradient(leaves):
    bnn, x = make(leaves), torch.randint(6, (7, 5))
    row = torch.full((4,), 0.7)
    for trick in ESTIMATORS:
        with bnn.reparameterize_with_kl(trick) as (net, kl):
            assert torch.equal(net.embedding(torch.tensor([0, 3, 0]))[::2], row.expand(2, 4))
            assert not net.bag(torch.full((2, 2), 4)).any()
            (net(x).square().sum() + kl).backward()
        if trick:  # the gradient is asked for when the context is open
            with torch.no_grad(), bnn.reparameterize(trick) as net, torch.enable_grad():
                net(x).square().sum().backward()
    kept = free(bnn)
    for name, keep in kept.items():
        for tree in (bnn.means, bnn.logvars):
            gradient = tree.get_parameter(name).grad
            assert not gradient[~keep].any()
            assert (gradient[keep].isfinite() & (gradient[keep] != 0)).all()
    prior, guide = (
        Predictive(lifted(bnn), guide=g, num_samples=3, parallel=p)()
        for g, p in ((None, True), (bnn.guide, False))
    )
    weights = (
        *(prior["embedding.weight"].reshape(3, 6, 4), guide["embedding.weight"]),
        *Predictive(lifted(bnn), guide=bnn.guide, num_samples=2, parallel=True)()[
            "embedding.weight"
        ],
        bnn.predict(lambda net: net.embedding.weight, 9, statistics="samples").samples,
        bnn.guide.quantiles([0.1, 0.5, 0.9])["embedding.weight"],
        *(bnn.guide.median()["embedding.weight"], bnn.sample_params()["embedding.weight"]),
        *(bnn.sample_model().embedding.weight, bnn.base.embedding.weight),
    )
    assert all(torch.equal(w[..., 0, :], row.expand_as(w[..., 0, :])) for w in weights)
    assert all(w[..., 1:, :].std() > 0.1 for w in weights)
    scale = bnn.guide.scales.embedding.weight
    assert torch.equal(scale > 0, kept["embedding.weight"])


@pytest.mark.parametrize("how", ["nuts", "guide"])
def test_inference_that_knows_nothing_of_the_posterior(how):
    bnn, x = make(include_params=["embedding", "linear"]), torch.randint(6, (7, 5))

    def model(x):
        with bnn.lift() as net:
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0).to_event(1), obs=torch.ones(7))

    if how == "nuts":
        mcmc = MCMC(NUTS(model, max_tree_depth=2), 3, warmup_steps=2, disable_progbar=True)
        mcmc.run(x)
        samples = mcmc.get_samples()
    else:
        guide = AutoDiagonalNormal(model)
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
        samples = {name: value.unsqueeze(0) for name, value in guide().items()}
        assert guide.get_posterior().event_shape == (5 * 4 + 6,)
    for name, keep in free(bnn).items():
        if name in samples:
            value, mean = samples[name], bnn.means.get_parameter(name)
            assert torch.equal(value[:, ~keep], mean[~keep].expand_as(value[:, ~keep]))
            assert (value[:, keep] != mean[keep]).all()


@pytest.mark.parametrize("fixed", [[], [0, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("shift", [0, 9])  # small variances have a faster way
def test_formulas_and_passes_agree(fixed, shift):
    layout, mask = Layout({"a": torch.zeros(2, 3), "b": torch.zeros(2)}), torch.zeros(6).bool()
    mask[fixed] = True
    layout.fix({"a": mask.view(2, 3)} if fixed else {}, None)
    layout.checks = 0  # all elements are used
    parameters = torch.randn(2, 8, dtype=torch.double)
    parameters[1] -= shift

    def numbers(parameters, number):
        flat = hold(Flat(layout, *parameters))
        if number == "log_densities":
            torch.manual_seed(0)
            _, outputs, value = draw(flat, "draws", number)
            return value @ value + sum(output.square().sum() for output in outputs)
        return divergence(flat, 2.0, number).square().sum()

    for number in ("divergence", "divergences", "log_densities"):
        fused = [parameters.clone().requires_grad_() for _ in range(2)]
        value = numbers(fused[0], number)
        (first,) = torch.autograd.grad(value, fused[0])
        (graph,) = torch.autograd.grad(numbers(fused[1], number), fused[1], create_graph=True)
        (second,) = torch.autograd.grad(graph.square().sum(), fused[1])
        formula = torch.func.grad_and_value(lambda p, n=number: numbers(p, n))
        exact, formula_value = formula(parameters)
        twice = torch.func.grad(lambda p, f=formula: f(p)[0].square().sum())(parameters)
        for own, other in ((value, formula_value), (first, exact), (graph, exact), (second, twice)):
            torch.testing.assert_close(own, other)
        assert exact[:, :6][:, mask].abs().sum() == 0


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda bnn: pickle.loads(pickle.dumps(bnn)),
    "double": lambda bnn: copy.deepcopy(bnn).double(),
    "state dict": lambda bnn: loaded(bnn, assign=False),
    "assigned state dict": lambda bnn: loaded(bnn, assign=True),
}


def loaded(bnn, assign):
    other = make("named" if bnn.guide.memory.leaves == "flat" else "flat", bnn.prior_var)
    other.load_state_dict(copy.deepcopy(bnn.state_dict()), assign=assign)
    return other


@every_leaf
@pytest.mark.parametrize("way", COPIES)
def test_copies_and_changed_masks(leaves, way):
    bnn = make(leaves, Empirical(least=0.0))
    bnn.prior_var = Empirical(least=0.0)
    for change in (None, "pruned again", "no padding"):
        if change == "pruned again":
            prune.random_unstructured(bnn.base.linear, "weight", 0.5)
        if change == "no padding":
            bnn.base.embedding.padding_idx = None
        exact = by_hand(bnn, "empirical") if change != "no padding" else bnn.kl_divergence()
        torch.testing.assert_close(bnn.kl_divergence(), exact)
        with torch.no_grad():  # see `make`
            bnn.base.linear.weight = bnn.base.linear.weight.detach()
        other = COPIES[way](bnn)
        if change == "no padding":
            other.base.embedding.padding_idx = None
        torch.testing.assert_close(other.kl_divergence(), exact, check_dtype=False)
        still = torch.equal(
            other.sample_params()["embedding.weight"][0], bnn.means.embedding.weight[0]
        )
        assert still == (change != "no padding")


@pytest.mark.parametrize("change", ["remove", "prune"])
def test_pruning_that_replaces_parameters_is_refused(change):
    bnn = make()
    if change == "remove":
        prune.remove(bnn.base.linear, "weight")
    else:
        prune.random_unstructured(bnn.base.out, "weight", 0.5)
    with pytest.raises(RuntimeError, match="Wrap the changed module in a new BayesianModel"):
        bnn.reparameterize().__enter__()


def tied(kind, padding=0):
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 5, bias=False))
    if kind == "head":
        net[1].weight = net[0].weight
    elif kind == "table":
        net[1] = nn.Embedding(5, 3, padding_idx=0)
        net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("net", "count"),
    [(tied("head"), 0), (tied("table"), 3), (tied("table", 1), 0), (tied("none"), 3)],
)
def test_a_tied_row_is_fixed_where_nothing_uses_it(net, count):
    bnn = BayesianModel(net, include_params="0", init_logvar=0.0)
    assert (bnn.guide.posterior()["0.weight"][1] == -torch.inf).sum() == count
    for trick in ESTIMATORS:
        with bnn.reparameterize(trick) as drawn:
            assert bool(drawn[0](torch.tensor([0])).any()) == (count == 0)


@pytest.mark.parametrize("trick", ESTIMATORS)
def test_a_row_that_is_used_by_a_function_is_noticed(trick):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3, padding_idx=0)

        def forward(self, x):
            return F.linear(self.embedding(x), self.embedding.weight)

    bnn, x = BayesianModel(Functional()), torch.tensor([1, 2])
    with bnn.reparameterize(trick) as net:
        net.embedding(x).sum().backward()
    bnn.base.embedding.padding_idx = 1

    def step():
        with bnn.reparameterize(trick) as net:
            net(x).sum().backward()

    with pytest.warns(UserWarning, match=r"of 'embedding.weight'.*embedding.padding_idx = None"):
        step()
    step()  # it is said once


def test_a_table_that_is_computed():
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0))
    nn.utils.parametrizations.spectral_norm(net[0])
    with pytest.warns(UserWarning, match=r"the embedding '0' to hold its weight.*'0\.'") as record:
        BayesianModel(net)
    assert record[0].filename == __file__


def test_reports_leave_fixed_elements_out(capsys):
    bnn = make()
    kept = free(bnn)
    rows = {row.parameter: row for row in bnn.summary().rows}
    assert (
        f"{sum(int(k.sum()) for k in kept.values())} Bayesian parameters" in capsys.readouterr().out
    )
    assert rows["embedding.weight"].why == "every name, 4 elements fixed"
    assert rows["out.weight"].why == "every name"
    mean, logvar = (tree.embedding.weight[1:] for tree in (bnn.means, bnn.logvars))
    expected = (mean.abs() / (0.5 * logvar).exp()).mean().item()
    assert rows["embedding.weight"].signal == pytest.approx(expected, rel=1e-5)
    nn.init.constant_(bnn.logvars.embedding.weight[1:3], -2.0)
    objective = ELBO(bnn, likelihoods.Gaussian(0.1), num_data=7)
    batch = torch.randint(6, (7, 5)), torch.zeros(7, 1)
    diagnosis = diagnose(objective, [batch], num_gradients=2)
    assert diagnosis.rows[0].unmoved == pytest.approx(8 / 20)
    assert diagnosis.kl == pytest.approx(bnn.kl_divergence().item(), rel=1e-5)
    bins = plots.signal_histogram(bnn), plots.scale_histogram(bnn)
    assert all(torch.isfinite(torch.tensor(ax.get_xlim())).all() for ax in bins)
    with torch.no_grad():
        bnn.base.linear.weight_mask.zero_()  # nothing of it is left
    assert bnn.kl_divergences()["linear.weight_orig"] == 0
    assert {row.parameter: row for row in bnn.summary().rows}["linear.weight_orig"].signal is None
    plots.signal_histogram(bnn)
