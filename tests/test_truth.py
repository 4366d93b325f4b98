"""The posterior against exact Bayesian linear regression."""

import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from regression import Problem

FRONT_ENDS = ["facade", "local", "svi", "mean_field"]
GAMMA = 0.998


@pytest.fixture(scope="module")
def problem():
    """With a prior that differs by element, and is strong enough to be seen in the posterior."""
    return Problem.make(prior_mean=(0.0, -0.5, 1.0), prior_var=(2.0, 0.2, 0.1))


def make_loss(problem, bnn, front_end):
    """Returns a function that gives a differentiable negative ELBO of one draw."""
    if front_end in ("facade", "local"):
        return lambda: problem.loss(bnn, local_trick=front_end == "local")
    elbo = Trace_ELBO() if front_end == "svi" else TraceMeanField_ELBO()
    return lambda: elbo.differentiable_loss(problem.pyro_model(bnn), bnn.guide)


def gradient_z(problem, bnn, front_end, draws=500):
    """Returns the mean gradient over its standard error, for μ and log σ²."""
    loss = make_loss(problem, bnn, front_end)
    parameters = list(bnn.parameters())
    grads = torch.stack(
        [torch.cat([*torch.autograd.grad(loss(), parameters)]) for _ in range(draws)]
    )
    return grads.mean(0) / (grads.std(0) / draws**0.5).clamp_min(1e-9)


@pytest.mark.parametrize("front_end", ["facade", "local"])
def test_facade_converges_to_the_optimum(problem, front_end):
    bnn = problem.model()
    optimizer = torch.optim.Adam(bnn.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
    loss = make_loss(problem, bnn, front_end)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()

    check_convergence(problem, bnn, step)


def test_svi_converges_to_the_optimum(problem):
    bnn = problem.model()
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": GAMMA}
    )
    svi = SVI(problem.pyro_model(bnn), bnn.guide, optimizer, Trace_ELBO())

    def step():
        svi.step()
        optimizer.step()

    check_convergence(problem, bnn, step)


def check_convergence(problem, bnn, step, steps=2500, burn_in=500):
    """Compares the average of the iterates with the optimum.

    The average of 2000 noisy iterates has a standard error of about 1/√2000, 2.5% of a deviation in
    the means and 2.5% of the variances (seen so over seeds); three of them are allowed.
    """
    means, logvars = [], []
    for i in range(steps):
        step()
        if i >= burn_in:
            means.append(bnn.means.weight.detach()[0].clone())
            logvars.append(bnn.logvars.weight.detach()[0].clone())
    error = (torch.stack(means).mean(0) - problem.mean) / problem.variance.sqrt()
    assert error.abs().max() < 0.075
    variance = torch.stack(logvars).mean(0).exp()
    torch.testing.assert_close(variance, problem.variance, rtol=0.075, atol=0)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_expected_gradient_is_zero_at_the_optimum_only(problem, front_end):
    bnn = problem.optimum()
    assert gradient_z(problem, bnn, front_end).abs().max() < 4
    with torch.no_grad():
        bnn.means.weight.add_(problem.variance.sqrt())
        bnn.logvars.weight.add_(1.0)
    assert gradient_z(problem, bnn, front_end).abs().min() > 4


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_elbo_equals_its_closed_form(problem, front_end):
    bnn = problem.optimum()
    with torch.no_grad():
        bnn.means.weight.add_(0.1)
        bnn.logvars.weight.add_(torch.tensor([0.5, -1.0, 0.0]))
        exact = problem.elbo(bnn.means.weight[0], bnn.logvars.weight[0].exp())
        loss = make_loss(problem, bnn, front_end)
        losses = torch.stack([loss() for _ in range(500)])
    assert abs(-losses.mean() - exact) < 4 * losses.std() / len(losses) ** 0.5
    assert losses.std() < 5  # so that the bound above means something


def test_mean_of_nuts_is_the_mean_of_the_posterior(problem):
    bnn = problem.model()
    mcmc = MCMC(
        NUTS(problem.pyro_model(bnn)), num_samples=150, warmup_steps=80, disable_progbar=True
    )
    mcmc.run()
    draws = mcmc.get_samples()["weight"][:, 0]
    exact = torch.linalg.inv(problem.precision)
    # NUTS draws are close to independent here: five standard errors of 100 of them.
    assert ((draws.mean(0) - problem.mean).abs() < 5 * exact.diag().sqrt() / 10).all()
    torch.testing.assert_close(draws.T.cov(), exact, rtol=0.6, atol=0.4 * exact.diag().max().item())
