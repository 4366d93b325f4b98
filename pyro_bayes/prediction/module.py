"""A lifted module that predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_bayes.prediction.batch_norm import warn_if_stale
from pyro_bayes.prediction.predict import Prediction, predict
from pyro_bayes.pyro_bridge.lift import LiftedModule


class PredictingModule(LiftedModule):
    """A base, its prior and its guide, with statistics of what it computes over draws."""

    def predict(
        self,
        x: Any,
        num_samples: int = 100,
        *,
        statistics: str | Sequence[str] = ("mean", "variance"),
        quantiles: float | Sequence[float] = (),
        function: Callable[..., Any] | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Prediction:
        r"""Computes statistics of the network's output over draws from the posterior.

        .. math:: m = \frac{1}{S} \sum_s f_{\theta_s}(x), \qquad
                  v = \frac{1}{S - 1} \sum_s (f_{\theta_s}(x) - m)^2, \qquad
                  \theta_s \sim q(\theta)

        Small networks are evaluated for many draws at once. Mean and variance take no memory that
        grows with :math:`S`; quantiles and samples keep the :math:`S` outputs, quantiles those of
        one batch at a time. A network runs in the mode that it is in, and keeps its buffers.

        Arguments:
            x: A tensor, a tuple of positional arguments or a dictionary of keyword arguments of
                the base. Or a function of the base, as in
                `bnn.predict(lambda flow: flow(c).log_prob(y))`. Or an iterable of batches, as a
                data loader, of inputs or of pairs (x, y), whose y is left out: all batches meet the
                same draws, and their statistics are joined along the dimension of examples.
            num_samples: The number :math:`S` of draws.
            statistics: Any of `"mean"`, `"variance"` (of at least 2 draws) and `"samples"`, which
                are the outputs of all draws.
            quantiles: Levels between 0 and 1 of quantiles over draws, which are exact.
            function: What to evaluate instead of `base(*args)`: a function of the base and of the
                arguments, or of all parts of a batch, that returns tensors.
            chunk_size: How many draws to evaluate at once, 1 for a loop; by default, as many as
                pay. It changes the time, and results by rounding only, unless the network draws
                random numbers of its own, as dropout does.
            generator: Where the seed of the draws comes from, torch's global generator by default.
            progress: Whether to show a progress bar once it has taken 3 seconds.

        Returns:
            The mean, the variance, the quantiles by level, the samples and the standard error of
            the mean, each with the structure of the output. Statistics of half-precision outputs
            are in single precision.

        Raises:
            ValueError: If an argument is out of range, or a batch has more than two parts.
            TypeError: If `x` is none of the above, or an output is not of tensors, as a flow's
                distribution: say with `function` what to compute of it.

        Warns:
            UserWarning: If :func:`torch.vmap` cannot batch the base (an LSTM, batch norm in
                training mode), which is then called once per draw, with the same results.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> bnn, x = BayesianModel(nn.Linear(3, 1), init_logvar=-2.0), torch.randn(5, 3)
            >>> prediction = bnn.predict(x, num_samples=50, quantiles=(0.05, 0.95))
            >>> prediction.mean.shape, prediction.quantiles[0.95].shape
            (torch.Size([5, 1]), torch.Size([5, 1]))
            >>> total = (prediction.variance + 0.1**2).sqrt()  # with the noise of the likelihood
        """
        warn_if_stale(self)
        with self.lock():
            parts = self._base, self._flats(), self.hold
            return predict(
                *parts,
                x,
                num_samples,
                statistics=statistics,
                quantiles=quantiles,
                function=function,
                chunk_size=chunk_size,
                generator=generator,
                progress=progress,
            )
