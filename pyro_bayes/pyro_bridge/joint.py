"""What the sites of one run of a guide have in common: one posterior, in few flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import is_transformed
from pyro_bayes.posterior.layout import Flat
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge.expectation import Expectation


class Joint:
    r"""The posterior of all sites in one run of a guide.

    Arguments:
        posterior: The parameters of each dtype and device.
    """

    def __init__(self, posterior: Sequence[Flat]) -> None:
        self._posterior = posterior
        self._views: dict[str, tuple[Tensor, Tensor]] = {}
        self._divergences: dict[tuple[int, bool], dict[str, Tensor]] = {}
        self._met: set[str] = set()
        self._marked: str | None = None

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\mu` and :math:`\log \sigma^2` of one parameter, differentiable."""
        if not self._views:
            for layout, mean, logvar in self._posterior:
                pairs = zip(layout.split(mean), layout.split(logvar), strict=True)
                self._views.update(zip(layout.names, pairs, strict=True))
        return self._views[name]

    def fixed(self, name: str) -> Tensor | None:
        """Returns which elements of one parameter carry no information, if there are any."""
        masks = (flat.layout.masks for flat in self._posterior)
        return next((mask[name] for mask in masks if name in mask), None)

    def divergence(self, name: str, priors: Priors) -> Tensor:
        """Returns the divergence of one parameter, without what random deviations add.

        It is computed for all parameters at once.

        Arguments:
            name: The name of the parameter.
            priors: The priors.
        """
        # What was computed without a gradient does not serve where one is wanted.
        self._met.add(name)
        key = (id(priors), torch.is_grad_enabled())
        if key not in self._divergences:
            self.note(priors, priors.passes(self._posterior))
        return self._divergences[key][name]

    def note(self, priors: Priors, passes: Sequence[Tensor]) -> None:
        """Keeps the divergences, of which one pass was made, maybe together with draws."""
        numbers = priors.of_sites(self._posterior, passes)
        self._divergences[id(priors), torch.is_grad_enabled()] = numbers

    def log_density(self, name: str, zeros: Tensor) -> Tensor:
        """Returns the log-density of a site whose value is a Gaussian tensor, which is 0.

        It is the counterpart of a divergence, and worth nothing without that.

        Arguments:
            name: The name of the parameter.
            zeros: Zeros of the shape of the log-density.

        Raises:
            RuntimeError: If no prior has been asked for the divergence.
        """
        if name not in self._met:
            raise RuntimeError(
                f"Expected a model that samples '{name}' from its own prior, with which exact_kl()"
                " has the divergence in closed form; got one that does not, as under"
                " poutine.condition or poutine.do, so that the entropy of the guide would be lost."
                " Hide the site from the guide, poutine.block(guide, hide=[...]), or use"
                " `bnn.guide`."
            )
        self._marked = self._marked or name  # one site is enough, and the mark takes time
        if name != self._marked or is_transformed():
            return zeros
        return zeros.as_subclass(Expectation)
