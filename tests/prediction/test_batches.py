"""What a batch is, wherever one is read."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_bayes import ELBO, BayesianModel, evaluate, fit, svi_model
from pyro_bayes.evaluation import to_arviz
from pyro_bayes.likelihoods import Gaussian
from pyro_bayes.prediction.batch_norm import update_batch_norm
from pyro_bayes.prediction.batches import arguments, each_batch, inputs, parts
from pyro_bayes.training import diagnose

A, B, Y = torch.randn(2, 3), torch.randn(2, 1), torch.zeros(2, 1)
Pair, Three = namedtuple("Pair", "x y"), namedtuple("Three", "a b c")
three, other = Three(A, B, Y), object()

# A batch, its inputs, and all its parts.
BATCHES = {
    "x": (A, A, A),
    "x in a list": ([A], A, (A,)),
    "a pair": ((A, Y), A, (A, Y)),
    "a pair in a list": ([A, Y], A, (A, Y)),
    "a pair with a name": (Pair(A, Y), A, (A, Y)),
    "two inputs": (((A, B), Y), (A, B), ((A, B), Y)),
    "two inputs in a list": ([[A, B], Y], (A, B), ((A, B), Y)),
    "inputs by name": (({"a": A}, Y), {"a": A}, ({"a": A}, Y)),
    "inputs by name alone": ({"a": A}, {"a": A}, {"a": A}),
    "another mapping": ([UserDict(a=A), Y], {"a": A}, ({"a": A}, Y)),
    "a named tuple": (three, three, three),
    "a named tuple in a pair": ([three, Y], three, (three, Y)),
    "another object": ((other, Y), (other,), (other, Y)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_inputs_and_parts(name):
    batch, x, every = BATCHES[name]
    assert_same(inputs(batch), x)
    assert_same(parts(batch), every)


def assert_same(value, expected):
    """Compares tensors by identity, and containers by type."""
    assert type(value) is type(expected)
    if type(value) is dict:
        value, expected = tuple(value.items()), tuple(expected.items())
    if isinstance(value, tuple):
        for one, other in zip(value, expected, strict=True):
            assert_same(one, other)
    else:
        assert value is expected or value == expected


def test_arguments():
    assert arguments([A, B]) == arguments((A, B)) == ((A, B), {})
    assert arguments({"a": A}) == ((), {"a": A})
    assert arguments(three) == ((three,), {})
    assert arguments(A) == ((A,), {})


ERRORS = {
    "no batches": (A, TypeError, r"Expected ood to give batches, pairs .*; got Tensor.*ood=\[x\]"),
    "one mapping": ({"a": A}, TypeError, "got dict"),
    "a number": (3, TypeError, "got int"),
    "empty": ([], ValueError, "Expected ood to have at least one batch; got none"),
    "an empty stream": (iter([]), ValueError, "ood to have at least one batch"),
    "three parts": ([(A, B, Y)], ValueError, r"got a tuple of 3.*\(\(a, b\), y\)"),
    "no part": ([()], ValueError, "got a tuple of 0"),
    "text": (["words"], TypeError, "batches of tensors; got one of str"),
}


@pytest.mark.parametrize(("loader", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(loader, error, match):
    with pytest.raises(error, match=match):
        list(each_batch(loader, name="ood"))


# Everywhere


class Two(nn.Module):
    """A network of two inputs, whose output is their sum if they are where they belong."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 1), nn.BatchNorm1d(3)

    def forward(self, a, b):
        return self.linear(self.norm(a)) + b


class Pairs(Dataset):
    def __init__(self, named):
        self.a, self.b, self.y = torch.randn(20, 3), torch.randn(20, 1), torch.randn(20, 1)
        self.named = named

    def __len__(self):
        return 20

    def __getitem__(self, i):
        x = {"b": self.b[i], "a": self.a[i]} if self.named else (self.a[i], self.b[i])
        return x, self.y[i]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.filterwarnings("ignore:After 1 epochs:UserWarning")
def test_several_inputs_from_a_loader(named):
    bnn, likelihood, data = BayesianModel(Two(), init_logvar=-4.0), Gaussian(1.0), Pairs(named)
    objective = ELBO(bnn, likelihood, num_data=20)
    loader, whole, y = DataLoader(data, batch_size=5), (data.a, data.b), data.y

    batch = next(iter(loader))
    assert objective(*batch).isfinite()
    assert len(fit(objective, loader, 1, optimizer=torch.optim.Adam(objective.parameters()))) == 1
    update_batch_norm(bnn, loader)
    assert bnn.base.norm.num_batches_tracked == 4
    bnn.eval()

    def source():
        return torch.Generator().manual_seed(1)

    expected = bnn.predict(whole, 10, generator=source())
    found = bnn.predict(loader, 10, generator=source())
    torch.testing.assert_close(found.mean, expected.mean)
    x_alone = [{"a": data.a, "b": data.b}] if named else [(whole,)]
    torch.testing.assert_close(bnn.predict(x_alone, 10, generator=source()).mean, expected.mean)
    predictive = likelihood.predictive(bnn, loader, 10, generator=source())
    torch.testing.assert_close(predictive.mean, expected.mean)

    def error(net, x, y):
        args, kwargs = arguments(x)
        return net(*args, **kwargs) - y

    found = bnn.predict(loader, 10, function=error, generator=source())
    torch.testing.assert_close(found.mean, expected.mean - y)

    scores = evaluate(bnn, likelihood, loader, 10, ood=loader, generator=source())
    others = evaluate(bnn, likelihood, [(whole, y)], 10, ood=x_alone, generator=source())
    assert dict(scores) == pytest.approx(dict(others), rel=1e-4)
    assert scores["auroc_total"] == 0.5


def of_model(call):
    """Returns a function of a model, its objective and a batch."""
    return lambda bnn, objective, x, y: call(bnn, x, y)


LIKELIHOOD = Gaussian(1.0)
READERS = {
    "objective": lambda bnn, objective, x, y: objective(x, y),
    "fit": lambda bnn, objective, x, y: fit(
        objective, [(x, y)], 1, optimizer=torch.optim.SGD(objective.parameters(), lr=0.0)
    ),
    "diagnose": lambda bnn, objective, x, y: diagnose(objective, [(x, y)], 2),
    "svi_model": of_model(lambda bnn, x, y: svi_model(bnn, LIKELIHOOD, 8)(x, y)),
    "predict": of_model(lambda bnn, x, y: bnn.predict([[x, y]], 5)),
    "predictive": of_model(lambda bnn, x, y: LIKELIHOOD.predictive(bnn, [[x, y]], 5)),
    "evaluate": of_model(lambda bnn, x, y: evaluate(bnn, LIKELIHOOD, [[x, y]], 5, ood=[[x, y]])),
    "to_arviz": of_model(
        lambda bnn, x, y: to_arviz(bnn, 5, likelihood=LIKELIHOOD, loader=[[x, y]])
    ),
    "update_batch_norm": of_model(lambda bnn, x, y: update_batch_norm(bnn, [[x, y]])),
}
A8, B8 = torch.randn(8, 2), torch.randn(8, 3)
KINDS = {
    "list": [A8, B8],
    "tuple": (A8, B8),
    "dictionary": {"a": A8, "b": B8},
    "another mapping": UserDict(a=A8, b=B8),
    "nested": [A8, [B8[:, :1], B8[:, 1:]]],
}


class Joining(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(5), nn.Linear(5, 1)

    def forward(self, a, b):
        b = b if isinstance(b, torch.Tensor) else torch.cat(list(b), -1)
        return self.linear(self.norm(torch.cat([a, b], -1)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # nothing is learned here
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_takes_inputs_of_every_kind(read):
    bnn = BayesianModel(Joining(), init_logvar=-4.0)
    objective = ELBO(bnn, LIKELIHOOD, 8)
    for x in KINDS.values():
        read(bnn, objective, x, torch.zeros(8, 1))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_inputs_of_another_precision_teach(read):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    bnn = BayesianModel(net)
    objective = ELBO(bnn, LIKELIHOOD, 8, local_trick=True)
    with pytest.raises(TypeError, match=r"inputs of torch\.float32, .*got some of torch\.float64"):
        read(bnn, objective, A8.double(), torch.zeros(8, 1))


def test_a_list_of_arguments_is_no_loader():
    bnn = BayesianModel(Joining()).eval()
    with pytest.raises(TypeError, match=r"A list is an iterable of batches: pass tuple\(x\)"):
        bnn.predict([A8, B8], 5)
