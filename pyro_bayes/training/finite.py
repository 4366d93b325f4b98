"""What to say when numbers cease to be finite: where it began."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pyro_bayes.base.checks import is_finite
from pyro_bayes.training.objective import ELBO


def check_parameters(objective: ELBO, when: str, file: str = "") -> None:
    """Raises a `FloatingPointError` unless all parameters and the divergence are finite.

    Arguments:
        objective: The objective.
        when: When this is, for the message.
        file: What to say about checkpoints.
    """
    for name, value in _named(objective, lambda p: p.detach()):
        if not is_finite(value):
            raise FloatingPointError(
                f"Expected finite parameters {when}; got others, of which '{name}' is the first."
                f" {_ADVICE}{file}"
            )
    model = objective.model
    with torch.no_grad():
        divergences = model.kl_divergences()
    for name, kl in divergences.items():
        if not is_finite(kl):
            raise FloatingPointError(
                f"Expected a finite KL divergence {when}; got others, of which that of '{name}' is"
                f" the first. {_ADVICE}{file}"
            )


def check_step(
    objective: ELBO, loss: float, gradients: Sequence[Tensor], when: str, file: str
) -> None:
    """Raises a `FloatingPointError` unless a loss and its gradients are finite.

    Arguments:
        objective: The objective, with the gradients of the step.
        loss: The loss.
        gradients: The gradients.
        when: When this is, for the message.
        file: What to say about checkpoints.
    """
    if not math.isfinite(loss):
        check_parameters(objective, when, file)
        what = f"a loss of {loss}"
        where = "It arises in the network or the likelihood: data and parameters are finite."
    elif torch.isfinite(get_total_norm(gradients)) or all(map(is_finite, gradients)):
        return
    else:
        names = (name for name, value in _named(objective, _gradient) if not is_finite(value))
        what = "a gradient that is not"
        where = f"The first parameter with such a gradient is '{next(names)}'."
    raise FloatingPointError(
        f"Expected a finite loss and gradient {when}; got {what}. {where} The step was not taken:"
        f" parameters and buffers are as the step before left them. {_ADVICE}{file}"
    )


def _named(
    objective: ELBO, value: Callable[[nn.Parameter], Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """Returns a value of each parameter, in the parts that flat parameters consist of."""
    for name, parameter in objective.named_parameters():
        own = value(parameter)
        if own is not None:
            yield from objective.parts(name, own).items()


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


_ADVICE = "A lower learning rate often helps."
