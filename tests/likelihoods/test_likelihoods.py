"""One contract for all likelihoods, against scipy and by brute force."""

import copy
import inspect

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from likelihood_cases import CASES, SCALES, Base
from pyro import poutine
from scipy import stats
from torch import nn
from torch.distributions import Independent, Normal

from pyro_bayes import BayesianModel, likelihoods
from pyro_bayes.likelihoods import (
    REGISTRY,
    Bernoulli,
    Categorical,
    Density,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import fit_target

B, S = 5, 7
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_registry_and_cases_have_every_likelihood():
    public = {
        name: value
        for name, value in vars(likelihoods).items()
        if inspect.isclass(value) and issubclass(value, Likelihood) and value is not Likelihood
    }
    assert public == REGISTRY
    assert {name.split(",")[0] for name in CASES} == set(REGISTRY)
    assert set(likelihoods.__all__) == {"REGISTRY", "Likelihood", *REGISTRY}
    assert {type(case.make()).__name__ for case in CASES.values()} == set(REGISTRY)


@every_case
def test_log_prob_is_that_of_scipy(case):
    raw, y = case.raw(B), case.y(B)
    log_prob = case.make().log_prob(case.output(raw), y)
    assert log_prob.shape == (B,)
    torch.testing.assert_close(log_prob, case.log_prob(raw, y), rtol=1e-6, atol=1e-6)


@every_case
def test_each_example_has_one_distribution(case):
    likelihood, raw, y = case.make(), case.raw(S, B), case.y(B)
    distribution = likelihood.distribution(case.output(raw), batch_dims=2)
    assert distribution.batch_shape == (S, B)
    assert distribution.event_shape == case.event
    log_probs = distribution.log_prob(fit_target(y, distribution))
    for draw, log_prob in zip(raw, log_probs, strict=True):
        assert likelihood.distribution(case.output(draw)).batch_shape == (B,)
        torch.testing.assert_close(likelihood.log_prob(case.output(draw), y), log_prob)


@every_case
def test_gradients_are_those_of_differences(case):
    likelihood, raw, y = case.make().double(), case.raw(B).requires_grad_(), case.y(B)
    names = [name for name, _ in likelihood.named_parameters()]
    assert tuple(names) == case.learned

    def log_prob(raw, *values):
        return torch.func.functional_call(
            Called(likelihood), dict(zip([f"likelihood.{n}" for n in names], values, strict=True)),
            (case.output(raw), y),
        )  # fmt: skip

    assert torch.autograd.gradcheck(log_prob, (raw, *likelihood.parameters()))


class Called(nn.Module):
    def __init__(self, likelihood):
        super().__init__()
        self.likelihood = likelihood

    def forward(self, output, y):
        return self.likelihood.log_prob(output, y)


@every_case
def test_sample_statement(case):
    likelihood, output, y = case.make(), case.output(case.raw(B)), case.y(B)

    def model(y=None):
        with pyro.plate("data", 3 * B, subsample=torch.arange(B)):
            return likelihood.sample("y", output, y)

    trace = poutine.trace(model).get_trace(y)
    torch.testing.assert_close(
        trace.log_prob_sum(), 3 * likelihood.log_prob(output, y).sum(), rtol=1e-5, atol=1e-5
    )
    assert trace.nodes["y"]["is_observed"]
    assert model().shape == y.shape


@every_case
def test_dtype_follows_the_output(case):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        likelihood = copy.deepcopy(case.make()).to(dtype)
        y = case.y(B)
        log_prob = likelihood.log_prob(case.output(case.raw(B).to(dtype)), y)
        wide = dtype if dtype != torch.bfloat16 else torch.float32
        assert log_prob.dtype == wide or isinstance(likelihood, Density)
        assert all(p.dtype == wide for p in (*likelihood.parameters(), *likelihood.buffers()))


@every_case
def test_state_goes_where_the_likelihood_goes(case):
    trained, fresh = case.make(), case.make()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    fresh.load_state_dict(trained.state_dict())
    output, y = case.output(case.raw(B)), case.y(B)
    torch.testing.assert_close(fresh.log_prob(output, y), trained.log_prob(output, y))


@every_case
def test_predictive_is_the_mixture_over_the_draws_of_predict(case):
    likelihood, bnn = case.make(), BayesianModel(Base(case), init_logvar=-2.0)
    x, y = torch.randn(B, 3, dtype=torch.double), case.y(B)
    seed = torch.Generator().manual_seed(1)
    predictive = likelihood.predictive(bnn, x, S, generator=seed)
    assert isinstance(predictive, Predictive)
    assert predictive.num_samples == S
    assert predictive.mixture.batch_shape == (S, B)
    raw = bnn.predict(
        lambda net: net.linear(x).view(-1, *case.width), S, statistics="samples",
        generator=torch.Generator().manual_seed(1),
    ).samples  # fmt: skip
    each = torch.stack([case.log_prob(draw, y) for draw in raw])
    torch.testing.assert_close(
        predictive.log_prob(y), each.exp().mean(0).log(), rtol=1e-6, atol=1e-6
    )
    error = each.exp().std(0) / S**0.5 / each.exp().mean(0)
    torch.testing.assert_close(predictive.log_prob_standard_error(y), error, rtol=1e-6, atol=1e-6)
    assert not predictive.log_prob(y).requires_grad


def test_poisson_is_exact_for_extreme_rates():
    log_rate = torch.tensor([-200.0, -200.0, 80.0])
    log_prob = Poisson().log_prob(log_rate, torch.tensor([2.0, 0.0, 0.0]))
    exact = torch.tensor([-400.0 - np.log(2.0), 0.0, -np.exp(80.0)]).float()
    torch.testing.assert_close(log_prob, exact)


LARGE = {
    "counts": (Poisson(), lambda f: stats.poisson(np.exp(f)), (9.0, 14.0)),
    **{
        f"total_count={r:g}": (
            NegativeBinomial(r), lambda f, r=r: stats.nbinom(r, r / (r + np.exp(f))), (0.0, 5.0),
        )
        for r in (1e4, 1e8)
    },
    **{
        f"df={df:g}": (StudentT(1.0, df=df), lambda f, df=df: stats.t(df, f), (0.0, 3.0))
        for df in (1e5, 1e7)
    },
}  # fmt: skip


@pytest.mark.parametrize(("likelihood", "exact", "outputs"), LARGE.values(), ids=LARGE)
def test_single_precision_is_enough_for_large_numbers(likelihood, exact, outputs):
    """Differences of log-gamma functions leave nothing of their digits."""
    output = torch.tensor(outputs, requires_grad=True)
    law = exact(output.detach().double().numpy())
    y = torch.tensor(law.mean() + law.std() * np.array([[-0.8], [0.0], [1.3]])).round().float()
    for row in y:
        log_prob = likelihood.log_prob(output, row)
        of = law.logpmf if hasattr(law.dist, "pmf") else law.logpdf
        truth = torch.from_numpy(of(row.double().numpy())).float()
        torch.testing.assert_close(log_prob, truth, rtol=1e-6, atol=1e-6)
        below = torch.from_numpy(law.cdf(row.double().numpy())).float()
        found = likelihood.distribution(output).cdf(row)
        torch.testing.assert_close(found, below, rtol=1e-4, atol=1e-6)
        assert torch.autograd.grad(log_prob.sum(), output)[0].dtype == torch.float32


def test_heteroscedastic_density_is_bounded():
    output = torch.tensor([[0.0, -1000.0]], requires_grad=True)
    log_prob = HeteroscedasticGaussian(min_scale=0.01).log_prob(output, torch.zeros(1, 1))
    log_prob.sum().backward()
    assert log_prob.item() == pytest.approx(Normal(0.0, 0.01).log_prob(torch.zeros(())).item())
    assert output.grad.isfinite().all()


def test_density_without_conditions_is_the_same_for_all_examples():
    density, y = Normal(torch.zeros(2), 1.0), torch.randn(B, 2)
    joint = torch.distributions.Independent(density, 1)
    torch.testing.assert_close(Density().log_prob(joint, y), density.log_prob(y).sum(-1))


def test_compiled_log_prob_skips_checks_of_values():
    torch.compiler.reset()
    likelihood = Gaussian(1.0)
    # Elder versions of torch do not trace `vars`, and break the graph there.
    whole = torch.__version__ >= "2.13"
    compiled = torch.compile(likelihood.log_prob, backend="eager", fullgraph=whole)
    output, y = torch.randn(B), torch.randn(B)
    torch.testing.assert_close(compiled(output, y), likelihood.log_prob(output, y))


class Mean(Likelihood):
    """What a likelihood must not be."""

    def distribution(self, output, *, batch_dims=1):
        return dist.Normal(self.as_real(output, batch_dims), 1.0)


column, row, images = torch.randn(B, 1), torch.randn(B), torch.randn(B, 4, 2, 2)
logits, ones = torch.randn(B, 4), torch.ones(B)
two = torch.randn(B, 2)
nan, inf = torch.full((B,), torch.nan), row.clone().index_fill_(0, torch.tensor(2), torch.inf)

ERRORS = {
    # y: (call, error, message)
    "not a tensor": (lambda: Gaussian(1.0).log_prob(row, [0.0] * B), TypeError, "y to be a tensor"),
    "(B, 1) against (B)": (
        lambda: Gaussian(1.0).log_prob(column, row), ValueError, r"output\.squeeze\(-1\)",
    ),
    "(B) against (B, 1)": (
        lambda: Gaussian(1.0).log_prob(row, column), ValueError, r"y\.squeeze\(-1\)",
    ),
    "another number of examples": (
        lambda: Gaussian(1.0).log_prob(row, row[:3]), ValueError, "one row per example",
    ),
    "scalar": (lambda: Gaussian(1.0).log_prob(row, row[0]), ValueError, r"got \(\)"),
    "no examples": (lambda: Gaussian(1.0).log_prob(row[:0], row[:0]), ValueError, "examples"),
    "integers for numbers": (
        lambda: Gaussian(1.0).log_prob(row, ones.long()), ValueError, r"y\.float\(\)",
    ),
    "complex": (lambda: Poisson().log_prob(row, ones + 0j), ValueError, "complex"),
    "another device": (
        lambda: Gaussian(1.0).log_prob(row, row.to("meta")), ValueError, "y on cpu.*got it on meta",
    ),
    "nan": (lambda: Gaussian(1.0).log_prob(row, nan), ValueError, r"y .*nan at index \(0,\)"),
    "inf": (lambda: StudentT(1.0).log_prob(row, inf), ValueError, r"y .*inf at index \(2,\)"),
    "nan labels": (lambda: Bernoulli().log_prob(row, nan), ValueError, "0 or 1; got nan"),
    "float labels": (
        lambda: Categorical().log_prob(logits, ones), ValueError, r"got torch\.float32\. .*long",
    ),
    "bool labels": (lambda: Categorical().log_prob(logits, ones.bool()), ValueError, "bool"),
    "one-hot labels": (
        lambda: Categorical().log_prob(logits, logits.long()), ValueError, r"y\.argmax\(-1\)",
    ),
    "label too large": (
        lambda: Categorical().log_prob(logits, ones.long() * 4), ValueError, "0 to 3; got 4 at",
    ),
    "label negative": (
        lambda: Categorical().log_prob(logits, -ones.long()), ValueError, "0 to 3; got -1",
    ),
    "label of no class": (lambda: Bernoulli().log_prob(row, 2 * ones), ValueError, "0 or 1; got 2"),
    "soft label": (lambda: Bernoulli().log_prob(row, ones / 2), ValueError, r"0 or 1; got 0\.5"),
    "negative count": (lambda: Poisson().log_prob(row, -ones), ValueError, "counts.*got -1"),
    "half a count": (
        lambda: NegativeBinomial(1.0).log_prob(row, ones / 2), ValueError, r"counts.*got 0\.5",
    ),
    "outside of a density": (
        lambda: Density().log_prob(dist.Exponential(ones), -ones), ValueError, "got -1",
    ),
    # the output
    "output is no tensor": (lambda: Gaussian(1.0).log_prob(None, row), TypeError, "NoneType"),
    "output is a distribution": (
        lambda: Gaussian(1.0).log_prob(Normal(row, 1.0), row), TypeError, r"Density\(\)",
    ),
    "output is no distribution": (
        lambda: Density().log_prob(row, row), TypeError, "that is a distribution; got Tensor",
    ),
    "one sample": (lambda: Density(moment_samples=1), ValueError, "moment_samples to be .*least 2"),
    "output of integers": (
        lambda: Gaussian(1.0).log_prob(ones.long(), row), ValueError, "of real numbers",
    ),
    "output is a scalar": (lambda: Gaussian(1.0).log_prob(row[0], row), ValueError, "dimension"),
    "output nan": (lambda: Gaussian(1.0).log_prob(nan, row), ValueError, "output .*got nan"),
    "output inf": (
        lambda: HeteroscedasticGaussian().log_prob((row, inf), row), ValueError, "output .*got inf",
    ),
    "density nan": (
        lambda: Density().log_prob(Normal(nan, 1.0, validate_args=False), row), ValueError,
        "log-density",
    ),
    "classes second": (
        lambda: Categorical().log_prob(images, torch.zeros(B, 2, 2).long()), ValueError,
        r"output\.movedim\(1, -1\)",
    ),
    "one logit": (
        lambda: Categorical().log_prob(column, ones.long()), ValueError, r"Bernoulli\(\)",
    ),
    "no logits": (lambda: Categorical().log_prob(row, ones.long()), ValueError, "two or more"),
    "odd last dimension": (
        lambda: HeteroscedasticGaussian().log_prob(column, column), ValueError, "as many scales",
    ),
    "three parts": (
        lambda: HeteroscedasticGaussian().log_prob((row, row, row), row), ValueError, "3 parts",
    ),
    "unequal parts": (
        lambda: HeteroscedasticGaussian().log_prob((row, column), row), ValueError, "one shape",
    ),
    "two means": (
        lambda: HeteroscedasticGaussian().log_prob(two, two), ValueError, r"\(5, 1\).*got \(5, 2\)",
    ),
    "scales of examples": (
        lambda: Gaussian(ones).log_prob(row, row), ValueError, r"output, \(\); got \(5,\)",
    ),
    "scales of other outputs": (
        lambda: StudentT(ones[:3]).log_prob(two, two), ValueError, r"\(2,\); got \(3,\)",
    ),
    "event dimensions": (lambda: Mean().log_prob(two, two), ValueError, r"self\.per_example"),
    # arguments
    "scale 0": (lambda: Gaussian(0.0), ValueError, "scale to be positive and finite; got 0"),
    "scale inf": (lambda: StudentT(float("inf")), ValueError, "positive and finite"),
    "scale nan": (lambda: Gaussian(torch.tensor([1.0, torch.nan])), ValueError, "positive"),
    "scale a word": (lambda: Gaussian("1"), TypeError, "scale to be a number"),
    "learn a number": (lambda: Gaussian(1.0, learn=1), TypeError, "learn to be True or False"),
    "df 0": (lambda: StudentT(1.0, df=0), ValueError, "df to be positive"),
    "total_count negative": (lambda: NegativeBinomial(-1.0), ValueError, "total_count"),
    "min_scale 0": (lambda: HeteroscedasticGaussian(min_scale=0.0), ValueError, "min_scale"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=r"(?s)" + match):
        call()


def test_check_raises_what_log_prob_raises():
    with pytest.raises(ValueError, match="squeeze"):
        Gaussian(1.0).check(column, row)
    Gaussian(1.0).check(row, row)


def test_scales_keep_their_shape():
    assert Gaussian(0.5).scale.item() == pytest.approx(0.5)
    torch.testing.assert_close(StudentT(SCALES).scale, SCALES)
    assert NegativeBinomial(3.0).total_count.item() == pytest.approx(3.0)
    assert not list(Gaussian(0.5).parameters())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Gaussian(0.1), "Gaussian(scale=0.1)"),
        (Gaussian(0.25, learn=True), "Gaussian(scale=0.25 (learned))"),
        (Gaussian(torch.ones(2)), "Gaussian(scale=(2,))"),
        (Categorical(), "Categorical()"),
        (Density(), "Density(moment_samples=32)"),
        (
            Predictive(Independent(Normal(torch.zeros(7, 5, 2), 1.0), 1)),
            "Predictive(Normal, num_samples=7, examples=5, target_shape=(2,))",
        ),
    ],
)
def test_representations(value, text):
    assert repr(value) == text
