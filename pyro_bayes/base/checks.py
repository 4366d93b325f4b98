"""What arguments must be."""

from __future__ import annotations

import math
from collections.abc import Iterable
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


def is_level(value: Any) -> bool:
    """Returns whether an argument is a number between 0 and 1, the ends excluded."""
    return is_number(value) and 0 < value < 1


def is_positive(value: Any) -> bool:
    """Returns whether an argument is a positive, finite number."""
    return is_number(value) and 0 < value < math.inf


def check_type(name: str, value: Any, kind: type) -> None:
    """Raises a `TypeError` unless an argument is of a type.

    Arguments:
        name: The name of the argument, as in all functions here.
        value: The argument.
        kind: The type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be a {kind.__name__}; got {type(value).__name__}.")


def check_generator(generator: Any) -> None:
    """Raises a `TypeError` unless an argument is a generator of random numbers or `None`.

    Arguments:
        generator: The argument.
    """
    if generator is not None:
        check_type("generator", generator, torch.Generator)


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raises a `ValueError` unless an argument is an integer, and large enough.

    Arguments:
        name: The name of the argument.
        value: The argument.
        least: The least integer.
    """
    if not is_count(value, least=least):
        raise ValueError(f"Expected {name} to be an integer of at least {least}; got {value!r}.")


def check_level(name: str, value: Any) -> None:
    """Raises a `ValueError` unless an argument is a number between 0 and 1.

    Arguments:
        name: The name of the argument.
        value: The argument.
    """
    if not is_level(value):
        raise ValueError(f"Expected {name} to be a number between 0 and 1; got {value!r}.")


def check_levels(name: str, values: Any, *, least: int = 0) -> tuple[float, ...]:
    """Returns numbers between 0 and 1 as a tuple.

    Arguments:
        name: The name of the argument.
        values: One number, or several.
        least: The least number of numbers.

    Raises:
        ValueError: If one of them is no such number, or there are too few.
    """
    levels = tuple(values) if isinstance(values, Iterable) else (values,)
    if len(levels) < least or not all(map(is_level, levels)):
        raise ValueError(f"Expected {name} to be numbers between 0 and 1; got {values!r}.")
    return tuple(map(float, levels))


def check_positive(name: str, value: Any) -> None:
    """Raises a `ValueError` unless an argument is a positive, finite number.

    Arguments:
        name: The name of the argument.
        value: The argument.
    """
    if not is_positive(value):
        raise ValueError(f"Expected {name} to be positive and finite; got {value!r}.")


def check_prior_var(prior_var: Any) -> None:
    """Raises a `ValueError` unless an argument is a variance."""
    if not is_positive(prior_var):
        raise ValueError(
            "Expected prior_var to be a positive, finite number or 'empirical', or a mapping from"
            f" patterns to these; got {prior_var!r}. Tensors and distributions are given as prior=…"
        )


def is_finite(values: Tensor) -> bool:
    """Returns whether all numbers of a tensor are finite.

    Arguments:
        values: The tensor.
    """
    values = values.detach()
    # A sum is many times faster; where it is not finite, it may have overflown.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(name: str, value: Any) -> None:
    """Raises a `ValueError` unless a tensor's numbers are finite; other values pass.

    Arguments:
        name: What messages call it.
        value: The tensor.

    Example:
        >>> check_finite("x", torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        ...
        ValueError: Expected x to be finite; got nan at [1].
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return
    if not is_finite(value):
        place = (~torch.isfinite(value)).nonzero()[0]
        raise ValueError(
            f"Expected {name} to be finite; got {value[tuple(place)].item()} at {place.tolist()}."
        )


def check_batch(size: int, num_data: int) -> None:
    """Raises a `ValueError` if a batch has more examples than there are.

    Arguments:
        size: The number of examples in the batch.
        num_data: The number of examples there are.
    """
    if size > num_data:
        raise ValueError(
            "Expected num_data to be the number of examples in the whole training set; got"
            f" {num_data} and a batch of {size} examples."
        )
