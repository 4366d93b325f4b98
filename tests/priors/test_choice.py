"""What may be given as a prior, and what is refused."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform

from pyro_bayes import BayesianModel, priors
from pyro_bayes.priors.distribution import describe

TRANSFORMED = {
    "Gumbel": dist.Gumbel(0.5, 2.0),
    "affine": dist.TransformedDistribution(dist.StudentT(3.0), [AffineTransform(0.5, 2.0)]),
    "inverse": dist.TransformedDistribution(
        dist.Laplace(0.0, 1.0), [AffineTransform(1.0, 2.0).inv]
    ),
}


@pytest.mark.parametrize("distribution", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transformed_distributions(distribution):
    """A transform and its inverse know each other, so that a copy of one has to meet the other."""
    _ = [transform.inv for transform in distribution.transforms]
    bnn = BayesianModel(nn.Linear(3, 2).double(), init_logvar=-30.0, prior=distribution)
    values = [(m, v) for m, v in bnn.guide.posterior().values()]
    entropy = sum((0.5 * (v + torch.tensor(2 * torch.pi).log() + 1)).sum() for _, v in values)
    expected = -entropy - sum(distribution.log_prob(mean).sum() for mean, _ in values)
    for model in (bnn, copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        assert model.kl_divergence().item() == pytest.approx(expected.item(), rel=1e-5)
    draw = bnn.float().sample_prior()["weight"]
    assert (draw.dtype, draw.shape) == (torch.float32, (2, 3))


@pytest.mark.parametrize(
    ("distribution", "description"),
    [
        (dist.Laplace(0.0, torch.tensor([0.5, 2.0])), "Laplace(0, 0.5 to 2)"),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), "Independent(Normal(0, 1))"),
        (
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.ones(2), 1.0)
            ),
            "MixtureSameFamily(Normal(1, 1))",
        ),
    ],
)
def test_description(distribution, description):
    assert describe(distribution) == description


NOT_CHECKED = {"validate_args": False}
BAD = {
    "negative scale": (dist.Normal(0.0, -1.0, **NOT_CHECKED), ValueError, "positive; got -1"),
    "no mean": (dist.Normal(float("nan"), 1.0, **NOT_CHECKED), ValueError, "finite; got nan"),
    "flat": (dist.Normal(0.0, float("inf")), ValueError, "finite; got inf"),
    "too narrow": (dist.Normal(0.0, 1e-25), ValueError, "between 1.2e-38 .* got 1e-50"),
    "periodic": (dist.VonMises(0.0, 1.0), ValueError, "integrates to 1; got VonMises"),
    "improper": (
        dist.ImproperUniform(dist.constraints.real, (), ()),
        ValueError,
        "integrates to 1; got ImproperUniform",
    ),
    "masked": (dist.Normal(0.0, 1.0).mask(False), ValueError, "integrates to 1; got Masked"),
    "not expandable": (dist.SoftAsymmetricLaplace(0.0, 1.0, 2.0), ValueError, "must also define"),
    "one argument": (lambda p: dist.Normal(0.0, 1.0), TypeError, "function of name and parameter"),
    "not called": (priors.fan_in, TypeError, r"got fan_in: .* prior=priors.fan_in\(\)"),
}


@pytest.mark.parametrize("value", [torch.ones(()), dist.Normal(0.0, 1.0), priors.he()])
def test_other_priors_are_no_variances(value):
    with pytest.raises(ValueError, match="Tensors and distributions are given as prior=…"):
        BayesianModel(nn.Linear(3, 2), prior_var=value)


@pytest.mark.parametrize("name", BAD)
def test_bad_priors(name):
    prior, kind, match = BAD[name]
    with pytest.raises(kind, match=match):
        BayesianModel(nn.Linear(3, 2), prior=prior)


@pytest.mark.parametrize(
    "prior",
    [dist.Cauchy(0.0, 1e-6), dist.StudentT(0.1), dist.Laplace(1e6, 1e12), priors.Horseshoe(1e-4)],
)
def test_wide_tails_are_no_flat_priors(prior):
    assert BayesianModel(nn.Linear(3, 2), prior=prior).kl_divergence().isfinite()
