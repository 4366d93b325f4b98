"""Fused draws and divergences, against the formulas for one parameter."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from pyro_bayes import BayesianModel, fused, gaussian

SHAPES = {"w": (4, 3), "b": (5,), "s": ()}


@pytest.fixture
def posterior():
    return {
        name: (
            torch.randn(shape, dtype=torch.float64, requires_grad=True),
            torch.randn(shape, dtype=torch.float64).requires_grad_(),
        )
        for name, shape in SHAPES.items()
    }


def leaves(posterior):
    return [p for q in posterior.values() for p in q]


def rebuilt(posterior, values):
    pairs = zip(values[::2], values[1::2], strict=True)
    return dict(zip(posterior, pairs, strict=True))


def noisy(posterior, values):
    torch.manual_seed(1)
    return tuple(fused.draws(rebuilt(posterior, values)).values())


def test_draws_are_those_of_the_formula(posterior):
    torch.manual_seed(1)
    draws = fused.draws(posterior)
    torch.manual_seed(1)
    flat = torch.randn(18, dtype=torch.float64)
    epsilons = dict(zip(SHAPES, flat.split([12, 5, 1]), strict=True))
    assert list(draws) == list(SHAPES)
    for name, draw in draws.items():
        expected = gaussian.draw(*posterior[name], epsilons[name].view(SHAPES[name]))
        torch.testing.assert_close(draw, expected)


@pytest.mark.parametrize("prior_var", [1.0, 0.1])
def test_divergence_is_that_of_the_formula(posterior, prior_var):
    expected = sum(gaussian.kl_divergence(*q, prior_var) for q in posterior.values())
    torch.testing.assert_close(fused.kl_divergence(posterior, prior_var), expected)


def test_divergence_of_a_posterior_close_to_the_prior_keeps_its_digits():
    logvar = torch.full((1000,), 1e-3)
    posterior = {"w": (torch.zeros(1000), logvar)}
    expected = 500 * (math.expm1(logvar[0].item()) - logvar[0].item())
    assert fused.kl_divergence(posterior, 1.0).item() == pytest.approx(expected, rel=1e-3)


def test_derivatives_of_first_and_second_order(posterior):
    def draws(*values):
        return noisy(posterior, values)

    def divergence(*values):
        return fused.kl_divergence(rebuilt(posterior, values), 0.3)

    for function in (draws, divergence):
        assert torch.autograd.gradcheck(function, leaves(posterior), check_undefined_grad=False)
        assert torch.autograd.gradgradcheck(function, leaves(posterior))


def test_gradients_are_the_same_for_a_second_derivative(posterior):
    def outputs():
        torch.manual_seed(1)
        draws = fused.draws(posterior).values()
        return fused.kl_divergence(posterior, 0.3) + sum(draw.square().sum() for draw in draws)

    first = torch.autograd.grad(outputs(), leaves(posterior))
    second = torch.autograd.grad(outputs(), leaves(posterior), create_graph=True)
    torch.testing.assert_close(first, second)


def test_draws_that_are_not_used_get_no_gradient(posterior):
    fused.draws(posterior)["b"].sum().backward()
    assert posterior["b"][1].grad is not None
    assert posterior["w"][0].grad is None or not posterior["w"][0].grad.any()


def test_parameters_of_two_types_keep_their_order():
    posterior = {
        "a": (torch.zeros(2), torch.zeros(2)),
        "b": (torch.zeros(2).double(), torch.zeros(2).double()),
        "c": (torch.zeros(2), torch.zeros(2)),
        "d": (torch.zeros(2).half(), torch.zeros(2).half()),
    }
    draws = fused.draws(posterior)
    assert list(draws) == ["a", "b", "c", "d"]
    assert [d.dtype for d in draws.values()] == [q[0].dtype for q in posterior.values()]
    assert fused.kl_divergence(posterior, 1.0).item() == 0


def test_divergence_keeps_the_type_of_the_parameters():
    half = {"a": (torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16())}
    assert fused.kl_divergence(half, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("local_trick", [False, True, "flipout"])
def test_transforms_go_through_the_whole_model(local_trick):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.bnn = BayesianModel(nn.Linear(3, 1).double())

        def forward(self, x):
            with self.bnn.reparameterize(local_trick) as model:
                loss = model(x).square().sum()
            return loss + self.bnn.kl_divergence()

    loss, x = Loss(), torch.randn(4, 3, dtype=torch.float64)
    parameters = {n: p for n, p in loss.named_parameters() if ".guide." in n}

    def value(parameters):
        torch.manual_seed(0)
        return functional_call(loss, parameters, (x,))

    found = grad(value)(parameters)
    expected = torch.autograd.grad(value(parameters), list(parameters.values()))
    if local_trick is not False:
        torch.testing.assert_close(tuple(found.values()), expected)
    assert all(f.isfinite().all() for f in found.values())
    many = {n: torch.stack([p.detach()] * 3) for n, p in parameters.items()}
    losses = vmap(lambda p: functional_call(loss, p, (x,)), randomness="different")(many)
    assert len(losses.unique()) == 3
