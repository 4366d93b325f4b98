"""Local noise: rules by operator, against closed forms and draws of weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_bayes import BayesianModel
from pyro_bayes.gaussian_tensor import GaussianTensor, mean_of, variance_of
from pyro_bayes.noise import ContextNoise


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


def test_model_copies_inside_a_context(net):
    bnn = BayesianModel(net, init_logvar=-2.0)
    with bnn.reparameterize(local_trick=True):
        sampled = bnn.sample_model()
    copy.deepcopy(sampled)
