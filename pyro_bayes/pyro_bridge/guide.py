"""The posterior q(θ): a Pyro guide whose learned parameters are μ and log σ²."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean
from torch import Tensor, nn

from pyro_bayes.base.nested import plant
from pyro_bayes.posterior.scores import scored_draws
from pyro_bayes.pyro_bridge import store
from pyro_bayes.pyro_bridge.prior import GaussianPrior, distinct_sites
from pyro_bayes.pyro_bridge.site import Posterior

_constructing = threading.Lock()  # Pyro's handlers are one stack for all threads


class MeanField(AutoNormal):
    r"""A mean-field Gaussian guide over named parameters.

    .. math:: q(\theta) = \prod_i \mathcal{N}(\theta_i \mid \mu_i, \sigma_i^2)

    It differs from its base class in three ways. Its parameters :math:`\mu` and
    :math:`\log \sigma^2` exist from the start. They are what the optimiser and the param store
    see, both unconstrained, under their own names. And each site is a normal distribution itself,
    without an auxiliary site, so that :class:`pyro.infer.TraceMeanField_ELBO` has the KL divergence
    in closed form.

    To store :math:`\sigma` under a constraint :math:`u \mapsto e^{u/2}` instead would cost the
    same (a draw and its gradient took 0.96 to 1.01 of its time, on nets of 4 to 40 parameters) and
    would rename the parameters.

    Attributes:
        means: A module of the means :math:`\mu`, under the parameters' own names.
        logvars: A module of the log-variances :math:`\log \sigma^2`, likewise.
        sites: The parameters' names by the names of their sites.
        store_name: What stands in front of the names in Pyro's param store.

    Arguments:
        prior: The prior over the same parameters.
        parameters: The included parameters by dotted name, the initial means.
        init_logvar: The initial :math:`\log \sigma^2`.
        site_prefix: What stands in front of each site's name.
        store_name: What stands in front of the names in Pyro's param store. A name that is taken
            gets a number.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015)
        | https://arxiv.org/abs/1505.05424

    Example:
        >>> parameters = {"w": nn.Parameter(torch.ones(2))}
        >>> prior = GaussianPrior(parameters, variance=1.0)
        >>> guide = MeanField(prior, parameters, init_logvar=-9.0, store_name="doc")
        >>> guide.median()
        {'w': tensor([1., 1.])}
    """

    means: nn.Module
    logvars: nn.Module

    def __init__(
        self,
        prior: GaussianPrior,
        parameters: Mapping[str, nn.Parameter],
        *,
        init_logvar: float,
        store_name: str,
        site_prefix: str = "",
    ) -> None:
        super().__init__(prior, init_loc_fn=init_to_mean)
        means = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
        logvars = {
            n: nn.Parameter(torch.full_like(p, init_logvar).detach()) for n, p in parameters.items()
        }
        self.means = plant(nn.Module(), means)
        self.logvars = plant(nn.Module(), logvars)
        self.sites = {f"{site_prefix}.{n}" if site_prefix else n: n for n in parameters}
        self._wished_name = store_name
        self.store_name = store.claim(store_name, self)
        self._find_parameters()
        with _constructing:
            self._setup_prototype()
        store.allow_module_local(self)
        self.register_load_state_dict_post_hook(_after_load)

    def posterior(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        r"""Returns :math:`\mu` and :math:`\log \sigma^2` of each parameter by dotted name.

        Values that were loaded into Pyro's param store arrive here first.
        """
        store.pull(self._stored)
        return {name: (m[leaf], v[leaf]) for name, (m, v, leaf) in self._places.items()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Makes one sample statement per site; the arguments of the model are ignored.

        Returns:
            The draw of each site by the name of the site.
        """
        with distinct_sites():
            posterior = {site: self.statements(site) for site in self.sites}
            return {
                site: pyro.sample(site, Posterior(*posterior[site], draw, log_prob))
                for site, (draw, log_prob) in scored_draws(posterior).items()
            }

    def statements(self, site: str) -> tuple[Tensor, Tensor]:
        r"""Makes the `pyro.param` statements of one site.

        Returns:
            :math:`\mu` and :math:`\log \sigma^2`, or what a Pyro handler put in their place.
        """
        parameter = self.sites[site]
        means, logvars, leaf = self._places[parameter]
        mean = store.statement(f"{self.store_name}.means.{parameter}", means[leaf])
        logvar = store.statement(f"{self.store_name}.logvars.{parameter}", logvars[leaf])
        return mean, logvar

    @property
    def locs(self) -> nn.Module:  # type: ignore[override]
        """The means, under the name that the base class gives them."""
        return self._tree("means")

    @property
    def scales(self) -> nn.Module:  # type: ignore[override]
        r"""The deviations :math:`\sigma`, under the name that the base class gives them."""
        logvars = self._tree("logvars").named_parameters()
        return plant(nn.Module(), {name: (0.5 * value).exp() for name, value in logvars})

    def _tree(self, name: str) -> nn.Module:
        # Reading a plain module as an attribute would make Pyro's `module` statement.
        return self._modules[name]  # type: ignore[return-value]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # The prior is all that the prototype runs: running the base would change the statistics of
        # its batch norms. The grandparent's set-up records the sites; the parent's would
        # add parameters of its own.
        super(AutoNormal, self)._setup_prototype()

    def _get_loc_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        mean, logvar = self.statements(name)
        return mean, (0.5 * logvar).exp()

    def _find_parameters(self) -> None:
        # The dictionaries are kept, not the parameters, which functional calls may swap.
        self._places: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {}
        for name in self.sites.values():
            path, _, leaf = name.rpartition(".")
            means, logvars = (self._tree(k).get_submodule(path) for k in ("means", "logvars"))
            self._places[name] = means._parameters, logvars._parameters, leaf

    def _stored(self) -> dict[str, nn.Parameter]:
        stored = {}
        for name, (means, logvars, leaf) in self._places.items():
            stored[f"{self.store_name}.means.{name}"] = means[leaf]
            stored[f"{self.store_name}.logvars.{name}"] = logvars[leaf]
        return stored

    def __getstate__(self) -> dict[str, Any]:
        # The base class takes the model and the master away from the original when it is copied.
        model, master = self._model, self.master
        try:
            return dict(super().__getstate__(), _model=model)
        finally:
            self._model, self.master = model, master

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.store_name = store.claim(self._wished_name, self)
        self._find_parameters()


def _after_load(guide: MeanField, _: Any) -> None:
    store.replace(guide._stored())
