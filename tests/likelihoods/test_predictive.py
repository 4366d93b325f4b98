"""The predictive mixture, against scipy, brute force and its own samples."""

import numpy as np
import pytest
import torch
import zuko
from likelihood_cases import CASES
from scipy import special as scipy_special
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Normal, StudentT

from pyro_bayes import BayesianModel
from pyro_bayes.likelihoods import Bernoulli, Density, Gaussian, Poisson
from pyro_bayes.likelihoods import StudentT as StudentTNoise
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.special import betainc

B, S = 3, 5
NUMBERS = {k: c for k, c in CASES.items() if not k.startswith("Categorical")}
CLASSES = {k: c for k, c in CASES.items() if k.startswith(("Categorical", "Bernoulli"))}
every_number = pytest.mark.parametrize("case", NUMBERS.values(), ids=NUMBERS)
every_class = pytest.mark.parametrize("case", CLASSES.values(), ids=CLASSES)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case):
    raw = case.raw(S, B)
    return raw, Predictive(case.make().distribution(case.output(raw), batch_dims=2))


def close(found, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_number
def test_moments_are_those_of_the_mixture(case):
    raw, predictive = make(case)
    exact = case.exact(raw.numpy())
    means = torch.as_tensor(exact.mean()).expand(S, B, *case.event)
    variances = torch.as_tensor(exact.var()).expand(S, B, *case.event)
    close(predictive.mean, means.mean(0))
    close(predictive.aleatoric, variances.mean(0))
    close(predictive.epistemic, means.square().mean(0) - means.mean(0).square())
    # The second moment of the mixture, without the law of total variance.
    second = (variances + means.square()).mean(0)
    close(predictive.variance, second - means.mean(0).square())
    assert torch.equal(predictive.variance, predictive.aleatoric + predictive.epistemic)


@every_number
def test_samples_have_the_moments(case):
    _, predictive = make(case)
    n = 20_000
    samples = predictive.sample(n).double()
    assert samples.shape == (n, B, *case.event)
    error = samples.std(0) / n**0.5
    assert ((samples.mean(0) - predictive.mean).abs() < 5 * error).all()
    squares = (samples - predictive.mean).square()
    error = squares.std(0) / n**0.5
    assert ((squares.mean(0) - predictive.variance).abs() < 5 * error).all()


@every_class
def test_classes_are_sampled_as_often_as_they_are_probable(case):
    _, predictive = make(case)
    n, probs = 20_000, predictive.probs
    samples = predictive.sample(n)
    assert samples.shape == (n, B, *case.event)
    if case.make().__class__.__name__ == "Categorical":
        samples = nn.functional.one_hot(samples, 4)
    error = (probs * (1 - probs) / n).sqrt()
    assert ((samples.double().mean(0) - probs).abs() < 5 * error).all()


@every_class
def test_entropy_splits_into_expected_entropy_and_mutual_information(case):
    raw, predictive = make(case)
    each = raw.softmax(-1) if raw.shape[2:] != case.event else raw.sigmoid()
    if raw.shape[2:] == case.event:
        each = torch.stack((1 - each, each), -1)
    probs = each.mean(0)
    entropy = -(probs * probs.log()).sum(-1)
    expected = -(each * each.log()).sum(-1).mean(0)
    close(predictive.probs, probs if case.width != case.event else probs[..., 1])
    close(predictive.entropy, entropy)
    close(predictive.mutual_information, entropy - expected)
    assert (predictive.mutual_information > 0).all()


def test_mutual_information_of_equal_draws_is_zero():
    predictive = Predictive(Categorical(logits=torch.randn(1, B, 10).expand(S, B, 10)))
    assert (predictive.mutual_information >= 0).all()
    close(predictive.mutual_information, torch.zeros(B))


@every_number
def test_cdf_is_the_mean_of_those_of_the_draws(case):
    raw, predictive = make(case)
    y = case.y(B)
    exact = torch.as_tensor(case.exact(raw.numpy()).cdf(y.numpy())).mean(0)
    close(predictive.cdf(y), exact)


@every_number
def test_quantiles_invert_the_cdf(case):
    raw, predictive = make(case)
    levels = (0.01, 0.3, 0.5, 0.99)
    quantiles = predictive.quantile(levels)
    assert quantiles.shape == (len(levels), B, *case.event)
    close(predictive.quantile(0.3), quantiles[1])
    for level, quantile in zip(levels, quantiles, strict=True):
        exact = case.exact(raw.numpy())
        at = torch.as_tensor(exact.cdf(quantile.numpy())).mean(0)
        if predictive.mixture.support.is_discrete:
            assert torch.equal(quantile, quantile.round())
            assert (quantile >= 0).all()
            before = torch.as_tensor(exact.cdf(quantile.numpy() - 1)).mean(0)
            assert (at >= level).all()
            assert (before < level).all()
        else:
            close(at, torch.full_like(at, level))
    low, high = predictive.interval(0.98)
    close(low, quantiles[0])
    close(high, quantiles[-1])


@pytest.mark.parametrize(("loc", "scale"), [(1e6, 1.0), (-3e4, 1e-2), (0.0, 1e-6), (1e-3, 1e8)])
def test_quantiles_of_all_scales(loc, scale):
    loc, scale = torch.full((2, 1), loc).double(), torch.tensor(scale).double()
    quantile = Predictive(Normal(loc, scale)).quantile(0.2)
    close((quantile - loc[0]) / scale, scipy_special.ndtri([0.2]))


@pytest.mark.parametrize(
    ("distribution", "median"),
    [
        (torch.distributions.LogNormal(torch.zeros(1, 2), 1.0, validate_args=True), 1.0),
        (torch.distributions.Uniform(torch.zeros(1, 2), 1.0, validate_args=False), 0.5),
        (torch.distributions.Kumaraswamy(torch.ones(1, 2), 1.0, validate_args=True), 0.5),
        (torch.distributions.Laplace(torch.full((1, 2), -9.0), 0.1), -9.0),
    ],
)
def test_quantiles_of_other_distributions(distribution, median):
    close(Predictive(distribution).quantile(0.5), torch.full((2,), median))


def test_levels_and_numbers_of_other_kinds():
    predictive = Predictive(Normal(torch.zeros(2, 3), 1.0))
    expected = predictive.quantile((0.25, 0.5))
    assert torch.equal(predictive.quantile(torch.tensor([0.25, 0.5])), expected)
    assert torch.equal(predictive.quantile(torch.tensor(0.5)), expected[1])
    assert predictive.sample(np.int64(4)).shape == (4, 3)


def test_quantiles_without_a_distribution_function_are_those_of_samples():
    mixture = MultivariateNormal(torch.zeros(S, B, 2), torch.eye(2))
    low, high = Predictive(mixture).interval(0.9)
    assert low.shape == (B, 2)
    torch.testing.assert_close(high, torch.full((B, 2), 1.645), rtol=0, atol=0.3)
    assert torch.equal(low, Predictive(mixture).interval(0.9)[0])


def test_samples_are_independent_and_keep_what_examples_have_in_common():
    means = 100.0 * torch.arange(4).unsqueeze(1).expand(4, 2)
    samples = Predictive(Normal(means, 0.1)).sample(400)
    draws = (samples / 100).round()
    assert torch.equal(draws[:, 0], draws[:, 1])
    assert (samples[:, 0] != samples[:, 1]).all()
    # Neither sorted by draw nor spread evenly over draws.
    assert (draws[1:, 0] < draws[:-1, 0]).any()
    assert len(set(draws[:, 0].long().bincount().tolist())) > 1
    assert len(samples[:, 0].unique()) == 400


def test_samples_follow_the_generator_and_leave_the_global_one_alone():
    predictive = Predictive(Normal(torch.randn(S, B), 1.0))
    state = torch.get_rng_state()
    first = predictive.sample(6, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, predictive.sample(6, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, predictive.sample(6, torch.Generator().manual_seed(2)))
    assert not torch.equal(predictive.sample(6), predictive.sample(6))
    torch.manual_seed(5)
    one = predictive.sample(6)
    torch.manual_seed(5)
    assert torch.equal(one, predictive.sample(6))


def test_log_prob_does_not_underflow():
    predictive = Predictive(Normal(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])))
    found = predictive.log_prob(torch.tensor([1000.0]))
    close(found, Normal(0.0, 2.0).log_prob(torch.tensor([1000.0])) - torch.tensor(2.0).log())


def test_standard_error_covers_the_truth():
    """Against many repetitions: y ~ N(θ, 1) with θ ~ N(0, 0.5²)."""
    y, exact = torch.tensor([1.0]), Normal(0.0, 1.25**0.5).log_prob(torch.tensor(1.0))
    off = []
    for _ in range(300):
        predictive = Predictive(Normal(0.5 * torch.randn(200, 1), 1.0))
        off.append((predictive.log_prob(y) - exact) / predictive.log_prob_standard_error(y))
    off = torch.cat(off)
    assert off.mean().abs() < 0.25
    assert off.std().item() == pytest.approx(1.0, abs=0.15)


class Flow(nn.Module):
    """A flow that is a Gaussian with a learned scale, so that it has closed forms."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(3, 2)

    def forward(self, x):
        return zuko.distributions.DiagNormal(self.mean(x), torch.full((len(x), 2), 0.5))


def test_moments_of_a_density_are_near_the_exact_ones():
    bnn, x = BayesianModel(Flow(), init_logvar=-1.0), torch.randn(B, 3)
    state = torch.get_rng_state()
    predictive = Density(moment_samples=100).predictive(
        bnn, x, 200, generator=torch.Generator().manual_seed(0)
    )
    means = bnn.predict(
        lambda net: net.mean(x), 200, statistics="samples",
        generator=torch.Generator().manual_seed(0),
    ).samples  # fmt: skip
    close(predictive.mean, means.mean(0), 0.02)
    close(predictive.aleatoric, torch.full((B, 2), 0.25), 0.02)
    close(predictive.epistemic, means.var(0, correction=0), 0.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert predictive.quantile(0.5).shape == (B, 2)
    with pytest.raises(NotImplementedError):
        predictive.cdf(torch.zeros(B, 2))


def test_epistemic_variance_of_a_density_leaves_the_noise_of_samples_out():
    bnn, x = BayesianModel(Flow(), init_logvar=-4.0), torch.randn(B, 3)
    predictive = Density(moment_samples=4).predictive(bnn, x, 800)
    exact = x.square().sum(1, keepdim=True).add(1) * 0.0183
    close(predictive.epistemic, exact.expand(B, 2), 0.02)  # 0.0625 more with the noise
    close(predictive.aleatoric, torch.full((B, 2), 0.25), 0.02)


def test_densities_of_a_loader():
    bnn, x, y = BayesianModel(Flow(), init_logvar=-1.0), torch.randn(B, 3), torch.randn(B, 2)

    def predict(x):
        return Density().predictive(bnn, x, 20, generator=torch.Generator().manual_seed(0))

    whole = predict(x)
    for loader in ([x[:2], x[2:]], [(x[:2], y[:2]), [[x[2:]], y[2:]]], iter([{"x": x}])):
        batched = predict(loader)
        close(batched.log_prob(y), whole.log_prob(y), 1e-5)
        assert batched.sample(7).shape == (7, B, 2)
        close(batched.mean, whole.mean, 0.5)
    with pytest.raises(ValueError, match="Expected y of the shape"):
        predict([x]).log_prob(y[:2])


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_predictive_of_a_spline_flow(chunk_size):
    flow = zuko.flows.NSF(features=2, context=3, transforms=1, hidden_features=[8])
    bnn, x, y = BayesianModel(flow, init_logvar=-4.0), torch.randn(B, 3), torch.randn(B, 2)
    predictive = Density().predictive(
        bnn, x, 10, chunk_size=chunk_size, generator=torch.Generator().manual_seed(0)
    )
    each = bnn.predict(
        lambda net: net(x).log_prob(y), 10, statistics="samples",
        generator=torch.Generator().manual_seed(0),
    ).samples  # fmt: skip
    close(predictive.log_prob(y), each.exp().mean(0).log(), 1e-4)
    assert predictive.sample(4).shape == (4, B, 2)
    assert predictive.mean.shape == (B, 2)
    assert (predictive.variance > 0).all()


def test_predictive_of_a_loader_and_of_keywords():
    net = nn.Linear(3, 1)
    bnn, x = BayesianModel(net, init_logvar=-2.0), torch.randn(6, 3)

    def means(x):
        return Gaussian(0.1).predictive(bnn, x, 4, generator=torch.Generator().manual_seed(0)).mean

    assert means(x).shape == (6, 1)
    close(means([x[:4], x[4:]]), means(x))
    close(means({"input": x}), means(x))
    close(means((x,)), means(x))


REGRESSION = Predictive(Normal(torch.zeros(S, B), 1.0))
LABELS = Predictive(Categorical(logits=torch.zeros(S, B, 4)))

ERRORS = {
    "batch shape": (lambda: Predictive(Normal(torch.zeros(S), 1.0)), ValueError, r"\(S, B\).*5"),
    "y of another shape": (
        lambda: REGRESSION.log_prob(torch.zeros(B, 1)), ValueError, r"\(3,\).*squeeze",
    ),
    "nan": (lambda: REGRESSION.log_prob(torch.full((B,), torch.nan)), ValueError, "nan"),
    "label": (lambda: LABELS.log_prob(torch.full((B,), 4)), ValueError, "0 to 3; got 4"),
    "y is no tensor": (lambda: LABELS.log_prob([0, 0, 0]), TypeError, "tensor"),
    "cdf of another shape": (lambda: REGRESSION.cdf(torch.zeros(1)), ValueError, r"\(3,\)"),
    "level": (lambda: REGRESSION.quantile(1.0), ValueError, "between 0 and 1; got 1"),
    "levels": (lambda: REGRESSION.quantile((0.5, 2)), ValueError, "between 0 and 1"),
    "no level": (lambda: REGRESSION.quantile(()), ValueError, "between 0 and 1"),
    "interval": (lambda: REGRESSION.interval(90), ValueError, "level .*got 90"),
    "error of one draw": (
        lambda: Predictive(Normal(torch.zeros(1, B), 1.0)).log_prob_standard_error(torch.zeros(B)),
        ValueError, "at least 2 draws, .*got 1",
    ),
    "n": (lambda: REGRESSION.sample(0), ValueError, "n to be an integer of at least 1"),
    "probs of numbers": (lambda: REGRESSION.probs, AttributeError, "`probs`; got numbers"),
    "entropy of numbers": (lambda: REGRESSION.entropy, AttributeError, "classes for `entropy`"),
    "information": (lambda: REGRESSION.mutual_information, AttributeError, "mutual_information"),
    "mean of classes": (lambda: LABELS.mean, AttributeError, "`mean`; got classes"),
    "variance of classes": (lambda: LABELS.variance, AttributeError, "got classes"),
    "quantile of classes": (lambda: LABELS.quantile(0.5), AttributeError, "`quantile`"),
    "cdf of classes": (lambda: LABELS.cdf(torch.zeros(B)), AttributeError, "`cdf`"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=r"(?s)" + match):
        call()


def test_quantiles_of_large_counts_and_of_nothing():
    large = Predictive(CASES["Poisson"].make().distribution(torch.full((2, 1), 20.0), batch_dims=2))
    mean = torch.tensor([20.0]).exp()
    torch.testing.assert_close(large.quantile(0.5), mean, rtol=1e-4, atol=0)
    nothing = torch.full((2, 1), torch.nan)
    for likelihood in (StudentTNoise(1.0), Poisson()):
        Predictive(likelihood.distribution(nothing, batch_dims=2)).quantile(0.5)  # it ends


def test_densities_of_another_posterior_are_not_mixed_in():
    bnn, x = BayesianModel(Flow()), torch.randn(B, 3)
    predictive = Density().predictive(bnn, x, 4)
    with torch.no_grad():
        bnn.means.get_parameter("mean.bias").add_(1.0)
    with pytest.raises(RuntimeError, match="call it again"):
        predictive.log_prob(torch.zeros(B, 2))


@pytest.mark.parametrize("a", [0.1, 0.5, 3.0, 250.0, 1e5])
@pytest.mark.parametrize("b", [0.2, 1.0, 40.0, 3e4])
def test_incomplete_beta_function_is_that_of_scipy(a, b):
    mean, spread = a / (a + b), (a * b / (a + b) ** 2 / (a + b + 1)) ** 0.5
    x = mean + spread * torch.linspace(-6, 6, 41, dtype=torch.double)
    x = torch.cat((x, torch.tensor([0.0, 1e-12, 0.5, 1.0]))).clamp(0, 1)
    found = betainc(*torch.tensor([a, b], dtype=torch.double), x, complement=1 - x)
    exact = torch.from_numpy(scipy_special.betainc(a, b, x.numpy()))
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)


def test_probabilities_near_the_centre_of_heavy_tails():
    loc = torch.zeros(1, 1)
    predictive = Predictive(CASES["StudentT"].make().distribution(loc, batch_dims=2))
    small = torch.tensor([1e-6])
    density = StudentT(3.5, 0.0, 0.6).log_prob(torch.zeros(())).exp()
    torch.testing.assert_close(predictive.cdf(small) - 0.5, small * density, rtol=0.05, atol=1e-8)


def test_bernoulli_and_poisson_have_probabilities_everywhere():
    at = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    for likelihood, exact in ((Bernoulli(), [0, 0.5, 0.5, 1, 1]), (Poisson(), None)):
        found = likelihood.distribution(torch.zeros(5)).cdf(at)
        poisson = [0, 0.36788, 0.36788, 0.73576, 0.91970]
        torch.testing.assert_close(found, torch.tensor(exact or poisson), rtol=1e-4, atol=0)
