"""From what a user gives as `prior=` or `prior_var=` to the prior of each parameter."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bayes.base.checks import check_prior_var
from pyro_bayes.base.selection import Choice, first_matches
from pyro_bayes.priors.distribution import DistributionPrior, prior_of_distribution
from pyro_bayes.priors.empirical import Empirical
from pyro_bayes.priors.gaussian import FormerPosterior, Gaussian, check_range
from pyro_bayes.priors.hierarchical import Hierarchical, HierarchicalPrior, Horseshoe
from pyro_bayes.priors.parameter import NormalPrior, ParameterPrior
from pyro_bayes.priors.priors import Priors
from pyro_bayes.priors.scale_mixture import ScaleMixture

_SAME_FOR_ALL = Hierarchical, Horseshoe, ScaleMixture

PriorVar: TypeAlias = "float | str | Empirical | Mapping[str, float | str | Empirical]"
"""What a user may give as a variance of the prior."""


@runtime_checkable
class Specification(Protocol):
    """What makes the prior of any parameter, such as :class:`~pyro_bayes.priors.Gaussian`."""

    def of(self, name: str, parameter: Tensor) -> ParameterPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.
        """


OnePrior: TypeAlias = "Distribution | Specification | Callable[[str, Tensor], Any]"
PriorLike: TypeAlias = "OnePrior | Mapping[str, OnePrior]"
"""What a user may give as a prior."""


def choose_priors(
    prior: Any, prior_var: Any, choices: Sequence[Choice], parameters: Mapping[str, Tensor]
) -> Priors:
    """Returns the priors for the arguments that a user gave.

    Arguments:
        prior: The prior, or priors by pattern.
        prior_var: The variance, or variances by pattern; 1 if neither is given.
        choices: What selection decided about each parameter of the base.
        parameters: The included parameters by name, or tensors of their shapes and dtypes.

    Raises:
        TypeError: If a pattern is not a string, or a prior is none.
        ValueError: If both are given, a value is out of range, a pattern matches nothing, a
            parameter has no pattern, or a prior does not fit its parameter.
    """
    if prior is not None and prior_var is not None:
        raise ValueError(
            "Expected prior or prior_var, which is the short form of"
            f" prior=priors.Gaussian(var=…); got both: {prior!r} and {prior_var!r}."
        )
    names = {c.name: (c.name, *c.aliases) for c in choices if c.included}
    argument = "prior_var" if prior is None else "prior"
    given = (1.0 if prior_var is None else prior_var) if prior is None else prior
    if isinstance(given, Mapping):
        patterns = first_matches(argument, tuple(given), names)
        own = {name: given[pattern] for name, pattern in patterns.items()}
    else:
        own = dict.fromkeys(names, given)
    if prior is None:
        return Priors({n: _of_variance(n, parameters[n], value) for n, value in own.items()})
    _check_former(own)
    rules = {n: prior_of(n, parameters[n], value) for n, value in own.items()}
    groups = {id(value): number for number, value in enumerate(own.values())}
    for name, rule in rules.items():
        alike = isinstance(rule, DistributionPrior) and rule.is_alike
        # What others make may depend on the name, as a former posterior's new parameters do.
        value = own[name]
        is_one = isinstance(value, Distribution) or type(value) in _SAME_FOR_ALL
        if is_one and (alike or isinstance(rule, HierarchicalPrior)):
            rule.group = groups[id(value)]
    return Priors(rules)


def prior_of(name: str, parameter: Tensor, value: Any) -> ParameterPrior:
    """Returns the prior of one parameter for what a user gave.

    Arguments:
        name: The dotted name of the parameter.
        parameter: The parameter.
        value: A distribution, a specification, or a function of name and parameter.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it does not fit the parameter.
    """
    if isinstance(value, Empirical) or (isinstance(value, str) and value == "empirical"):
        value = Gaussian(Empirical() if isinstance(value, str) else value)
    if isinstance(value, Distribution):
        return prior_of_distribution(name, parameter, value)
    if isinstance(value, Specification) and not isinstance(value, type):
        return value.of(name, parameter)
    check_kind("prior", value, f", for '{name}'")
    return prior_of(name, parameter, _called(value, name, parameter))


def check_kind(argument: str, value: Any, place: str = "") -> None:
    """Raises a `TypeError` unless a value may be the prior of one parameter.

    Arguments:
        argument: The name of the argument that it is.
        value: The value.
        place: What messages say of the parameter.
    """
    is_kind = isinstance(value, Distribution | Specification | Empirical) or callable(value)
    is_kind = is_kind and not isinstance(value, type | nn.Module)
    if is_kind or (isinstance(value, str) and value == "empirical"):
        return
    got, advice = repr(value), "A variance is prior_var=… or priors.Gaussian(var=…)."
    if isinstance(value, type):
        got = f"{value.__name__}, a class"
    elif isinstance(value, nn.Module):
        got = f"{type(value).__name__}, a module"
        advice = "The posterior of another model is prior=former.as_prior()."
    raise TypeError(
        f"Expected {argument} to be a distribution such as dist.Laplace(0.0, 0.1), a function of"
        f" name and parameter that returns one, or a prior of pyro_bayes.priors{place}; got {got}."
        f" {advice}"
    )


def _called(function: Callable[[str, Tensor], Any], name: str, parameter: Tensor) -> Any:
    with contextlib.suppress(ValueError):  # some builtins tell no signature
        try:
            inspect.signature(function).bind(name, parameter)
        except TypeError as error:
            label = getattr(function, "__name__", type(function).__name__)
            raise TypeError(
                f"Expected prior to be a function of name and parameter; got {label}: {error}."
                " The scalings are functions that return one: prior=priors.fan_in()."
            ) from error
    value = function(name, parameter)
    if callable(value) and not isinstance(value, Distribution | Specification):
        raise TypeError(
            f"Expected the prior's function to return a distribution for '{name}'; got {value!r}."
        )
    return value


def _of_variance(name: str, parameter: Tensor, value: Any) -> NormalPrior:
    if isinstance(value, Empirical) or (isinstance(value, str) and value == "empirical"):
        return Gaussian(Empirical() if isinstance(value, str) else value).of(name, parameter)
    check_prior_var(value)
    check_range("prior_var", name, float(value), parameter.dtype)
    return NormalPrior(name, parameter.shape, float(value))


def _check_former(own: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if a former posterior has none of the parameters it is to have."""
    for former in {id(v): v for v in own.values() if isinstance(v, FormerPosterior)}.values():
        names = [name for name, value in own.items() if value is former]
        if not any(name in former for name in names):
            raise ValueError(
                "Expected the former posterior to have some of the parameters that it is the prior"
                f" of, {names[:3]}…; got none of these names but {former.names[:3]}…. Wrap modules"
                " that name their parameters alike."
            )
