"""One truth: facade, Pyro and plain PyTorch train and show the same parameters."""

import copy
import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_bayes import BayesianModel


class Trainer:
    """One model with both front ends, each with an optimiser of its own."""

    def __init__(self, net, data, **kwargs):
        self.bnn = BayesianModel(net, init_logvar=-4.0, **kwargs)
        self.data = data
        self.parameters = dict(self.bnn.named_parameters())
        self.torch_optimizer = torch.optim.SGD(self.bnn.parameters(), lr=1e-3)
        self.svi = SVI(self.model, self.bnn.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())

    def model(self):
        with self.bnn.lift() as net:
            mean = net(self.data[0])
        with pyro.plate("data", len(mean)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=self.data[1])

    def svi_step(self):
        self.svi.step()

    def torch_step(self):
        self.torch_optimizer.zero_grad()
        with self.bnn.reparameterize() as net:
            loss = nn.functional.mse_loss(net(self.data[0]), self.data[1])
        (loss + self.bnn.kl_divergence() / 12).backward()
        self.torch_optimizer.step()

    def values(self):
        return {name: p.detach().clone() for name, p in self.bnn.named_parameters()}

    def check_agreement(self):
        """Each front end, and the store where it has an entry, shows the same objects."""
        now = dict(self.bnn.named_parameters())
        assert {n: id(p) for n, p in now.items()} == {n: id(p) for n, p in self.parameters.items()}
        for key, held in pyro.get_param_store().named_parameters():
            prefix = self.bnn.guide.store_name + "."
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                name = name if name.startswith("base.") else "guide." + name
                assert held is self.parameters[name], key
        for name, mean in self.bnn.means.named_parameters():
            assert torch.equal(self.bnn.base.get_parameter(name), mean)


@pytest.fixture(params=[(), ("0.bias",)], ids=["all", "excluded"])
def trainer(request, net, data):
    return Trainer(net, data, exclude_params=request.param)


def changed(before, after):
    return all(not torch.equal(before[name], after[name]) for name in before)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_front_end_trains_the_same_parameters(trainer):
    for step in (trainer.svi_step, trainer.torch_step, trainer.svi_step):
        before = trainer.values()
        step()
        assert changed(before, trainer.values())
        trainer.check_agreement()


STEPS = ["svi_step", "torch_step"]


@pytest.mark.parametrize("after", STEPS)
@pytest.mark.parametrize("how", ["save and load", "set_state"])
def test_loaded_values_flow_into_the_same_parameters(trainer, tmp_path, how, after):
    store = pyro.get_param_store()
    trainer.svi_step()
    saved = trainer.values()
    store.save(tmp_path / "store.pt")
    state = copy.deepcopy(store.get_state())
    trainer.svi_step()
    trainer.torch_step()
    assert changed(saved, trainer.values())

    store.load(tmp_path / "store.pt") if how == "save and load" else store.set_state(state)
    assert equal(saved, trainer.values())
    trainer.check_agreement()
    for _ in range(2):
        before = trainer.values()
        getattr(trainer, after)()
        assert changed(before, trainer.values())
    trainer.check_agreement()
    assert set(store) == set(state["params"])


@pytest.mark.parametrize("reader", ["kl", "draw", "base", "state_dict", "svi", "quantiles"])
def test_whatever_reads_first_sees_loaded_values(trainer, tmp_path, reader):
    store = pyro.get_param_store()
    trainer.svi_step()
    with torch.no_grad():
        for p in trainer.parameters.values():
            p.fill_(0.25)
    store.save(tmp_path / "store.pt")
    with torch.no_grad():
        for p in trainer.parameters.values():
            p.fill_(-0.5)
    bnn, guide, base = trainer.bnn, trainer.bnn.guide, trainer.bnn.base
    store.load(tmp_path / "store.pt")
    if reader == "kl":
        a = 0.5 * (torch.tensor(0.25).exp() - 1 - 0.25 + 0.0625)
        count = sum(p.numel() for p in bnn.means.parameters())
        assert bnn.kl_divergence().item() == pytest.approx(count * a.item(), rel=1e-5)
    elif reader == "draw":
        bnn.sample_params()
    elif reader == "base":
        bnn.base  # noqa: B018
    elif reader == "state_dict":
        assert all((v == 0.25).all() for v in bnn.state_dict().values())
    elif reader == "svi":
        trainer.svi_step()
        assert all((p != -0.5).all() for p in trainer.parameters.values())
        return
    else:
        assert all((q == 0.25).all() for q in guide.quantiles([0.5]).values())
    means = dict(bnn.means.named_parameters())
    assert all((base.get_parameter(name) == 0.25).all() for name in means)


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("second", STEPS)
def test_clearing_the_store_loses_nothing(trainer, first, second):
    getattr(trainer, first)()
    before = trainer.values()
    pyro.clear_param_store()
    assert equal(before, trainer.values())
    getattr(trainer, second)()
    assert changed(before, trainer.values())
    trainer.check_agreement()
    trainer.svi_step()
    trainer.check_agreement()
    assert len(pyro.get_param_store()) == len(trainer.parameters)


def test_scope_gives_the_store_back(trainer):
    trainer.svi_step()
    with pyro.get_param_store().scope():
        trainer.svi_step()
    trainer.svi_step()
    trainer.check_agreement()


def test_load_state_dict_is_seen_by_the_store(trainer):
    trainer.svi_step()
    state = {name: torch.full_like(v, 0.5) for name, v in trainer.bnn.state_dict().items()}
    trainer.bnn.load_state_dict(state)
    trainer.check_agreement()
    assert all((v == 0.5).all() for v in pyro.get_param_store().values())
    # With `assign`, the parameters are the loaded ones; the store follows.
    trainer.bnn.load_state_dict(
        {name: nn.Parameter(torch.full_like(v, 0.75)) for name, v in state.items()}, assign=True
    )
    trainer.parameters = dict(trainer.bnn.named_parameters())
    assert all((p == 0.75).all() for p in trainer.parameters.values())
    trainer.svi_step()
    trainer.check_agreement()


def test_values_loaded_before_construction_are_taken(net, data, tmp_path):
    trainer = Trainer(net, data, name="loaded")
    trainer.svi_step()
    saved = trainer.values()
    pyro.get_param_store().save(tmp_path / "store.pt")
    del trainer
    gc.collect()
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    assert equal(Trainer(net, data, name="loaded").values(), saved)


def test_store_of_another_architecture_teaches(net, data):
    trainer = Trainer(net, data)
    trainer.svi_step()
    name = f"{trainer.bnn.guide.store_name}.mean"
    pyro.get_param_store()[name] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"Expected the param store's .* shape \(41,\); got"):
        trainer.bnn.kl_divergence()


def test_two_models_never_share(data):
    def cell():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        return Trainer(net, data)

    first = cell()
    first.svi_step()
    trained = first.values()
    second = cell()
    start = second.values()
    assert not equal(trained, start)
    second.svi_step()
    assert equal(first.values(), trained)
    assert not set(map(id, first.bnn.parameters())) & set(map(id, second.bnn.parameters()))
    # The cell is run a third time, when the first model is gone.
    first = cell()
    gc.collect()
    assert equal(first.values(), start)
    first.svi_step()
    first.check_agreement()
    second.check_agreement()


@pytest.mark.parametrize("name", [None, "net"])
def test_names_are_unique_among_living_models(net, name):
    gc.collect()  # the trainers of other tests hold themselves
    first, second = BayesianModel(net, name=name), BayesianModel(net, name=name)
    third = copy.deepcopy(second)
    stem = name or "BayesianModel"
    taken = [model.guide.store_name for model in (first, second, third)]
    assert taken == [stem, f"{stem}_1", f"{stem}_2"]
    assert first.guide.sites == second.guide.sites


def test_names_that_begin_alike_keep_their_entries(data):
    inner = Trainer(nn.Linear(3, 1), data, name="model.encoder")
    inner.svi_step()
    count = len(pyro.get_param_store())
    BayesianModel(nn.Linear(3, 1), name="model")
    assert len(pyro.get_param_store()) == count


def test_models_are_freed_at_once(net):
    bnn = BayesianModel(net)
    with bnn.reparameterize() as model:
        model(torch.randn(2, 3)).sum().backward()
    references = [weakref.ref(part) for part in (bnn, bnn.guide, bnn.swap)]
    gc.disable()
    try:
        del bnn
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


def test_two_models_on_one_base_have_posteriors_of_their_own(net, data):
    first = Trainer(net, data)
    first.torch_step()
    before = first.values()
    second = Trainer(net, data)
    second.torch_step()
    second.svi_step()
    assert equal(first.values(), before)
    with pytest.warns(UserWarning, match="later model has taken over"):
        assert first.bnn.base is second.bnn.base
    second.check_agreement()
    with first.bnn.reparameterize() as model:
        assert torch.isfinite(model(data[0])).all()
    second.check_agreement()


def test_former_model_leaves_the_excluded_parameters_training(net, data):
    net[0].bias.requires_grad_(False)
    former = BayesianModel(net)
    before = former.means.get_parameter("0.weight").clone()
    trainer = Trainer(net, data, include_params="2")
    assert net[0].weight.requires_grad
    assert not net[0].bias.requires_grad
    assert not net[2].weight.requires_grad
    start = net[0].weight.clone()
    trainer.torch_step()
    trainer.svi_step()
    assert not torch.equal(net[0].weight, start)
    trained = [p.clone() for p in net.parameters()]
    assert torch.equal(former.means.get_parameter("0.weight"), before)
    with pytest.warns(UserWarning, match="later model has taken over"):
        assert former.base is net  # and reading it takes nothing back
    assert all(torch.equal(a, b) for a, b in zip(trained, net.parameters(), strict=True))
    trainer.check_agreement()


def test_parameters_that_the_user_froze_stay_frozen(net):
    BayesianModel(net, include_params="2")
    net[0].weight.requires_grad_(False)
    BayesianModel(net, include_params="2")
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad


def test_non_contiguous_parameters_keep_their_identity(data):
    net = nn.Linear(3, 1)
    net.weight = nn.Parameter(torch.randn(3, 2).T[:1].clone(memory_format=torch.preserve_format))
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    bnn = BayesianModel(conv)
    x = torch.randn(2, 3, 5, 5)

    def model():
        with bnn.lift() as net:
            pyro.sample("y", dist.Normal(net(x), 1.0).to_event(4), obs=torch.zeros(2, 4, 3, 3))

    svi = SVI(model, bnn.guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    before = bnn.means.weight.detach().clone()
    svi.step()
    assert not torch.equal(before, bnn.means.weight)
    assert bnn.base.weight.stride() == bnn.means.weight.stride() == bnn.logvars.weight.stride()


def test_nothing_but_our_own_entries(trainer):
    trainer.torch_step()
    assert len(pyro.get_param_store()) == 0
    trainer.svi_step()
    assert all(key.startswith("BayesianModel") for key in pyro.get_param_store())
