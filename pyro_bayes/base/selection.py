"""From glob patterns to parameter names: which parameters of a base are Bayesian."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from pyro_bayes.base import ownership

_WILDCARDS = {"**": r"[A-Za-z0-9_.]+", "*": r"[A-Za-z0-9_]+"}
_LEGAL = re.compile(r"[A-Za-z0-9_.*-]")
_FROZEN = "frozen, not named"


@dataclass(frozen=True)
class Choice:
    """What selection decided about one parameter of the base.

    Arguments:
        name: The dotted name, the first one if modules share the parameter.
        aliases: The further names of a shared (tied) parameter.
        included: Whether the parameter is Bayesian.
        reason: The pattern that decided, or why no pattern could.
    """

    name: str
    aliases: tuple[str, ...]
    included: bool
    reason: str


def select(
    base: nn.Module,
    include_params: str | Sequence[str],
    exclude_params: str | Sequence[str],
    *,
    frozen: bool = False,
) -> list[Choice]:
    r"""Decides for each parameter of the base whether it is included.

    A pattern matches every name that starts with it: `"fc1"` matches `fc1.weight`, and `fc10.bias`
    too. In a pattern, `*` stands for `[A-Za-z0-9_]+` and `**` for `[A-Za-z0-9_.]+`; any other
    character stands for itself. Neither wildcard crosses a `-` or another special character of a
    module's name: write it literally, as in `"block-1.*"`. A tied parameter is included or
    excluded under any of its names. A frozen parameter (`requires_grad=False`) is included only if
    a pattern other than `""` matches it. Integer and complex parameters always stay deterministic.

    Arguments:
        base: The module that owns the parameters.
        include_params: One pattern or several.
        exclude_params: One pattern or several; they win over those that include.
        frozen: Whether `""` includes frozen parameters, too.

    Returns:
        One choice per distinct parameter, in the order of `base.named_parameters()`.

    Raises:
        TypeError: If the patterns are not strings.
        ValueError: If a pattern holds an illegal character, an include pattern matches nothing,
            nothing is included, or the base is lazy and not yet initialised.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [c.name for c in select(net, "2.*", "*.bias") if c.included]
        ['2.weight']
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ValueError(
                f"Expected an initialised base; got the lazy parameter '{name}', which has no shape"
                " yet. Run one forward pass of the base first."
            )
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter

    if not names:
        raise ValueError(f"Expected a base with parameters; got {type(base).__name__} without any.")
    every = [name for aliases in names.values() for name in aliases]
    include = _compile_all("include_params", include_params, every)
    exclude = _compile_all("exclude_params", exclude_params, every)
    for pattern, regex in include.items():
        if not any(map(regex.fullmatch, every)):
            raise ValueError(
                f"Expected every pattern of include_params to match a parameter; got {pattern!r},"
                f" which matches none. {_closest(pattern, every)}"
            )
    for pattern, regex in exclude.items():
        if not any(map(regex.fullmatch, every)):
            warnings.warn(
                f"The pattern {pattern!r} of exclude_params matches no parameter."
                f" {_closest(pattern, every)}",
                stacklevel=3,
            )

    choices = []
    trains = ownership.trained([*parameters.values()])
    for (key, aliases), free in zip(names.items(), trains, strict=True):
        included, reason = _decide(parameters[key], aliases, include, exclude, frozen or free)
        choices.append(Choice(aliases[0], tuple(aliases[1:]), included, reason))
    if not any(choice.included for choice in choices):
        reasons = ", ".join(f"{c.name}: {c.reason}" for c in choices[:5])
        raise ValueError(
            "Expected at least one included parameter; got none"
            f" from include_params={include_params!r}, exclude_params={exclude_params!r}"
            f" on {type(base).__name__} ({reasons}). {_advice(choices)}"
        )
    return choices


def first_matches(
    argument: str, patterns: Sequence[str], names: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Finds the first of several patterns that each parameter matches, as in :func:`select`.

    Arguments:
        argument: The name of the argument that the patterns are of, for messages.
        patterns: The patterns.
        names: All names of each parameter by its first one.

    Returns:
        The patterns by the parameters' first names.

    Raises:
        TypeError: If the patterns are not strings.
        ValueError: If a pattern holds an illegal character, a pattern is the first match of no
            parameter, or a parameter matches none.

    Example:
        >>> names = {"0.weight": ["0.weight"], "0.bias": ["0.bias"]}
        >>> first_matches("prior_var", ["*.bias", ""], names)
        {'0.weight': '', '0.bias': '*.bias'}
    """
    every = [name for aliases in names.values() for name in aliases]
    compiled = _compile_all(argument, patterns, every)
    first = {}
    for name, aliases in names.items():
        pattern = _first_match(compiled, aliases)
        if pattern is None:
            raise ValueError(
                f"Expected {argument} to have a pattern for each included parameter; got none that"
                f" matches {name!r}. The pattern '' matches all: put it last."
            )
        first[name] = pattern
    for pattern in patterns:
        if pattern not in first.values():
            shadowed = any(map(compiled[pattern].fullmatch, every))
            raise ValueError(
                f"Expected every pattern of {argument} to be the first that matches some included"
                f" parameter; got {pattern!r}, "
                + (
                    "all of whose parameters others match before it. Put it before wider ones."
                    if shadowed
                    else f"which matches none. {_closest(pattern, every)}"
                )
            )
    return first


def _decide(
    parameter: nn.Parameter,
    names: Sequence[str],
    include: dict[str, re.Pattern[str]],
    exclude: dict[str, re.Pattern[str]],
    trains: bool,
) -> tuple[bool, str]:
    if not parameter.is_floating_point():
        kind = "complex" if parameter.is_complex() else "integer"
        return False, f"{kind} ({parameter.dtype}) stays deterministic"
    named = {pattern: regex for pattern, regex in include.items() if pattern or trains}
    included = _first_match(named, names)
    excluded = _first_match(exclude, names)
    if included is None:
        return False, "no include pattern" if len(named) == len(include) else _FROZEN
    if excluded is not None:
        return False, f"excluded by {excluded!r}"
    return True, repr(included) if included else "every name"


def _advice(choices: Sequence[Choice]) -> str:
    frozen = [choice.name for choice in choices if choice.reason == _FROZEN]
    if not frozen:
        return "Widen include_params or narrow exclude_params."
    return (
        "Parameters with requires_grad=False stay deterministic: name them, as in"
        f" include_params={frozen[0]!r}, or call base.requires_grad_() before you wrap the base."
    )


def _first_match(patterns: dict[str, re.Pattern[str]], names: Iterable[str]) -> str | None:
    return next((p for p, regex in patterns.items() if any(map(regex.fullmatch, names))), None)


def _compile_all(
    argument: str, patterns: str | Sequence[str], names: Sequence[str]
) -> dict[str, re.Pattern[str]]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in (*patterns,)):
        raise TypeError(
            f"Expected {argument} to be a pattern or a sequence of patterns; got {patterns!r}."
        )
    literal = set("".join(names))
    for pattern in patterns:
        illegal = sorted({c for c in pattern if not _LEGAL.match(c)} - literal)
        if illegal:
            raise ValueError(
                f"Expected a pattern of letters, digits, '_', '.', '-', '*' and '**' in {argument};"
                f" got {pattern!r} with {', '.join(map(repr, illegal))}. Patterns are prefixes with"
                " wildcards, not regular expressions."
            )
    return {pattern: _compile(pattern) for pattern in patterns}


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    regex = "".join(_WILDCARDS.get(part, re.escape(part)) for part in parts)
    return re.compile(regex + ".*", re.DOTALL)


def _closest(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"The closest parameter names are {', '.join(map(repr, close))}." if close else ""
