"""The posterior q(θ): a Pyro guide whose learned parameters are μ and log σ²."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean
from torch import Tensor, nn

from pyro_bayes.base import ownership
from pyro_bayes.base.fixed import FixedElements
from pyro_bayes.base.mutex import Mutex
from pyro_bayes.base.nested import plant
from pyro_bayes.posterior.draws import draw
from pyro_bayes.posterior.layout import Flat
from pyro_bayes.posterior.memory import Leaves, Memory
from pyro_bayes.posterior.rounding import keeping_precision, wide
from pyro_bayes.priors.parameter import NormalPrior
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge import store
from pyro_bayes.pyro_bridge.joint import Joint
from pyro_bayes.pyro_bridge.prior import PriorModule, distinct_sites, scale_site
from pyro_bayes.pyro_bridge.scales import PriorScales
from pyro_bayes.pyro_bridge.site import Posterior

if TYPE_CHECKING:
    from typing_extensions import Self

_constructing = Mutex("Pyro's handlers")  # Pyro's handlers are one stack for all threads


class MeanField(AutoNormal):
    r"""A mean-field Gaussian guide over named parameters.

    .. math:: q(\theta) = \prod_i \mathcal{N}(\theta_i \mid \mu_i, \sigma_i^2)

    It differs from its base class in three ways. Its parameters :math:`\mu` and
    :math:`\log \sigma^2` exist from the start. They are what the optimiser and the param store
    see, both unconstrained, under their own names. And each site is a normal distribution itself,
    without an auxiliary site, so that :class:`pyro.infer.TraceMeanField_ELBO` has the KL divergence
    in closed form.

    Attributes:
        memory: Where :math:`\mu` and :math:`\log \sigma^2` are, with modules of them under the
            parameters' own names.
        sites: The parameters' names by the names of their sites.
        priors: The prior of each parameter.
        prior_scales: The posterior of the deviations of hierarchical priors.
        scale_sites: The parameters' names by the names of the sites of these.
        store_name: What stands in front of the names in Pyro's param store.

    Arguments:
        prior: The prior over the same parameters, a Pyro module.
        priors: The prior of each.
        parameters: The included parameters by dotted name, the initial means.
        init_logvar: The initial :math:`\log \sigma^2`.
        site_prefix: What stands in front of each site's name.
        store_name: What stands in front of the names in Pyro's param store. A name that is taken
            gets a number.
        leaves: Whether the learned parameters are `"flat"`, two for all, or `"named"`.
        fixed: Which elements carry no information, and are not random.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015)
        | https://arxiv.org/abs/1505.05424

    Example:
        >>> parameters = {"w": nn.Parameter(torch.ones(2))}
        >>> prior = PriorModule(parameters)
        >>> guide = MeanField(prior, parameters, init_logvar=-9.0, store_name="doc")
        >>> guide.median()
        {'w': tensor([1., 1.])}
    """

    def __init__(
        self,
        prior: PriorModule,
        parameters: Mapping[str, nn.Parameter],
        *,
        priors: Priors | None = None,
        init_logvar: float,
        store_name: str,
        site_prefix: str = "",
        leaves: Leaves = "flat",
        fixed: FixedElements | None = None,
    ) -> None:
        """Makes the guide, whose class describes the arguments."""
        super().__init__(prior, init_loc_fn=init_to_mean)
        for former in ownership.owners(parameters.values()):
            former.memory.show()  # what a base has in lower precision may be of an earlier step
        initial = {
            name: (p.detach(), torch.full_like(p, init_logvar, dtype=wide(p.dtype)))
            for name, p in parameters.items()
        }
        self.memory = Memory(self, initial, leaves, fixed)
        self.priors = priors or Priors(
            {n: NormalPrior(n, p.shape, 1.0) for n, p in parameters.items()}
        )
        self.sites = {f"{site_prefix}.{n}" if site_prefix else n: n for n in parameters}
        self._modules["prior_scales"] = PriorScales(self.priors, parameters)
        hierarchical = self.prior_scales.by_name()
        self.scale_sites = {scale_site(s): n for s, n in self.sites.items() if n in hierarchical}
        if taken := [site for site in self.scale_sites if site in self.sites]:
            raise ValueError(
                "Expected no parameter with the name of the site of another's prior deviation; got"
                f" {taken}. Rename it, or give the other no hierarchical prior."
            )
        self._wished_name = store_name
        self.store_name = store.claim(store_name, self)
        with _constructing.turn():
            self._setup_prototype()
        store.allow_module_local(self)
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def means(self) -> nn.Module:
        r"""A module of the means :math:`\mu` under the parameters' own names."""
        return self.memory.means

    @property
    def logvars(self) -> nn.Module:
        r"""A module of the log-variances :math:`\log \sigma^2`, likewise."""
        return self.memory.logvars

    @property
    def prior_scales(self) -> PriorScales:
        """The posterior of the deviations of hierarchical priors."""
        # Read past PyroModule, which would make a `pyro.module` statement named after the class.
        return self._modules["prior_scales"]  # type: ignore[return-value]

    @property
    def locs(self) -> nn.Module:  # type: ignore[override]
        """The means, under the name that the base class gives them."""
        return self.memory.means

    @property
    def scales(self) -> nn.Module:  # type: ignore[override]
        r"""The deviations :math:`\sigma`, under the name that the base class gives them."""
        pairs = self.memory.by_name()
        return plant(nn.Module(), {name: (0.5 * v).exp() for name, (_, v) in pairs.items()})

    def posterior(self) -> dict[str, tuple[Tensor, Tensor]]:
        r"""Returns :math:`\mu` and :math:`\log \sigma^2` of each parameter by dotted name.

        Values that were loaded into Pyro's param store arrive here first.
        """
        self.pull()
        return self.memory.by_name()

    def flats(self) -> list[Flat]:
        r"""Returns :math:`\mu` and :math:`\log \sigma^2` as flat tensors, by dtype and device.

        Values that were loaded into Pyro's param store arrive here first.
        """
        self.pull()
        return self.memory.flats()

    def pull(self) -> None:
        """Takes over values that were loaded into Pyro's param store, for either kind of leaves.

        Likewise those that were written to a base in lower precision, whose memory is its own.
        """
        self.memory.take()
        if not store.is_empty():
            store.pull(self.stored)
            store.take(self.store_name, self.memory.unlike)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Makes one sample statement per site; the arguments of the model are ignored.

        Returns:
            The draw of each site by the name of the site.
        """
        with distinct_sites():
            posterior = self.statements()
            joint = Joint(posterior)
            draws: dict[str, tuple[Tensor, Tensor]] = {}
            for flat in posterior:
                _, outputs, log_probs = draw(flat, "draws", "log_densities")
                pairs = zip(outputs, log_probs.unbind(), strict=True)  # type: ignore[union-attr]
                draws.update(zip(flat.layout.names, pairs, strict=True))
            return self.sample_sites({n: Posterior(joint, n, *draws[n]) for n in draws})

    def sample_sites(self, posteriors: Mapping[str, Posterior]) -> dict[str, Any]:
        """Makes the sample statements, of deviations of hierarchical priors before the parameters'.

        Arguments:
            posteriors: The distribution of each parameter by dotted name.

        Returns:
            The values by the names of sites.
        """
        values: dict[str, Any] = {}
        for site, name in self.sites.items():
            if scale_site(site) in self.scale_sites:
                fn = self.prior_scales.statement(name, f"{self.store_name}.prior_scales")
                values[scale_site(site)] = pyro.sample(scale_site(site), fn)
            values[site] = pyro.sample(site, posteriors[name])
        return values

    def drop_scales(self, name: str) -> None:
        """Forgets the deviations of a parameter whose prior is another now.

        Arguments:
            name: The dotted name of the parameter.
        """
        self.prior_scales.drop(name)
        self.scale_sites = {site: own for site, own in self.scale_sites.items() if own != name}

    def statements(self) -> list[Flat]:
        r"""Makes the `pyro.param` statements of all leaves.

        Returns:
            :math:`\mu` and :math:`\log \sigma^2`, or what Pyro's handlers put in their place.
        """
        self.pull()
        values = {
            key: store.statement(f"{self.store_name}.{key}", leaf)
            for key, leaf in self.memory.stored().items()
        }
        return self.memory.flats(values)

    def stored(self) -> dict[str, nn.Parameter]:
        """Returns the leaves by their full names in Pyro's param store."""
        own = {f"{self.store_name}.{key}": leaf for key, leaf in self.memory.stored().items()}
        return own | self.prior_scales.stored(f"{self.store_name}.prior_scales")

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # The prior is all that the prototype runs: running the base would change the statistics of
        # its batch norms. The grandparent's set-up records the sites; the parent's would
        # add parameters of its own.
        super(AutoNormal, self)._setup_prototype()

    def _get_loc_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        mean, logvar = self.posterior()[self.sites[name]]
        return mean, (0.5 * logvar).exp()

    # The base class would transform these as if they were coordinates of the sites.

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the medians by the names of the sites, which are the means."""
        scales = self.prior_scales.by_name()
        medians = {site: scales[name][0].exp() for site, name in self.scale_sites.items()}
        return medians | {s: self._get_loc_and_scale(s)[0].clone() for s in self.sites}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns quantiles by the names of the sites.

        Arguments:
            quantiles: The levels, between 0 and 1.
            args: Ignored, like `kwargs`.
            kwargs: Ignored.

        Returns:
            Tensors with a dimension for the levels on their left.
        """

        def quantile(mean: Tensor, scale: Tensor) -> Tensor:
            levels = torch.as_tensor(quantiles, dtype=mean.dtype, device=mean.device)
            steps = torch.special.ndtri(levels.reshape(-1, *[1] * mean.dim())) * scale
            return mean + torch.where(scale > 0, steps, 0.0)

        scales = self.prior_scales.by_name()
        results = {site: quantile(*self._get_loc_and_scale(site)) for site in self.sites}
        for site, name in self.scale_sites.items():
            mean, logvar = scales[name]
            results[site] = quantile(mean, (0.5 * logvar).exp()).exp()
        return results

    # State

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.memory.converted_by(fn)
        super()._apply(keeping_precision(fn), recurse)
        self.memory.refresh()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.memory.take()
        if self.memory.leaves == "named":  # which children save
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        for kind, value in self._named_state().items():
            destination[prefix + kind] = value if keep_vars else value.detach()
        return None

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.memory.take()  # before the means, which have more digits than the base
        arguments = (strict, missing_keys, unexpected_keys, error_msgs)
        if self.memory.leaves == "named":
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
            return
        named = self._named_state()
        loaded = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if strict:
            missing_keys += [prefix + key for key in named if key not in loaded]
            others = (key for key in loaded if not key.startswith("prior_scales."))
            unexpected_keys += [prefix + key for key in others if key not in named]
        for key in named.keys() & loaded.keys():
            if loaded[key].shape != named[key].shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{key}: copying a param with shape"
                    f" {loaded[key].shape} from checkpoint, the shape in current model is"
                    f" {named[key].shape}."
                )
                del loaded[key]
        if local_metadata.get("assign_to_params_buffers", False):
            self.memory.assign(loaded)
            return
        with torch.no_grad():
            for key in named.keys() & loaded.keys():
                named[key].copy_(loaded[key])

    def _named_state(self) -> dict[str, Tensor]:
        trees = {"means": self.memory.means, "logvars": self.memory.logvars}
        return {
            f"{kind}.{name}": value
            for kind, tree in trees.items()
            for name, value in tree.named_parameters()
        }

    def __getstate__(self) -> dict[str, Any]:
        # The base class takes the model and the master away from the original when it is copied.
        self.memory.take()
        model, master = self._model, self.master
        try:
            return dict(super().__getstate__(), _model=model)
        finally:
            self._model, self.master = model, master

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.store_name = store.claim(self._wished_name, self)
        self.memory.refresh()


def _after_load(guide: MeanField, _: Any) -> None:
    guide.memory.refresh()
    store.replace(guide.stored())
