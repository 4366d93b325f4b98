"""What a prior knows helps: fine-tuning of a trained network, and one task after another."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pyro_bayes import ELBO, BayesianModel, likelihoods, priors

pytest.importorskip("sklearn")
from scipy.ndimage import rotate
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def digits():
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    return images.float() / 16, labels


def build(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def optimize(loss, parameters, data, steps, lr):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randperm(len(data[1]))[:100]
        optimizer.zero_grad()
        loss(*(tensor[batch] for tensor in data)).backward()
        optimizer.step()
        scheduler.step()


def train(bnn, data, steps, lr):
    objective = ELBO(bnn, likelihoods.Categorical(), num_data=len(data[1]), local_trick=True)
    optimize(lambda x, y: objective(x, y), objective.parameters(), data, steps, lr)


@pytest.mark.parametrize("seed", range(2))
def test_few_data_are_learned_best_from_where_training_ended(digits, seed):
    torch.manual_seed(seed)
    images, labels = digits
    turned = rotate(images.view(-1, 8, 8).numpy(), 15, (1, 2), reshape=False, order=1)
    turned = torch.as_tensor(turned).flatten(1)
    old, new, test = torch.randperm(len(labels)).split([600, 30, 1167])
    net = build(32)
    optimize(
        lambda x, y: cross_entropy(net(x), y),
        net.parameters(), (images[old], labels[old]), 150, 0.01,
    )  # fmt: skip
    losses = {}
    for mean in ("base", 0.0):
        for var in (0.03, 30.0):
            prior = priors.Gaussian(var, mean)
            bnn = BayesianModel(copy.deepcopy(net), init_logvar=-6.0, prior=prior)
            train(bnn, (turned[new], labels[new]), 120, 0.1)
            predictive = likelihoods.Categorical().predictive(bnn, turned[test], 20)
            losses[mean, var] = -predictive.log_prob(labels[test]).mean().item()
    best = {mean: min(loss for (m, _), loss in losses.items() if m == mean) for mean in ("base", 0)}
    assert best["base"] < best[0] - 0.2
    assert best["base"] == losses["base", 0.03]


def test_the_former_posterior_as_prior_keeps_the_former_task(digits):
    images, labels = digits
    train_on, test = torch.randperm(len(labels)).split([1000, 797])
    order = torch.randperm(64)
    updated = BayesianModel(build(100), init_logvar=-6.0)
    train(updated, (images[train_on], labels[train_on]), 200, 0.03)
    kept = copy.deepcopy(updated)
    updated.update_prior()
    accuracies = {}
    for name, bnn in {"updated": updated, "kept": kept}.items():
        train(bnn, (images[train_on][:, order], labels[train_on]), 200, 0.03)
        for task, x in {"first": images[test], "second": images[test][:, order]}.items():
            predictive = likelihoods.Categorical().predictive(bnn, x, 20)
            hits = predictive.probs.argmax(-1) == labels[test]
            accuracies[name, task] = hits.float().mean().item()
    assert accuracies["updated", "first"] > accuracies["kept", "first"] + 0.3
    assert accuracies["updated", "second"] > 0.8
