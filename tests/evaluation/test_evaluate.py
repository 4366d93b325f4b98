"""Evaluations: against predictive distributions, exact models, and what they refuse."""

import json
import sys

import pytest
import torch
from likelihood_cases import CASES, Base
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bayes import BayesianModel
from pyro_bayes.evaluation import Evaluation, evaluate, records
from pyro_bayes.evaluation.bootstrap import Bootstrap
from pyro_bayes.evaluation.numbers import score
from pyro_bayes.likelihoods import (
    Bernoulli,
    Categorical,
    Density,
    Gaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from pyro_bayes.likelihoods.predictive import Predictive

CLASSES = ["nll", "accuracy", "brier", "ece", "adaptive_ece"]
NUMBERS = ["nll", "rmse", "crps", "pit_deviation"]
INTERVALS = ["coverage@0.5", "width@0.5", "coverage@0.9", "width@0.9"]
AUROCS = ["auroc_total", "auroc_aleatoric", "auroc_epistemic"]


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def loader(*tensors, size=5):
    return DataLoader(TensorDataset(*tensors), batch_size=size)


class Squeezed(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x).squeeze(-1)


@pytest.fixture
def gaussian():
    x = torch.randn(23, 3)
    bnn = BayesianModel(Squeezed(nn.Linear(3, 1)), init_logvar=-3.0)
    return bnn, Gaussian(0.3), x, bnn.base(x).detach() + 0.3 * torch.randn(23)


# Every likelihood


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_predictive_distribution(name):
    case, x = CASES[name], torch.randn(12, 3, dtype=torch.double)
    bnn, likelihood, y = BayesianModel(Base(case), init_logvar=-3.0), case.make(), case.y(12)
    size = 12 if isinstance(likelihood, Density) else 5  # moments of flows are from samples
    batches = loader(x, y, size=size)
    found = evaluate(bnn, likelihood, batches, 15, ood=[3 * x, (x, y)], generator=seeded())
    # The generator that evaluations give to predictions.
    seed = int(torch.randint(2**63 - 1, (2,), generator=seeded())[0])
    predictive = likelihood.predictive(bnn, x, 15, generator=seeded(seed))
    y = y if isinstance(likelihood, Categorical) else y.double()
    truth = {"nll": -predictive.log_prob(y).mean()}
    if isinstance(likelihood, Bernoulli | Categorical):
        assert list(found) == [*CLASSES, *AUROCS]
        probs = predictive.probs
        if isinstance(likelihood, Bernoulli):
            probs = torch.stack([1 - probs, probs], -1)
        truth["accuracy"] = (probs.argmax(-1) == y).double().mean()
        one_hot = nn.functional.one_hot(y.long(), probs.shape[-1])
        truth["brier"] = (probs - one_hot).square().sum(-1).mean()
        parts = predictive.entropy, predictive.entropy - predictive.mutual_information
        parts = (*parts, predictive.mutual_information)
    else:
        assert list(found) == [*NUMBERS, *INTERVALS, *AUROCS]
        truth["rmse"] = (predictive.mean - y).square().mean().sqrt()
        for level in (0.5, 0.9):
            low, high = predictive.interval(level)
            truth[f"coverage@{level}"] = ((low <= y) & (y <= high)).double().mean()
            truth[f"width@{level}"] = (high - low).mean()
        parts = predictive.variance, predictive.aleatoric, predictive.epistemic
        pit = found.examples["pit"]
        upper = 1.0 if isinstance(likelihood, Density) else predictive.cdf(y)
        if isinstance(likelihood, Density):
            assert ((pit > 0) & (pit < 1)).all()
        elif isinstance(likelihood, Poisson | NegativeBinomial):
            lower = torch.where(y > 0, predictive.cdf((y - 1).clamp_min(0)), 0.0)
            place = (pit - lower) / (upper - lower)
            assert place.min() > -1e-6
            assert place.max() < 1 + 1e-6
            assert place.std() > 0.15
        else:
            torch.testing.assert_close(pit, upper)
    for metric, value in truth.items():
        assert found[metric] == pytest.approx(value.item(), rel=1e-6), metric
    for part, expected in zip(("total", "aleatoric", "epistemic"), parts, strict=True):
        torch.testing.assert_close(found.examples[part], expected.reshape(12, -1).sum(1))
    assert all(row.monte_carlo_error >= 0 and row.standard_error >= 0 for row in found.rows)
    assert found.ood["total"].shape == (24,)


def test_densities_are_scored_as_gaussians_are():
    case, x = CASES["Density"], torch.randn(300, 3, dtype=torch.double)
    bnn = BayesianModel(Base(case), init_logvar=-3.0)
    y = case.raw(300) / 3 + bnn.base.linear(x).detach()
    found = evaluate(bnn, Density(), [(x, y)], ood=[3 * x], generator=seeded())
    bnn.base.case = CASES["Gaussian, learned per output"]
    exact = evaluate(bnn, Gaussian(0.4), [(x, y)], ood=[3 * x], generator=seeded())
    assert list(found) == list(exact)
    assert found["nll"] == pytest.approx(exact["nll"])
    for metric in ("rmse", "crps", "width@0.5", "width@0.9", "auroc_total", "auroc_epistemic"):
        assert found[metric] == pytest.approx(exact[metric], rel=0.03), metric
    for metric in ("pit_deviation", "coverage@0.5", "coverage@0.9"):
        assert found[metric] == pytest.approx(exact[metric], abs=0.04), metric
    assert (found.examples["pit"] - exact.examples["pit"]).abs().mean() < 0.05
    for a, b in zip(found.rows, exact.rows, strict=True):
        if a.metric != "auroc_aleatoric":  # of which there is none
            assert 0.4 < a.monte_carlo_error / b.monte_carlo_error < 2.5, a.metric


# Exact models


def test_calibrated_numbers():
    """Targets that come from the predictive distribution of a linear model, for each example."""
    x = torch.randn(2000, 3)
    bnn = BayesianModel(Squeezed(nn.Linear(3, 1)), init_logvar=-2.0)
    variance = torch.tensor(-2.0).exp() * (x.square().sum(1) + 1)
    total = (variance + 0.5**2).sqrt()
    y = bnn.base(x).detach() + total * torch.randn(2000)
    found = evaluate(bnn, Gaussian(0.5), loader(x, y, size=500), 200, generator=seeded())
    errors = {row.metric: row for row in found.rows}
    exact = {
        "nll": (total.log() + 0.5 + 0.5 * torch.log(torch.tensor(2 * torch.pi))).mean(),
        "rmse": total.square().mean().sqrt(),
        "crps": (total / torch.pi**0.5).mean(),
        "coverage@0.5": torch.tensor(0.5),
        "coverage@0.9": torch.tensor(0.9),
        "width@0.9": 2 * 1.6449 * total.mean(),
    }
    for metric, value in exact.items():
        row = errors[metric]
        error = (row.monte_carlo_error**2 + row.standard_error**2) ** 0.5
        assert abs(row.value - value.item()) < 4 * error, metric
        assert error < 0.1 * value, metric
    assert found["pit_deviation"] < 0.05
    torch.testing.assert_close(
        found.examples["epistemic"].mean(), variance.mean(), rtol=0.1, atol=0
    )
    torch.testing.assert_close(found.examples["aleatoric"], torch.full((2000,), 0.25))


def test_calibrated_classes():
    x = torch.randn(5000, 3)
    bnn = BayesianModel(nn.Linear(3, 4), init_logvar=-1.0)
    seed = int(torch.randint(2**63 - 1, (2,), generator=seeded())[0])
    probs = Categorical().predictive(bnn, x, 200, generator=seeded(seed)).probs
    y = torch.distributions.Categorical(probs).sample()
    found = evaluate(bnn, Categorical(), loader(x, y, size=1000), 200, generator=seeded())
    errors = {row.metric: 4 * row.standard_error for row in found.rows}
    expected = {
        "nll": torch.distributions.Categorical(probs).entropy().mean(),
        "accuracy": probs.max(1).values.mean(),
        "brier": (1 - probs.square().sum(1)).mean(),
    }
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value.item(), abs=errors[metric]), metric
    assert found["ece"] < 0.04
    assert found["adaptive_ece"] < 0.04


def test_uncertainty_out_of_distribution(gaussian):
    bnn, likelihood, x, y = gaussian
    found = evaluate(bnn, likelihood, [(x, y)], ood=[(50 + x, y), (50 + x, None)])
    assert found["auroc_epistemic"] == found["auroc_total"] == 1.0
    assert found["auroc_aleatoric"] == 0.5
    assert found.ood["total"].shape == (46,)


# Errors


@pytest.fixture
def classes():
    bnn, x = BayesianModel(nn.Linear(3, 3), init_logvar=-2.0), torch.randn(200, 3)
    return bnn, x, (x.sum(1).abs() * 2 * torch.rand(200)).long().clamp_max(2)


def test_standard_errors(classes, gaussian):
    bnn, x, y = classes
    found = evaluate(bnn, Categorical(), [(x, y)], ood=[1.5 * x], generator=seeded())
    examples, inside, outside = found.examples, found.examples["total"], found.ood["total"]
    pairs = (inside[:, None] < outside).double()
    exact = {
        "nll": examples["log_prob"].std() / 200**0.5,
        "accuracy": examples["correct"].double().std() / 200**0.5,
        "brier": examples["brier"].std() / 200**0.5,
        # DeLong's
        "auroc_total": (pairs.mean(1).var() / 200 + pairs.mean(0).var() / 200).sqrt(),
    }
    bnn, likelihood, x, y = gaussian
    numbers = evaluate(bnn, likelihood, [(x, y)], generator=seeded())
    squares = (numbers.examples["mean"] - y).square()
    exact["rmse"] = squares.std() / (2 * numbers["rmse"] * len(y) ** 0.5)
    rows = {row.metric: row.standard_error for row in (*numbers.rows, *found.rows)}
    for metric, error in exact.items():
        assert rows[metric] == pytest.approx(error.item(), rel=0.3), metric


def test_monte_carlo_errors(classes):
    """Those of smooth metrics to the first order, the others by repetition."""
    bnn, x, y = classes
    seed = int(torch.randint(2**63 - 1, (2,), generator=seeded())[0])
    predictive = Categorical().predictive(bnn, x, 100, generator=seeded(seed))
    mean, draws = predictive.probs, predictive.mixture.probs
    own = mean.gather(1, y[:, None]), draws.gather(2, y.expand(100, -1)[..., None])
    change = 2 * (mean - nn.functional.one_hot(y, 3))
    exact = {
        "nll": (own[1] / own[0]).mean((1, 2)).std() / 10,
        "brier": (change * draws).sum(2).mean(1).std() / 10,
    }
    found = [
        evaluate(bnn, Categorical(), [(x, y)], 100, ood=[2 * x], generator=seeded(seed))
        for seed in range(1, 19)
    ]
    for i, metric in enumerate(found[0]):
        errors = torch.tensor([e.rows[i].monte_carlo_error for e in found])
        error = errors.square().mean().sqrt()
        if metric in exact:
            assert errors[0] == pytest.approx(exact[metric].item(), rel=0.3), metric
        values = torch.tensor([e[metric] for e in found])
        assert 0.5 < error / values.std() < 2, metric


@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Categorical(), Bernoulli()])
def test_views_are_of_other_draws(likelihood):
    views = Bootstrap(20, replicates=3, seed=3)
    output, y = torch.randn(20, 6, 4, dtype=torch.double), torch.ones(6, 4)
    y = torch.ones(6).long() if isinstance(likelihood, Categorical) else y.double()

    def predict(chosen):
        return Predictive(likelihood.distribution(chosen, batch_dims=2))

    options = {"levels": (0.5,), "generator": seeded()}
    found = records.score(predict(output), y, views, **options)
    for view in range(views.views):
        other = predict(output[views.indices(view)])
        expected = {"log_prob": other.log_prob(y)}
        if isinstance(likelihood, Gaussian):
            parts = other.variance, other.aleatoric, other.epistemic
            expected |= {"mean": other.mean, "pit": other.cdf(y)}
        else:
            information = other.mutual_information
            parts = other.entropy, other.entropy - information, information
            likely = other.probs
            if isinstance(likelihood, Bernoulli):
                likely = torch.stack([1 - likely, likely], -1)
            expected["confidence"], expected["predicted"] = likely.max(-1)
        names = ("total", "aleatoric", "epistemic")
        sums = (part.reshape(6, -1).sum(1) for part in parts)
        for name, value in (expected | dict(zip(names, sums, strict=True))).items():
            torch.testing.assert_close(found[name][view], value)


@pytest.mark.parametrize(
    ("likelihood", "scale"), [(Gaussian(0.5), 1.0), (Poisson(), 0.3), (Poisson(), 1.0)]
)
def test_ends_of_intervals_move_as_other_draws_would_have_them(likelihood, scale):
    views = Bootstrap(100, replicates=4, seed=3)
    output = 1 + scale * torch.randn(100, 50, dtype=torch.double)

    def predict(chosen):
        return Predictive(likelihood.distribution(chosen, batch_dims=2))

    y = torch.ones(50, dtype=torch.double)
    found = score(predict(output), y, views, (0.3, 0.8), seeded())
    for level in (0.3, 0.8):
        ends = [predict(output[views.indices(v)]).interval(level) for v in range(views.views)]
        low, high = (torch.stack(side) for side in zip(*ends, strict=True))
        width, inside = found[f"width@{level}"], found[f"in@{level}"]
        error, move = (high - low - width).square().mean(), (high - low - width[0]).square().mean()
        assert (error / move).sqrt() < 0.35
        assert (inside == ((low <= y) & (y <= high))).double().mean() > 0.95
        assert (width[1:] - width[0]).square().mean() / move > 0.8


def test_ends_of_an_interval_of_one_count_move():
    views = Bootstrap(20, replicates=6, seed=3)
    output = torch.linspace(-0.5, 2.0, 300).double() + torch.randn(20, 300, dtype=torch.double)

    def predict(chosen):
        return Predictive(Poisson().distribution(chosen, batch_dims=2))

    y = predict(output).quantile(0.5)
    found = score(predict(output), y, views, (0.02,), seeded())["in@0.02"]
    ends = [predict(output[views.indices(v)]).interval(0.02) for v in range(views.views)]
    inside = torch.stack([(low <= y) & (y <= high) for low, high in ends])
    assert (inside[1:] != inside[0]).double().mean() > 0.1
    assert (found[1:] == inside[1:]).double().mean() > 0.9


# The pass


@pytest.mark.parametrize("name", ["Gaussian", "Categorical", "Poisson"])
def test_batches_are_as_one(name):
    case, x = CASES[name], torch.randn(12, 3, dtype=torch.double)
    bnn, y = BayesianModel(Base(case), init_logvar=-3.0), case.y(12)
    one, several = (
        evaluate(bnn, case.make(), loader(x, y, size=size), 30, ood=[3 * x], generator=seeded())
        for size in (12, 5)
    )
    for a, b in zip(one.rows, several.rows, strict=True):
        if name != "Poisson" or a.metric not in ("crps", "pit_deviation"):  # these are random
            assert a.value == pytest.approx(b.value, abs=1e-6)
            assert a.monte_carlo_error == pytest.approx(b.monte_carlo_error, abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 23])
def test_noise_of_one_scale_knows_nothing_of_other_data(gaussian, size):
    """All its variances are the same, whatever the batch, and ties are no order."""
    bnn, likelihood, x, y = gaussian
    found = evaluate(bnn, likelihood, loader(x, y, size=size), 30, ood=[3 * x, x[:5]])
    (row,) = (row for row in found.rows if row.metric == "auroc_aleatoric")
    assert (row.value, row.monte_carlo_error, row.standard_error) == (0.5, 0, 0)
    assert (found.examples["aleatoric"] == found.ood["aleatoric"][0]).all()


def test_seeds(gaussian):
    bnn, likelihood, x, y = gaussian

    def nll(generator=None):
        return evaluate(bnn, likelihood, [(x, y)], 10, generator=generator)["nll"]

    state = torch.get_rng_state()
    assert nll(seeded(1)) == nll(seeded(1)) != nll(seeded(2))
    generator = seeded()
    assert nll(generator) != nll(generator)
    assert torch.equal(state, torch.get_rng_state())
    first = nll()
    torch.set_rng_state(state)
    assert nll() == first


def test_whatever_predicts_is_evaluated(gaussian):
    bnn, likelihood, x, y = gaussian

    class Wrapper:
        base, parameters, predict = bnn.base, bnn.parameters, bnn.predict

    expected = evaluate(bnn, likelihood, [(x, y)], 5, ood=[x], generator=seeded())
    assert dict(evaluate(Wrapper(), likelihood, [(x, y)], 5, ood=[x], generator=seeded())) == dict(
        expected
    )


def test_base_is_in_evaluation_mode_and_given_back(gaussian):
    _, likelihood, x, y = gaussian
    base = Squeezed(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 1))
    base.net[2].eval()
    bnn = BayesianModel(base)
    modes = [module.training for module in base.modules()]
    values = [evaluate(bnn, likelihood, [(x, y)], 5, generator=seeded())["nll"] for _ in range(2)]
    assert values[0] == values[1]
    assert [module.training for module in base.modules()] == modes
    with pytest.raises(ValueError, match="Expected y"):
        evaluate(bnn, likelihood, [(x, y[:3])], 5)
    assert [module.training for module in base.modules()] == modes
    assert not any(p.grad is not None for p in bnn.parameters())


# What it returns


def test_the_table(gaussian, capsys):
    bnn, likelihood, x, y = gaussian
    found = evaluate(bnn, likelihood, loader(x, y), 10, levels=0.8, bins=3)
    assert isinstance(found, Evaluation)
    assert list(found) == [*NUMBERS, "coverage@0.8", "width@0.8"]
    assert dict(found) == {row.metric: row.value for row in found.rows}
    assert (len(found), found.num_examples, found.num_samples) == (6, 23, 10)
    assert found.ood == {}
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["value"] == found["nll"]
    with pytest.raises(KeyError, match=r"Expected one of nll, rmse.*; got 'accuracy'"):
        found["accuracy"]
    text = str(found)
    found.print()
    printed = capsys.readouterr().out
    for row in found.rows:
        assert row.metric in text
        assert f"{row.value:.4g}" in text
        assert f"{row.value:.4g}" in printed
        assert f"{row.monte_carlo_error:.2g}" in printed
        assert f"{row.standard_error:.2g}" in printed
    assert torch.equal(found.examples["y"], y)


def test_bins(gaussian):
    x, y = torch.randn(200, 3), torch.randint(3, (200,))
    bnn = BayesianModel(nn.Linear(3, 3), init_logvar=0.0)
    one, many = (
        evaluate(bnn, Categorical(), [(x, y)], 10, bins=bins, generator=seeded())
        for bins in (1, 100)
    )
    gap = (one.examples["confidence"].mean() - one["accuracy"]).abs().item()
    assert one["ece"] == pytest.approx(gap, abs=1e-6)
    assert one["adaptive_ece"] == pytest.approx(gap, abs=1e-6)
    assert many["ece"] > one["ece"]
    assert many["adaptive_ece"] > one["adaptive_ece"]


# What it refuses

LABELS = torch.tensor([0, 1, 2, 0, 3, 1])
ONES = torch.ones(6, 3)
BAD = {
    "no batch": (lambda e: e([]), ValueError, "loader to have at least one batch; got none"),
    "no examples": (lambda e: e([(ONES[:0], LABELS[:0])]), TypeError, r"least one; got \(0,\)"),
    "one example": (lambda e: e([(ONES[:1], LABELS[:1])]), ValueError, "2 examples; got 1"),
    "a pair": (lambda e: e((ONES, LABELS)), TypeError, "a pair .* got a Tensor"),
    "a tensor": (lambda e: e(ONES), TypeError, "pairs .* got Tensor"),
    "inputs alone": (lambda e: e([ONES]), TypeError, "a pair .* got a Tensor"),
    "labels": (lambda e: e([(ONES, LABELS % 3), (ONES, LABELS)]), ValueError,
               r"from 0 to 2; got 3 at index \(4,\).*batch 1 of loader"),
    "real labels": (lambda e: e([(ONES, LABELS.float())]), ValueError, r"y.long\(\)"),
    "fewer labels": (lambda e: e([(ONES, LABELS[:3])]), ValueError, r"shape \(6,\).* \(3,\)"),
    "nan in x": (lambda e: e([(ONES * torch.nan, LABELS % 3)]), ValueError, "x of batch 0"),
    "nan in ood": (lambda e: e(ood=[ONES, ONES * torch.nan]), ValueError,
                   "got nan.*batch 1 of ood"),
    "empty ood": (lambda e: e(ood=[]), ValueError, "ood to have at least one batch"),
    "ood, a tensor": (lambda e: e(ood=ONES), TypeError, r"Expected ood .*; got Tensor"),
    "draws": (lambda e: e(num_samples=1), ValueError, "num_samples .* at least 2; got 1"),
    "draws, real": (lambda e: e(num_samples=2.5), ValueError, "num_samples"),
    "level": (lambda e: e(levels=(0.5, 90)), ValueError, r"levels .*; got \(0.5, 90\)"),
    "levels alike": (lambda e: e(levels=(0.5, 0.5)), ValueError, "different numbers"),
    "bins": (lambda e: e(bins=0), ValueError, "bins .* at least 1; got 0"),
    "generator": (lambda e: e(generator=3), TypeError, "Generator; got int"),
    "model": (lambda e: evaluate(nn.Linear(3, 3), Categorical(), [(ONES, LABELS)]), TypeError,
              "bnn to be a BayesianModel; got Linear"),
    "likelihood": (lambda e: evaluate(BayesianModel(nn.Linear(3, 3)), nn.NLLLoss(), []), TypeError,
                   "likelihood to be a Likelihood; got NLLLoss"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, match = BAD[name]
    bnn = BayesianModel(nn.Linear(3, 3))

    def run(loader=((ONES, LABELS % 3),), **options):
        return evaluate(bnn, Categorical(), loader, **options)

    with pytest.raises(kind, match=match):
        call(run)


def test_predictions_that_are_no_numbers(gaussian):
    bnn, _, x, y = gaussian
    noise = Gaussian(0.3, learn=True)
    with torch.no_grad():
        noise.log_scale.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"got nan for example 0.*batch 0 of loader"):
        evaluate(bnn, noise, loader(x, y), 5)
    with torch.no_grad():
        bnn.base.net[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"got nan.*batch 0 of loader"):
        evaluate(bnn, Gaussian(0.3), loader(x, y), 5)


def test_information_of_equal_draws_is_never_below_zero():
    bnn = BayesianModel(nn.Linear(3, 10), init_logvar=-80.0)
    x, y = torch.randn(300, 3), torch.zeros(300).long()
    found = evaluate(bnn, Categorical(), [(x, y)], 8)
    assert (found.examples["epistemic"] >= 0).all()


def test_targets_without_a_mean_or_a_variance(gaussian):
    bnn, _, x, y = gaussian
    wide = evaluate(bnn, StudentT(0.3, df=2), [(x, y)], 8, ood=[x])
    assert wide.examples["aleatoric"].isinf().all()
    assert wide["auroc_aleatoric"] == 0.5
    cauchy = evaluate(bnn, StudentT(0.3, df=1), [(x, y)], 10)
    assert torch.tensor(cauchy["rmse"]).isnan()
    assert cauchy["coverage@0.9"] > 0


@pytest.mark.parametrize(("package", "extra"), [("torchmetrics", "metrics"), ("rich", "rich")])
def test_missing_packages_name_the_extra(package, extra, gaussian, monkeypatch):
    bnn, likelihood, x, y = gaussian
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'pyro_bayes\[{extra}\]'"):
        evaluate(bnn, likelihood, [(x, y)], 5).print()


@pytest.mark.parametrize("name", ["Gaussian", "Poisson", "Density"])
def test_no_levels(name):
    case = CASES[name]
    bnn, batches = BayesianModel(Base(case)), loader(torch.randn(6, 3).double(), case.y(6))
    found = evaluate(bnn, case.make(), batches, 5, levels=())
    assert list(found) == NUMBERS
