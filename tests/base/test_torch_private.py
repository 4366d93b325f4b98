"""Each private call does what it is used for: a release that moves one fails here."""

import pytest
import torch
from pyro import poutine
from torch.utils.checkpoint import checkpoint

from pyro_bayes.base import torch_private as private


def test_transform_level():
    levels = []
    torch.func.grad(lambda x: levels.append(private.transform_level()) or x.sum())(torch.ones(2))
    nested = torch.vmap(torch.func.grad(lambda x: levels.append(private.transform_level()) or x))
    nested(torch.ones(2))
    assert levels == [1, 2]
    assert private.transform_level() == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own use
def test_is_transformed():
    seen = []

    def look(x):
        seen.append(private.is_transformed())
        return x * 1

    look(torch.ones(1))
    torch.vmap(look)(torch.ones(2))
    torch.func.jvp(look, (torch.ones(1),), (torch.ones(1),))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(1))
    look(torch.ones(1))
    assert seen == [False, True, True, True, False]


def test_leaving_a_transform():
    kept = []

    def inner(x):
        with private.outside_transforms():
            kept.append(torch.ones(3))
        return x * kept[0].sum()

    assert torch.vmap(inner)(torch.ones(2)).tolist() == [3, 3]
    assert kept[0].sum() == 3  # no tensor of the transform


def test_saved_tensors_hooks():
    assert not private.has_saved_tensors_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert private.has_saved_tensors_hooks()
    seen = []
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: seen.append(private.has_saved_tensors_hooks()) or x.sin(), x,
               use_reentrant=False)  # fmt: skip
    assert seen == [True]


def test_untracked_views_may_change_in_place():
    class Split(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, untracked):
            if not untracked:
                return x[:1].view(1), x[1:].view(1)
            with private.untracked_views():
                return x[:1].view(1), x[1:].view(1)

        @staticmethod
        def backward(ctx, *grads):
            return torch.cat(grads), None

    x = torch.ones(2, requires_grad=True)
    first, _ = Split.apply(x * 1, True)
    first.mul_(2).sum().backward()
    first, _ = Split.apply(x * 1, False)
    with pytest.raises(RuntimeError, match="view"):
        first.mul_(2)


def test_autocast_of_any_device():
    assert not private.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert private.is_any_autocast_enabled()


def test_wrapper_subclass():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "reported"

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return "dispatched"

    like = torch.ones(2, 3, dtype=torch.double).t()
    wrapper = private.wrapper_subclass(Wrapper, like)
    assert torch.add(wrapper, 1) == "reported"
    with private.without_torch_function():
        assert (wrapper.shape, wrapper.stride(), wrapper.dtype) == ((3, 2), (1, 3), torch.double)


def test_flatten_dense():
    tensors = [torch.arange(6.0).view(2, 3).t(), torch.tensor(7.0), torch.empty(0)]
    assert private.flatten_dense(tensors).tolist() == [0, 3, 1, 4, 2, 5, 7]


def test_trees():
    tree = {"a": [torch.ones(1), 2], "b": (3,)}
    leaves, spec = private.tree_flatten(tree)
    assert private.tree_unflatten(leaves, spec) == tree
    assert private.tree_leaves(tree) == leaves
    assert private.tree_map_only(int, lambda n: n + 1, tree)["b"] == (4,)
    assert private.tree_map(type, tree) == {"a": [torch.Tensor, int], "b": (int,)}


def test_open_traces():
    with poutine.trace() as outer, poutine.block(), poutine.trace() as inner:
        assert private.open_traces() == [outer.trace, inner.trace]
    assert private.open_traces() == []


def test_is_enumerated():
    with poutine.enum(first_available_dim=-1), poutine.trace():
        assert private.is_enumerated()
    assert not private.is_enumerated()


def test_function_after_a_backward_pass():
    calls = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            private.after_backward(lambda: calls.append("after"))
            calls.append("backward")
            return grad

    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: calls.append("leaf"))
    Noting.apply(x).sum().backward()
    assert calls == ["backward", "leaf", "after"]


def test_parametrization_cache():
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(2, 2))
    assert private.parametrization_cache() is None
    with torch.nn.utils.parametrize.cached():
        weight = layer.weight
        assert next(iter(private.parametrization_cache().values())) is weight
        private.parametrization_cache().clear()
        assert layer.weight is not weight


def test_hooks_are_removed_also_if_their_registration_was_interrupted():
    layer, calls = torch.nn.Linear(2, 2), []
    before, after = (lambda *_: calls.append(1)), (lambda *_: calls.append(2))
    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
    layer._forward_pre_hooks[-1] = before
    for hook in (before, after):
        private.remove_hook(layer, hook)
    layer(torch.ones(2))
    assert not calls
    assert not layer._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("assign", [False, True])
def test_assignment_is_told_to_hooks(assign):
    net, told = torch.nn.Linear(2, 1), []
    net.register_load_state_dict_pre_hook(
        lambda _, state, prefix, metadata, *rest: told.append(private.is_assigned(metadata))
    )
    net.load_state_dict(net.state_dict(), assign=assign)
    assert told == [assign]


def test_functions_and_hooks_are_heard_of():
    hooks, function = torch.autograd.graph.saved_tensors_hooks, torch.autograd.Function
    before = function.__dict__["apply"], hooks.__enter__
    heard = []

    class Twice(function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def listen(unpack):
        return lambda value: heard.append("unpacked") or unpack(value)

    listening = private.Heard(lambda cls, outputs: heard.append((cls, outputs)), listen)
    listening.begin()
    x = torch.ones(2, requires_grad=True)
    y = Twice.apply(x)
    assert heard == [(Twice, y)]
    with hooks(lambda t: t, lambda t: t) as _:
        z = y.square().sum()
    z.backward()
    assert heard[1:] == ["unpacked"]
    assert x.grad.tolist() == [8, 8]
    listening.end()
    count = len(heard)
    Twice.apply(x)
    assert len(heard) == count
    assert (function.__dict__["apply"], hooks.__enter__) == before
