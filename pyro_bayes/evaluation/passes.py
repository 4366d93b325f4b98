"""One pass over batches, which all meet the same draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyro_bayes.base.checks import is_count
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import fit_target
from pyro_bayes.model import BayesianModel
from pyro_bayes.prediction.batches import Batches

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
        bnn: BayesianModel,
        num_samples: int,
        *,
        chunk_size: int | None,
        generator: torch.Generator | None,
    ) -> None:
        check_type("bnn", bnn, BayesianModel)
        if generator is not None:
            check_type("generator", generator, torch.Generator)
        check_whole("num_samples", num_samples, least=2)
        self._bnn, self._num_samples, self._chunk_size = bnn, num_samples, chunk_size
        self._device = next(bnn.parameters()).device
        source = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (2,), generator=generator, device=source)
        self._seed, noise = seeds.tolist()
        self.noise = torch.Generator().manual_seed(noise)

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
        """
        if not isinstance(ood, Iterable) or isinstance(ood, Tensor | Mapping):
            raise TypeError(
                f"Expected ood to give batches, pairs (x, y) or x; got {type(ood).__name__}. Pass"
                " one batch in a list: ood=[x]."
            )
        for batch in ood:
            x = batch[0] if isinstance(batch, list | tuple) and len(batch) in (1, 2) else batch
            x = tuple(x) if type(x) is list else x
            yield self._predict(likelihood, tree_map_only(Tensor, self._moved, x))

    def _predict(self, likelihood: Likelihood, x: Any) -> Predictive:
        return likelihood.predictive(
            self._bnn,
            x,
            self._num_samples,
            generator=self.generator(),
            chunk_size=self._chunk_size,
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


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
    found = predictive.mixture.log_prob(y)
    if found.isnan().any():
        raise ValueError(
            "Expected predictions that are numbers; got nan for example"
            f" {int(found.isnan().nonzero()[0, 1])}. Are the parameters of model and likelihood"
            " finite?"
        )
    return y, found


def joined(name: str, batches: Iterable[Records]) -> Records:
    """Joins what is known about the examples of each batch, on the CPU.

    Arguments:
        name: What messages call the loader.
        batches: The records of each batch.

    Raises:
        ValueError: If there is no batch. Errors of this type are raised again, with the batch in
            their message.
    """
    parts: list[Records] = []
    iterator = iter(batches)
    while True:
        try:
            part = next(iterator)
        except StopIteration:
            break
        except ValueError as error:
            raise ValueError(f"{error} (This is batch {len(parts)} of {name}.)") from error
        parts.append({key: record.cpu() for key, record in part.items()})
    if not parts:
        raise ValueError(f"Expected {name} to have at least one batch; got none.")
    return {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Keeps a base in evaluation mode, and its gradients off, while the context is open.

    Arguments:
        base: The base.
    """
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def check_type(name: str, value: Any, kind: type) -> None:
    """Raises a `TypeError` unless an argument is of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be a {kind.__name__}; got {type(value).__name__}.")


def check_whole(name: str, value: Any, *, least: int) -> None:
    """Raises a `ValueError` unless an argument is an integer, and large enough."""
    if not is_count(value, least=least):
        raise ValueError(f"Expected {name} to be an integer of at least {least}; got {value!r}.")
