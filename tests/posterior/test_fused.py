"""Fused draws and divergences, against the formulas for one parameter."""

import copy
import math
import pickle
from functools import partial
from typing import get_args

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pyro_bayes import BayesianModel
from pyro_bayes.base.state import versions
from pyro_bayes.noise.gaussian_tensor import change_of, drawn, variance_of
from pyro_bayes.posterior import flat, fused, gaussian, sweep
from pyro_bayes.pyro_bridge.prior import Prior

SHAPES = {"w": (4, 3), "b": (5,), "s": ()}


@pytest.fixture(params=[flat.BLOCK, 7, 1], autouse=True)
def block(request, monkeypatch):
    """Parameters side by side, in several parts, and in blocks."""
    monkeypatch.setattr(flat, "BLOCK", request.param)
    return request.param


@pytest.fixture
def posterior():
    return {
        name: (
            torch.randn(shape, dtype=torch.float64, requires_grad=True),
            torch.randn(shape, dtype=torch.float64).requires_grad_(),
        )
        for name, shape in SHAPES.items()
    }


def leaves(posterior):
    return [p for q in posterior.values() for p in q]


def rebuilt(posterior, values):
    pairs = zip(values[::2], values[1::2], strict=True)
    return dict(zip(posterior, pairs, strict=True))


def noisy(posterior, values):
    torch.manual_seed(1)
    return tuple(fused.draws(rebuilt(posterior, values)).values())


def noise_of(mean, logvar, draw):
    return ((draw - mean) * (-0.5 * logvar).exp()).detach()


def test_draws_are_those_of_the_formula(posterior, block):
    torch.manual_seed(1)
    draws = fused.draws(posterior)
    torch.manual_seed(1)
    noise = torch.randn(18, dtype=torch.float64)
    epsilons = dict(zip(SHAPES, noise.split([12, 5, 1]), strict=True))
    assert list(draws) == list(SHAPES)
    found = {name: noise_of(*posterior[name], draw) for name, draw in draws.items()}
    if block > 18:
        for name, epsilon in found.items():
            torch.testing.assert_close(epsilon, epsilons[name].view(SHAPES[name]))
    assert len({e.item() for epsilon in found.values() for e in epsilon.view(-1)}) == 18


def test_draws_are_the_same_with_and_without_a_graph(posterior):
    torch.manual_seed(1)
    expected = fused.draws(posterior)
    with torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(fused.draws(posterior), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", get_args(fused.Kind))
def test_outputs_are_the_same_if_nothing_trains(posterior, kind, monkeypatch):
    def filled(*args):  # as memory that was in use before
        return [[memory.fill_(math.nan) for memory in row] for row in room(*args)]

    room = sweep.room
    monkeypatch.setattr(sweep, "room", filled)
    torch.manual_seed(1)
    expected, _ = fused.outputs_and_anchor(kind, posterior)
    frozen = {name: (mean.detach(), logvar.detach()) for name, (mean, logvar) in posterior.items()}
    torch.manual_seed(1)
    found, _ = fused.outputs_and_anchor(kind, frozen)
    assert list(found) == list(posterior)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_deviations_and_variances_are_those_of_draws(posterior):
    torch.manual_seed(1)
    draws = fused.draws(posterior)
    torch.manual_seed(1)
    deviations, _ = fused.outputs_and_anchor("deviations", posterior)
    variances, _ = fused.outputs_and_anchor("variances", posterior)
    for name, (mean, logvar) in posterior.items():
        torch.testing.assert_close(mean + deviations[name], draws[name])
        torch.testing.assert_close(variances[name], logvar.exp())
    grads = torch.autograd.grad(deviations["w"].sum(), posterior["w"], allow_unused=True)
    assert grads[0] is None
    torch.testing.assert_close(grads[1], 0.5 * deviations["w"].detach())


def test_draws_may_be_changed_in_place(posterior):
    draws = fused.draws(posterior)
    before = draws["b"].detach().clone()
    draws["w"].mul_(2)
    torch.testing.assert_close(draws["b"], before)
    draws["w"].sum().backward()
    torch.testing.assert_close(posterior["w"][0].grad, torch.full((4, 3), 2.0).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_any_kind(dtype):
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    weight = torch.randn(2, 3, 2, 2).to(**last).requires_grad_()
    bias = torch.randn(2, 3, 2, 2).to(dtype).requires_grad_()
    posterior = {"b": (bias, bias), "w": (weight, weight), "m": (weight, bias)}
    for name, draw in fused.draws(posterior).items():
        assert (draw.shape, draw.dtype) == (weight.shape, dtype)
        assert draw.is_contiguous(memory_format=torch.channels_last) == (name != "b")
    kl = fused.kl_divergence(posterior, 1.0)
    assert kl.dtype == dtype
    expected = sum(gaussian.kl_divergence(*q, 1.0) for q in posterior.values())
    torch.testing.assert_close(kl, expected.to(dtype))
    found, slope = (torch.autograd.grad(value, (weight, bias)) for value in (kl, expected))
    torch.testing.assert_close(found, slope)


@pytest.mark.parametrize("prior_var", [1.0, 0.1])
def test_divergence_is_that_of_the_formula(posterior, prior_var):
    expected = sum(gaussian.kl_divergence(*q, prior_var) for q in posterior.values())
    torch.testing.assert_close(fused.kl_divergence(posterior, prior_var), expected)


def test_divergence_of_a_posterior_close_to_the_prior_keeps_its_digits():
    logvar = torch.full((1000,), 1e-3)
    posterior = {"w": (torch.zeros(1000), logvar)}
    expected = 500 * (math.expm1(logvar[0].item()) - logvar[0].item())
    assert fused.kl_divergence(posterior, 1.0).item() == pytest.approx(expected, rel=1e-3)


def test_divergence_of_many_elements_far_from_the_prior(block):
    logvar = torch.linspace(-9, -3, 10_000).requires_grad_()
    posterior = {"w": (torch.randn(10_000), logvar)}
    double = [p.detach().double() for p in posterior["w"]]
    expected = gaussian.kl_divergence(*double, 0.1).item()
    found = fused.kl_divergence(posterior, 0.1)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    found.backward()
    torch.testing.assert_close(logvar.grad, 0.5 * (10 * logvar.exp() - 1).detach())


@pytest.mark.parametrize("kind", get_args(fused.Kind))
@pytest.mark.parametrize("shift", [-6.0, -0.3, 0.0, 2.0])
def test_divergence_after_draws_is_that_of_the_formula(kind, shift, monkeypatch):
    sizes = {"w": flat.BLOCK + 7, "b": 5}
    posterior = {
        name: (
            0.05 * torch.randn(size),
            (math.log(0.3) + shift + 1e-3 * torch.randn(size)).requires_grad_(),
        )
        for name, size in sizes.items()
    }
    expected = sum(
        gaussian.kl_divergence(m.double(), v.double(), 0.3).item() for m, v in posterior.values()
    )
    _, anchor = fused.outputs_and_anchor(kind, posterior)
    if shift == -6:  # far from the prior, what was summed up with the draws is enough
        monkeypatch.setattr(fused, "_divergences", None)
    found = fused.kl_divergence(posterior, 0.3, anchor)
    assert found.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("kind", get_args(fused.Kind))
@pytest.mark.parametrize("shift", [-8.1, -4.1, -3.9, -2.7, -0.6])
def test_divergence_after_draws_of_one_variance(kind, shift):
    mean, logvar = torch.zeros(flat.BLOCK), torch.full((flat.BLOCK,), math.log(0.1) + shift)
    posterior = {"w": (mean, logvar.requires_grad_())}  # whose rounding errors all add up
    expected = gaussian.kl_divergence(mean.double(), logvar.double(), 0.1).item()
    _, anchor = fused.outputs_and_anchor(kind, posterior)
    assert fused.kl_divergence(posterior, 0.1, anchor).item() == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("wide", [0.0, 2.0])
def test_divergence_after_draws_of_two_variances(wide):
    logvar = math.log(0.1) + torch.tensor([wide, -12.0]).repeat(flat.BLOCK)
    posterior = {"w": (torch.zeros(2 * flat.BLOCK), logvar.requires_grad_())}
    double = [p.detach().double() for p in posterior["w"]]
    expected = gaussian.kl_divergence(*double, 0.1).item()
    _, anchor = fused.outputs_and_anchor("draws", posterior)
    assert fused.kl_divergence(posterior, 0.1, anchor).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", get_args(fused.Kind))
@pytest.mark.parametrize("blocks", [(0,), (0, 1), (1, 0, 1)])
def test_empty_parameters(kind, blocks, block):
    sizes = [(block + 1) * count for count in blocks]
    posterior = {
        str(i): (torch.ones(size), torch.full((size,), -9.0).requires_grad_())
        for i, size in enumerate(sizes)
    }
    outputs, anchor = fused.outputs_and_anchor(kind, posterior)
    assert [len(output) for output in outputs.values()] == sizes
    expected = sum(sizes) * (math.exp(-9) + 9) / 2
    for found in (fused.kl_divergence(posterior, 1.0, a) for a in (anchor, None)):
        assert found.item() == pytest.approx(expected, rel=1e-6)


def test_derivatives_of_first_and_second_order(posterior):
    def draws(*values):
        return noisy(posterior, values)

    def divergence(*values):
        return fused.kl_divergence(rebuilt(posterior, values), 0.3)

    def both(kind, *values):
        torch.manual_seed(1)
        outputs, anchor = fused.outputs_and_anchor(kind, rebuilt(posterior, values))
        kl = fused.kl_divergence(rebuilt(posterior, values), 0.3, anchor)
        return kl, *outputs.values()

    kinds = [partial(both, kind) for kind in get_args(fused.Kind)]
    for function in (draws, divergence, *kinds):
        assert torch.autograd.gradcheck(function, leaves(posterior), check_undefined_grad=False)
        assert torch.autograd.gradgradcheck(function, leaves(posterior))


@pytest.mark.parametrize("kind", get_args(fused.Kind))
def test_gradients_are_the_same_for_a_second_derivative(posterior, kind):
    def total(shared):
        torch.manual_seed(1)
        outputs, anchor = fused.outputs_and_anchor(kind, posterior)
        kl = fused.kl_divergence(posterior, 0.3, anchor if shared else None)
        return kl + sum(output.square().sum() for output in outputs.values())

    first = torch.autograd.grad(total(False), leaves(posterior))
    for shared in (False, True):
        second = torch.autograd.grad(total(shared), leaves(posterior), create_graph=True)
        torch.testing.assert_close(first, second)


def test_many_gradients_at_once(posterior):
    outputs, anchor = fused.outputs_and_anchor("draws", posterior)
    loss = outputs["w"].square().sum() + fused.kl_divergence(posterior, 0.3, anchor)
    expected = torch.autograd.grad(loss, leaves(posterior), retain_graph=True)

    def gradient(factor):
        return torch.autograd.grad(loss, leaves(posterior), factor, retain_graph=True)

    found = vmap(gradient)(torch.tensor([1.0, 3.0]).double())
    torch.testing.assert_close(tuple(f[1] for f in found), tuple(3 * e for e in expected))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", get_args(fused.Kind))
def test_draws_that_are_not_used_get_no_gradient(posterior, kind, create_graph):
    outputs, _ = fused.outputs_and_anchor(kind, posterior)
    loss, inputs = outputs["b"].sum(), leaves(posterior)
    grads = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
    assert [g is None for g in grads] == [True, True, kind != "draws", False, True, True]


def test_sparse_gradients():
    posterior = {"w": tuple(torch.zeros(4, 2, requires_grad=True) for _ in range(2))}
    draw = fused.draws(posterior)["w"]
    nn.functional.embedding(torch.tensor([1, 1, 3]), draw, sparse=True).sum().backward()
    expected = torch.tensor([0.0, 2.0, 0.0, 1.0]).unsqueeze(1).expand(4, 2)
    torch.testing.assert_close(posterior["w"][0].grad, expected)
    torch.testing.assert_close(posterior["w"][1].grad, 0.5 * expected * draw.detach())


def test_parameters_of_two_types_keep_their_order():
    posterior = {
        "a": (torch.zeros(2), torch.zeros(2)),
        "b": (torch.zeros(2).double(), torch.zeros(2).double()),
        "c": (torch.zeros(2), torch.zeros(2)),
        "d": (torch.zeros(2).half(), torch.zeros(2).half()),
    }
    draws = fused.draws(posterior)
    assert list(draws) == ["a", "b", "c", "d"]
    assert [d.dtype for d in draws.values()] == [q[0].dtype for q in posterior.values()]
    assert fused.kl_divergence(posterior, 1.0).item() == 0


def test_divergence_keeps_the_type_of_the_parameters():
    half = {"a": (torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16())}
    assert fused.kl_divergence(half, 1.0).dtype == torch.bfloat16
    double = {"b": (torch.zeros(2).double(), torch.zeros(2).double())}
    for posterior in (half | double, double | half):
        assert fused.kl_divergence(posterior, 1.0).dtype == torch.float64


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_contexts_compute_what_all_parameters_need_in_one_node(local_trick):
    bnn, take = BayesianModel(nn.Linear(3, 1)), {True: variance_of, "flipout": change_of}
    torch.manual_seed(1)
    expected = bnn.sample_params()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with bnn.reparameterize(local_trick) as model:
        found = [take.get(local_trick, drawn)(p) for p in (model.weight, model.bias)]
        assert torch.equal(torch.get_rng_state(), state) == (local_trick is True)
        if local_trick is not True:
            torch.testing.assert_close(drawn(model.weight), expected["weight"])
    assert len({value.grad_fn for value in found}) == 1


def nodes(node):
    """The names of a node of the graph and of all that it depends on."""
    below = (nodes(n) for n, _ in node.next_functions if n is not None)
    return {type(node).__name__}.union(*below)


ORDERS = {
    "together": lambda nll, kl: (nll + kl).backward(),
    "likelihood first": lambda nll, kl: (nll.backward(), kl.backward()),
    "divergence first": lambda nll, kl: (kl.backward(), nll.backward()),
    "likelihood again": lambda nll, kl: (
        nll.backward(retain_graph=True),
        kl.backward(),
        nll.backward(),
    ),
    "twice": lambda nll, kl: ((nll + kl).backward(retain_graph=True), (nll + kl).backward()),
}


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_draws_and_a_divergence_of_the_same_posterior(posterior, order):
    def gradients(shared):
        torch.manual_seed(1)
        draws, anchor = fused.outputs_and_anchor("draws", posterior)
        kl = fused.kl_divergence(posterior, 0.3, anchor if shared else None)
        assert ("OutputsBackward" in nodes(kl.grad_fn)) == shared
        nll = draws["w"].square().sum() * draws["s"]  # "b" is not used
        for leaf in leaves(posterior):
            leaf.grad = None
        ORDERS[order](nll, kl)
        return [leaf.grad for leaf in leaves(posterior)]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_divergence_shares_no_node_with_draws_of_another_posterior(posterior):
    _, anchor = fused.outputs_and_anchor("draws", posterior)
    other = {name: (mean.detach(), logvar) for name, (mean, logvar) in posterior.items()}
    assert not anchor.is_of(other)
    with torch.no_grad():
        assert not fused.kl_divergence(posterior, 1.0, anchor).requires_grad
        posterior["b"][0].add_(1)
    assert not anchor.is_of(posterior)
    fused.kl_divergence(posterior, 0.5, anchor).backward()
    torch.testing.assert_close(posterior["b"][0].grad, 2 * posterior["b"][0].detach())


def test_divergences_from_two_priors_share_no_node(posterior):
    _, anchor = fused.outputs_and_anchor("draws", posterior)
    first, again, other = (fused.kl_divergence(posterior, v, anchor) for v in (0.3, 0.3, 2.0))
    assert ["OutputsBackward" in nodes(kl.grad_fn) for kl in (first, again, other)] == [1, 1, 0]
    expected = [gaussian.kl_divergence(*q, v) for q in posterior.values() for v in (0.3, 0.3, 2.0)]
    found = torch.autograd.grad(first + again + other, leaves(posterior))
    torch.testing.assert_close(found, torch.autograd.grad(sum(expected), leaves(posterior)))


@pytest.mark.parametrize("kind", get_args(fused.Kind))
def test_a_divergence_trains_what_draws_did_not(posterior, kind):
    logvars = [logvar.requires_grad_(False) for _, logvar in posterior.values()]
    _, frozen = fused.outputs_and_anchor(kind, posterior)
    for logvar in logvars:
        logvar.requires_grad_()
    with torch.no_grad():
        _, without = fused.outputs_and_anchor(kind, posterior)
    for anchor in (frozen, without):
        kl = fused.kl_divergence(posterior, 0.5, anchor)
        found = torch.autograd.grad(kl, leaves(posterior))
        expected = torch.autograd.grad(fused.kl_divergence(posterior, 0.5), leaves(posterior))
        torch.testing.assert_close(found, expected)


def test_gradients_after_a_change_in_place_are_refused(posterior):
    draws = fused.draws(posterior)
    with torch.no_grad():
        posterior["b"][0].add_(1)
    with pytest.raises(RuntimeError, match=r"Call backward\(\) before"):
        draws["w"].sum().backward()


def test_the_graph_keeps_draws_as_long_as_it_is_needed(posterior):
    draw = fused.draws(posterior)["w"]
    draw.sum().backward(retain_graph=True)
    assert draw.grad_fn.spreads is not None
    draw.sum().backward()
    assert draw.grad_fn.spreads is None


def test_a_model_forgets_its_draws():
    bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3)
    optimizer = torch.optim.SGD(bnn.parameters(), lr=0.1)
    with bnn.reparameterize() as model:
        model(x).square().sum().backward()
    copy.deepcopy(bnn), pickle.dumps(bnn)
    optimizer.step()
    optimizer.zero_grad()
    bnn.kl_divergence().backward()  # of the posterior as it is after the step
    torch.testing.assert_close(bnn.guide.means.weight.grad, bnn.base.weight.detach())
    with bnn.reparameterize() as model:
        model(x)
    nn.init.zeros_(bnn.base.weight)
    nn.init.zeros_(bnn.base.bias)
    a = torch.cat([p.detach().view(-1) for p in bnn.guide.logvars.parameters()]).double()
    expected = 0.5 * (a.expm1() - a).sum().item()
    assert bnn.kl_divergence().item() == pytest.approx(expected, rel=1e-6)
    with bnn.reparameterize() as model:
        model(x)
    bnn.half().float()  # other values, maybe in the same memory
    assert bnn._latest.take(bnn._swap.originals) is None


CHANGES = {
    "fused step": lambda bnn: torch.optim.Adam(bnn.parameters(), 0.1, fused=True).step(),
    "step on .data": lambda bnn: ClippedAdam(bnn.parameters(), 0.1).step(),
    "other .data": lambda bnn: vector_to_parameters(
        parameters_to_vector(bnn.parameters()) - 1, bnn.parameters()
    ),
    "to half and back": lambda bnn: bnn.half().float(),
}


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_divergence_after_changes_that_torch_does_not_count(local_trick, change):
    bnn, x = BayesianModel(nn.Linear(3, 1), init_logvar=-8.123), torch.randn(5, 3)
    with bnn.reparameterize(local_trick) as model:
        loss = model(x).square().sum()
    if "step" in change:
        loss.backward()
    counts = versions(bnn.parameters())
    CHANGES[change](bnn)
    assert versions(bnn.parameters()) == counts
    bnn.zero_grad()
    found = bnn.kl_divergence()
    expected = fused.kl_divergence(bnn.guide.posterior(), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(kl, bnn.parameters()) for kl in (found, expected))
    torch.testing.assert_close(found, expected)


def test_a_divergence_after_draws_goes_elsewhere():
    bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3)
    expected = bnn.kl_divergence().detach()
    with bnn.reparameterize() as model:
        model(x)
    found = grad(lambda factor: factor * bnn.kl_divergence())(torch.tensor(2.0))
    torch.testing.assert_close(found, expected)
    with bnn.reparameterize() as model:
        model(x)
    bnn.double().kl_divergence().backward()
    torch.testing.assert_close(bnn.guide.means.weight.grad, bnn.base.weight.detach())


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_inference_mode_all_along(local_trick):
    with torch.inference_mode():
        bnn, x = BayesianModel(nn.Linear(3, 1), init_logvar=-80.0), torch.randn(5, 3)
        with bnn.reparameterize(local_trick) as model:
            torch.testing.assert_close(model(x), bnn.base(x))
        assert bnn.kl_divergence() > 0


def test_parts_are_as_few_as_fit():
    sizes = [torch.empty(size) for size in (3, 4, 3, 4, 8, 1)]
    pairs = {flat.BLOCK: [6], 7: [2, 2, 1, 1], 1: [1] * 6}[flat.BLOCK]
    assert [part.stop - part.start for part in flat.parts(sizes)] == pairs
    elsewhere = [size.to("meta") for size in sizes]
    assert flat.parts(elsewhere) == (slice(0, 6),)
    assert flat.gather(sizes[:1]).data_ptr() == sizes[0].data_ptr()


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_transforms_go_through_the_whole_model(local_trick):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.bnn = BayesianModel(nn.Linear(3, 1).double())

        def forward(self, x):
            with self.bnn.reparameterize(local_trick) as model:
                loss = model(x).square().sum()
            return loss + self.bnn.kl_divergence()

    loss, x = Loss(), torch.randn(4, 3, dtype=torch.float64)
    parameters = {n: p for n, p in loss.named_parameters() if ".guide." in n}

    def value(parameters):
        torch.manual_seed(0)
        return functional_call(loss, parameters, (x,))

    found = grad(value)(parameters)
    expected = torch.autograd.grad(value(parameters), list(parameters.values()))
    if local_trick is not False:
        torch.testing.assert_close(tuple(found.values()), expected)
    assert all(f.isfinite().all() for f in found.values())
    many = {n: torch.stack([p.detach()] * 3) for n, p in parameters.items()}
    losses = vmap(lambda p: functional_call(loss, p, (x,)), randomness="different")(many)
    assert len(losses.unique()) == 3


def test_density_of_many_elements():
    prior, values = Prior(torch.Size([20]), 0.5, torch.zeros(())), torch.randn(3, 20)
    expected = torch.distributions.Normal(0, 0.5**0.5).log_prob(values).sum(-1)
    torch.testing.assert_close(prior.log_prob(values), expected)
    torch.testing.assert_close(vmap(prior.log_prob)(values), expected)
    torch.testing.assert_close(torch.stack(list(map(prior.log_prob, values))), expected)
