"""Local noise: rules by operator, against closed forms and draws of weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Weighted
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pyro_bayes import BayesianModel
from pyro_bayes.noise.context import ContextNoise, ParticleNoise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, mean_of, variance_of


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
    bnn = BayesianModel(nn.GRUCell(2, 3), init_logvar=-1.0)
    with bnn.reparameterize(local_trick=True) as model:
        weight = model.weight_ih
        assert isinstance(weight, GaussianTensor)
        draw = weight.relu() - (-weight).relu()
        assert type(draw) is torch.Tensor
        torch.testing.assert_close(draw, weight.abs() * weight.sign())
        x, h = torch.randn(5, 2), torch.randn(5, 3)
        drawn = [p.abs() * p.sign() for p in model._parameters.values()]
        torch.testing.assert_close(model(x, h), torch.gru_cell(x, h, *drawn))
    assert not torch.allclose(draw, bnn.base.weight_ih)


def test_draw_of_a_product_is_the_product_of_the_draw():
    noise = ContextNoise("local")
    gaussian = GaussianTensor.of(torch.randn(3, 2), torch.zeros(3, 2), "w", noise)
    mask = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]])
    product = mask * gaussian * 2
    assert isinstance(product, GaussianTensor)
    torch.testing.assert_close(product + 0, 2 * mask * (gaussian + 0))
    torch.testing.assert_close(mean_of(product), 2 * mask * mean_of(gaussian))
    torch.testing.assert_close(variance_of(product), 4 * mask**2 * variance_of(gaussian))


def test_draw_of_a_sum_is_the_sum_of_the_draw():
    noise = ContextNoise("local")
    gaussian = GaussianTensor.of(torch.randn(3, 2), torch.zeros(3, 2), "w", noise)
    shifted = 2 - gaussian
    assert isinstance(shifted, GaussianTensor)
    torch.testing.assert_close(shifted.exp(), (2.0 - gaussian.exp().log()).exp())


def test_activation_times_parameter_is_an_output():
    gaussian = GaussianTensor.of(torch.randn(2), torch.zeros(2), "w", ContextNoise("local"))
    product = torch.randn(5, 2) * gaussian
    assert type(product) is torch.Tensor


def test_draw_made_without_gradients_gains_them_later():
    mean = torch.randn(3, requires_grad=True)
    gaussian = GaussianTensor.of(mean, torch.zeros(3), "w", ContextNoise("local"))
    with torch.no_grad():
        before = gaussian.exp()
    after = gaussian.exp()
    assert torch.equal(before, after)
    after.sum().backward()
    torch.testing.assert_close(mean.grad, after.detach())


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


def test_model_copies_inside_a_context(net):
    bnn = BayesianModel(net, init_logvar=-2.0)
    with bnn.reparameterize(local_trick=True):
        sampled = bnn.sample_model()
    copy.deepcopy(sampled)


def weights(function, *shapes, init_logvar=-1.0):
    """A module that calls a function of the input and its parameters."""
    return BayesianModel(Weighted(function, *shapes), init_logvar=init_logvar)


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_weights_made_of_their_own_draw_are_one_draw(local_trick):
    """Statistics of a draw must belong to the draw that they are used with."""

    def standardised(x, w):
        w = w - w.mean(1, keepdim=True)
        return F.linear(x, w / w.std(1, keepdim=True))

    def straight_through(x, w):
        return F.linear(x, w + (w.sign() - w).detach())

    with weights(standardised, (3, 27)).reparameterize(local_trick) as model:
        torch.testing.assert_close(model(torch.ones(2, 27)), torch.zeros(2, 3), atol=1e-4, rtol=0)
    with weights(straight_through, (3, 1)).reparameterize(local_trick) as model:
        torch.testing.assert_close(model(torch.ones(2, 1)).abs(), torch.ones(2, 3))
    norm = parametrizations.spectral_norm(nn.Linear(1, 3))
    with BayesianModel(norm, init_logvar=-3.0).reparameterize(local_trick) as model:
        output = model(torch.ones(2, 1)) - model(torch.zeros(2, 1))
    torch.testing.assert_close(output.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("local_trick", [True, "flipout"])
@pytest.mark.parametrize("combine", [torch.mul, torch.add])
def test_output_stays_the_same_after_a_draw(local_trick, combine):
    """A constant that the parameter met before its draw was not made of the draw."""

    def masked(x, w):
        return F.linear(x, combine(w, torch.ones(3, 4).tril()))

    x = torch.randn(5, 4)
    with weights(masked, (3, 4)).reparameterize(local_trick) as model:
        before = model(x)
        model.weight.abs().sum()
        assert torch.equal(model(x), before)
        of_draw = F.linear(x, model.weight / model.weight.abs())
        torch.testing.assert_close(of_draw, F.linear(x, model.weight.sign()))


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_changes_in_place_are_kept(local_trick):
    def zeroed(x, w):
        w = w.clone()
        w[:, 0] = 0
        return F.linear(x, w.mul_(2))

    with weights(zeroed, (3, 4)).reparameterize(local_trick) as model:
        assert not model(torch.eye(4))[0].any()
        assert torch.equal(model(torch.eye(4)), model(torch.eye(4)))

    def clamped(x, w):
        with torch.no_grad():
            w.clamp_(-0.1, 0.1)
        return F.linear(x, w)

    with weights(clamped, (3, 4)).reparameterize(local_trick) as model:
        assert model(torch.eye(4)).abs().max() <= 0.1


def test_parts_of_a_parameter_have_noise_of_their_own():
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    parts = {
        "indices": lambda x, w: (
            F.linear(x, w[torch.tensor([0])]),
            F.linear(x, w[torch.tensor([1])]),
        ),
        "masks": lambda x, w: (F.linear(x, w * mask), F.linear(x, w * (1 - mask))),
    }
    for function in parts.values():
        # Which parts are disjoint is not known, so that a look would make them one draw.
        bnn = weights(function, (2, 2))
        with bnn.reparameterize(local_trick=True, check_examples=False) as model:
            first, second = model(torch.ones(500, 2))
            again = model(torch.ones(500, 2))
        assert torch.equal(again[0], first)
        assert torch.equal(again[1], second)
        assert torch.stack((first[:, 0], second[:, 0])).corrcoef()[0, 1].abs() < 4.5 / 500**0.5


@pytest.mark.parametrize("layer", [nn.Embedding(5, 300), nn.Linear(2, 300), nn.LayerNorm(300)])
def test_half_precision_keeps_small_deviations(layer):
    bnn = BayesianModel(layer.half(), init_logvar=-12.0)
    x = torch.arange(5) if isinstance(layer, nn.Embedding) else torch.zeros(50, 2).half()
    x = torch.zeros(50, 300).half() if isinstance(layer, nn.LayerNorm) else x
    with torch.no_grad():
        bnn.base.weight.zero_()
        with bnn.reparameterize(local_trick=True) as model:
            deviation = (model(x) - bnn.means.bias if hasattr(layer, "bias") else model(x)).std()
    assert deviation.item() == pytest.approx(math.exp(-6), rel=0.1)


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_activation_checkpointing_inside_a_context(local_trick):
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.LSTM(8, 4, batch_first=True))
    bnn, x = BayesianModel(net, init_logvar=-2.0), torch.randn(5, 6, 3)
    grads = []
    for call in (lambda m: m(x), lambda m: checkpoint(m, x, use_reentrant=False)):
        torch.manual_seed(0)
        with bnn.reparameterize(local_trick) as model:
            loss = call(model)[0].square().sum()
            grads.append(torch.autograd.grad(loss, list(bnn.guide.parameters())))
    torch.testing.assert_close(*grads)


def test_deviations_train_when_means_are_frozen():
    bnn = BayesianModel(nn.Linear(3, 1))
    bnn.means.requires_grad_(False)
    with bnn.reparameterize(local_trick=True) as model:
        with torch.no_grad():
            model(torch.ones(2, 3))
        model(torch.ones(2, 3)).sum().backward()
    assert all(p.grad is not None for p in bnn.logvars.parameters())


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_ordinary_calls_that_once_failed(local_trick):
    calls = {
        "ids": (nn.Embedding(5, 3), torch.tensor([1, 2])),
        "no ids": (nn.Embedding(5, 3), torch.empty(0, 4, dtype=torch.long)),
        "merged": (Weighted(lambda x, w: F.linear(x, w.view(3, -1)), (3, 2, 2)), torch.ones(2, 4)),
        "vector": (Weighted(lambda x, w: F.linear(x, w), (4,)), torch.ones(2, 4)),
        "keywords": (
            Weighted(lambda x, w: torch.mm(x, mat2=torch.t(input=w)), (3, 4)),
            torch.ones(2, 4),
        ),
        "sparse": (
            Weighted(lambda x, w: x.to_sparse_coo() @ w, (4, 3)),
            torch.ones(2, 4),
        ),
    }
    for module, x in calls.values():
        bnn = BayesianModel(module)
        with bnn.reparameterize(local_trick) as model:
            assert model(x).shape == bnn.base(x).shape


def test_second_derivatives_at_fixed_noise():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    bnn = BayesianModel(net, init_logvar=-2.0)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(bnn.guide.parameters())

    def loss(*_):
        torch.manual_seed(1)
        with bnn.reparameterize(local_trick=True) as model:
            return model(x).square().sum()

    assert torch.autograd.gradgradcheck(loss, (x, *parameters))


LAYERS = {
    "linear": (nn.Linear(3, 2), (4, 3)),
    "sequence": (nn.Linear(3, 2, bias=False), (2, 4, 3)),
    "one example": (nn.Linear(3, 2), (3,)),
    "convolution": (nn.Conv2d(2, 4, (3, 2), 2, (1, 0), dilation=(1, 2), groups=2), (3, 2, 5, 5)),
    "options": (
        Weighted(lambda x, w, b: F.conv2d(x, w, b, 2, padding=[1, 0]), (4, 2, 3, 2), (4,)),
        (3, 2, 5, 5),
    ),
    "padded": (nn.Conv1d(2, 3, 3, padding="same"), (3, 2, 5)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, 2, 1, (1, 0), 2), (3, 2, 3, 3)),
}


@pytest.mark.parametrize("local_trick", [True, "flipout"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_closed_forms_are_the_derivatives(layer, shape, local_trick):
    bnn = BayesianModel(copy.deepcopy(layer).double(), init_logvar=-2.0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = list(bnn.guide.parameters())

    def output(x, *_):
        torch.manual_seed(1)
        with bnn.reparameterize(local_trick=local_trick) as model:
            return model(x).tanh()

    assert torch.autograd.gradcheck(output, (x, *parameters))
    assert torch.autograd.gradgradcheck(output, (x, *parameters), fast_mode=True)
    with bnn.reparameterize(local_trick=local_trick) as model:
        (slope,) = torch.autograd.grad(model(x).tanh().sum(), x)
        same = torch.func.grad(lambda x: model(x).tanh().sum())(x)  # which uses no closed form
    torch.testing.assert_close(slope, same)


@pytest.mark.parametrize("frozen", ["means", "logvars", "input"])
@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_gradients_of_some_are_those_among_all(frozen, local_trick):
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2))
    bnn, x = BayesianModel(net, leaves="named"), torch.randn(4, 2, 5, requires_grad=True)
    sources = {"input": [x], "means": [*bnn.means.parameters()]}
    sources["logvars"] = [*bnn.logvars.parameters()]

    def gradients():
        torch.manual_seed(1)
        wanted = [p for group in sources.values() for p in group if p.requires_grad]
        with bnn.reparameterize(local_trick=local_trick) as model:
            found = torch.autograd.grad(model(x).square().sum(), wanted)
        return {id(p): g for p, g in zip(wanted, found, strict=True)}

    every = gradients()
    for source in sources[frozen]:
        source.requires_grad_(False)
    some = gradients()
    assert len(some) == len(every) - len(sources[frozen])
    for key, gradient in some.items():
        torch.testing.assert_close(gradient, every[key])


@pytest.mark.parametrize("local_trick", [True, "flipout"])
def test_gradients_under_autocast(local_trick, monkeypatch):
    randn = torch.randn  # some releases draw other numbers in half precision
    monkeypatch.setattr(
        torch, "randn", lambda *args, dtype=None, **kw: randn(*args, **kw).to(dtype)
    )
    bnn, x = BayesianModel(nn.Linear(8, 4), init_logvar=-2.0), randn(16, 8)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with bnn.reparameterize(local_trick=local_trick) as model:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = model(x)
            found.append(torch.autograd.grad(output.float().square().sum(), [*bnn.parameters()]))
    assert output.dtype == torch.bfloat16
    for exact, cast in zip(*found, strict=True):
        torch.testing.assert_close(cast, exact, rtol=0.0, atol=0.1 * float(exact.abs().max()))


def test_particles_of_parameters_agree_on_whose_signs_they_share():
    noise, like = ContextNoise("flipout"), torch.empty(())
    weight, bias = (ParticleNoise(noise, 3, torch.tensor(1)) for _ in range(2))
    assert bias.share(("bias", "0"), ("weight", "0"))
    signs = weight.signs(("bias", "0"), 20, 6, like)
    assert torch.equal(signs, weight.signs(("weight", "0"), 20, 6, like))
    assert not torch.equal(signs, weight.signs(("weight", "1"), 20, 6, like))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_signs_are_balanced_and_independent(dtype):
    count = 20_001
    signs = ContextNoise("flipout").signs(("w", "0"), count, 50, torch.empty((), dtype=dtype))
    assert signs.dtype == dtype
    assert signs.shape == (count, 50)
    assert (signs.abs() == 1).all()
    products = signs.double().T @ signs.double() / count
    assert (products - torch.eye(50)).abs().max() < 5.5 / count**0.5
    assert (signs.double().mean(0)).abs().max() < 5.5 / count**0.5


def test_draw_made_without_gradients_has_those_of_a_draw_made_with():
    bnn, found = BayesianModel(nn.Linear(3, 2), init_logvar=-2.0), []
    parameters = list(bnn.parameters())
    for early in (False, True):
        torch.manual_seed(1)
        with bnn.reparameterize(local_trick=True) as model:
            with torch.set_grad_enabled(not early):
                first = model.weight.sin()
            again = model.weight.sin()
        torch.testing.assert_close(again, first, rtol=0.0, atol=0.0)
        found.append(torch.autograd.grad(again.sum(), parameters))
    for with_gradients, without in zip(*found, strict=True):
        torch.testing.assert_close(without, with_gradients)


def test_second_derivatives_where_there_is_no_variance():
    bnn = BayesianModel(nn.Linear(3, 2, bias=False), init_logvar=-2.0)
    x = torch.zeros(4, 3, requires_grad=True)
    with bnn.reparameterize(local_trick=True) as model:
        loss = (model(x) - 1).square().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), x)
    weight = bnn.base.weight.detach()
    expected = 2 * 2 * slope.detach() @ weight.T @ weight
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("local_trick", [True, "flipout"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_in_a_context_that_was_opened_without(mode, local_trick):
    bnn, x = BayesianModel(nn.Linear(3, 2), init_logvar=-2.0), torch.randn(5, 3)
    with mode(), bnn.reparameterize(local_trick) as model:
        before = model(x)
        with torch.inference_mode(False), torch.enable_grad():
            during, weight = model(x), model.weight.sin()  # which takes one draw
        after = model(x)
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(during, before.clone())
    for output in (during, weight):
        gradients = torch.autograd.grad(output.square().sum(), list(bnn.parameters()))
        assert all(gradient.any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_forward_differentiation(local_trick):
    bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3, requires_grad=True)
    with bnn.reparameterize(local_trick) as model:
        expected = torch.autograd.grad(model(x).sum(), x)[0].sum(1, keepdim=True)
        with forward_ad.dual_level():
            output = model(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
            torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)
