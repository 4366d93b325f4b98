"""Contexts as plain networks are used: several losses, interrupts, threads, forks, caches."""

import contextlib
import copy
import os
import signal
import sys
import threading
import warnings
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyro_bayes
from pyro_bayes import ELBO, BayesianModel, fit, likelihoods

X = torch.randn(4, 3)
ROOTS = (str(Path(pyro_bayes.__file__).parent), contextlib.__file__)
ESTIMATORS = {"weights": False, "local noise": True, "flipout": "flipout"}
each_estimator = pytest.mark.parametrize("trick", ESTIMATORS.values(), ids=ESTIMATORS)


class Mixed(nn.Module):
    """Parameters that meet operators with a rule, and others that meet one without."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))
        self.emphasis = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return self.linear(x @ torch.linalg.matrix_exp(self.emphasis)) * torch.erf(self.scale)


# Several losses


@pytest.mark.parametrize("leaves", ["flat", "named"])
@each_estimator
def test_each_loss_of_a_context_has_a_backward_pass_of_its_own(trick, leaves):
    bnn = BayesianModel(Mixed(), init_logvar=-2.0, leaves=leaves)
    parameters, (x, y) = list(bnn.parameters()), torch.randn(2, 5, 3)

    def gradients(together):
        torch.manual_seed(1)
        bnn.zero_grad()
        with bnn.reparameterize_with_kl(trick) as (net, kl):
            losses = [lambda: net(x).square().sum() + kl, lambda: net(y).sin().sum() + 2 * kl]
            if together:
                sum(loss() for loss in losses).backward()
            else:
                first, second = losses[0](), losses[1]()
                first.backward()
                net(x).sum().backward()
                (second - net(x).sum()).backward()
        return [p.grad.clone() for p in parameters]

    torch.testing.assert_close(gradients(False), gradients(True), rtol=1e-4, atol=1e-5)


@each_estimator
def test_change_of_the_posterior_between_two_backward_passes_is_an_error(trick):
    bnn = BayesianModel(Mixed(), init_logvar=-2.0)
    with bnn.reparameterize(trick) as net:
        first, second = net(torch.randn(2, 5, 3)).sum((1, 2))
    first.backward(retain_graph=True)
    with torch.no_grad():
        bnn.guide.mean.add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        second.backward()


# Interrupts


class Interrupt(KeyboardInterrupt):
    """What the injector raises."""


def interrupted_at(count, run):
    """Runs a function, with an interrupt at the line of the package that comes after so many."""
    left = count

    def trace(frame, event, _):
        nonlocal left
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(ROOTS) else None
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def in_other_thread(run):
    """Returns what a function returns in a thread of its own, or `None` if that takes too long."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(timeout=5)


def lifted(bnn):
    def model():
        with bnn.lift() as net:
            pyro.sample("y", Normal(net(X), 1.0).to_event(2), obs=X)

    Trace_ELBO().differentiable_loss(model, bnn.guide).backward()


def with_kl(bnn, trick):
    with bnn.reparameterize_with_kl(trick) as (net, kl):
        (net(X).sum() + kl).backward()


def nested(bnn):
    with bnn.reparameterize(), bnn.mean() as net:
        net(X)


USES = {
    **{name: partial(with_kl, trick=trick) for name, trick in ESTIMATORS.items()},
    "mean": nested,
    "lift": lifted,
    "predict": lambda bnn: bnn.predict(X, 6, chunk_size=3),
    "sampled model": BayesianModel.sample_model,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_interrupt_at_any_line_leaves_all_as_it_was(use):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    bnn = BayesianModel(net, init_logvar=-1.0)
    use(bnn)
    own, output, filters = dict(net.named_parameters()), net(X), [*warnings.filters]
    net[1].eval()
    # Each line of the way in and out, and some of those between.
    line, step = 0, 11
    while interrupted_at(line, lambda: use(bnn)):
        assert all(own[name] is p for name, p in net.named_parameters()), line
        assert torch.equal(net(X), output)
        assert bnn.training
        assert net[0].training
        assert not net[1].training
        assert torch.is_grad_enabled()
        assert warnings.filters == filters
        assert not pyro.poutine.runtime.am_i_wrapped()
        assert bnn._mutex.holder() is None
        line += step
    assert line > 20 * step
    assert in_other_thread(lambda: use(bnn) or True)


def test_context_that_nobody_closed_is_closed_by_the_next():
    bnn = BayesianModel(nn.Linear(3, 3))
    context = bnn.reparameterize()
    held = context.__enter__().weight
    interrupted = bnn.swap._close
    bnn.swap._close = lambda layer: None  # both of the ways out fail
    del context
    bnn.swap._close = interrupted
    assert vars(bnn)["_modules"]["base"].weight is held
    assert isinstance(bnn.base.weight, nn.Parameter)


# Threads and forks


def test_threads_that_wait_for_each_other_get_an_error():
    first, second = (BayesianModel(nn.Linear(3, 3), name=name) for name in ("one", "two"))
    meeting = threading.Barrier(2, timeout=5)

    def use(outer, inner):
        with outer.reparameterize():
            meeting.wait()
            with inner.reparameterize() as net:
                return net(X).shape

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(use, first, second), pool.submit(use, second, first)]
        errors = [future.exception(timeout=5) for future in waiting]
    assert sum(error is None for error in errors) == 1
    (message,) = (str(error) for error in errors if error is not None)
    assert "'one'" in message
    assert "'two'" in message
    assert "same order" in message
    assert use_alone(first) == use_alone(second) == X.shape


def use_alone(bnn):
    with bnn.reparameterize() as net:
        return net(X).shape


@pytest.mark.parametrize("close", [lambda c: c.__exit__(None, None, None), lambda c: None])
def test_context_is_closed_by_another_thread(close):
    bnn = BayesianModel(nn.Linear(3, 3))
    contexts = [bnn.reparameterize()]
    contexts[0].__enter__()

    def other():
        close(contexts.pop())  # the only reference
        return use_alone(bnn)

    assert in_other_thread(other) == X.shape
    assert isinstance(bnn._modules["base"].weight, nn.Parameter)
    assert in_other_thread(lambda: use_alone(bnn)) == X.shape


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fork_leaves_the_contexts_of_other_threads_behind():
    bnn, inside, done = BayesianModel(nn.Linear(3, 3)), threading.Event(), threading.Event()

    def other():
        with bnn.reparameterize():
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(5)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        whole = isinstance(bnn._modules["base"].weight, nn.Parameter)
        os._exit(0 if whole and use_alone(bnn) == X.shape else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_copies_made_at_once_have_names_of_their_own():
    bnn = BayesianModel(nn.Linear(3, 3))
    with ThreadPoolExecutor(4) as pool:
        copies = [*pool.map(lambda _: copy.deepcopy(bnn), range(40))]
    assert len({each.guide.store_name for each in [bnn, *copies]}) == 41


# Caches


class Biased(nn.Module):
    """Attention biases that are gathered once in evaluation mode, as in LeViT."""

    def __init__(self):
        super().__init__()
        self.biases, self.cache = nn.Parameter(torch.randn(3)), {}
        self.calls = {}

    def forward(self, x):
        self.calls["last"] = x.sum()
        if x.device not in self.cache:
            self.cache[x.device] = self.biases[[2, 0, 1]]
        return x + self.cache[x.device]


@pytest.mark.parametrize("before", [False, True])
def test_cached_values_are_those_of_the_context(before):
    bnn = BayesianModel(Biased().eval(), init_logvar=0.0)
    if before:
        bnn.base(X)
    with bnn.reparameterize() as net:
        net(X)
    assert bnn.predict(X, 20).variance.mean() > 0.3
    outputs = []
    for _ in range(2):
        with torch.no_grad(), bnn.reparameterize() as net:
            outputs.append(net(X))
            with bnn.mean() as mean:
                torch.testing.assert_close(mean(X), X + mean.biases[[2, 0, 1]])
            assert torch.equal(net(X), outputs[-1])
    assert not torch.equal(*outputs)
    torch.testing.assert_close(bnn.base(X), X + bnn.means.biases[[2, 0, 1]].detach())
    assert bnn.base.calls["last"] == X.sum()
    assert type(bnn.base.cache) is dict
    sampled = bnn.sample_model()
    torch.testing.assert_close(sampled(X), X + sampled.biases[[2, 0, 1]])


def in_keys(c, compute):
    if "w" not in c.keys():  # noqa: SIM118
        c["w"] = compute()
    return c["w"]


def of_try(c, compute):
    try:
        return c["w"]
    except KeyError:
        c["w"] = compute()
        return c["w"]


def of_bool(c, compute):
    if not c:
        c.update(w=compute())
    return c["w"]


def of_len(c, compute):
    if len(c) == 0:
        c |= {"w": compute()}
    return next(iter(c.values()))


def of_copy(c, compute):
    plain = {**c}
    return c.setdefault("w", compute()) if "w" not in plain else plain["w"]


def of_removal(c, compute):
    c.pop("w", None)
    while c:
        c.popitem()
    c["w"] = compute()
    return c["w"]


LOOKS = [in_keys, of_try, of_bool, of_len, of_copy, of_removal]


class Looking(nn.Module):
    def __init__(self, look, kept):
        super().__init__()
        self.w, self.look, self.kept = nn.Parameter(torch.ones(3)), look, kept

    def forward(self, x):
        return x * self.look(self.kept, self.w.exp)


@pytest.mark.parametrize("kind", [dict, OrderedDict, partial(defaultdict, None)])
@pytest.mark.parametrize("look", LOOKS)
def test_cache_is_empty_from_every_side(look, kind):
    for former in ({}, {"w": torch.ones(3).exp()}):
        bnn = BayesianModel(Looking(look, kind(former)), init_logvar=0.0)
        with pytest.warns(UserWarning, match="'kept' to be a cache of what is computed"):
            assert bnn.predict(X, 8).variance.mean() > 0.01
        bnn.predict(X, 2)  # says it once
        sampled = bnn.sample_model()
        torch.testing.assert_close(sampled(X), X * sampled.w.exp())
        assert former or type(sampled.kept) is type(kind())
        kept = bnn.base.kept
        assert type(kept) is type(kind())
        assert kept.keys() == former.keys()
        assert all(kept[key] is former[key] for key in former)


def get(c, _):
    return c.get("mask", 0.0)


def by_key(c, _):
    return c["mask"]


def total(c, _):
    return sum(c.values())


@pytest.mark.parametrize("look", [get, by_key, total])
def test_constants_that_look_like_a_cache_are_named(look):
    bnn = BayesianModel(nn.Sequential(Looking(look, {"mask": torch.ones(3)})))
    with pytest.warns(UserWarning, match=r"'0\.kept' to be a cache"), bnn.reparameterize() as net:
        output = net(X)
    assert torch.equal(output, X) == (look is by_key)
    assert [*bnn.base[0].kept] == ["mask"]


def remember(c, compute):
    h = c.get("h", 0.0) + compute().detach()
    c["h"] = h
    return h


def forget(c, compute):
    c.clear()
    return compute()


def test_state_in_a_dictionary_is_named_and_can_be_removed():
    bnn = BayesianModel(Looking(remember, {}))
    with pytest.warns(UserWarning, match="If it is a state"), bnn.reparameterize() as net:
        net(X)
    bnn = BayesianModel(Looking(forget, {"h": X}))
    with bnn.reparameterize() as net:
        net(X)
    assert bnn.base.kept == {}


def test_cached_parametrizations_are_those_of_the_context():
    net = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    bnn = BayesianModel(net, init_logvar=-1.0, include_params="parametrizations")
    with torch.no_grad(), nn.utils.parametrize.cached():
        expected, outputs = net(X), []
        for _ in range(2):
            with bnn.reparameterize() as drawn:
                outputs.append(drawn(X))
                assert torch.equal(drawn(X), outputs[-1])
            assert torch.equal(net(X), expected)
    assert not torch.allclose(*outputs)


# Changes of the base


def resize(net):
    net.weight.data = torch.zeros(5, 3)


def test_resized_parameter_is_an_error():
    bnn = BayesianModel(nn.Linear(3, 3))
    resize(bnn.base)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'weight' to stay of shape"), bnn.reparameterize():
            pass


def test_assigned_data_reach_the_means():
    bnn = BayesianModel(nn.Linear(3, 3), init_logvar=-80.0)
    bnn.base.weight.data = torch.eye(3)
    with bnn.reparameterize() as net:
        torch.testing.assert_close(net.weight.detach(), torch.eye(3))
    assert torch.equal(bnn.means.weight, torch.eye(3))


@pytest.mark.parametrize("context", [BayesianModel.reparameterize, BayesianModel.lift])
def test_layer_that_was_added_is_an_error_unless_it_is_frozen(context):
    bnn = BayesianModel(nn.Sequential(nn.Linear(3, 3)))
    bnn.base.append(nn.Linear(3, 3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"new ones at \['1\.weight', '1\.bias'\]"):  # noqa: SIM117
            with context(bnn):
                pass
    bnn.base[1].requires_grad_(False)
    with context(bnn) as net:
        assert net(X).shape == X.shape


class LoRA(nn.Module):
    """A low-rank adapter that is added to the weight in evaluation mode, as in loralib and PEFT."""

    def __init__(self):
        super().__init__()
        self.weight, self.merged, self.merged_adapters = nn.Parameter(torch.randn(3, 3)), False, []
        self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 3))

    def train(self, mode=True):
        if self.merged == mode:
            change = (self.a @ self.b).detach()
            self.weight.data += -change if mode else change
            self.merged = not mode
            self.merged_adapters[:] = [] if mode else ["default"]
        return super().train(mode)

    def forward(self, x):
        return x @ (self.weight if self.merged else self.weight + self.a @ self.b)


@each_estimator
def test_adapter_that_is_merged_in_a_context_is_not_merged_after_it(trick):
    bnn = BayesianModel(LoRA(), include_params="weight", init_logvar=-1.0)
    before, output = bnn.base.weight.detach().clone(), bnn.base(X)
    with torch.no_grad(), bnn.reparameterize(trick) as net:
        net.eval()
        net(X)
    assert not bnn.base.merged
    assert not bnn.base.merged_adapters
    bnn.base.train()
    assert torch.equal(bnn.base.weight, before)
    assert torch.equal(bnn.base(X), output)


# What computes again in the backward pass


class Again(torch.autograd.Function):
    """A product that is computed in the backward pass once more, as adjoint methods do."""

    @staticmethod
    def forward(ctx, x, net):
        ctx.net = net
        ctx.save_for_backward(x)
        return net(x).detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.net(x), grad)
        return x.grad, None


WAYS = {
    "not reentrant": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "reentrant": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "adjoint": lambda net, x: Again.apply(x, net),
}


class Computing(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.inner, self.outer, self.way = nn.Linear(3, 4), nn.Linear(4, 3), way

    def forward(self, x):
        return self.outer(self.way(self.inner, x).tanh())


def objective_of(way, trick, num_samples=1):
    torch.manual_seed(1)
    bnn = BayesianModel(Computing(way), init_logvar=-2.0)
    return ELBO(bnn, likelihoods.Gaussian(1.0), 10, local_trick=trick, num_samples=num_samples)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@each_estimator
def test_backward_pass_of_an_objective_finds_what_its_forward_pass_found(way, trick, num_samples):
    gradients = []
    for each in (way, lambda net, x: net(x)):
        objective = objective_of(each, trick, num_samples)
        for _ in range(2):  # the first pass finds out whether the second needs a context
            objective(X.clone().requires_grad_(), X).backward()
        assert not objective.model.swap.is_open
        assert objective.model._mutex.holder() is None
        gradients.append([p.grad for p in objective.parameters()])
    torch.testing.assert_close(*gradients)


def test_error_in_a_backward_pass_gives_the_base_back():
    objective = objective_of(WAYS["adjoint"], False)
    loss = objective(X.clone().requires_grad_(), X)
    objective.model.base.inner.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert isinstance(objective.model._modules["base"].inner.weight, nn.Parameter)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_likelihood_without_a_gradient_is_an_error():
    class Checkpointed(Computing):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    for net in (Checkpointed(WAYS["not reentrant"]), nn.Linear(3, 3)):
        objective = ELBO(BayesianModel(net), likelihoods.Gaussian(1.0, learn=True), 10)
        objective.model.base.register_forward_hook(lambda m, args, output: output.detach())
        with pytest.raises(RuntimeError, match="gradient with respect to the posterior"):
            objective(X, X)


def test_fit_trains_what_computes_again():
    objective = objective_of(WAYS["reentrant"], True)
    before = objective.model.means.inner.weight.detach().clone()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    fit(objective, [(X.clone().requires_grad_(), X)], 2, optimizer=optimizer, progress=False)
    assert (objective.model.means.inner.weight - before).abs().min() > 1e-3


class Now(Computing):
    """Computes again from some call on, with a part that saves the same tensors if it is frozen."""

    def __init__(self):
        super().__init__(None)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))

    def encode(self, x):
        way = self.way or (lambda net, x: net(x))
        return self.outer(way(self.inner, x).tanh())

    def forward(self, x):
        return self.encode(x)


CALLS = {
    "call": lambda net, x: net(x),
    "method": lambda net, x: net.inner.encode(x),
    "submodule": lambda net, x: net.inner(x),
}


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@each_estimator
def test_backward_pass_outside_of_a_context_finds_what_the_call_found(way, call, trick):
    gradients = []
    for each in (way, None):
        torch.manual_seed(1)
        bnn = BayesianModel(Outer(Now()), init_logvar=-2.0)
        for now in (None, each, each):  # noticed anew in every call
            bnn.base.inner.way = now
            with bnn.reparameterize(trick) as net:
                output = call(net, X.clone().requires_grad_())
            (output.square_().sum() / 3).backward()
        assert not bnn.swap.is_open
        assert bnn._mutex.holder() is None
        assert not bnn.base._forward_hooks
        gradients.append([p.grad for p in bnn.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_objective_notices_anew_in_every_call_what_computes_again(way):
    gradients = []
    for each in (way, None):
        torch.manual_seed(1)
        net = Now()
        objective = ELBO(BayesianModel(net, init_logvar=-2.0), likelihoods.Gaussian(1.0), 10)
        for now in (None, each):
            net.way = now
            objective(X.clone().requires_grad_(), X).backward()
        gradients.append([p.grad for p in objective.parameters()])
    torch.testing.assert_close(*gradients)
