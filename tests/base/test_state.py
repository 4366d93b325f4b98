"""Modes, buffers and random numbers are as they were."""

import copy

import pytest
import torch
from torch import nn

from pyro_bayes.base.state import (
    Buffers,
    draw_seed,
    evaluating,
    fingerprint,
    preserve_modes,
    preserve_random_state,
    seeded,
    undisturbed,
    where_double,
)


def fail(_):
    raise KeyError


def resized(module):
    module.plain.resize_(2, 5).zero_()


def shrunk(module):
    module.plain.resize_(1)


def filled(module):
    module.none = torch.ones(2)


def replaced(module):
    module.plain = torch.ones(7)


def registered(module):
    module.register_buffer("new", torch.ones(2))


def deleted(module):
    del module.plain


def of_another_type(module):
    module.plain.data = torch.ones(3, dtype=torch.float64)


def transposed(module):
    module.wide.t_().zero_()


CHANGES = {
    "values": lambda module: module.plain.add_(1),
    "resized": resized,
    "shrunk": shrunk,
    "filled": filled,
    "replaced": replaced,
    "registered": registered,
    "deleted": deleted,
    "of another type": of_another_type,
    "transposed": transposed,
    "expanded": lambda module: module.register_buffer("expanded", torch.ones(4)),
    "sparse": lambda module: module.sparse.mul_(3),
    "a gradient": lambda module: module.plain.requires_grad_().sum().backward(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_given_back(change, fails):
    module = nn.Module()
    module.inner = nn.Module()
    for name, value in {
        "plain": torch.arange(3.0),
        "wide": torch.arange(6.0).view(2, 3).T,
        "none": None,
        "expanded": torch.ones(1).expand(4),
        "sparse": torch.eye(3).to_sparse(),
    }.items():
        module.inner.register_buffer(name, value)
    before = dict(module.inner._buffers)
    values = {n: b if b is None else b.to_dense().clone() for n, b in before.items()}
    strides = before["wide"].stride()
    try:
        with undisturbed(module):
            change(module.inner)
            if fails:
                fail(module)
    except KeyError:
        assert fails
    assert module.inner._buffers.keys() == before.keys()
    for name, buffer in module.inner._buffers.items():
        assert buffer is before[name]
        assert buffer is None or torch.equal(buffer.detach().to_dense(), values[name])
    assert module.inner.wide.stride() == strides


def test_buffers_are_given_back_as_often_as_asked():
    norm = nn.BatchNorm1d(3)
    before = copy.deepcopy(norm.state_dict())
    buffers = Buffers([norm])
    for _ in range(2):
        norm(torch.randn(5, 3))
        assert norm.num_batches_tracked == 1
        buffers.restore()
        assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_modes_are_given_back():
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Dropout().eval()))
    modes = [module.training for module in net.modules()]
    with pytest.raises(KeyError), preserve_modes(net):
        fail(net.eval())
    assert [module.training for module in net.modules()] == modes
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in net.modules()] == modes
    assert torch.is_grad_enabled()


def test_random_numbers_are_given_back():
    state = torch.get_rng_state()
    with preserve_random_state():
        torch.randn(3)
    with seeded(3):
        first = torch.randn(3)
    with seeded(3):
        assert torch.equal(torch.randn(3), first)
    with pytest.raises(KeyError), seeded(3):
        fail(torch.randn(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_come_from_the_generator():
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(1)
    assert draw_seed(generator) != draw_seed(generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_seed() != draw_seed()
    assert not torch.equal(torch.get_rng_state(), state)


def test_double_precision_is_left_to_devices_that_have_it():
    class OnApple:
        device = torch.device("mps")

        def detach(self):
            return self

        is_meta = False

        def cpu(self):
            return values

    values = torch.randn(5)
    assert where_double(values) is values
    assert fingerprint([OnApple()]) == fingerprint([values])
