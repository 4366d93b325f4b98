"""The documented calls, in plain PyTorch."""

import threading
import warnings

import pytest
import torch
from torch import nn

from pyro_bayes import BayesianModel


def test_draws_are_fixed_inside_a_context_and_new_in_the_next(net, data):
    bnn = BayesianModel(net, init_logvar=-2.0)
    x, _ = data
    outputs = []
    for _ in range(2):
        with bnn.reparameterize() as model:
            assert model is net
            assert torch.equal(model(x), model(x))
            outputs.append(model(x))
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("local_trick", [False, True])
def test_draws_are_reproducible_under_a_seed(net, data, local_trick):
    bnn = BayesianModel(net, init_logvar=-2.0)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        with bnn.reparameterize(local_trick=local_trick) as model:
            outputs.append(model(data[0]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("local_trick", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_gradients_flow_to_the_posterior_only(net, data, local_trick, inside):
    bnn = BayesianModel(net)
    x, y = data
    with bnn.reparameterize(local_trick) as model:
        loss = nn.functional.mse_loss(model(x), y)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for parameter in (*bnn.means.parameters(), *bnn.logvars.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_construction_draws_nothing_and_keeps_the_base(net):
    before = {name: p.clone() for name, p in net.named_parameters()}
    objects = dict(net.named_parameters())
    state = torch.get_rng_state()
    bnn = BayesianModel(net)
    assert torch.equal(state, torch.get_rng_state())
    assert bnn.base is net
    for name, parameter in net.named_parameters():
        assert parameter is objects[name]
        assert torch.equal(parameter, before[name])


def test_means_and_logvars_name_what_trains(net):
    bnn = BayesianModel(net, init_logvar=-5.0)
    means, logvars = dict(bnn.means.named_parameters()), dict(bnn.logvars.named_parameters())
    assert list(means) == list(logvars) == [name for name, _ in net.named_parameters()]
    for name, parameter in net.named_parameters():
        assert torch.equal(means[name], parameter)
        assert torch.equal(logvars[name], torch.full_like(parameter, -5.0))
    named = BayesianModel(net, leaves="named")
    trained = {id(p) for p in named.parameters()}
    assert trained == {id(p) for p in (*named.means.parameters(), *named.logvars.parameters())}


def test_parameters_are_those_that_train():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    excluded = ["base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias"]
    bnn = BayesianModel(net, include_params="2", leaves="named")
    assert [name for name, _ in bnn.named_parameters()] == excluded + [
        f"guide.{kind}.2.{leaf}" for kind in ("means", "logvars") for leaf in ("weight", "bias")
    ]
    bnn = BayesianModel(net, include_params="2")
    names = [name for name, _ in bnn.named_parameters()]
    assert names == [*excluded, "guide.mean", "guide.logvar"]
    assert all(p.requires_grad for p in bnn.parameters())
    bnn.requires_grad_(False).requires_grad_(True)
    assert not net[2].weight.requires_grad


def test_base_is_the_posterior_mean_network(net, data):
    bnn = BayesianModel(net)
    optimizer = torch.optim.SGD(bnn.parameters(), lr=0.1)
    with bnn.reparameterize() as model:
        model(data[0]).sum().backward()
    optimizer.step()
    means = dict(bnn.means.named_parameters())
    for name, parameter in bnn.base.named_parameters():
        assert parameter.data_ptr() == means[name].data_ptr()
        assert torch.equal(parameter, means[name])
        assert not parameter.requires_grad


def test_sampled_model_is_standalone_and_trains(net, data):
    bnn = BayesianModel(net, init_logvar=-2.0)
    with bnn.reparameterize():
        sampled = bnn.sample_model()
    x, _ = data
    assert type(sampled) is type(net)
    assert not torch.allclose(sampled(x), net(x))
    sampled(x).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in sampled.parameters())
    assert all(p.grad is None for p in bnn.parameters())


def test_sampled_params_fit_functional_call(net, data):
    bnn = BayesianModel(net, init_logvar=-2.0)
    params = bnn.sample_params()
    torch.func.functional_call(net, params, data[0]).sum().backward()
    assert all(p.grad is not None for p in bnn.parameters())


def test_contexts_nest(net, data):
    bnn = BayesianModel(net, init_logvar=-2.0)
    x, _ = data
    with bnn.reparameterize() as model:
        outer = model(x)
        with bnn.reparameterize(local_trick=True):
            assert not torch.allclose(model(x), outer)
        assert torch.equal(model(x), outer)


def test_parameters_are_the_same_inside_a_context():
    bnn = BayesianModel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), exclude_params="0.bias")
    outside = list(bnn.named_parameters())
    for context in (bnn.reparameterize(), bnn.lift()):
        with context:
            inside = list(bnn.named_parameters())
        assert [(n, id(p)) for n, p in inside] == [(n, id(p)) for n, p in outside]


def test_mode_that_is_set_inside_a_context_is_given_back_whole(net):
    bnn = BayesianModel(net)
    with bnn.reparameterize():
        bnn.eval()
    assert bnn.training
    assert all(module.training for module in net.modules())


def test_functional_calls_reach_the_posterior(net, data):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.bnn = BayesianModel(net)

        def forward(self, x):
            with self.bnn.reparameterize() as model:
                return model(x).square().sum() + self.bnn.kl_divergence()

    loss = Loss()
    values = {n: p.detach() for n, p in loss.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    grads = torch.func.grad(lambda v: torch.func.functional_call(loss, v, (data[0],)))(values)
    torch.manual_seed(1)
    loss(data[0]).backward()
    for name, parameter in loss.bnn.named_parameters():
        torch.testing.assert_close(grads[f"bnn.{name}"], parameter.grad)


def test_averaged_model(net):
    bnn = BayesianModel(net)
    averaged = torch.optim.swa_utils.AveragedModel(bnn, use_buffers=True)
    with torch.no_grad():
        for mean in bnn.means.parameters():
            mean.fill_(7.0)
    averaged.update_parameters(bnn)
    assert all((p == 7.0).all() for p in averaged.module.means.parameters())
    assert all((p == -9.0).all() for p in averaged.module.logvars.parameters())
    assert all((p == 7.0).all() for p in averaged.module.base.parameters())


def test_contexts_may_close_in_any_order(net, data):
    bnn = BayesianModel(net, init_logvar=-2.0)
    x, _ = data
    first, second = bnn.reparameterize(), bnn.reparameterize()
    model = first.__enter__()
    second.__enter__()
    inner = model(x)
    first.__exit__(None, None, None)
    assert torch.equal(model(x), inner)
    second.__exit__(None, None, None)
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


class Named(nn.Module):
    """Parameters and children whose names the library's own modules might use."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "weight_scale", "variance", "sites", "means", "prior", "_names"):
            self.register_parameter(name, nn.Parameter(torch.ones(())))
        self.guide = nn.Linear(1, 1)
        self.base = nn.ModuleDict({"logvars": nn.Linear(1, 1), "locs": nn.Linear(1, 1)})

    def forward(self, x):
        return sum(p.sum() for p in self.parameters()) * x


def test_any_name_will_do():
    named = Named()
    bnn = BayesianModel(named)
    assert list(bnn.sample_params()) == [name for name, _ in named.named_parameters()]
    x = torch.ones(1)
    with bnn.reparameterize() as model:
        assert not torch.equal(model(x), named.forward.__func__(bnn.base, x).detach() * 2)
    with bnn.lift() as model:
        assert model(x).shape == (1,)
    assert set(bnn.guide()) == set(bnn.sample_params())


def test_kl_of_the_model(net):
    bnn = BayesianModel(net, prior_var=0.5)
    kl = bnn.kl_divergence()
    assert kl.shape == ()
    torch.testing.assert_close(kl, bnn.kl_divergence(prior_var=0.5))
    assert kl < bnn.kl_divergence(prior_var=1e-2)
    q = torch.distributions.Normal
    expected = sum(
        torch.distributions.kl_divergence(q(m, (0.5 * v).exp()), q(0.0, 0.5**0.5)).sum()
        for m, v in zip(bnn.means.parameters(), bnn.logvars.parameters(), strict=True)
    )
    torch.testing.assert_close(kl, expected)
    kl.backward()
    assert all(p.grad is not None for p in bnn.parameters())


def test_mixed_dtypes(data):
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2, dtype=torch.float64)])
    net.forward = lambda x: net[1](net[0](x).double())
    bnn = BayesianModel(net)
    with bnn.reparameterize() as model:
        assert model(data[0]).dtype == torch.float64
    assert bnn.kl_divergence().dtype == torch.float64


def test_numbers_of_other_libraries(net):
    numpy = pytest.importorskip("numpy")
    bnn = BayesianModel(net, numpy.float32(-4), prior_var=numpy.float64(0.5))
    assert bnn.kl_divergence(numpy.float32(0.5)).item() == pytest.approx(bnn.kl_divergence().item())


def test_unknown_attributes_fall_through_to_the_base(net):
    net.temperature = 0.7
    bnn = BayesianModel(net)
    assert bnn.temperature == 0.7
    assert not hasattr(bnn, "nonsense")
    with pytest.raises(AttributeError, match=r"Expected an attribute of .*Sequential; got 'nonsen"):
        _ = bnn.nonsense


def test_calling_outside_of_pyro_names_the_calls_meant(net, data):
    bnn = BayesianModel(net)
    with pytest.raises(RuntimeError, match="reparameterize") as error:
        bnn(data[0])
    for call in ("sample_params()", "sample_model()", "lift()", "kl_divergence()"):
        assert call in str(error.value)


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(net, torch.ones(2, 3))


ERRORS = {
    "not a module": (lambda net: BayesianModel(lambda x: x), TypeError, "Expected base to be an"),
    "logvar nan": (lambda net: BayesianModel(net, float("nan")), ValueError, "init_logvar"),
    "logvar text": (lambda net: BayesianModel(net, "-9"), ValueError, "init_logvar"),
    "prior zero": (lambda net: BayesianModel(net, prior_var=0.0), ValueError, "prior_var"),
    "prior negative": (lambda net: BayesianModel(net, prior_var=-1.0), ValueError, "prior_var"),
    "prior inf": (lambda net: BayesianModel(net, prior_var=float("inf")), ValueError, "prior_var"),
    "bayesian": (lambda net: BayesianModel(BayesianModel(net)), TypeError, "not Bayesian yet"),
    "bayesian inside": (
        lambda net: BayesianModel(nn.Sequential(BayesianModel(net))),
        TypeError,
        "'0' in it, a BayesianModel",
    ),
    "scripted": (
        lambda net: BayesianModel(scripted(net)),
        TypeError,
        "Expected a base in Python",
    ),
    "trick": (
        lambda net: BayesianModel(net).reparameterize("antithetic").__enter__(),
        ValueError,
        "True, False or 'flipout'",
    ),
    "batch_dim": (
        lambda net: BayesianModel(net).reparameterize(True, batch_dim=-1).__enter__(),
        ValueError,
        "batch_dim",
    ),
    "new base": (lambda net: setattr(BayesianModel(net), "base", net), AttributeError, "'base'"),
    "kl prior": (lambda net: BayesianModel(net).kl_divergence(0.0), ValueError, "prior_var"),
    "name empty": (lambda net: BayesianModel(net, name=""), ValueError, "name"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_expected(net, call, error, match):
    with pytest.raises(error, match=r"Expected .*; got") as raised:
        call(net)
    assert match in str(raised.value)
    if match in ("name", "init_logvar") or "Python" in match:
        assert all(p.requires_grad for p in net.parameters())


def test_threads_get_one_consistent_draw_each(net):
    bnn = BayesianModel(net, init_logvar=0.0)
    x = torch.randn(64, 3)
    failures, start = [], threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(10):
            with bnn.reparameterize() as model:
                draws = {name: p.clone() for name, p in model.named_parameters()}
                first = model(x)
                if not torch.equal(first, model(x)):
                    failures.append("outputs differ")
                if any(
                    draws[name] is not p and not torch.equal(draws[name], p)
                    for name, p in model.named_parameters()
                ):
                    failures.append("draws differ")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


# torch's compiler reads `.grad` of every tensor in a parameter's place, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_base(net, data):
    x, _ = data
    bnn = BayesianModel(torch.compile(net, backend="aot_eager"), init_logvar=-2.0)
    outputs = []
    for _ in range(2):
        with bnn.reparameterize(local_trick=True) as model:
            outputs.append(model(x))
            assert torch.equal(model(x), outputs[-1])
    assert not torch.allclose(*outputs)
    outputs[-1].sum().backward()
    assert all(p.grad is not None for p in bnn.parameters())


def test_compiled_training_step(net, data):
    x, y = data
    bnn = BayesianModel(net, init_logvar=-2.0)

    def loss():
        with bnn.reparameterize() as model:
            nll = nn.functional.mse_loss(model(x), y)
        return nll + bnn.kl_divergence() / len(x)

    compiled = torch.compile(loss, backend="aot_eager")
    values = []
    optimizer = torch.optim.Adam(bnn.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        value = compiled()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert len(set(values)) == 3
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    torch.manual_seed(1)
    expected = loss()
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(), expected)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.cell = nn.LSTM(4, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.spare = nn.Linear(2, 2)

    def forward(self, tokens):
        return self.head(self.norm(self.cell(self.table(tokens))[0][:, -1])).relu()


@pytest.mark.parametrize(("local_trick", "word"), [(True, "local"), ("flipout", "flipout")])
def test_summary_tells_what_an_estimator_reached(capsys, local_trick, word):
    bnn, tokens = BayesianModel(Mixed(), exclude_params="head.bias"), torch.randint(5, (6, 7))
    state = {name: buffer.clone() for name, buffer in bnn.base.named_buffers()}
    random = torch.get_rng_state()
    with pytest.warns(UserWarning, match="'table.weight' are one draw"):
        summary = bnn.summary(tokens, local_trick=local_trick)
    noise = {row.parameter: row.noise for row in summary.rows}
    assert noise["norm.weight"] == noise["head.weight"] == word
    assert noise["table.weight"] == "one draw"
    assert noise["cell.weight_hh_l0"] == "one draw (lstm)"
    assert noise["head.bias"] == "deterministic"
    assert noise["spare.weight"] == "not used"
    assert "one draw (lstm)" in capsys.readouterr().out
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[name], buffer) for name, buffer in bnn.base.named_buffers())
    assert all(p.grad is None for p in bnn.parameters())


def test_summary_takes_a_function():
    bnn = BayesianModel(nn.Sequential(nn.Linear(2, 2)))
    (weight, _) = bnn.summary(lambda net: net[0].weight.exp()).rows
    assert weight.noise == "one draw (exp)"
    assert bnn.summary().rows[0].noise is None
