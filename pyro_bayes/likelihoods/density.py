"""Targets whose distribution the base itself returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_bayes.base.state import draw_seed, fingerprint, seeded
from pyro_bayes.likelihoods.likelihood import Likelihood
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import check_values
from pyro_bayes.prediction.predict import Predictor

_MOMENT_SAMPLES = 256


class Density(Likelihood):
    r"""The distribution that the base returns, as a normalizing flow does.

    .. math:: p(y \mid f) = f(y)

    The output is a distribution of Zuko, torch or Pyro, with one entry per example, and the target
    has the shape :math:`(B, *)` of its samples. Batch dimensions on the right of the examples' are
    independent elements of one target. A flow computes its density with the network: call
    :meth:`Likelihood.log_prob` in the same context as the network.

    The predictive mixture evaluates the base again whenever it is asked for something, with the
    same draws, which is an error once the model has changed. Its mean and variances are estimated
    from 256 samples of each draw, and its quantiles are those of 1000 samples.

    Example:
        >>> from torch.distributions import Exponential
        >>> Density().log_prob(Exponential(torch.ones(2)), torch.tensor([0.5, 1.0]))
        tensor([-0.5000, -1.0000])
    """

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        if not isinstance(output, Distribution):
            raise TypeError(
                "Expected an output for Density that is a distribution; got"
                f" {type(output).__name__}. Outputs that are tensors are for other likelihoods."
            )
        return self.per_example(output, batch_dims)

    def predictive(
        self,
        bnn: Predictor,
        x: Any,
        num_samples: int = 100,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> Predictive:
        if not isinstance(x, Tensor | Mapping | tuple):
            raise TypeError(
                "Expected x to be a tensor, a tuple or a dictionary of arguments; got"
                f" {type(x).__name__}. Predict batch by batch."
            )
        source = torch.default_generator if generator is None else generator
        state, before = source.get_state(), fingerprint(bnn.parameters())
        seed = draw_seed(source)

        def evaluate(
            function: Callable[[Distribution], Any], draws: int = num_samples, *, samples: bool
        ) -> Any:
            if fingerprint(bnn.parameters()) != before:
                raise RuntimeError(
                    "Expected the model as it was when predictive() was called; got one that has"
                    " changed since. A density is evaluated when asked for: call it again."
                )
            return bnn.predict(
                x,
                draws,
                statistics="samples",
                function=lambda net, *args, **kwargs: function(
                    self._of_examples(net(*args, **kwargs), 1)
                ),
                generator=torch.Generator(source.device).set_state(state),
                # torch.vmap does not batch the noise of distributions.
                chunk_size=1 if samples else chunk_size,
            ).samples

        return Predictive(_Densities(evaluate, num_samples, seed))

    def _check_log_prob(self, log_prob: Tensor) -> None:
        check_values("the log-density of y", log_prob, "finite real numbers")

    def _fit(self, output: Any, y: Any, batch_dims: int = 1) -> tuple[Distribution, Tensor]:
        # A density without conditions is the same for all examples.
        if isinstance(output, Distribution) and not output.batch_shape and isinstance(y, Tensor):
            output = output.expand(y.shape[:1])
        return super()._fit(output, y, batch_dims)


class _Densities(Distribution):
    r"""The densities that a base returns for :math:`S` draws, evaluated when asked for.

    Arguments:
        evaluate: Evaluates a function of the base's distribution for all draws, or the first ones.
        num_samples: The number :math:`S` of draws.
        seed: The seed of the samples that moments are estimated from.
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, evaluate: Callable[..., Any], num_samples: int, seed: int) -> None:
        self._evaluate, self._seed = evaluate, seed
        shapes: list[tuple[Size, Size]] = []

        def note(d: Distribution) -> Tensor:
            shapes.append((d.batch_shape, d.event_shape))
            return torch.zeros(())

        evaluate(note, 1, samples=True)
        (batch, event), *_ = shapes
        super().__init__(Size([num_samples, *batch]), event, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self._evaluate(lambda d: d.log_prob(value), samples=False)
        return log_prob

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        sample_shape = Size(sample_shape)
        samples: Tensor = self._evaluate(lambda d: d.sample(sample_shape), samples=True)
        return samples.movedim(0, len(sample_shape))

    @property
    def mean(self) -> Tensor:
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        def moments(d: Distribution) -> tuple[Tensor, Tensor]:
            variance, mean = torch.var_mean(d.sample(Size([_MOMENT_SAMPLES])), 0)
            return mean, variance

        with seeded(self._seed):
            of_draws: tuple[Tensor, Tensor] = self._evaluate(moments, samples=True)
        return of_draws
