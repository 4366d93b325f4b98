"""Likelihoods: what a network's output says about a target.

Each makes one distribution per example of an output, and never reduces over examples.

================================  ====================================  =========================
likelihood                        target                                output
================================  ====================================  =========================
:class:`Gaussian`                 real numbers, noise of one scale      the mean
:class:`HeteroscedasticGaussian`  real numbers, noise by input          mean and scale
:class:`StudentT`                 real numbers with outliers            the location
:class:`Bernoulli`                0 or 1                                the logit
:class:`Categorical`              one of several classes                the logits
:class:`Poisson`                  counts                                the logarithm of the rate
:class:`NegativeBinomial`         counts with overdispersion            the logarithm of the mean
:class:`Density`                  whatever a flow gives the density of  the distribution
================================  ====================================  =========================

`REGISTRY` has them by name, and :class:`Likelihood` says how to write one.
"""

from pyro_bayes.likelihoods.bernoulli import Bernoulli
from pyro_bayes.likelihoods.categorical import Categorical
from pyro_bayes.likelihoods.density import Density
from pyro_bayes.likelihoods.gaussian import Gaussian
from pyro_bayes.likelihoods.heteroscedastic_gaussian import HeteroscedasticGaussian
from pyro_bayes.likelihoods.likelihood import Likelihood
from pyro_bayes.likelihoods.negative_binomial import NegativeBinomial
from pyro_bayes.likelihoods.poisson import Poisson
from pyro_bayes.likelihoods.student_t import StudentT

REGISTRY: dict[str, type[Likelihood]] = {
    kind.__name__: kind
    for kind in (
        Gaussian,
        HeteroscedasticGaussian,
        StudentT,
        Bernoulli,
        Categorical,
        Poisson,
        NegativeBinomial,
        Density,
    )
}
"""All likelihoods by the names of their classes."""

__all__ = [
    "REGISTRY",
    "Bernoulli",
    "Categorical",
    "Density",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
]
