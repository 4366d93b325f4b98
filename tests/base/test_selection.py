"""Patterns, the summary, and what they say when something is off."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from pyro_bayes import BayesianModel
from pyro_bayes.base.selection import select


def make():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3))),
            "fc1": nn.Linear(2, 2),
            "fc10": nn.Linear(2, 2),
            "block-1": nn.Linear(2, 2),
            "block_2": nn.Linear(2, 2),
        }
    )


def included(include=("",), exclude=(), base=None):
    return [c.name for c in select(base or make(), include, exclude) if c.included]


def names(*prefixes):
    return [name for name, _ in make().named_parameters() if name.startswith(prefixes)]


PATTERNS = {
    "everything": ([""], [], names("")),
    "prefix": (["encoder"], [], names("encoder")),
    "prefix of a longer name": (["fc1"], [], names("fc1", "fc10")),
    "prefix that ends": (["fc1."], [], names("fc1.")),
    "single string": ("fc1.", (), names("fc1.")),
    "star is one level": (["encoder.*.bias"], [], ["encoder.0.bias"]),
    "star at the start": (["*.weight"], [], ["fc1.weight", "fc10.weight", "block_2.weight"]),
    "star is not empty": (["fc1*."], [], names("fc10.")),
    "two stars are any level": (["encoder.**.bias"], [], ["encoder.0.bias", "encoder.1.0.bias"]),
    "two stars at the end": (["encoder.**"], [], names("encoder")),
    "dot is a dot": (["fc1.weight"], [], ["fc1.weight"]),
    "dash": (["block-1"], [], names("block-1")),
    "dash and star": (["block-*.bias"], [], ["block-1.bias"]),
    "exclude wins": (["encoder.**"], ["encoder.*.bias"],
                     ["encoder.0.weight", "encoder.1.0.weight", "encoder.1.0.bias"]),
    "several": (["fc1.", "block_2"], ["*.bias"], ["fc1.weight", "block_2.weight"]),
}  # fmt: skip


@pytest.mark.parametrize(("include", "exclude", "expected"), PATTERNS.values(), ids=PATTERNS)
def test_patterns(include, exclude, expected):
    assert included(include, exclude) == expected
    assert list(BayesianModel(make(), -9.0, include, exclude).sample_params()) == expected


def test_tied_parameters_match_under_any_name():
    def tied():
        net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        net["b"].weight = net["a"].weight
        return net

    assert included("b", (), tied()) == ["a.weight"]
    net = tied()
    net["c"] = nn.Linear(2, 2)
    assert included("", "b", net) == ["c.weight", "c.bias"]
    (row,) = BayesianModel(tied()).summary().rows
    assert row.parameter == "a.weight = b.weight"


def frozen(*layers):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    for layer in layers:
        net[layer].requires_grad_(False)
    return net


FROZEN = {
    "the rest": ([""], ["1.bias", "2.weight", "2.bias"]),
    "named": (["0."], ["0.weight", "0.bias"]),
    "named beside the rest": (["", "0.b"], ["0.bias", "1.bias", "2.weight", "2.bias"]),
    "named under another name": (["1.weight", ""], ["0.weight", "1.bias", "2.weight", "2.bias"]),
    "named by a wildcard": (["*.weight"], ["0.weight", "2.weight"]),
}


@pytest.mark.parametrize(("include", "expected"), FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_are_included_if_a_pattern_names_them(include, expected):
    net = frozen(0)
    with torch.no_grad():
        bnn = BayesianModel(net, include_params=include)
    assert list(bnn.sample_params()) == expected
    assert bnn.guide.mean.requires_grad
    reasons = {c.name: c.reason for c in bnn.choices if not c.included}
    expected_reason = "frozen, not named" if "" in include else "no include pattern"
    assert reasons.get("0.bias", expected_reason) == expected_reason
    wrapped = pickle.loads(pickle.dumps(bnn)), copy.deepcopy(bnn), bnn
    for model in wrapped:  # the former model has frozen what it includes
        trained = [c.name for c in select(model.base, "", ()) if c.included]
        assert trained == ["1.bias", "2.weight", "2.bias"]
    del model, wrapped
    again = BayesianModel(net)
    assert list(again.sample_params()) == ["1.bias", "2.weight", "2.bias"]
    del again, bnn
    assert list(BayesianModel(net).sample_params()) == ["1.bias", "2.weight", "2.bias"]


def test_a_copy_of_a_base_trains_as_that_did():
    net = frozen(0)
    bnn = BayesianModel(net, exclude_params="1.bias")
    copied = copy.deepcopy(net)
    assert list(BayesianModel(copied).sample_params()) == ["1.bias", "2.weight", "2.bias"]
    other = pickle.loads(pickle.dumps(bnn.base))
    with torch.no_grad():
        other[2].bias += 1  # so that it may be another network
    assert list(BayesianModel(other).sample_params()) == ["1.bias"]


def test_a_base_of_frozen_parameters():
    with pytest.raises(ValueError, match=r"frozen, not named.*include_params='0.weight'"):
        BayesianModel(frozen(0, 1, 2))
    assert not BayesianModel(frozen(0, 1, 2), include_params="**.bias").base[0].weight.requires_grad


def test_names_with_other_characters_are_reached_literally():
    net = nn.ModuleDict({"a/b": nn.Linear(1, 1), "µ": nn.Linear(1, 1), "plain": nn.Linear(1, 1)})
    assert included("a/b", (), net) == ["a/b.weight", "a/b.bias"]
    assert included("µ.bias", (), net) == ["µ.bias"]
    assert included("*.bias", (), net) == ["plain.bias"]


ERRORS = {
    "illegal": (dict(include_params="fc[0-9]"), ValueError, r"got 'fc\[0-9\]' with '\[', '\]'"),
    "illegal exclude": (dict(exclude_params=["fc?"]), ValueError, r"exclude_params.*'\?'"),
    "no match": (dict(include_params="fc2.weigth"), ValueError, r"matches none.*'fc1\.weight'"),
    "one of two": (dict(include_params=["fc1", "nope"]), ValueError, "got 'nope'"),
    "nothing left": (dict(exclude_params=""), ValueError, "at least one included parameter"),
    "nothing asked": (dict(include_params=[]), ValueError, "at least one included parameter"),
    "not text": (dict(include_params=[0]), TypeError, r"include_params .*; got \[0\]"),
    "none": (dict(exclude_params=None), TypeError, "exclude_params .*; got None"),
}


@pytest.mark.parametrize(("kwargs", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(kwargs, error, match):
    base = make()
    with pytest.raises(error, match=match) as raised:
        BayesianModel(base, **kwargs)
    assert str(raised.value).startswith("Expected")
    assert all(p.requires_grad for p in base.parameters())


def test_base_without_parameters():
    with pytest.raises(ValueError, match="Expected a base with parameters; got ReLU"):
        BayesianModel(nn.ReLU())


def test_lazy_base():
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"got the lazy parameter '0.weight'.*Run one forward"):
        BayesianModel(lazy)
    lazy(torch.randn(2, 5))
    BayesianModel(lazy)


def test_exclude_pattern_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match=r"'fc3' of exclude_params matches no parameter") as record:
        BayesianModel(make(), exclude_params="fc3")
    assert record[0].filename == __file__


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.index = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
        self.phase = nn.Parameter(torch.tensor([1j]))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self):
        return self.weight[self.index - 1] * self.phase.abs()


def test_integer_and_complex_parameters_stay_deterministic():
    bnn = BayesianModel(Odd())
    assert list(bnn.sample_params()) == ["weight"]
    rows = {row.parameter: row for row in bnn.summary().rows}
    assert rows["index"].why == "integer (torch.int64) stays deterministic"
    assert rows["phase"].why == "complex (torch.complex64) stays deterministic"
    assert rows["index"].prior == "none, fixed"
    assert rows["phase"].prior == "none, trains"
    with bnn.reparameterize() as model:
        model().sum().backward()
    assert bnn.base.phase.grad is not None
    with bnn.lift() as model:
        assert model().shape == (2,)


def test_summary(net, capsys):
    bnn = BayesianModel(net, -4.0, "2", prior_var=0.25)
    summary = bnn.summary()
    text = capsys.readouterr().out
    rows = {row.parameter: row for row in summary.rows}
    assert list(rows) == [name for name, _ in net.named_parameters()]
    assert all(name in text for name in rows)
    assert rows["2.weight"].included
    assert rows["2.weight"].why == "'2'"
    assert rows["2.weight"].prior == "N(0, 0.25)"
    expected = (net[2].weight.abs() / torch.e**-2).mean().item()
    assert rows["2.weight"].signal == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.3g}" in text
    assert not rows["0.weight"].included
    assert rows["0.weight"].why == "no include pattern"
    assert rows["0.weight"].signal is None
    assert rows["0.weight"].shape == (8, 3)
    assert "9 Bayesian parameters" in text


def test_summary_never_cuts_a_name(capsys):
    name = "a_rather_long_name_" * 4
    BayesianModel(nn.ModuleDict({name: nn.Linear(2, 2)}), exclude_params="**.bias").summary()
    assert f"{name}.weight" in capsys.readouterr().out


def test_summary_without_rich_names_the_extra(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_bayes\[rich\]'"):
        BayesianModel(net).summary()


def test_what_was_frozen_before_a_model_stays_frozen_in_later_ones():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    models = [BayesianModel(net, include_params=("0", "1"))]
    for base in (copy.deepcopy(net), net):
        models.append(BayesianModel(base))
        included = [c.name for c in models[-1].choices if c.included]
        assert included == ["1.weight", "1.bias"]
