"""The module given back: after any context it is as before."""

import warnings

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_bayes import BayesianModel


class Tied(nn.Module):
    """A language model whose embedding is also its output layer, with a child that is `None`."""

    def __init__(self):
        super().__init__()
        self.register_module("nothing", None)
        self.embedding = nn.Embedding(5, 4)
        self.output = nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x))


class Roots(nn.Module):
    """Parameters on the root, in a list and in a dictionary, and a child whose name has a dash."""

    def __init__(self):
        super().__init__()
        self.register_parameter("shift", nn.Parameter(torch.zeros(4)))
        self.register_parameter("absent", None)
        self.many = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.ones(4))})
        self.blocks = nn.ModuleDict({"block-1": nn.Linear(4, 4)})

    def forward(self, x):
        return self.blocks["block-1"](x * self.named["scale"] + sum(self.many) + self.shift)


class Listed(nn.Linear):
    """A layer that reads its weight from a list of its own."""

    def __init__(self):
        super().__init__(4, 3)
        self.all = [self.weight]

    def forward(self, x):
        return nn.functional.linear(x, self.all[0], self.bias)


def legacy_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 3))


ROWS, TOKENS, SEQUENCES = torch.randn(6, 4), torch.tensor([[1, 2, 4]]), torch.randn(2, 5, 4)
BASES = {
    "tied": (Tied, TOKENS),
    "roots": (Roots, ROWS),
    "listed": (Listed, ROWS),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), ROWS),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), ROWS),
    "legacy weight norm": (legacy_weight_norm, ROWS),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), ROWS),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), ROWS),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True), SEQUENCES),
    "gru cell": (lambda: nn.GRUCell(4, 3), ROWS),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), SEQUENCES),
    "convolution": (lambda: nn.Conv2d(1, 2, 3, padding_mode="circular"), torch.randn(2, 1, 6, 6)),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def snapshot(module):
    """Everything of each submodule, down to the items of its dictionaries and lists."""

    def flat(value):
        if isinstance(value, dict):
            return {key: id(item) for key, item in value.items()}
        return [id(item) for item in value] if type(value) is list else None

    return {
        name: {key: (id(value), flat(value)) for key, value in m.__dict__.items()}
        for name, m in module.named_modules(remove_duplicate=False)
    }


@pytest.fixture(params=BASES, ids=str)
def case(request):
    make, x = BASES[request.param]
    base = make()
    bnn = BayesianModel(base, init_logvar=-2.0)
    first(base(x))  # so that what forward itself leaves behind is there
    return bnn, x


CONTEXTS = {
    "draw": lambda bnn: bnn.reparameterize(),
    "local": lambda bnn: bnn.reparameterize(local_trick=True),
    "lift": lambda bnn: bnn.lift(),
}


@pytest.mark.filterwarnings("ignore:Expected examples that do not meet")
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("fails", [False, True])
def test_base_is_given_back(case, context, fails):
    bnn, x = case
    before = snapshot(bnn.base)
    objects = dict(bnn.base.named_parameters(remove_duplicate=False))

    def run():
        with context(bnn) as model:
            first(model(x))
            model.eval()
            if fails:
                raise KeyError("the user's")

    if fails:
        with pytest.raises(KeyError, match="the user's"):
            run()
    else:
        run()
    assert snapshot(bnn.base) == before
    after = dict(bnn.base.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in objects.items())


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_every_parameter_acts_and_learns(case, context):
    bnn, x = case
    bnn.eval()
    with context(bnn) as model:
        output = first(model(x))
        assert not torch.allclose(output, first(bnn.sample_model()(x)))
    if context is not CONTEXTS["lift"]:
        output.square().sum().backward()
        assert all(p.grad is not None for p in bnn.parameters())


def test_each_parameter_is_really_swapped(case):
    bnn, x = case
    bnn.eval()
    torch.manual_seed(1)
    with bnn.reparameterize() as model:
        torch.manual_seed(2)
        output = first(model(x))
    torch.manual_seed(1)
    sampled = bnn.sample_model()
    torch.manual_seed(2)
    torch.testing.assert_close(output, first(sampled(x)))


def test_tied_parameters_are_drawn_once():
    bnn = BayesianModel(Tied(), init_logvar=-2.0)
    assert list(bnn.sample_params()) == ["embedding.weight"]
    with bnn.reparameterize() as model:
        assert model.output.weight is model.embedding.weight
    sampled = bnn.sample_model()
    assert sampled.output.weight is sampled.embedding.weight
    trace = poutine.trace(bnn.guide).get_trace()
    assert list(trace.stochastic_nodes) == ["embedding.weight"]


def test_batch_norm_statistics():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = [b.clone() for b in net.buffers()]
    bnn = BayesianModel(net)
    bnn.kl_divergence()
    bnn.sample_params()
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    with bnn.reparameterize() as model:
        model(ROWS)
    assert net[1].num_batches_tracked == 1
    assert not torch.equal(before[0], net[1].running_mean)


def test_forward_pass_failing_in_a_pyro_model_gives_the_base_back(net):
    bnn = BayesianModel(net)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="shapes"):
        poutine.trace(lambda: bnn(torch.randn(2, 7))).get_trace()
    assert snapshot(net) == before
    assert not pyro.poutine.runtime.am_i_wrapped()


def test_attributes_that_forward_sets_are_kept():
    class Watching(nn.Linear):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    bnn = BayesianModel(Watching(4, 3))
    with bnn.reparameterize() as model:
        model(ROWS)
        model(ROWS)
    assert bnn.base.calls == 2


CHANGES = {
    "layer": lambda net: net.__setitem__(0, nn.Linear(3, 8)),
    "parameter": lambda net: setattr(net[0], "weight", nn.Parameter(torch.zeros(8, 3))),
    "parametrization": lambda net: nn.utils.parametrizations.weight_norm(net[0]),
    "removal": lambda net: net.__delitem__(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_base_is_an_error_each_time(net, change):
    bnn = BayesianModel(net)
    change(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Wrap the changed module"), bnn.reparameterize():
            pass


def test_added_layer_is_fine(net):
    bnn = BayesianModel(net)
    net.append(nn.Tanh())
    with bnn.reparameterize() as model:
        assert model(torch.randn(2, 3)).abs().max() < 1


def test_converted_recurrent_base():
    bnn = BayesianModel(nn.LSTM(4, 3), init_logvar=-2.0)
    bnn.double()
    with bnn.reparameterize() as model:
        output, _ = model(ROWS.double())
    output.sum().backward()
    assert all(p.grad is not None for p in bnn.parameters())


def test_sampled_model_of_a_base_with_a_computed_weight():
    bnn = BayesianModel(legacy_weight_norm())
    with bnn.reparameterize() as model:
        model(ROWS).sum().backward()
    bnn.sample_model()(ROWS).sum().backward()


def test_plain_tensors_of_a_network_are_its_own_state():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 3), torch.zeros(())

        def forward(self, x):
            self.calls = self.calls + 1
            return self.linear(x)

    bnn = BayesianModel(Counter())
    for _ in range(3):
        with bnn.reparameterize() as model:
            model(ROWS)
    assert bnn.base.calls == 3


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, legacy_weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights_are_given_back_without_gradients_too(norm):
    net = norm(nn.Linear(4, 3)) if norm is nn.utils.spectral_norm else norm()
    before, bnn = net.weight, BayesianModel(net)
    with torch.no_grad(), bnn.reparameterize() as model:
        model(ROWS)
        assert net.weight is not before
    assert net.weight is before
