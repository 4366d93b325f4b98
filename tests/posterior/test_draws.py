"""Draws and divergences in one pass, against the formulas and torch.distributions."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, jacrev, jvp, vmap

from pyro_bayes.posterior import draws, gaussian, layout
from pyro_bayes.posterior.draws import Flat
from pyro_bayes.posterior.layout import Layout
from pyro_bayes.priors.empirical import Empirical
from pyro_bayes.priors.parameter import NormalPrior
from pyro_bayes.priors.priors import Priors

PARAMETERS = {
    "w": torch.empty(4, 3),
    "none": torch.empty(0, 2),
    "b": torch.empty(5),
    "last": torch.empty(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "s": torch.empty(()),
    "t": torch.empty(2, 3).T,
}
NAMES, COUNT = list(PARAMETERS), len(PARAMETERS)
KINDS = get_args(draws.Kind)
NUMBERS = {
    "nothing": None,
    "divergence": "divergence",
    "divergences": "divergences",
    "log-densities": "log_densities",
}
ASKED = {
    f"{kind} with {name}": (kind, number)
    for kind in KINDS
    for name, number in NUMBERS.items()
    if number != "log_densities" or kind == "draws"
}
RULES = dict.fromkeys(PARAMETERS, Empirical(least=0.0)) | {
    "none": 2.0,
    "b": 0.5,
    "w": Empirical(each=1, least=0.0),
}
PRECISIONS = {
    "number": lambda flat: 2.5,
    "each": lambda flat: torch.linspace(0.5, 4.0, flat.layout.size).to(flat.mean),
    "empirical": lambda flat: Priors(
        {n: NormalPrior(n, PARAMETERS[n].shape, rule) for n, rule in RULES.items()}
    ).flat(flat)[0],
}

CHANGED = "modified (by an )?inplace"


@pytest.fixture(params=[layout.CHUNK, 7], ids="chunks of {}".format)
def chunked(request, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", request.param)


def make(dtype=torch.double, *, parameters=PARAMETERS):
    own = Layout(parameters)
    mean, logvar = (torch.randn(own.size, dtype=dtype).requires_grad_() for _ in range(2))
    return Flat(own, mean, logvar)


def numbers_by_formula(posterior, number, outputs, precision):
    """Closed forms of torch.distributions, of the outputs if these are draws."""
    own, mean, logvar = posterior
    present = precision(mean, logvar) if callable(precision) else precision
    present = torch.as_tensor(present, dtype=mean.dtype)
    q, prior = Normal(mean, (0.5 * logvar).exp()), Normal(mean.new_zeros(()), present**-0.5)
    if number == "log_densities":
        return own.sums(q.log_prob(own.flatten(outputs)))
    terms = kl_divergence(q, prior)
    return terms.sum() if number == "divergence" else own.sums(terms)


def by_formula(posterior, kind, number, precision, outputs):
    """What a pass returned, computed again as a function of the posterior."""
    own, mean, logvar = posterior
    center = mean if kind == "draws" else torch.zeros_like(mean)
    epsilon = ((own.flatten(outputs) - center) * (-0.5 * logvar).exp()).detach()
    same = logvar.exp() if kind == "variances" else gaussian.draw(center, logvar, epsilon)
    means, same = [] if kind == "draws" else own.split(mean), own.split(same)
    value = numbers_by_formula(posterior, number, same, precision) if number else None
    return means, same, value


def loss_of(means, outputs, number, used=NAMES):
    """A different weight for each tensor, so that none can be taken for another."""
    outputs = [output for name, output in zip(NAMES, outputs, strict=True) if name in used]
    numbers = [] if number is None else [number]
    terms = [*means, *outputs, *numbers]
    return sum((i + 1.5) * (term.sin() + term.square()).sum() for i, term in enumerate(terms))


def derivatives(loss, leaves):
    """The gradients by both ways to compute them, and second derivatives."""
    options = {"retain_graph": True, "materialize_grads": True}
    first = grad(loss, leaves, **options)
    with_graph = grad(loss, leaves, create_graph=True, materialize_grads=True)
    total = sum((i + 1) * g.square().sum() for i, g in enumerate(with_graph))
    return first, with_graph, grad(total, leaves, **options)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_values_and_derivatives_are_those_of_the_formulas(chunked, kind, number, precision):
    posterior = make()
    precision = precision(posterior)
    drawn = draws.draw(posterior, kind, number, precision)
    means, outputs, value = by_formula(posterior, kind, number, precision, drawn.outputs)
    assert len({output.grad_fn for output in drawn.outputs}) == 1
    for name, output in zip(NAMES, drawn.outputs, strict=True):
        assert output.shape == PARAMETERS[name].shape
        assert output.stride() == torch.empty_like(PARAMETERS[name]).stride()
    torch.testing.assert_close(drawn.means, means, rtol=0, atol=0)
    torch.testing.assert_close(drawn.outputs, outputs)
    assert (drawn.number is None) == (number is None)
    torch.testing.assert_close(drawn.number, value)
    own, expected = (
        derivatives(loss_of(*all_of), posterior[1:]) for all_of in (drawn, (means, outputs, value))
    )
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("number", ["divergence", "divergences"])
def test_divergences_are_those_of_the_formulas(chunked, number, precision):
    posterior = make()
    precision = precision(posterior)
    own = draws.divergence(posterior, precision, number)
    expected = numbers_by_formula(posterior, number, None, precision)
    torch.testing.assert_close(own, expected)
    own, expected = (derivatives(n.square().sum(), posterior[1:]) for n in (own, expected))
    torch.testing.assert_close(own, expected)


def of_seed(kind, number, precision, own, mean, logvar):
    torch.manual_seed(1)
    means, outputs, value = draws.draw(Flat(own, mean, logvar), kind, number, precision)
    return *means, *outputs, *([] if value is None else [value])


@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_derivatives_are_those_of_differences(kind, number):
    posterior = make()
    names = PRECISIONS if number in ("divergence", "divergences") else ["number"]
    for name in names:
        precision = PRECISIONS[name](posterior)
        function = partial(of_seed, kind, number, precision, posterior.layout)
        assert gradcheck(function, posterior[1:], fast_mode=True)
        assert gradgradcheck(function, posterior[1:], fast_mode=True)


@pytest.mark.parametrize("number", ["divergence", "divergences", "log_densities"])
def test_numbers_are_the_same_in_chunks_of_any_size(number, monkeypatch):
    posterior, values = make(), []
    for size in (layout.CHUNK, 7, 1):
        monkeypatch.setattr(layout, "CHUNK", size)
        own = Flat(Layout(PARAMETERS), *posterior[1:])
        if number == "log_densities":
            drawn = draws.draw(own, number=number)
            expected = numbers_by_formula(own, number, drawn.outputs, 1.0)
            torch.testing.assert_close(drawn.number, expected)
        else:
            values += [draws.divergence(own, 0.3, number), draws.draw(own, "draws", number, 0.3)[2]]
    torch.testing.assert_close(values, values[:1] * len(values), rtol=1e-12, atol=0)


def test_noise_is_that_of_the_seed_and_none_is_used_twice(chunked):
    posterior = make()
    torch.manual_seed(1)
    drawn = draws.draw(posterior).outputs
    again = of_seed("draws", None, 1.0, *posterior)
    torch.testing.assert_close(tuple(drawn), again, rtol=0, atol=0)
    epsilon = (posterior.layout.flatten(drawn) - posterior.mean) * (-0.5 * posterior.logvar).exp()
    assert len(epsilon.detach().unique()) == posterior.layout.size
    torch.manual_seed(1)
    noise = torch.randn(posterior.layout.size, dtype=torch.double)
    if layout.CHUNK > 100:
        torch.testing.assert_close(epsilon, noise)


@pytest.mark.parametrize("kind", ["draws", "deviations"])
def test_noise_is_standard_normal(kind, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", 1000)
    own = Layout({"a": torch.empty(5500), "b": torch.empty(4500)})
    mean, logvar = torch.full((10_000,), 3.0), torch.linspace(-9, 2, 10_000)
    output = own.flatten(draws.draw(Flat(own, mean, logvar), kind).outputs)
    epsilon = (output - (mean if kind == "draws" else 0)) * (-0.5 * logvar).exp()
    assert epsilon.mean().abs() < 0.04  # 4 standard errors
    assert (epsilon.var() - 1).abs() < 4 * (2 / 10_000) ** 0.5
    assert (epsilon[1:] * epsilon[:-1]).mean().abs() < 0.04


@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_values_are_the_same_without_a_graph(chunked, kind, number):
    posterior = make()
    expected = of_seed(kind, number, 2.0, *posterior)
    for frozen in (Flat(posterior.layout, *(p.detach() for p in posterior[1:])), posterior):
        with torch.no_grad():
            own = of_seed(kind, number, 2.0, *frozen)
        torch.testing.assert_close(own, expected, rtol=0, atol=0)
        assert not any(tensor.requires_grad for tensor in own[0 if kind == "draws" else COUNT :])


def test_kinds_of_one_seed_are_of_one_draw():
    posterior = make()
    drawn, deviations, variances = (of_seed(kind, None, 1.0, *posterior) for kind in KINDS)
    means = deviations[:COUNT]
    torch.testing.assert_close(drawn, tuple(map(torch.add, means, deviations[COUNT:])))
    expected = posterior.layout.split(posterior.logvar.exp())
    torch.testing.assert_close(variances[COUNT:], tuple(expected))


@pytest.mark.parametrize("trains", [(True, False), (False, True)], ids=["means", "log-variances"])
@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_what_is_frozen_gets_no_gradient(kind, number, trains):
    posterior = make()
    for parameter, wanted in zip(posterior[1:], trains, strict=True):
        parameter.requires_grad_(wanted)
    own = draws.draw(posterior, kind, number, 2.0)
    expected = by_formula(posterior, kind, number, 2.0, own.outputs)
    leaf = posterior[1:][trains.index(True)]
    pair = (grad(loss_of(*all_of), leaf, materialize_grads=True) for all_of in (own, expected))
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("used", [["b"], ["w", "t"], ["none"], []], ids=str)
@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_draws_that_are_not_used(chunked, kind, number, used):
    if not used and number is None:
        pytest.skip("no such case")
    posterior = make()
    own = draws.draw(posterior, kind, number, 2.0)
    _, outputs, value = by_formula(posterior, kind, number, 2.0, own.outputs)
    values = (own.outputs, own.number), (outputs, value)
    own, expected = (derivatives(loss_of([], *v, used), posterior[1:]) for v in values)
    torch.testing.assert_close(own, expected)


def test_draws_may_be_changed_in_place(chunked):
    posterior = make()
    outputs = dict(zip(NAMES, draws.draw(posterior, number="divergence").outputs, strict=True))
    before = outputs["b"].detach().clone()
    loss = outputs["b"].square().sum()  # which keeps "b" for its gradient
    outputs["w"].mul_(2)
    assert torch.equal(outputs["b"], before)
    of_mean, _ = grad(loss + outputs["w"].sum(), posterior[1:])
    expected = [torch.zeros_like(p, dtype=torch.double) for p in PARAMETERS.values()]
    expected[0].fill_(2.0)
    expected[2] = 2 * before
    torch.testing.assert_close(of_mean, posterior.layout.flatten(expected))


def test_log_densities_of_draws_that_are_changed_are_refused():
    drawn = draws.draw(make(), number="log_densities")
    drawn.outputs[0].mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        drawn.number.sum().backward()


@pytest.mark.parametrize("which", [1, 2], ids=["means", "log-variances"])
@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_changes_of_the_posterior_before_the_gradient_are_refused(kind, number, which):
    posterior = make()
    loss = loss_of(*draws.draw(posterior, kind, number))
    alone = draws.divergence(posterior)
    with torch.no_grad():
        posterior[which][3:4].add_(1)  # as optimisers do to one parameter
    for value in (loss, alone):
        with pytest.raises(RuntimeError, match=CHANGED):
            value.backward()


def test_means_beside_deviations_notice_changes_of_the_posterior():
    posterior = make()
    loss = draws.draw(posterior, "deviations").means[0].square().sum()
    with torch.no_grad():
        posterior.mean.add_(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients(kind):
    own = Layout({"bias": torch.empty(3), "table": torch.empty(4, 2)})
    posterior = Flat(own, *(torch.randn(11, requires_grad=True) for _ in range(2)))
    _, outputs, _ = draws.draw(posterior, kind)
    picked = nn.functional.embedding(torch.tensor([1, 1, 3]), outputs[1], sparse=True)
    by_mean, by_logvar = grad(picked.sum(), posterior[1:])
    table = torch.tensor([0.0, 2.0, 0.0, 1.0]).unsqueeze(1).expand(4, 2)
    rows = own.flatten([torch.zeros(3), table])
    spread = own.flatten(outputs).detach() - (posterior.mean.detach() if kind == "draws" else 0)
    torch.testing.assert_close(by_mean, rows if kind == "draws" else torch.zeros(11))
    factor = 1.0 if kind == "variances" else 0.5
    torch.testing.assert_close(by_logvar, factor * rows * spread)


def test_log_densities_are_functions_of_the_draws(chunked):
    posterior = make()
    own, mean, logvar = posterior
    _, outputs, log_densities = draws.draw(posterior, number="log_densities")
    factors = torch.arange(1.0, COUNT + 1, dtype=torch.double)
    loss, leaves = (factors * log_densities).sum(), (mean, logvar)
    inputs = (*leaves, *outputs)
    partial_ = grad(loss, outputs, retain_graph=True)
    with_graph = grad(loss, inputs, create_graph=True)
    scaled = own.spread(factors) * (own.flatten(outputs) - mean) * (-logvar).exp()
    torch.testing.assert_close(own.flatten(partial_), -scaled)
    torch.testing.assert_close(own.flatten(with_graph[2:]), -scaled)
    # In all, ∂/∂μ is 0 and ∂/∂log σ² is -1/2: the noise stays the same.
    total = grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(total[0], torch.zeros_like(mean))
    torch.testing.assert_close(total[1], -0.5 * own.spread(factors))
    torch.testing.assert_close(with_graph[:2], total)


SHIFTS = [-12.0, -4.6, -4.1, -3.9, -2.7, -0.6, -1e-3, 0.0, 1e-3, 2.0]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("number", ["divergence", "divergences"])
def test_single_precision_keeps_its_digits(kind, number, shift, monkeypatch):
    """Far from the prior, where most of a sum is at hand, and near it, where terms cancel."""
    monkeypatch.setattr(layout, "CHUNK", 10_000)
    own = Layout({"a": torch.empty(16_000), "b": torch.empty(4)})
    for noise in (0.0, 1e-3):  # without noise, rounding errors all add up
        logvar = torch.tensor(0.1).log() + shift + noise * torch.randn(own.size)
        posterior = Flat(own, 0.1 * noise * torch.randn(own.size), logvar)
        exact = Flat(own, *(p.double() for p in posterior[1:]))
        if kind is None:
            value = draws.divergence(posterior, 10.0, number)
        else:
            value = draws.draw(posterior, kind, number, 10.0).number
        terms = gaussian.divergence_terms(*exact[1:], 10.0)
        expected = terms.sum() if number == "divergence" else own.sums(terms)
        close = {"rtol": 3e-6 if abs(shift) > 0.1 else 2e-3, "atol": 1e-9}
        torch.testing.assert_close(value.double(), expected, **close)


def test_variances_of_very_different_sizes(monkeypatch):
    for sizes in (layout.CHUNK, 1000):
        monkeypatch.setattr(layout, "CHUNK", sizes)
        own = Layout({"w": torch.empty(20_000)})
        logvar = torch.tensor([0.0, -14.0]).repeat(10_000)
        posterior = Flat(own, torch.zeros(20_000), logvar)
        expected = gaussian.divergence_terms(*(p.double() for p in posterior[1:]), 10.0).sum()
        for value in (draws.divergence(posterior, 10.0), draws.draw(posterior, "draws",
                      "divergence", 10.0).number):  # fmt: skip
            assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_not_a_number_stays_one():
    posterior = Flat(
        Layout({"w": torch.empty(3)}), torch.zeros(3), torch.tensor([-9, torch.nan, 0])
    )
    assert draws.divergence(posterior).isnan()
    assert draws.draw(posterior, number="divergence").number.isnan()


EMPTY = {"empty": (0,), "empty beside others": (0, 9, 0), "0-dim": None}


@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_empty_and_0_dim_parameters_alone(chunked, sizes, kind, number):
    shapes = [()] if sizes is None else [(size,) for size in sizes]
    posterior = make(parameters={str(i): torch.empty(shape) for i, shape in enumerate(shapes)})
    drawn = draws.draw(posterior, kind, number, 2.0)
    assert [output.shape for output in drawn.outputs] == shapes
    _, outputs, value = by_formula(posterior, kind, number, 2.0, drawn.outputs)
    torch.testing.assert_close(drawn.number, value)
    torch.testing.assert_close(drawn.outputs, outputs)
    loss = sum(output.sum() for output in drawn.outputs)
    for own in grad(loss, posterior[1:], materialize_grads=True):
        assert own.shape == (posterior.layout.size,)


# Transforms


def value_of(kind, number, own, mean, logvar):
    """A number that depends on all that is asked for, of one seed."""
    torch.manual_seed(1)
    return loss_of(*draws.draw(Flat(own, mean, logvar), kind, number, 2.0))


@pytest.mark.filterwarnings("ignore:`torch.jit.script. is deprecated")  # torch, for `jvp`
@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_transforms(kind, number):
    posterior = make()
    function = partial(value_of, kind, number, posterior.layout)
    leaves = tuple(p.detach() for p in posterior[1:])
    value, expected = function(*posterior[1:]), []
    expected = grad(value, posterior[1:], materialize_grads=True)
    torch.testing.assert_close(torch.func.grad(function, (0, 1))(*leaves), expected)
    torch.testing.assert_close(jacrev(function, (0, 1))(*leaves), expected)
    tangents = tuple(torch.randn_like(p) for p in leaves)
    slope = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(jvp(function, leaves, tangents), (value.detach(), slope))
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, leaves, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_many_posteriors_at_once(kind, number):
    own, means, logvars = Layout(PARAMETERS), *torch.randn(2, 3, make().layout.size)

    def function(mean, logvar):
        means, outputs, value = draws.draw(Flat(own, mean, logvar), kind, number, 2.0)
        return outputs, means, [] if value is None else [value]

    tensors, _, values = vmap(function, randomness="different")(means, logvars)
    assert kind == "variances" or len(tensors[-2].unique()) == 3
    for i in range(3):
        outputs = [tensor[i] for tensor in tensors]
        _, same, value = by_formula(Flat(own, means[i], logvars[i]), kind, number, 2.0, outputs)
        torch.testing.assert_close(outputs, same)
        torch.testing.assert_close(values[0][i] if values else None, value)


WAYS = {
    "vmap": lambda function, factors: vmap(function)(factors),
    "batched": lambda function, factors: function(factors, is_grads_batched=True),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_many_gradients_at_once(kind, number, way):
    posterior = make()
    loss = loss_of(*draws.draw(posterior, kind, number, 2.0))
    function = partial(grad, loss + draws.divergence(posterior, 2.0), posterior[1:])
    expected = function(retain_graph=True)
    many = way(partial(function, retain_graph=True), torch.tensor([1.0, 3.0]).double())
    for own, one in zip(many, expected, strict=True):
        torch.testing.assert_close(own, torch.stack([one, 3 * one]))


class Loss(nn.Module):
    """A module whose parameters are a posterior."""

    def __init__(self):
        super().__init__()
        posterior = make()
        self.layout = posterior.layout
        self.mean, self.logvar = (nn.Parameter(p.detach()) for p in posterior[1:])

    def forward(self):
        return value_of("draws", "divergence", self.layout, self.mean, self.logvar)


def test_functional_calls():
    loss = Loss()
    own = torch.func.grad(lambda values: functional_call(loss, values, ()))(
        {name: p.detach() for name, p in loss.named_parameters()}
    )
    loss().backward()
    torch.testing.assert_close(own, {name: p.grad for name, p in loss.named_parameters()})


@pytest.mark.parametrize(("kind", "number"), ASKED.values(), ids=ASKED)
def test_a_compiler_takes_the_formulas(kind, number):
    posterior = make()

    def function(mean, logvar):
        drawn = draws.draw(Flat(posterior.layout, mean, logvar), kind, number, 2.0)
        return drawn, draws.divergence(Flat(posterior.layout, mean, logvar), 2.0)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    own, divergence = compiled(*posterior[1:])
    expected = by_formula(posterior, kind, number, 2.0, own.outputs)
    same = numbers_by_formula(posterior, "divergence", None, 2.0)
    torch.testing.assert_close(own.number, expected[2])
    gradients = (
        grad(loss_of(*all_of) + kl, posterior[1:])
        for all_of, kl in ((own, divergence), (expected, same))
    )
    torch.testing.assert_close(*gradients)
