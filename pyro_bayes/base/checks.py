"""What arguments must be."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def check_base(base: Any, bayesian: type[nn.Module]) -> None:
    """Raises a `TypeError` unless a base can be made Bayesian.

    Arguments:
        base: The base.
        bayesian: The class of modules that are Bayesian already.
    """
    if not isinstance(base, nn.Module):
        raise TypeError(f"Expected base to be an nn.Module; got {type(base).__name__}.")
    for name, module in base.named_modules():
        where = f"'{name}' in it" if name else "it"
        if isinstance(module, bayesian):
            raise TypeError(
                f"Expected a base whose parameters are not Bayesian yet; got {where}, a"
                f" {type(module).__name__}. Wrap its own base, or use the two side by side."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"Expected a base in Python; got {where}, a {type(module).__name__}, whose"
                " parameters TorchScript has fixed. Wrap the module before scripting it."
            )


def is_number(value: Any) -> bool:
    """Returns whether an argument is a real number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any, *, least: int = 1) -> bool:
    """Returns whether an argument is an integer, and large enough."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_prior_var(prior_var: Any) -> None:
    """Raises a `ValueError` unless an argument is a variance."""
    if not is_number(prior_var) or not 0 < prior_var < math.inf:
        raise ValueError(
            "Expected prior_var to be a positive, finite number or 'empirical', or a mapping from"
            f" patterns to these; got {prior_var!r}."
        )


def is_finite(values: Tensor) -> bool:
    """Returns whether all numbers of a tensor are finite.

    Arguments:
        values: The tensor.
    """
    values = values.detach()
    # A sum is many times faster; where it is not finite, it may have overflown.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_batch(size: int, num_data: int) -> None:
    """Raises a `ValueError` if a batch has more examples than there are."""
    if size > num_data:
        raise ValueError(
            "Expected num_data to be the number of examples in the whole training set; got"
            f" {num_data} and a batch of {size} examples."
        )
