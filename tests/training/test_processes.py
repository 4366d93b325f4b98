"""Two processes that train one model, on shares of the data."""

import math
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from forks import context
from regression import NOISE_VAR, Problem
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.training import fit
from pyro_bayes.training.schedule import LinearWarmup

# Batch norm lets examples meet, which is said each time that a model is made.
pytestmark = pytest.mark.filterwarnings("ignore:Expected examples that do not meet")

COUNT = 2


def enter(work, rank, folder, args):
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=COUNT)
    try:
        found = work(rank, *args)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    torch.save(found, folder / f"{rank}.pt")
    if "error" not in found:
        distributed.destroy_process_group()
    for _ in range(10):  # what a process raises is not to be that another is gone
        if "error" in found and not (folder / f"{1 - rank}.pt").exists():
            time.sleep(0.1)
    os._exit("error" in found)


def together(folder, work, *args):
    """Runs a function of the rank in each process, and returns what each returned."""
    folder.mkdir()
    processes = [
        context().Process(target=enter, args=(work, rank, folder, args)) for rank in range(COUNT)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    files = [folder / f"{rank}.pt" for rank in range(COUNT)]
    return [torch.load(f, weights_only=True) if f.exists() else None for f in files]


def make(rank, seed=0, **options):
    """Returns the arguments of a call; each process has data of its own and other noise."""
    torch.manual_seed(7)
    x = torch.randn(24, 3)
    data = TensorDataset(x, x.sum(-1, keepdim=True))
    torch.manual_seed(seed + rank)  # so each process starts from another network, too
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    bnn = BayesianModel(net, init_logvar=-4.0, exclude_params="3.bias")
    likelihood = likelihoods.Gaussian(1.0, learn=True)
    objective = ELBO(bnn, likelihood, 24, local_trick=True, kl_weight=LinearWarmup(20))
    return {
        "objective": objective,
        "loader": DataLoader(data, batch_size=4, sampler=DistributedSampler(data, COUNT, rank)),
        "optimizer": torch.optim.Adam(objective.parameters(), lr=0.05),
        "validation": DataLoader(data, batch_size=4, sampler=DistributedSampler(data, COUNT, rank)),
        **options,
    }


def state(objective):
    return {name: value.clone() for name, value in objective.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(rank, epochs, file=None, kill=None, seed=0):
    """Trains, and process 1 is killed after an epoch."""

    def after(progress):
        if progress.epoch == kill and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    call = make(rank, seed, checkpoint=file, resume=file is not None, callbacks=[after])
    history = fit(**call, epochs=epochs)
    again = None if file else fit(**{**call, "callbacks": []}, epochs=1)  # a second run works
    return {
        "state": state(call["objective"]),
        "history": vars(history),
        "again": again and vars(again),
        "noise": torch.randn(3),
        "tied": call["objective"].model.base[0].weight.data_ptr()
        == call["objective"].model.means.get_parameter("0.weight").data_ptr(),
    }


def test_processes_end_with_the_same_parameters(tmp_path):
    first, second = together(tmp_path / "run", train, 4)
    assert same(first["state"], second["state"])
    assert first["history"] == second["history"]
    assert first["again"] == second["again"]
    assert first["again"]["nll"][0] < first["history"]["nll"][0]
    assert not torch.equal(first["noise"], second["noise"])
    assert first["tied"]
    assert second["tied"]


def test_a_killed_process_leaves_a_checkpoint_from_which_all_continue(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    file = tmp_path / "run.pt"
    expected = together(tmp_path / "whole", train, 6, tmp_path / "whole.pt")
    killed = together(tmp_path / "killed", train, 6, file, 4)
    assert killed[1] is None
    assert killed[0] is None or "error" in killed[0]
    assert len(torch.load(file, weights_only=True)["history"]["nll"]) == 3
    found = together(tmp_path / "resumed", train, 6, file, None, 11)
    for one, other in zip(found, expected, strict=True):
        assert same(one["state"], other["state"])
        assert one["history"] == other["history"]
        assert torch.equal(one["noise"], other["noise"])


def without_noise(rank, count):
    """Takes one long step, where draws are the means, on a process's share of the data."""
    problem = Problem.make()
    bnn = problem.model()
    with torch.no_grad():
        bnn.means.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        bnn.logvars.weight.fill_(-60.0)
    y = problem.y.unsqueeze(-1)
    objective = ELBO(bnn, likelihoods.Gaussian(1.0), len(y))
    share = slice(rank, None, count)
    sgd = torch.optim.SGD(objective.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(objective, [(problem.x[share], y[share])], 1, optimizer=sgd)
    return {"mean": bnn.means.weight.detach(), "logvar": bnn.logvars.weight.detach()}


def test_their_step_is_that_of_one_process_with_all_data(tmp_path):
    """Gradients of the likelihood are averaged, and the divergence counts once."""
    alone = without_noise(0, 1)
    problem = Problem.make()
    n, mean = len(problem.y), torch.tensor([1.0, 2.0, 3.0]).double()
    step = problem.x.T @ (problem.x @ mean - problem.y) / n + mean / 2.0 / n
    assert torch.allclose(alone["mean"][0], mean - step)
    for found in together(tmp_path / "run", without_noise, COUNT):
        for name, value in alone.items():
            assert torch.allclose(found[name], value, atol=1e-12), name


def linear(rank):
    """Fits linear regression, with the rows of each process."""
    torch.manual_seed(rank)
    problem = Problem.make()
    bnn = problem.model()
    y = problem.y.unsqueeze(-1)
    likelihood = likelihoods.Gaussian(math.sqrt(NOISE_VAR))
    objective = ELBO(bnn, likelihood, len(y), local_trick=True, check_examples=False, num_samples=4)
    share = slice(rank, None, COUNT)
    outputs = []
    hook = bnn.base.register_forward_hook(lambda *args: outputs.append(float(args[2][0].detach())))
    common = problem.x[:4], y[:4]
    sgd = torch.optim.SGD(objective.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(objective, [common] * 3, 1, optimizer=sgd)
    hook.remove()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    scheduler = ExponentialLR(optimizer, 0.99)
    batches = [(problem.x[share], y[share])] * 100
    fit(objective, batches, 5, optimizer=optimizer, scheduler=scheduler, progress=False)
    return {
        "mean": bnn.means.weight.detach(),
        "logvar": bnn.logvars.weight.detach(),
        "outputs": outputs,
    }


def test_they_reach_the_posterior_with_noise_of_their_own(tmp_path):
    problem = Problem.make()
    first, second = together(tmp_path / "run", linear)
    for found in (first, second):
        assert torch.allclose(found["mean"], problem.mean, atol=0.01)
        assert torch.allclose(found["logvar"], problem.variance.log(), atol=0.1)
    assert torch.equal(first["mean"], second["mean"])
    # At the same parameters and for the same rows, outputs differ by the processes' noise.
    assert all(a != b for a, b in zip(first["outputs"], second["outputs"], strict=True))


def same_seed(rank):
    call = make(rank)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(**call, epochs=1)
    return {"messages": [str(w.message) for w in record if w.filename == __file__]}


def uneven(rank):
    call = make(rank)
    call["loader"] = list(call["loader"])[rank:]
    fit(**call, epochs=1)
    return {}


class Idle(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.idle = nn.Parameter(torch.zeros(2))


def idle(rank):
    torch.manual_seed(rank)
    bnn = BayesianModel(Idle(3, 1), exclude_params="idle")
    objective = ELBO(bnn, likelihoods.Gaussian(1.0), 4)
    batches = [(torch.randn(4, 3), torch.randn(4, 1))]
    fit(objective, batches, 1, optimizer=torch.optim.SGD(objective.parameters(), lr=1e3))
    return {}


def wrapped(rank):
    call = make(rank)
    objective = call["objective"]
    model = DistributedDataParallel(objective)  # in a loop of one's own
    for x, y in call["loader"]:
        call["optimizer"].zero_grad()
        model(x, y).backward()
        call["optimizer"].step()
    parameters = {name: p.detach().clone() for name, p in objective.named_parameters()}
    call["objective"] = model
    try:
        fit(**call, epochs=1)
    except TypeError as error:
        return {"parameters": parameters, "refused": str(error)}


def sharded(rank):
    from torch.distributed.fsdp import fully_shard

    bnn = BayesianModel(nn.Linear(3, 1))
    objective = ELBO(bnn, likelihoods.Gaussian(1.0), 4)
    fully_shard(objective, mesh=distributed.device_mesh.init_device_mesh("cpu", (COUNT,)))
    objective(torch.randn(4, 3), torch.randn(4, 1))
    return {}


def test_one_seed_for_all_is_said(tmp_path):
    for found in together(tmp_path / "run", same_seed):
        assert [m for m in found["messages"] if "torch.manual_seed(seed + rank)" in m]


@pytest.mark.parametrize(
    ("work", "match"),
    [
        (uneven, "as many batches; got [3, 2]"),
        (idle, "part of the loss; got ['model.base.idle']"),
        (sharded, "Expected the base to keep the parameters it was wrapped with"),
    ],
)
def test_what_cannot_train_together_is_refused(work, match, tmp_path):
    for found in together(tmp_path / "run", work):
        assert match in found["error"]


def test_a_loop_of_ones_own_with_the_plain_wrapper(tmp_path):
    first, second = together(tmp_path / "run", wrapped)
    assert same(first["parameters"], second["parameters"])
    assert "fit() wraps" in first["refused"]


SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import distributed
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from test_processes import make, fit, state

distributed.init_process_group("gloo")
rank = distributed.get_rank()
call = make(rank)
fit(**call, epochs=2)
torch.save(state(call["objective"]), Path({folder!r}) / f"{{rank}}.pt")
distributed.destroy_process_group()
"""


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", str(COUNT), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options], check=True, env=environment, timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(COUNT))
    assert same(first, second)
