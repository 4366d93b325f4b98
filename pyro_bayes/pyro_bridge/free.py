"""The support of a site some elements of which are fixed: only the others are coordinates."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform


class FreeElements(constraints.Constraint):
    """Tensors whose fixed elements have given values, so that NUTS and guides move the others.

    Arguments:
        value: A tensor with these values; its other elements do not matter.
        fixed: Which elements are fixed, of the same shape.
    """

    def __init__(self, value: Tensor, fixed: Tensor) -> None:
        self.value, self.fixed = value.detach().clone(), fixed
        self.event_dim = value.dim()

    def check(self, value: Tensor) -> Tensor:
        """Tells whether tensors of shape `(*, shape)` are in the support."""
        valid = (value == value) & (~self.fixed | (value == self.value))
        return valid.flatten(value.dim() - self.event_dim).all(-1)


class HeldElements(TorchDistribution):
    """A distribution some elements of which always have given values, and no density.

    Arguments:
        base: The distribution of the others, whose elements are independent.
        value: A tensor with these values.
        fixed: Which elements have them.
    """

    support = constraints.real

    def __init__(self, base: TorchDistribution, value: Tensor, fixed: Tensor) -> None:
        if base.event_shape:
            raise ValueError(
                "Expected independent elements in the prior of a parameter with padding or pruned"
                f" elements, which are not random; got {type(base).__name__} with event shape"
                f" {tuple(base.event_shape)}."
            )
        self.base, self.value, self.fixed = base, value, fixed
        self.has_rsample = base.has_rsample
        super().__init__(base.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HeldElements:
        return HeldElements(self.base.expand(batch_shape), self.value, self.fixed)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.where(self.fixed, self.value, self.base.sample(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return torch.where(self.fixed, self.value, self.base.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        # A density may have a pole at the value.
        free = value.masked_fill(self.fixed, 1.0)
        log_prob: Tensor = self.base.log_prob(free)
        return log_prob.masked_fill(self.fixed, 0.0)


class Scatter(Transform):
    """Puts a vector of the free elements in their places among those that are fixed.

    Arguments:
        support: The support.
    """

    codomain: Any
    bijective = True

    def __init__(self, support: FreeElements) -> None:
        super().__init__()
        self.domain, self.codomain = constraints.real_vector, support
        fixed = support.fixed.flatten()
        self._free = (~fixed).nonzero().squeeze(-1)
        # Where each element comes from: the free ones, followed by all values.
        self._source = torch.arange(len(fixed), device=fixed.device) + len(self._free)
        self._source[self._free] = torch.arange(len(self._free), device=fixed.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scatter) and other.codomain is self.codomain

    def _call(self, x: Tensor) -> Tensor:
        value, lead = self.codomain.value.to(x.dtype), x.shape[:-1]
        every = torch.cat([x, value.flatten().expand(*lead, -1)], -1)
        return every.index_select(-1, self._source).reshape(*lead, *value.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        lead = y.shape[: y.dim() - self.codomain.event_dim]
        return y.reshape(*lead, -1).index_select(-1, self._free)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros: elements are moved, not scaled."""
        return x.new_zeros(x.shape[:-1])

    def forward_shape(self, shape: Any) -> torch.Size:
        """Returns the shape of the tensors for that of the vectors."""
        return torch.Size([*shape[:-1], *self.codomain.value.shape])

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Returns the shape of the vectors for that of the tensors."""
        return torch.Size([*shape[: len(shape) - self.codomain.event_dim], len(self._free)])


biject_to.register(FreeElements, Scatter)
transform_to.register(FreeElements, Scatter)
