"""The formulas of Gaussian elements, against closed forms and torch.distributions."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyro_bayes import BayesianModel
from pyro_bayes.posterior import gaussian


def reference_kl(mean, logvar, prior_var):
    mean, logvar = mean.double(), logvar.double()
    prior = Normal(torch.zeros_like(mean), torch.as_tensor(prior_var).double() ** 0.5)
    return kl_divergence(Normal(mean, (0.5 * logvar).exp()), prior)


VARIANCES = {"narrow": 1e-3, "one": 1.0, "wide": 7.0, "each": torch.linspace(0.1, 9.0, 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logvar", [-30.0, -9.0, -1.0, 0.0, 0.3, 10.0])
@pytest.mark.parametrize("prior_var", VARIANCES.values(), ids=VARIANCES)
def test_divergences_equal_those_of_torch_distributions(dtype, logvar, prior_var):
    mean = torch.randn(7, 5, dtype=dtype)
    logvar = torch.full_like(mean, logvar) + 0.1 * torch.randn_like(mean)
    terms = gaussian.divergence_terms(mean, logvar, 1 / prior_var)
    assert terms.dtype == dtype
    assert terms.shape == (7, 5)
    reference = reference_kl(mean, logvar, prior_var)
    torch.testing.assert_close(terms.double(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.double().sum(), reference.sum(), rtol=1e-6, atol=0)


def test_divergences_near_the_prior_keep_their_digits():
    (term,) = gaussian.divergence_terms(torch.zeros(1), torch.tensor([1e-3]), 1.0)
    # a = log σ²: ½(eᵃ - 1 - a) = a²/4 + a³/12 + …
    assert term.item() == pytest.approx(1e-6 / 4 + 1e-9 / 12, rel=1e-3)


@pytest.mark.parametrize("prior_var", [0.3, 1.0])
def test_gradients_of_divergences(prior_var):
    mean, logvar = (torch.randn(4, dtype=torch.double, requires_grad=True) for _ in range(2))

    def terms(mean, logvar):
        return gaussian.divergence_terms(mean, logvar, 1 / prior_var)

    torch.autograd.gradcheck(terms, (mean, logvar))
    terms(mean, logvar).sum().backward()
    torch.testing.assert_close(mean.grad, mean.detach() / prior_var)
    torch.testing.assert_close(logvar.grad, 0.5 * (logvar.detach().exp() / prior_var - 1))


def test_log_densities_equal_those_of_torch_distributions():
    value, mean, logvar = (torch.randn(7, dtype=torch.double, requires_grad=True) for _ in range(3))
    terms = gaussian.log_densities(value, mean, logvar)
    torch.testing.assert_close(terms, Normal(mean, (0.5 * logvar).exp()).log_prob(value))
    torch.autograd.gradcheck(gaussian.log_densities, (value, mean, logvar))
    terms.sum().backward()
    scaled = ((value - mean) * (-logvar).exp()).detach()
    torch.testing.assert_close(value.grad, -scaled)
    torch.testing.assert_close(mean.grad, scaled)


def test_moments_of_draws():
    bnn = BayesianModel(nn.Linear(4, 3), init_logvar=-1.0)
    with torch.no_grad():
        bnn.logvars.weight.uniform_(-4.0, 2.0)
    count = 4000
    draws = torch.stack([bnn.sample_params()["weight"].detach() for _ in range(count)])
    mean, variance = bnn.means.weight.detach(), bnn.logvars.weight.detach().exp()
    assert (((draws.mean(0) - mean) / (variance / count).sqrt()).abs() < 4).all()
    # The variance of n draws of a normal has standard error σ²·√(2/n).
    z = (draws.var(0) - variance) / (variance * (2 / count) ** 0.5)
    assert (z.abs() < 4).all()
    # Elements are independent.
    correlation = draws.flatten(1).T.corrcoef() - torch.eye(12)
    assert correlation.abs().max() < 5 / count**0.5


def test_gradients_of_a_draw():
    bnn = BayesianModel(nn.Linear(4, 3, dtype=torch.float64), init_logvar=-1.0)
    draw = bnn.sample_params()["weight"]
    weight = torch.randn_like(draw)
    (weight * draw).sum().backward()
    # ∂θ/∂μ = 1 and ∂θ/∂log σ² = σε/2 = (θ - μ)/2.
    torch.testing.assert_close(bnn.means.weight.grad, weight)
    expected = weight * 0.5 * (draw - bnn.means.weight).detach()
    torch.testing.assert_close(bnn.logvars.weight.grad, expected)


def test_draw_with_given_noise():
    mean, logvar = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])
    draw = gaussian.draw(mean, logvar, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(draw, torch.stack([mean[0] + 1, mean[1] - torch.e]))
