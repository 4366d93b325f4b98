"""Whether the examples of a batch meet in a network, and which operators see none of them.

Local noise and flipout give each example noise of its own. That is right as long as an example's
output depends on its own noise only. Graph layers, attention over the batch or batch norm in
training mode mix the noise of examples that have the same weights, and the variance comes out too
small. And noise that no example owns must not be told by the example: that of learned queries,
position embeddings, and weights that are computed of others.

A network is asked once: it is called a few times with the same inputs, and other noise for some of
the examples. If the outputs of the others change, the parameters behind it become one draw.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.base.torch_private import is_transformed, remove_hook
from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.inputs import Inputs, batch_size
from pyro_bayes.noise.trial import Hold, Trial, Verdict

_FAILURES = 3
"""How often to ask a network that cannot be asked."""


class Examples:
    """What is known of the examples of one network, for each estimator and mode."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._failures: Counter[tuple[object, ...]] = Counter()
        self._modules: list[nn.Module] | None = None
        self._busy = False

    def verdict(self, base: nn.Module, noise: ContextNoise, inputs: Inputs) -> Verdict | None:
        """Returns what is known of a network, `None` if nothing is yet.

        Arguments:
            base: The base.
            noise: The noise of the context.
            inputs: The arguments of the base.
        """
        return self._verdicts.get(self._key(base, noise, inputs))

    def _key(self, base: nn.Module, noise: ContextNoise, inputs: Inputs) -> tuple[object, ...]:
        """What a verdict depends on: the estimator, all modes, and which arguments there are."""
        if self._modules is None:
            self._modules = list(base.modules())
        modes = tuple([module.training for module in self._modules])
        several = (noise.batch_size or 0) > 1
        given = len(inputs[0]), *inputs[1]
        return noise.estimator, noise.batch_dim, several, modes, given

    @contextmanager
    def watch(
        self, base: nn.Module, values: Mapping[str, Tensor], noise: ContextNoise, hold: Hold
    ) -> Iterator[None]:
        """Watches the calls of a base while a context is open.

        Each call tells the noise how many examples there are. The first looks whether they meet.

        Arguments:
            base: The base.
            values: What it holds in the place of its parameters.
            noise: The noise of the context.
            hold: Holds other values.
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._busy:
                self.look(module, values, noise, hold, (args, kwargs))

        # A compiler would take a hook for a change of the network.
        if torch.compiler.is_compiling():
            yield
            return
        try:
            try:
                base.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                yield
            finally:
                remove_hook(base, before)
        finally:  # the first time may have been interrupted
            remove_hook(base, before)

    def look(
        self,
        base: nn.Module,
        values: Mapping[str, Tensor],
        noise: ContextNoise,
        hold: Hold,
        inputs: Inputs,
        function: Callable[..., Any] | None = None,
    ) -> str | None:
        """Looks whether examples meet, unless it is known, and tells the noise what is known.

        Arguments:
            base: The base.
            values: What it holds in the place of its parameters.
            noise: The noise of the context.
            hold: Holds other values.
            inputs: The arguments of the base.
            function: A function of the base and of them; by default, the base's own.

        Returns:
            What a user is to know.

        Warns:
            UserWarning: Likewise, when it is found.
        """
        noise.batch_size = batch_size(inputs, noise.batch_dim)
        key = self._key(base, noise, inputs)
        verdict = self._verdicts.get(key)
        question = *key, function is None
        # Within a transform, inputs cannot be changed; without any, there is nothing to tell.
        wanted = verdict is None and noise.check_examples and noise.batch_size
        if wanted and self._failures[question] <= _FAILURES and not is_transformed():
            verdict = self._ask(question, Trial(base, values, noise, hold, inputs, function))
        if verdict is None:
            return None
        noise.shared = verdict.shared
        noise.pinned |= verdict.drawn
        return verdict.warning

    def _ask(self, question: tuple[object, ...], trial: Trial) -> Verdict | None:
        try:
            self._busy = True
            verdict = trial.verdict()
        finally:
            self._busy = False
        if verdict is None:
            self._failures[question] += _FAILURES + 1 if trial.is_lazy else 1
            if trial.reason is not None and self._failures[question] == 1:
                warnings.warn(trial.reason, stacklevel=5)
            return None
        self._verdicts[question[:-1]] = verdict
        if verdict.warning is not None:
            warnings.warn(verdict.warning, stacklevel=5)
        return verdict
