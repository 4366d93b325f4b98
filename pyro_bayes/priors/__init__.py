"""Priors p(θ) of a model's parameters."""

from pyro_bayes.priors.variance import Empirical

__all__ = ["Empirical"]
