"""One pass over batches, which all meet the same draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count, check_generator
from pyro_bayes.base.state import draw_seed
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import fit_target
from pyro_bayes.prediction.batches import Batches, EmptyLoaderError, each_batch
from pyro_bayes.prediction.predict import Predictor

Records = dict[str, Tensor]
"""Tensors by name, whose second dimension counts examples."""


class Draws:
    """Draws from the posterior of a model, the same for all batches.

    Arguments:
        bnn: The model.
        num_samples: The number :math:`S` of draws, at least 2.
        chunk_size: How many draws to evaluate at once.
        generator: Where the seeds come from, torch's global generator if there is none.

    Attributes:
        noise: A generator, on the CPU, of what is random beside the draws.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `num_samples` is out of range.
    """

    def __init__(
        self,
        bnn: Predictor,
        num_samples: int,
        *,
        chunk_size: int | None,
        generator: torch.Generator | None,
    ) -> None:
        if not isinstance(bnn, Predictor):
            raise TypeError(f"Expected bnn to be a BayesianModel; got {type(bnn).__name__}.")
        check_generator(generator)
        check_count("num_samples", num_samples, least=2)
        self._bnn, self._num_samples, self._chunk_size = bnn, num_samples, chunk_size
        self._device = next(bnn.parameters()).device
        self._seed = draw_seed(generator)
        self.noise = torch.Generator().manual_seed(draw_seed(generator))

    def generator(self) -> torch.Generator:
        """Returns a generator from which a prediction gets these draws."""
        return torch.Generator().manual_seed(self._seed)

    def of_pairs(
        self, likelihood: Likelihood, loader: Iterable[Any]
    ) -> Iterator[tuple[Predictive, Tensor]]:
        """Predicts the batches of a loader.

        Arguments:
            likelihood: The likelihood.
            loader: The batches, pairs (x, y).

        Yields:
            The predictive distribution and the targets of each batch.

        Raises:
            TypeError: If there is something else in it.
            ValueError: If it is empty, or something in it is not finite.
        """
        for x, y in Batches(loader, name="loader", num_data=None, device=self._device):
            yield self._predict(likelihood, x), y

    def of_inputs(self, likelihood: Likelihood, ood: Iterable[Any]) -> Iterator[Predictive]:
        """Predicts batches whose targets do not matter.

        Arguments:
            likelihood: The likelihood.
            ood: The batches, of pairs (x, y) or of x.

        Yields:
            The predictive distribution of each batch.

        Raises:
            TypeError: If they are not batches.
            ValueError: If there is none, or one has more than two parts.
        """
        for x in each_batch(ood, name="ood", device=self._device):
            yield self._predict(likelihood, x)

    def _predict(self, likelihood: Likelihood, x: Any) -> Predictive:
        return likelihood.predictive(
            self._bnn,
            x,
            self._num_samples,
            generator=self.generator(),
            chunk_size=self._chunk_size,
        )


def log_probs(predictive: Predictive, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores targets under each draw.

    Arguments:
        predictive: The predictive distribution.
        y: The targets, of shape :math:`(B, *)`.

    Returns:
        The targets as the distribution takes them, and the log-densities or log-probabilities, of
        shape :math:`(S, B)`.

    Raises:
        ValueError: If a target does not fit, or a log-density is not a number.
    """
    y = fit_target(y, predictive.mixture)
    log_prob = predictive.mixture.log_prob(y)
    if log_prob.isnan().any():
        raise ValueError(
            "Expected predictions that are numbers; got nan for example"
            f" {int(log_prob.isnan().nonzero()[0, 1])}. Are the parameters of model and likelihood"
            " finite?"
        )
    return y, log_prob


def joined(name: str, batches: Iterable[Records]) -> Records:
    """Joins what is known about the examples of each batch, on the CPU.

    Arguments:
        name: What messages call the loader.
        batches: The records of each batch.

    Raises:
        ValueError: If there is no batch. Other errors of this type are raised again, with the batch
            in their message.
    """
    parts: list[Records] = []
    iterator = iter(batches)
    while True:
        try:
            part = next(iterator)
        except StopIteration:
            break
        except EmptyLoaderError:
            raise
        except ValueError as error:
            raise ValueError(f"{error} (This is batch {len(parts)} of {name}.)") from error
        parts.append({key: record.cpu() for key, record in part.items()})
    return {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}
