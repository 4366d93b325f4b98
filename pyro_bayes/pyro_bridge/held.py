"""What a base holds while a context is open, and whether its examples meet there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bayes.base import ownership
from pyro_bayes.base.recomputation import Applied
from pyro_bayes.base.state import preserve_random_state
from pyro_bayes.noise.context import ContextNoise, context_noise
from pyro_bayes.noise.inputs import Inputs, batch_size
from pyro_bayes.noise.tensors import as_dtypes, held_values
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge.module import PosteriorModule

_HERE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class HeldModule(PosteriorModule):
    """A base, its prior and its guide, with what the base holds in a context."""

    @contextmanager
    def mean(self) -> Iterator[nn.Module]:
        """Holds the posterior means in the base while the context is open, without gradients.

        So does `base` where no other context is open. The mode stays what it is.

        Yields:
            The base.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3)
            >>> with bnn.mean() as net:
            ...     prediction = net(x)
        """
        with self.lock():
            self._pull()
            values: dict[str, Tensor] = dict(self.swap.originals)
            if ownership.is_former(self._guide):
                memory = self._guide.memory
                values |= {c.name: memory.mean(c.name) for c in self.choices if c.included}
            with self.hold(values) as base:
                yield base

    @contextmanager
    def hold(
        self, values: Mapping[str, Tensor], noise: ContextNoise | None = None
    ) -> Iterator[nn.Module]:
        """Holds values in the place of the base's parameters while the context is open.

        Arguments:
            values: The values by the names of parameters.
            noise: The noise that Gaussian tensors among them have, if it is told by the example.

        Yields:
            The base.

        Raises:
            RuntimeError: If the base is not as it was when it was wrapped.
        """
        if self._guide.memory.rounding.dtypes:
            self._keep_tied()
            values = self.as_held(values)
        examples: contextlib.AbstractContextManager[Any] = _HERE
        again: contextlib.AbstractContextManager[Any] = _HERE
        if noise is not None and noise.estimator != "weights":
            examples = self._examples.watch(self._base, values, noise, self._hold_unseen)
        if self._recomputation.may_be(self._base):
            again = self._recomputation.watch(self._base, self.again)
        applied = _HERE if torch.compiler.is_compiling() else Applied(self.swap, self.again)
        with self.swap(values, owner=self) as base, applied, again, examples:
            yield base

    @contextmanager
    def _hold_unseen(self, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Holds values in the base, out of sight of Pyro's handlers."""
        with poutine.block(), self.swap(self.as_held(values)) as base:
            yield base

    def as_held(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns values in the dtypes of the base's parameters.

        Arguments:
            values: The values by the names of parameters.
        """
        dtypes = self._guide.memory.rounding.dtypes
        return as_dtypes(values, dtypes) if dtypes else values

    def again(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Returns what opens, later, a context that holds what the base holds now.

        It belongs to the present thread, whichever opens it: a backward pass may have its own.
        """
        values, thread = self.swap.values, threading.current_thread()

        @contextmanager
        def context() -> Iterator[None]:
            if self.swap.is_open and self.swap.values is values:
                yield
                return
            with self._mutex.turn(thread), self.hold(values):
                yield

        return context

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
        inputs = args, kwargs
        noise.batch_size = batch_size(inputs, batch_dim)
        known = self._examples.verdict(self._base, noise, inputs)
        if known is not None:
            return known.warning
        with self.lock(), preserve_random_state():
            values, _ = self.values(noise)
            hold = self._hold_unseen
            return self._examples.look(self._base, values, noise, hold, inputs, function)

    def _look(self, values: Mapping[str, Tensor], noise: ContextNoise, inputs: Inputs) -> None:
        """Looks whether the examples of inputs meet, with values in the base."""
        self._examples.look(self._base, values, noise, self._hold_unseen, inputs)

    def values(
        self, noise: ContextNoise, priors: Priors | None = None
    ) -> tuple[Mapping[str, Tensor], list[Tensor]]:
        """Returns what the base holds in a context, and divergences if they are wanted.

        Arguments:
            noise: The noise of the context.
            priors: The priors, if divergences are wanted.

        Returns:
            The values by the names of parameters, and numbers whose sum is the divergence.
        """
        flats, memory = self._flats(), self._guide.memory
        named = None if torch.is_grad_enabled() else memory.by_name()
        values, numbers = held_values(flats, noise, priors, named)
        return values, [*numbers, *(priors.rest(flats) if priors else ())]
