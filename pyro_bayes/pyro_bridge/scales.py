"""The posterior of the deviations of hierarchical priors."""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bayes.base.nested import plant
from pyro_bayes.posterior.rounding import wide
from pyro_bayes.priors.hierarchical import HierarchicalPrior
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge import store


class PriorScales(nn.Module):
    r"""The posterior :math:`q(\log \sigma_p) = \mathcal{N}(a, b^2)` of random prior deviations.

    Arguments:
        priors: The priors of all parameters.
        parameters: The parameters by dotted name, of whose dtypes and devices it is.

    Attributes:
        means: A module of the means :math:`a` under the parameters' own names.
        logvars: A module of the log-variances :math:`\log b^2`, likewise.
    """

    def __init__(self, priors: Priors, parameters: Mapping[str, Tensor]) -> None:
        """Makes the posterior, whose class describes the arguments."""
        super().__init__()
        means, logvars = {}, {}
        for name, rule in priors.rules.items():
            if isinstance(rule, HierarchicalPrior):
                own = parameters[name]
                like = torch.zeros((), dtype=wide(own.dtype), device=own.device)
                means[name], logvars[name] = (nn.Parameter(t) for t in rule.initial(like))
        self._names = tuple(means)
        self.means, self.logvars = plant(nn.Module(), means), plant(nn.Module(), logvars)

    def by_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the mean and the log-variance of each, by the name of its parameter."""
        kinds = self.means, self.logvars
        return {
            name: tuple(_parameter(kind, name) for kind in kinds)  # type: ignore[misc]
            for name in self._names
        }

    def stored(self, prefix: str) -> dict[str, nn.Parameter]:
        """Returns the parameters by their full names in Pyro's param store.

        Arguments:
            prefix: What stands in front of these.
        """
        return {f"{prefix}.{name}": p for name, p in self.named_parameters()}

    def drop(self, name: str) -> None:
        """Forgets the deviations of a parameter whose prior is another now.

        Arguments:
            name: The dotted name of the parameter.
        """
        self._names = tuple(own for own in self._names if own != name)
        path, _, leaf = name.rpartition(".")
        for kind in (self.means, self.logvars):
            if any(name == own for own, _ in kind.named_parameters()):
                delattr(kind.get_submodule(path), leaf)

    def statement(self, name: str, prefix: str) -> dist.TorchDistribution:
        """Makes the `pyro.param` statements of one, and returns its distribution.

        Arguments:
            name: The dotted name of the parameter.
            prefix: What stands in front of the names in Pyro's param store.
        """
        mean, logvar = (
            store.statement(f"{prefix}.{kind}.{name}", module.get_parameter(name))
            for kind, module in (("means", self.means), ("logvars", self.logvars))
        )
        own = dist.LogNormal(mean, (0.5 * logvar).exp())
        return own.to_event(mean.dim())  # type: ignore[no-any-return]


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """Returns a parameter, or the tensor that `torch.func.functional_call` has put in its place."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path)._parameters[leaf]
