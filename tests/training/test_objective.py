"""The ELBO of both front ends, against each other and against closed forms."""

import copy
import gc
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import zuko
from likelihood_cases import CASES, Base
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from regression import NOISE_VAR, Problem
from torch import nn

from pyro_bayes import ELBO, BayesianModel, svi_model
from pyro_bayes.likelihoods import (
    Categorical,
    Density,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
)
from pyro_bayes.training.schedule import LinearWarmup, Schedule

N, B = 30, 12
ESTIMATORS = [False, True, "flipout"]
every_estimator = pytest.mark.parametrize("local_trick", ESTIMATORS)


@pytest.fixture
def bnn(net):
    return BayesianModel(net, init_logvar=-2.0, prior_var=0.5)


def losses(objective, x, y, seed=3, elbo=Trace_ELBO):
    """The losses of both front ends with the same noise, and their gradients."""
    parameters = list(objective.parameters())
    torch.manual_seed(seed)
    loss = objective(x, y)
    model = svi_model(objective.model, objective.likelihood, objective.num_data)
    guide = objective.model.exact_kl(objective.local_trick)
    torch.manual_seed(seed)
    bound = elbo(num_particles=objective.num_samples)
    svi_loss = bound.differentiable_loss(model, guide, x, y) / objective.num_data
    return (loss, *torch.autograd.grad(loss, parameters)), (
        svi_loss, *torch.autograd.grad(svi_loss, parameters)
    )  # fmt: skip


@every_estimator
@pytest.mark.parametrize("num_data", [B, N], ids=["full batch", "minibatch"])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_front_ends_agree_on_the_same_noise(
    bnn, data, local_trick, num_data, num_samples, learn, elbo
):
    objective = ELBO(
        bnn, Gaussian(0.5, learn=learn), num_data, local_trick=local_trick, num_samples=num_samples
    )
    facade, svi = losses(objective, *data, elbo=elbo)
    torch.testing.assert_close(facade, svi, rtol=1e-5, atol=1e-5)
    assert len(facade) == 1 + 2 + learn


@every_estimator
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_front_ends_agree_for_every_likelihood(case, local_trick):
    bnn = BayesianModel(Base(case), init_logvar=-2.0)
    objective = ELBO(bnn, case.make(), N, local_trick=local_trick)
    facade, svi = losses(objective, torch.randn(B, 3, dtype=torch.double), case.y(B))
    torch.testing.assert_close(facade, svi, rtol=1e-5, atol=1e-5)


@every_estimator
def test_front_ends_agree_for_flows(local_trick):
    flow = zuko.flows.NSF(features=2, context=3, transforms=1, hidden_features=[8])
    objective = ELBO(BayesianModel(flow), Density(), N, local_trick=local_trick)
    facade, svi = losses(objective, torch.randn(B, 3), torch.randn(B, 2))
    torch.testing.assert_close(facade, svi, rtol=1e-4, atol=1e-5)


class OneScale(nn.Module):
    """A network that returns one of its parameters, for all examples."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(3, 1)
        self.raw = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.mean(x), self.raw.expand(len(x), 1)


@every_estimator
def test_front_ends_agree_for_outputs_that_are_parameters(data, local_trick):
    objective = ELBO(
        BayesianModel(OneScale(), init_logvar=-2.0), HeteroscedasticGaussian(), N,
        local_trick=local_trick,
    )  # fmt: skip
    facade, svi = losses(objective, *data)
    torch.testing.assert_close(facade, svi, rtol=1e-5, atol=1e-5)


def test_half_precision_is_for_the_network_only(bnn, data):
    objective = ELBO(bnn, Gaussian(0.5), N)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(*data)
    loss.backward()
    torch.manual_seed(3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(*data).item(), rel=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch reads it itself
def test_compiled_loss_is_the_same(bnn, data):
    torch.compiler.reset()
    objective = ELBO(bnn, Gaussian(0.5), N)
    torch.manual_seed(3)
    loss = objective(*data)
    torch.manual_seed(3)
    compiled = torch.compile(objective, backend="eager")
    torch.testing.assert_close(compiled(*data), loss)


@every_estimator
def test_loss_is_what_the_formula_says(bnn, data, local_trick):
    x, y = data
    objective = ELBO(bnn, Gaussian(0.5), N, local_trick=local_trick, num_samples=2, kl_weight=0.3)
    torch.manual_seed(3)
    terms = objective.terms(x, y)
    torch.manual_seed(3)
    nll = torch.zeros(())
    for _ in range(2):
        with bnn.reparameterize(local_trick) as net:
            nll -= torch.distributions.Normal(net(x), 0.5).log_prob(y).sum() / (2 * B)
    torch.testing.assert_close(terms.nll, nll)
    torch.testing.assert_close(terms.kl, bnn.kl_divergence() / N)
    torch.manual_seed(3)
    torch.testing.assert_close(objective(x, y), nll + 0.3 * bnn.kl_divergence() / N)


def test_minibatches_have_the_loss_of_all_data_on_average(bnn, data):
    x, y = data
    objective = ELBO(bnn, Gaussian(0.5), B)
    parts = []
    for batch in torch.arange(B).split(3):
        torch.manual_seed(3)
        parts.append(objective(x[batch], y[batch]))
    torch.manual_seed(3)
    torch.testing.assert_close(torch.stack(parts).mean(), objective(x, y))


def test_front_ends_train_alike(net, data):
    x, y = data
    objective = ELBO(BayesianModel(net, init_logvar=-2.0), Gaussian(1.0, learn=True), N)
    other = copy.deepcopy(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-2)
    svi = SVI(
        svi_model(other.model, other.likelihood, N), other.model.exact_kl(),
        pyro.optim.SGD({"lr": 1e-2 / N}), Trace_ELBO(),
    )  # fmt: skip
    start = objective.likelihood.scale.item()
    for step in range(10):
        optimizer.zero_grad()
        torch.manual_seed(step)
        objective(x, y).backward()
        optimizer.step()
        torch.manual_seed(step)
        svi.step(x, y)
    for (name, a), (_, b) in zip(
        objective.named_parameters(), other.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert objective.likelihood.scale.item() != pytest.approx(start, abs=1e-3)


def test_parameters_are_those_that_may_train(net):
    bnn = BayesianModel(net, exclude_params="0.bias")
    objective = ELBO(bnn, Gaussian(1.0, learn=True), N, kl_weight=LinearWarmup(3))
    names = [name for name, _ in objective.named_parameters("objective")]
    assert names == [
        "objective.model.base.0.bias",
        "objective.model.guide.mean",
        "objective.model.guide.logvar",
        "objective.likelihood.log_scale",
    ]  # fmt: skip
    assert all(parameter.requires_grad for parameter in objective.parameters())
    fresh = ELBO(BayesianModel(copy.deepcopy(net), exclude_params="0.bias"),
                 Gaussian(2.0, learn=True), N, kl_weight=LinearWarmup(3))  # fmt: skip
    objective.step()
    fresh.load_state_dict(objective.state_dict())
    assert fresh.likelihood.scale == 1
    assert fresh.weight == objective.weight == 1 / torch.tensor(3)


@pytest.mark.parametrize(
    "x", [lambda x: x, lambda x: (x,), lambda x: {"input": x}], ids=["tensor", "tuple", "mapping"]
)
def test_inputs_are_tensors_tuples_or_mappings(data, x):
    bnn = BayesianModel(nn.Linear(3, 1))
    features, y = data
    torch.manual_seed(3)
    expected = ELBO(bnn, Gaussian(1.0), N)(features, y)
    facade, svi = losses(ELBO(bnn, Gaussian(1.0), N), x(features), y)
    assert facade[0] == expected
    torch.testing.assert_close(svi[0], expected)


def test_inputs_with_time_first():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x).mean(0)

    bnn, x, y = BayesianModel(Net(), init_logvar=-2.0), torch.randn(4, B, 3), torch.randn(B, 2)
    objective = ELBO(bnn, Gaussian(1.0), N, local_trick="flipout", batch_dim=1)
    torch.manual_seed(3)
    loss = objective(x, y)
    torch.manual_seed(3)
    with bnn.reparameterize("flipout", batch_dim=1) as net:
        nll = -Gaussian(1.0).log_prob(net(x), y).mean()
    torch.testing.assert_close(loss, nll + bnn.kl_divergence() / N)


# The weight of the divergence


def test_warmup_rises_from_zero_to_one_and_stays():
    warmup, weights = LinearWarmup(4), []
    for _ in range(6):
        weights.append(warmup.weight.item())
        warmup.step()
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1]
    assert warmup.count == 6


def test_counts_may_be_of_numpy(bnn):
    steps = np.int64(2)
    objective = ELBO(bnn, Gaussian(0.5), steps, num_samples=steps, kl_weight=LinearWarmup(steps))
    assert type(objective.num_data) is type(objective.kl_weight.steps) is int


def test_schedule_weighs_the_divergence(bnn, data):
    objective = ELBO(bnn, Gaussian(0.5), N, kl_weight=LinearWarmup(2))
    for weight in (0.0, 0.5, 1.0, 1.0):
        torch.manual_seed(3)
        nll, kl = objective.terms(*data)
        torch.manual_seed(3)
        torch.testing.assert_close(objective(*data), nll + weight * kl)
        torch.testing.assert_close(kl, bnn.kl_divergence() / N)
        objective.step()


def test_a_number_does_not_change(bnn):
    objective = ELBO(bnn, Gaussian(0.5), N, kl_weight=0.5)
    objective.step()
    assert objective.weight == 0.5


class Cycle(Schedule):
    @property
    def weight(self):
        return (self.count % 2).float()


def test_other_schedules(bnn):
    objective = ELBO(bnn, Gaussian(0.5), N, kl_weight=Cycle())
    objective.step()
    assert objective.weight == 1


# Pyro


def test_targets_are_sampled_without_y(data):
    x, _ = data
    bnn = BayesianModel(nn.Linear(3, 2), init_logvar=-2.0)
    model = svi_model(bnn, Gaussian(torch.tensor([0.1, 5.0]), learn=True), 4)
    for parallel in (False, True):
        draws = Predictive(model, guide=bnn.guide, num_samples=200, parallel=parallel)(x)["y"]
        assert draws.shape == (200, B, 2)
        error = draws - bnn.base(x)
        assert error[..., 1].std() > 3 > error[..., 0].std()
    labels = Predictive(
        svi_model(bnn, Categorical(), N), guide=bnn.guide, num_samples=50, parallel=True
    )(x)["y"]
    assert labels.shape == (50, B)


def test_vectorized_particles_have_the_same_expectation(bnn, data):
    model = svi_model(bnn, Gaussian(torch.tensor([0.5]), learn=True), N)
    found = []
    for elbo in (
        Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(num_particles=400),
    ):
        with torch.no_grad():
            found.append(elbo.loss(model, bnn.exact_kl(), *data))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_handlers_reach_what_the_likelihood_learns(bnn, data):
    likelihood = Gaussian(1.0, learn=True)
    model = svi_model(bnn, likelihood, N)
    value = torch.tensor(2.0).log()
    fixed = poutine.substitute(model, data={"Gaussian.likelihood.log_scale": value})
    trace = poutine.trace(fixed).get_trace(*data)
    torch.testing.assert_close(trace.nodes["y"]["fn"].base_dist.scale.unique(), torch.tensor([2.0]))
    assert likelihood.scale == 1
    assert isinstance(likelihood.log_scale, nn.Parameter)


def scales():
    store = pyro.get_param_store()
    return {name: store[name].exp().item() for name in store if name.endswith("log_scale")}


def test_param_store_holds_the_parameters_themselves(bnn, data):
    likelihood = Gaussian(0.5, learn=True)
    svi = SVI(svi_model(bnn, likelihood, N), bnn.guide, pyro.optim.SGD({"lr": 1e-4}), Trace_ELBO())
    for _ in range(2):
        svi.step(*data)
        assert scales() == {"Gaussian.likelihood.log_scale": likelihood.scale.item()}
        assert likelihood.scale != 0.5
        pyro.clear_param_store()


def test_likelihoods_do_not_share_what_they_learn(data):
    def fresh(scale):
        bnn = BayesianModel(nn.Linear(3, 1))
        return svi_model(bnn, Gaussian(scale, learn=True), N)

    first, second = fresh(1.0), fresh(2.0)
    poutine.trace(first).get_trace(*data)
    poutine.trace(second).get_trace(*data)
    assert scales() == {
        "Gaussian.likelihood.log_scale": 1.0,
        "Gaussian_1.likelihood.log_scale": pytest.approx(2.0),
    }
    # What a former owner of the name left is not taken for the new one's.
    del first, second
    gc.collect()
    poutine.trace(fresh(3.0)).get_trace(*data)
    assert scales()["Gaussian.likelihood.log_scale"] == pytest.approx(3.0)


def test_one_likelihood_of_two_models_is_one_parameter(data):
    likelihood = Gaussian(1.0, learn=True)
    for _ in range(2):
        model = svi_model(BayesianModel(nn.Linear(3, 1)), likelihood, N)
        poutine.trace(model).get_trace(*data)
    assert scales() == {"Gaussian.likelihood.log_scale": 1.0}


def test_values_that_were_loaded_into_the_store_arrive(bnn, data, tmp_path):
    likelihood = Gaussian(1.0, learn=True)
    model = svi_model(bnn, likelihood, N)
    poutine.trace(model).get_trace(*data)
    pyro.get_param_store().save(tmp_path / "params")
    with torch.no_grad():
        likelihood.log_scale.fill_(7.0)
    parameter = likelihood.log_scale
    pyro.get_param_store().load(tmp_path / "params")
    poutine.trace(model).get_trace(*data)
    assert likelihood.log_scale is parameter
    assert likelihood.scale == 1


def test_a_fixed_likelihood_leaves_the_store_alone(bnn, data):
    poutine.trace(svi_model(bnn, Gaussian(1.0), N)).get_trace(*data)
    assert scales() == {}


# The truth


def optimum_with_learned_noise(problem):
    """The fixed point of the best mean-field posterior and the noise that maximises its ELBO."""
    variance = torch.tensor(1.0, dtype=torch.double)
    for _ in range(200):
        precision = problem.x.T @ problem.x / variance + torch.eye(3).double() / 2.0
        mean = torch.linalg.solve(precision, problem.x.T @ problem.y / variance)
        squares = (problem.y - problem.x @ mean).square().sum()
        squares = squares + (problem.x.square() @ (1 / precision.diag())).sum()
        variance = squares / len(problem.y)
    return mean, 1 / precision.diag(), variance.sqrt()


def train(objective, problem, steps=1200, batch=None):
    """Averages the last 800 iterates."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    sums = [torch.zeros_like(p) for p in objective.parameters()]
    for step in range(steps):
        optimizer.zero_grad()
        index = torch.randperm(len(problem.y))[:batch]
        objective(problem.x[index], problem.y[index]).backward()
        optimizer.step()
        schedule.step()
        for total, parameter in zip(sums, objective.parameters(), strict=True):
            total += parameter.detach() * (step >= steps - 800) / 800
    return [total.squeeze() for total in sums]


class Squeezed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


def model(problem):
    net = Squeezed(nn.Linear(3, 1, bias=False, dtype=torch.double))
    return BayesianModel(net, init_logvar=-4.0, prior_var=2.0)


@pytest.mark.parametrize("batch", [None, 20], ids=["full batch", "minibatch"])
def test_posterior_is_the_mean_field_optimum(batch):
    problem = Problem.make()
    objective = ELBO(model(problem), Gaussian(NOISE_VAR**0.5), len(problem.y), local_trick=True)
    mean, logvar = train(objective, problem, batch=batch)
    assert ((mean - problem.mean) / problem.variance.sqrt()).abs().max() < 0.15
    torch.testing.assert_close(logvar.exp(), problem.variance, rtol=0.15, atol=0)


def test_learned_noise_is_the_one_that_maximises_the_elbo():
    problem = Problem.make()
    mean, variance, scale = optimum_with_learned_noise(problem)
    likelihood = Gaussian(2.0, learn=True)
    objective = ELBO(model(problem), likelihood, len(problem.y), local_trick=True)
    found, logvar, log_scale = train(objective, problem)
    assert ((found - mean) / variance.sqrt()).abs().max() < 0.05
    torch.testing.assert_close(logvar.exp(), variance, rtol=0.15, atol=0)
    assert log_scale.exp().item() == pytest.approx(scale.item(), rel=0.01)
    assert scale.item() == pytest.approx(NOISE_VAR**0.5, rel=0.15)  # the truth, of 40 points


def test_svi_models_are_pickled_for_spawned_chains(bnn, data):
    model = svi_model(bnn, Gaussian(0.3, learn=True), N)
    copied = pickle.loads(pickle.dumps(model))
    torch.manual_seed(1)
    expected = poutine.trace(model).get_trace(*data).log_prob_sum()
    torch.manual_seed(1)
    trace = poutine.trace(copied).get_trace(*data)
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    assert trace.nodes["y"]["scale"] == N / len(data[1])


# Errors


class Reduced(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value).mean()


class Reducing(Likelihood):
    def distribution(self, output, *, batch_dims=1):
        return Reduced(output.squeeze(-1), 1.0)


class Overriding(Gaussian):
    def log_prob(self, output, y):
        return 2 * super().log_prob(output, y)


class Sampling(Gaussian):
    def sample(self, name, output, y=None, *, batch_dims=1):
        return super().sample(name, output, 2 * y, batch_dims=batch_dims)


LOSSES = {
    "MSELoss": (nn.MSELoss(), "Gaussian"),
    "mse_loss": (F.mse_loss, "Gaussian"),
    "cross_entropy": (F.cross_entropy, "Categorical"),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(reduction="none"), "Categorical"),
    "NLLLoss": (nn.NLLLoss(), "Categorical"),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), "Bernoulli"),
    "binary_cross_entropy": (F.binary_cross_entropy, "Bernoulli"),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), "Poisson"),
    "GaussianNLLLoss": (nn.GaussianNLLLoss(), "HeteroscedasticGaussian"),
    "gaussian_nll_loss": (F.gaussian_nll_loss, "HeteroscedasticGaussian"),
    "HuberLoss": (nn.HuberLoss(), "StudentT"),
    "L1Loss": (nn.L1Loss(), "StudentT"),
    "a function": (lambda output, y: -output.log_prob(y), "Gaussian"),
    "a distribution": (torch.distributions.Normal, "Gaussian"),
}
MAKERS = {"ELBO": ELBO, "svi_model": svi_model}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_maker
@pytest.mark.parametrize(("loss", "likelihood"), LOSSES.values(), ids=LOSSES)
def test_losses_are_no_likelihoods(bnn, make, loss, likelihood):
    with pytest.raises(TypeError, match=rf"not a loss.*likelihoods\.{likelihood}\("):
        make(bnn, loss, N)


@every_maker
def test_a_class_is_no_likelihood(bnn, make):
    with pytest.raises(TypeError, match=r"Make one: Gaussian\("):
        make(bnn, Gaussian, N)


@every_maker
@pytest.mark.parametrize("num_data", [0, -3, 2.0, True, "30", None])
def test_num_data_is_a_positive_integer(bnn, make, num_data):
    with pytest.raises(ValueError, match="num_data to be the number of examples"):
        make(bnn, Gaussian(1.0), num_data)


@every_maker
def test_num_data_has_no_default(bnn, make):
    with pytest.raises(TypeError, match="num_data"):
        make(bnn, Gaussian(1.0))


@every_maker
def test_the_model_is_bayesian(net, make):
    with pytest.raises(TypeError, match=r"BayesianModel\(net\)"):
        make(net, Gaussian(1.0), N)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"local_trick": "local"}, "local_trick to be"),
        ({"batch_dim": -1}, "batch_dim to be"),
        ({"num_samples": 0}, "num_samples to be"),
        ({"num_samples": 1.0}, "num_samples to be"),
        ({"kl_weight": -1.0}, "kl_weight to be"),
        ({"kl_weight": float("nan")}, "kl_weight to be"),
        ({"kl_weight": lambda step: 1.0}, "kl_weight to be"),
    ],
)
def test_options_out_of_range(bnn, options, match):
    with pytest.raises(ValueError, match=match):
        ELBO(bnn, Gaussian(1.0), N, **options)


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_a_warmup_has_steps(steps):
    with pytest.raises(ValueError, match="steps to be an integer"):
        LinearWarmup(steps)


def test_num_data_is_not_less_than_a_training_batch(bnn, data):
    match = "got 10 and a batch of 12"
    objective = ELBO(bnn, Gaussian(1.0), 10)
    with pytest.raises(ValueError, match=match):
        objective(*data)
    with pytest.raises(ValueError, match=match):
        svi_model(bnn, Gaussian(1.0), 10)(*data)
    assert objective.eval()(*data).isfinite()  # validation batches may be larger


def test_log_prob_has_one_value_per_example(bnn, data):
    x, y = data
    with pytest.raises(ValueError, match=r"per example, the shape \(12,\); got \(\)"):
        ELBO(bnn, Reducing(), N)(x, y.squeeze(-1))


@pytest.mark.parametrize("kind", [Overriding, Sampling])
def test_likelihoods_have_one_definition(bnn, kind):
    with pytest.raises(TypeError, match=r"by distribution\(\) alone"):
        kind(1.0)
    for make in (ELBO, svi_model):
        likelihood = Gaussian(1.0)
        likelihood.log_prob = lambda output, y: -(output - y).abs()
        with pytest.raises(TypeError, match=r"got a log_prob\(\) of its own"):
            make(bnn, likelihood, N)


def test_bad_input_leaves_everything_as_it_was(bnn, data):
    x, y = data
    before = copy.deepcopy(bnn.state_dict())
    objective = ELBO(bnn, Gaussian(1.0), N)
    model = svi_model(bnn, Gaussian(1.0), N)
    svi = SVI(model, bnn.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for bad, match in (
        (y.squeeze(-1), r"output\.squeeze"),
        (y * torch.nan, "nan"),
        (y.long(), "float"),
        (y[:5], "one row per example"),
    ):
        for call in (objective, svi.step):
            with pytest.raises(ValueError, match=match):
                call(x, bad)
    with pytest.raises(ValueError, match=r"counts.*got -"):
        ELBO(bnn, Poisson(), N)(x, -torch.ones(B, 1))
    assert all(torch.equal(value, before[key]) for key, value in bnn.state_dict().items())
    assert not bnn.swap.is_open
