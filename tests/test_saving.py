"""State dicts, pickles and copies."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from pyro_bayes import ELBO, BayesianModel, likelihoods, svi_model
from pyro_bayes.priors import Gaussian


def make(**kwargs):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return BayesianModel(net, exclude_params="1", **kwargs)


def randomize(bnn):
    with torch.no_grad():
        for parameter in (*bnn.parameters(), bnn.base[1].running_mean):
            parameter.normal_()
    return bnn


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def is_tied(bnn):
    return all(
        bnn.base.get_parameter(name).data_ptr() == mean.data_ptr()
        and bnn.base.get_parameter(name).dtype == mean.dtype
        for name, mean in bnn.means.named_parameters()
    )


def round_trip(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **kwargs)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": lambda bnn: round_trip(bnn, weights_only=False),
    "state": lambda bnn: copy.deepcopy(nn.ModuleList([bnn]))[0],
}


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_loads_into_a_model_that_never_ran(assign):
    bnn = randomize(make())
    state = round_trip(bnn.state_dict(), weights_only=True)
    fresh = make(name="other")
    assert fresh.load_state_dict(state, strict=True, assign=assign) == ([], [])
    assert same(bnn, fresh)
    assert is_tied(fresh)
    assert torch.equal(bnn.base[0].weight, fresh.base[0].weight)
    fresh.eval()
    with fresh.reparameterize() as model:
        model(torch.randn(2, 3)).sum().backward()


def test_state_dict_holds_each_number_once():
    state = make().state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    kinds = ("means", "logvars")
    expected = [f"guide.{kind}.0.{leaf}" for kind in kinds for leaf in ("weight", "bias")]
    assert [key for key in state if "0" in key] == expected


def test_strict_loading_names_what_is_missing():
    bnn = make()
    state = bnn.state_dict()
    del state["guide.logvars.0.bias"]
    state["surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)guide\.logvars\.0\.bias.*surplus"):
        bnn.load_state_dict(state)


def test_state_of_a_plain_net_is_refused_by_names_that_exist(net):
    with pytest.raises(RuntimeError, match=r"guide\.means\.0\.weight") as error:
        BayesianModel(net).load_state_dict(net.state_dict())
    assert "base.0" not in str(error.value)


def test_prior_means_load_into_a_model_of_that_prior_alone(net):
    """The variance beside them is a number, which the file does not have."""
    prior = Gaussian(var=0.1, mean="base")
    former = BayesianModel(net, prior=prior)
    state, expected = former.state_dict(), former.kl_divergence().item()
    fresh = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prior\.0\.weight:prior\.mean"):
        BayesianModel(fresh).load_state_dict(state)
    bnn = BayesianModel(fresh, prior=prior)
    bnn.load_state_dict(state)
    assert bnn.kl_divergence().item() == pytest.approx(expected)
    former.update_prior()
    other = BayesianModel(fresh)
    other.load_state_dict(former.state_dict())
    assert other.kl_divergence().item() == pytest.approx(0, abs=1e-5)


def test_nothing_that_is_missing_goes_unsaid():
    net = nn.ModuleDict({"base": nn.Linear(2, 2), "x": nn.Linear(2, 2)})
    bnn = BayesianModel(nn.ModuleList([net, nn.ModuleDict({"base": nn.Linear(2, 2)})]))
    state = bnn.state_dict()
    for key in list(state):
        partial = {k: v for k, v in state.items() if k != key}
        missing, unexpected = bnn.load_state_dict(partial, strict=False)
        assert (missing, unexpected) == ([key], [])


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_base_of_a_copy_can_be_wrapped_anew(make_copy):
    twin = make_copy(make())
    base = twin.base
    BayesianModel(base, include_params="2")
    assert base[0].weight.requires_grad
    assert base[2].weight.requires_grad  # its model is dead
    last = BayesianModel(base, include_params="2")
    assert not base[2].weight.requires_grad
    with pytest.warns(UserWarning, match="later model has taken over"):
        assert twin.base is last.base


def test_tied_parameters_round_trip():
    def tied():
        net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        net[1].weight = net[0].weight
        return BayesianModel(net)

    bnn = randomize_tied(tied())
    fresh = tied()
    fresh.load_state_dict(bnn.state_dict())
    assert same(bnn, fresh)
    assert torch.equal(bnn.base[1].weight, fresh.base[1].weight)


def randomize_tied(bnn):
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.normal_()
    return bnn


def test_nested_in_a_parent():
    parent = nn.ModuleDict({"a": make(), "b": nn.Linear(2, 2)})
    randomize(parent["a"])
    fresh = nn.ModuleDict({"a": make(), "b": nn.Linear(2, 2)})
    fresh.load_state_dict(parent.state_dict())
    assert same(parent["a"], fresh["a"])
    fresh.double()
    assert is_tied(fresh["a"])


def test_safetensors(tmp_path):
    bnn = randomize(make())
    save_file(bnn.state_dict(), tmp_path / "state.safetensors")
    fresh = make()
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same(bnn, fresh)
    save_model(bnn, tmp_path / "model.safetensors")
    fresh = make()
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert same(bnn, fresh)
    assert is_tied(fresh)


def step(bnn):
    def model():
        with bnn.lift() as net:
            y = net(torch.ones(4, 3))
        pyro.sample("y", dist.Normal(y, 1.0).to_event(2), obs=torch.zeros(4, 1))

    return SVI(model, bnn.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_are_independent_and_leave_the_original_working(make_copy, trained):
    bnn = randomize(make(name="net"))
    if trained:
        step(bnn)
        pyro.param("net.base.1.weight")  # leaves Pyro's weak reference on the parameter itself
    twin = make_copy(bnn)
    assert same(bnn, twin)
    for model in (bnn, twin):
        assert is_tied(model)
        assert not model.base[0].weight.requires_grad
        model.guide.quantiles([0.5])
    assert twin.guide.store_name == "net_1"
    assert twin.guide.model is not bnn.guide.model
    assert not {p.data_ptr() for p in bnn.parameters()} & {p.data_ptr() for p in twin.parameters()}

    before = {name: p.clone() for name, p in bnn.named_parameters()}
    mean = bnn.means.get_parameter("0.weight").clone()
    step(twin)
    assert all(torch.equal(p, before[name]) for name, p in bnn.named_parameters())
    assert not torch.equal(twin.means.get_parameter("0.weight"), mean)
    step(bnn)
    step(make_copy(twin))


@pytest.mark.parametrize("trained", [False, True])
def test_conversions_keep_the_tie(trained):
    bnn = make()
    if trained:
        step(bnn)
    objects = dict(bnn.named_parameters())
    assert bnn.double() is bnn
    assert is_tied(bnn)
    assert all(p.dtype == torch.float64 for p in bnn.parameters())
    assert bnn.kl_divergence().dtype == torch.float64
    assert dict(bnn.named_parameters()).keys() == objects.keys()
    assert all(p is objects[name] for name, p in bnn.named_parameters())
    mean = bnn.means.get_parameter("0.weight").detach().float()
    bnn.to(torch.bfloat16)  # the base is; the posterior stays in single precision
    assert torch.equal(bnn.means.get_parameter("0.weight"), mean)
    assert torch.equal(bnn.base.get_parameter("0.weight"), mean.bfloat16())
    bnn.float()
    assert torch.equal(bnn.base.get_parameter("0.weight"), mean)
    step(bnn)
    assert is_tied(bnn)


def test_conversion_that_replaces_parameters():
    bnn = make()
    step(bnn)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        bnn.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert is_tied(bnn)
    with bnn.reparameterize() as model:
        assert model(torch.randn(4, 3).double()).dtype == torch.float64
    held = dict(pyro.get_param_store().named_parameters())
    assert {id(p) for p in bnn.parameters()} == {id(p) for p in held.values()}


CHANGES = {
    "double": lambda bnn: bnn.double(),
    "deepcopy": copy.deepcopy,
    "save": lambda bnn: round_trip(bnn, weights_only=False),
    "load": lambda bnn: bnn.load_state_dict(bnn.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_open_context_is_left_first(change):
    bnn = make()
    with bnn.reparameterize(), pytest.raises(RuntimeError, match="Expected no context"):
        change(bnn)
    change(bnn)
    assert is_tied(bnn)
    with bnn.reparameterize() as model:
        model(torch.randn(2, 3, dtype=model[0].weight.dtype))


def test_base_can_be_saved_after_svi():
    bnn = make()
    step(bnn)
    base = round_trip(bnn.base, weights_only=False)
    assert torch.equal(base[1].weight, bnn.base[1].weight)


def test_base_alone_keeps_its_state_dict(net):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    bnn = BayesianModel(net)
    assert net.state_dict().keys() == state.keys()
    net.load_state_dict({name: value + 1 for name, value in state.items()})
    for name, mean in bnn.means.named_parameters():
        assert torch.equal(mean, state[name] + 1)


@pytest.mark.parametrize("make", [ELBO, svi_model])
def test_state_of_a_model_alone_says_what_the_likelihood_learned(make, tmp_path):
    bnn, fresh = BayesianModel(nn.Linear(3, 1)), BayesianModel(nn.Linear(3, 1))
    make(bnn, likelihoods.Gaussian(0.1, learn=True), 10)
    torch.save(bnn.state_dict(), tmp_path / "bnn.pt")
    with pytest.warns(UserWarning, match=r"without the likelihood's \['log_scale'\]"):
        fresh.load_state_dict(torch.load(tmp_path / "bnn.pt", weights_only=True))
    make(bnn, likelihoods.Gaussian(0.1), 10)
    fresh.load_state_dict(bnn.state_dict())


def test_state_of_an_objective_has_all_that_was_learned():
    saved, loaded = (
        ELBO(BayesianModel(nn.Linear(3, 1)), likelihoods.Gaussian(scale, learn=True), 10)
        for scale in (0.2, 0.4)
    )
    loaded.load_state_dict(saved.state_dict())
    assert loaded.likelihood.scale == saved.likelihood.scale
    with pytest.raises(RuntimeError, match=r"objective\.load_state_dict\(state\)"):
        loaded.model.load_state_dict(saved.state_dict())
