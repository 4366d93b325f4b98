"""What arguments must be."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn


def check_base(base: Any) -> None:
    """Raises a `TypeError` unless a base can be made Bayesian."""
    from pyro_bayes.tied import TiedModule  # which has a prior, which checks its variances

    if not isinstance(base, nn.Module):
        raise TypeError(f"Expected base to be an nn.Module; got {type(base).__name__}.")
    for name, module in base.named_modules():
        where = f"'{name}' in it" if name else "it"
        if isinstance(module, TiedModule):
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
