"""What optimisers see: two flat parameters or one pair for each, of the same posterior."""

import copy
import io
import pickle
import weakref
from multiprocessing.reduction import ForkingPickler

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import __future__ as future
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from pyro_bayes import BayesianModel

LEAVES = ["flat", "named"]
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
X = torch.linspace(-1, 1, 12).view(4, 3)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def make(leaves, net=None, **options):
    return BayesianModel(net or build(), init_logvar=-3.0, leaves=leaves, **options)


@pytest.fixture(params=LEAVES)
def leaves(request):
    return request.param


@pytest.fixture
def net():
    return build()


@pytest.fixture
def bnn(net, leaves):
    return make(leaves, net)


def named(bnn):
    """The means and log-variances by name, with names that tell them apart."""
    trees = {"means": bnn.means, "logvars": bnn.logvars}
    return {f"{kind}.{n}": p for kind, tree in trees.items() for n, p in tree.named_parameters()}


def loss_of(bnn, seed=1, x=X):
    torch.manual_seed(seed)
    with bnn.reparameterize_with_kl() as (model, kl):
        return model(x.to(model[0].weight)).square().sum() + 0.1 * kl


def gradients(bnn):
    bnn.zero_grad()
    loss_of(bnn).backward()
    return {name: p.grad.clone() for name, p in named(bnn).items()}


def close(one, other, **options):
    assert list(one) == list(other)
    torch.testing.assert_close([*one.values()], [*other.values()], **options)


def values(bnn):
    return {name: p.detach().clone() for name, p in named(bnn).items()}


def check_whole(bnn, net):
    """The network that the user holds has the means, all is one memory, and it trains."""
    posterior = named(bnn)
    for name, parameter in net.named_parameters():
        mean = posterior[f"means.{name}"]
        assert parameter.data_ptr() == mean.data_ptr()
        assert torch.equal(parameter, mean)
        assert parameter.stride() == mean.stride()
    torch.optim.SGD(bnn.parameters(), 0.1).zero_grad()
    before = values(bnn)
    loss_of(bnn).backward()
    gradient = {name: p.grad.clone() for name, p in posterior.items()}
    torch.optim.SGD(bnn.parameters(), 0.1).step()
    close(values(bnn), {name: before[name] - 0.1 * g for name, g in gradient.items()})
    close({n: p.detach() for n, p in net.named_parameters()},
          {n: p.detach() for n, p in bnn.means.named_parameters()}, rtol=0, atol=0)  # fmt: skip
    bnn.zero_grad()


# Names, values and gradients


def test_names_and_values_are_those_of_the_base(bnn, net):
    assert all(isinstance(tree, nn.Module) for tree in (bnn.means, bnn.logvars))
    for tree in (bnn.means, bnn.logvars):
        assert [name for name, _ in tree.named_parameters()] == NAMES
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in tree.parameters())
    for name, parameter in net.named_parameters():
        assert torch.equal(bnn.means.get_parameter(name), parameter)
        assert torch.equal(bnn.logvars.get_parameter(name), torch.full_like(parameter, -3.0))
    expected = [f"guide.{name}" for name in named(bnn)]
    flat = ["guide.mean", "guide.logvar"]
    assert [name for name, _ in bnn.named_parameters()] == (
        flat if bnn.guide.memory.leaves == "flat" else expected
    )


def test_gradients_are_those_of_each_parameter(bnn):
    assert all(p.grad is None for p in named(bnn).values())
    drawn = bnn.sample_params()
    weights = {name: torch.randn_like(draw) for name, draw in drawn.items()}
    sum((weights[name] * draw).sum() for name, draw in drawn.items()).backward()
    for name, draw in drawn.items():
        mean, logvar = (tree.get_parameter(name) for tree in (bnn.means, bnn.logvars))
        torch.testing.assert_close(mean.grad, weights[name])
        half = 0.5 * (weights[name] * (draw - mean)).detach()
        torch.testing.assert_close(logvar.grad, half)


def test_gradients_of_both_kinds_are_the_same():
    one, other = map(make, LEAVES)
    close(gradients(one), gradients(other), rtol=0, atol=0)
    for bnn in (one, other):  # and all of the leaves are there
        total = parameters_to_vector([p.grad for p in bnn.parameters()])
        assert torch.equal(total, parameters_to_vector([p.grad for p in named(bnn).values()]))


def test_second_derivatives_of_both_kinds_are_the_same():
    pairs = []
    for bnn in map(make, LEAVES):
        leaves = list(bnn.parameters())
        first = torch.autograd.grad(loss_of(bnn), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        pairs.append(parameters_to_vector(second))
    torch.testing.assert_close(*pairs)


def test_many_gradients_at_once(bnn):
    loss, leaves = loss_of(bnn), list(bnn.parameters())
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    factors = torch.tensor([1.0, 3.0])
    many = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True)
    for own, one in zip(many, expected, strict=True):
        torch.testing.assert_close(own, torch.stack([one, 3 * one]))


# Writing through names


def all_data(bnn, value):
    for p in named(bnn).values():
        p.data = torch.full_like(p, value)


@torch.no_grad()
def all_copied(bnn, value):
    for p in named(bnn).values():
        p.copy_(torch.full_like(p, value))


def vector(bnn, parameters, value):
    filled = torch.full((sum(p.numel() for p in parameters),), value)
    vector_to_parameters(filled, parameters)


WRITES = {
    "copy_": all_copied,
    "data": all_data,
    "data.fill_": lambda bnn, v: [p.data.fill_(v) for p in named(bnn).values()],
    "detach": lambda bnn, v: [p.detach().fill_(v) for p in named(bnn).values()],
    "init": lambda bnn, v: [nn.init.constant_(p, v) for p in named(bnn).values()],
    "vector": lambda bnn, v: vector(bnn, list(bnn.parameters()), v),
    "vector by name": lambda bnn, v: vector(bnn, list(named(bnn).values()), v),
    "state of modules": lambda bnn, v: [
        tree.load_state_dict({n: torch.full_like(p, v) for n, p in tree.state_dict().items()})
        for tree in (bnn.means, bnn.logvars)
    ],
    "leaves": lambda bnn, v: [nn.init.constant_(p, v) for p in bnn.parameters()],
    "leaves' data": lambda bnn, v: [
        setattr(p, "data", torch.full_like(p, v)) for p in bnn.parameters()
    ],
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_reaches_the_posterior_and_the_network_at_once(bnn, net, write):
    seen = list(named(bnn).values())
    for value in (-20.0, -40.0):
        write(bnn, value)
        assert all((p == value).all() for p in (*net.parameters(), *bnn.parameters(), *seen))
        assert all((p == value).all() for p in named(bnn).values())
        for draw in bnn.sample_params().values():
            assert (draw - value).abs().max() < 1e-3
    check_whole(bnn, net)


def test_what_is_written_to_the_network_reaches_the_posterior(bnn, net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    assert all((p == 7).all() for p in bnn.means.parameters())
    net.load_state_dict({name: torch.full_like(p, 8.0) for name, p in net.named_parameters()})
    assert all((p == 8).all() for p in bnn.means.parameters())
    check_whole(bnn, net)


def test_values_of_another_type_are_refused_by_views():
    view = make("flat").means.get_parameter("0.bias")
    for value in (torch.zeros(8).double(), torch.zeros(7)):
        with pytest.raises(TypeError, match=r"Expected values of shape \(8,\).*; got"):
            view.data = value


# Writing gradients


def test_gradients_are_cleared_by_name(bnn):
    expected = gradients(bnn)
    posterior = named(bnn)
    first, second = "means.2.weight", "logvars.0.bias"
    others = [name for name in posterior if name not in (first, second)]
    posterior[first].grad = None
    assert posterior[first].grad is None
    assert named(bnn)[first].grad is None
    for copied in (copy.deepcopy(bnn), saved(bnn, weights_only=False)):
        close(values(copied), values(bnn), rtol=0, atol=0)
    for name in (second, *others):
        torch.testing.assert_close(posterior[name].grad, expected[name])
    posterior[second].grad.zero_()
    assert not posterior[second].grad.any()
    loss_of(bnn).backward()
    close({n: p.grad for n, p in posterior.items()},
          {n: (1 if n in (first, second) else 2) * g for n, g in expected.items()})  # fmt: skip
    for p in posterior.values():
        p.grad = None
    assert all(p.grad is None for p in bnn.parameters())


def test_gradients_that_were_cleared_come_again_with_any_number_of_passes():
    bnn = make("flat")
    weight = bnn.means.get_parameter("0.weight")
    for _ in range(60):
        loss_of(bnn).backward()
        weight.grad = None
        bnn.zero_grad()
        for _ in range(4):
            loss_of(bnn).backward()
            assert weight.grad is not None
        bnn.zero_grad()


def test_gradients_are_set_by_name(bnn):
    for i, p in enumerate(named(bnn).values()):
        p.grad = torch.full_like(p, float(i))
        assert (p.grad == i).all()
    expected = torch.cat([torch.full((p.numel(),), float(i)) for i, p in
                          enumerate(named(bnn).values())])  # fmt: skip
    assert torch.equal(parameters_to_vector([p.grad for p in bnn.parameters()]), expected)
    bnn.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in named(bnn).values())


def test_gradients_may_lie_in_memory_of_others():
    """As they do in the buckets of distributed training."""
    bnn, bucket = make("flat"), torch.arange(1.0, 101.0)
    mean, logvar = bnn.parameters()
    mean.grad, logvar.grad = bucket[7 : 7 + 41], bucket[50 : 50 + 41]
    by_name = parameters_to_vector([p.grad for p in named(bnn).values()])
    assert torch.equal(by_name, torch.cat([mean.grad, logvar.grad]))
    bias = bnn.means.get_parameter("0.bias")
    bias.grad = torch.full((8,), -1.0)
    assert (bias.grad == -1).all()
    assert (bucket == -1).nonzero().flatten().tolist() == list(range(7 + 24, 7 + 32))
    bias.grad = None
    assert (bucket == 0).sum() == 8


def test_gradients_are_clipped_by_name():
    found = []
    for bnn in map(make, LEAVES):
        loss_of(bnn).backward()
        clip_grad_norm_(bnn.means.parameters(), 0.1)
        found.append({name: p.grad for name, p in named(bnn).items()})
    close(*found)
    assert parameters_to_vector(
        [g for n, g in found[0].items() if "mean" in n]
    ).norm() == pytest.approx(0.1, rel=1e-4)


def test_penalties_on_means_have_gradients(bnn):
    optimizer = torch.optim.SGD(bnn.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in bnn.means.parameters()).backward()
        for p in bnn.means.parameters():
            torch.testing.assert_close(p.grad, 2 * p.detach())
        assert not any(p.grad is not None and p.grad.any() for p in bnn.logvars.parameters())
        before = parameters_to_vector(bnn.means.parameters()).detach()
        optimizer.step()
        torch.testing.assert_close(parameters_to_vector(bnn.means.parameters()), 0.8 * before)


# Optimisers

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.02),
    "fused Adam": lambda p: torch.optim.Adam(p, 0.02, fused=True),
    "foreach Adam": lambda p: torch.optim.Adam(p, 0.02, foreach=True, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
}


def iterates(bnn, optimizer, keep_gradients=False):
    for step in range(5):
        optimizer.zero_grad(set_to_none=not keep_gradients)
        loss_of(bnn, seed=step).backward()
        optimizer.step()
    return values(bnn)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_elementwise_optimizers_have_the_same_iterates(optimizer):
    flat, by_name, through_views = make("flat"), make("named"), make("flat")
    start = values(flat)
    expected = iterates(by_name, optimizer(by_name.parameters()))
    close(iterates(flat, optimizer(flat.parameters())), expected)
    views = optimizer(named(through_views).values())
    close(iterates(through_views, views, keep_gradients=True), expected)
    assert all(not torch.equal(value, start[name]) for name, value in expected.items())


def test_a_learning_rate_for_each_layer():
    found = []
    for bnn in map(make, LEAVES):
        groups = [
            {"params": [p for n, p in named(bnn).items() if ".0." in n], "lr": 0.0},
            {"params": [p for n, p in named(bnn).items() if ".2." in n]},
        ]
        start = values(bnn)
        found.append(iterates(bnn, torch.optim.Adam(groups, lr=0.05)))
        for name, value in found[-1].items():
            assert torch.equal(value, start[name]) == (".0." in name)
    close(*found)


@pytest.mark.parametrize("seen", [lambda bnn: bnn.parameters(), lambda bnn: named(bnn).values()],
                         ids=["leaves", "by name"])  # fmt: skip
def test_optimizers_continue_after_conversions(bnn, net, seen):
    held = list(seen(bnn))
    optimizer = torch.optim.Adam(held, 0.02)
    iterates(bnn, optimizer)
    bnn.to(torch.float64).to(torch.float32)
    before = values(bnn)
    iterates(bnn, optimizer)
    assert all(not torch.equal(value, before[name]) for name, value in values(bnn).items())
    check_whole(bnn, net)
    bnn.double()
    for parameter in held:
        parameter.data.fill_(-20.0)
    assert all((p == -20).all() for p in (*named(bnn).values(), *net.parameters()))


# State


def of_order(*names):
    return nn.ModuleDict({name: nn.Linear(2, int(name[-1])) for name in names})


def test_state_dicts_have_the_names_and_shapes_of_parameters(bnn):
    state = bnn.state_dict()
    assert list(state) == [f"guide.{name}" for name in named(bnn)]
    for key, value in state.items():
        assert value.shape == named(bnn)[key.removeprefix("guide.")].shape
        assert not value.requires_grad
    assert all(isinstance(v, nn.Parameter) for v in bnn.state_dict(keep_vars=True).values())
    assert list(bnn.guide.state_dict()) == list(named(bnn))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("other", LEAVES)
def test_a_file_of_one_kind_loads_into_any(bnn, other, assign):
    iterates(bnn, torch.optim.SGD(bnn.parameters(), 0.1))
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    fresh = make(other, net)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    assert fresh.load_state_dict(saved(bnn.state_dict()), assign=assign) == ([], [])
    close(values(fresh), values(bnn), rtol=0, atol=0)
    if assign:  # which may replace parameters, as torch says
        optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    close(iterates(fresh, optimizer), iterates(bnn, torch.optim.SGD(bnn.parameters(), 0.1)))
    check_whole(fresh, net)


@pytest.mark.parametrize("other", LEAVES)
def test_a_file_loads_after_the_order_of_parameters_changed(leaves, other):
    bnn = make(leaves, of_order("a1", "b2", "c3"))
    nn.init.normal_(next(bnn.parameters()))
    fresh = make(other, of_order("c3", "a1", "b2"))
    fresh.load_state_dict(bnn.state_dict())
    expected = values(bnn)
    assert list(values(fresh)) != list(expected)
    close(values(fresh), {name: expected[name] for name in values(fresh)}, rtol=0, atol=0)


def test_values_are_loaded_in_the_type_of_the_model(bnn, net):
    state = {name: value.double() for name, value in bnn.state_dict().items()}
    bnn.load_state_dict(state)
    assert all(p.dtype == torch.float32 for p in bnn.parameters())
    bnn.load_state_dict(state, assign=True)
    assert all(p.dtype == torch.float64 for p in (*bnn.parameters(), *net.parameters()))
    check_whole(bnn, net)


def without(key):
    return lambda state: state.pop(key)


SPOILED = {
    "missing": without("guide.logvars.0.bias"),
    "missing mean": without("guide.means.2.weight"),
    "surplus": lambda state: state.update({"guide.means.9.weight": torch.zeros(1)}),
    "surplus elsewhere": lambda state: state.update({"surplus": torch.zeros(1)}),
    "shape": lambda state: state.update({"guide.means.0.bias": torch.zeros(9)}),
    "several": lambda state: (
        state.pop("guide.means.0.bias"),
        state.update({"guide.logvars.0.weight": torch.zeros(2), "guide.more": torch.zeros(1)}),
    ),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_does_not_fit_is_named_as_torch_does(spoil, strict):
    said = []
    for leaves in LEAVES:
        bnn = make(leaves, name="one")
        state = dict(bnn.state_dict())
        spoil(state)
        try:
            found = bnn.load_state_dict(state, strict=strict)
            said.append([sorted(found.missing_keys), sorted(found.unexpected_keys)])
        except RuntimeError as error:
            said.append([sorted(str(error).replace(",", " ").replace(".\n", " ").split())])
        del bnn
    assert said[0] == said[1]


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def overwritten(bnn):
    future.set_overwrite_module_params_on_conversion(True)
    try:
        return bnn.double()
    finally:
        future.set_overwrite_module_params_on_conversion(False)


def safely(bnn, folder):
    save_model(bnn, folder / "model.safetensors")
    fresh = make(bnn.guide.memory.leaves)
    assert load_model(fresh, folder / "model.safetensors") == (set(), [])
    return fresh


def through_file(bnn, folder):
    save_file(bnn.state_dict(), folder / "state")
    fresh = make(bnn.guide.memory.leaves)
    fresh.load_state_dict(load_file(folder / "state"))
    return fresh


def emptied(bnn):
    state = saved(bnn.state_dict())
    bnn.to_empty(device="cpu").load_state_dict(state)
    return bnn


CHANGES = {
    "double": lambda bnn, _: bnn.double(),
    "to and back": lambda bnn, _: bnn.to(torch.float64).float(),
    "overwritten": lambda bnn, _: overwritten(bnn),
    "requires_grad_": lambda bnn, _: bnn.requires_grad_(False).requires_grad_(),
    "deepcopy": lambda bnn, _: copy.deepcopy(bnn),
    "deepcopy in a module": lambda bnn, _: copy.deepcopy(nn.ModuleList([bnn]))[0],
    "pickle": lambda bnn, _: pickle.loads(pickle.dumps(bnn)),
    "torch.save": lambda bnn, _: saved(bnn, weights_only=False),
    "assign": lambda bnn, _: [bnn, bnn.load_state_dict(saved(bnn.state_dict()), assign=True)][0],
    "safetensors": through_file,
    "safetensors of a model": safely,
    "share_memory": lambda bnn, _: bnn.share_memory(),
    "to_empty": lambda bnn, _: emptied(bnn),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_and_copies_keep_all_of_it_whole(bnn, net, change, tmp_path):
    iterates(bnn, torch.optim.SGD(bnn.parameters(), 0.1))
    expected = values(bnn)
    changed = change(bnn, tmp_path)
    net = net if changed is bnn else changed.base
    own = values(changed)
    close({name: value.float() for name, value in own.items()}, expected)
    check_whole(changed, net)
    if changed is not bnn:  # which has memory of its own, and trained
        close(values(bnn), expected, rtol=0, atol=0)
        check_whole(bnn, bnn.base)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_the_guide_loads_alone(bnn, assign):
    other = make("flat")
    iterates(other, torch.optim.SGD(other.parameters(), 0.1))
    bnn.guide.load_state_dict(saved(other.guide.state_dict()), assign=assign)
    close(values(bnn), values(other), rtol=0, atol=0)
    check_whole(bnn, bnn.base)


def test_a_view_may_be_saved_and_copied_alone():
    view = make("flat").means.get_parameter("0.weight")
    for copied in (copy.deepcopy(view), saved(view, weights_only=True)):
        assert type(copied) is nn.Parameter
        assert torch.equal(copied, view)
        assert copied.data_ptr() != view.data_ptr()


def written(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


PIECES = {
    "a layer's state": lambda bnn: bnn.base[0].state_dict(),
    "a layer": lambda bnn: bnn.base[0],
    "a copied layer": lambda bnn: copy.deepcopy(bnn.base[0]),
    "a weight": lambda bnn: bnn.base[0].weight,
    "a mean": lambda bnn: bnn.means.get_parameter("0.weight"),
    "a detached mean": lambda bnn: bnn.means.get_parameter("0.weight").detach(),
    "a log-variance": lambda bnn: bnn.state_dict()["guide.logvars.0.weight"],
}


@pytest.mark.parametrize("moved", [False, True], ids=["new", "converted"])
@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_one_layer_is_saved_without_the_others(leaves, piece, moved):
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10_000))
    bnn = make(leaves, net)
    if moved:
        bnn.double().float()
        bnn.load_state_dict(bnn.state_dict(), assign=True)
    assert written(piece(bnn)) < 4000  # 440 bytes, and what a file has besides


def test_files_hold_each_number_once(leaves):
    bnn = make(leaves, nn.Linear(100, 1000))
    bytes_of_all = 2 * 4 * 101_000
    assert bytes_of_all < written(bnn.state_dict()) < 1.01 * bytes_of_all
    assert bytes_of_all / 2 < written(bnn.base.state_dict()) < 1.02 * bytes_of_all / 2


def test_what_a_dead_model_left_in_the_param_store_is_removed(leaves):
    for width in (3, 4):
        bnn = make(leaves, nn.Linear(width, 1), name="same")
        svi_step(bnn, torch.ones(2, width))
        kept = weakref.ref(bnn)
        del bnn
        assert kept() is None


# Dtypes and strides


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 4, dtype=torch.float64)
        self.c = nn.Linear(4, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x).double()).to(self.c.weight.dtype))


def test_mixed_dtypes(leaves):
    net = Mixed()
    bnn = make(leaves, net)
    dtypes = {name: p.dtype for name, p in net.named_parameters()}
    names = [name for name, _ in bnn.named_parameters()]
    if leaves == "flat":
        assert sorted(names) == [f"guide.{n}" for n in ("logvar", "logvar_1", "mean", "mean_1")]
        assert all((p.dtype == torch.float64) == ("_1" in n) for n, p in bnn.named_parameters())
    for tree in (bnn.means, bnn.logvars):
        assert {name: p.dtype for name, p in tree.named_parameters()} == dtypes
    optimizer = torch.optim.Adam(bnn.parameters(), 0.05)
    before = values(bnn)
    for _ in range(3):
        optimizer.zero_grad()
        with bnn.reparameterize_with_kl() as (model, kl):
            loss = model(X).square().sum() + kl
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in values(bnn).items())
    assert all(torch.equal(p, bnn.means.get_parameter(n)) for n, p in net.named_parameters())
    (other,) = set(LEAVES) - {leaves}
    for assign in (False, True):
        fresh = make(other, Mixed())
        fresh.load_state_dict(saved(bnn.state_dict()), assign=assign)
        close(values(fresh), values(bnn), rtol=0, atol=0)
    twin = copy.deepcopy(bnn)
    close(values(twin), values(bnn), rtol=0, atol=0)
    assert all(p.dtype == torch.float64 for p in bnn.double().parameters())
    kl = bnn.kl_divergence()
    kl.backward()
    assert all(p.grad is not None for p in named(bnn).values())


def convolution(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(**options)


WAYS = {
    "new": lambda bnn: bnn,
    "converted": lambda bnn: bnn.double().float(),
    "copied": copy.deepcopy,
    "saved": lambda bnn: saved(bnn, weights_only=False),
    "loaded": lambda bnn: [bnn, bnn.load_state_dict(bnn.state_dict(), assign=True)][0],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_strides_of_the_base_are_those_in_the_context(leaves, way):
    net = convolution(memory_format=torch.channels_last)
    net[2].weight.data = torch.randn(4, 2).T
    strides = {name: p.stride() for name, p in net.named_parameters()}
    bnn = way(make(leaves, net))
    with bnn.reparameterize() as model:
        assert {name: p.stride() for name, p in model.named_parameters()} == strides
        model(torch.randn(5, 3, 3, 3)).sum().backward()
    for tree in (bnn.base, bnn.means, bnn.logvars):
        assert {name: p.stride() for name, p in tree.named_parameters()} == strides
    for p in named(bnn).values():
        assert p.grad.stride() == p.stride()


def test_another_memory_format_is_taken_on_before(leaves):
    net = convolution()
    expected = {n: p.stride() for n, p in convolution(memory_format=torch.channels_last)
                .named_parameters()}  # fmt: skip
    bnn = make(leaves, net)
    before = values(bnn)
    with pytest.warns(UserWarning, match=r"strides .* \['0.weight'\], which keep"):
        bnn.to(memory_format=torch.channels_last)
    close(values(bnn), before)
    close(
        {name: p for name, p in net.named_parameters()},
        {n: p for n, p in bnn.means.named_parameters()},
    )
    bnn = make(leaves, net.to(memory_format=torch.channels_last))
    with bnn.reparameterize() as model:
        assert {name: p.stride() for name, p in model.named_parameters()} == expected
    assert {name: p.stride() for name, p in net.named_parameters()} == expected


# Freezing and hooks


def svi_step(bnn, x=X, guide=None):
    def model():
        with bnn.lift() as base:
            y = base(x)
        pyro.sample("y", dist.Normal(y, 1.0).to_event(2), obs=torch.zeros_like(y))

    return SVI(model, guide or bnn.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step()


USES = {
    "draws": lambda bnn: bnn.sample_params(),
    "a context": lambda bnn: loss_of(bnn),
    "a divergence": lambda bnn: bnn.kl_divergence(),
    "predictions": lambda bnn: bnn.predict(X, num_samples=2),
    "SVI": svi_step,
    "exact KL": lambda bnn: svi_step(bnn, guide=bnn.exact_kl()),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_some_frozen_parameters_need_named_leaves(use):
    bnn = make("flat")
    bnn.means.get_parameter("0.weight").requires_grad_(False)
    bnn.means.get_parameter("2.bias").requires_grad = False
    assert [p.requires_grad for p in bnn.means.parameters()] == [False, True, True, False]
    with pytest.raises(RuntimeError, match=r"(?s)\['0.weight', '2.bias'\].*leaves='named'"):
        use(bnn)
    bnn.means.requires_grad_(True)
    use(bnn)


def test_named_leaves_freeze_by_name():
    bnn = make("named")
    frozen = ["means.0.weight", "logvars.2.bias"]
    start = values(bnn)
    for name in frozen:
        named(bnn)[name].requires_grad_(False)
    optimizer = torch.optim.Adam(bnn.parameters(), 0.05)
    after = iterates(bnn, optimizer)
    svi_step(bnn)
    for name, p in named(bnn).items():
        assert (p.grad is None) == (name in frozen)
        assert torch.equal(after[name], start[name]) == (name in frozen)


def test_all_means_freeze_at_once(bnn, net):
    start = values(bnn)
    bnn.means.requires_grad_(False)
    assert not any(p.requires_grad for p in bnn.means.parameters())
    after = iterates(bnn, torch.optim.Adam([p for p in bnn.parameters() if p.requires_grad], 0.05))
    for name, value in after.items():
        assert torch.equal(value, start[name]) == ("means" in name)
    bnn.means.requires_grad_()
    check_whole(bnn, net)


def test_frozen_means_stay_frozen_in_copies_and_conversions(bnn):
    bnn.means.requires_grad_(False)
    for changed in (copy.deepcopy(bnn), saved(bnn, weights_only=False), bnn.double()):
        assert not any(p.requires_grad for p in changed.means.parameters())
        assert all(p.requires_grad for p in changed.logvars.parameters())


def test_hooks_need_named_leaves():
    view = make("flat").means.get_parameter("0.weight")
    for register in (view.register_hook, view.register_post_accumulate_grad_hook):
        with pytest.raises(RuntimeError, match="leaves='named'"):
            register(lambda *_: None)
    bnn, seen = make("named"), []
    weight = bnn.means.get_parameter("0.weight")
    weight.register_hook(seen.append)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    loss_of(bnn).backward()
    assert torch.equal(seen[0], seen[1])


# Processes


def test_memory_is_shared_between_processes(bnn, net):
    sent = ForkingPickler.dumps(bnn.share_memory())
    there = pickle.loads(sent)
    with torch.no_grad():
        for parameter in named(there).values():
            parameter.fill_(-20.0)
    assert all((p == -20).all() for p in (*bnn.parameters(), *named(bnn).values()))
    assert all((p == -20).all() for p in net.parameters())
    check_whole(there, there.base)


# What came together stays together, and inference mode leaves nothing behind


@pytest.mark.parametrize("leaves", ["flat", "named"])
def test_a_model_is_pickled_with_its_optimizer(leaves):
    bnn = make(leaves, nn.Linear(2, 1))
    file = io.BytesIO()
    torch.save((bnn, torch.optim.SGD(bnn.parameters(), 0.1)), file)
    file.seek(0)
    there, optimizer = torch.load(file, weights_only=False)
    before = there.means.weight.clone()
    there.kl_divergence().backward()
    optimizer.step()
    assert not torch.equal(there.means.weight, before)
    assert torch.equal(there.base.weight, there.means.weight)


@pytest.mark.parametrize("leaves", ["flat", "named"])
def test_inference_mode_leaves_nothing_behind(leaves):
    bnn = BayesianModel(nn.Linear(2, 1), prior_var={"weight": 0.1, "": 0.2}, leaves=leaves)
    with torch.inference_mode():
        bnn.kl_divergence()
        bnn.load_state_dict(copy.deepcopy(bnn.state_dict()))
        bnn.double()
    (slope, *_) = torch.autograd.grad(bnn.kl_divergence(), [*bnn.parameters()], create_graph=True)
    slope.square().sum().backward()


def test_a_view_that_was_frozen_trains_with_all():
    bnn = BayesianModel(nn.Linear(2, 1))
    bnn.means.weight.requires_grad_(False)
    bnn.requires_grad_(True)
    bnn.kl_divergence().backward()
    assert bnn.means.weight.grad is not None


def test_a_mean_that_was_replaced_is_taken_over():
    bnn = BayesianModel(nn.Linear(2, 1))
    bnn.means.weight = nn.Parameter(torch.full((1, 2), 3.0))
    bnn.double()
    assert (bnn.base.weight == 3).all()
    assert (bnn.means.weight == 3).all()
