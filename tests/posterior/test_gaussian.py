"""The arithmetic of draws and divergences, against closed forms and torch.distributions."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyro_bayes import BayesianModel
from pyro_bayes.posterior import gaussian


def reference_kl(mean, logvar, prior_var):
    mean, logvar = mean.double(), logvar.double()
    prior = Normal(torch.zeros_like(mean), prior_var**0.5)
    return kl_divergence(Normal(mean, (0.5 * logvar).exp()), prior).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logvar", [-30.0, -9.0, -1.0, 0.0, 0.3, 10.0])
@pytest.mark.parametrize("prior_var", [1e-3, 1.0, 7.0])
def test_kl_equals_torch_distributions(dtype, logvar, prior_var):
    mean = torch.randn(7, 5, dtype=dtype)
    logvar = torch.full_like(mean, logvar) + 0.1 * torch.randn_like(mean)
    ours = gaussian.kl_divergence(mean, logvar, prior_var)
    assert ours.dtype == dtype
    assert ours.shape == ()
    reference = reference_kl(mean, logvar, prior_var)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=0)


def test_kl_near_the_prior_keeps_its_digits():
    logvar = torch.tensor([1e-3])
    ours = gaussian.kl_divergence(torch.zeros(1), logvar, 1.0)
    # a = log σ²: ½(eᵃ - 1 - a) = a²/4 + a³/12 + …
    assert ours.item() == pytest.approx(1e-6 / 4 + 1e-9 / 12, rel=1e-3)


@pytest.mark.parametrize("prior_var", [0.3, 1.0])
def test_gradients_of_the_kl(prior_var):
    mean = torch.randn(4, dtype=torch.float64, requires_grad=True)
    logvar = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda m, v: gaussian.kl_divergence(m, v, prior_var), (mean, logvar))
    gaussian.kl_divergence(mean, logvar, prior_var).backward()
    torch.testing.assert_close(mean.grad, mean.detach() / prior_var)
    torch.testing.assert_close(logvar.grad, 0.5 * (logvar.detach().exp() / prior_var - 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_in_half_precision_is_summed_in_single(dtype):
    bnn = BayesianModel(nn.Linear(100, 100, dtype=dtype))
    kl = bnn.kl_divergence()
    assert kl.dtype == dtype
    mean, logvar = bnn.means.weight.detach(), bnn.logvars.weight.detach()
    bias = reference_kl(bnn.means.bias.detach(), bnn.logvars.bias.detach(), 1.0)
    reference = reference_kl(mean, logvar, 1.0) + bias
    torch.testing.assert_close(kl.double(), reference, rtol=1e-2, atol=0)


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
