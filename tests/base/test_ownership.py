"""Who owns the parameters of a base, until when, and what copies and later models leave alone."""

import copy
import gc

import pytest
import torch
from torch import nn

from pyro_bayes import BayesianModel

MEANS_TAKEN = "a later model has taken over"


def test_former_model_keeps_its_means():
    net = nn.Linear(2, 1)
    first = BayesianModel(net, init_logvar=-30.0)
    x, expected = torch.randn(5, 2), net(torch.ones(1, 2)).detach()
    second = BayesianModel(net)
    with torch.no_grad():
        second.means.weight.fill_(2.0)
    with first.mean() as held:
        torch.testing.assert_close(held(torch.ones(1, 2)), expected)
        assert held is net
    assert (net.weight == 2).all()
    with first.reparameterize() as drawn, first.mean() as held:
        assert drawn is held
    with pytest.warns(UserWarning, match=MEANS_TAKEN):
        assert first.base is net
    with second.mean() as held:
        torch.testing.assert_close(held(x), net(x))


def test_base_trains_again_when_its_model_dies():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].bias.requires_grad_(False)
    bnn = BayesianModel(net, exclude_params="1.bias")
    assert [p.requires_grad for p in net.parameters()] == [False, False, False, True]
    values = [p.clone() for p in net.parameters()]
    del bnn
    gc.collect()
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(values, net.parameters(), strict=True))
    net(torch.ones(1, 2)).sum().backward()


def test_a_model_that_dies_leaves_the_base_of_a_later_one_alone():
    net = nn.Linear(2, 1)
    first = BayesianModel(net)
    second = BayesianModel(net)
    del first
    gc.collect()
    assert not net.weight.requires_grad
    with torch.no_grad():
        second.means.weight.fill_(3.0)
    assert (net.weight == 3).all()


def test_shallow_copies_share_everything_and_take_nothing():
    net = nn.Linear(2, 1)
    bnn = BayesianModel(net)
    other = copy.copy(bnn)
    assert other.base is net
    assert other.guide is bnn.guide
    with other.reparameterize() as held:
        held(torch.ones(1, 2)).sum().backward()
    assert bnn.means.weight.grad is not None
    del other
    gc.collect()
    bnn.double()
    with torch.no_grad():
        bnn.means.weight.fill_(7.0)
    assert torch.equal(bnn.base.weight, torch.full((1, 2), 7.0, dtype=torch.float64))
    assert not net.weight.requires_grad


def test_a_state_that_is_loaded_reaches_no_other_model():
    net, parent = nn.Linear(2, 1), nn.Module()
    parent.first, parent.second = (BayesianModel(net, name=name) for name in ("first", "second"))
    with torch.no_grad():
        parent.first.means.weight.fill_(3.0)
        parent.second.means.weight.fill_(7.0)
    state = copy.deepcopy(parent.first.state_dict())
    parent.first.load_state_dict(state)
    assert (parent.second.means.weight == 7).all()
    parent.load_state_dict(copy.deepcopy(parent.state_dict()))
    assert (parent.first.means.weight == 3).all()
    assert (parent.second.means.weight == 7).all()
