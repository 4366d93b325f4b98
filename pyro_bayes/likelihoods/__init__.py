"""Likelihoods: what a network's output says about a target.

Each likelihood turns an output into a distribution with one entry per example, and never reduces
over examples. `REGISTRY` names them all.
"""

from pyro_bayes.likelihoods.categorical import Categorical
from pyro_bayes.likelihoods.gaussian import Gaussian
from pyro_bayes.likelihoods.likelihood import Likelihood

REGISTRY: dict[str, type[Likelihood]] = {
    likelihood.__name__: likelihood for likelihood in (Gaussian, Categorical)
}

__all__ = ["REGISTRY", "Categorical", "Gaussian", "Likelihood"]
