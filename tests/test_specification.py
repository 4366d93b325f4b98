"""Every code block of the documented API, as written, with the import changed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bayes import BayesianModel

BLOCKS = {
    "sample_params": """
params = bayesian_model.sample_params()
# params = {'layer1.weight': tensor(...), 'layer1.bias': tensor(...), ...}
""",
    "sample_model": """
sampled = bayesian_model.sample_model()
y = sampled(x)  # Use like any PyTorch model
""",
    "reparameterize": """
with bayesian_model.reparameterize() as model:
    y = model(x)  # Gradients flow to variational parameters
    loss = criterion(y, target)
    loss.backward()
""",
    "kl_divergence": """
kl = bayesian_model.kl_divergence(prior_var=1.0)
""",
    "basic": """
import torch
import torch.nn as nn
from pyro_bayes import BayesianModel

# Create a base neural network
base_net = nn.Sequential(
    nn.Linear(10, 64),
    nn.ReLU(),
    nn.Linear(64, 1)
)

# Wrap with Bayesian inference
bayesian_net = BayesianModel(base_net, init_logvar=-9.0)

# Training loop with ELBO
optimizer = torch.optim.Adam(bayesian_net.parameters(), lr=1e-3)

for x, y in dataloader:
    optimizer.zero_grad()

    # Reparameterize for one forward pass
    with bayesian_net.reparameterize() as model:
        pred = model(x)
        nll = nn.functional.mse_loss(pred, y)

    # ELBO = negative log-likelihood + KL divergence
    kl = bayesian_net.kl_divergence() / len(dataset)
    loss = nll + kl

    loss.backward()
    optimizer.step()
""",
    "ensemble": """
# Ensemble predictions via multiple samples
num_samples = 10
predictions = []

for _ in range(num_samples):
    with torch.no_grad(), bayesian_net.reparameterize() as model:
        pred = model(x)
        predictions.append(pred)

# Compute mean and uncertainty
mean_pred = torch.stack(predictions).mean(dim=0)
std_pred = torch.stack(predictions).std(dim=0)

print(f"Prediction: {mean_pred} ± {std_pred}")
""",
    "selective": """
# Only infer over final layer parameters
bayesian_net = BayesianModel(
    base_net,
    include_params=["2.*"],  # Only layer 2 parameters
    exclude_params=[]
)

# Or exclude specific parameters
bayesian_net = BayesianModel(
    base_net,
    include_params=[""],  # All parameters
    exclude_params=["*.bias"]  # Except biases
)
""",
    "local trick": """
# Use local trick for lower variance gradients
for x, y in dataloader:
    optimizer.zero_grad()

    with bayesian_net.reparameterize(local_trick=True) as model:
        pred = model(x)
        nll = nn.functional.mse_loss(pred, y)

    kl = bayesian_net.kl_divergence() / len(dataset)
    loss = nll + kl

    loss.backward()
    optimizer.step()
""",
    "flow": """
from zuko.flows import NSF
from pyro_bayes import BayesianModel

# Create a normalizing flow
base_flow = NSF(features=2, context=3, transforms=5)

# Wrap with Bayesian inference
bayesian_flow = BayesianModel(base_flow, init_logvar=-9.0)

# Training with context
for x, c in dataloader:
    optimizer.zero_grad()

    with bayesian_flow.reparameterize() as flow:
        # Get conditional distribution
        dist = flow(c)
        nll = -dist.log_prob(x).mean()

    kl = bayesian_flow.kl_divergence() / len(dataset)
    loss = nll + kl

    loss.backward()
    optimizer.step()

# Sample multiple flow instances for uncertainty
sampled_flows = [bayesian_flow.sample_model() for _ in range(10)]
""",
    "patterns": """
# Complex model with selective inference
model = nn.ModuleDict({
    'encoder': nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32)),
    'decoder': nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
})

# Only infer over encoder weights, not biases
bayesian_model = BayesianModel(
    model,
    include_params=["encoder.**"],
    exclude_params=["encoder.*.bias"]
)
""",
}


def regression():
    return TensorDataset(torch.randn(96, 10), torch.randn(96, 1))


def conditional():
    return TensorDataset(torch.randn(96, 2), torch.randn(96, 3))


@pytest.fixture
def names(request):
    """What the blocks of the documentation take for granted."""
    base_net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    bayesian_net = BayesianModel(base_net)
    dataset = conditional() if request.param == "flow" else regression()
    x, target = dataset[:32]
    return {
        "torch": torch,
        "nn": nn,
        "BayesianModel": BayesianModel,
        "base_net": base_net,
        "bayesian_net": bayesian_net,
        "bayesian_model": bayesian_net,
        "optimizer": torch.optim.Adam(bayesian_net.parameters(), lr=1e-3),
        "criterion": nn.MSELoss(),
        "dataset": dataset,
        "dataloader": DataLoader(dataset, batch_size=32),
        "x": x,
        "target": target,
    }


@pytest.mark.parametrize(("names", "block"), BLOCKS.items(), ids=BLOCKS, indirect=["names"])
def test_blocks_run(names, block):
    before = [p.clone() for p in names["bayesian_net"].parameters()]
    exec(block, names)
    after = list(names["bayesian_net"].parameters())
    if "optimizer.step" in block and "bayesian_flow" not in block:
        pairs = zip(before, after, strict=True)
        assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def test_values_of_the_blocks():
    bayesian_net = BayesianModel(nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1)))
    scope = {"bayesian_model": bayesian_net, "bayesian_net": bayesian_net, "torch": torch}
    scope["x"] = torch.randn(32, 10)
    exec(BLOCKS["sample_params"] + BLOCKS["kl_divergence"] + BLOCKS["sample_model"], scope)
    exec(BLOCKS["ensemble"], scope)
    assert list(scope["params"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert scope["kl"].shape == ()
    assert scope["mean_pred"].shape == scope["std_pred"].shape == (32, 1)
    assert (scope["std_pred"] > 0).all()


def test_selection_of_the_blocks():
    scope = {"BayesianModel": BayesianModel, "nn": nn}
    scope["base_net"] = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    last, biases = BLOCKS["selective"].split("# Or exclude")
    exec(last, scope)
    assert list(scope["bayesian_net"].sample_params()) == ["2.weight", "2.bias"]
    exec("# Or exclude" + biases, scope)
    assert list(scope["bayesian_net"].sample_params()) == ["0.weight", "2.weight"]
    exec(BLOCKS["patterns"], scope)
    names = list(scope["bayesian_model"].sample_params())
    assert names == ["encoder.0.weight", "encoder.2.weight"]
