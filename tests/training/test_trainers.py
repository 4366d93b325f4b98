"""Other people's trainers, by the code that the documentation shows."""

import re
import textwrap
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_bayes.training
from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.training import fit
from pyro_bayes.training.schedule import LinearWarmup

EPOCHS, STEPS = 20, 80


def parts(**options):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    data = TensorDataset(x, x.sum(-1, keepdim=True))
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    bnn = BayesianModel(net, init_logvar=-5.0)
    warmup = LinearWarmup(STEPS // 2)
    likelihood = likelihoods.Gaussian(1.0, learn=True)
    return ELBO(bnn, likelihood, 64, local_trick=True, kl_weight=warmup), data


def loader_of(data):
    return DataLoader(data, batch_size=16, generator=torch.Generator())


def shown(start):
    """Returns the code that the documentation shows after a bold word."""
    text = pyro_bayes.training.__doc__.partition(f"**{start}")[2]
    return textwrap.dedent(re.search(r"::\n\n((?:    .*\n|\n)+)", text).group(1))


def plain():
    """Returns what as many steps of a plain loop lead to."""
    objective, data = parts()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    torch.manual_seed(1)
    for x, y in EPOCHS * list(loader_of(data)):
        optimizer.zero_grad()
        objective(x, y).backward()
        optimizer.step()
        objective.step()
    return objective


def run(code, loader, objective, **scope):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these trainers think of processors and loggers
        exec(code, {"torch": torch, "objective": objective, "loader": loader, **scope})


def assert_same(objective, expected):
    for name, value in objective.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_lightning(tmp_path, monkeypatch):
    import lightning

    monkeypatch.chdir(tmp_path)
    objective, data = parts()
    quiet = "max_epochs=20, logger=False, enable_checkpointing=False, enable_progress_bar=False"
    quiet += ", enable_model_summary=False, accelerator='cpu'"
    code = shown("Lightning").replace("max_epochs=20", quiet)
    torch.manual_seed(1)
    run(code, loader_of(data), objective, lightning=lightning)
    assert objective.kl_weight.count == STEPS
    assert_same(objective, plain())


def test_accelerate(monkeypatch):
    import accelerate

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    objective, data = parts()
    torch.manual_seed(1)
    run(shown("Hugging Face"), loader_of(data), objective, accelerate=accelerate)
    assert objective.kl_weight.count == STEPS
    assert_same(objective, plain())


def test_script_of_many_processes_runs_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objective, data = parts()
    scope = {"data": data, "DistributedSampler": DistributedSampler, "DataLoader": DataLoader}
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    run(shown("Many"), None, objective, fit=fit, optimizer=optimizer, **scope)
    assert objective.kl_weight.count == EPOCHS * 2
    assert (tmp_path / "run.pt").exists()
