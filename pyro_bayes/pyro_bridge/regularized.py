"""The calls that compare a posterior with its prior, or make it one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count
from pyro_bayes.priors.choice import PriorLike, PriorVar, check_kind, choose_priors, prior_of
from pyro_bayes.priors.gaussian import FormerPosterior, Gaussian
from pyro_bayes.priors.hierarchical import HierarchicalPrior
from pyro_bayes.priors.parameter import ParameterPrior
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge.held import HeldModule
from pyro_bayes.pyro_bridge.prior import replace_prior
from pyro_bayes.pyro_bridge.prior_site import Prior


class RegularizedModule(HeldModule):
    """A base, its prior and its guide, with the divergence between the two."""

    def kl_divergence(
        self,
        prior_var: PriorVar | None = None,
        *,
        prior: PriorLike | None = None,
        num_samples: int = 1,
    ) -> Tensor:
        r"""Computes the KL divergence between the posterior and the prior.

        For Gaussian priors, and others that PyTorch or Pyro know it for, it is in closed form:

        .. math:: D_{KL}(q(\theta) \,\|\, p(\theta)) = \frac{1}{2} \sum_i \left[
                  \frac{\sigma_i^2 + (\mu_i - \mu_{p,i})^2}{\sigma_p^2} - 1
                  - \log \frac{\sigma_i^2}{\sigma_p^2} \right]

        For any other prior, it is :math:`-H[q] - \mathbb{E}_q[\log p(\theta)]`, where the entropy
        is exact and the expectation a mean over draws of its own. :meth:`summary` tells which.

        It is a sum over all included parameters, to be added to the negative log-likelihood of a
        whole dataset of N points, or divided by N and added to the mean over points. N is the size
        of the dataset also with minibatches. Elements that carry no information are left out:
        padding rows of embeddings, and what :mod:`torch.nn.utils.prune` has masked.

        Arguments:
            prior_var: The variance :math:`\sigma_p^2` of another prior, as in the model.
            prior: Another prior, as in the model. By default, the prior is the model's.
            num_samples: The number of draws where it is estimated.

        Returns:
            The divergence in nats, a 0-dim tensor.

        Raises:
            ValueError: If `prior_var` or `prior` is none of these, as a number that is not
                positive; or `num_samples` is less than 1.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn = BayesianModel(torch.nn.Linear(3, 1), init_logvar=0.0)
            >>> with torch.no_grad():
            ...     _ = [mean.zero_() for mean in bnn.means.parameters()]
            >>> bnn.kl_divergence()
            tensor(0., grad_fn=<...>)
        """
        check_count("num_samples", num_samples)
        return self._priors(prior_var, prior).kl_divergence(self._flats(), int(num_samples))

    def kl_divergences(
        self,
        prior_var: PriorVar | None = None,
        *,
        prior: PriorLike | None = None,
        num_samples: int = 1,
    ) -> dict[str, Tensor]:
        """Computes the KL divergence of each parameter, whose sum is :meth:`kl_divergence`.

        Arguments:
            prior_var: The variance of another prior, as in :meth:`kl_divergence`.
            prior: Another prior, likewise.
            num_samples: The number of draws where it is estimated.

        Returns:
            The divergences in nats by the names of parameters.

        Raises:
            ValueError: As in :meth:`kl_divergence`.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> list(BayesianModel(torch.nn.Linear(3, 1)).kl_divergences())
            ['weight', 'bias']
        """
        check_count("num_samples", num_samples)
        return self._priors(prior_var, prior).kl_divergences(self._flats(), int(num_samples))

    def _priors(self, prior_var: PriorVar | None, prior: PriorLike | None) -> Priors:
        if prior_var is None and prior is None:
            return self._guide.priors
        self._keep_tied()
        means = {name: mean for name, (mean, _) in self._guide.posterior().items()}
        priors = choose_priors(prior, prior_var, self.choices, means)
        if any(isinstance(rule, HierarchicalPrior) for rule in priors.rules.values()):
            raise ValueError(
                "Expected a prior without parameters of its own; got a Hierarchical one, whose"
                " deviations are learned with the model. Give it to BayesianModel(…, prior=…)."
            )
        priors.follow(self._guide.posterior, self._guide.priors.fixed)
        return priors

    def sample_prior(self) -> dict[str, Tensor]:
        """Returns model parameters sampled from the prior.

        Returns:
            The draws by parameter name, of the parameters' shapes and dtypes, without gradients.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn = BayesianModel(torch.nn.Linear(3, 1))
            >>> {name: tuple(draw.shape) for name, draw in bnn.sample_prior().items()}
            {'weight': (1, 3), 'bias': (1,)}
        """
        self._keep_tied()
        priors, posterior = self._guide.priors, self._guide.posterior()
        with torch.no_grad():
            draws = {n: Prior(priors, n, mean).sample() for n, (mean, _) in posterior.items()}
        return dict(self.as_held(draws))

    def as_prior(self, new: Any = None) -> FormerPosterior:
        """Returns the present posterior as the prior of another model.

        It is a copy, which belongs to parameters by their dotted names. The other model's posterior
        starts at its own base, as always. To start at this one's,
        `bnn.guide.load_state_dict(former.guide.state_dict())`.

        Arguments:
            new: The prior of parameters that this model does not have, as a new head: whatever
                `prior=` takes but a mapping. By default, a standard normal distribution.

        Returns:
            What to give as `prior=` to a :class:`pyro_bayes.BayesianModel`, also in a mapping.

        Raises:
            TypeError: If `new` is not a prior of one parameter.

        References:
            | Variational Continual Learning (Nguyen et al., 2018)
            | https://arxiv.org/abs/1710.10628

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> former = BayesianModel(torch.nn.Linear(3, 1))
            >>> bnn = BayesianModel(torch.nn.Linear(3, 1), prior=former.as_prior())
            >>> _ = bnn.guide.load_state_dict(former.guide.state_dict())
            >>> abs(bnn.kl_divergence().item()) < 1e-6
            True
        """
        self._keep_tied()
        new = Gaussian() if new is None else new
        check_kind("new", new)

        def others(name: str, parameter: Tensor) -> ParameterPrior:
            return prior_of(name, parameter, new)

        pairs = self._guide.posterior()
        # A model that ties no parameters, or in another order, has them under their other names.
        tied = {n: pairs[c.name] for c in self.choices if c.included for n in c.aliases}
        return FormerPosterior({**tied, **pairs}, others)

    @torch.no_grad()
    def update_prior(self) -> None:
        r"""Makes the present posterior the prior of what comes next.

        .. math:: p(\theta) \leftarrow q(\theta)

        Call it after training on some data and before training on the next: the divergence then
        keeps what was learned, as Bayes' rule does. `num_data` is the number of new data. The
        posterior stays what it is. The new prior is part of the model's state dict.

        Warning:
            What has no posterior is not kept: deterministic parameters, buffers and what the
            likelihood learns. The deviations of a hierarchical prior end here.

        References:
            | Variational Continual Learning (Nguyen et al., 2018)
            | https://arxiv.org/abs/1710.10628

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn = BayesianModel(torch.nn.Linear(3, 1))
            >>> bnn.update_prior()
            >>> abs(bnn.kl_divergence().item()) < 1e-6
            True
        """
        self._check_closed()
        former = self.as_prior()
        posterior = self._guide.posterior()
        new = {name: former.of(name, mean) for name, (mean, _) in posterior.items()}
        for name, rule in new.items():
            replace_prior(self._prior, name, rule)
        for name in [*self._guide.scale_sites.values()]:
            self._guide.drop_scales(name)
