"""Networks in half precision: the posterior is kept in single, and the base shows it rounded."""

import copy
import io
import math
import pickle
import sys
import threading

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_bayes import ELBO, BayesianModel, likelihoods, svi_model

DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_kind_of_leaves = pytest.mark.parametrize("leaves", ["flat", "named"])


def make(dtype, leaves="flat", **kwargs):
    """A network with one layer of single precision, as mixed ones have."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).to(dtype)
    net[1].float()
    net[1].register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    net[1].register_forward_hook(lambda *args: args[-1].to(dtype))
    return BayesianModel(net, leaves=leaves, **kwargs)


def shows_the_means(bnn):
    base = dict(bnn.base.named_parameters())
    means = dict(bnn.means.named_parameters())
    assert all(mean.dtype == torch.float32 for mean in means.values())
    return all(torch.equal(base[name], mean.to(base[name].dtype)) for name, mean in means.items())


def perturb(bnn):
    with torch.no_grad():
        for p in bnn.parameters():
            p.add_(0.01 * torch.randn_like(p))


def steps(bnn, front_end, dtype, count=20):
    """Trains as each front end does, at the learning rate 1e-3, whose steps half rounds to none."""
    x, y = torch.randn(50, 3).to(dtype), torch.randn(50, 1)
    if front_end == "torch":
        objective = ELBO(bnn, likelihoods.Gaussian(0.5), num_data=50, local_trick=True)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
        for _ in range(count):
            optimizer.zero_grad()
            objective(x, y).backward()
            optimizer.step()
        return
    guide = bnn.guide if "guide" in front_end else bnn.exact_kl("flipout")
    many = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = Trace_ELBO(**many) if "particles" in front_end else TraceMeanField_ELBO()
    model = svi_model(bnn, likelihoods.Gaussian(0.5), num_data=50)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    losses = [svi.step(x, y) for _ in range(count)]
    assert all(map(math.isfinite, losses))


FRONT_ENDS = ["torch", "guide", "guide, particles", "exact"]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@every_dtype
def test_posterior_learns(dtype, front_end):
    bnn = make(dtype, leaves="named" if "guide" in front_end else "flat")
    before = {name: p.detach().clone() for name, p in bnn.named_parameters()}
    steps(bnn, front_end, dtype)
    for name, p in bnn.named_parameters():
        assert p.dtype == torch.float32
        assert (p - before[name]).abs().median() > 0.01
    assert shows_the_means(bnn)
    kl = bnn.kl_divergence()
    assert kl.dtype == torch.float32
    exact = copy.deepcopy(bnn).double().kl_divergence()
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)


@every_dtype
def test_what_the_base_holds_has_its_dtype(dtype):
    bnn, x = make(dtype), torch.randn(6, 3).to(dtype)
    expected = {name: p.dtype for name, p in bnn.base.named_parameters()}
    assert {name: value.dtype for name, value in bnn.sample_params().items()} == expected
    assert {n: p.dtype for n, p in bnn.sample_model().named_parameters()} == expected
    for trick in (True, "flipout"):
        with torch.no_grad(), bnn.reparameterize_with_kl(trick) as (net, _):
            assert net(x).dtype == dtype
            with torch.enable_grad():  # gradients may be on again inside
                net(x).float().sum().backward()
        assert all(p.grad.any() for p in bnn.guide.parameters())
        bnn.zero_grad()
    rolled = [bnn.predict(x, 8, chunk_size=size, generator=seeded()) for size in (1, 8)]
    torch.testing.assert_close(*(p.mean for p in rolled), atol=1e-2, rtol=1e-2)
    model = svi_model(bnn, likelihoods.Gaussian(0.5), num_data=6)
    for guide in (bnn.guide, None):
        draws = Predictive(model, guide=guide, num_samples=4, parallel=True)(x)
        assert draws["y"].isfinite().all()


def seeded():
    return torch.Generator().manual_seed(0)


class Average(nn.Module):
    """Examples that meet, with small weights."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False, dtype=dtype)
        nn.init.uniform_(self.linear.weight, 1e-4, 1e-3)

    def forward(self, x):
        return x.new_full((len(x), len(x)), 1 / len(x)) @ self.linear(x)


@every_dtype
def test_examples_that_meet_are_found(dtype):
    bnn, x = BayesianModel(Average(dtype)), torch.ones(6, 4, dtype=dtype)
    with pytest.warns(UserWarning, match="do not meet"), bnn.reparameterize(True) as net:
        net(x)
    with pytest.warns(UserWarning, match="do not meet"):
        bnn.look_at_examples(lambda net, x: net(x), x, local_trick="flipout")


@every_dtype
def test_what_a_likelihood_learns_keeps_its_digits(dtype):
    objective = ELBO(make(torch.float32), likelihoods.Gaussian(0.3, learn=True), num_data=50)
    log = objective.likelihood.log_scale.detach().clone()
    assert torch.equal(objective.to(dtype).likelihood.log_scale, log)
    assert objective.double().likelihood.log_scale.dtype == torch.float64
    scales = torch.tensor([0.3, 0.4], dtype=dtype)
    assert likelihoods.StudentT(scales, learn=True).log_scale.dtype == torch.float32


class Net(nn.Module):
    """A function of a weight of single precision, whose means are 0."""

    def __init__(self, call):
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.zeros(6, 5)), call

    def forward(self, x):
        return self.call(self.weight, x).float()


def autocast(w, x):
    with torch.autocast("cpu", torch.float16):
        return F.linear(x, w)


LOWERED = {
    "half": lambda w, x: F.linear(x.half(), w.half()),
    "to": lambda w, x: x.half() @ w.to(dtype=torch.float16).T,
    "type_as": lambda w, x: (x.half()[:, None] * w.type_as(x.half())).sum(-1),
    "bfloat16": lambda w, x: F.linear(x.bfloat16(), w.bfloat16()),
    "there and back": lambda w, x: F.linear(x, w.half().float()),
    "autocast": autocast,
    "row of a table": lambda w, _: F.embedding(torch.arange(6), w.half()),
    "bag": lambda w, _: F.embedding_bag(torch.arange(300).reshape(30, 10) % 6, w.half()),
}


@pytest.mark.parametrize("logvar", [-17.0, -22.0])
@pytest.mark.parametrize("call", LOWERED.values(), ids=LOWERED)
@torch.no_grad()
def test_lowered_weights_keep_their_noise(call, logvar):
    # The variances are below the least of float16, 6e-8; the deviations are not.
    bnn, x, deviations = BayesianModel(Net(call), init_logvar=logvar), torch.ones(30, 5), []
    for trick in (False, True, "flipout"):
        outputs = []
        for _ in range(40):
            with bnn.reparameterize(trick) as net:
                outputs.append(net(x))
        deviations.append(torch.stack(outputs).square().mean().sqrt().item())
    assert deviations[1:] == pytest.approx([deviations[0]] * 2, rel=0.2)


@pytest.mark.parametrize("local_trick", [True, "flipout"])
@every_dtype
@torch.no_grad()
def test_large_bags_are_counted(dtype, local_trick):
    bnn = BayesianModel(nn.EmbeddingBag(2, 3, mode="mean").to(dtype), init_logvar=-80.0)
    bags = torch.zeros(1, 5000, dtype=torch.long)
    with bnn.reparameterize(local_trick) as bag:
        torch.testing.assert_close(bag(bags)[0], bnn.base.weight[0], rtol=0.02, atol=0.02)


# The base, whose memory is its own


WRITES = {
    "in place": lambda p: nn.init.constant_(p, 3.0),
    "data": lambda p: p.data.fill_(3.0),
    "element": lambda p: p.data.view(-1)[0].fill_(3.0),
    "copy": lambda p: p.data.copy_(torch.full(p.shape, 3.0)),
    "assignment": lambda p: setattr(p, "data", torch.full(p.shape, 3.0, dtype=p.dtype)),
    "nan": lambda p: p.data.view(-1)[0].fill_(math.nan),
}
READS = {
    "means": lambda bnn: bnn.means.get_parameter("0.weight"),
    "draw": lambda bnn: bnn.sample_params()["0.weight"].float(),
    "guide": lambda bnn: bnn.guide()["0.weight"],
    "state": lambda bnn: bnn.state_dict()["guide.means.0.weight"],
    "guide's state": lambda bnn: bnn.guide.state_dict()["means.0.weight"],
    "guide's copy": lambda bnn: copy.deepcopy(bnn.guide).means.get_parameter("0.weight"),
    "moved": lambda bnn: moved(bnn).guide()["0.weight"].float(),
    "base": lambda bnn: bnn.base[0].weight.float(),
    "deepcopy": lambda bnn: copy.deepcopy(bnn).base[0].weight.float(),
    "pickle": lambda bnn: through_a_file(bnn).means.get_parameter("0.weight"),
    "conversion": lambda bnn: bnn.float().means.get_parameter("0.weight"),
    "named": lambda bnn: READS["means"](bnn) if list(bnn.named_parameters()) else None,
}


def through_a_file(bnn):
    bnn.base[1]._forward_hooks.clear()  # which are no part of this
    bnn.base[1]._forward_pre_hooks.clear()
    return pickle.loads(pickle.dumps(bnn))


def moved(bnn):
    bnn.guide.mean.data = bnn.guide.mean.data.double()
    return bnn


PAIRS = [("element", read) for read in READS] + [(write, "draw") for write in WRITES]


@pytest.mark.parametrize(("write", "read"), PAIRS)
@torch.no_grad()
def test_what_is_written_to_the_base_is_taken_over(write, read):
    write, read = WRITES[write], READS[read]
    bnn = make(torch.bfloat16, "named" if read is READS["named"] else "flat", init_logvar=-60.0)
    perturb(bnn)
    parameter = bnn.base[0].weight
    digits = bnn.means.get_parameter("0.weight").clone()
    write(parameter)
    if write is WRITES["assignment"]:
        bnn.base  # noqa: B018 (which looks for it)
    expected = torch.where(parameter == digits.bfloat16(), digits, parameter.float())
    found = read(bnn)
    assert found.dtype == torch.float32
    exact = read not in (READS["draw"], READS["base"], READS["deepcopy"])
    expected = expected if exact else expected.bfloat16().float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)


@torch.no_grad()
def test_what_is_no_change_keeps_the_digits():
    bnn = make(torch.float16)
    weight = bnn.base[0].weight
    perturb(bnn)
    mean = bnn.means.get_parameter("0.weight").clone()
    weight.copy_(mean)  # which rounds it
    assert torch.equal(bnn.means.get_parameter("0.weight"), mean)
    state = copy.deepcopy(bnn.guide.state_dict())
    weight.fill_(3.0)
    bnn.guide.load_state_dict(state)  # the last who writes is right
    assert torch.equal(bnn.means.get_parameter("0.weight"), mean)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@torch.no_grad()
def test_assigned_values_are_taken_over(dtype):
    bnn = make(dtype)
    if dtype == torch.float32:  # the norm's parameters are, too
        nn.utils.vector_to_parameters(torch.arange(29.0), bnn.base.parameters())
        assert bnn.base[2].bias.item() == 28.0
    bnn.base[2].bias.data = torch.full((1,), 7.0, dtype=dtype)
    assert bnn.double().means.get_parameter("2.bias").item() == 7.0


@every_kind_of_leaves
def test_the_users_own_reference_follows(leaves):
    bnn = make(torch.float16, leaves)
    weight = bnn.base[0].weight
    perturb(bnn)
    with bnn.reparameterize():
        pass
    assert torch.equal(weight, bnn.means.get_parameter("0.weight").half())
    perturb(bnn)
    with bnn.mean() as net:
        assert net[0].weight is weight
        assert torch.equal(weight, bnn.means.get_parameter("0.weight").half())


@every_dtype
@every_kind_of_leaves
def test_conversions_keep_the_digits(leaves, dtype):
    bnn = make(torch.float32, leaves)
    perturb(bnn)
    objects = dict(bnn.named_parameters())
    before = {name: p.detach().clone() for name, p in objects.items()}
    for _ in range(2):
        assert bnn.to(dtype).base[0].weight.dtype == dtype
        assert shows_the_means(bnn)
        assert bnn.prior()["0.weight"].dtype == torch.float32
        assert bnn.float().base[0].weight.dtype == torch.float32
        weight = bnn.base[0].weight
        assert weight.data_ptr() == bnn.means.get_parameter("0.weight").data_ptr()
    for name, p in bnn.named_parameters():
        assert p is objects[name]
        assert torch.equal(p, before[name])
    assert bnn.to(dtype).double().means.get_parameter("0.weight").dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("leaves", [("flat", "named"), ("named", "flat")])
@every_dtype
def test_states_load_in_every_direction(dtype, leaves, assign):
    source = make(dtype, leaves[0])
    perturb(source)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert not any(name.startswith("base.") for name in state)
    for other in (dtype, torch.float32, torch.float16):  # a base keeps its own dtype
        target = make(other, leaves[1])
        target.load_state_dict(state, assign=assign)
        assert target.base[0].weight.dtype == other
        assert shows_the_means(target)
        for name, value in target.state_dict().items():
            assert torch.equal(value, state[name])
    part = {name: value for name, value in state.items() if "logvars" not in name}
    keys = make(dtype, leaves[1]).load_state_dict(part, strict=False, assign=assign)
    assert all("logvars" in name for name in keys.missing_keys)
    with pytest.raises(RuntimeError, match="Missing key"):
        make(dtype, leaves[1]).load_state_dict(part, assign=assign)
    lowered = {name: value.to(dtype) for name, value in state.items()}  # as files of old are
    target.load_state_dict(lowered, assign=assign)
    assert shows_the_means(target)


@every_kind_of_leaves
def test_copies_are_apart(leaves):
    bnn = make(torch.float16, leaves)
    perturb(bnn)
    for twin in (copy.deepcopy(bnn), through_a_file(bnn)):
        assert shows_the_means(twin)
        before = bnn.base[0].weight.clone()
        with torch.no_grad():
            twin.base[0].weight.fill_(2.0)
            twin.means.get_parameter("2.bias").fill_(5.0)
        assert shows_the_means(twin)
        assert shows_the_means(bnn)
        assert torch.equal(bnn.base[0].weight, before)
        assert twin.base[2].bias.item() == 5.0


def test_a_later_model_starts_at_the_means():
    first = make(torch.bfloat16)
    net = first.base
    perturb(first)
    second = BayesianModel(net)
    expected = first.means.get_parameter("0.weight").bfloat16().float()
    assert torch.equal(second.means.get_parameter("0.weight"), expected)
    perturb(second)
    assert shows_the_means(second)
    mean = first.means.get_parameter("0.weight")
    with first.mean() as held:
        assert torch.equal(held[0].weight, mean.bfloat16())


def test_attributes_of_the_base_are_those_of_the_means():
    bnn = make(torch.bfloat16)
    with torch.no_grad():
        bnn.guide.mean.fill_(7.0)
    assert getattr(bnn, "0").weight.eq(7).all()


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_deterministic_keeps_its_dtype_when_it_is_loaded(assign):
    def model(dtype):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
        net[1].requires_grad_(False)
        return BayesianModel(net)

    for source, target in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]:
        former, later = model(source), model(target)
        later.load_state_dict(former.state_dict(), assign=assign)
        floats = [v for v in later.base.state_dict().values() if v.is_floating_point()]
        assert {v.dtype for v in floats} == {target}
        assert torch.equal(later.base[1].weight, former.base[1].weight.to(target))
        assert not later.base[1].weight.requires_grad
        with later.reparameterize() as net:
            net(torch.randn(4, 3, dtype=target))


def test_looks_at_the_base_from_other_threads_undo_no_step():
    bnn = BayesianModel(nn.Linear(300, 300).bfloat16())
    with torch.no_grad():
        bnn.guide.mean.zero_()
    done = threading.Event()

    def look():
        while not done.is_set():
            bnn.base.weight.shape  # noqa: B018

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=look) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(200):
            with torch.no_grad():
                bnn.guide.mean.add_(1 / 128)
            bnn.base.weight.shape  # noqa: B018
    finally:
        done.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert torch.equal(bnn.guide.mean, torch.full_like(bnn.guide.mean, 200 / 128))
