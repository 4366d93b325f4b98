"""The distribution of a prior's site: its log-density of draws, and its divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import lazy_property

from pyro_bayes.base.torch_private import is_batched, is_transformed
from pyro_bayes.noise.gaussian_tensor import GaussianTensor
from pyro_bayes.posterior.gaussian import divergence_terms
from pyro_bayes.priors.distribution import DistributionPrior
from pyro_bayes.priors.hierarchical import HierarchicalPrior
from pyro_bayes.priors.parameter import NormalPrior
from pyro_bayes.priors.priors import Priors
from pyro_bayes.pyro_bridge.free import FreeElements, HeldElements
from pyro_bayes.pyro_bridge.site import Posterior, SiteNormal


class Run:
    """The values of all sites in one run of a prior, whose log-densities are computed at once.

    Arguments:
        priors: The priors of all parameters.
    """

    def __init__(self, priors: Priors) -> None:
        self.values: dict[str, Tensor] = {}
        self._priors = priors
        self._log_probs: dict[bool, dict[str, Tensor]] = {}

    def log_prob(self, name: str, like: Any) -> Tensor:
        """Returns the log-density of one site's value, a draw under a fixed Gaussian.

        Arguments:
            name: The name of the parameter.
            like: The value, of whose dtype and device others may be.
        """
        grad = torch.is_grad_enabled()
        if name not in self._log_probs.setdefault(grad, {}):
            values = {n: v for n, v in self.values.items() if self._is_alike(n, v, like)}
            log_probs = log_densities([self._priors.rules[n] for n in values], [*values.values()])
            self._log_probs[grad].update(zip(values, log_probs.unbind(), strict=True))
        return self._log_probs[grad][name]

    def _is_alike(self, name: str, value: Tensor, like: Tensor) -> bool:
        same = value.dtype == like.dtype and value.device == like.device
        if not same or isinstance(value, GaussianTensor):
            return False
        return _is_fixed_normal(self._priors, name) and self._priors.fixed(name) is None


class Prior(dist.Independent):
    r"""The distribution :math:`p(\theta)` of one parameter.

    Its log-density of a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor`, which is the
    posterior :math:`q` itself instead of a draw, is :math:`-D_{KL}(q \| p)`. That of a draw takes
    an empirical :math:`\sigma_p^2` as fixed: in expectation, the gradient of the ELBO is the same.

    Arguments:
        priors: The priors of all parameters.
        name: The name of the parameter.
        like: A tensor of the dtype and device.
        run: The run of the prior that the distribution is of, if any.
        scale: The draw of the prior's deviations, if they are random.
    """

    def __init__(
        self,
        priors: Priors,
        name: str,
        like: Tensor,
        run: Run | None = None,
        scale: Tensor | None = None,
    ) -> None:
        # What the base classes' constructors would do, of which most steps need nothing.
        rule = priors.rules[name]
        self.priors, self.name, self._like, self._run, self._scale = priors, name, like, run, scale
        self._batch_shape, self._event_shape = torch.Size(), rule.shape
        self.reinterpreted_batch_ndims = len(rule.shape)
        if isinstance(rule, HierarchicalPrior) and scale is not None:
            self._batch_shape = scale.shape[: scale.dim() - len(rule.scale_shape)]
        elif not isinstance(rule, NormalPrior):
            self.reinterpreted_batch_ndims -= len(self.base_dist.event_shape)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws have a gradient."""
        return self.priors.is_normal(self.name) or bool(self.base_dist.has_rsample)

    @lazy_property
    def _variance(self) -> float | Tensor | None:
        variance = self.priors.present(self.name)
        return variance.to(self._like) if isinstance(variance, Tensor) else variance

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The real numbers, but for elements that carry no information and have their values."""
        fixed = self.priors.fixed(self.name)
        if fixed is None:
            return constraints.independent(constraints.real, len(self._event_shape))
        return FreeElements(self.priors.mean(self.name).to(self._like), fixed)

    @lazy_property
    def base_dist(self) -> Any:
        rule, fixed = self.priors.rules[self.name], self.priors.fixed(self.name)
        if not isinstance(rule, NormalPrior):
            own = rule.elements(self._like, self._scale)
            if fixed is None:
                return own
            return HeldElements(own, self.priors.mean(self.name).to(self._like), fixed)
        variance: Any = self._variance
        if fixed is not None:
            mean = self.priors.mean(self.name).to(self._like)
            mean = torch.where(fixed, mean, torch.as_tensor(rule.center).to(self._like))
            logvar = torch.as_tensor(variance).to(self._like).log().expand(mean.shape)
            return SiteNormal(mean, logvar.masked_fill(fixed, -math.inf), fixed=fixed)
        return rule.elements(self._like, torch.as_tensor(variance, dtype=torch.double).sqrt())

    def expand(self, batch_shape: Any, _instance: Any = None) -> Prior:
        new = type(self).__new__(type(self))
        new.priors, new.name, new._like, new._run = self.priors, self.name, self._like, None
        new._scale, new._variance = self._scale, self._variance
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def divergence(self, mean: Tensor, logvar: Tensor, known: Tensor | None = None) -> Tensor:
        r"""Returns :math:`D_{KL}(q \| p)`, given the draw of the prior's deviations.

        Arguments:
            mean: The means :math:`\mu` of the posterior.
            logvar: Its log-variances :math:`\log \sigma^2`.
            known: The divergence without what random deviations add, if it was computed for all
                parameters.
        """
        rule: Any = self.priors.rules[self.name]
        fixed = self.priors.fixed(self.name)
        if known is None:
            precision, center = torch.zeros(()).to(mean), None
            if isinstance(rule, NormalPrior):
                precision = 1 / torch.as_tensor(self._variance).to(mean)
                center = torch.as_tensor(rule.center).to(mean)
            terms = divergence_terms(mean, logvar, precision, center)
            known = (terms if fixed is None else terms.masked_fill(fixed, 0.0)).sum()
            if isinstance(rule, DistributionPrior):
                known = known + rule.cross_entropies(mean, logvar, fixed).sum()
        if isinstance(rule, HierarchicalPrior):
            if self._scale is None:
                raise RuntimeError(
                    f"Expected a draw of the deviations of '{self.name}'; got none. Sample the"
                    " prior in a Pyro model, with `with bnn.lift() as net:`."
                )
            known = known + rule.cross_entropy_given(mean, logvar, fixed, self._scale)
        return known

    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):
            known = None
            if value.noise.divergence is not None:
                known = value.noise.divergence(value.parameter, self.priors)
            divergence = self.divergence(*value.posterior, known)
            shape = value.shape[: len(value.shape) - len(self._event_shape)]
            return -divergence.expand(self._batch_shape if self._batch_shape else shape)
        plain = not self._batch_shape and value.is_floating_point()
        plain = plain and value.shape == self.event_shape and value.dtype.itemsize >= 4
        plain = plain and _is_fixed_normal(self.priors, self.name) and not is_transformed()
        if not plain or self.priors.fixed(self.name) is not None:
            return super().log_prob(value)  # type: ignore[no-any-return]
        if self._run is not None and value is self._run.values.get(self.name):
            return self._run.log_prob(self.name, value)
        return log_densities([self.priors.rules[self.name]], [value])[0]


def _is_fixed_normal(priors: Priors, name: str) -> bool:
    rule = priors.rules[name]
    return isinstance(rule, NormalPrior) and rule.empirical is None


def log_densities(rules: Sequence[Any], values: Sequence[Tensor]) -> Tensor:
    """Returns the log-density of each of several draws, under Gaussian priors.

    Arguments:
        rules: The priors.
        values: The draws, of one dtype and device.
    """
    like = values[0]
    deviations, variances = [], []
    for rule, value in zip(rules, values, strict=True):
        center, variance = rule.center, rule.number
        if isinstance(center, Tensor) or center:
            value = value - torch.as_tensor(center).to(like)
        deviations.append(value)
        variances.append(variance.to(like) if isinstance(variance, Tensor) else variance)
    return _LogNormals.apply(variances, *deviations)  # type: ignore[no-any-return]


class _LogNormals(torch.autograd.Function):
    r"""The log-density of each of several deviations under :math:`\mathcal{N}(0, \sigma_p^2)`."""

    @staticmethod
    def forward(ctx: Any, variances: Sequence[float | Tensor], *values: Tensor) -> Tensor:
        ctx.variances = variances
        ctx.save_for_backward(*values)
        log_probs: list[Any] = []
        for value, variance in zip(values, variances, strict=True):
            line = value.reshape(-1)
            size = line.numel()
            square: Any
            log_sum: Any
            if isinstance(variance, Tensor):
                own = variance.reshape(-1)
                square, log_sum = torch.dot(line, line / own), own.log().sum()
            else:
                square, log_sum = torch.dot(line, line) / variance, size * math.log(variance)
            numbers: list[Any] = [square, log_sum]
            if value.is_cpu:  # other devices would have to be waited for
                numbers = [float(number) for number in numbers]
            log_probs.append(-0.5 * (sum(numbers) + size * math.log(2 * math.pi)))
        return values[0].new_tensor(log_probs) if values[0].is_cpu else torch.stack(log_probs)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        values, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        by_number = grad.is_cpu and not (torch.is_grad_enabled() or is_batched([grad]))
        parts = grad.tolist() if by_number else grad.unbind()
        factors = [part / -variance for part, variance in zip(parts, ctx.variances, strict=True)]
        triples = zip(values, factors, needed, strict=True)
        return None, *[value * factor if need else None for value, factor, need in triples]


@register_kl(Posterior, Prior)  # type: ignore[untyped-decorator]
def _kl_divergence(posterior: Posterior, prior: Prior) -> Tensor:
    known = posterior.joint.divergence(posterior.name, prior.priors)
    divergence = prior.divergence(*posterior.joint.of(posterior.name), known)
    return divergence.expand(posterior.batch_shape)
