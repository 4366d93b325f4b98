"""Priors p(θ) of a model's parameters."""

from pyro_bayes.priors.empirical import Empirical
from pyro_bayes.priors.gaussian import Gaussian, fan_in, glorot, he, radford
from pyro_bayes.priors.hierarchical import Hierarchical, Horseshoe
from pyro_bayes.priors.scale_mixture import ScaleMixture

__all__ = [
    "Empirical",
    "Gaussian",
    "Hierarchical",
    "Horseshoe",
    "ScaleMixture",
    "fan_in",
    "glorot",
    "he",
    "radford",
]
