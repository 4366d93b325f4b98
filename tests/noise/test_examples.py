"""Examples that meet, rows that are no examples, and weights that are computed."""

import warnings

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from rule_cases import Weighted
from torch import nn

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.noise.examples import Examples

CONTEXTS = 200
EACH = [True, "flipout"]


class Net(nn.Module):
    """A function of an input and of some parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def ones(*shape):
    return torch.ones(shape)


def folded(net, x):  # as Hugging Face's Conv1D
    return torch.addmm(net.b, x.reshape(-1, x.shape[-1]), net.w).view(*x.shape[:-1], -1)


def attending(net, x):
    scores = net.layer(x) @ x.T
    return scores.softmax(-1) @ net.layer(x)


def over_identity(net, x):  # as DoRA
    norm = net.layer(torch.eye(4)).norm(dim=0)
    return net.layer(x) / norm


SHARED = {
    "on constants too": (
        Net(lambda n, x: F.linear(x, n.w) - ones(4, 4) @ n.w.T, w=torch.randn(3, 4)),
        torch.randn(4, 4),
    ),
    "masked too": (
        Net(lambda n, x: F.linear(x, 2 * n.w) - F.linear(x, n.w), w=torch.randn(3, 4)),
        torch.randn(3, 4),
    ),
    "transposed too": (
        Net(lambda n, x: x @ n.w + x @ n.w.T, w=torch.randn(4, 4)),
        torch.ones(3, 4),
    ),
    "one example": (Net(lambda n, x: n.layer(x) + n.layer(-x), layer=nn.Linear(4, 3)), ones(1, 4)),
    "called twice": (
        Net(lambda n, x: n.layer(x) + n.layer(x.roll(1, 0)), layer=nn.Linear(4, 3)),
        torch.randn(20, 4),
    ),
    "tied": (
        Net(lambda n, x: F.linear(F.embedding(x, n.w), n.w), w=torch.randn(6, 4)),
        torch.tensor([0, 1, 2]),
    ),
    "unrolled": (
        Net(lambda n, x: n.layer(n.layer(n.layer(x))), layer=nn.Linear(4, 4)),
        torch.randn(3, 4),
    ),
}
TABLE = torch.tensor([[0, 1, 0], [1, 0, 1], [2, 2, 2]])
MEETING = {
    "other units": (
        Net(
            lambda n, x: torch.cat([(h := n.layer(x)) * 1e6, h.mean(0).expand_as(h)], 1),
            layer=nn.Linear(4, 1),
        ),
        ones(6, 4),
    ),
    "pooled beside": (
        Net(lambda n, x: ((h := n.layer(x)), h.mean(0)), layer=nn.Linear(4, 3)),
        ones(6, 4),
    ),
    "closed gate": (
        Net(
            lambda n, x: (h := n.layer(x)) + n.gate * h.mean(0),
            layer=nn.Linear(4, 3),
            gate=torch.zeros(()),
        ),
        ones(6, 4),
    ),
    "graph": (Net(lambda n, x: ones(6, 6) / 6 @ n.layer(x), layer=nn.Linear(4, 3)), ones(6, 4)),
    "batch norm": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        torch.randn(6, 4),
    ),
    "attention over the batch": (Net(attending, layer=nn.Linear(4, 4)), torch.randn(6, 4)),
    "set": (Net(lambda n, x: n.layer(x).mean(0, keepdim=True), layer=nn.Linear(4, 3)), ones(6, 4)),
    "pairs": (Net(lambda n, x: n.layer(x[:3]) + n.layer(x[3:]), layer=nn.Linear(4, 3)), ones(6, 4)),
    "ring": (
        Net(lambda n, x: (h := n.layer(x)) + h.roll(1, 0), layer=nn.Linear(4, 3)),
        torch.randn(20, 4),
    ),
}
COMPUTED = {
    "basis": (Weighted(lambda x, w: F.linear(x, w @ ones(2, 6)), (3, 2)), ones(2, 6)),
    "basis on the left": (
        Weighted(lambda x, w: F.linear(x, ones(4, 2) @ w).sum(1, keepdim=True), (2, 6)),
        ones(2, 6),
    ),
    "expanded": (Weighted(lambda x, w: F.linear(x, w.expand(3, 6)), (3, 1)), ones(3, 6)),
    "repeated": (Weighted(lambda x, w: F.linear(x, w.repeat(1, 3)), (3, 2)), ones(2, 6)),
    "index": (Weighted(lambda x, w: F.linear(x, w[TABLE]), (3,)), ones(2, 3)),
    "index_select": (
        Weighted(lambda x, w: F.linear(x, w.index_select(1, TABLE[0])), (3, 2)),
        ones(2, 3),
    ),
    "row twice": (Weighted(lambda x, w: F.linear(x, w[[0, 0]].T), (1, 3)), ones(2, 2)),
    "layer on constants": (Net(over_identity, layer=nn.Linear(4, 3, bias=False)), ones(5, 4)),
}
INPUTS = {
    "sum with its product": Net(lambda n, x: x @ (n.p + n.p @ n.p), p=torch.randn(4, 4)),
    "sum with its norm": Net(lambda n, x: x @ (n.p + F.layer_norm(n.p, (4,))), p=torch.randn(4, 4)),
    "sum with its bag": Net(
        lambda n, x: x @ (n.p + F.embedding_bag(TABLE, n.p[:3], mode="sum")[[0, 1, 2, 0]]),
        p=torch.randn(4, 4),
    ),
}
FOLDED = {
    "positions": (
        Net(lambda n, x: folded(n, x).mean(1), w=torch.randn(4, 3), b=torch.randn(3)),
        ones(2, 8, 4),
    ),
    "queries": (
        Net(lambda n, x: (x @ n.layer(ones(4, 4)).T).sum(-1), layer=nn.Linear(4, 4)),
        ones(2, 4),
    ),
    "windows": (
        Net(
            lambda n, x: n.layer(x.view(2, 4, 2, 4).flatten(0, 1)).view(2, 8, 3).sum(1),
            layer=nn.Linear(4, 3),
        ),
        ones(2, 8, 4),
    ),
    "first positions": (
        Net(lambda n, x: n.layer(x.flatten(0, 1)[:5]).sum(0, keepdim=True), layer=nn.Linear(4, 3)),
        ones(2, 4, 4),
    ),
}


def model(net, init_logvar=-3.0):
    return BayesianModel(net, init_logvar=init_logvar)


def check(net, x, estimators=("local noise", "flipout")):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnn = BayesianModel(
            net, init_logvar=-4.0, exclude_params=["gate"] if hasattr(net, "gate") else []
        )
        if hasattr(net, "gate"):
            bnn.check(x, num_contexts=100)
            net.gate.data.fill_(2.0)
        found = bnn.check(x, num_contexts=CONTEXTS)
    for row in found.rows:
        if row.estimator in estimators:
            assert row.agrees, found
            assert row.variance_ratio == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize(("net", "x"), MEETING.values(), ids=MEETING)
def test_examples_that_meet_have_the_variance_of_draws(net, x):
    check(net, x)


@pytest.mark.parametrize(("net", "x"), SHARED.values(), ids=SHARED)
def test_weights_that_an_example_meets_twice_have_the_variance_of_draws(net, x):
    check(net, x)


@pytest.mark.parametrize(("net", "x"), COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_have_the_variance_of_draws(net, x):
    check(net, x)


@pytest.mark.parametrize("net", INPUTS.values(), ids=INPUTS)
def test_parameters_that_are_inputs_have_the_variance_of_draws(net):
    check(net, torch.randn(3, 4))


@pytest.mark.parametrize("local_trick", EACH)
def test_what_is_made_of_a_draw_meets_the_same_draw_without_a_look(local_trick):
    bnn = model(Net(lambda n, x: x @ (n.p + F.linear(n.p, ones(4, 4))), p=torch.randn(4, 4)))
    with bnn.reparameterize(local_trick, check_examples=False) as base:
        output, draw = base(torch.eye(4)), base.p.sign() * base.p.abs()
    torch.testing.assert_close(output, draw + draw.sum(1, keepdim=True))


@pytest.mark.parametrize(("net", "x"), FOLDED.values(), ids=FOLDED)
def test_rows_that_are_no_examples_have_the_variance_of_draws(net, x):
    check(net, x, estimators=["flipout"])


def test_what_is_known_holds_for_modes_and_arguments():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.other = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(4, 3)

        def forward(self, x, fail=False):
            if fail:
                raise ValueError("first")
            torch.vmap(lambda row: self.other(row))(x)
            self.seen = x
            return self.norm(self.layer(x))

    bnn, x = model(Fails()), torch.randn(6, 4)
    bnn.check(x, num_contexts=100, function=lambda net, x: net.layer(x))
    with bnn.reparameterize(True) as base, pytest.raises(ValueError, match="first"):
        base(x, fail=True)
    bnn.eval()
    with bnn.reparameterize(True) as base:
        base(x)
    bnn.base.norm.train()
    with bnn.reparameterize(True) as base, pytest.warns(UserWarning, match="'layer.weight'"):
        base(x)
    assert bnn.base.seen is x


@pytest.mark.parametrize("local_trick", EACH)
def test_particles_look_at_examples_too(local_trick):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    pooled = Net(lambda n, x: n.net(x).mean(0) + 0 * n.net(x), net=net)
    bnn, x = model(pooled, -1.0), ones(6, 4)

    def run():
        with bnn.lift() as lifted:
            pyro.deterministic("f", lifted(x))

    def spread(guide):
        with pyro.plate("num_particles_vectorized", 300, dim=-2):
            trace = poutine.trace(guide).get_trace()
            values = poutine.trace(poutine.replay(run, trace)).get_trace().nodes["f"]["value"]
        return values.detach().flatten(1, -2).var(0).mean()

    exact = spread(bnn.exact_kl())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert spread(bnn.exact_kl(local_trick)) == pytest.approx(float(exact), rel=0.3)


@pytest.mark.parametrize("local_trick", EACH)
def test_examples_that_meet_are_named_once(local_trick):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    bnn, x = model(net), torch.randn(20, 4)
    with bnn.reparameterize(local_trick, check_examples=False) as base:
        base(x)
    words = r"do not meet.*'0.bias', '0.weight' are one draw"
    with bnn.reparameterize(local_trick) as base, pytest.warns(UserWarning, match=words):
        base(x)
    with bnn.reparameterize(local_trick) as base:
        base(x)
    rows = {row.parameter: row.noise for row in bnn.summary(x, local_trick=local_trick).rows}
    assert rows["0.weight"].startswith("one draw")
    assert rows["2.weight"] == ("local" if local_trick is True else "flipout")
    bnn.eval()  # where nothing meets
    rows = {row.parameter: row.noise for row in bnn.summary(x, local_trick=local_trick).rows}
    assert rows["0.weight"] == ("local" if local_trick is True else "flipout")


class Tokens(nn.Module):
    """A transformer with as many positions as examples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 8), nn.Embedding(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.layer(x))


FINE = {
    "net": (nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2)), torch.randn(4, 4), 0),
    "positions": (Tokens(), torch.randint(9, (4, 4)), 0),
    "layers as many as examples": (nn.LSTM(4, 3, 2, batch_first=True), torch.randn(2, 5, 4), 0),
    "time first": (nn.Sequential(nn.Linear(4, 3), nn.GRU(3, 3)), torch.randn(5, 4, 4), 1),
    "norm after": (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(6, 4), 0),
    "constant inputs": (nn.Sequential(nn.Linear(4, 2, bias=False)), ones(4, 4), 0),
}


@pytest.mark.parametrize("local_trick", EACH)
@pytest.mark.parametrize(("net", "x", "batch_dim"), FINE.values(), ids=FINE)
def test_examples_that_do_not_meet_keep_their_noise(net, x, batch_dim, local_trick):
    bnn = model(net)
    rows = bnn.summary(x, local_trick=local_trick, batch_dim=batch_dim).rows
    noise = {row.parameter: row.noise for row in rows}
    own = "local" if local_trick is True else "flipout"
    for name, use in noise.items():
        assert use == own or "lstm" in use or "gru" in use or "positions" in name, noise
    assert "positions.weight" not in noise or noise["positions.weight"].startswith("one draw")


@pytest.mark.parametrize("size", [2, 20])
def test_looking_leaves_no_trace_and_is_done_once(size):
    calls = []

    def forward(net, x, memory):
        calls.append(len(memory))
        memory.append(x.shape)
        x.add_(1)
        return net.drop(net.norm(net.layer(x)))

    net = Net(forward, layer=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), drop=nn.Dropout())
    bnn, x, memory = model(net), torch.randn(size, 4), []
    bnn.base.norm.eval()
    before = x.clone()
    torch.manual_seed(3)
    with bnn.reparameterize(True, check_examples=False) as base:
        expected = base(x.clone(), [])
    torch.manual_seed(3)
    with bnn.reparameterize(True) as base:
        assert torch.equal(base(x, memory), expected)
        torch.testing.assert_close(x, before + 1)
        assert len(memory) == 1
        first = len(calls)
        base(x, memory)
    assert len(calls) == first + 1
    assert first <= 6


@pytest.mark.parametrize("local_trick", EACH)
def test_objectives_look_at_what_flows_compute_later(local_trick):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            h = self.layer(x)
            return torch.distributions.Independent(torch.distributions.Normal(h + h.mean(), 1.0), 1)

    objective = ELBO(model(Mixed()), likelihoods.Density(), 20, local_trick=local_trick)
    x, y = torch.randn(10, 3), torch.randn(10, 1)
    with pytest.warns(UserWarning, match="do not meet"):
        objective(x, y)
    objective(x, y)


def test_positions_and_caches_agree_under_flipout():
    """A position is the same with the positions before it and alone."""
    net = Net(lambda n, x: folded(n, x), w=torch.randn(4, 3), b=torch.randn(3))
    bnn, x = model(net), torch.randn(3, 5, 4)
    with torch.no_grad(), bnn.reparameterize("flipout") as base:
        whole = base(x)
        torch.testing.assert_close(base(x[:, 2:3]), whole[:, 2:3])
        torch.testing.assert_close(base(x[:2]), whole[:2])


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.sign()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * (weight.abs() < 10)


FUNCTIONS = {
    "parameter": lambda x, w: F.linear(x, Sign.apply(w)),
    "masked": lambda x, w: F.linear(x, Sign.apply(w * ones(3, 4).tril())),
    "transposed": lambda x, w: x @ Sign.apply(w.T),
    "shifted part": lambda x, w: F.linear(x, Sign.apply(w[1:] + 1)),
}


@pytest.mark.parametrize("local_trick", EACH)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_custom_functions_pass_the_gradient_of_the_draw(function, local_trick):
    bnn, x = model(Weighted(function, (3, 4))), torch.randn(5, 4)
    with bnn.reparameterize(local_trick) as base:
        draw = (base.weight.exp()).log()  # an operator without a rule
        loss = (base(x) * torch.arange(5.0)[:, None]).sum()
        found = torch.autograd.grad(loss, list(bnn.parameters()), retain_graph=True)
        (expected,) = torch.autograd.grad(
            (function(x, w := draw.detach().requires_grad_()) * torch.arange(5.0)[:, None]).sum(), w
        )
        wanted = torch.autograd.grad(draw, list(bnn.parameters()), expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_torch_does_not_report_is_refused():
    def sparse(x, w):
        index = torch.arange(4).expand(2, 4)
        return torch.sparse_coo_tensor(index, w, (4, 4), check_invariants=True) @ x.T

    bnn, words = model(Weighted(sparse, (4,))), "local noise cannot reach"
    with bnn.reparameterize(True) as base, pytest.raises(RuntimeError, match=words):
        base(torch.randn(2, 4))


@pytest.mark.parametrize("local_trick", EACH)
def test_reading_requires_grad_does_not_change_what_a_context_computes(local_trick):
    bnn, x = model(nn.Linear(4, 3)), torch.randn(5, 4)
    with bnn.reparameterize(local_trick) as base:
        before = base(x)
        assert base.weight.requires_grad
        assert torch.equal(base(x), before)


def test_a_network_is_not_asked_again_for_what_is_known(monkeypatch):
    asked = []
    monkeypatch.setattr(Examples, "_ask", lambda self, *args: asked.append(args))
    bnn = model(nn.Linear(4, 3))
    bnn.reparameterize(False).__enter__()
    with bnn.reparameterize(True, check_examples=False) as base:
        base(torch.randn(5, 4))
    assert not asked
