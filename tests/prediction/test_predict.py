"""Predictions: against closed forms, and against a loop over draws."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

from pyro_bayes import BayesianModel
from pyro_bayes.posterior.layout import Flat, Layout
from pyro_bayes.posterior.sampling import WeightDraws

TIGHT = {"rtol": 1e-4, "atol": 1e-5}


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def close(a, b, **options):
    torch.testing.assert_close(a, b, **(options or TIGHT))


@pytest.fixture
def bnn(net):
    return BayesianModel(net, init_logvar=-2.0)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, x, *, scale=1.0):
        return {"both": (self.one(x), scale * self.two(x)), "none": None}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.cell(x.unsqueeze(1))[0].squeeze(1)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 2)

    def forward(self, x):
        y = self.map(x)
        return y if y.sum() > 0 else -y


class Conditional(Branching):
    def forward(self, x):
        y = self.map(x)
        return torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,))


class Remembering(nn.Module):
    """A base that replaces one buffer and writes to another."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 2)
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        y = self.map(x)
        self.last = y.sum()
        self.calls.add_(1)
        return y + self.calls


def norm():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


# The truth


@pytest.mark.parametrize("chunk_size", [None, 1, 37])
def test_linear_model_in_closed_form(chunk_size):
    bnn = BayesianModel(nn.Linear(3, 1), init_logvar=-2.0)
    x, draws = torch.randn(6, 3), 4000
    prediction = bnn.predict(x, draws, chunk_size=chunk_size, quantiles=(0.1, 0.5))
    variance = (x**2).sum(-1, keepdim=True).add(1).mul(torch.tensor(-2.0).exp())
    error = (variance / draws).sqrt()
    mean = bnn.base(x).detach()
    assert ((prediction.mean - mean).abs() < 4 * error).all()
    close(prediction.variance, variance, rtol=5 * (2 / draws) ** 0.5, atol=0)
    close(prediction.standard_error, error, rtol=0.1, atol=0)
    level = Normal(mean, variance.sqrt()).icdf(torch.tensor(0.1))
    assert ((prediction.quantiles[0.1] - level).abs() < 8 * error).all()
    assert prediction.num_samples == draws


def test_draws_are_independent_and_normal():
    bnn = BayesianModel(nn.Linear(30, 20), init_logvar=0.0)
    samples = bnn.predict(lambda net: (net.weight, net.bias), 2000, statistics="samples").samples
    noise = torch.cat(
        [(s - p.detach()).flatten(1) for s, p in zip(samples, bnn.base.parameters(), strict=True)],
        1,
    )
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert noise.var().sub(1).abs() < 5 * (2 / noise.numel()) ** 0.5
    covariance = noise[:, :50].T.cov() - torch.eye(50)
    assert covariance.abs().max() < 6 / 2000**0.5
    assert (noise[1:] * noise[:-1]).mean().abs() < 5 / noise.numel() ** 0.5


def test_statistics_are_those_of_the_samples(bnn, data):
    levels = (0.05, 0.5, 0.9)
    prediction = bnn.predict(
        data[0], 83, statistics=("mean", "variance", "samples"), quantiles=levels, chunk_size=20
    )
    samples = prediction.samples
    assert samples.shape == (83, 12, 1)
    close(prediction.mean, samples.mean(0))
    close(prediction.variance, samples.var(0))
    close(prediction.standard_error, samples.std(0) / 83**0.5)
    for level in levels:
        assert torch.equal(prediction.quantiles[level], samples.quantile(level, 0))


def test_moments_are_stable_far_from_zero(bnn, data):
    def far(net, x):
        return net(x).double() + 1e9

    near = bnn.predict(data[0], 200, generator=seeded())
    moved = bnn.predict(data[0], 200, generator=seeded(), function=far, chunk_size=7)
    close(moved.variance.float(), near.variance, rtol=1e-3, atol=1e-6)


def test_quantiles_of_many_outputs_are_taken_in_blocks(bnn, data, monkeypatch):
    whole = bnn.predict(data[0], 50, quantiles=0.3, generator=seeded())
    monkeypatch.setattr("pyro_bayes.prediction.statistics._BLOCK", 150)
    parts = bnn.predict(data[0], 50, quantiles=0.3, generator=seeded())
    assert torch.equal(whole.quantiles[0.3], parts.quantiles[0.3])


# The draws


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 40, 100, None])
def test_results_do_not_depend_on_chunks(bnn, data, chunk_size, kept, monkeypatch):
    monkeypatch.setattr("pyro_bayes.posterior.sampling._KEPT", 2**22 if kept else 0)

    def samples(size, function=None):
        return bnn.predict(
            data[0],
            41,
            statistics="samples",
            chunk_size=size,
            generator=seeded(),
            function=function,
        ).samples

    def weights(net, x):
        return torch.cat([p.flatten() for p in net.parameters()])

    assert torch.equal(samples(chunk_size, weights), samples(1, weights))
    close(samples(chunk_size), samples(1))


def test_mixed_dtypes_in_chunks():
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2, dtype=torch.float64)])
    net.forward = lambda x: net[1](net[0](x).double())
    bnn, x = BayesianModel(net, init_logvar=-2.0), torch.randn(5, 3)
    one, several = (bnn.predict(x, 30, chunk_size=c, generator=seeded()) for c in (1, 8))
    assert one.mean.dtype == torch.float64
    close(one.variance, several.variance)


@pytest.mark.parametrize("bias", [False, True])
def test_draws_of_few_and_of_empty_parameters(bias):
    net = nn.Linear(3, 2, bias=bias)
    if bias:
        net.register_parameter("empty", nn.Parameter(torch.empty(0, 2)))
    bnn, x = BayesianModel(net, init_logvar=-2.0), torch.randn(5, 3)
    means = [p.clone() for p in bnn.parameters()]
    one, several = (bnn.predict(x, 30, chunk_size=c, generator=seeded()) for c in (1, None))
    close(one.variance, several.variance)
    assert all(torch.equal(p, m) for p, m in zip(bnn.parameters(), means, strict=True))


def test_seeds(bnn, data):
    def mean(generator=None):
        return bnn.predict(data[0], 10, generator=generator).mean

    assert torch.equal(mean(seeded(1)), mean(seeded(1)))
    assert not torch.allclose(mean(seeded(1)), mean(seeded(2)))
    generator = seeded()
    assert not torch.allclose(mean(generator), mean(generator))
    torch.manual_seed(3)
    first, second = mean(), mean()
    assert not torch.allclose(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, mean())


def test_global_generator_rests_when_another_is_given(bnn, data):
    state = torch.get_rng_state()
    bnn.predict(data[0], 10, generator=seeded())
    assert torch.equal(state, torch.get_rng_state())


def test_excluded_parameters_stay(net, data):
    bnn = BayesianModel(net, init_logvar=-2.0, include_params="2")
    hidden = bnn.predict(data[0], 20, function=lambda net, x: net[:2](x))
    close(hidden.mean, net[:2](data[0]).detach())
    assert (hidden.variance < 1e-10).all()


def test_tied_parameters_are_one_draw(data):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    bnn = BayesianModel(net, init_logvar=0.0)
    samples = bnn.predict(
        lambda net: net[0].weight - net[1].weight, 10, statistics="samples"
    ).samples
    assert (samples == 0).all()


# What is evaluated


def test_arguments(data):
    bnn, (x, _) = BayesianModel(Nested(), init_logvar=-2.0), data

    def run(x, **options):
        return bnn.predict(x, 20, generator=seeded(), **options).mean["both"][1]

    expected = run(x)
    assert torch.equal(run((x,)), expected)
    assert torch.equal(run({"x": x}), expected)
    assert torch.equal(run(lambda net: net(x)), expected)
    assert torch.equal(run(x, function=lambda net, x: net(x)), expected)
    assert torch.equal(run((), function=lambda net: net(x)), expected)
    close(run({"x": x, "scale": 2.0}), 2 * expected)


def test_named_tuples_are_one_argument():
    bnn = BayesianModel(nn.RNN(3, 2))
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    prediction = bnn.predict(packed, 3, chunk_size=1, function=lambda net, p: net(p)[1])
    assert prediction.mean.shape == (1, 2, 2)


def test_nested_outputs(data):
    bnn = BayesianModel(Nested(), init_logvar=-2.0)
    prediction = bnn.predict(
        data[0], 30, statistics=("mean", "variance", "samples"), quantiles=(0.5,)
    )
    for field in (prediction.mean, prediction.variance, prediction.quantiles[0.5]):
        assert field["none"] is None
        assert [tuple(t.shape) for t in field["both"]] == [(12, 2), (12, 1)]
    assert [tuple(t.shape) for t in prediction.samples["both"]] == [(30, 12, 2), (30, 12, 1)]
    close(prediction.standard_error["both"][0], prediction.samples["both"][0].std(0) / 30**0.5)


def test_what_was_not_asked_for_is_none(bnn, data):
    prediction = bnn.predict(data[0], 1, statistics="mean")
    assert prediction.variance is prediction.samples is prediction.standard_error is None
    assert prediction.quantiles == {}
    assert bnn.predict(data[0], 5, statistics=(), quantiles=(0.5,)).mean is None


@pytest.mark.parametrize("convert", [lambda y: y > 0, lambda y: y.half(), lambda y: y.long()])
def test_outputs_of_other_types(bnn, data, convert):
    prediction = bnn.predict(
        data[0], 50, function=lambda net, x: convert(net(x)), statistics=("mean", "samples")
    )
    assert prediction.mean.dtype == torch.float32
    assert prediction.samples.dtype == convert(torch.zeros(1)).dtype
    close(prediction.mean, prediction.samples.float().mean(0))


def test_classes_of_functions(bnn, data):
    x, y = data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density = bnn.predict(
            (x, y), 50, function=lambda net, x, y: Normal(net(x), 0.1).log_prob(y)
        )
        noisy = bnn.predict(x, 50, function=lambda net, x: Normal(net(x), 0.1).sample())
    assert density.mean.shape == (12, 1)
    plain = bnn.predict(x, 50)
    assert (noisy.variance != plain.variance).any()
    assert Normal(0.0, 1.0)._validate_args


def test_density_of_a_flow():
    zuko = pytest.importorskip("zuko")
    bnn = BayesianModel(zuko.flows.NSF(1, 3, transforms=2, hidden_features=(8,)), init_logvar=-4.0)
    c, x = torch.randn(5, 3), torch.randn(5, 1)

    def density(flow, c, x):
        return flow(c).log_prob(x)

    several = bnn.predict((c, x), 30, function=density, generator=seeded())
    one = bnn.predict((c, x), 30, function=density, generator=seeded(), chunk_size=1)
    assert several.mean.shape == (5,)
    close(several.mean, one.mean, rtol=1e-3, atol=1e-4)
    close(several.variance, one.variance, rtol=1e-2, atol=1e-4)
    with pytest.raises(TypeError, match=r"Expected outputs .*; got NormalizingFlow.*log_prob"):
        bnn.predict(c)


# Batches


def loaders(x, y):
    yield DataLoader(TensorDataset(x, y), batch_size=5)
    yield DataLoader(TensorDataset(x), batch_size=5)
    yield DataLoader(x, batch_size=5)
    yield list(x.split(5))
    yield ((part, None) for part in x.split(5))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 8])
def test_batches_are_as_one(bnn, data, chunk_size, kept, monkeypatch):
    monkeypatch.setattr("pyro_bayes.posterior.sampling._KEPT", 2**22 if kept else 0)
    options = {
        "statistics": ("mean", "variance", "samples"),
        "quantiles": (0.2, 0.7),
        "chunk_size": chunk_size,
    }
    whole = bnn.predict(data[0], 30, generator=seeded(), **options)
    for batches in loaders(*data):
        parts = bnn.predict(batches, 30, generator=seeded(), **options)
        for field in ("mean", "variance", "samples", "standard_error"):
            close(getattr(parts, field), getattr(whole, field))
        for level in (0.2, 0.7):
            close(parts.quantiles[level], whole.quantiles[level])


def test_functions_get_all_parts_of_a_batch(bnn, data):
    def density(net, x, y):
        return Normal(net(x), 0.1).log_prob(y)

    whole = bnn.predict(data, 30, function=density, generator=seeded())
    loader = DataLoader(TensorDataset(*data), batch_size=5)
    parts = bnn.predict(loader, 30, function=density, generator=seeded())
    close(parts.mean, whole.mean, rtol=1e-3, atol=1e-3)
    named = [{"x": x, "y": y} for x, y in loader]
    again = bnn.predict(named, 30, function=density, generator=seeded())
    assert torch.equal(again.mean, parts.mean)


def test_costs_are_counted_once_for_inputs_of_a_kind(bnn, data, monkeypatch):
    module = sys.modules["pyro_bayes.prediction.predict"]
    counted = []

    class Calls(module._Calls):
        def __init__(self):
            super().__init__()
            counted.append(self)

    monkeypatch.setattr(module, "_Calls", Calls)
    x = data[0]
    first, again = (bnn.predict(x, 30, generator=seeded()) for _ in range(2))
    assert len(counted) == 1
    assert torch.equal(first.mean, again.mean)
    bnn.predict(x[:2], 30)
    assert len(counted) == 2
    for _ in range(2):
        bnn.predict(lambda net: net(x), 30)  # what it calls, nobody knows
    assert len(counted) == 4


# What cannot be batched, and what must stay as it is


@pytest.mark.parametrize("module", [Recurrent, Branching, norm])
def test_loop_where_vmap_fails(module, data):
    bnn, (x, _) = BayesianModel(module(), init_logvar=-2.0), data
    expected = bnn.predict(x, 30, chunk_size=1, generator=seeded())
    with pytest.warns(UserWarning, match=rf"got {type(bnn.base).__name__}, which failed") as seen:
        first = bnn.predict(x, 30, chunk_size=8, generator=seeded())
    assert len(seen) == 1
    assert seen[0].filename == __file__
    again = bnn.predict(list(x[None]), 30, chunk_size=8, generator=seeded())
    for prediction in (first, again):
        assert torch.equal(prediction.mean, expected.mean)
        assert torch.equal(prediction.variance, expected.variance)


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (Recurrent, r"Recurrent, which failed in 'cell' \(LSTM\) \("),
        (Branching, r"Branching, which failed \("),
    ],
)
def test_note_names_the_module_that_vmap_cannot_batch(module, place, data):
    bnn = BayesianModel(module(), init_logvar=-2.0)
    with pytest.warns(UserWarning, match=place):
        bnn.predict(data[0], 30, chunk_size=8)


def attention(training):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return layer.train(training), torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("net", "x"),
    [(nn.EmbeddingBag(5, 2), torch.randint(5, (6, 3))), attention(True), attention(False)],
    ids=["bag", "attention", "encoder"],
)
def test_operators_that_torch_loops_over_are_batched_with_the_others(net, x):
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    bnn = BayesianModel(net, init_logvar=-4.0)
    several = bnn.predict(x, 20, generator=seeded())
    assert len(calls) == 2  # the first counts costs
    one = bnn.predict(x, 20, generator=seeded(), chunk_size=1)
    close(several.mean, one.mean)
    close(several.variance, one.variance)


def test_an_empty_parameter_does_not_keep_draws_from_being_batched():
    net = nn.Linear(3, 2)
    net.empty = nn.Parameter(torch.empty(4, 0))
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    BayesianModel(net).predict(torch.randn(5, 3), 20, chunk_size=10)
    assert len(calls) == 3  # the first shows what outputs are


@pytest.mark.parametrize("module", [norm, Remembering])
@pytest.mark.parametrize("chunk_size", [1, 8])
@pytest.mark.filterwarnings("ignore:Expected a base that torch.vmap can batch")
def test_base_is_given_back(module, chunk_size, data):
    bnn, (x, _) = BayesianModel(module(), init_logvar=-2.0), data
    before = {name: (id(b), b.clone()) for name, b in bnn.base.named_buffers()}
    prediction = bnn.predict(x, 20, chunk_size=chunk_size)
    assert not prediction.mean.requires_grad
    assert bnn.base.training
    assert all(isinstance(p, nn.Parameter) for p in bnn.base.parameters())
    assert all(p.grad is None for p in bnn.parameters())
    for name, buffer in bnn.base.named_buffers():
        assert id(buffer) == before[name][0]
        assert torch.equal(buffer, before[name][1])


class Observer(nn.Module):
    """A network that makes room for what it sees when it is first called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("cache", None)

    def forward(self, x):
        if not self.seen.numel():
            self.seen.resize_(2).zero_()
        if self.cache is None:
            self.cache = self.linear.weight.sum()
        return self.linear(x)


@pytest.mark.parametrize("call", [lambda b, x: b.predict(x, 10, chunk_size=1),
                                  lambda b, x: b.predict(x, 10, chunk_size=5),
                                  lambda b, x: b.summary(x)])  # fmt: skip
def test_buffers_that_a_first_call_makes_are_given_back(call, data):
    bnn = BayesianModel(Observer())
    seen = bnn.base.seen
    call(bnn, data[0])
    assert bnn.base.seen is seen
    assert seen.shape == (0,)
    assert bnn.base.cache is None


def test_base_is_given_back_after_an_error(bnn, data):
    def fail(net, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bnn.predict(data[0], function=fail)
    assert all(isinstance(p, nn.Parameter) for p in bnn.base.parameters())


def test_dropout_is_new_for_each_draw():
    net = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5))
    bnn, x = BayesianModel(net), torch.randn(10, 3)
    for chunk_size in (1, 10):
        variance = bnn.predict(x, 50, chunk_size=chunk_size).variance
        assert (variance > 0.01).float().mean() > 0.5
    net.eval()
    assert bnn.predict(x, 50).variance.max() < 0.01


def test_inside_of_other_contexts(bnn, data):
    x, expected = data[0], bnn.predict(data[0], 20, generator=seeded()).mean
    with bnn.reparameterize() as model:
        draw = model(x)
        assert torch.equal(bnn.predict(x, 20, generator=seeded()).mean, expected)
        assert torch.equal(model(x), draw)
    with torch.inference_mode():
        close(bnn.predict(x, 20, generator=seeded()).mean, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bnn.predict(x, 20, generator=seeded())
    assert half.mean.dtype == torch.float32
    close(half.mean, expected, rtol=0.1, atol=0.1)


def test_threads(bnn, data):
    expected = bnn.predict(data[0], 50, generator=seeded()).mean
    found = []

    def work():
        found.append(bnn.predict(data[0], 50, generator=seeded()).mean)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(mean, expected) for mean in found)


# torch's compiler reads `.grad` of every tensor in a parameter's place, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_base(net, data):
    bnn = BayesianModel(torch.compile(net, backend="aot_eager"), init_logvar=-2.0)
    compiled = bnn.predict(data[0], 20, generator=seeded())
    plain = BayesianModel(net, init_logvar=-2.0).predict(data[0], 20, generator=seeded())
    close(compiled.variance, plain.variance)


# How it is evaluated


@pytest.mark.filterwarnings("ignore:Expected a base that torch.vmap can batch")
def test_operators_of_higher_order(data):
    bnn = BayesianModel(Conditional(), init_logvar=-2.0)
    one, several = (bnn.predict(data[0], 20, generator=seeded(), chunk_size=c) for c in (1, None))
    close(one.variance, several.variance)


def test_small_nets_are_batched_and_large_ones_are_not():
    calls = []

    class Counted(nn.Sequential):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    small = BayesianModel(Counted(nn.Linear(5, 50), nn.ReLU(), nn.Linear(50, 1)))
    small.predict(torch.randn(100, 5), 200)
    assert len(calls) <= 5
    calls.clear()
    BayesianModel(Counted(nn.Linear(512, 512))).predict(torch.randn(64, 512), 10)
    assert len(calls) == 10


def test_costs_that_are_known_need_no_call(bnn, data):
    x, calls = data[0], []
    bnn.base.register_forward_pre_hook(lambda *_: calls.append(1))

    def count(x, **options):
        calls.clear()
        bnn.predict(x, 30, **options)
        return len(calls)

    assert [count(x), count(x)] == [2, 1]
    assert count(list(x.split(4))) == 1 + 3
    assert count(x, chunk_size=10) == 1 + 3
    assert count(list(x.split(4)), chunk_size=10) == 1 + 3 + 2 * 3
    assert count(x, chunk_size=1) == 30


def test_weights_that_would_be_copied_for_each_position_are_not_batched():
    calls, x = [], torch.randn(2, 32, 64)
    net = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    bnn = BayesianModel(net)
    bnn.predict(x, 10)
    assert len(calls) == 10


def test_memory_does_not_grow_with_draws():
    code = """
import resource, sys
import torch
from torch import nn
from pyro_bayes import BayesianModel

torch.set_num_threads(1)
unit = 1 if sys.platform == "darwin" else 1024
for examples, outputs, batched in ((200, 100, False), (2000, 10, True)):
    bnn = BayesianModel(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, outputs)))
    x = torch.randn(examples, 2)
    x = [x] if batched else x
    bnn.predict(x, 200)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bnn.predict(x, 4000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * unit < 60e6, grown  # all outputs would take 320 MB
"""
    pytest.importorskip("resource")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("batched", [False, True])
def test_progress_bar_of_long_work(bnn, data, capsys, monkeypatch, batched):
    x = list(data[0].split(4)) if batched else data[0]
    bnn.predict(x, 30, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("pyro_bayes.prediction.predict._DELAY", 0.0)
    bnn.predict(x, 30, progress=True)
    assert ("90/90" if batched else "30/30") in capsys.readouterr().err
    bnn.predict(x, 30)
    assert capsys.readouterr().err == ""


# Errors

ERRORS = {
    "none": (lambda b, x: b.predict(None), TypeError, "Expected x to be a tensor"),
    "number": (lambda b, x: b.predict(3.0), TypeError, r"predict\(\(argument,\)\)"),
    "module": (lambda b, x: b.predict(nn.Sequential()), TypeError, "got Sequential"),
    "text": (lambda b, x: b.predict("x"), TypeError, "got one of str"),
    "numbers": (lambda b, x: b.predict([1.0, 2.0]), TypeError, "got one of float"),
    "rows": (lambda b, x: b.predict(x.tolist()), ValueError, "list of 3"),
    "draws": (lambda b, x: b.predict(x, 0), ValueError, "num_samples"),
    "draws float": (lambda b, x: b.predict(x, 10.0), ValueError, "num_samples"),
    "draws true": (lambda b, x: b.predict(x, True), ValueError, "num_samples"),
    "one draw": (lambda b, x: b.predict(x, 1), ValueError, "at least 2 for a variance"),
    "chunk": (lambda b, x: b.predict(x, chunk_size=0), ValueError, "chunk_size"),
    "chunk float": (lambda b, x: b.predict(x, chunk_size=1.5), ValueError, "chunk_size"),
    "statistic": (lambda b, x: b.predict(x, statistics="median"), ValueError, "'median'"),
    "nothing": (lambda b, x: b.predict(x, statistics=()), ValueError, "statistics"),
    "level": (lambda b, x: b.predict(x, quantiles=(0.5, 1.0)), ValueError, "quantiles"),
    "level text": (lambda b, x: b.predict(x, quantiles="0.5"), ValueError, "quantiles"),
    "level int": (lambda b, x: b.predict(x, quantiles=95), ValueError, "quantiles"),
    "function": (lambda b, x: b.predict(x, function=3), TypeError, "function"),
    "two functions": (
        lambda b, x: b.predict(len, function=len),
        TypeError,
        "without another function",
    ),
    "generator": (lambda b, x: b.predict(x, generator=3), TypeError, "generator"),
    "no batch": (lambda b, x: b.predict([]), ValueError, "at least one batch"),
    "three parts": (lambda b, x: b.predict([(x, x, x)]), ValueError, "tuple of 3"),
    "nested batch": (lambda b, x: b.predict([{1, 2}]), TypeError, "one of set"),
    "scalars": (
        lambda b, x: b.predict([x, x], function=lambda net, x: net(x).sum()),
        ValueError,
        "dimension for examples",
    ),
    "distribution": (
        lambda b, x: b.predict(x, function=lambda net, x: Normal(net(x), 1.0)),
        TypeError,
        "got Normal.*log_prob",
    ),
    "complex": (
        lambda b, x: b.predict(x, function=lambda net, x: torch.fft.fft(net(x))),
        TypeError,
        "complex64",
    ),
    "a number": (
        lambda b, x: b.predict(x, function=lambda net, x: net(x).sum().item()),
        TypeError,
        "got float",
    ),
    "no tensor": (lambda b, x: b.predict(lambda net: None), TypeError, "got none"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_expected(bnn, data, call, error, match):
    with pytest.raises(error, match=r"Expected .*; got") as raised:
        call(bnn, data[0])
    assert raised.match(match)


@pytest.mark.filterwarnings("ignore:Expected a base that torch.vmap can batch")
def test_outputs_must_be_alike(bnn, data):
    calls = []

    def shapes(net, x):
        calls.append(1)
        return net(x)[: len(calls)]

    with pytest.raises(ValueError, match=r"Expected outputs of one shape, .*1, 1.*; got .*2, 1"):
        bnn.predict(data[0], 10, function=shapes, chunk_size=1)

    def kinds(net, x):
        calls.append(1)
        return net(x) if len(calls) % 2 else (net(x),)

    with pytest.raises(ValueError, match=r"Expected outputs alike .*; got"):
        bnn.predict(data[0], 10, function=kinds)


def test_kept_draws_come_back_in_their_places(net):
    bnn, x = BayesianModel(net, init_logvar=-2.0), torch.randn(6, 3)
    batches = DataLoader(TensorDataset(x), batch_size=2)
    whole = bnn.predict(x, 7, statistics="samples", generator=seeded(), chunk_size=3)
    parts = bnn.predict(batches, 7, statistics="samples", generator=seeded(), chunk_size=3)
    torch.testing.assert_close(parts.samples, whole.samples)
    assert len(whole.samples[:, 0, 0].unique()) == 7


def test_draws_of_several_types_are_independent():
    zeros = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    flats = [Flat(Layout({"w": zero}), zero, zero) for zero in zeros]
    draws = WeightDraws(flats, 50, seed=0, again=False)
    single, half = (rows.float().flatten() for rows in draws.rows(0, 50))
    assert torch.corrcoef(torch.stack([single, half]))[0, 1].abs() < 5 / len(single) ** 0.5
