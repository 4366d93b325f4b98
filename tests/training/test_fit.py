"""fit(): the steps it takes, what it returns, and what it leaves behind."""

import math
import random

import numpy as np
import pytest
import torch
from regression import NOISE_VAR, Problem
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import (
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.base.checks import check_finite
from pyro_bayes.prediction.batches import Batches
from pyro_bayes.training import History, fit
from pyro_bayes.training.run import Run
from pyro_bayes.training.schedule import LinearWarmup

# Batch norm lets examples meet, which is said each time that a model is made.
pytestmark = pytest.mark.filterwarnings("ignore:Expected examples that do not meet")

STILL = pytest.mark.filterwarnings("ignore:After .* epochs")


def problem_parts(problem, **kwargs):
    """Returns an objective of linear regression, its data and a loader with uneven batches."""
    bnn = problem.model()
    y = problem.y.unsqueeze(-1)
    objective = ELBO(bnn, likelihoods.Gaussian(math.sqrt(NOISE_VAR)), len(y), **kwargs)
    return objective, [(problem.x[i : i + 15], y[i : i + 15]) for i in range(0, len(y), 15)]


def make(net=None, count=24, batch_size=8, **kwargs):
    """Returns an objective and a loader that shuffles."""
    torch.manual_seed(1)
    x = torch.randn(count, 3)
    y = x.sum(-1, keepdim=True) + 0.1 * torch.randn(count, 1)
    net = net or nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    bnn = BayesianModel(net, init_logvar=-5.0)
    objective = ELBO(bnn, likelihoods.Gaussian(0.5, learn=True), count, **kwargs)
    return objective, DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


def adam(objective, lr=0.05):
    return torch.optim.Adam(objective.parameters(), lr=lr)


def state(objective):
    return {name: value.clone() for name, value in objective.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_are_those_of_a_plain_loop():
    objective, loader = make(local_trick=True, num_samples=2, kl_weight=LinearWarmup(5))
    optimizer = adam(objective)
    scheduler = ExponentialLR(optimizer, 0.9)
    torch.manual_seed(0)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            objective(x, y).backward()
            optimizer.step()
            scheduler.step()
            objective.step()

    ours, loader = make(local_trick=True, num_samples=2, kl_weight=LinearWarmup(5))
    optimizer = adam(ours)
    torch.manual_seed(0)
    history = fit(ours, loader, 3, optimizer=optimizer, scheduler=ExponentialLR(optimizer, 0.9))
    assert same(state(objective), state(ours))
    assert ours.kl_weight.count == 9
    assert history.learning_rate == pytest.approx([0.05 * 0.9 ** (3 * n) for n in (1, 2, 3)])


def test_posterior_of_linear_regression():
    problem = Problem.make()
    objective, batches = problem_parts(problem, local_trick=True)
    optimizer = adam(objective, lr=0.1)
    # Batches of 15, 15 and 10 weigh the same in a loss, so take all data at once.
    batches = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    fit(objective, batches, 1500, optimizer=optimizer, scheduler=ExponentialLR(optimizer, 0.996))
    bnn = objective.model
    assert torch.allclose(bnn.means.weight, problem.mean, atol=0.01)
    assert torch.allclose(bnn.logvars.weight, problem.variance.log(), atol=0.05)


@STILL
def test_history_is_in_nats_per_datum():
    problem = Problem.make()
    objective, batches = problem_parts(problem, kl_weight=0.25)
    with torch.no_grad():
        objective.model.logvars.weight.fill_(-60.0)  # a draw is the mean
    history = fit(
        objective,
        batches,
        2,
        optimizer=torch.optim.SGD(objective.parameters(), lr=0.0),
        validation=batches[1:],
    )
    posterior = objective.model.means.weight[0].detach(), torch.full((3,), -60.0).double().exp()
    n = len(problem.y)
    elbo = float(problem.elbo(*posterior)) / n
    kl = float(objective.model.kl_divergence().detach()) / n
    assert history.elbo == pytest.approx([elbo] * 2)
    assert history.kl == pytest.approx([kl] * 2)
    nlls = [float(objective.terms(*batch).nll.detach()) for batch in batches]
    assert history.loss == pytest.approx([sum(nlls) / 3 + 0.25 * kl] * 2)
    assert history.nll == pytest.approx([(15 * nlls[0] + 15 * nlls[1] + 10 * nlls[2]) / n] * 2)
    assert history.validation == pytest.approx([(15 * nlls[1] + 10 * nlls[2]) / 25] * 2)


@STILL
def test_rehearsal_of_validation_draws_no_random_numbers():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return torch.full((3,), random.random() + np.random.rand()), torch.rand(1)

    found = []
    for rehearse in (True, False):
        objective, loader = make()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        held_out = DataLoader(
            Noisy(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0)
        )
        with pytest.MonkeyPatch.context() as patch:
            if not rehearse:
                patch.setattr(Run, "_rehearse", lambda run: None)
            found.append(fit(objective, loader, 2, optimizer=adam(objective), validation=held_out))
    assert found[0] == found[1]


def test_validation_has_its_own_noise_and_leaves_training_alone():
    plain, loader = make()
    torch.manual_seed(0)
    fit(plain, loader, 2, optimizer=adam(plain))

    objective, loader = make()
    seen = []
    objective.model.base[1].register_forward_hook(lambda m, *_: seen.append(m.training))
    torch.manual_seed(0)
    held_out = list(loader)
    torch.manual_seed(0)
    options = {"validation": held_out, "validation_samples": 2}
    fit(objective, loader, 2, optimizer=adam(objective), **options)
    assert same(state(plain), state(objective))
    assert seen == 2 * [False] + 2 * (3 * [True] + 6 * [False])  # the first are a rehearsal


@STILL
def test_validation_is_of_the_mixture_that_users_predict_with():
    objective, loader = make(nn.Linear(3, 1))
    torch.nn.init.constant_(objective.model.logvars.weight, 1.0)
    options = {"validation": list(loader), "validation_samples": 200}
    sgd = torch.optim.SGD(objective.parameters(), lr=0.0)
    history = fit(objective, loader, 1, optimizer=sgd, **options)
    x, y = (torch.cat(parts) for parts in zip(*options["validation"], strict=True))
    predictive = objective.likelihood.predictive(objective.model, x, 5000)
    assert history.validation[0] == pytest.approx(-predictive.log_prob(y).mean().item(), rel=0.05)
    assert history.validation[0] < history.nll[0] / 2


@STILL
def test_validation_has_the_same_noise_after_each_epoch():
    objective, loader = make(nn.Linear(3, 1))
    sgd = torch.optim.SGD(objective.parameters(), lr=0.0)
    history = fit(objective, loader, 3, optimizer=sgd, validation=list(loader))
    assert len(set(history.validation)) == 1
    assert len(set(history.nll)) == 3


class Passing:
    """A model whose weight goes from 0 towards 2, past the 1 that validation wants."""

    def __init__(self):
        net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(net.weight)
        self.bnn = BayesianModel(net, init_logvar=-12.0, prior_var=1e6)
        self.objective = ELBO(self.bnn, likelihoods.Gaussian(1.0), 4)
        self.optimizer = torch.optim.SGD(self.objective.parameters(), lr=0.1)
        self.batches = [(torch.ones(4, 1), 2 * torch.ones(4, 1))]
        self.validation = [(torch.ones(4, 1), torch.ones(4, 1))]
        self.states = []

    def fit(self, epochs=40, **kwargs):
        return fit(
            self.objective,
            self.batches,
            epochs,
            optimizer=self.optimizer,
            validation=self.validation,
            callbacks=[lambda progress: self.states.append(state(progress.objective))],
            **kwargs,
        )


@STILL
@pytest.mark.parametrize("epochs", [40, 8])
def test_patience_stops_and_gives_the_best_epoch_back(epochs):
    passing = Passing()
    history = passing.fit(epochs, patience=3)
    assert history.best == 6  # 2 * (1 - 0.9**7) = 1.04
    assert len(history) == min(epochs, 10)
    assert same(state(passing.objective), passing.states[6])


@STILL
def test_without_patience_the_last_epoch_stays():
    passing = Passing()
    assert len(passing.fit(12)) == 12
    assert same(state(passing.objective), passing.states[11])


def test_validation_that_is_not_finite_is_never_best():
    assert History(nll=[1, 1], kl=[0, 0], validation=[math.nan, 2.0]).best == 1
    assert History(nll=[1], kl=[0]).best is None


def test_callbacks_see_each_epoch_and_can_stop():
    objective, loader = make()
    optimizer, seen = adam(objective), []

    def note(progress):
        assert progress.objective is objective
        assert progress.optimizer is optimizer
        assert progress.epochs == 9
        assert len(progress.history.nll) == progress.epoch
        seen.append(progress.epoch)

    history = fit(
        objective,
        loader,
        9,
        optimizer=optimizer,
        callbacks=[lambda p: p.epoch == 3, lambda p: "some value", note],
    )
    assert seen == [1, 2, 3]
    assert len(history) == 3


@STILL
def test_plateaus_are_of_the_validation_loss():
    passing = Passing()
    scheduler = ReduceLROnPlateau(passing.optimizer, factor=0.5, patience=0)
    history = passing.fit(9, scheduler=scheduler)
    assert history.learning_rate == pytest.approx([0.1] * 7 + [0.05, 0.025])


def test_modes_and_gradients_are_as_before():
    objective, loader = make()
    objective.eval()
    objective.model.base[0].train()
    before = [module.training for module in objective.modules()]
    running = objective.model.base[1].running_mean.clone()
    fit(objective, loader, 1, optimizer=adam(objective))
    assert [module.training for module in objective.modules()] == before
    assert not torch.equal(objective.model.base[1].running_mean, running)  # it was in training mode
    assert all(p.grad is None for p in objective.parameters())


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_autocast_computes_in_bfloat16_and_keeps_the_parameters(local_trick):
    objective, loader = make(local_trick=local_trick)
    seen = []
    objective.model.base[0].register_forward_hook(lambda m, _, out: seen.append(out.dtype))
    history = fit(objective, loader, 30, optimizer=adam(objective), precision=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in objective.parameters()} == {torch.float32}

    reference, loader = make(local_trick=local_trick)
    expected = fit(reference, loader, 30, optimizer=adam(reference))
    assert history.nll[0] > expected.nll[-1] + 1
    assert history.nll[-1] == pytest.approx(expected.nll[-1], abs=0.4)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(3, 1)

    def forward(self, a, b):
        return self.a(a) + self.b(b)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_inputs_of_several_parts(kind):
    parts = torch.randn(6, 2), torch.randn(6, 3)
    x = {"b": parts[1], "a": parts[0]} if kind is dict else kind(parts)
    objective = ELBO(BayesianModel(TwoInputs()), likelihoods.Gaussian(1.0), 6)
    sgd = torch.optim.SGD(objective.parameters(), lr=10.0)
    assert math.isfinite(fit(objective, [(x, torch.randn(6, 1))], 1, optimizer=sgd).nll[0])


def test_flows_have_a_density():
    zuko = pytest.importorskip("zuko")
    flow = BayesianModel(zuko.flows.MAF(1, 2, transforms=1), init_logvar=-5.0, name="fit")
    c = torch.randn(64, 2)
    y = c.sum(-1, keepdim=True)
    objective = ELBO(flow, likelihoods.Density(), 64, local_trick=True)
    history = fit(objective, [(c, y)], 60, optimizer=adam(objective))
    assert history.nll[-1] < history.nll[0] - 0.3


def test_bar_shows_the_terms_apart(capsys, monkeypatch):
    monkeypatch.setattr("pyro_bayes.training.run._DELAY", 0.0)
    objective, loader = make()
    fit(objective, loader, 2, optimizer=adam(objective))
    error = capsys.readouterr().err
    assert "epoch 2" in error
    for name in ("6/6", "ELBO -", "NLL ", "KL "):
        assert name in error
    fit(objective, loader, 1, optimizer=adam(objective), progress=False)
    assert capsys.readouterr().err == ""


def test_a_loader_without_length():
    class Stream:
        def __iter__(self):
            yield from batches

    objective, loader = make()
    batches = list(loader)
    assert len(fit(objective, Stream(), 2, optimizer=adam(objective))) == 2


def test_samplers_know_the_epoch():
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = []  # noqa: RUF012

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    objective, loader = make()
    data = loader.dataset
    loader = DataLoader(data, batch_size=8, sampler=Sampler(data))
    fit(objective, loader, 3, optimizer=adam(objective))
    assert Sampler.epochs == [0, 1, 2]


def test_shares_of_the_data_are_smaller(monkeypatch):
    _, loader = make(count=24)
    half = DataLoader(loader.dataset, sampler=SubsetRandomSampler(range(12)))
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="got 24, and a dataset of 12"):
        Batches(half, name="loader", num_data=24, device=cpu)
    monkeypatch.setattr("pyro_bayes.base.processes.count", lambda: 2)
    Batches(half, name="loader", num_data=24, device=cpu)
    with pytest.warns(UserWarning, match="got 20, and a dataset of 24"):
        Batches(loader, name="loader", num_data=20, device=cpu)


def test_posterior_at_its_initial_value_is_said():
    objective, loader = make()
    with pytest.warns(UserWarning, match=r"After 1 epochs: 100% .* init_logvar=-5") as record:
        fit(objective, loader, 1, optimizer=adam(objective, lr=1e-4))
    assert record[0].filename == __file__


def test_samplers_of_a_part_of_the_data():
    """Rows that are never met need not be finite, and do not count."""
    objective, loader = make(count=24)
    x, y = loader.dataset.tensors
    data = TensorDataset(torch.cat([x, x * math.nan]), torch.cat([y, y]))
    weights = torch.arange(48) < 24
    for sampler in (SubsetRandomSampler(range(24)), WeightedRandomSampler(weights.double(), 24)):
        parts = DataLoader(data, batch_size=8, sampler=sampler)
        assert len(fit(objective, parts, 1, optimizer=adam(objective, lr=0.5))) == 1
    parts = DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(20)))
    with pytest.warns(UserWarning, match="got 24, and a dataset of 20"):
        fit(objective, parts, 1, optimizer=adam(objective))


def test_num_data_that_is_not_the_datasets_is_said():
    objective, loader = make(count=24)
    objective.num_data = 240
    with pytest.warns(UserWarning, match="got 240, and a dataset of 24") as record:
        fit(objective, loader, 1, optimizer=adam(objective))
    assert record[0].filename == __file__


@STILL
def test_numbers_whose_squares_overflow_are_finite():
    net = nn.Linear(1, 1, bias=False, dtype=torch.float32)
    objective = ELBO(BayesianModel(net), likelihoods.Gaussian(1e-10), 2)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-24)
    history = fit(objective, [(torch.ones(2, 1), 2 * torch.ones(2, 1))], 1, optimizer=optimizer)
    assert 1e19 < history.nll[0] < 1e21
    check_finite("x", torch.full((2,), 3e38))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_gpu(precision, tmp_path):
    objective, loader = make(local_trick=True)
    options = {"device": "cuda", "precision": precision, "checkpoint": tmp_path / "run.pt"}
    optimizer = adam(objective)
    history = fit(objective, loader, 20, optimizer=optimizer, validation=loader, **options)
    assert all(p.is_cuda for p in objective.parameters())
    assert history.nll[-1] < history.nll[0]

    again, loader = make(local_trick=True)
    for epochs in (7, 20):
        options["checkpoint"] = tmp_path / "again.pt"
        again, loader = make(local_trick=True)
        fit(again, loader, epochs, optimizer=adam(again), validation=loader, resume=True, **options)
    assert same(state(objective), state(again))
