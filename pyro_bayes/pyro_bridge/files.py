"""What the file of a model must say, and what it leaves out."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from pyro_bayes.posterior.rounding import is_low


def check_whole(state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Says so if a state dict is that of an objective, or lacks what a likelihood learned.

    Arguments:
        state: The state dict.
        prefix: What stands in front of its names.
        metadata: What the model noted when it was saved.

    Raises:
        RuntimeError: If it is that of an objective.

    Warns:
        UserWarning: If the likelihood that the model was trained with learned something.
    """
    if any(key.startswith(f"{prefix}model.guide.") for key in state):
        raise RuntimeError(
            "Expected the state of a model; got that of an objective, which has the likelihood's"
            " too. Load it into one: objective.load_state_dict(state), after"
            " objective = ELBO(bnn, likelihood, num_data)."
        )
    learned = metadata.get("learned_beside")
    if learned and not prefix:
        warnings.warn(
            "Expected what the likelihood learned beside the model; got the state of the model"
            f" alone, without the likelihood's {learned}. Save and load the objective,"
            " objective.state_dict(), or the likelihood as well, likelihood.state_dict().",
            stacklevel=7,
        )


def keep_half(state: dict[str, Any], prefix: str, base: nn.Module) -> None:
    """Converts what would bring half precision into a base, or out of it, where it is assigned.

    The posterior is in single precision beside it, so that a file does not tell the base's dtypes.

    Arguments:
        state: The state dict.
        prefix: What stands in front of the base's names.
        base: The base.
    """
    for name, present in (*base.named_parameters(remove_duplicate=False), *base.named_buffers()):
        value = state.get(prefix + name)
        if not isinstance(value, Tensor) or value.dtype == present.dtype:
            continue
        floating = value.is_floating_point() and present.is_floating_point()
        if floating and (is_low(value.dtype) or is_low(present.dtype)):
            converted = value.detach().to(present.dtype)
            if isinstance(value, nn.Parameter):
                converted = nn.Parameter(converted, requires_grad=value.requires_grad)
            state[prefix + name] = converted
