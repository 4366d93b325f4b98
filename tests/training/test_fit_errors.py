"""What cannot train is refused by one clear error, and nothing is left half done."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.training import checkpoint, fit

N = 12
NAN, INF = math.nan, math.inf


def regression(**kwargs):
    """Returns the arguments of a call that trains."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    bnn = BayesianModel(net, init_logvar=-5.0)
    objective = ELBO(bnn, kwargs.pop("likelihood", likelihoods.Gaussian(1.0)), N)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(3)]
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    return {"objective": objective, "loader": batches, "epochs": 2, "optimizer": optimizer}


def with_batch(index, x=None, y=None):
    def change(call):
        old_x, old_y = call["loader"][index]
        call["loader"][index] = (old_x if x is None else x, old_y if y is None else y)

    return change


def with_value(index, part, value):
    def change(call):
        call["loader"][index][part][2, 0] = value

    return change


def dataset(x=None, y=None):
    return TensorDataset(
        torch.zeros(N, 3) if x is None else x, torch.zeros(N, 1) if y is None else y
    )


def with_labels(labels):
    def change(call):
        bnn = BayesianModel(nn.Linear(3, 5), init_logvar=-5.0)
        call["objective"] = ELBO(bnn, likelihoods.Categorical(), N)
        call["optimizer"] = torch.optim.Adam(call["objective"].parameters())
        call["loader"] = [(torch.randn(4, 3), labels)]

    return change


def with_classes(rows=N, valid=False, **options):
    """A classification of five classes, the last of whose labels is 5."""

    def change(call):
        with_labels(torch.zeros(4).long())(call)
        labels = torch.zeros(rows).long()
        labels[-1] = 5
        data = TensorDataset(torch.randn(rows, 3), labels)
        loader = DataLoader(data, batch_size=3, **options)
        call["validation" if valid else "loader"] = loader

    return change


def late(likelihood, y):
    """Targets that a likelihood does not have, in the last batch."""

    def change(call):
        x = [x for x, _ in call["loader"]]
        call.update(regression(likelihood=likelihood))
        call["loader"] = [(x[0], torch.ones(4, 1)), (x[1], torch.ones(4, 1)), (x[2], y)]

    return change


def frozen(call):
    call["objective"].requires_grad_(False)


def with_parameter(value):
    def change(call):
        with torch.no_grad():
            call["objective"].model.logvars.get_parameter("2.weight")[0, 1] = value

    return change


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def put(**kwargs):
    return lambda call: call.update(kwargs)


def other_scheduler(call):
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    call["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)


def base_parameters(call):
    call["optimizer"] = torch.optim.Adam(call["objective"].model.base.parameters())


def lbfgs(call):
    call["optimizer"] = torch.optim.LBFGS(call["objective"].parameters())


def learned_likelihood(call):
    likelihood = likelihoods.Gaussian(1.0, learn=True)
    call["objective"] = ELBO(call["objective"].model, likelihood, N)


def wide(call):
    call["loader"] = [(torch.randn(4, 5), torch.randn(4, 1))]


nan_rows = torch.zeros(N, 3)
nan_rows[7, 1] = NAN

# What is wrong, how it comes about, and what is raised.
CASES = {
    "objective": (put(objective=nn.Linear(1, 1)), TypeError, "objective to be an ELBO; got Linear"),
    "no optimizer": (put(optimizer=None), TypeError, "optimizer to be a torch optimiser"),
    "several gradients per step": (lbfgs, TypeError, "one gradient per step; got LBFGS"),
    "optimizer of the base": (base_parameters, ValueError, r"without \['model.guide.mean'"),
    "optimizer without the likelihood": (
        learned_likelihood,
        ValueError,
        r"objective\.parameters\(\); got one without \['likelihood\.log_scale'\]",
    ),
    "nothing trains": (frozen, ValueError, "parameters that train; got none"),
    "scheduler": (put(scheduler=3), TypeError, "scheduler to be a torch scheduler"),
    "other scheduler": (other_scheduler, ValueError, "got one of another"),
    "no epochs": (put(epochs=0), ValueError, "epochs to be an integer of at least 1; got 0"),
    "half an epoch": (put(epochs=0.5), ValueError, "epochs to be an integer"),
    "patience": (put(patience=0), ValueError, "patience to be an integer"),
    "no samples": (put(validation_samples=0), ValueError, "validation_samples to be an integer"),
    "patience alone": (put(patience=3), ValueError, "validation, whose loss"),
    "callbacks": (put(callbacks=[3]), TypeError, "callbacks to be a list of functions"),
    "one callback": (put(callbacks=print), TypeError, "callbacks to be a list of functions"),
    "float16": (put(precision=torch.float16), ValueError, "precision to be torch.bfloat16"),
    "every": (put(checkpoint_every=0), ValueError, "checkpoint_every to be an integer"),
    "no folder": (put(checkpoint="/no/where/x.pt"), ValueError, "a folder that exists"),
    "a folder": (put(checkpoint="."), ValueError, "to be a file in a folder"),
    "resume": (put(resume=True), ValueError, "a checkpoint to resume from"),
    "no loader": (put(loader=None), TypeError, r"loader to give pairs \(x, y\)"),
    "a tensor": (put(loader=torch.zeros(3, 2)), TypeError, r"loader to give pairs \(x, y\)"),
    "a generator": (put(loader=iter([])), TypeError, "loader to start anew for each epoch"),
    "empty loader": (put(loader=[]), ValueError, "loader to have at least one batch; got none"),
    "empty dataset": (
        put(loader=DataLoader(TensorDataset(torch.zeros(3, 3), torch.zeros(3, 1)), batch_size=4,
                              drop_last=True)),
        ValueError,
        "smaller than a batch with drop_last=True",
    ),
    "empty stream": (put(loader=DataLoader(Endless())), ValueError, "at least one batch; got none"),
    "empty validation": (put(validation=[]), ValueError, "validation to have at least one batch"),
    "batch without y": (put(loader=[torch.zeros(4, 3)]), TypeError, r"batch 0 .* pair .*a Tensor"),
    "batch of three": (put(loader=[(1, 2, 3)]), TypeError, "got a tuple of 3"),
    "y no tensor": (with_batch(0, y=[1.0]), TypeError, "y of batch 0 of loader .* got list"),
    "y without examples": (with_batch(1, y=torch.zeros(0, 1)), TypeError, r"one; got \(0, 1\)"),
    "nan in x": (with_value(2, 0, NAN), ValueError, r"x of batch 2 of loader .* nan at \[2, 0\]"),
    "inf in y": (with_value(1, 1, -INF), ValueError, r"y of batch 1 of loader .*; got -inf at"),
    "nan in memory": (
        put(loader=DataLoader(dataset(nan_rows), batch_size=4)),
        ValueError,
        r"tensor 0 of loader's dataset to be finite; got nan at \[7, 1\]",
    ),
    "nan in a subset": (
        put(loader=DataLoader(Subset(Subset(dataset(nan_rows), [9, 7, 5]), [1]))),
        ValueError,
        r"got nan at \[0, 1\]",
    ),
    "nan in validation": (
        put(validation=[(torch.full((2, 3), NAN), torch.zeros(2, 1))]),
        ValueError,
        "x of batch 0 of validation",
    ),
    "y of another shape": (with_batch(0, y=torch.zeros(4)), ValueError, r"\(4, 1\).*got \(4,\)"),
    "y of another dtype": (with_batch(0, y=torch.zeros(4, 1).long()), ValueError, "Expected y"),
    "labels out of range": (with_labels(torch.tensor([0, 1, 2, 5])), ValueError, "Expected y"),
    "a label out of range, later": (
        with_classes(),
        ValueError,
        r"y of loader's dataset to hold .* 0 to 4; got 5 at index \(11,\)",
    ),
    "a label out of range, of validation": (
        with_classes(valid=True),
        ValueError,
        r"y of validation's dataset to hold .* 0 to 4; got 5 at index \(11,\)",
    ),
    "a label of no class, later": (
        late(likelihoods.Bernoulli(), torch.full((4, 1), 2.0)),
        ValueError,
        r"y of batch 2 of loader to hold 0 or 1; got 2 at index \(0, 0\)",
    ),
    "half a count, later": (
        late(likelihoods.Poisson(), torch.full((4, 1), 0.5)),
        ValueError,
        r"y of batch 2 of loader to hold counts, integers from 0; got 0\.5",
    ),
    "a count that is complex, later": (
        late(likelihoods.NegativeBinomial(1.0), torch.ones(4, 1) + 0j),
        ValueError,
        r"y of batch 2 of loader to hold counts, integers from 0; got torch\.complex64",
    ),
    "validation of another width": (
        put(validation=[(torch.randn(4, 2), torch.randn(4, 1))]), RuntimeError, "shape",
    ),
    "validation of another shape": (
        put(validation=[(torch.randn(4, 3), torch.randn(4))]), ValueError, "Expected y of the sh",
    ),
    "labels as numbers": (with_labels(torch.zeros(4)), ValueError, "Expected y"),
    "batch larger than N": (
        with_batch(0, torch.zeros(N + 1, 3), torch.zeros(N + 1, 1)),
        ValueError,
        "num_data .*got 12 and a batch of 13",
    ),
    "later batch larger than N": (
        with_batch(2, torch.zeros(N + 1, 3), torch.zeros(N + 1, 1)),
        ValueError,
        "num_data .*got 12 and a batch of 13",
    ),
    "input that does not fit": (wide, RuntimeError, "shape"),
    "nan in a parameter": (
        with_parameter(NAN),
        FloatingPointError,
        r"before the first step.*'model\.guide\.logvars\.2\.weight' is the first",
    ),
    "overflow of a divergence": (
        with_parameter(120.0),
        FloatingPointError,
        r"finite KL divergence before the first step.* that of '2\.weight' is the first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_error_before_the_first_step(case):
    change, error, match = CASES[case]
    call = regression()
    change(call)
    objective = call["objective"]
    modules = list(objective.modules())
    before = copy.deepcopy(objective.state_dict())
    modes = [module.training for module in modules]
    with pytest.raises(error, match=f"(?s){match}"):
        fit(**call)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]) or name.endswith("logvars.2.weight")
    assert [module.training for module in modules] == modes
    if isinstance(call["optimizer"], torch.optim.Optimizer):
        assert not call["optimizer"].state
    assert all(p.grad is None for p in objective.parameters())


def test_labels_that_are_never_met_are_not_looked_at():
    for options in (
        {"sampler": SubsetRandomSampler(range(N - 1))},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(range(N - 1)), 4, drop_last=False)},
        {"collate_fn": lambda rows: (torch.randn(len(rows), 3), torch.zeros(len(rows)).long())},
    ):
        call = regression()
        if "batch_sampler" in options:
            with_classes()(call)
            call["loader"] = DataLoader(call["loader"].dataset, **options)
        else:
            with_classes(**options)(call)
        call["objective"].num_data = N if "collate_fn" in options else N - 1
        call["optimizer"].param_groups[0]["lr"] = 0.5
        assert len(fit(**call)) == 2


def test_a_wrapped_objective_is_to_be_unwrapped():
    wrapped = object.__new__(DistributedDataParallel)
    call = regression()
    with pytest.raises(TypeError, match=r"got DistributedDataParallel\. fit\(\) wraps"):
        fit(**{**call, "objective": wrapped})


class Stream:
    """Batches that are only known when they come."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_later_batch_leaves_what_the_steps_before_made():
    call, reference = regression(), regression()
    reference["objective"].load_state_dict(call["objective"].state_dict())
    batches = call["loader"]
    batches[1][0][2, 2] = NAN
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"x of batch 1 of loader to be finite; got nan at \[2, 2"):
        fit(**{**call, "loader": Stream(batches)})
    torch.manual_seed(0)
    fit(**{**reference, "loader": batches[:1], "epochs": 1})
    found = call["objective"].state_dict()
    for name, value in reference["objective"].state_dict().items():
        assert torch.equal(value, found[name]), name


class Broken(nn.Module):
    """A network that is fine until it is told not to be."""

    def __init__(self, how):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.how, self.calls = how, 0

    def forward(self, x):
        self.calls += 1
        if self.calls <= 4:
            return self.net(x)
        if self.how == "gradient":
            # 0 * inf in the backward pass, though the output is finite
            return self.net(x) + (0 * self.net[2].bias).square().sqrt()
        return self.net(x) * torch.tensor(1e30)  # whose square overflows


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("loss", r"at step 1 of epoch 1; got a loss of inf\. .* data and parameters are finite"),
        ("gradient", r"first parameter with such a gradient is 'model\.guide\.means\.net\.2\.bi"),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_finite_is_not_followed(how, match):
    call, net = regression(), Broken(how)
    objective = ELBO(BayesianModel(net, init_logvar=-5.0), likelihoods.Gaussian(1.0), N)
    states = []

    class Noted(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            states.append(copy.deepcopy(objective.state_dict()))

    optimizer = Noted(objective.parameters(), lr=0.05)
    with pytest.raises(FloatingPointError, match=match):
        fit(objective, call["loader"], 5, optimizer=optimizer)
    assert len(states) == 4
    for name, value in objective.state_dict().items():
        assert torch.equal(value, states[-1][name]), name


def test_a_step_that_was_too_long_names_the_first_parameter(tmp_path):
    call = regression()
    call["optimizer"] = torch.optim.SGD(
        [
            {"params": list(call["objective"].model.means.parameters()), "lr": 0.01},
            {"params": list(call["objective"].model.logvars.parameters()), "lr": 1e38},
        ]
    )
    file = tmp_path / "run.pt"
    match = r"at step 1 of epoch 0.*'(model\.guide\.logvars\.)?0\.weight' is the first\. A lower"
    with pytest.raises(FloatingPointError, match=match):
        fit(**{**call, "loader": call["loader"] * 2, "checkpoint": file})
    assert not file.exists()  # a checkpoint never holds what is not finite


def test_a_last_step_that_was_too_long_is_found_after_the_epoch(tmp_path):
    call = regression()
    file = tmp_path / "run.pt"

    def stretch(state):
        state.optimizer.param_groups[0]["lr"] = math.inf

    call.update(loader=call["loader"][:1], checkpoint=file, callbacks=[stretch])
    match = r"after epoch 1; got others, of which 'model\.guide\.means\.0\.weight'.*run\.pt' holds"
    with pytest.raises(FloatingPointError, match=match):
        fit(**call)
    saved = checkpoint.load(file)
    assert len(saved["history"]["nll"]) == 1
    assert all(value.isfinite().all() for value in saved["objective"].values())


# Weight decay: whether it is warned of, by what the groups of the optimiser are.


def rest(objective):
    """The deterministic parameters, and the likelihood's."""
    own = {id(p) for p in objective.model.guide.parameters()}
    return [p for p in objective.parameters() if id(p) not in own]


def plain(parameters, decay=0.0):
    return {"params": list(parameters), "weight_decay": decay}


DECAYS = {
    "default of AdamW": (lambda o: o.parameters(), True),
    "none": (lambda o: [plain(o.parameters())], False),
    "of others": (lambda o: [plain(o.model.guide.parameters()), plain(rest(o), 0.1)], False),
    "of the posterior": (lambda o: [plain(o.model.guide.parameters(), 0.1), plain(rest(o))], True),
    "of means": (
        lambda o: [
            plain(o.model.means.parameters(), 1e-6),
            plain([*o.model.logvars.parameters(), *rest(o)]),
        ],
        True,
    ),
}


@pytest.mark.parametrize("leaves", ["flat", "named"])
@pytest.mark.parametrize(("groups", "warns"), DECAYS.values(), ids=DECAYS)
def test_weight_decay_of_the_posterior_is_warned_of(groups, warns, leaves):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    bnn = BayesianModel(net, init_logvar=-5.0, exclude_params="1.", leaves=leaves)
    objective = ELBO(bnn, likelihoods.Gaussian(1.0, learn=True), N)
    optimizer = torch.optim.AdamW(groups(objective), lr=0.05)
    batches = [(torch.randn(4, 3), torch.randn(4, 1))]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(objective, batches, 2, optimizer=optimizer, progress=False)
    texts = [str(w.message) for w in record if "weight_decay=0" in str(w.message)]
    assert len(texts) == warns
    assert not any("log_scale" in text or "base" in text for text in texts)


@pytest.mark.filterwarnings("ignore:After 1 epochs")
def test_asgd_has_a_decay_of_its_own():
    objective = ELBO(BayesianModel(nn.Linear(3, 1)), likelihoods.Gaussian(1.0), N)
    optimizer = torch.optim.ASGD(objective.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match=r"0\.0001 for .* lambd=0 to ASGD"):
        fit(objective, [(torch.randn(4, 3), torch.randn(4, 1))], 1, optimizer=optimizer)
