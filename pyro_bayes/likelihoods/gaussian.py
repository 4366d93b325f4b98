"""Gaussian noise of one scale."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from pyro_bayes.likelihoods.likelihood import Likelihood


class Gaussian(Likelihood):
    r"""Gaussian noise, whose scale is the same for all examples: fixed or learned.

    .. math:: p(y \mid f) = \prod_k \mathcal{N}(y_k \mid f_k, s_k^2)

    Output and target have the same shape, :math:`(B, *)`. A learned scale is the parameter
    `log_scale`.

    Arguments:
        scale: The standard deviation :math:`s`, in the unit of the target: one number, or a tensor
            of the shape of one example's target.
        learn: Whether it is learned, by maximum likelihood and from `scale` on.

    Raises:
        TypeError: If `scale` is not of numbers.
        ValueError: If it is not positive and finite.

    Example:
        >>> likelihood = Gaussian(0.5, learn=True)
        >>> likelihood.log_prob(torch.zeros(3, 2), torch.zeros(3, 2))
        tensor([-0.4516, -0.4516, -0.4516], grad_fn=<...>)
        >>> [name for name, _ in likelihood.named_parameters()]
        ['log_scale']
    """

    def __init__(self, scale: float | Tensor, *, learn: bool = False) -> None:
        super().__init__()
        self._set_positive("scale", scale, learn)

    @property
    def scale(self) -> Tensor:
        """The standard deviation, of the shape that it was given with."""
        return self.log_scale.exp()  # type: ignore[operator]

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        mean = self.as_real(output, batch_dims)
        scale = self._get_positive("scale", mean, batch_dims)
        return self.per_example(dist.Normal(mean, scale, validate_args=False), batch_dims)
