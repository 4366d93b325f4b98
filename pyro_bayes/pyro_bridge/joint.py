"""What the sites of one run of a guide have in common: one posterior, in few flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bayes.posterior.layout import Flat
from pyro_bayes.priors.variance import PriorVariances


class Joint:
    r"""The posterior of all sites in one run of a guide.

    Arguments:
        posterior: The parameters of each dtype and device.
    """

    def __init__(self, posterior: Sequence[Flat]) -> None:
        self._posterior = posterior
        self._views: dict[str, tuple[Tensor, Tensor]] = {}
        self._divergences: dict[tuple[int, bool], dict[str, Tensor]] = {}

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

    def divergence(self, name: str, variances: PriorVariances) -> Tensor:
        r"""Returns :math:`D_{KL}(q \| p)` of one parameter, which one pass computes for all.

        Arguments:
            name: The name of the parameter.
            variances: The variances of the priors.
        """
        # What was computed without a gradient does not serve where one is wanted.
        key = (id(variances), torch.is_grad_enabled())
        if key not in self._divergences:
            self._divergences[key] = variances.kl_divergences(self._posterior)
        return self._divergences[key][name]

    def note(self, variances: PriorVariances, divergences: dict[str, Tensor]) -> None:
        """Keeps divergences that were computed together with draws."""
        self._divergences[id(variances), torch.is_grad_enabled()] = divergences
