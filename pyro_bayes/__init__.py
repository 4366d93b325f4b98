r"""Any PyTorch network, made Bayesian.

The parameters of a network are random variables. :class:`BayesianModel` puts a Gaussian prior and
a mean-field Gaussian posterior over those that glob patterns select,

.. math:: p(\theta) = \prod_i \mathcal{N}(\theta_i \mid 0, \sigma_p^2), \qquad
          q(\theta) = \prod_i \mathcal{N}(\theta_i \mid \mu_i, \sigma_i^2),

and trains it through Pyro's SVI or a plain PyTorch loop, on the same :class:`torch.nn.Parameter`
objects, while the network keeps its class and structure.
"""

import pyro_bayes.noise  # noqa: F401  (fills the registry)
from pyro_bayes import likelihoods
from pyro_bayes.evaluation import evaluate
from pyro_bayes.model import BayesianModel
from pyro_bayes.training import fit
from pyro_bayes.training.objective import ELBO
from pyro_bayes.training.svi_model import svi_model

__all__ = ["ELBO", "BayesianModel", "evaluate", "fit", "likelihoods", "svi_model"]

__version__ = "0.1.0"
