"""Elements without a label count for nothing, and examples count as before."""

import copy
import pickle

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Predictive, Trace_ELBO
from torch import nn

from pyro_bayes import ELBO, BayesianModel, evaluate, fit, svi_model
from pyro_bayes.likelihoods import Categorical

B, T, C = 12, 5, 4


def tokens(ignored):
    """Logits, and labels of which some are missing; all of the first two examples."""
    logits, y = torch.randn(B, T, C), torch.randint(1, C, (B, T))
    y[torch.rand(B, T) < 0.4] = ignored
    y[:2] = ignored
    y[2:, 0] = 1
    return logits, y


@pytest.mark.parametrize("ignored", [-100, 0, 255])
def test_log_prob_is_that_of_torch(ignored):
    logits, y = tokens(ignored)
    logits.requires_grad_()
    for own, labels in ((logits, y), (logits[:, 0], y[:, 0])):
        loss = F.cross_entropy(
            own.flatten(0, -2), labels.flatten(), ignore_index=ignored, reduction="none"
        )
        log_prob = Categorical(ignore_index=ignored).log_prob(own, labels)
        torch.testing.assert_close(log_prob, -loss.view(B, -1).sum(1))
        (grad,) = torch.autograd.grad(log_prob.sum(), logits)
        assert not grad.view(B, T, C)[y == ignored].any()
    probs = F.softmax(logits, -1)
    predictive = Categorical(ignore_index=ignored).distribution(logits[None], batch_dims=2)
    torch.testing.assert_close(predictive.base_dist.probs[0], probs)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, C)

    def forward(self, x):
        return self.linear(x)


def test_objectives_count_examples():
    _, y = tokens(-100)
    x, likelihood = torch.randn(B, T, 3), Categorical(ignore_index=-100)
    bnn = BayesianModel(Tagger(), init_logvar=-80.0)
    objective = ELBO(bnn, likelihood, num_data=B)
    nll = objective.terms(x, y).nll
    summed = F.cross_entropy(bnn.base(x).flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(nll * B, summed)
    # The mean over minibatches of any size is that of all, and one without labels has the prior.
    parts = [objective.terms(x[i], y[i]) for i in torch.arange(B).split(3)]
    torch.testing.assert_close(torch.stack([part.nll for part in parts]).mean(), nll)
    assert objective.terms(x[:2], y[:2]).nll == 0
    objective(x[:2], y[:2]).backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    model = svi_model(bnn, likelihood, num_data=B)
    for batch in (slice(None), slice(1, 4)):
        loss = Trace_ELBO().loss(model, bnn.exact_kl(), x[batch], y[batch])
        assert loss == pytest.approx(B * objective(x[batch], y[batch]).item(), rel=1e-5)
    drawn = Predictive(model, guide=bnn.guide, num_samples=3, parallel=True)(x)["y"]
    assert drawn.shape[-2:] == (B, T)
    assert (drawn >= 0).all()


def test_site_is_expanded():
    likelihood = Categorical(ignore_index=-1)
    labels = likelihood.distribution(torch.zeros(1, C)).expand([3])
    y = torch.tensor([0, -1, 2])
    assert labels.log_prob(y)[1] == 0
    assert copy.deepcopy(labels).log_prob(y)[1] == 0
    with pyro.plate("data", 3):
        value = likelihood.sample("y", torch.zeros(3, C), y)
    assert torch.equal(value, y)


def test_scores_are_those_of_the_labelled():
    _, y = tokens(-100)
    x, likelihood = torch.randn(B, T, 3), Categorical(ignore_index=-100)
    bnn = BayesianModel(Tagger(), init_logvar=-2.0)

    def scores(own, x, y):
        generator = torch.Generator().manual_seed(0)
        return evaluate(bnn, own, [(x[:7], y[:7]), (x[7:], y[7:])], 20, generator=generator)

    # Examples of one element: as if the others were not there, with both errors.
    found = scores(likelihood, x[:, 1], y[:, 1])
    there = (y[:, 1] != -100).nonzero()[:, 0]
    part = evaluate(
        bnn, Categorical(), [(x[there, 1], y[there, 1])], 20,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.num_examples == len(there)
    for row, other in zip(found.rows, part.rows, strict=True):
        assert (row.value, row.standard_error) == pytest.approx(
            (other.value, other.standard_error), rel=1e-4
        )
    # Several elements: the labelled ones of all examples; an example's density is the sum.
    found, examples = scores(likelihood, x, y), y[2:]
    assert found.num_examples == B - 2
    there = examples != -100
    assert torch.equal(found.examples["labelled"], there)
    generator = torch.Generator().manual_seed(0)
    predictive = likelihood.predictive(bnn, x, 20, generator=generator)
    assert found["nll"] == pytest.approx(-predictive.log_prob(y)[2:].mean().item(), rel=0.1)
    right = found.examples["predicted"] == examples
    assert found["accuracy"] == pytest.approx(right[there].double().mean().item())
    brier = found.examples["brier"]
    assert brier[~there].isnan().all()
    assert found["brier"] == pytest.approx(brier[there].mean().item())
    confident = found.examples["confidence"][there].mean() - right[there].double().mean()
    assert abs(confident) <= found["ece"] + 1e-6
    with pytest.raises(ValueError, match="at least 2 examples with a label; got 0"):
        evaluate(bnn, likelihood, [(x[:2], y[:2])], 5)


@pytest.mark.parametrize("ignored", [-100, 255])
def test_a_label_that_may_stand_for_none_is_refused_with_the_way(ignored):
    _, y = tokens(ignored)
    x, batches = torch.randn(B, T, 3), []
    objective = ELBO(BayesianModel(Tagger()), Categorical(), num_data=B)
    optimizer = torch.optim.Adam(objective.parameters())
    y = torch.cat([torch.zeros_like(y), y])[6:18]  # found before the first step
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    match = rf"got {ignored} at index .*Categorical\(ignore_index={ignored}\)"
    with pytest.raises(ValueError, match=match):
        fit(objective, batches, 1, optimizer=optimizer, progress=False)
    likelihood = Categorical(ignore_index=ignored)
    objective = ELBO(BayesianModel(Tagger(), init_logvar=-5.0), likelihood, num_data=B)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    history = fit(objective, batches, 5, optimizer=optimizer, validation=batches, progress=False)
    assert history.loss[-1] < history.loss[0]
    with pytest.raises(ValueError, match=rf"0 to 3, or {ignored} for none; got 4"):
        likelihood.log_prob(torch.zeros(2, C), torch.tensor([4, ignored]))


def test_arguments():
    with pytest.raises(ValueError, match=r"no class weights; got some\. .*predictive\.probs"):
        Categorical(weight=torch.ones(C))
    for wrong in (True, -100.0, "-100"):
        with pytest.raises(TypeError, match="ignore_index to be the integer"):
            Categorical(ignore_index=wrong)
    assert repr(pickle.loads(pickle.dumps(Categorical(ignore_index=-1)))) == (
        "Categorical(ignore_index=-1)"
    )
