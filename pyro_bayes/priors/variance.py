"""The variances of the prior: numbers, or what the posterior itself makes most probable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_prior_var
from pyro_bayes.base.selection import Choice, first_matches
from pyro_bayes.posterior.draws import Precision, divergence
from pyro_bayes.posterior.layout import Flat, Layout

PriorVar: TypeAlias = "float | str | Empirical | Mapping[str, float | str | Empirical]"
"""What a user may give as a variance of the prior."""


@dataclass(frozen=True)
class Empirical:
    r"""The prior variance that maximises the ELBO, in closed form (empirical Bayes).

    .. math:: \sigma_p^2 = \frac{1}{n} \sum_i (\mu_i^2 + \sigma_i^2), \qquad
              D_{KL}(q \,\|\, p) = \frac{n}{2} \log \sigma_p^2 - \frac{1}{2} \sum_i \log \sigma_i^2

    The sums are over the :math:`n` elements of one tensor, or of each of its groups. It follows the
    posterior at every moment, so that nothing has to be updated, and no variance has to be
    chosen. The divergence is the least over all variances; so its gradient is that at a fixed
    :math:`\sigma_p^2`, and estimators that draw from the posterior take it as fixed.

    Pyro's sample sites have the variance of the moment at which the model runs. So SVI trains the
    same ELBO, a model that is run without a guide draws from the prior as the posterior has made
    it, and NUTS samples the posterior under that prior, which stays as it is meanwhile.

    Warning:
        A group that the data do not support is switched off: its means and deviations shrink
        together. With few or noisy data, that may be most of a network. Its ELBO is higher then,
        and its predictions may be worse than under `prior_var=1`, as on the UCI datasets in the
        benchmarks: compare on data held out. A group of few elements is hardly held by its prior.

    Arguments:
        each: The dimensions each of whose indices has a variance of its own, `()` for one variance
            per tensor. In the weight of a :class:`torch.nn.Linear`, 1 gives each input its own
            (automatic relevance determination), and 0 each output.

    References:
        | Deterministic Variational Inference for Robust Bayesian Neural Networks (Wu et al., 2019)
        | https://arxiv.org/abs/1810.03958

        | Bayesian Learning for Neural Networks (Neal, 1996)
        | https://doi.org/10.1007/978-1-4612-0745-0

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> net = torch.nn.Linear(3, 8)
        >>> bnn = BayesianModel(net, prior_var={"weight": Empirical(each=1), "bias": 1.0})
        >>> bnn.prior()["weight"].shape
        torch.Size([8, 3])
    """

    each: int | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        dims = (self.each,) if _is_dim(self.each) else self.each
        if not isinstance(dims, tuple | list) or not all(map(_is_dim, dims)):
            raise ValueError(
                f"Expected each to be a dimension or a tuple of dimensions; got {self.each!r}."
            )
        object.__setattr__(self, "each", tuple(dims))

    def check(self, name: str, shape: torch.Size) -> None:
        """Raises a `ValueError` unless a parameter has the dimensions."""
        for dim in self._dims:
            if not -len(shape) <= dim < len(shape):
                raise ValueError(
                    f"Expected prior_var to name dimensions that each parameter has; got"
                    f" each={dim} for '{name}' of shape {tuple(shape)}. Give parameters of other"
                    ' shapes another prior: prior_var={"*.weight": Empirical(each=1),'
                    ' "": "empirical"}.'
                )

    def variance(self, mean: Tensor, logvar: Tensor, fixed: Tensor | None = None) -> Tensor:
        r"""Computes :math:`\sigma_p^2`, of a shape that broadcasts to that of the parameter.

        It never falls below the least normal number of the dtype, where a logarithm ends.

        Arguments:
            mean: The means :math:`\mu`.
            logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
            fixed: Which elements are not random, and left out. Where all are, the variance is 1.
        """
        kept = {dim % mean.dim() for dim in self._dims}
        summed = tuple(dim for dim in range(mean.dim()) if dim not in kept)
        moments = torch.addcmul(logvar.exp(), mean, mean)
        if fixed is None:
            average = moments.mean(summed, keepdim=bool(kept)) if summed else moments
        else:
            moments, free = moments.masked_fill(fixed, 0.0), (~fixed).to(moments)
            if summed:
                moments, free = (t.sum(summed, keepdim=bool(kept)) for t in (moments, free))
            average = torch.where(free > 0, moments / free.clamp_min(1), 1.0)
        return average.clamp_min(torch.finfo(average.dtype).tiny)

    @property
    def _dims(self) -> tuple[int, ...]:
        return self.each if isinstance(self.each, tuple) else (self.each,)


class PriorVariances:
    r"""The variance :math:`\sigma_p^2` of each parameter's prior.

    Arguments:
        rules: A number or an :class:`Empirical` for each parameter by dotted name.

    Attributes:
        rules: The number or :class:`Empirical` of each parameter.

    Example:
        >>> str(PriorVariances({"weight": 0.5, "bias": 0.5}))
        '0.5'
    """

    def __init__(self, rules: Mapping[str, float | Empirical]) -> None:
        self.rules = dict(rules)
        self._posterior: Callable[[], Mapping[str, tuple[Tensor, Tensor]]] | None = None
        self._fixed: Callable[[str], Tensor | None] | None = None
        self._precisions: dict[Any, Precision] = {}

    def follow(
        self,
        posterior: Callable[[], Mapping[str, tuple[Tensor, Tensor]]],
        fixed: Callable[[str], Tensor | None] | None = None,
    ) -> None:
        r"""Tells empirical variances what to follow. Before, they are 1.

        Arguments:
            posterior: Returns the present :math:`\mu` and :math:`\log \sigma^2` by name.
            fixed: Returns which elements of a parameter carry no information, if any may.
        """
        if fixed or any(isinstance(rule, Empirical) for rule in self.rules.values()):
            self._posterior, self._fixed = posterior, fixed

    def fixed(self, name: str) -> Tensor | None:
        """Returns which elements of a parameter carry no information, if there are any."""
        return None if self._fixed is None else self._fixed(name)

    def mean(self, name: str) -> Tensor:
        """Returns the present mean of a parameter some elements of which are fixed."""
        if self._posterior is None:
            raise ValueError(f"Expected a posterior to follow; got none for '{name}'.")
        return self._posterior()[name][0].detach()

    @torch.no_grad()
    def present(self, name: str) -> float | Tensor:
        """Returns the present variance of one parameter, a number if it is fixed."""
        rule = self.rules[name]
        if not isinstance(rule, Empirical):
            return rule
        if self._posterior is None:
            return 1.0
        return rule.variance(*self._posterior()[name], self.fixed(name))

    def precision(self, posterior: Flat) -> Precision:
        r"""Returns :math:`1 / \sigma_p^2` of a posterior's elements, or what computes it.

        Arguments:
            posterior: The parameters of one dtype and device.

        Returns:
            A number if all have the same; a flat tensor if they are fixed; and else a function of
            the means and the log-variances that returns one.
        """
        layout, mean, _ = posterior
        key = (layout, mean.dtype, mean.device)
        if key not in self._precisions:
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves elsewhere too
                self._precisions[key] = self._precision(layout, mean.detach())
        return self._precisions[key]

    def _precision(self, layout: Layout, mean: Tensor) -> Precision:
        rules = [self.rules[name] for name in layout.names]
        if any(isinstance(rule, Empirical) for rule in rules):
            return partial(self._by_posterior, layout)
        if len(set(rules)) == 1:
            return 1 / rules[0]  # type: ignore[operator]
        return layout.spread(torch.tensor(rules, dtype=torch.double).reciprocal().to(mean))

    def _by_posterior(self, layout: Layout, mean: Tensor, logvar: Tensor) -> Tensor:
        pairs = zip(layout.split(mean), layout.split(logvar), strict=True)
        precisions = []
        for name, (m, v) in zip(layout.names, pairs, strict=True):
            rule = self.rules[name]
            if isinstance(rule, Empirical):
                precisions.append(
                    rule.variance(m, v, layout.masks.get(name)).reciprocal().expand(m.shape)
                )
            else:
                precisions.append(m.new_full((), 1 / rule).expand(m.shape))
        return layout.flatten(precisions)

    def kl_divergence(self, posterior: Sequence[Flat]) -> Tensor:
        r"""Computes :math:`D_{KL}(q \| p)`, summed over all parameters.

        Arguments:
            posterior: The parameters of each dtype and device.

        Returns:
            A 0-dim tensor, in nats.
        """
        return total([divergence(flat, self.precision(flat)) for flat in posterior])

    def kl_divergences(self, posterior: Sequence[Flat]) -> dict[str, Tensor]:
        r"""Computes :math:`D_{KL}(q \| p)` of each parameter by name."""
        return {
            name: number
            for flat in posterior
            for name, number in zip(
                flat.layout.names,
                divergence(flat, self.precision(flat), "divergences").unbind(),
                strict=True,
            )
        }

    def describe(self, name: str) -> str:
        """Says what the prior of a parameter is, in few characters."""
        variance = self.present(name)
        if not isinstance(variance, Tensor):
            return f"N(0, {variance:g})"
        low, high = variance.aminmax()
        several = f" to {high:.3g}" if variance.numel() > 1 else ""
        return f"N(0, {low:.3g}{several}), empirical"

    def __str__(self) -> str:
        rules = set(self.rules.values())
        return str(rules.pop()) if len(rules) == 1 else str(self.rules)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _precisions={})


def total(divergences: Sequence[Tensor]) -> Tensor:
    """Returns the sum of divergences, on the first one's device and in the widest precision."""
    first, *rest = divergences
    for term in rest:
        first = first + term.to(first.device)
    return first


def prior_variances(
    prior_var: Any, choices: Sequence[Choice], parameters: Mapping[str, Tensor]
) -> PriorVariances:
    """Returns the variances of the prior for the argument that a user gave.

    Arguments:
        prior_var: A number, `"empirical"`, an :class:`Empirical`, or any of these by pattern.
        choices: What selection decided about each parameter of the base.
        parameters: The included parameters by name, or tensors of their shapes and dtypes.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If a value is none of these or beyond the range of a parameter's dtype, a
            pattern matches nothing, a parameter has no pattern, or it lacks a dimension.
    """
    names = {c.name: (c.name, *c.aliases) for c in choices if c.included}
    if isinstance(prior_var, Mapping):
        patterns = first_matches("prior_var", tuple(prior_var), names)
        rules = {name: _rule(prior_var[pattern]) for name, pattern in patterns.items()}
    else:
        rules = dict.fromkeys(names, _rule(prior_var))
    for name, rule in rules.items():
        if isinstance(rule, Empirical):
            rule.check(name, parameters[name].shape)
        else:
            _check_range(name, rule, parameters[name].dtype)
    return PriorVariances(rules)


def _rule(value: Any) -> float | Empirical:
    if isinstance(value, Empirical):
        return value
    if isinstance(value, str) and value == "empirical":
        return Empirical()
    check_prior_var(value)
    return float(value)


def _check_range(name: str, variance: float, dtype: torch.dtype) -> None:
    dtype = torch.promote_types(dtype, torch.float32)  # in which posteriors are kept
    tiny = torch.finfo(dtype).tiny
    if not tiny <= variance <= 1 / tiny:
        raise ValueError(
            f"Expected prior_var to be between {tiny:.2g} and {1 / tiny:.2g} for '{name}', whose"
            f" divergence is computed in {dtype}, where a smaller variance or its inverse is no"
            f" number; got {variance:g}."
        )


def _is_dim(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
