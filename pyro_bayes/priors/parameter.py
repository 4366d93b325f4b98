"""The prior of one parameter: what its divergence and its sample site need to know."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bayes.priors.empirical import Empirical


class ParameterPrior(nn.Module):
    r"""The prior of one parameter, whose tensors follow the model and are part of its state.

    Arguments:
        name: The dotted name of the parameter.
        shape: Its shape.

    Attributes:
        is_exact: Whether :math:`\mathbb{E}_q[\log p]` is known in closed form.
        follows: Whether it depends on the present posterior.
        group: A number that it shares with priors of other parameters which are the same but for
            the shape, so that they are evaluated together; `None` if there are none.
    """

    is_exact = True
    follows = False
    group: int | None = None

    def __init__(self, name: str, shape: torch.Size) -> None:
        """Makes the prior, whose class describes the arguments."""
        super().__init__()
        self.name, self.shape = name, torch.Size(shape)

    def elements(self, like: Tensor, scale: Tensor | None = None) -> dist.TorchDistribution:
        """Returns the distribution, whose batch and event dimensions are those of the parameter.

        Arguments:
            like: A tensor of the dtype and device.
            scale: The draw of the deviations, if they are random.
        """
        raise NotImplementedError

    def check_separable(self) -> None:
        """Raises a `ValueError` unless some elements can be left out."""

    def describe(self) -> str:
        """Returns what the prior is, in few characters."""
        raise NotImplementedError


class NormalPrior(ParameterPrior):
    r"""The prior :math:`\mathcal{N}(\mu_p, \sigma_p^2)` of each element.

    Arguments:
        name: The dotted name of the parameter.
        shape: Its shape.
        variance: The variance :math:`\sigma_p^2`: a number, a tensor of the parameter's shape, or
            the rule by which it follows the posterior.
        mean: The mean :math:`\mu_p`, a number or a tensor of the parameter's shape.

    Attributes:
        variance: The variance if it is a tensor, or else `None`.
        mean: The mean if it is a tensor, or else `None`.
        empirical: The rule, if there is one.
    """

    variance: Tensor | None
    mean: Tensor | None

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        variance: float | Tensor | Empirical,
        mean: float | Tensor = 0.0,
    ) -> None:
        """Makes the prior, whose class describes the arguments."""
        super().__init__(name, shape)
        self.empirical = variance if isinstance(variance, Empirical) else None
        self.follows = self.empirical is not None
        self._number = variance if isinstance(variance, float) else None
        self._center = mean if isinstance(mean, float) else 0.0
        self.register_buffer("variance", variance if isinstance(variance, Tensor) else None)
        self.register_buffer("mean", mean if isinstance(mean, Tensor) else None)

    @property
    def number(self) -> float | Tensor | None:
        """The variance as it was given, `None` if it follows the posterior."""
        return self._number if self.variance is None else self.variance

    @property
    def center(self) -> float | Tensor:
        """The mean as it was given."""
        return self._center if self.mean is None else self.mean

    def elements(self, like: Tensor, scale: Tensor | None = None) -> dist.TorchDistribution:
        center: Any = self.center
        mean = torch.as_tensor(center).to(like)
        if scale is None:
            variance: Any = 1.0 if self.number is None else self.number
            scale = torch.as_tensor(variance, dtype=torch.double if like.is_cpu else None).sqrt()
        normal = dist.Normal(mean, scale.to(like), validate_args=False)
        return normal.expand(self.shape)  # type: ignore[no-any-return]

    def describe(self) -> str:
        center = f"{self._center:g}" if self.mean is None else _range(self.mean)
        if self.empirical:
            return f"N({center}, empirical)"
        return f"N({center}, {_range(torch.as_tensor(self.number, dtype=torch.double))})"


def _range(values: Tensor) -> str:
    """Returns the least and the largest of several numbers."""
    if values.numel() == 0 or values.is_meta:
        return "…"
    low, high = values.detach().double().aminmax()
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
