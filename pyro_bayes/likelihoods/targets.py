"""What a target must be, for a distribution with one entry per example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, constraints

_DISCRETE = constraints.boolean, constraints.nonnegative_integer
_LABELS = "class labels"
_NO_LABEL = -100, -1, 255  # what libraries let stand for it


def elementary(distribution: Distribution) -> Distribution:
    """Returns the distribution of single elements, behind what declares dimensions independent."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def fit_target(y: Any, distribution: Distribution) -> Tensor:
    r"""Checks a target, and returns it as a distribution takes it.

    Arguments:
        y: The target.
        distribution: The distribution, of batch shape :math:`(B)` or :math:`(S, B)`.

    Returns:
        The target, with labels as 64-bit integers and all else in the distribution's dtype.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it does not have one target per example, is on another device, or has a dtype
            or values that the distribution does not have.

    Example:
        >>> labels = Categorical(logits=torch.zeros(2, 3))
        >>> fit_target(torch.tensor([0, 3]), labels)
        Traceback (most recent call last):
        ...
        ValueError: Expected y to hold class labels, integers from 0 to 2; got 3 at index (1,).
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"Expected y to be a tensor; got {type(y).__name__}.")
    target: Tensor = y
    _check_shape(target, distribution)
    element, domain = elementary(distribution), domain_of(distribution)
    words = _words(element, domain)
    _check_dtype("y", target, element, domain)
    parameters = (v for v in vars(element).values() if isinstance(v, Tensor))
    parameter = next((v for v in parameters if v.is_floating_point()), None)
    if parameter is not None and parameter.device != y.device:
        raise ValueError(
            f"Expected y on {parameter.device}, as the network's output; got it on {y.device}."
        )
    if isinstance(element, Categorical):
        target = y.long()
    elif parameter is not None:
        target = y.to(parameter.dtype)
    check_values("y", target, words, domain)
    return target


def labelled(y: Tensor, distribution: Distribution) -> Tensor | None:
    """Returns which elements of a target have a label, or `None` if all must.

    Arguments:
        y: The target.
        distribution: The distribution.
    """
    ignored = getattr(elementary(distribution), "ignore_index", None)
    return None if ignored is None else y != ignored


def check_labels(name: str, y: Tensor, distribution: Distribution) -> None:
    """Raises a `ValueError` unless labels or counts are such as a distribution has.

    Real numbers pass.

    Arguments:
        name: What the targets are called.
        y: The targets, of any number of examples.
        distribution: The distribution of others.
    """
    element, domain = elementary(distribution), domain_of(distribution)
    if isinstance(element, Categorical) or domain in _DISCRETE:
        _check_dtype(name, y, element, domain)
        check_values(name, y, _words(element, domain), domain)


def _check_dtype(
    name: str, y: Tensor, element: Distribution, domain: constraints.Constraint | None
) -> None:
    if isinstance(element, Categorical):
        fits, fix = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool), "long"
    else:
        discrete = domain is not None and domain.is_discrete
        fits, fix = not y.is_complex() and (discrete or y.is_floating_point()), "float"
    if not fits:
        words = _words(element, domain)
        raise ValueError(f"Expected {name} to hold {words}; got {y.dtype}. Pass y.{fix}().")


def check_values(
    name: str, value: Tensor, words: str, domain: constraints.Constraint | None = None
) -> None:
    """Raises a `ValueError` unless all of a tensor is finite and within a domain.

    Arguments:
        name: What the tensor is called.
        value: The tensor.
        words: What it has to hold.
        domain: The constraint on its elements, if there is one.
    """
    if torch.compiler.is_compiling() or (
        value.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return  # a branch on values would break the graph
    fits = value.isfinite() if domain is None else value.isfinite() & domain.check(value)
    if not fits.all():
        index = tuple((~fits).nonzero()[0].tolist())
        number = value[index].item()
        fix = ""
        if words.startswith(_LABELS) and number in _NO_LABEL:
            fix = f" If that stands for no label, say Categorical(ignore_index={number})."
        raise ValueError(f"Expected {name} to hold {words}; got {number:g} at index {index}.{fix}")


def _check_shape(y: Tensor, distribution: Distribution) -> None:
    expected = distribution.batch_shape[-1:] + distribution.event_shape
    if y.shape == expected:
        return
    element = elementary(distribution)
    logits = element.logits if isinstance(element, Categorical) else None
    fix = ""
    if y.shape == (*expected, 1):
        fix = " Pass y.squeeze(-1)."
    elif expected == (*y.shape, 1):
        fix = " Squeeze the output, as in output.squeeze(-1), or pass y.unsqueeze(-1)."
    elif y.dim() > 0 and y.shape[1:] == expected[1:]:
        fix = " Both have one row per example."
    elif logits is not None and y.shape == (*expected, logits.shape[-1]):
        fix = " Pass labels, as in y.argmax(-1), instead of one-hot vectors."
    elif logits is not None and y.dim() > 1 and y.shape == logits.movedim(1, -1).shape[:-1]:
        fix = " Put the classes of the output last, as in output.movedim(1, -1)."
    raise ValueError(
        f"Expected y of the shape {tuple(expected)}, which the output has one distribution for"
        f" each element of; got {tuple(y.shape)}.{fix}"
    )


def domain_of(distribution: Distribution) -> constraints.Constraint | None:
    """Returns the constraint on single elements of a target, if the distribution says one."""
    try:
        domain = distribution.support
    except NotImplementedError:  # as flows
        return None
    while isinstance(domain, constraints.independent):
        domain = domain.base_constraint
    return domain


def _words(element: Distribution, domain: constraints.Constraint | None) -> str:
    if isinstance(element, Categorical):
        ignored = getattr(element, "ignore_index", None)
        others = "" if ignored is None else f", or {ignored} for none"
        return f"{_LABELS}, integers from 0 to {element.logits.shape[-1] - 1}{others}"
    if domain is constraints.boolean:
        return "0 or 1"
    if domain is constraints.nonnegative_integer:
        return "counts, integers from 0"
    return "finite real numbers" if domain in (None, constraints.real) else f"{domain}"
