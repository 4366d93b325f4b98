"""A model that tells what it consists of, and whether an estimator is right for its network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bayes.base.checks import check_count
from pyro_bayes.base.state import undisturbed
from pyro_bayes.base.torch_private import tree_leaves
from pyro_bayes.noise.context import context_noise
from pyro_bayes.noise.examples import Examples
from pyro_bayes.posterior.summary import Summary, summarize
from pyro_bayes.prediction.comparison import ESTIMATORS, Comparison, compare
from pyro_bayes.prediction.module import PredictingModule


class InspectedModule(PredictingModule):
    """A base, its prior and its guide, with tables of what they are and do."""

    def summary(self, *args: Any, local_trick: Any = True, batch_dim: int = 0) -> Summary:
        r"""Prints a table of the parameters.

        Its columns are the name, the shape, whether the parameter is included and by which
        pattern, the prior, whether the divergence from it is exact or a Monte Carlo estimate, and
        the current mean of :math:`|\mu| / \sigma`. With arguments, one
        forward pass of the base is made, and a further column tells what an estimator reached:
        local noise or flipout, or one draw of the parameter, and which operator asked for it. The
        pass leaves no trace: buffers, the state of random numbers and gradients are as before.

        Arguments:
            args: The arguments of the base, or one function of it, as in
                `bnn.summary(lambda flow: flow(c).log_prob(x))`.
            local_trick: The estimator, `True` or `"flipout"`.
            batch_dim: The dimension of inputs that counts examples, 1 if they have time first.

        Returns:
            The table; its `rows` can be read.

        Raises:
            ImportError: If the extra `rich` is not installed.

        Warns:
            UserWarning: If examples meet, the first time; the table says it each time.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn = BayesianModel(nn.Linear(3, 1), exclude_params="bias")
            >>> rows = bnn.summary(torch.randn(5, 3)).rows
            <BLANKLINE>
            ...
            >>> [(row.parameter, row.noise) for row in rows]
            [('weight', 'local'), ('bias', 'deterministic')]
        """
        uses, note = None, None
        if args:
            function, inputs = (args[0], ()) if callable(args[0]) else (_call, args)
            noise = context_noise(local_trick, batch_dim)
            uses = noise.uses = {}
            with torch.enable_grad(), self.lock(), undisturbed(self._base):
                note = self.look_at_examples(
                    function, *inputs, local_trick=local_trick, batch_dim=batch_dim
                )
                values, _ = self.values(noise)
                with self.hold(values, noise) as base:
                    function(base, *inputs)
        title = f"{type(self).__name__} of {type(self._base).__name__}"
        parts = self.choices, self.swap.originals, self._guide.posterior()
        say = self._guide.priors.explain
        return summarize(title, self._guide.store_name, *parts, say, uses, note)

    def check(
        self,
        *args: Any,
        num_contexts: int = 1000,
        function: Callable[..., Any] | None = None,
        batch_dim: int = 0,
        **kwargs: Any,
    ) -> Comparison:
        r"""Compares what the network computes with local noise and flipout with draws.

        Means and variances of the outputs, over contexts of :meth:`reparameterize`, must be those
        of draws of the weights, which are exact for all networks. What is not is named: an
        estimator, an output, and the parameters whose noise alone makes the difference. Local noise
        cannot agree where an example meets the same weights several times, as positions do that a
        network then pools. The pass leaves no trace, as that of :meth:`summary`.

        Arguments:
            args: The arguments of the base, or one function of it, as in
                `bnn.check(lambda flow: flow(c).log_prob(x))`.
            num_contexts: The number of contexts of each estimator, at least 100. Standard errors of
                variances are about :math:`\sqrt{2 / S}`.
            function: What to evaluate instead of `base(*args)`: a function of the base and of the
                arguments.
            batch_dim: The dimension of inputs that counts examples, 1 if they have time first.
            kwargs: The keyword arguments of the base.

        Returns:
            A table; its `rows` can be read, and `agrees` says whether all do.

        Raises:
            ValueError: If `num_contexts` is less than 100.
            TypeError: If an output has no tensors of real numbers.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn, x = BayesianModel(nn.Linear(3, 1), init_logvar=-2.0), torch.randn(5, 3)
            >>> comparison = bnn.check(x, num_contexts=200)
            >>> [row.estimator for row in comparison.rows]
            ['local noise', 'flipout']
            >>> print(comparison)
            estimator ...
        """
        check_count("num_contexts", num_contexts, least=100)
        call = function or _call
        if function is None and len(args) == 1 and callable(args[0]):
            call, args = args[0], ()
        means = {name: mean.detach() for name, (mean, _) in self._guide.posterior().items()}

        def sample(estimator: str, only: str | None, count: int) -> list[Tensor]:
            contexts = []
            for _ in range(count):
                noise = context_noise(ESTIMATORS.get(estimator, False), batch_dim, False)
                values, _ = self.values(noise)
                if only is not None:
                    values = {n: v if n == only else means[n] for n, v in values.items()}
                with self.hold(values, noise) as base:
                    contexts.append(_numbers(call(base, *args, **kwargs)))
            return [torch.stack(values) for values in zip(*contexts, strict=True)]

        with torch.no_grad(), self.lock(), undisturbed(self._base):
            known, self._examples = self._examples, Examples()  # of this function, not of others
            try:
                found = {
                    name: self.look_at_examples(
                        call, *args, local_trick=kind, batch_dim=batch_dim, **kwargs
                    )
                    for name, kind in ESTIMATORS.items()
                }
                remarks = {name: note for name, note in found.items() if note is not None}
                return compare(sample, [*means], int(num_contexts), remarks)
            finally:
                self._examples = known


def _call(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return base(*args, **kwargs)


_ELEMENTS = 2**12


def _numbers(output: Any) -> list[Tensor]:
    """Returns each output of real numbers as a vector, of the first thousands of elements."""
    found = [
        leaf.detach().flatten()[:_ELEMENTS].cpu().double()
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    ]
    if not found:
        raise TypeError(
            "Expected outputs with tensors of real numbers; got none. Say with function what to"
            " compute, as in check(c, function=lambda flow, c: flow(c).log_prob(x))."
        )
    return found
