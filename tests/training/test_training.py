"""Real networks, trained by as many steps with local noise and with one draw of weights."""

import pytest
import torch
import torch.nn.functional as F
import zuko
from sklearn.datasets import load_digits, make_moons
from torch import nn

from pyro_bayes import BayesianModel

TOKENS, LENGTH = 8, 6


class Transformer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.encoder = nn.TransformerEncoderLayer(width, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, x):
        return self.head(self.encoder(self.tokens(x) + self.positions)[:, 0])


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def flow():
    return zuko.flows.NSF(2, transforms=1, hidden_features=(32, 32))


def sequences():
    """Sequences of tokens, and the largest token of each."""
    x = torch.randint(TOKENS, (4096, LENGTH))
    return x, x.amax(1)


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)


def moons():
    x, _ = make_moons(8192, noise=0.1, random_state=torch.initial_seed())
    return (torch.tensor(x).float(),)


def cross_entropy(net, x, y):
    return F.cross_entropy(net(x), y)


def negative_log_density(flow, x):
    return -flow().log_prob(x).mean()


# The last columns: the number of steps, and the mean log-density of the data under what is best
# without a network, which is the frequencies of the labels, or a Gaussian.
CASES = {
    "transformer": (Transformer, sequences, cross_entropy, 60, -1.13),
    "convolutional net": (convolutional, digits, cross_entropy, 60, -2.30),
    "flow": (flow, moons, negative_log_density, 120, -1.91),
}


def train(make, load, loss, steps, seed, local_trick, batch=128):
    """Returns a trained model and its data; networks, data and batches depend on the seed alone."""
    torch.manual_seed(seed)
    data = load()
    bnn = BayesianModel(make(), init_logvar=-5.0, prior_var=0.1)
    optimizer = torch.optim.Adam(bnn.parameters(), lr=1e-2)
    for i in torch.randint(len(data[0]), (steps, batch)):
        optimizer.zero_grad()
        with bnn.reparameterize(local_trick) as model:
            nll = loss(model, *(d[i] for d in data))
        (nll + bnn.kl_divergence() / len(data[0])).backward()
        optimizer.step()
    return bnn, data


@torch.no_grad()
def elbo(bnn, data, loss, draws=4):
    """Returns the ELBO per datum, over the same data and draws of the weights for all models."""
    torch.manual_seed(0)
    part = [d[:2048] for d in data]
    losses = []
    for _ in range(draws):
        with bnn.reparameterize() as model:
            losses.append(loss(model, *part))
    return -torch.stack(losses).mean() - bnn.kl_divergence() / len(data[0])


@pytest.mark.parametrize("case", CASES)
def test_local_noise_reaches_a_better_elbo_in_as_many_steps(case):
    *task, without_network = CASES[case]
    local, weights = (
        torch.stack([elbo(*train(*task, seed, trick), task[2]) for seed in range(5)])
        for trick in (True, False)
    )
    gain = local - weights
    assert (gain > 0).sum() >= 4
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5
    assert local.mean() > without_network
