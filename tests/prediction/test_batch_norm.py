"""Batch norm under the posterior, and the posterior mean."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from pyro_bayes import ELBO, BayesianModel
from pyro_bayes.likelihoods import Gaussian
from pyro_bayes.prediction.batch_norm import update_batch_norm

X, Y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 1)


@pytest.fixture
def bnn():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)
    )
    return BayesianModel(net, init_logvar=-2.0)


def train(bnn, optimizer=torch.optim.Adam, **options):
    objective = ELBO(bnn, Gaussian(1.0), len(X))
    optimizer = optimizer(objective.parameters(), lr=0.1, **options)
    for _ in range(3):
        objective(X, Y).backward()
        optimizer.step()


def is_stale(bnn):
    """Whether a prediction in evaluation mode warns."""
    mode = bnn.training
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        bnn.eval()
        bnn.predict(X, 3)
        bnn.train(mode)
    assert all("update_batch_norm(bnn, loader)" in str(warning.message) for warning in found)
    return bool(found)


def test_statistics_are_the_averages_over_batches_and_draws(bnn):
    update_batch_norm(bnn, X.split(16))
    norm = bnn.base[2]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    assert norm.num_batches_tracked == 4
    # The same draws by hand: dropout is in evaluation mode, as in a prediction.
    torch.manual_seed(1)
    update_batch_norm(bnn, X.split(16))
    torch.manual_seed(1)
    means, variances = [], []
    for batch in X.split(16):
        with bnn.reparameterize() as net, torch.no_grad():
            inner = net[0](batch)
        means.append(inner.mean(0))
        variances.append(inner.var(0))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert not torch.equal(mean, norm.running_mean)
    assert not torch.equal(var, norm.running_var)


def test_statistics_converge_to_those_under_the_posterior(bnn):
    """The variance of a linear layer's output, of fixed weights plus Gaussian ones."""
    update_batch_norm(bnn, [X] * 4000)
    weight, logvar = bnn.means.get_parameter("0.weight"), bnn.logvars.get_parameter("0.weight")
    covariance = X.T.cov()
    exact = torch.einsum("ki,ij,kj->k", weight, covariance, weight)
    exact = (exact + logvar.exp() @ covariance.diag()).detach()
    norm = bnn.base[2]
    torch.testing.assert_close(norm.running_var, exact, rtol=0.1, atol=0)
    mean = (X.mean(0) @ weight.T + bnn.means.get_parameter("0.bias")).detach()
    torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=0.03)


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_is_left_alone(bnn, training):
    bnn.train(training)
    bnn.base[1].eval()
    norm = bnn.base[2]
    norm.momentum = 0.3
    before = copy.deepcopy(bnn.state_dict())
    update_batch_norm(bnn, [(X, Y)])
    assert [m.training for m in bnn.base] == [training, False, training, training, training]
    assert bnn.training is training
    assert norm.momentum == 0.3
    changed = {k for k, v in bnn.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        f"base.2.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert all(p.grad is None for p in bnn.parameters())


@pytest.mark.parametrize(
    ("loader", "error", "match"),
    [
        ([], ValueError, "loader to have at least one batch; got none"),
        ([X, X[:, :2]], RuntimeError, "shape"),
        ([(X, X, Y)], ValueError, "pairs"),
        (["words"], TypeError, "str"),
        ([X, X * torch.nan], ValueError, "statistics that are finite"),
    ],
)
def test_after_an_error_statistics_are_as_before(bnn, loader, error, match):
    train(bnn)
    before, momentum = copy.deepcopy(bnn.state_dict()), bnn.base[2].momentum
    with pytest.raises(error, match=match):
        update_batch_norm(bnn, loader)
    assert all(torch.equal(value, before[key]) for key, value in bnn.state_dict().items())
    assert bnn.base[2].momentum == momentum
    assert is_stale(bnn)


def test_networks_without_running_statistics_are_left_alone():
    for net in (nn.Linear(3, 1), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))):
        bnn = BayesianModel(net)
        if isinstance(net, nn.Linear):
            update_batch_norm(bnn, [])
            train(bnn)
        assert not is_stale(bnn)


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"]
)
def test_statistics_are_stale_after_training_until_they_are_updated(bnn, options):
    assert not is_stale(bnn)  # as those of a network that was trained before
    train(bnn, **options)
    assert is_stale(bnn)
    update_batch_norm(bnn, [X])
    assert not is_stale(bnn)
    bnn.predict(X, 3)
    with bnn.reparameterize(), bnn.mean():
        pass
    assert not is_stale(bnn)
    train(bnn, **options)
    assert is_stale(bnn)


@pytest.mark.parametrize("part", ["means", "logvars"])
def test_a_change_of_any_parameter_makes_statistics_stale(bnn, part):
    with torch.no_grad():
        getattr(bnn, part).get_parameter("0.bias").add_(1.0)
    assert is_stale(bnn)


def test_a_change_of_a_deterministic_parameter_makes_statistics_stale():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    bnn = BayesianModel(net, include_params="1")
    with torch.no_grad():
        bnn.base[0].weight.add_(1.0)
    assert is_stale(bnn)


def test_statistics_of_a_pass_in_training_mode_are_stale(bnn):
    with bnn.reparameterize() as net:
        net(X)
    assert is_stale(bnn)


def test_networks_in_training_mode_do_not_warn():
    bnn = BayesianModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    train(bnn)
    bnn.predict(X, 3, chunk_size=1)


def pickled(bnn):
    buffer = io.BytesIO()
    torch.save(bnn, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def replaced(bnn):
    """A conversion that makes new parameters, which start to count anew."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return bnn.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


CHANGES = {
    "new parameters": replaced,
    "double": lambda bnn: bnn.double().float(),
    "to": lambda bnn: bnn.to("cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "inside of another": lambda bnn: (
        copy.deepcopy(ELBO(bnn, Gaussian(1.0), 64)).double().model.float()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("stale", [True, False])
def test_conversions_and_copies_keep_what_is_known(bnn, change, stale):
    train(bnn)
    if not stale:
        update_batch_norm(bnn, [X])
    other = change(bnn)
    assert is_stale(other) is stale
    assert is_stale(bnn) is stale
    if not stale:
        train(other)
        assert is_stale(other)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_is_trusted(bnn, assign):
    other = copy.deepcopy(bnn)
    train(bnn)
    update_batch_norm(bnn, [X])
    train(other)
    other.load_state_dict(bnn.state_dict(), assign=assign)
    assert not is_stale(other)
    train(other)
    assert is_stale(other)


# The posterior mean


def test_mean_is_the_network_of_the_posterior_means(bnn):
    bnn.eval()
    with bnn.mean() as net:
        assert net is bnn.base
        found = net(X)
    assert torch.equal(found, bnn.base(X))
    for open_context in (bnn.reparameterize, lambda: bnn.reparameterize(local_trick=True)):
        with open_context() as noisy:
            before = noisy(X)
            with bnn.mean() as net:
                assert torch.equal(net(X), found)
                with bnn.reparameterize() as other:
                    assert not torch.equal(other(X), found)
                assert torch.equal(net(X), found)
            assert torch.equal(noisy(X), before)
            assert not torch.equal(before, found)


def test_mean_passes_no_gradient_and_keeps_the_mode(bnn):
    for mode in (True, False):
        bnn.train(mode)
        with bnn.mean() as net:
            assert net.training is mode
            assert not net(X).requires_grad
    x = X.clone().requires_grad_()
    with bnn.mean() as net:
        net(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in bnn.parameters())


def test_mean_gives_the_base_back_after_an_error(bnn):
    before = dict(bnn.base.named_parameters())
    with pytest.raises(KeyError), bnn.mean():
        raise KeyError
    assert all(bnn.base.get_parameter(name) is p for name, p in before.items())


def test_mean_trains_what_is_deterministic():
    bnn = BayesianModel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), include_params="1.")
    with bnn.mean() as net:
        net(X).sum().backward()
    assert [n for n, p in bnn.named_parameters() if p.grad is not None] == [
        "base.0.weight",
        "base.0.bias",
    ]
