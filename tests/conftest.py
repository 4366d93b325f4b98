import pyro
import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def fresh():
    """Starts each test with its own seed and an empty param store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.fixture
def data():
    x = torch.randn(12, 3)
    return x, x.sum(-1, keepdim=True) + 0.1 * torch.randn(12, 1)
