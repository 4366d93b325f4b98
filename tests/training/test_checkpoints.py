"""Training that is cut off continues bit for bit, and files are whole or refused."""

import errno
import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import context
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.prediction.batches import generators
from pyro_bayes.training import checkpoint, fit
from pyro_bayes.training.schedule import LinearWarmup

# Batch norm lets examples meet, which is said each time that a model is made.
pytestmark = pytest.mark.filterwarnings("ignore:Expected examples that do not meet")


class Augmented(Dataset):
    """Data to which each kind of generator adds noise."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(24, 3, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(1)
        return x, x.sum(-1, keepdim=True) + noise


def make(seed=0, width=8, likelihood=None, data=None, count=24, **options):
    """Returns the arguments of a call, with all that training may depend on."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    net = nn.Sequential(
        *(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Dropout(0.1), nn.Linear(width, 1)),
    )
    bnn = BayesianModel(net, init_logvar=-5.0, exclude_params="4.bias")
    likelihood = likelihood or likelihoods.Gaussian(1.0, learn=True)
    objective = ELBO(bnn, likelihood, count, local_trick=True, kl_weight=LinearWarmup(10))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    return {
        "objective": objective,
        "loader": DataLoader(
            data or Augmented(),
            batch_size=6,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        ),
        "validation": [(torch.ones(4, 3), torch.ones(4, 1))],
        "patience": 50,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 48),
        "progress": False,
        **options,
    }


def result(call, history):
    return [history, call["objective"].state_dict(), call["optimizer"].state_dict()]


def assert_same(a, b):
    assert a[0] == b[0]
    flat = [torch.utils._pytree.tree_flatten(values)[0] for values in (a[1:], b[1:])]
    assert len(flat[0]) == len(flat[1])
    for x, y in zip(*flat, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.fixture(scope="module")
def uninterrupted():
    call = make()
    return result(call, fit(**call, epochs=12))


class StopError(Exception):
    pass


@pytest.mark.parametrize("every", [1, 3])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, uninterrupted, every):
    file = tmp_path / "run.pt"

    def stop(state):
        if state.epoch == 8:
            raise StopError

    options = {"checkpoint": file, "resume": True, "checkpoint_every": every}
    with pytest.raises(StopError):
        fit(**make(**options), epochs=12, callbacks=[stop])
    saved = checkpoint.load(file)
    assert len(saved["history"]["nll"]) == (7 if every == 1 else 6)
    call = make(seed=5, **options)  # other parameters, other random numbers
    assert_same(result(call, fit(**call, epochs=12)), uninterrupted)
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_run_with_more_epochs_continues(tmp_path, uninterrupted):
    for epochs in (4, 4, 12):
        call = make(seed=epochs % 4, checkpoint=tmp_path / "run.pt", resume=True)
        history = fit(**call, epochs=epochs)
        assert len(history) == epochs
    # The best epoch's state is given back after 4 epochs, and does not leak into the rest.
    assert_same(result(call, history), uninterrupted)


def test_the_last_epoch_is_always_written(tmp_path):
    file = tmp_path / "run.pt"
    fit(**make(checkpoint=file, checkpoint_every=5), epochs=7)
    assert len(checkpoint.load(file)["history"]["nll"]) == 7


def test_a_run_that_was_stopped_stays_so(tmp_path):
    file = tmp_path / "run.pt"
    call = make(checkpoint=file)
    expected = result(call, fit(**call, epochs=12, callbacks=[lambda state: state.epoch == 3]))
    assert len(expected[0]) == 3
    again = make(seed=4, checkpoint=file, resume=True)
    assert_same(result(again, fit(**again, epochs=12)), expected)


def train_until_killed(file, moment, pipe):
    """Trains, and is killed after so many seconds, or when it flushes the so-manieth file."""
    torch.set_num_threads(1)
    call = make(checkpoint=file, resume=True)
    flush, flushed = os.fsync, []

    def fsync(descriptor):
        flushed.append(descriptor)
        if len(flushed) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    if isinstance(moment, int):
        os.fsync = fsync
    pipe.send("ready")
    history = fit(**call, epochs=40)
    torch.save([vars(history), *result(call, None)[1:]], f"{file}.result")


def test_a_run_killed_at_any_moment_ends_where_it_would_have(tmp_path):
    call = make()
    expected = result(call, fit(**call, epochs=40))
    file, generator, epochs = tmp_path / "run.pt", random.Random(0), []
    # The first flush is a rehearsal. Then come two for each file: of its content, and of its name.
    for moment in (2, 9, 5, *(generator.uniform(0, 0.15) for _ in range(3)), None):
        parent, child = multiprocessing.Pipe()
        process = context().Process(target=train_until_killed, args=(file, moment, child))
        process.start()
        child.close()
        assert parent.recv() == "ready"
        if isinstance(moment, float):
            time.sleep(moment)
            process.kill()
        process.join()
        if isinstance(moment, int):
            assert process.exitcode == -signal.SIGKILL
        epochs.append(len(checkpoint.load(file)["history"]["nll"]) if file.exists() else 0)
    assert process.exitcode == 0
    assert epochs[:3] == [0, 4, 6]
    history, *states = torch.load(f"{file}.result", weights_only=True)
    assert_same([history, *states], [vars(expected[0]), *expected[1:]])


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    file = tmp_path / "run.pt"
    fit(**make(checkpoint=file), epochs=2)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=r"no file at .*run\.pt' yet; got one. Pass resume=True"):
        fit(**make(checkpoint=file), epochs=2)
    assert file.read_bytes() == content


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "run.pt"
    fit(**make(checkpoint=file), epochs=1)
    return file


def test_a_corrupt_file_is_named_and_refused(saved, tmp_path):
    content = saved.read_bytes()
    call = make(checkpoint=tmp_path / "bad.pt", resume=True)
    before = [p.clone() for p in call["objective"].parameters()]
    generator = random.Random(0)
    good = checkpoint.load(saved)
    refused = 0
    cuts = [content[: int(len(content) * share)] for share in (0, 0.3, 0.999)]
    flips = []
    for _ in range(60):
        place = generator.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.randrange(8)
        flips.append(bytes(flipped))
    for bad in (*cuts, b"no checkpoint", *flips):
        call["checkpoint"].write_bytes(bad)
        try:
            found = checkpoint.load(call["checkpoint"])
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"bad\.pt' to be a whole .* got a corrupt file"):
                fit(**call, epochs=2)
        else:  # the bit was in what nobody reads
            assert_same([0, found], [0, good])
    assert refused > 50
    assert all(map(torch.equal, before, call["objective"].parameters()))


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"other\.pt' to be a checkpoint of fit"):
        fit(**make(checkpoint=file, resume=True), epochs=2)


@pytest.mark.parametrize("part", checkpoint.PARTS)
def test_a_file_without_a_part_is_refused(saved, tmp_path, part):
    content = checkpoint.load(saved)
    assert set(content) == {"format", *checkpoint.PARTS}
    del content[part]
    torch.save(content, tmp_path / "part.pt")
    call = make(checkpoint=tmp_path / "part.pt", resume=True)
    before = [p.clone() for p in call["objective"].parameters()]
    with pytest.raises(ValueError, match=rf"part\.pt' to be a whole .* without \['{part}'\]"):
        fit(**call, epochs=2)
    assert all(map(torch.equal, before, call["objective"].parameters()))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": Hostile()}, "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt' to be a whole checkpoint"):
        fit(**make(checkpoint="run.pt", resume=True), epochs=2)
    assert not os.path.exists("hostile")


def sgd(call):
    call["optimizer"] = torch.optim.SGD(call["objective"].parameters(), lr=0.1)
    call["scheduler"] = None


OTHERS = {
    "width": ({"width": 9}, r"means\.0\.weight: \(8, 3\) of torch\.float32 in .* \(9, 3\)"),
    "likelihood": ({"likelihood": likelihoods.HeteroscedasticGaussian()},
                   "likelihood: Gaussian in the file, HeteroscedasticGaussian here"),
    "num_data": ({"count": 25, "data": TensorDataset(torch.randn(25, 3), torch.randn(25, 1))},
                 "num_data: 24 in the file, 25 here"),
    "optimizer": (sgd, "(?s)optimizer: Adam .* SGD .*scheduler: CosineAnnealingLR"),
    "no validation": ({"validation": None, "patience": None}, "validation: 10 in the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_training_is_refused(saved, case, tmp_path):
    change, match = OTHERS[case]
    call = make(seed=1, **({} if callable(change) else change))
    if callable(change):
        change(call)
    file = shutil.copy(saved, tmp_path)
    before = [p.clone() for p in call["objective"].parameters()]
    with pytest.raises(ValueError, match=match):
        fit(**call, epochs=2, checkpoint=file, resume=True)
    assert all(map(torch.equal, before, call["objective"].parameters()))
    assert not call["optimizer"].state


def test_a_state_that_could_not_be_read_back_is_refused_at_once(tmp_path):
    call = make(checkpoint=tmp_path / "run.pt")
    call["optimizer"].param_groups[0]["eps"] = np.float64(1e-8)
    with pytest.raises(TypeError, match=r"plain numbers.*numpy"):
        fit(**call, epochs=2)
    assert not call["optimizer"].state
    assert os.listdir(tmp_path) == []


class Full(io.FileIO):
    """A file on a disk that has room for some bytes."""

    room = 5000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_leaves_the_former_file(tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    checkpoint.save(file, {"x": torch.ones(3)})
    content = file.read_bytes()
    monkeypatch.setattr(Path, "open", lambda path, mode: Full(path, mode))
    with pytest.raises(OSError, match="No space left"):  # in whose place torch has its own error
        checkpoint.save(file, {"x": torch.ones(100_000)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["run.pt"]
    assert file.read_bytes() == content


def test_loaders_of_other_kinds_have_their_generators_saved():
    data = TensorDataset(torch.zeros(4, 1))
    generator = torch.Generator()
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    batches = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
    for loader in (
        DataLoader(data, sampler=sampler),
        DataLoader(data, batch_sampler=batches),
        DataLoader(data, sampler=batches, batch_size=None),
        DataLoader(data, shuffle=True, generator=generator),
    ):
        assert generators([loader]) == [generator]
    assert generators([DataLoader(data, shuffle=True)]) == []


def test_links_and_permissions_stay(tmp_path):
    path, link = tmp_path / "run.pt", tmp_path / "link.pt"
    checkpoint.save(path, {"x": torch.ones(3)})
    path.chmod(0o640)
    link.symlink_to(path)
    checkpoint.save(link, {"x": torch.zeros(3)})
    assert link.is_symlink()
    assert torch.equal(torch.load(path)["x"], torch.zeros(3))
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2
