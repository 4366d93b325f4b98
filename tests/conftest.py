import pyro
import pytest
import torch
from torch import nn

from pyro_bayes.noise.gaussian_tensor import RULES

LONGEST = (
    "test_notebooks_run",
    "test_a_run_killed_at_any_moment_ends_where_it_would_have",
    "test_torchrun",
)


def pytest_collection_modifyitems(items):
    """Starts with the longest tests, so that no process waits for one in the end."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Keeps the threads of small operations from waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh():
    """Starts each test with its own seed, an empty param store and the registry as it is."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    rules = dict(RULES)
    yield
    RULES.clear()
    RULES.update(rules)
    pyro.clear_param_store()


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.fixture
def data():
    x = torch.randn(12, 3)
    return x, x.sum(-1, keepdim=True) + 0.1 * torch.randn(12, 1)
