"""The prior p(θ): one Pyro sample site per included parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_bayes.base.nested import plant
from pyro_bayes.posterior.rounding import keeping_precision, wide
from pyro_bayes.priors.hierarchical import HierarchicalPrior
from pyro_bayes.priors.parameter import NormalPrior, ParameterPrior
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge.prior_site import Prior, Run

if TYPE_CHECKING:
    from typing_extensions import Self


class PriorSite:
    """The prior of one parameter, as a Pyro prior function.

    Arguments:
        priors: The priors of all parameters.
        name: The dotted name of the parameter.
        site: The name of the site.
        like: The name of a buffer of the site's module, which shows the dtype and device.
        present: What tells the run of the prior that is under way.
    """

    def __init__(self, priors: Priors, name: str, site: str, like: str, present: Present) -> None:
        self.priors, self.name, self.site, self.like = priors, name, site, like
        self.present = present

    def __call__(self, module: nn.Module) -> Prior:
        like: Any = module._buffers[self.like]  # get_buffer walks through Pyro's attributes
        rule, scale = self.priors.rules[self.name], None
        if isinstance(rule, HierarchicalPrior):
            scale = pyro.sample(scale_site(self.site), rule.scales(like))
        return Prior(self.priors, self.name, like, self.present.run, scale)


def scale_site(site: str) -> str:
    """Returns the name of the site of a prior's random deviations.

    Arguments:
        site: The name of the parameter's site.
    """
    return f"{site}_prior_scale"  # guides such as AutoDelta nest attributes at dots


class Present:
    """The run of a prior that is under way, if any."""

    run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PriorModule(PyroModule):
    r"""Independent priors over named parameters.

    .. math:: p(\theta) = \prod_i p(\theta_i)

    Each site bears the dotted name of its parameter, behind `site_prefix` and a dot if there is
    one. The distributions follow the module's dtype and device, but stay in single precision when
    the module is converted to half. Tensors that are means or variances of Gaussian priors are
    part of its state.

    Arguments:
        parameters: The included parameters by dotted name; only shape, dtype and device are used.
        priors: The prior of each; standard normal by default.
        site_prefix: What stands in front of each site's name.

    Example:
        >>> prior = PriorModule({"w": nn.Parameter(torch.zeros(2))})
        >>> prior()["w"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        priors: Priors | None = None,
        *,
        site_prefix: str = "",
    ) -> None:
        """Makes the prior, whose class describes the arguments."""
        super().__init__(site_prefix)
        # Sites are attributes of this module under any name that a parameter may have. So what else
        # it has bears a mangled name, and buffers and modules a name that no attribute has.
        if priors is None:
            priors = Priors({n: NormalPrior(n, p.shape, 1.0) for n, p in parameters.items()})
        self.__priors, self.__present = priors, Present()
        sites, likes = {}, {}
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            like, site = f"{leaf}:like", f"{site_prefix}.{name}" if site_prefix else name
            sites[name] = PyroSample(PriorSite(priors, name, site, like, self.__present))
            likes[path, like] = parameter.detach().new_zeros((), dtype=wide(parameter.dtype))
        plant(self, sites, node=PyroModule)
        for (path, like), zero in likes.items():
            self.get_submodule(path).register_buffer(like, zero, persistent=False)
        owners = ((name, *name.rpartition(".")[::2]) for name in parameters)
        self.__sites = [(name, self.get_submodule(path), leaf) for name, path, leaf in owners]
        for name, node, leaf in self.__sites:
            nn.Module.add_module(node, f"{leaf}:prior", priors.rules[name])
        self.register_load_state_dict_post_hook(_forget)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(keeping_precision(fn), recurse)
        self.__priors.forget()
        return self

    def forward(self) -> dict[str, Tensor]:
        """Makes the sample statements.

        Returns:
            The value of each site by the name of its parameter.
        """
        run = self.__present.run = Run(self.__priors)
        try:
            run.values = {name: getattr(module, leaf) for name, module, leaf in self.__sites}
        finally:
            self.__present.run = None
        return dict(run.values)


def replace_prior(prior: Any, name: str, rule: ParameterPrior) -> None:
    """Gives a parameter another prior.

    Arguments:
        prior: The priors, a :class:`PriorModule`, whose attributes bear the names of parameters.
        name: The dotted name of the parameter.
        rule: Its prior.
    """
    sites = prior._PriorModule__sites
    node, leaf = next((node, leaf) for own, node, leaf in sites if own == name)
    nn.Module.add_module(node, f"{leaf}:prior", rule)
    prior._PriorModule__priors.replace(name, rule)


def expect_tensors(prior: Any, state: Mapping[str, Any], prefix: str) -> list[str]:
    """Makes room for the tensors of Gaussian priors that a state dict has.

    Arguments:
        prior: The priors, a :class:`PriorModule`, whose attributes bear the names of parameters.
        state: The state dict.
        prefix: What stands in front of the names of parameters there.

    Returns:
        The names of the parameters whose prior was none that has such tensors.
    """
    changed = []
    for name, node, leaf in prior._PriorModule__sites:
        rule, stem = prior._PriorModule__priors.rules[name], f"{prefix}{name}:prior."
        kinds = (kind for kind in ("variance", "mean") if stem + kind in state)
        # What does not fit is refused later: the prior must be what it was.
        found = {kind for kind in kinds if state[stem + kind].shape == rule.shape}
        is_normal = isinstance(rule, NormalPrior)
        own = {kind for kind in ("variance", "mean") if getattr(rule, kind, None) is not None}
        if found <= own or "variance" not in found:  # a mean alone belongs to some other variance
            continue
        former = {"variance": 1.0, "mean": 0.0}
        if is_normal:
            former = {"variance": rule.empirical or rule.number, "mean": rule.center}
        room = {kind: node._buffers[f"{leaf}:like"].new_empty(rule.shape) for kind in found}
        replace_prior(prior, name, NormalPrior(name, rule.shape, **{**former, **room}))
        changed += [] if is_normal else [name]
    return changed


def _forget(prior: Any, _: Any) -> None:
    prior._PriorModule__priors.forget()


@contextmanager
def distinct_sites() -> Iterator[None]:
    """Says what to do when Pyro finds two sites of one name.

    Raises:
        RuntimeError: If the sites of a model or guide were already there.
    """
    try:
        yield
    except RuntimeError as error:
        if "Multiple sample sites" not in str(error):
            raise
        raise RuntimeError(
            f"Expected each site once per run of a Pyro model or guide; got two ({error}). Open one"
            " `with bnn.lift() as net:` and call `net` as often as needed. Two models need names of"
            " their own: BayesianModel(..., name='encoder')."
        ) from error
