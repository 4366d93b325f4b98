"""Targets whose distribution the base itself returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_bayes.base.checks import check_count
from pyro_bayes.base.state import draw_seed, fingerprint, seeded
from pyro_bayes.likelihoods.likelihood import Likelihood
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import check_values
from pyro_bayes.prediction.batches import arguments, called, each_batch
from pyro_bayes.prediction.predict import Predictor


class Density(Likelihood):
    r"""The distribution that the base returns, as a normalizing flow does.

    .. math:: p(y \mid f) = f(y)

    The output is a distribution of Zuko, torch or Pyro, with one entry per example, and the target
    has the shape :math:`(B, *)` of its samples. Batch dimensions on the right of the examples' are
    independent elements of one target. A flow computes its density with the network: call
    :meth:`Likelihood.log_prob` in the same context as the network.

    The predictive mixture evaluates the base again whenever it is asked for something, with the
    same draws, which is an error once the model has changed. Its mean and variances are estimated
    from samples of each draw, of which the epistemic variance leaves the noise of the samples out,
    and its quantiles are those of 1000 samples.

    Arguments:
        moment_samples: The number of samples of each draw that moments are estimated from, at least
            2. For most flows, sampling takes all of the time.

    Raises:
        ValueError: If `moment_samples` is less than 2.

    Example:
        >>> from torch.distributions import Exponential
        >>> Density().log_prob(Exponential(torch.ones(2)), torch.tensor([0.5, 1.0]))
        tensor([-0.5000, -1.0000])
    """

    def __init__(self, *, moment_samples: int = 32) -> None:
        super().__init__()
        check_count("moment_samples", moment_samples, least=2)
        self.moment_samples = int(moment_samples)

    def extra_repr(self) -> str:
        return f"moment_samples={self.moment_samples}"

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
        single = isinstance(x, Tensor | Mapping | tuple)
        batches = [x] if single else list(each_batch(x, name="x"))
        source = torch.default_generator if generator is None else generator
        state, before = source.get_state(), fingerprint(bnn.parameters())
        seed = draw_seed(source)

        def evaluate(
            function: Callable[..., Any],
            draws: int = num_samples,
            *,
            samples: bool,
            targets: Sequence[Any] | None = None,
        ) -> Any:
            if fingerprint(bnn.parameters()) != before:
                raise RuntimeError(
                    "Expected the model as it was when predictive() was called; got one that has"
                    " changed since. A density is evaluated when asked for: call it again."
                )
            pairs = zip(batches, targets or [()] * len(batches), strict=True)
            return bnn.predict(
                [((x, y),) for x, y in pairs],
                draws,
                statistics="samples",
                function=lambda net, pair: function(
                    self._of_examples(called(net, *arguments(pair[0])), 1), *pair[1]
                ),
                generator=torch.Generator(source.device).set_state(state),
                # torch.vmap does not batch the noise of distributions.
                chunk_size=1 if samples else chunk_size,
            ).samples

        return Predictive(_Densities(evaluate, num_samples, seed, self.moment_samples))

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
        moment_samples: The number of these samples of each draw.
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(
        self, evaluate: Callable[..., Any], num_samples: int, seed: int, moment_samples: int
    ) -> None:
        self._evaluate, self._seed, self._moment_samples = evaluate, seed, moment_samples
        shapes: list[tuple[Size, Size]] = []

        def note(d: Distribution) -> Tensor:
            shapes.append((d.batch_shape, d.event_shape))
            return torch.zeros(d.batch_shape)

        evaluate(note, 1, samples=True)
        self._sizes = [batch[0] for batch, _ in shapes]
        super().__init__(Size([num_samples, sum(self._sizes)]), shapes[0][1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        targets = [(part,) for part in value.split(self._sizes)]
        log_prob: Tensor = self._evaluate(
            lambda d, y: d.log_prob(y), samples=False, targets=targets
        )
        return log_prob

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        sample_shape = Size(sample_shape)
        dims = len(sample_shape)
        samples: Tensor = self._evaluate(
            lambda d: d.sample(sample_shape).movedim(dims, 0), samples=True
        )
        return samples.movedim((0, 1), (dims, dims + 1))

    @property
    def mean(self) -> Tensor:
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        count = self._moment_samples

        def moments(d: Distribution) -> tuple[Tensor, Tensor]:
            variance, mean = torch.var_mean(d.sample(Size([count])), 0)
            return mean, variance

        with seeded(self._seed):
            means, variances = self._evaluate(moments, samples=True)
        # Means of samples spread by the noise of the samples too: shrink them by as much.
        mean, spread = means.mean(0), means.var(0, correction=0)
        excess = variances.mean(0) / count * (1 - 1 / len(means))
        share = ((spread - excess) / spread).nan_to_num(nan=0.0).clamp_min(0)
        return mean + share.sqrt() * (means - mean), variances
