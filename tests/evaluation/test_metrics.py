"""Scores: against scipy, scikit-learn, torchmetrics and brute force."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torchmetrics.functional import regression
from torchmetrics.functional.classification import binary_calibration_error

from pyro_bayes.evaluation import metrics
from pyro_bayes.evaluation.bootstrap import Bootstrap
from pyro_bayes.evaluation.numbers import gaussian_crps, sample_crps

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def close(a, b, **options):
    a, b = (torch.as_tensor(v, dtype=torch.double) for v in (a, b))
    torch.testing.assert_close(a, b, **(options or TIGHT))


def predictions(n=500, *, ties=False):
    confidence = torch.rand(n, dtype=torch.double)
    if ties:
        confidence = (confidence * 8).round() / 8
    return confidence, torch.rand(n, dtype=torch.double) < confidence


# Scores of examples


def test_brier_score():
    probs, labels = torch.rand(50, 4).double().softmax(-1), torch.randint(4, (50,))
    expected = [sum((p - (c == y)) ** 2 for c, p in enumerate(row)) for row, y in zip(
        probs.tolist(), labels.tolist(), strict=True)]  # fmt: skip
    close(metrics.brier_score(probs, labels), expected)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("ties", [False, True])
def test_calibration_error(bins, ties):
    confidence, correct = predictions(ties=ties)
    confidence[:40] = 1.0
    correct[:20] = False
    edges = np.linspace(0, 1, bins + 1)
    places = np.clip(np.searchsorted(edges, confidence.numpy(), side="right") - 1, 0, bins - 1)
    expected = sum(
        abs((correct.double() - confidence)[torch.from_numpy(places == b)].sum().item())
        for b in range(bins)
    ) / len(confidence)
    close(metrics.calibration_error(confidence, correct, bins=bins), expected)


def test_calibration_error_beside_others():
    confidence, correct = predictions()
    found = metrics.calibration_error(confidence, correct, bins=12)
    close(found, binary_calibration_error(confidence, correct.long(), n_bins=12))
    share, mean = calibration_curve(correct, confidence, n_bins=12)
    counts = np.histogram(confidence, np.linspace(0, 1, 13))[0]
    close(found, np.average(abs(share - mean), weights=counts))


def test_full_confidence_is_no_bin_of_its_own():
    confidence, correct = torch.tensor([1.0, 0.99]), torch.tensor([0, 1])
    assert metrics.calibration_error(confidence, correct) == pytest.approx(0.495)


@pytest.mark.parametrize("count", [480, 500])
def test_adaptive_calibration_error(count):
    confidence, correct = predictions(count)
    order = confidence.argsort()
    places = [math.ceil(count * k / 12) for k in range(1, 12)]
    groups = np.split((correct.double() - confidence)[order].numpy(), places)
    assert {len(group) for group in groups} <= {40, 41, 42}
    expected = sum(abs(group.sum()) for group in groups) / count
    close(metrics.adaptive_calibration_error(confidence, correct, bins=12), expected)


def test_adaptive_calibration_error_does_not_depend_on_the_order():
    confidence, correct = predictions(ties=True)
    expected = metrics.adaptive_calibration_error(confidence, correct)
    for _ in range(5):
        order = torch.randperm(len(confidence))
        close(metrics.adaptive_calibration_error(confidence[order], correct[order]), expected)
    values = confidence.unique()
    gaps = [(correct.double() - confidence)[confidence == v].sum().abs() for v in values]
    close(metrics.adaptive_calibration_error(confidence, correct, bins=500), sum(gaps) / 500)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.3])
def test_pit_deviation(power):
    pit = torch.rand(200, dtype=torch.double) ** power
    close(metrics.pit_deviation(pit), stats.kstest(pit.numpy(), "uniform").statistic)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-9])
@pytest.mark.parametrize("ties", [False, True])
def test_auroc(scale, ties):
    inside, outside = torch.randn(150), torch.randn(60) + 0.7
    if ties:
        inside, outside = inside.round(), outside.round()
    labels = [0] * 150 + [1] * 60
    expected = roc_auc_score(labels, torch.cat([inside, outside]))
    found = metrics.auroc(scale * inside, scale * outside)
    assert found == pytest.approx(expected, abs=1e-6)


def test_auroc_without_a_score_is_none():
    assert metrics.auroc(torch.tensor([1.0, math.nan]), torch.ones(2)).isnan()


# CRPS


def mixture(draws=6, examples=4):
    mean = 2 * torch.randn(draws, examples, dtype=torch.double)
    return mean, torch.rand(draws, examples, dtype=torch.double) + 0.1


def views_of(size, replicates=3):
    return Bootstrap(size, replicates=replicates, seed=7)


def test_gaussian_crps_of_one_gaussian():
    mean, scale = mixture(1)
    y = torch.randn(4, dtype=torch.double)
    z = ((y - mean) / scale)[0].numpy()
    expected = scale[0].numpy() * (
        z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5
    )
    close(gaussian_crps(mean, scale, y, views_of(1))[0], expected)


def test_gaussian_crps_of_a_mixture_in_each_view():
    mean, scale = mixture()
    y, views = torch.randn(4, dtype=torch.double), views_of(6)
    found = gaussian_crps(mean, scale, y, views)
    assert found.shape == (4, 4)
    for view in range(views.views):
        chosen = views.indices(view)
        for i in range(4):
            m, s, target = mean[chosen, i].numpy(), scale[chosen, i].numpy(), y[i].item()

            def square(t, m=m, s=s, target=target):
                return (stats.norm.cdf(t, m, s).mean() - (t >= target)) ** 2

            parts = [integrate.quad(square, *ends, limit=200)[0] for ends in (
                (-30, target), (target, 30))]  # fmt: skip
            close(found[view, i], sum(parts), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_gaussian_crps_of_scales_whose_squares_are_no_numbers(unit):
    mean, scale = (part.float() for part in mixture())
    y, views = torch.randn(4), views_of(6)
    found = gaussian_crps(unit * mean, unit * scale, unit * y, views)
    torch.testing.assert_close(found / unit, gaussian_crps(mean, scale, y, views))


def test_sample_crps_in_each_view():
    samples, y = torch.randn(6, 4, dtype=torch.double), torch.randn(4, dtype=torch.double)
    views = views_of(6)
    found = sample_crps(samples, y, views)
    for view in range(views.views):
        x = samples[views.indices(view)]
        spread = (x[:, None] - x[None]).abs().sum((0, 1)) / (2 * 6 * 5)
        close(found[view], (x - y).abs().mean(0) - spread)


@pytest.mark.skipif(
    not hasattr(regression, "continuous_ranked_probability_score"), reason="torchmetrics is older"
)
def test_sample_crps_is_that_of_torchmetrics_without_its_bias():
    samples, y = torch.randn(30, 8), torch.randn(8)
    biased = regression.continuous_ranked_probability_score(samples.T, y)
    spread = 2 * ((samples - y).abs().mean() - biased)
    unbiased = (samples - y).abs().mean() - spread / 2 * 30 / 29
    close(sample_crps(samples, y, views_of(30))[0].mean(), unbiased, rtol=1e-5, atol=1e-6)


def test_sample_crps_is_unbiased():
    samples, y = torch.randn(3, 40_000, dtype=torch.double), torch.tensor(0.4, dtype=torch.double)
    exact = gaussian_crps(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), y, views_of(1))
    found = sample_crps(samples, y.expand(40_000), views_of(3, replicates=1))[0]
    assert (found.mean() - exact[0]).abs() < 4 * found.std() / 200


# Errors


def test_bootstrap_views_are_of_the_elements_that_they_draw():
    x, views = torch.randn(12, 3, 2, dtype=torch.double), views_of(12, replicates=5)
    assert views.indices(0).tolist() == list(range(12))
    assert len({tuple(views.indices(view).tolist()) for view in range(6)}) == 6

    def kernel(a, c, b, d):
        return (a * d - b * c).abs()

    close(views.weights(x).sum(1), torch.ones(6))
    same = torch.tensor(0.1).expand(12, 37)
    assert torch.equal(views.means(same), same[:6])
    far = 1e6 + x.float()
    torch.testing.assert_close(
        views.means(far) - 1e6, views.means((far - 1e6).double()).float(), rtol=0, atol=0.07
    )
    pairs = views.pair_means(kernel, x, x.exp())
    for view in range(6):
        drawn = x[views.indices(view)]
        close(views.means(x)[view], drawn.mean(0))
        close(views.log_means(800 * x)[view], (800 * drawn).logsumexp(0) - math.log(12))
        a, c = drawn[:, None], drawn.exp()[:, None]
        close(pairs[view], kernel(a, c, drawn[None], drawn.exp()[None]).mean((0, 1)))


def test_bootstrap_error_is_that_of_the_replicates():
    views = torch.tensor([[5.0, 0.0], [1.0, 0.0], [3.0, 4.0]], dtype=torch.double)
    close(Bootstrap.error(views), [2**0.5, 8**0.5])


@pytest.mark.parametrize("statistic", [torch.mean, torch.median])
def test_bootstrap_error(statistic):
    truth = {torch.mean: 1.0, torch.median: math.sqrt(math.pi / 2)}[statistic] / math.sqrt(400)
    errors = []
    for _ in range(10):
        x, views = torch.randn(400), views_of(400, replicates=200)
        values = [statistic(x[views.indices(view)]) for view in range(201)]
        errors.append(Bootstrap.error(torch.stack(values)))
    assert torch.stack(errors).mean() == pytest.approx(truth, rel=0.1)


SHARE = torch.tensor([0.9, 0.8])
BAD = {
    "lengths": (lambda f: f(SHARE, torch.ones(3)), r"one shape.* got \(2,\) and \(3,\)"),
    "columns": (lambda f: f(SHARE[None], torch.ones(1, 2)), r"\(1, 2\) and \(1, 2\)"),
    "nothing": (lambda f: f(SHARE[:0], torch.ones(0)), r"got \(0,\)"),
    "bins": (lambda f: f(SHARE, torch.ones(2), bins=0), "bins to be an integer .* got 0"),
}


@pytest.mark.parametrize("error", [metrics.calibration_error, metrics.adaptive_calibration_error])
@pytest.mark.parametrize("name", BAD)
def test_calibration_of_bad_input(name, error):
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        call(error)


@pytest.mark.parametrize("error", [metrics.calibration_error, metrics.adaptive_calibration_error])
def test_calibration_in_half_precision(error):
    confidence = SHARE.repeat(2000).bfloat16()
    exact = 1 - confidence.double().mean()
    assert error(confidence, torch.ones(4000)).item() == pytest.approx(exact.item(), rel=1e-5)


def test_auroc_of_nothing():
    with pytest.raises(ValueError, match="got 2 and 0"):
        metrics.auroc(SHARE, SHARE[:0])


@pytest.mark.parametrize("call", ["calibration_error", "auroc"])
def test_missing_torchmetrics_names_the_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_bayes\[metrics\]'"):
        getattr(metrics, call)(torch.rand(4), torch.rand(4))
