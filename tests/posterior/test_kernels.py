"""The kernels for GPUs, on a GPU or, slowly, by Triton's interpreter on a CPU."""

import math
import os

import pytest
import torch
from pyro_bayes.posterior.slopes import slopes

from pyro_bayes.posterior import fused, gaussian
from pyro_bayes.posterior.draws import WeightDraws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"
)
SHAPES = [(3, 5), (2000,), (0,), (1,), (40, 60), (), (1024,)]
FACTORS = {
    "none": None,
    "numbers": (torch.tensor(0.7), torch.tensor(-0.2)),
    "each": (torch.linspace(0.5, 2.0, 7), torch.linspace(-1.0, 1.0, 7)),
    "expanded": (torch.tensor(0.7).expand(7), torch.linspace(-1.0, 1.0, 7)),
}


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from pyro_bayes.posterior import kernels

    return kernels


@pytest.fixture
def means():
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE) for shape in SHAPES]


@pytest.fixture
def logvars(means):
    torch.manual_seed(1)
    return [torch.randn_like(mean) - 3 for mean in means]


def side_by_side(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def sums(flat, like):
    return torch.stack([part.sum() for part in flat.split([t.numel() for t in like])])


def test_draws(kernels, means, logvars):
    mean, logvar = side_by_side(means), side_by_side(logvars)
    output, spread, scores = kernels.draw("draws", means, logvars, apart=True, scored=True)
    torch.testing.assert_close(output, mean + spread)
    epsilon = spread / (0.5 * logvar).exp()
    count = len(epsilon)
    assert abs(epsilon.mean()) < 5 / count**0.5
    assert abs(epsilon.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((epsilon[1:] * epsilon[:-1]).mean()) < 5 / count**0.5
    torch.testing.assert_close(
        scores[0], sums(logvar + math.log(2 * math.pi) + epsilon**2, means), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(scores[1], sums(output**2, means), rtol=1e-4, atol=1e-4)


def test_deviations_and_variances(kernels, means, logvars):
    torch.manual_seed(2)
    expected, spread, none = kernels.draw("draws", means, logvars, apart=True, scored=False)
    torch.manual_seed(2)
    found, same, _ = kernels.draw("deviations", means, logvars, apart=False, scored=False)
    assert none is None
    assert same is found
    assert torch.equal(found, spread)
    assert not torch.equal(found, expected)
    found, _, _ = kernels.draw("variances", means, logvars, apart=False, scored=False)
    torch.testing.assert_close(found, side_by_side(logvars).exp())


def test_draws_depend_on_the_seed_alone(kernels, means, logvars):
    state = torch.get_rng_state()
    first, _, _ = kernels.draw("draws", means, logvars, apart=False, scored=False)
    second, _, _ = kernels.draw("draws", means, logvars, apart=False, scored=False)
    assert (first != second).all()
    if DEVICE == "cpu":
        torch.set_rng_state(state)
        again, _, _ = kernels.draw("draws", means, logvars, apart=False, scored=False)
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


def test_no_number_is_drawn_twice(kernels, means):
    zeros = [torch.zeros_like(mean) for mean in means]
    epsilon, _, _ = kernels.draw("deviations", zeros, zeros, apart=False, scored=False)
    assert len(epsilon.unique()) > 0.99 * len(epsilon)
    rows = torch.empty(4, 1500, device=DEVICE)
    kernels.rows(torch.zeros(1500, device=DEVICE), torch.ones(1500, device=DEVICE), rows, 7, 0)
    assert len(rows.unique()) > 0.99 * rows.numel()


@pytest.mark.parametrize("squares", [False, True], ids=["", "squares"])
@pytest.mark.parametrize("given", [True, False], ids=["outputs", "alone"])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("kind", ["draws", "deviations", "variances"])
def test_slopes(kernels, means, logvars, kind, factor, given, squares):
    if (squares and (kind != "draws" or factor == "none")) or (factor == "none" and not given):
        pytest.skip("no such case")
    spread = torch.randn_like(side_by_side(means))
    grads = [torch.randn_like(mean) for mean in means]
    pair = FACTORS[factor] and tuple(f.to(DEVICE) for f in FACTORS[factor])
    cpu = [tensor.cpu().double() for tensor in (*means, *logvars)]
    spreads = [spread.cpu().double()] if given or squares else []
    expected = slopes(
        cpu,
        [slice(0, len(means))],
        [FACTORS[factor] and tuple(f.double() for f in FACTORS[factor])],
        kind,
        [g.cpu().double() if given else None for g in grads],
        spreads,
        of_squares=squares,
    )
    found = kernels.slopes(
        means,
        logvars,
        pair,
        side_by_side(grads) if given else None,
        spread if spreads else None,
        1.0 if kind == "variances" else 0.5,
        kind == "draws",
        squares,
    )
    for i, flat in enumerate(found):
        if i == 0 and kind != "draws" and factor == "none":
            continue  # variances and deviations do not depend on the mean
        wanted = side_by_side(expected[i * len(means) : (i + 1) * len(means)])
        torch.testing.assert_close(flat.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_divergences(kernels, means, logvars):
    found = kernels.divergences(means, logvars, 0.3)
    expected = [
        gaussian.kl_divergence(m.double(), v.double(), 0.3)
        for m, v in zip(means, logvars, strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.01, -0.01, 0.3, -0.49, 0.49, -0.51, 0.51, 3.0, -20.0])
def test_divergences_keep_their_digits_near_the_prior(kernels, offset):
    logvar = torch.full((3000,), offset, device=DEVICE)
    found = kernels.divergences([torch.zeros_like(logvar)], [logvar], 1.0)
    exact = logvar.cpu().double()
    expected = 0.5 * (torch.expm1(exact) - exact).sum()
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-6, abs_tol=1e-12)


def test_long_parameters_are_summed_whole(kernels):
    size = kernels.BLOCK * (kernels.BLOCK + 1) + 1
    mean, logvar = torch.ones(size, device=DEVICE), torch.zeros(size, device=DEVICE)
    found = kernels.divergences([mean, mean[:5]], [logvar, logvar[:5]], 1.0)
    torch.testing.assert_close(found.cpu(), torch.tensor([0.5 * size, 2.5]))


@pytest.mark.parametrize("kind", ["draws", "deviations", "variances"])
@pytest.mark.parametrize("shapes", [[(7,)], [(3, 5)], [(), (4,)], [(0,), (1500,)]], ids=str)
def test_gradients_of_any_layout_are_those_of_the_formulas(kernels, kind, shapes, monkeypatch):
    for module in ("slopes", "sweep"):
        monkeypatch.setattr(f"pyro_bayes.posterior.{module}.kernels", lambda *_: kernels)
    torch.manual_seed(0)
    means = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    logvars = [torch.randn_like(mean, requires_grad=True) for mean in means]
    posterior = {str(i): pair for i, pair in enumerate(zip(means, logvars, strict=True))}
    found, _ = fused.outputs_and_anchor(kind, posterior)
    for name, (mean, logvar) in posterior.items():
        center = mean if kind == "draws" else torch.zeros_like(mean)
        epsilon = ((found[name] - center) / (0.5 * logvar).exp()).detach()
        same = logvar.exp() if kind == "variances" else gaussian.draw(center, logvar, epsilon)
        for of in (torch.sum, lambda value: value.cos().sum()):
            grads, expected = (
                torch.autograd.grad(of(value), (mean, logvar), retain_graph=True, allow_unused=True)
                for value in (found[name], same)
            )
            for one, other in zip(grads, expected, strict=True):
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_predictions_of_a_parameter_that_is_not_contiguous(kernels, monkeypatch):
    monkeypatch.setattr("pyro_bayes.posterior.draws.kernels", lambda *_: kernels)
    mean = torch.arange(20.0, device=DEVICE)[::2]
    posterior = {"w": (mean, torch.full_like(mean, -60.0))}
    (rows,) = WeightDraws(posterior, total=3, seed=0, again=False).rows(0, 3)
    torch.testing.assert_close(rows, mean.expand(3, 10))
