"""Exports to ArviZ: against the model, and through ArviZ's own summary, plots and scores."""

import math
import sys

import numpy as np
import pytest
import torch
from likelihood_cases import CASES, Base
from torch import nn
from torch.func import functional_call

from pyro_bayes import BayesianModel
from pyro_bayes.evaluation import to_arviz
from pyro_bayes.likelihoods import Categorical, Gaussian

az = pytest.importorskip("arviz")

plots = pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def bnn():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return BayesianModel(net, init_logvar=-3.0, exclude_params="0.bias")


@pytest.fixture
def data():
    return torch.randn(11, 3), torch.randn(11, 2)


def export(bnn, data, likelihood=None, **options):
    x, y = data
    loader = list(zip(x.split(4), y.split(4), strict=True))
    return to_arviz(bnn, 60, likelihood=likelihood or Gaussian(0.5), loader=loader, **options)


def test_posterior_alone(bnn):
    found = to_arviz(bnn, 400, generator=seeded())["posterior"]
    assert list(found.data_vars) == ["0.weight", "2.weight", "2.bias"]
    assert found["0.weight"].dims == ("chain", "draw", "0.weight_dim_0", "0.weight_dim_1")
    assert found["0.weight"].shape == (1, 400, 4, 3)
    for name, (mean, logvar) in bnn.guide.posterior().items():
        draws, scale = torch.from_numpy(found[name].values[0]), (0.5 * logvar).exp()
        assert ((draws.mean(0) - mean).abs() < 4 * scale / 20).all()
        torch.testing.assert_close(draws.std(0), scale.detach(), rtol=0.2, atol=0)
    assert found.attrs["inference_library"] == "pyro_bayes"


def test_frozen_parameters_that_a_pattern_named():
    net = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)).requires_grad_(False)
    found = to_arviz(BayesianModel(net, include_params="1."), 3)["posterior"]
    assert list(found.data_vars) == ["1.weight", "1.bias"]


def test_groups_share_draws(bnn, data):
    x, y = data
    found = export(bnn, data, generator=seeded())
    assert found["log_likelihood"]["y"].dims == ("chain", "draw", "example")
    assert found["posterior_predictive"]["y"].shape == (1, 60, 11, 2)
    np.testing.assert_array_equal(found["observed_data"]["y"].values, y.numpy())
    posterior = found["posterior"]
    for s in (0, 17, 59):
        draw = {name: torch.from_numpy(posterior[name].values[0, s]) for name in posterior}
        noise = torch.distributions.Normal(functional_call(bnn.base, draw, x), 0.5)
        torch.testing.assert_close(
            torch.from_numpy(found["log_likelihood"]["y"].values[0, s]), noise.log_prob(y).sum(1)
        )
        z = (torch.from_numpy(found["posterior_predictive"]["y"].values[0, s]) - noise.mean) / 0.5
        assert z.abs().max() < 5
        assert z.std() > 0.5


@pytest.mark.parametrize("name", CASES)
def test_every_likelihood(name):
    case, x = CASES[name], torch.randn(6, 3, dtype=torch.double)
    bnn, y = BayesianModel(Base(case), init_logvar=-3.0), case.y(6)
    found = to_arviz(bnn, 5, likelihood=case.make(), loader=[(x, y)], generator=seeded())
    assert found["log_likelihood"]["y"].shape == (1, 5, 6)
    assert found["posterior_predictive"]["y"].shape == (1, 5, *y.shape)
    assert found["posterior_predictive"]["y"].dtype == found["observed_data"]["y"].dtype
    posterior, likelihood = found["posterior"], case.make()
    draw = {key: torch.from_numpy(posterior[key].values[0, 3]) for key in posterior}
    expected = likelihood.log_prob(functional_call(bnn.base, draw, x), y).detach()
    torch.testing.assert_close(
        torch.from_numpy(found["log_likelihood"]["y"].values[0, 3]), expected
    )


def test_summary(bnn, data):
    found = az.summary(export(bnn, data))
    assert len(found) == sum(mean.numel() for mean, _ in bnn.guide.posterior().values())
    mean = bnn.base[2].weight[1, 2].item()
    assert float(found.loc["2.weight[1, 2]", "mean"]) == pytest.approx(mean, abs=0.2)


def test_leave_one_out():
    """A mean under a flat prior, whose posterior is exact."""
    bnn = BayesianModel(nn.Linear(1, 1), include_params="bias")
    x, y = torch.randn(200, 1), torch.randn(200, 1)
    rest = y - (x * bnn.base.weight).detach()
    with torch.no_grad():
        bnn.base.bias.copy_(rest.mean(0))
        bnn.logvars.bias.fill_(-math.log(200))
    found = az.loo(to_arviz(bnn, 2000, likelihood=Gaussian(1.0), loader=[(x, y)]))
    others = (rest.sum() - rest) / 199
    exact = torch.distributions.Normal(others, (1 + 1 / 199) ** 0.5).log_prob(rest).sum().item()
    elpd = found.elpd_loo if hasattr(found, "elpd_loo") else found.elpd
    assert float(elpd) == pytest.approx(exact, abs=0.1)


@plots
def test_plots(bnn, data):
    found = export(bnn, data)
    assert az.plot_forest(found, var_names=["2.bias"], backend="matplotlib") is not None


def test_patterns(bnn):
    found = to_arviz(bnn, 5, include_params=["2.b", "0"])["posterior"]
    assert list(found.data_vars) == ["0.weight", "2.bias"]


def test_seeds_and_modes(bnn, data):
    state = torch.get_rng_state()
    one, two, other = (export(bnn, data, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert bnn.base.training
    for group, same in (("posterior", "2.bias"), ("posterior_predictive", "y")):
        values = [found[group][same].values for found in (one, two, other)]
        assert (values[0] == values[1]).all()
        assert (values[0] != values[2]).any()


def test_half_precision():
    bnn = BayesianModel(nn.Linear(3, 2, dtype=torch.bfloat16))
    assert to_arviz(bnn, 5)["posterior"]["weight"].dtype == np.float32
    x, y = torch.randn(4, 3).bfloat16(), torch.randn(4, 2).bfloat16()
    found = to_arviz(bnn, 5, likelihood=Gaussian(1.0), loader=[(x, y)])
    np.testing.assert_array_equal(found["observed_data"]["y"].values, y.float().numpy())


BAD = {
    "a likelihood alone": (lambda bnn, pair: to_arviz(bnn, likelihood=Gaussian(1.0)), ValueError,
                           "likelihood and loader together; got no loader"),
    "a loader alone": (lambda bnn, pair: to_arviz(bnn, loader=[pair]), ValueError,
                       "got no likelihood"),
    "no likelihood": (lambda bnn, pair: to_arviz(bnn, likelihood=3, loader=[pair]), TypeError,
                      "likelihood to be a Likelihood; got int"),
    "shapes": (lambda bnn, pair: to_arviz(bnn, 5, likelihood=Categorical(), loader=[pair]),
               ValueError, r"\(11, 2\).*batch 0 of loader"),
    "no batch": (lambda bnn, pair: to_arviz(bnn, 5, likelihood=Gaussian(1.0), loader=[]),
                 ValueError, "at least one batch"),
    "pattern": (lambda bnn, pair: to_arviz(bnn, 5, include_params="nope"), ValueError, "nope"),
    "deterministic": (lambda bnn, pair: to_arviz(bnn, 5, include_params="0.bias"), ValueError,
                      "Bayesian parameters; got '0.bias'"),
    "draws": (lambda bnn, pair: to_arviz(bnn, 1), ValueError, "at least 2; got 1"),
    "model": (lambda bnn, pair: to_arviz(bnn.base), TypeError, "got Sequential"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, bnn, data):
    call, kind, match = BAD[name]
    with pytest.raises(kind, match=match):
        call(bnn, data)


def test_missing_arviz_names_the_extra(bnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_bayes\[arviz\]'"):
        to_arviz(bnn)
