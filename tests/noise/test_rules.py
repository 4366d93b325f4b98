"""The laws that every rule obeys, over the whole registry."""

import pytest
import torch
from rule_cases import CASES, Attention, Case, Weighted
from torch import nn
from torch.func import functional_call, jacrev, vmap

from pyro_bayes import BayesianModel
from pyro_bayes.noise.examples import Examples
from pyro_bayes.noise.gaussian_tensor import RULES, GaussianTensor, mean_of, perturbation_of

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
ERRORS = 5.5  # standard errors that a mean of many elements may be off by
# Attention does not tell its rule of these, if they are the only Bayesian parameters.
HIDDEN = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
ESTIMATORS = [True, "flipout"]
AFFINE = {name: case for name, case in CASES.items() if case.affine}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Variants reach the same formulas by other names: laws of modes and limits need them once.
PLAIN = {name: case for name, case in CASES.items() if not case.variant}
every_plain_case = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
every_affine_case = pytest.mark.parametrize("case", AFFINE.values(), ids=AFFINE)
LAYERS = {name: case for name, case in AFFINE.items() if not case.variant}
# One draw of the weights knows of no rules.
DRAWN = {name: CASES[name] for name in ("linear", "convolution, groups", "embedding")}
# Compiling takes long, so that nets have one layer for each family of rules.
COMPILED = {
    "local noise": (
        lambda: nn.Sequential(
            *(CASES["linear, masked"].make(), nn.BatchNorm1d(3)),
            Weighted(lambda x, w: torch.einsum("bi,oi->bo", x, w), (16, 3)),
            *(nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 2, groups=2), nn.Flatten()),
            Weighted(lambda x, w: x @ torch.chunk(w, 2)[1], (12, 4)),
            *(nn.Unflatten(1, (1, 4)), Attention(4, 2, batch_first=True)),
        ),
        *(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4), True, 0),
    ),
    "flipout, time first": (
        lambda: nn.Sequential(
            *(nn.Embedding(5, 4), nn.LayerNorm(4), Weighted(torch.sub, (4,)), nn.Linear(4, 3))
        ),
        *(torch.tensor([[0, 1], [2, 3], [3, 4]]), "flipout", 1),
    ),
}
every_estimator = pytest.mark.parametrize("local_trick", ESTIMATORS)


@pytest.fixture(autouse=True)
def without_looks(monkeypatch):
    """Rules are what is tested here, and not whether examples meet, which takes calls."""
    monkeypatch.setattr(Examples, "_ask", lambda *_: None)


def leaves(output):
    """The output as a tuple of tensors."""
    return output if isinstance(output, tuple) else (output,)


def parts_of(case):
    """Models in which all, and each one, of the parameters are Bayesian."""
    names = [name for name, _ in case.model().base.named_parameters()]
    yield case.model()
    if len(names) > 1:
        for name in names:
            yield case.model(include_params=name)


def is_stack(case, bnn):
    """Whether a stack of matrices is no parameter, so that it need not be one for each example."""
    stacks = CASES["baddbmm"], CASES["baddbmm, method"]
    return case in stacks and [*bnn.sample_params()] == ["bias"]


def closed_form(case, bnn):
    """The mean, and the Jacobian times σ, of each example's output: (B, *), (B, *, D)."""
    means = {n: p.detach() for n, p in bnn.means.named_parameters()}
    pairs = bnn.guide.posterior().items()
    deviations = {n: (0.5 * logvar.detach()).exp() for n, (_, logvar) in pairs}

    def output(parameters):
        return functional_call(bnn.base, parameters, (case.input(),))

    mean = output(means)
    columns = []
    for name, value in means.items():
        for i in range(value.numel()):
            step = torch.zeros_like(value)
            step.view(-1)[i] = 1
            column = output(means | {name: value + step}) - mean
            columns.append(column * deviations[name].view(-1)[i])
    return mean, torch.stack(columns, dim=-1)


def example_first(case, *tensors):
    return tuple(t.movedim(case.batch_dim, 0) for t in tensors)


def repeated(case, count):
    """The first example's input, many times."""
    x = case.input().movedim(case.batch_dim, 0)[:1]
    return x.expand(count, *x.shape[1:]).movedim(0, case.batch_dim)


def weights_of_examples(model, count, signed=True):
    """Each example's parameters under flipout: μ + Δ ⊙ signs."""
    parameters = {}
    for name, value in named_tensors(model):
        if not isinstance(value, GaussianTensor):
            continue
        perturbation = perturbation_of(value).expand(count, *value.shape)
        for dim in range(value.dim()):
            signs = value.signs(dim, count) if signed else None
            if signs is not None:
                shape = [-1 if d == dim else 1 for d in range(value.dim())]
                perturbation = perturbation * signs.view(count, *shape)
        parameters[name] = mean_of(value) + perturbation
    return parameters


def named_tensors(model):
    for path, module in model.named_modules():
        for leaf, value in module._parameters.items():
            if value is not None:
                yield f"{path}.{leaf}" if path else leaf, value


# 1. Moments


@every_affine_case
@torch.no_grad()
def test_local_noise_has_the_moments_of_the_closed_form(case):
    count = 4000
    for bnn in parts_of(case):
        if is_stack(case, bnn):
            continue
        mean, spread = closed_form(case, bnn)
        mean, spread = (t[0] for t in example_first(case, mean, spread))
        variance = spread.square().sum(-1)
        with bnn.reparameterize(local_trick=True, batch_dim=case.batch_dim) as model:
            (outputs,) = example_first(case, model(repeated(case, count)))
        error = (variance / count).sqrt()
        assert ((outputs.mean(0) - mean).abs() <= ERRORS * error + 1e-6).all()
        error = variance * (2 / count) ** 0.5
        assert ((outputs.var(0) - variance).abs() <= ERRORS * error + 1e-6).all()


@pytest.mark.parametrize("case", DRAWN.values(), ids=DRAWN)
@torch.no_grad()
def test_draws_of_weights_have_the_moments_of_the_closed_form(case):
    count, bnn = 600, case.model()
    mean, spread = closed_form(case, bnn)
    variance = spread.square().sum(-1)
    outputs = []
    for _ in range(count):
        with bnn.reparameterize() as model:
            outputs.append(model(case.input()))
    outputs = torch.stack(outputs)
    assert ((outputs.mean(0) - mean).abs() <= ERRORS * (variance / count).sqrt() + 1e-6).all()
    error = variance * (2 / count) ** 0.5
    assert ((outputs.var(0) - variance).abs() <= ERRORS * error + 1e-6).all()


# 2. Joint distribution


@every_case
@torch.no_grad()
def test_flipout_gives_each_example_weights_of_its_own(case):
    """One draw μ + Δ ⊙ signs explains all positions of an example, through a whole module."""
    for bnn in parts_of(case):
        if next(iter(bnn.sample_params())) in HIDDEN:
            continue
        x = case.input()
        with bnn.reparameterize("flipout", batch_dim=case.batch_dim) as model:
            outputs = leaves(model(x))
            lost = case.lost or is_stack(case, bnn)
            count = 1 if lost else x.shape[case.batch_dim]
            parameters = weights_of_examples(model, count, signed=not lost)
        for example in range(2):
            one = x.narrow(case.batch_dim, example, 1)
            own = {name: p[example % len(p)] for name, p in parameters.items()}
            expected = leaves(functional_call(bnn.base, own, (one,)))
            for output, wanted in zip(outputs, expected, strict=True):
                found = output.narrow(case.batch_dim, example, 1)
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class BiasTwice(nn.Module):
    """A linear layer whose bias is added to its input or its output, too."""

    def __init__(self, before):
        super().__init__()
        self.before, self.layer = before, nn.Linear(4, 4)

    def forward(self, x):
        if self.before:
            return self.layer(x + self.layer.bias)
        return self.layer(x) + self.layer.bias


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_flipout_gives_an_example_one_bias_everywhere(before):
    bnn, x = BayesianModel(BiasTwice(before), init_logvar=0.0), torch.randn(20, 4)
    with bnn.reparameterize("flipout") as model:
        outputs = model(x)
        parameters = weights_of_examples(model, 20)
        weight, bias = model.layer.weight.signs(0, 20), model.layer.bias.signs(0, 20)
    for i in range(20):
        own = {name: p[i] for name, p in parameters.items()}
        expected = functional_call(bnn.base, own, (x[i : i + 1],))
        torch.testing.assert_close(outputs[i : i + 1], expected)
    assert torch.equal(weight, bias) != before


@torch.no_grad()
def test_flipout_has_the_joint_covariance_of_draws_of_weights():
    case, count = CASES["convolution, groups"], 4000
    bnn = case.model()
    _, spread = closed_form(case, bnn)
    spread = spread[0].flatten(0, -2)
    covariance = spread @ spread.T
    outputs = []
    for _ in range(count):
        with bnn.reparameterize("flipout") as model:
            outputs.append(model(case.input())[0].flatten())
    found = torch.stack(outputs).T.cov()
    variance = covariance.diagonal()
    error = ((variance[:, None] * variance + covariance.square()) / count).sqrt()
    assert ((found - covariance).abs() <= ERRORS * error + 1e-6).all()


@every_estimator
@torch.no_grad()
def test_examples_are_uncorrelated(local_trick):
    bnn, x = BayesianModel(nn.Linear(4, 1), init_logvar=0.0), torch.ones(2, 4)
    outputs = []
    for _ in range(2000):
        with bnn.reparameterize(local_trick) as model:
            outputs.append(model(x)[:, 0])
    assert torch.stack(outputs).T.corrcoef()[0, 1].abs() < 4.5 / 2000**0.5


# 3. Gradients


# Variants have the moments and, at fixed noise, the gradients that other tests demand of them.
@pytest.mark.parametrize(
    ("name", "local_trick"),
    [(name, trick) for name in LAYERS for trick in ESTIMATORS] + [(name, False) for name in DRAWN],
)
def test_gradients_are_unbiased(name, local_trick):
    case = LAYERS[name]
    bnn = case.model()
    x = repeated(case, 50)
    trained = list(bnn.guide.parameters())
    means = list(bnn.means.parameters())
    names = [name for name, _ in bnn.means.named_parameters()]

    def output(*values):
        parameters = dict(zip(names, values, strict=True))
        return functional_call(bnn.base, parameters, (case.input(),))

    mean = output(*means)
    jacobians = torch.autograd.functional.jacobian(output, tuple(means))
    variance = sum(
        (j.square() * logvar.exp()).flatten(mean.dim()).sum(-1)
        for j, logvar in zip(jacobians, bnn.logvars.parameters(), strict=True)
    )
    mean, variance = (t[0] for t in example_first(case, mean, variance))
    target = torch.randn(mean.shape, dtype=mean.dtype)
    exact = torch.autograd.grad(((mean - target).square() + variance).sum(), trained)
    samples = []
    # Under flipout and one draw, gradients have long tails.
    for _ in range(40 if local_trick is True else 120):
        with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
            (outputs,) = example_first(case, model(x))
        loss = (outputs - target).square().sum() / 50
        samples.append(torch.autograd.grad(loss, trained))
    for expected, grads in zip(exact, zip(*samples, strict=True), strict=True):
        grads = torch.stack(grads)
        error = grads.std(0) / len(grads) ** 0.5
        assert ((grads.mean(0) - expected).abs() <= 6.5 * error + 1e-9).all()


@every_estimator
@every_case
def test_gradcheck_at_fixed_noise(case, local_trick):
    if case in (CASES["float"], CASES["embedding, padded"]):
        pytest.skip("in single precision, or without a gradient by torch's own convention")
    bnn = case.model()

    def output(*_):
        torch.manual_seed(5)
        with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
            return model(case.input())

    assert torch.autograd.gradcheck(output, list(bnn.guide.parameters()), fast_mode=True)


# 4. Contexts, modes and transforms


@every_estimator
@every_case
@torch.no_grad()
def test_noise_is_fixed_in_a_context_and_differs_between_contexts(case, local_trick):
    bnn, x = case.model(), case.input()
    outputs = []
    for _ in range(2):
        with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
            outputs.append(leaves(model(x))[0])
            assert torch.equal(leaves(model(x))[0], outputs[-1])
            if case.own_batch:
                continue
            (head,) = example_first(case, leaves(model(x.narrow(case.batch_dim, 0, 1)))[0])
            torch.testing.assert_close(head[0], example_first(case, outputs[-1])[0][0])
    assert not torch.allclose(*outputs)


@every_estimator
@every_plain_case
def test_inference_mode_leaves_usable_noise(case, local_trick):
    bnn, x = case.model(), case.input()
    with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
        with torch.inference_mode():
            before = leaves(model(x))[0]
        after = leaves(model(x))[0]
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bnn.guide.parameters())


@every_estimator
@every_plain_case
@torch.no_grad()
def test_autocast(case, local_trick):
    bnn = case.model(dtype=torch.float32)
    x = case.input() if case.integers else case.input().float()
    with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
        expected = leaves(model(x))[0]
        with torch.autocast("cpu", torch.bfloat16):
            output = leaves(model(x))[0].float()
    assert output.isfinite().all()
    if local_trick == "flipout":  # the noise of an output belongs to its precision
        torch.testing.assert_close(output, expected.float(), rtol=0.1, atol=0.2)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace", "ignore:The .grad attr")
@pytest.mark.parametrize(("make", "x", "local_trick", "batch_dim"), COMPILED.values(), ids=COMPILED)
def test_compile(make, x, local_trick, batch_dim):
    torch.compiler.reset()
    bnn, grads = Case(make, ()).model(), []

    def step():
        torch.manual_seed(0)
        with bnn.reparameterize(local_trick, batch_dim=batch_dim) as model:
            return model(x)

    for function in (step, torch.compile(step, backend="eager")):
        output = function()
        grads.append((output, *torch.autograd.grad(output.sum(), list(bnn.guide.parameters()))))
    torch.testing.assert_close(*grads)


@every_estimator
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.vmap], ids=[n for n, c in CASES.items() if c.vmap]
)
def test_outer_vmap_over_inputs_is_a_loop(case, local_trick):
    bnn, x = case.model(), torch.stack([case.input(), 2 * case.input()])
    if case.integers:
        x[1] = x[0].flip(0)
    with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
        batched = vmap(lambda one: leaves(model(one))[0])(x)
        loop = torch.stack([leaves(model(one))[0] for one in x])
    torch.testing.assert_close(batched, loop)
    loop.sum().backward()


@every_estimator
@pytest.mark.parametrize(
    "case",
    [c for c in CASES.values() if not c.integers],
    ids=[n for n, c in CASES.items() if not c.integers],
)
def test_jacobian_with_respect_to_inputs(case, local_trick):
    bnn, x = case.model(), case.input()
    with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
        found = jacrev(lambda x: leaves(model(x))[0])(x)
        expected = torch.autograd.functional.jacobian(lambda x: leaves(model(x))[0], x)
    torch.testing.assert_close(found, expected)


# 5. and 6. Zero variance


@every_estimator
@every_plain_case
def test_zero_variance_has_finite_gradients(case, local_trick):
    bnn, x = case.model(), case.input()
    with torch.no_grad():
        for logvar in bnn.logvars.parameters():
            logvar.fill_(-1e4)
    x = x if case.integers else x.narrow(case.batch_dim, 0, 1).mul(0).expand_as(x)
    with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
        leaves(model(x))[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in bnn.guide.parameters())


@every_estimator
@every_plain_case
@torch.no_grad()
def test_vanishing_deviation_gives_the_plain_net(case, local_trick):
    for mode in (False, True):
        bnn, x = case.model(), case.input()
        for logvar in bnn.logvars.parameters():
            logvar.fill_(-80.0)
        for module in bnn.base.modules():
            module.training = mode
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        expected = leaves(bnn.base(x))
        with bnn.reparameterize(local_trick, batch_dim=case.batch_dim) as model:
            outputs = leaves(model(x))
        for output, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, wanted)


# The registry


def test_every_rule_has_a_case(monkeypatch):
    reached = set()

    def noting(function, rule):
        def call(*args, **kwargs):
            out = rule(*args, **kwargs)
            if out is not NotImplemented:
                reached.add(function)
            return out

        return call

    for function, found in dict(RULES).items():
        monkeypatch.setitem(RULES, function, noting(function, found))
    for case in CASES.values():
        with case.model().reparameterize(local_trick=True) as model:
            model(case.input())
    rounding = {torch.Tensor.half, torch.Tensor.bfloat16}  # in test_half.py: steps have no slope
    missing = [getattr(f, "__qualname__", f) for f in set(RULES) - reached - rounding]
    assert not missing, f"Add a case to rule_cases.py for {missing}"
