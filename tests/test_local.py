"""Local noise: rules by operator, against closed forms and draws of weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zuko.nn import MaskedLinear

from pyro_bayes import BayesianModel
from pyro_bayes.gaussian_tensor import RULES, GaussianTensor, mean_of, variance_of
from pyro_bayes.noise import ContextNoise


def linear(**kwargs):
    return BayesianModel(nn.Linear(4, 3, dtype=torch.float64), init_logvar=-1.0, **kwargs)


def masked(**kwargs):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    return BayesianModel(MaskedLinear(mask).double(), init_logvar=-1.0, **kwargs)


CASES = {
    "linear": (linear, {}),
    "linear, fixed bias": (linear, {"exclude_params": "bias"}),
    "linear, fixed weight": (linear, {"exclude_params": "weight"}),
    "masked": (masked, {}),
    "masked, fixed bias": (masked, {"exclude_params": "bias"}),
}
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES, ids=str)
def bnn(request):
    make, kwargs = CASES[request.param]
    bnn = make(**kwargs)
    with torch.no_grad():
        for logvar in bnn.logvars.parameters():
            logvar.uniform_(-3.0, 1.0)
    return bnn


def moments(bnn, x=X):
    """The mean and variance of the output in closed form."""
    base = bnn.base
    mask = getattr(base, "mask", torch.ones_like(base.weight))
    logvars = dict(bnn.logvars.named_parameters())
    means = dict(base.named_parameters()) | dict(bnn.means.named_parameters())
    variances = {
        name: logvars[name].exp() if name in logvars else torch.zeros_like(p)
        for name, p in base.named_parameters()
    }
    mean = x @ (mask * means["weight"]).T + means["bias"]
    return mean, x.square() @ (mask * variances["weight"]).T + variances["bias"]


@pytest.mark.parametrize("local_trick", [False, True])
@torch.no_grad()
def test_moments(bnn, local_trick):
    outputs = []
    for _ in range(3000):
        with bnn.reparameterize(local_trick) as model:
            outputs.append(model(X))
    outputs = torch.stack(outputs)
    mean, variance = moments(bnn)
    count = len(outputs)
    assert ((outputs.mean(0) - mean).abs() <= 4.5 * (variance / count).sqrt() + 1e-9).all()
    assert ((outputs.var(0) - variance).abs() <= 4.5 * variance * (2 / count) ** 0.5 + 1e-9).all()


def test_local_noise_is_independent_between_examples(bnn):
    with torch.no_grad():
        outputs = []
        for _ in range(2000):
            with bnn.reparameterize(local_trick=True) as model:
                outputs.append(model(X[:2])[:, 1])
    assert torch.stack(outputs).T.corrcoef()[0, 1].abs() < 4.5 / 2000**0.5


@pytest.mark.parametrize("local_trick", [False, True])
def test_gradients_are_unbiased(bnn, local_trick):
    trained = list(bnn.guide.parameters())
    target = torch.randn(5, 3, dtype=torch.float64)

    def loss(model):
        return (model(X) - target).square().sum()

    mean, variance = moments(bnn)
    exact = torch.autograd.grad(((mean - target).square() + variance).sum(), trained)
    samples = []
    for _ in range(1500):
        with bnn.reparameterize(local_trick) as model:
            samples.append(torch.autograd.grad(loss(model), trained))
    for expected, draws in zip(exact, zip(*samples, strict=True), strict=True):
        draws = torch.stack(draws)
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - expected).abs() <= 4.5 * error + 1e-9).all()


def test_gradcheck_at_fixed_noise(bnn):
    parameters = list(bnn.guide.parameters())

    def output(*_):
        torch.manual_seed(5)
        with bnn.reparameterize(local_trick=True) as model:
            return model(X)

    torch.autograd.gradcheck(output, parameters)


def test_zero_variance_has_finite_gradients(bnn):
    x = X.clone()
    x[1] = 0
    with torch.no_grad():
        dict(bnn.logvars.named_parameters()).get("bias", torch.empty(0)).fill_(-1e4)
    with bnn.reparameterize(local_trick=True) as model:
        model(x).square().sum().backward()
    for parameter in bnn.guide.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("local_trick", [False, True])
def test_vanishing_variance_gives_the_plain_net(net, data, dtype, local_trick):
    bnn = BayesianModel(net, init_logvar=-80.0).to(dtype)
    x = data[0].to(dtype)
    with bnn.reparameterize(local_trick) as model:
        output = model(x)
    torch.testing.assert_close(output, bnn.base(x))


def test_half_precision_neither_overflows_nor_adds_noise():
    bnn = BayesianModel(nn.Linear(4, 3, dtype=torch.float16), init_logvar=-16.0)
    x = torch.full((2000, 4), 1e-1, dtype=torch.float16)
    with torch.no_grad(), bnn.reparameterize(local_trick=True) as model:
        near = model(x).float()
        far = model(3000 * x)
    # The variance of an output is e⁻¹⁶ (4·0.1² + 1), far below half precision's smallest normal.
    mean = x.float() @ bnn.means.weight.detach().float().T + bnn.means.bias.detach().float()
    assert (near - mean).std() < 2e-3
    assert far.isfinite().all()


def test_variance_of_gradients_is_lower(data):
    net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 1))
    bnn = BayesianModel(net, init_logvar=-5.0)
    x, y = data

    def gradients(local_trick):
        draws = []
        for _ in range(200):
            with bnn.reparameterize(local_trick) as model:
                loss = F.mse_loss(model(x), y)
            grads = torch.autograd.grad(loss, list(bnn.parameters()))
            draws.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(draws).var(0).sum()

    assert gradients(True) < 0.5 * gradients(False)


def test_noise_belongs_to_the_position(net):
    bnn = BayesianModel(net, init_logvar=-2.0)
    x = torch.randn(10, 3)
    with bnn.reparameterize(local_trick=True) as model:
        head = model(x[:4])
        full = model(x)
        torch.testing.assert_close(full[:4], head)
        torch.testing.assert_close(model(x[:7]), full[:7])
        assert torch.equal(model(x), full)
        sequence = model(x.view(2, 5, 3))
        torch.testing.assert_close(sequence.view(10, 1), full)


def test_two_layers_of_one_shape_have_noise_of_their_own():
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    net[1].load_state_dict(net[0].state_dict())
    bnn = BayesianModel(net, init_logvar=0.0)
    x = torch.randn(2, 4)
    with bnn.reparameterize(local_trick=True) as model:
        assert not torch.allclose(model[0](x), model[1](x))


def test_operators_without_a_rule_get_one_draw():
    bnn = BayesianModel(nn.Conv1d(2, 3, 3), init_logvar=-1.0)
    with bnn.reparameterize(local_trick=True) as model:
        weight = model.weight
        assert isinstance(weight, GaussianTensor)
        draw = weight + 0
        assert type(draw) is torch.Tensor
        assert torch.equal(draw, weight.abs() * weight.sign())
        x = torch.randn(2, 2, 5)
        torch.testing.assert_close(model(x), F.conv1d(x, draw, model.bias + 0))
    assert not torch.allclose(draw, bnn.base.weight)


def test_draw_of_a_product_is_the_product_of_the_draw():
    noise = ContextNoise("local")
    gaussian = GaussianTensor.of(torch.randn(3, 2), torch.zeros(3, 2), "w", noise)
    mask = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]])
    product = mask * gaussian * 2
    assert isinstance(product, GaussianTensor)
    torch.testing.assert_close(product + 0, 2 * mask * (gaussian + 0))
    torch.testing.assert_close(mean_of(product), 2 * mask * mean_of(gaussian))
    torch.testing.assert_close(variance_of(product), 4 * mask**2 * variance_of(gaussian))


def test_activation_times_parameter_is_an_output():
    gaussian = GaussianTensor.of(torch.randn(2), torch.zeros(2), "w", ContextNoise("local"))
    product = torch.randn(5, 2) * gaussian
    assert type(product) is torch.Tensor


def test_draw_made_without_gradients_gains_them_later():
    mean = torch.randn(3, requires_grad=True)
    gaussian = GaussianTensor.of(mean, torch.zeros(3), "w", ContextNoise("local"))
    with torch.no_grad():
        before = gaussian + 0
    after = gaussian + 0
    assert torch.equal(before, after)
    after.sum().backward()
    assert torch.equal(mean.grad, torch.ones(3))


def test_shape_and_type_are_read_without_a_draw():
    gaussian = GaussianTensor.of(
        torch.randn(3, 2).double(), torch.zeros(3, 2), "w", ContextNoise("local")
    )
    state = torch.get_rng_state()
    assert gaussian.shape == (3, 2)
    assert (gaussian.dtype, gaussian.device.type) == (torch.float64, "cpu")
    assert (gaussian.dim(), gaussian.numel(), len(gaussian)) == (2, 6, 3)
    assert gaussian.is_floating_point()
    assert not gaussian.requires_grad
    assert gaussian in {gaussian}
    assert "'w', shape=(3, 2)" in repr(gaussian)
    assert torch.equal(state, torch.get_rng_state())


def test_operator_out_of_reach_fails_loudly():
    with torch._C.DisableTorchFunctionSubclass():
        gaussian = GaussianTensor.of(torch.randn(3), torch.zeros(3), "w", ContextNoise("local"))
        with pytest.raises(RuntimeError, match="where local noise cannot reach"):
            torch.add(gaussian, 1)


def test_encoder_fast_path_does_not_skip_the_noise():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    bnn = BayesianModel(layer, init_logvar=-2.0)
    x = torch.randn(2, 5, 4)
    with torch.no_grad(), bnn.reparameterize(local_trick=True) as model:
        first = model(x)
        assert torch.equal(model(x), first)
    with torch.no_grad(), bnn.reparameterize(local_trick=True) as model:
        assert not torch.allclose(model(x), first)
    assert not torch.allclose(bnn.base(x), first)


def test_registry_is_covered():
    # Every rule is reached by the tests above through one of these functions.
    covered = {F.linear, torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply}
    assert {f for f in RULES if not f.__name__.startswith("__")} == covered


def test_model_copies_inside_a_context(net):
    bnn = BayesianModel(net, init_logvar=-2.0)
    with bnn.reparameterize(local_trick=True):
        sampled = bnn.sample_model()
    copy.deepcopy(sampled)
