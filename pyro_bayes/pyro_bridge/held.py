"""What a base holds while a context is open, and whether its examples meet there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bayes.noise.context import ContextNoise, context_noise
from pyro_bayes.noise.tensors import held_values
from pyro_bayes.priors.variance import PriorVariances
from pyro_bayes.pyro_bridge.module import PosteriorModule


class HeldModule(PosteriorModule):
    """A base, its prior and its guide, with what the base holds in a context."""

    def look_at_examples(
        self,
        function: Callable[..., Any],
        *args: Any,
        local_trick: bool | Literal["flipout"] = True,
        batch_dim: int = 0,
        **kwargs: Any,
    ) -> str | None:
        """Looks whether examples meet in a function of the base, as :meth:`reparameterize` does.

        It looks once for each estimator and mode. What computes with the network after the base was
        called, as the density of a flow, is seen by this alone.

        Arguments:
            function: A function of the base and of its arguments, whose outputs have the examples
                in the first dimension.
            args: The positional arguments of the base.
            local_trick: The estimator, as in :meth:`reparameterize`.
            batch_dim: The dimension of inputs that counts examples, likewise.
            kwargs: The keyword arguments of the base.

        Returns:
            What to know, if they meet.

        Warns:
            UserWarning: If they meet, the first time.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3)
            >>> bnn.look_at_examples(lambda net, x: net(x).square(), x)
        """
        noise = context_noise(local_trick, batch_dim)
        if noise.estimator == "weights":
            return None
        if not self._examples.is_known(self._base, noise):
            with self.lock():
                values, _ = self.values(noise)
                hold, inputs = self._hold_unseen, (args, kwargs)
                self._examples.look(self._base, values, noise, hold, inputs, function)
        return self._examples.warning(self._base, noise)

    def values(
        self, noise: ContextNoise, variances: PriorVariances | None = None
    ) -> tuple[Mapping[str, Tensor], list[Tensor]]:
        """Returns what the base holds in a context, and divergences if they are wanted.

        Arguments:
            noise: The noise of the context.
            variances: The variances of the prior, if divergences are wanted.

        Returns:
            The values by the names of parameters, and the divergence of each dtype and device.
        """
        flats, memory = self._flats(), self._guide.memory
        named = None if torch.is_grad_enabled() else memory.by_name()
        return held_values(flats, noise, variances, named)
