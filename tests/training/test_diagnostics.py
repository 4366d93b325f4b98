"""The signal of gradients, and what became of a posterior."""

import math

import pytest
import torch
from regression import NOISE_VAR, Problem
from torch import nn

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.priors import Empirical
from pyro_bayes.training import diagnose, fit
from pyro_bayes.training.diagnostics import silent

# Batch norm lets examples meet, which is said each time that a model is made.
pytestmark = pytest.mark.filterwarnings("ignore:Expected examples that do not meet")


def objective_of(problem, bnn):
    return ELBO(bnn, likelihoods.Gaussian(math.sqrt(NOISE_VAR)), len(problem.y))


def test_signal_is_that_of_the_known_gradient():
    """For linear regression, mean and variance of the gradient have closed forms."""
    problem = Problem.make()
    n = len(problem.y)
    bnn = problem.model()
    with torch.no_grad():
        bnn.means.weight.copy_(-problem.mean)
        bnn.logvars.weight.fill_(-1.0)
    data = [(problem.x, problem.y.unsqueeze(-1))]
    row = diagnose(objective_of(problem, bnn), data, 2000).rows[0]

    mean, logvar = (m.weight[0].detach() for m in (bnn.means, bnn.logvars))
    variance = logvar.exp()
    hessian = problem.x.T @ problem.x / NOISE_VAR / n  # of the negative log-likelihood
    gradient = problem.precision @ (mean - problem.mean) / n
    spread = (hessian.square() * variance).sum()
    assert row.signal_mean == pytest.approx(float(gradient.norm() / spread.sqrt()), abs=0.04)

    # d/d log σ² is ½ σ ε · (d/dθ) of the likelihood, and ½ (σ²/σ_p² - 1) / N of the divergence.
    expected = variance * problem.precision.diag() / n / 2 - 1 / n / 2
    slope = problem.x.T @ (problem.x @ mean - problem.y) / NOISE_VAR / n
    deviation = variance.sqrt()
    # Var(a ε + Σⱼ Bⱼ ε εⱼ) = a² + 2 Bᵢ² + Σ_{j≠i} Bⱼ²
    cross = deviation.unsqueeze(-1) * hessian * deviation / 2
    squares = (deviation * slope / 2).square() + cross.square().sum(1) + cross.diag().square()
    ratio = float(expected.norm() / squares.sum().sqrt())
    assert row.signal_logvar == pytest.approx(ratio, abs=0.04)


def test_signal_vanishes_at_the_optimum():
    """The mean of 20 gradients is not zero: its length is 0.22 of their deviation."""
    problem = Problem.make()
    objective = objective_of(problem, problem.optimum())
    data = [(problem.x, problem.y.unsqueeze(-1))]
    rows = [diagnose(objective, data, 20).rows[0] for _ in range(30)]
    assert sum(row.signal_mean for row in rows) / 30 < 0.14
    assert sum(row.signal_logvar for row in rows) / 30 < 0.14


def test_signal_counts_the_noise_of_batches():
    net = nn.Linear(1, 1, bias=False)
    bnn = BayesianModel(net, init_logvar=-60.0)
    objective = ELBO(bnn, likelihoods.Gaussian(1.0), 2)
    with torch.no_grad():
        bnn.means.weight.zero_()
    one = torch.ones(1, 1)
    batches = [(one, 3 * one), (one, one)]  # gradients -3 and -1
    row = diagnose(objective, batches, 400).rows[0]
    assert row.signal_mean == pytest.approx(2.0, rel=0.01)
    # Of two gradients, the variance is 2, and that of their mean 1.
    row = diagnose(objective, batches, 2).rows[0]
    assert row.signal_mean == pytest.approx(((4 - 1) / 2) ** 0.5, rel=0.02)


def parts():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    bnn = BayesianModel(net, init_logvar=-5.0, exclude_params=["1.weight", "1.bias"])
    objective = ELBO(bnn, likelihoods.Gaussian(1.0, learn=True), 16, local_trick=True)
    x = torch.randn(16, 3)
    return objective, [(x[:8], x[:8, :1]), (x[8:], x[8:, :1])]


def test_rows_and_totals():
    objective, batches = parts()
    model = objective.model
    with torch.no_grad():
        model.logvars.get_parameter("0.weight")[0] += 0.1
        model.logvars.get_parameter("2.bias").fill_(-4.99)
        model.logvars.get_parameter("2.weight")[0, 0] -= 0.025
    diagnosis = diagnose(objective, batches)
    rows = {row.parameter: row for row in diagnosis.rows}
    assert list(rows) == [
        *("0.weight", "0.bias", "2.weight", "2.bias"),
        *("1.weight", "1.bias", "likelihood.log_scale"),
    ]
    assert rows["0.weight"].unmoved == 0.75
    assert rows["2.bias"].unmoved == 1.0  # by half a percent only
    assert rows["2.weight"].unmoved == 0.75  # by more than a percent
    assert diagnosis.unmoved == pytest.approx(1 - 4 / 21)
    assert rows["1.bias"].unmoved is rows["1.bias"].kl is rows["1.bias"].signal_logvar is None
    assert rows["likelihood.log_scale"].signal_mean > 0
    kl = float(model.kl_divergence().detach())
    assert diagnosis.kl == pytest.approx(kl)
    assert sum(row.kl for row in diagnosis.rows if row.kl) == pytest.approx(kl)
    lines = str(diagnosis).splitlines()
    assert len(lines) == 1 + 7 + 1 + 1
    assert lines[1].split()[0] == "0.weight"
    assert lines[1].split()[3] == "75%"
    assert f"{kl:.4g} nats against N = 16, {kl / 16:.4g} per datum" in lines[-2]
    assert "init_logvar=-5" in lines[-1]


@pytest.mark.parametrize(("init_logvar", "nearer"), [(-9.0, True), (-5.0, False), (-3.0, False)])
def test_advice_to_start_nearer_is_for_those_who_start_far(init_logvar, nearer):
    bnn = BayesianModel(nn.Linear(1, 1), init_logvar=init_logvar)
    objective = ELBO(bnn, likelihoods.Gaussian(1.0), 2)
    (advice,) = diagnose(objective, [(torch.ones(2, 1), torch.ones(2, 1))], 2).advice
    assert ("start nearer, as BayesianModel(net, init_logvar=-5.0)" in advice) is nearer


def test_it_leaves_no_trace():
    objective, batches = parts()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        diagnose(objective, batches, 5)
    assert torch.equal(random, torch.get_rng_state())
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in objective.parameters())


def test_advice():
    objective, batches = parts()
    assert "100% of the posterior's deviations" in diagnose(objective, batches, 2).advice[0]
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    fit(objective, batches, 30, optimizer=optimizer)
    assert diagnose(objective, batches, 2).advice == ()
    with torch.no_grad():
        for mean, logvar in objective.model.guide.posterior().values():
            mean.zero_()
            logvar.zero_()
    advice = diagnose(objective, batches, 2).advice
    assert len(advice) == 1
    assert "The posterior is the prior" in advice[0]


def test_what_is_silent():
    """The bound on signal-to-noise of an output, and what is left out."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    bnn = BayesianModel(net, init_logvar=0.0)
    with torch.no_grad():
        for mean, logvar in bnn.guide.posterior().values():
            mean.zero_()
            logvar.fill_(-2.0)
        bnn.means.get_parameter("0.weight")[1] = 0.49 * math.exp(-1)  # 4 * 0.49² < 1
    assert silent(bnn) == ("0.weight",)  # the rest has one dimension, or few elements
    x = torch.tensor([1.0, 2.0, -1.0, 0.0])
    mean, logvar = bnn.guide.posterior()["0.weight"]
    with torch.no_grad():
        assert ((mean @ x) ** 2 < logvar.exp() @ x**2).all()
        bnn.means.get_parameter("0.weight")[1] = 0.51 * math.exp(-1)
    assert silent(bnn) == ()


def two_layers(prior_var, init_logvar):
    """A problem that a network learns quickly, unless its prior is too narrow."""
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    bnn = BayesianModel(net, init_logvar=init_logvar, prior_var=prior_var)
    objective = ELBO(bnn, likelihoods.Gaussian(0.3), 32, local_trick=True)
    return objective, [(x, x[:, :1].sin())]


def trained(objective, batches, epochs=64):
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    fit(objective, batches, epochs, optimizer=optimizer)


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_a_prior_silences_are_named_once(first):
    dead = "0.weight" if first else "2.weight"
    objective, batches = two_layers({dead: 1e-5, "": 1.0}, -5.0)
    with pytest.warns(UserWarning, match="collapsed") as records:
        trained(objective, batches)
    (message,) = [str(r.message) for r in records if "collapsed" in str(r.message)]
    assert f"'{dead}'" in message
    assert message.startswith("After ")
    assert "prior_var=1" in message
    assert records[0].filename == __file__
    advice = diagnose(objective, batches, 2).advice
    assert any("has collapsed" in text and f"'{dead}'" in text for text in advice)


@pytest.mark.parametrize("prior_var", [1.0, 0.1, "empirical", Empirical(each=0)])
@pytest.mark.parametrize("init_logvar", [-9.0, -3.0])
def test_networks_that_learn_are_not_said_to_collapse(prior_var, init_logvar, recwarn):
    objective, batches = two_layers(prior_var, init_logvar)
    trained(objective, batches)
    assert not [r for r in recwarn if "collapsed" in str(r.message)]
    assert silent(objective.model) == ()


@pytest.mark.parametrize("count", [1, 2.0, True])
def test_number_of_gradients(count):
    with pytest.raises(ValueError, match="num_gradients to be an integer of at least 2"):
        diagnose(*parts(), count)


def test_data_that_are_not_finite():
    objective, _ = parts()
    with pytest.raises(ValueError, match="x of batch 0 of loader to be finite"):
        diagnose(objective, [(torch.full((2, 3), math.nan), torch.zeros(2, 1))])
