"""Draws with their log-densities, against autograd through the formulas."""

import pytest
import torch
from pyro.poutine import block, condition, replay, scale, trace
from torch import nn
from torch.distributions import Normal

from pyro_bayes import BayesianModel
from pyro_bayes.posterior import flat, fused, gaussian
from pyro_bayes.posterior.scores import half_square, scored_draws
from pyro_bayes.pyro_bridge.prior import Prior

SHAPES = {"w": (4, 3), "b": (5,), "s": (), "none": (0, 2)}


@pytest.fixture(params=[flat.BLOCK, 7, 1], autouse=True)
def size(request, monkeypatch):
    """Parameters side by side, in several parts, and in blocks."""
    monkeypatch.setattr(flat, "BLOCK", request.param)


def posterior_of(dtype, **options):
    def tensor(shape):
        return torch.randn(shape).to(dtype, **options).requires_grad_()

    return {name: (tensor(shape), tensor(shape)) for name, shape in SHAPES.items()}


@pytest.fixture
def posterior():
    return posterior_of(torch.float64)


def by_formula(posterior, draws):
    """The draws as functions of the posterior, half their squares and their log-densities."""
    found = {}
    for name, (mean, logvar) in posterior.items():
        epsilon = ((draws[name][0] - mean) * (-0.5 * logvar).exp()).detach()
        draw = gaussian.draw(mean, logvar, epsilon)
        density = Normal(mean, (0.5 * logvar).exp()).log_prob(draw).sum()
        found[name] = draw, 0.5 * draw.square().sum(), density
    return found


def weighted(terms):
    """A different weight for each number, so that none can be taken for another."""
    return sum((i + 1.5) * term.sin().sum() for i, term in enumerate(terms))


PICKS = {
    "all": lambda d, h, q: [*d, *h, *q],
    "draws": lambda d, h, q: d,
    "squares": lambda d, h, q: h,
    "densities": lambda d, h, q: q,
    "one square": lambda d, h, q: h[1:2],
    "some of each": lambda d, h, q: [d[1], h[0], q[2]],
}


def picked(pick, found):
    return weighted(pick(*map(list, zip(*found, strict=True))))


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
def test_gradients_are_those_of_the_formula(posterior, pick):
    draws = scored_draws(posterior)
    leaves = [p for q in posterior.values() for p in q]
    expected = picked(pick, by_formula(posterior, draws).values())
    found = picked(pick, [(d, half_square(d), q) for d, q in draws.values()])
    torch.testing.assert_close(found, expected)

    def first_and_second(loss):
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        total = sum(g.square().sum() for g in first)
        return *first, *torch.autograd.grad(
            total, leaves, retain_graph=True, materialize_grads=True
        )

    slopes = first_and_second(expected)
    found.backward(retain_graph=True)
    for leaf, slope in zip(leaves, slopes, strict=False):
        torch.testing.assert_close(
            torch.zeros_like(slope) if leaf.grad is None else leaf.grad, slope
        )
    torch.testing.assert_close(first_and_second(found), slopes)

    for leaf in leaves:
        leaf.grad = None
    found.backward(create_graph=True)
    firsts = [leaf.grad for leaf in leaves if leaf.grad is not None]
    total = sum(g.square().sum() for g in firsts)
    seconds = torch.autograd.grad(total, leaves, materialize_grads=True)
    torch.testing.assert_close((*slopes[: len(leaves)], *seconds), slopes)
    for leaf in leaves:
        leaf.grad = None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_any_kind(dtype):
    last = torch.randn(2, 3, 2, 2).to(dtype, memory_format=torch.channels_last).requires_grad_()
    posterior = {"last": (last, last), **posterior_of(dtype)}
    draws = scored_draws(posterior)
    assert list(draws) == list(posterior)
    for name, (draw, density) in draws.items():
        mean, logvar = posterior[name]
        expected = Normal(mean.double(), (0.5 * logvar.double()).exp()).log_prob(draw.double())
        assert density.dtype == dtype
        close = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(density, expected.sum().to(dtype), **close)
        assert (half_square(draw) is None) == (dtype == torch.bfloat16 or name == "last")


def test_draws_without_a_graph_are_the_same(posterior):
    torch.manual_seed(1)
    expected = scored_draws(posterior)
    torch.manual_seed(1)
    found = scored_draws({name: (m.detach(), v.detach()) for name, (m, v) in posterior.items()})
    for name, pair in found.items():
        torch.testing.assert_close(pair, expected[name])
        assert half_square(pair[0]) is None  # it may yet become a leaf that trains


def test_draws_that_are_changed_have_no_known_square(posterior):
    draw = scored_draws(posterior)["w"][0]
    assert half_square(draw) is not None
    draw.mul_(2)
    assert half_square(draw) is None


def test_a_draw_may_be_changed_beside_others(posterior):
    leaves = [p for q in posterior.values() for p in q]

    def loss(read_first):
        torch.manual_seed(1)
        draws = {name: draw for name, (draw, _) in scored_draws(posterior).items()}
        first = half_square(draws["w"])
        draws["w"].mul_(2)
        halves = [half_square(draw) for name, draw in draws.items() if name != "w"]
        return draws["w"].pow(3).sum() + sum(halves) + (first if read_first else 0)

    for read_first in (False, True):
        loss(read_first).backward()
        expected = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        if read_first:  # the square's gradient is that of the former value
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss(read_first), leaves)
        else:
            found = torch.autograd.grad(loss(read_first), leaves)
            torch.testing.assert_close([*found], expected)


def test_copies_have_no_known_square(posterior):
    draw = scored_draws(posterior)["w"][0]
    leaf = draw.detach().requires_grad_()
    leaf._half_square = draw._half_square  # as pickles do
    assert half_square(leaf) is None


def test_draws_of_many_values_have_a_density_each(posterior):
    draw = scored_draws(posterior)["w"][0]
    density = Prior(torch.Size([3]), 0.3, torch.zeros((), dtype=torch.float64)).log_prob(draw)
    torch.testing.assert_close(density, Normal(0.0, 0.3**0.5).log_prob(draw).sum(-1))


@pytest.mark.parametrize("way", ["grad", "retain", "hook", "both"])
def test_gradients_by_draws_have_the_part_of_the_squares(posterior, way):
    draw = scored_draws(posterior)["w"][0]
    loss = 3 * half_square(draw) + draw.sum()
    seen = []
    if way == "grad":
        seen += torch.autograd.grad(loss, draw)
    elif way == "both":
        seen += torch.autograd.grad(loss, (draw, posterior["w"][0]))
    elif way == "retain":
        draw.retain_grad()
        loss.backward()
        seen = [draw.grad, posterior["w"][0].grad]
    else:
        draw.register_hook(seen.append)
        loss.backward()
        seen.append(posterior["w"][0].grad)
    for found in seen:
        torch.testing.assert_close(found, 3 * draw.detach() + 1)


@pytest.fixture
def bnn():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return BayesianModel(net, init_logvar=-1.0, prior_var=0.3)


def densities(bnn, values):
    return {n: Normal(0.0, 0.3**0.5).log_prob(v).sum() for n, v in values.items()}


HANDLERS = {
    "replay": lambda model, found: replay(model, found),
    "condition": lambda model, found: condition(model, {n: found.nodes[n]["value"] for n in SITES}),
    "changed": lambda model, found: condition(
        model, {n: found.nodes[n]["value"] * 2 for n in SITES}
    ),
}
SITES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_prior_densities_are_functions_of_the_values(bnn, handler):
    guide_trace = trace(bnn.guide).get_trace()
    model_trace = trace(handler(bnn.prior, guide_trace)).get_trace()
    values = {n: model_trace.nodes[n]["value"] for n in SITES}
    expected = densities(bnn, values)
    model_trace.compute_log_prob()
    for name, density in expected.items():
        torch.testing.assert_close(model_trace.nodes[name]["log_prob"], density)
    given = list(values.values())
    slopes = torch.autograd.grad(sum(expected.values()), given, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(model_trace.log_prob_sum(), given), slopes)


def test_scales_of_single_sites_reach_their_gradients(bnn):
    factors = dict(zip(SITES, (2.0, 0.5, 3.0, 0.0), strict=True))
    leaves = list(bnn.parameters())
    guide_trace = trace(scale(bnn.guide, 0.7)).get_trace()
    model_trace = trace(replay(bnn.prior, guide_trace)).get_trace()
    for name, factor in factors.items():
        model_trace.nodes[name]["scale"] = factor
    values = {n: guide_trace.nodes[n]["value"] for n in SITES}
    expected = sum(factors[n] * p for n, p in densities(bnn, values).items())
    for name in SITES:
        mean, logvar = bnn.guide.posterior()[name]
        epsilon = ((values[name] - mean) * (-0.5 * logvar).exp()).detach()
        expected = expected - 0.7 * gaussian.log_density(logvar, epsilon)
    slopes = torch.autograd.grad(expected, leaves, retain_graph=True)
    (model_trace.log_prob_sum() - guide_trace.log_prob_sum()).backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(slopes))


def test_a_model_without_some_sites_still_trains_the_others(bnn):
    guide_trace = trace(bnn.guide).get_trace()
    model = block(replay(bnn.prior, guide_trace), hide=["0.weight"])
    trace(model).get_trace().log_prob_sum().backward()
    assert not bnn.guide.posterior()["0.weight"][0].grad.any()
    assert bnn.guide.posterior()["2.weight"][0].grad.all()


@pytest.mark.parametrize("prior_var", [0.5, 30.0])
def test_divergence_of_each_parameter_goes_to_the_anchor(posterior, prior_var):
    leaves = [p for q in posterior.values() for p in q]
    factors = dict(zip(posterior, (2.0, 3.0, -1.0, 5.0), strict=True))
    for kind in ("draws", "deviations", "variances"):
        outputs, anchor = fused.outputs_and_anchor(kind, posterior, "each")
        found = fused.kl_divergences(posterior, prior_var, anchor)
        expected = {n: gaussian.kl_divergence(*q, prior_var) for n, q in posterior.items()}
        torch.testing.assert_close(found, expected)
        one, other = (
            sum(f * kl[n] for n, f in factors.items()) + outputs["w"].sum()
            for kl in (found, expected)
        )
        slopes = torch.autograd.grad(other, leaves, retain_graph=True, materialize_grads=True)
        found = torch.autograd.grad(one, leaves, materialize_grads=True)
        torch.testing.assert_close(found, slopes)
