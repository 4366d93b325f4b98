"""The kernels for GPUs, on a GPU or, slowly, by Triton's interpreter on a CPU."""

import math
import os

import pytest
import torch

from pyro_bayes.posterior import gaussian, passes
from pyro_bayes.posterior.draws import draw
from pyro_bayes.posterior.fixed import hold
from pyro_bayes.posterior.layout import Flat, Layout
from pyro_bayes.posterior.sampling import WeightDraws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"
)
SHAPES = [(3, 5), (2000,), (0,), (1,), (40, 60), (), (1024,)]
LAYOUT = Layout({str(i): torch.empty(shape) for i, shape in enumerate(SHAPES)})
SIZE = LAYOUT.size


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from pyro_bayes.posterior import kernels

    return kernels


@pytest.fixture
def mean():
    torch.manual_seed(0)
    return torch.randn(SIZE, device=DEVICE)


@pytest.fixture
def logvar(mean):
    torch.manual_seed(1)
    return torch.randn_like(mean) - 3


def test_draws(kernels, mean, logvar):
    output, spread = kernels.sample("draws", mean, logvar)
    torch.testing.assert_close(output, mean + spread)
    epsilon = spread / (0.5 * logvar).exp()
    assert abs(epsilon.mean()) < 5 / SIZE**0.5
    assert abs(epsilon.var() - 1) < 5 * (2 / SIZE) ** 0.5
    assert abs((epsilon[1:] * epsilon[:-1]).mean()) < 5 / SIZE**0.5


def test_deviations_and_variances(kernels, mean, logvar):
    torch.manual_seed(2)
    expected, spread = kernels.sample("draws", mean, logvar)
    torch.manual_seed(2)
    deviations, same = kernels.sample("deviations", mean, logvar)
    assert same is deviations
    assert torch.equal(deviations, spread)
    assert not torch.equal(deviations, expected)
    variances, _ = kernels.sample("variances", mean, logvar)
    torch.testing.assert_close(variances, logvar.exp())


def test_draws_depend_on_the_seed_alone(kernels, mean, logvar):
    state = torch.get_rng_state()
    first, _ = kernels.sample("draws", mean, logvar)
    second, _ = kernels.sample("draws", mean, logvar)
    assert (first != second).all()
    if DEVICE == "cpu":
        torch.set_rng_state(state)
        again, _ = kernels.sample("draws", mean, logvar)
        assert torch.equal(first, again)


def test_rows(kernels):
    size = 1500
    mean, scale = torch.randn(size, device=DEVICE), torch.rand(size, device=DEVICE) + 0.1
    out = torch.full((5, size + 4), math.nan, device=DEVICE)
    kernels.rows(mean, scale, out, 2**62 + 7, 0)
    assert out[:, size:].isnan().all()
    epsilon = (out[:, :size] - mean) / scale
    assert abs(epsilon.mean()) < 5 / epsilon.numel() ** 0.5
    assert abs(epsilon.var() - 1) < 5 * (2 / epsilon.numel()) ** 0.5
    assert (epsilon[0] != epsilon[1]).all()
    later = torch.empty(2, size, device=DEVICE)
    kernels.rows(mean, scale, later, 2**62 + 7, 3)
    assert torch.equal(later, out[3:, :size])
    kernels.rows(mean, scale, later, 2**62 + 8, 3)
    assert (later != out[3:, :size]).all()


def test_no_number_is_drawn_twice(kernels, mean):
    zeros = torch.zeros_like(mean)
    epsilon, _ = kernels.sample("deviations", zeros, zeros)
    assert len(epsilon.unique()) > 0.99 * len(epsilon)
    rows = torch.empty(4, 1500, device=DEVICE)
    kernels.rows(torch.zeros(1500, device=DEVICE), torch.ones(1500, device=DEVICE), rows, 7, 0)
    assert len(rows.unique()) > 0.99 * rows.numel()


PRECISIONS = {"number": 2.5, "each": torch.linspace(0.5, 2.0, SIZE)}
FACTORS = {
    "none": None,
    "number": torch.tensor(0.7),
    "each": torch.linspace(0.5, 2.0, len(SHAPES)),
    "expanded": torch.tensor(0.7).expand(len(SHAPES)),
}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("with_outputs", [True, False], ids=["outputs", "alone"])
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("kind", ["draws", "deviations", "variances"])
def test_gradients(kernels, mean, logvar, kind, factor, with_outputs, precision):
    if factor is None and not with_outputs:
        pytest.skip("no such case")
    spread = torch.randn_like(mean)
    lines = [None if i == 1 else g for i, g in enumerate(LAYOUT.split(torch.randn_like(mean)))]
    outputs = lines if with_outputs else None
    means = LAYOUT.split(torch.randn_like(mean)) if with_outputs and kind != "draws" else None
    weight = 1.0 if kind == "variances" else 0.5

    def moved(value):
        return value.to("cpu", torch.double) if isinstance(value, torch.Tensor) else value

    exact_outputs = outputs and [moved(t) for t in outputs]
    expected = passes.gradients(
        LAYOUT,
        weight,
        *map(moved, (mean, logvar, spread)),
        exact_outputs if kind == "draws" else means and [moved(t) for t in means],
        exact_outputs,
        moved(factor),
        moved(precision),
    )
    output_lines = outputs and LAYOUT.lines(outputs)
    mean_lines = output_lines if kind == "draws" else means and LAYOUT.lines(means)
    actual = kernels.gradients(
        LAYOUT,
        mean,
        logvar,
        spread if with_outputs else None,
        mean_lines,
        output_lines,
        None if factor is None else factor.to(DEVICE),
        precision.to(DEVICE) if isinstance(precision, torch.Tensor) else precision,
        weight,
    )
    for own, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(own.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_divergences(kernels, mean, logvar, precision):
    precision = precision.to(DEVICE) if isinstance(precision, torch.Tensor) else precision
    terms = kernels.divergence_terms(mean, logvar, precision)
    exact = precision.double() if isinstance(precision, torch.Tensor) else precision
    expected = gaussian.divergence_terms(mean.double(), logvar.double(), exact)
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.01, -0.01, 0.3, -0.49, 0.49, -0.51, 0.51, 3.0, -20.0])
def test_divergences_keep_their_digits_near_the_prior(kernels, offset):
    logvar = torch.full((3000,), offset, device=DEVICE)
    terms = kernels.divergence_terms(torch.zeros_like(logvar), logvar, 1.0)
    exact = logvar.cpu().double()
    expected = 0.5 * (torch.expm1(exact) - exact)
    torch.testing.assert_close(terms.cpu().double(), expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("kind", ["draws", "deviations", "variances"])
@pytest.mark.parametrize("shapes", [[(7,)], [(3, 5)], [(), (4,)], [(0,), (1500,)]], ids=str)
@pytest.mark.parametrize("number", [None, "divergence", "divergences"])
def test_draws_of_any_layout_have_the_gradients_of_the_formulas(
    kernels, kind, shapes, number, monkeypatch
):
    monkeypatch.setattr("pyro_bayes.posterior.passes.kernels", lambda *_: kernels)
    torch.manual_seed(0)
    layout = Layout({str(i): torch.empty(shape) for i, shape in enumerate(shapes)})
    mean = torch.randn(layout.size, device=DEVICE, requires_grad=True)
    logvar = torch.randn_like(mean, requires_grad=True)
    drawn = draw(Flat(layout, mean, logvar), kind, number, 2.0)
    flat = layout.flatten(drawn.outputs)
    center = mean if kind == "draws" else torch.zeros_like(mean)
    epsilon = ((flat - center) / (0.5 * logvar).exp()).detach()
    same = logvar.exp() if kind == "variances" else gaussian.draw(center, logvar, epsilon)
    loss, exact = flat.cos().sum(), same.cos().sum()
    if number:
        terms = gaussian.divergence_terms(mean, logvar, 2.0)
        numbers = terms.sum() if number == "divergence" else layout.sums(terms)
        torch.testing.assert_close(drawn.number, numbers)
        loss, exact = loss + drawn.number.square().sum(), exact + numbers.square().sum()
    for own, other in zip(
        torch.autograd.grad(loss, (mean, logvar)),
        torch.autograd.grad(exact, (mean, logvar), allow_unused=True),
        strict=True,
    ):
        other = torch.zeros_like(own) if other is None else other
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_predictions(kernels, monkeypatch):
    monkeypatch.setattr("pyro_bayes.posterior.sampling.kernels", lambda *_: kernels)
    layout, mean = Layout({"w": torch.empty(10)}), torch.arange(10.0, device=DEVICE)
    draws = WeightDraws([Flat(layout, mean, torch.full_like(mean, -60.0))], 3, 0, again=False)
    torch.testing.assert_close(draws.rows(0, 3)[0], mean.expand(3, 10))


@pytest.mark.parametrize("number", ["divergence", "divergences", "log_densities"])
def test_fixed_elements(kernels, monkeypatch, number):
    layout, fixed = Layout({"a": torch.empty(3, 2), "b": torch.empty(4)}), torch.arange(6) < 2
    layout.fix({"a": fixed.view(3, 2)}, torch.device(DEVICE))
    leaves = [torch.randn(10, device=DEVICE, requires_grad=True) for _ in range(2)]

    def numbers():
        torch.manual_seed(0)
        held = hold(Flat(layout, *leaves))
        drawn = draw(held, "draws", number, 2.0)
        value = drawn.number.double().square().sum()
        if number == "log_densities":  # others draw other numbers
            deviation = (layout.flatten(drawn.outputs) - held.mean).detach()
            terms = gaussian.log_densities(deviation, 0 * deviation, leaves[1])
            exact = layout.sums(layout.without_fixed(terms)).double().square().sum()
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)
            return drawn.outputs[0][0].detach(), torch.zeros(())
        return drawn.outputs[0][0].detach(), torch.cat(torch.autograd.grad(value, leaves))

    expected = numbers()
    monkeypatch.setattr("pyro_bayes.posterior.passes.kernels", lambda *_: kernels)
    for own, other in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
