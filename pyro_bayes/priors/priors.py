"""The priors of all parameters together: one pass over flat tensors, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.posterior.draws import Precision, divergence
from pyro_bayes.posterior.layout import Flat, Layout
from pyro_bayes.priors.hierarchical import HierarchicalPrior
from pyro_bayes.priors.parameter import NormalPrior, ParameterPrior

Pairs = Mapping[str, tuple[Tensor, Tensor]]


class Priors:
    r"""The prior of each parameter, and the divergence of a posterior from all.

    The divergence is :math:`-H[q] - \mathbb{E}_q[\log p]`. One pass over the posterior's flat
    tensors has all of it for Gaussian priors, and the negative entropy for others, whose priors
    add the rest.

    Arguments:
        rules: The prior of each parameter by dotted name.

    Attributes:
        rules: The prior of each parameter by dotted name.

    Example:
        >>> str(Priors({n: NormalPrior(n, torch.Size([3]), 0.5) for n in ("weight", "bias")}))
        'N(0, 0.5)'
    """

    def __init__(self, rules: Mapping[str, ParameterPrior]) -> None:
        self.rules = dict(rules)
        self._posterior: Callable[[], Pairs] | None = None
        self._fixed: Callable[[str], Tensor | None] | None = None
        self._scales: Callable[[], Pairs] = dict
        self.forget()

    def follow(
        self,
        posterior: Callable[[], Pairs],
        fixed: Callable[[str], Tensor | None] | None = None,
        scales: Callable[[], Pairs] = dict,
    ) -> None:
        r"""Tells priors the posterior that they follow. Before, empirical variances are 1.

        Arguments:
            posterior: Returns the present :math:`\mu` and :math:`\log \sigma^2` by name.
            fixed: Returns which elements of a parameter carry no information, if any may.
            scales: Returns the means and log-variances of the logarithms of random deviations.

        Raises:
            ValueError: If some elements carry no information and their prior cannot leave them out.
        """
        for name, rule in self.rules.items():
            if fixed is not None and fixed(name) is not None:
                rule.check_separable()
        # What is followed owns this object: a reference back would keep a model alive.
        if fixed or any(rule.follows for rule in self.rules.values()):
            self._posterior, self._fixed, self._scales = posterior, fixed, scales

    def replace(self, name: str, rule: ParameterPrior) -> None:
        """Puts another prior in the place of a parameter's.

        Arguments:
            name: The dotted name of the parameter.
            rule: The prior.
        """
        self.rules[name] = rule
        self.forget()

    def forget(self) -> None:
        """Forgets what was computed of the tensors of priors, after any of them has changed."""
        self._flats: dict[Any, tuple[Precision, Tensor | None]] = {}
        self._others = [n for n, rule in self.rules.items() if not isinstance(rule, NormalPrior)]

    @property
    def is_exact(self) -> bool:
        """Whether the divergence is known, and not estimated with draws."""
        return all(self.rules[name].is_exact for name in self._others)

    def is_normal(self, name: str) -> bool:
        """Tells whether the pass over flat tensors has a parameter's divergence.

        Arguments:
            name: The dotted name of the parameter.
        """
        return isinstance(self.rules[name], NormalPrior)

    def fixed(self, name: str) -> Tensor | None:
        """Returns which elements of a parameter carry no information, if there are any."""
        return None if self._fixed is None else self._fixed(name)

    def mean(self, name: str) -> Tensor:
        """Returns the present posterior mean of a parameter some elements of which are fixed."""
        if self._posterior is None:
            raise ValueError(f"Expected a posterior to follow; got none for '{name}'.")
        return self._posterior()[name][0].detach()

    @torch.no_grad()
    def present(self, name: str) -> float | Tensor | None:
        """Returns the present variance of a Gaussian prior, a number or a tensor."""
        rule = self.rules[name]
        if not isinstance(rule, NormalPrior):
            return None
        if rule.empirical is None:
            return rule.number
        if self._posterior is None:
            return 1.0
        mean, logvar = self._posterior()[name]
        return rule.empirical.variance(mean - rule.center, logvar, self.fixed(name))

    def flat(self, posterior: Flat) -> tuple[Precision, Tensor | None]:
        r"""Returns :math:`1 / \sigma_p^2` and :math:`\mu_p` of a posterior's elements.

        Arguments:
            posterior: The parameters of one dtype and device.

        Returns:
            The precision, a number if all elements have the same; a flat tensor if they are fixed;
            and else a function of the means and the log-variances that returns one. It is 0 where
            the prior is not Gaussian. And the means, a flat tensor, `None` if all are 0.
        """
        layout, mean, _ = posterior
        key = (layout, mean.dtype, mean.device)
        if key not in self._flats:
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves elsewhere too
                like = mean.detach()
                self._flats[key] = self._precision(layout, like), self._mean(layout, like)
        return self._flats[key]

    def _precision(self, layout: Layout, like: Tensor) -> Precision:
        rules = [self._normal(name) for name in layout.names]
        if any(rule is not None and rule.empirical for rule in rules):
            return partial(self._by_posterior, layout)
        variances: list[Any] = [float("inf") if r is None else r.number for r in rules]
        numbers = {v for v in variances if not isinstance(v, Tensor)}
        if len(numbers) == 1 and not any(isinstance(v, Tensor) for v in variances):
            return 1 / numbers.pop()  # type: ignore[no-any-return]
        tensors = (torch.as_tensor(v, dtype=torch.double).reciprocal().to(like) for v in variances)
        pairs = zip(layout.parts, tensors, strict=True)
        return layout.flatten(tensor.expand(part.shape) for part, tensor in pairs)

    def _mean(self, layout: Layout, like: Tensor) -> Tensor | None:
        rules = [self._normal(name) for name in layout.names]
        means: list[Any] = [0.0 if r is None else r.center for r in rules]
        if not any(isinstance(m, Tensor) or m for m in means):
            return None
        pairs = zip(layout.parts, (torch.as_tensor(m).to(like) for m in means), strict=True)
        return layout.flatten(tensor.expand(part.shape) for part, tensor in pairs)

    def _normal(self, name: str) -> NormalPrior | None:
        rule = self.rules[name]
        return rule if isinstance(rule, NormalPrior) else None

    def _by_posterior(self, layout: Layout, mean: Tensor, logvar: Tensor) -> Tensor:
        pairs = zip(layout.split(mean), layout.split(logvar), strict=True)
        precisions = []
        for name, (m, v) in zip(layout.names, pairs, strict=True):
            rule = self._normal(name)
            if rule is not None and rule.empirical:
                center = rule.center
                m = m if not isinstance(center, Tensor) and center == 0 else m - center
                variance = rule.empirical.variance(m, v, layout.masks.get(name))
                precisions.append(variance.reciprocal().expand(m.shape))
                continue
            number = float("inf") if rule is None else rule.number
            own = torch.as_tensor(number, dtype=torch.double).reciprocal().to(m)
            precisions.append(own.expand(m.shape))
        return layout.flatten(precisions)

    def kl_divergence(self, posterior: Sequence[Flat], num_samples: int = 1) -> Tensor:
        r"""Computes :math:`D_{KL}(q \| p)`, summed over all parameters.

        Arguments:
            posterior: The parameters of each dtype and device.
            num_samples: The number of draws where it is estimated.

        Returns:
            A 0-dim tensor, in nats.
        """
        numbers = []
        for flat in posterior:
            precision, mean = self.flat(flat)
            numbers.append(divergence(flat, precision, prior_mean=mean))
        return total([*numbers, *self.rest(posterior, num_samples)])

    def kl_divergences(self, posterior: Sequence[Flat], num_samples: int = 1) -> dict[str, Tensor]:
        r"""Computes :math:`D_{KL}(q \| p)` of each parameter by name.

        Arguments:
            posterior: The parameters of each dtype and device.
            num_samples: The number of draws where it is estimated.
        """
        return self._by_name(posterior, self.passes(posterior), num_samples, given_scales=False)

    def passes(self, posterior: Sequence[Flat]) -> list[Tensor]:
        """Computes what one pass has of each parameter's divergence.

        Arguments:
            posterior: The parameters of each dtype and device.
        """
        flats = [(flat, *self.flat(flat)) for flat in posterior]
        return [divergence(f, p, "divergences", prior_mean=mean) for f, p, mean in flats]

    def of_sites(self, posterior: Sequence[Flat], passes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes the divergence of each parameter, without what random deviations add.

        Arguments:
            posterior: The parameters of each dtype and device.
            passes: What one pass has of the divergences of each.
        """
        return self._by_name(posterior, passes, 1, given_scales=True)

    def _by_name(
        self,
        posterior: Sequence[Flat],
        passes: Sequence[Tensor],
        num_samples: int,
        *,
        given_scales: bool,
    ) -> dict[str, Tensor]:
        numbers: dict[str, Tensor] = {}
        for flat, each in zip(posterior, passes, strict=True):
            numbers.update(zip(flat.layout.names, each.unbind(), strict=True))
        others = self._other_terms(posterior, num_samples, given_scales=given_scales)
        for names, terms, sizes in others:
            for name, own in zip(names, terms.split(sizes), strict=True):
                numbers[name] = numbers[name] + own.sum()
        return numbers

    def rest(self, posterior: Sequence[Flat], num_samples: int = 1) -> list[Tensor]:
        r"""Computes numbers whose sum a pass leaves out: :math:`-\mathbb{E}_q[\log p]` of others.

        Arguments:
            posterior: The parameters of each dtype and device.
            num_samples: The number of draws where it is estimated.
        """
        return [terms.sum() for _, terms, _ in self._other_terms(posterior, num_samples)]

    def _other_terms(
        self, posterior: Sequence[Flat], num_samples: int, *, given_scales: bool = False
    ) -> Iterator[tuple[list[str], Tensor, list[int]]]:
        """Returns names of parameters, terms of all of these, and how many each has.

        Priors that are alike are evaluated at once: a network has many small parameters.

        Arguments:
            posterior: The parameters of each dtype and device.
            num_samples: The number of draws where it is estimated.
            given_scales: Whether random deviations are given, so that priors with any are left out.
        """
        for layout, *flats in posterior if self._others else ():
            groups: dict[Any, list[str]] = {}
            for name in layout.names:
                if name in self._others:
                    group = self.rules[name].group
                    groups.setdefault(name if group is None else group, []).append(name)
            if not groups:
                continue
            pairs = zip(*map(layout.split, flats), strict=True)
            views = dict(zip(layout.names, pairs, strict=True))
            for names in groups.values():
                masks = [layout.masks.get(name) for name in names]
                rule: Any = self.rules[names[0]]
                if given_scales and isinstance(rule, HierarchicalPrior):
                    continue
                if isinstance(rule, HierarchicalPrior):
                    terms, sizes = self._hierarchical(names, views, masks)
                elif len(names) > 1:
                    sizes = [views[name][0].numel() for name in names]
                    mean, logvar = (
                        torch.cat([views[n][k].flatten() for n in names]) for k in (0, 1)
                    )
                    fixed = None
                    if any(mask is not None for mask in masks):
                        none = (torch.zeros_like(views[n][0], dtype=torch.bool) for n in names)
                        every = (a if m is None else m for m, a in zip(masks, none, strict=True))
                        fixed = torch.cat([mask.flatten() for mask in every])
                    terms = rule.cross_entropies(mean, logvar, fixed, num_samples)
                else:
                    terms = rule.cross_entropies(*views[names[0]], masks[0], num_samples).flatten()
                    sizes = [len(terms)]
                yield names, terms, sizes

    def _hierarchical(
        self, names: Sequence[str], views: Pairs, masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[int]]:
        present = self._scales()
        moments, counts, scales = [], [], []
        for name, mask in zip(names, masks, strict=True):
            mean, logvar = views[name]
            rule: Any = self.rules[name]
            own, count = rule.sums(torch.addcmul(logvar.exp(), mean, mean), mask)
            moments.append(own.flatten())
            counts.append(torch.as_tensor(count).to(own).expand(own.shape).flatten())
            scales.append([scale.flatten() for scale in present[name]])
        every: list[Any] = [moments, counts, *zip(*scales, strict=True)]
        divergences: Tensor = rule.divergences(*(torch.cat(own) for own in every))
        return divergences, [len(own) for own in moments]

    def describe(self, name: str) -> str:
        """Says what the prior of a parameter is at present, in few characters."""
        rule, variance = self.rules[name], self.present(name)
        if not isinstance(rule, NormalPrior) or rule.empirical is None:
            return rule.describe()
        low, high = torch.as_tensor(variance).aminmax()
        several = f" to {high:.3g}" if low != high else ""
        return rule.describe().replace("empirical", f"{low:.3g}{several}") + ", empirical"

    def explain(self, name: str) -> tuple[str, str]:
        """Says what the prior of a parameter is, and whether its divergence is exact.

        Arguments:
            name: The dotted name of the parameter.
        """
        return self.describe(name), "exact" if self.rules[name].is_exact else "Monte Carlo"

    @torch.no_grad()
    def deviations(self, name: str) -> Tensor:
        """Returns the deviations of a parameter's prior, as far as it has any.

        Arguments:
            name: The dotted name of the parameter.
        """
        variance = self.present(name)
        if variance is not None:
            return torch.as_tensor(variance).sqrt()
        rule = self.rules[name]
        if isinstance(rule, HierarchicalPrior):
            return self._scales()[name][0].exp()
        try:
            deviations: Any = rule.elements(torch.zeros(())).stddev
        except NotImplementedError:
            return torch.empty(0)
        finite: Tensor = deviations[deviations.isfinite()].unique()
        return finite

    def __str__(self) -> str:
        rules = {name: rule.describe() for name, rule in self.rules.items()}
        return next(iter(rules.values())) if len(set(rules.values())) == 1 else str(rules)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _flats={})


def total(divergences: Sequence[Tensor]) -> Tensor:
    """Returns the sum of divergences, on the first one's device and in the widest precision."""
    first, *rest = divergences
    for term in rest:
        first = first + term.to(first.device)
    return first
