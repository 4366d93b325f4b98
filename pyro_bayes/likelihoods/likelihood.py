"""The protocol of all likelihoods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bayes.predictive import Predictive

if TYPE_CHECKING:
    from pyro_bayes.model import BayesianModel


class Likelihood(nn.Module, ABC):
    r"""A likelihood :math:`p(y \mid f)`: a distribution of the target, given a network's output.

    To write one, return a distribution from :meth:`distribution`, say in `targets` and
    `dtypes` what a target is, and add it to `REGISTRY`. Everything else follows from it.
    """

    targets: str = "real numbers"
    """What `y` holds, in words, for messages."""

    @abstractmethod
    def distribution(self, output: Any, *, batch_dims: int = 1) -> dist.TorchDistribution:
        r"""Returns the distribution of the targets.

        Arguments:
            output: The network's output, of shape :math:`(B, *)`.
            batch_dims: How many dimensions on the left of the output count examples and draws: 2
                for the outputs of several draws, of shape :math:`(S, B, *)`.

        Returns:
            A distribution whose batch shape is exactly that of these dimensions, :math:`(B)` or
            :math:`(S, B)`.
        """

    def accepts(self, dtype: torch.dtype) -> bool:
        """Returns whether targets may be of a dtype."""
        return dtype.is_floating_point

    def check(self, output: Any, y: Any) -> None:
        """Checks that an output and a target fit the likelihood and each other.

        Arguments:
            output: The network's output.
            y: The target.

        Raises:
            TypeError: If either is not of tensors.
            ValueError: If a shape, a dtype, a device or a value is not what it has to be.
        """
        self._checked(output, y)

    def log_prob(self, output: Any, y: Tensor) -> Tensor:
        r"""Computes :math:`\log p(y_i \mid f_i)` of each example.

        Arguments:
            output: The network's output, of shape :math:`(B, *)`.
            y: The target.

        Returns:
            The log-probabilities, of shape :math:`(B)`: summed over an example's dimensions, and
            never over examples.

        Raises:
            TypeError: If an argument is not of tensors.
            ValueError: As in :meth:`check`.
        """
        distribution, y = self._checked(output, y)
        log_prob: Tensor = distribution.log_prob(y)
        return log_prob

    def sample(
        self, name: str, output: Any, y: Tensor | None = None, *, batch_dims: int = 1
    ) -> Tensor:
        """Makes the sample statement of the targets in a Pyro model, inside a plate of examples.

        Arguments:
            name: The name of the site.
            output: The network's output.
            y: The observed target, or `None` to sample it.
            batch_dims: As in :meth:`distribution`, 2 where Pyro vectorises over draws.

        Returns:
            The target.
        """
        if y is None:
            distribution = self.distribution(output, batch_dims=batch_dims)
        else:
            distribution, y = self._checked(output, y, batch_dims)
        value: Tensor = pyro.sample(name, distribution, obs=y)
        return value

    def predictive(
        self,
        bnn: BayesianModel,
        x: Any,
        num_samples: int = 100,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> Predictive:
        r"""Computes the predictive distribution, an even mixture over draws from the posterior.

        Arguments:
            bnn: The model.
            x: The inputs, as in :meth:`pyro_bayes.BayesianModel.predict`.
            num_samples: The number :math:`S` of draws.
            generator: Where the seed of the draws comes from.
            chunk_size: How many draws to evaluate at once.

        Returns:
            The predictive distribution.
        """
        output = bnn.predict(
            x, num_samples, statistics="samples", generator=generator, chunk_size=chunk_size
        ).samples
        with torch.no_grad():
            return Predictive(self.distribution(output, batch_dims=2))

    def _checked(
        self, output: Any, y: Any, batch_dims: int = 1
    ) -> tuple[dist.TorchDistribution, Tensor]:
        if not isinstance(y, Tensor):
            raise TypeError(f"Expected y to be a tensor; got {type(y).__name__}.")
        distribution = self.distribution(output, batch_dims=batch_dims)
        expected = distribution.batch_shape[-1:] + distribution.event_shape
        if y.shape != expected:
            raise ValueError(
                f"Expected y to be of shape {tuple(expected)}, which the output is for; got"
                f" {tuple(y.shape)}."
            )
        if not self.accepts(y.dtype):
            raise ValueError(f"Expected y to hold {self.targets}; got {y.dtype}.")
        return distribution, y


Check = Callable[[], str]
