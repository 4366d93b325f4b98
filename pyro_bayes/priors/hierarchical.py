"""A Gaussian prior whose deviation is random itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_bayes.base.checks import check_positive
from pyro_bayes.posterior.rounding import wide
from pyro_bayes.priors.distribution import as_like, converted, describe
from pyro_bayes.priors.empirical import Empirical, check_dims
from pyro_bayes.priors.parameter import ParameterPrior

if TYPE_CHECKING:
    from typing_extensions import Self

_NODES = 64
_LOG_VAR = -4.0
"""The variance of a deviation's logarithm, at the start."""


Each: TypeAlias = "Literal['tensor', 'element'] | int | tuple[int, ...]"
"""What has a deviation of its own."""


@dataclass(frozen=True, eq=False)
class Hierarchical:
    r"""A Gaussian prior whose deviation :math:`\sigma_p` has a prior and a posterior of its own.

    .. math:: \theta_i \mid \sigma_p \sim \mathcal{N}(0, \sigma_p^2), \qquad
              \sigma_p \sim p(\sigma_p), \qquad q(\log \sigma_p) = \mathcal{N}(a, b^2)

    The posterior is log-normal, independent of that of the weights, and trains with it. In Pyro,
    :math:`\sigma_p` is a sample site, the parameter's name followed by `_prior_scale`. The
    divergence from the joint prior is in closed form, but for
    :math:`\mathbb{E}_q[\log p(\sigma_p)]`, which is computed by Gauss–Hermite quadrature. In Pyro's
    ELBOs, :math:`\sigma_p` is a draw.

    Arguments:
        scale: The prior of :math:`\sigma_p`, a distribution over positive numbers.
        each: `"tensor"` for one deviation per tensor, `"element"` for one per element, or the
            dimensions each of whose indices has one of its own, as in
            :class:`~pyro_bayes.priors.Empirical`.

    References:
        | Prior Distributions for Variance Parameters in Hierarchical Models (Gelman, 2006)
        | https://doi.org/10.1214/06-BA117A

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> net = torch.nn.Linear(3, 8)
        >>> bnn = BayesianModel(net, prior=Hierarchical(scale=dist.HalfCauchy(0.1)))
        >>> sorted(bnn.guide())
        ['bias', 'bias_prior_scale', 'weight', 'weight_prior_scale']
    """

    scale: Any = field(default_factory=lambda: dist.HalfCauchy(0.1))
    each: Each = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Distribution) or self.scale.batch_shape:
            raise ValueError(
                "Expected scale to be a distribution of one positive number, such as"
                f" dist.HalfCauchy(0.1); got {self.scale!r}."
            )
        support = self.scale.support
        if support not in (constraints.positive, constraints.nonnegative):
            raise ValueError(
                "Expected scale to be a distribution over all positive numbers, such as"
                f" dist.HalfCauchy(0.1); got {type(self.scale).__name__}, over {support}."
            )
        _dims(self.each, 0)  # checks it

    def of(self, name: str, parameter: Tensor) -> HierarchicalPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.

        Raises:
            ValueError: If the parameter lacks a dimension.
        """
        dims = _dims(self.each, parameter.dim())
        check_dims(dims, name, parameter.shape)
        like = torch.zeros((), dtype=wide(parameter.dtype), device=parameter.device)
        return HierarchicalPrior(name, parameter.shape, converted(self.scale, as_like(like)), dims)


@dataclass(frozen=True, eq=False)
class Horseshoe:
    r"""The horseshoe: a Gaussian prior with a half-Cauchy deviation for each element.

    .. math:: \theta_i \mid \lambda_i \sim \mathcal{N}(0, \lambda_i^2), \qquad
              \lambda_i \sim \mathrm{C}^+(\tau)

    It has a pole at 0 and tails like those of a Cauchy distribution: it pulls small weights to 0,
    and leaves large ones as they are. With `each=0`, whole outputs of a linear map go. It is
    :class:`Hierarchical` with these arguments, whose deviations are random and have a posterior:
    for each element, two more numbers are learned.

    Arguments:
        scale: The global scale :math:`\tau`.
        each: What has a deviation of its own, as in :class:`Hierarchical`.

    References:
        | The Horseshoe Estimator for Sparse Signals (Carvalho et al., 2010)
        | https://doi.org/10.1093/biomet/asq017

        | Structured Variational Learning of Bayesian Neural Networks with Horseshoe Priors
          (Ghosh et al., 2018)
        | https://arxiv.org/abs/1806.05975

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> bnn = BayesianModel(torch.nn.Linear(3, 8), prior=Horseshoe(0.1))
        >>> bnn.guide()["weight_prior_scale"].shape
        torch.Size([8, 3])
    """

    scale: float = 0.1
    each: Each = "element"

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        _dims(self.each, 0)  # checks it

    def of(self, name: str, parameter: Tensor) -> HierarchicalPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.

        Raises:
            ValueError: If the parameter lacks a dimension.
        """
        scale = torch.tensor(self.scale, dtype=torch.double)
        return Hierarchical(dist.HalfCauchy(scale), self.each).of(name, parameter)


class HierarchicalPrior(ParameterPrior):
    r"""The prior :math:`\mathcal{N}(0, \sigma_p^2)` of each element, with a random deviation.

    Arguments:
        name: The dotted name of the parameter.
        shape: Its shape.
        scale: The prior of the deviation.
        dims: The dimensions each of whose indices has a deviation of its own.

    Attributes:
        scale_shape: The shape of the deviations: `()`, or one that broadcasts to the parameter's.
    """

    follows = True

    def __init__(
        self, name: str, shape: torch.Size, scale: Distribution, dims: tuple[int, ...]
    ) -> None:
        """Makes the prior, whose class describes the arguments."""
        super().__init__(name, shape)
        self._scale = scale
        kept = {dim % len(shape) for dim in dims}
        self._summed = tuple(dim for dim in range(len(shape)) if dim not in kept)
        sizes = [size if dim in kept else 1 for dim, size in enumerate(shape)]
        self.scale_shape = torch.Size(sizes if kept else ())

    def scales(self, like: Tensor) -> dist.TorchDistribution:
        """Returns the prior of the deviations.

        Arguments:
            like: A tensor of the dtype and device.
        """
        own = converted(self._scale, as_like(like)).expand(self.scale_shape)
        return own.to_event(len(self.scale_shape))  # type: ignore[no-any-return]

    def initial(self, like: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the initial mean and log-variance of :math:`\log \sigma_p`.

        It starts at the prior's median, where that is known, else at 1. The initial weights are
        narrow: a prior that starts there keeps wide networks from learning.

        Arguments:
            like: A tensor of the dtype and device.
        """
        try:
            start = float(self._scale.icdf(torch.tensor(0.5).to(like)).log())
        except NotImplementedError:
            start = 0.0
        shape = self.scale_shape
        return like.new_full(shape, start), like.new_full(shape, _LOG_VAR)

    def elements(self, like: Tensor, scale: Tensor | None = None) -> dist.TorchDistribution:
        if scale is None:
            scale = self.scales(like)()
        batch = scale.shape[: scale.dim() - len(self.scale_shape)]
        if not self.scale_shape:
            scale = scale.reshape((*batch, *[1] * len(self.shape)))
        normal = dist.Normal(torch.zeros_like(scale), scale, validate_args=False)
        return normal.expand((*batch, *self.shape))  # type: ignore[no-any-return]

    def sums(self, moments: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor | float]:
        r"""Returns :math:`\sum_i \mu_i^2 + \sigma_i^2` over what shares a deviation, and its size.

        Arguments:
            moments: The second moments :math:`\mu^2 + \sigma^2`, of the parameter's shape.
            fixed: Which elements are not random, and left out.
        """
        count: Tensor | float = moments.numel() / max(self.scale_shape.numel(), 1)
        if fixed is not None:
            moments, count = moments.masked_fill(fixed, 0.0), (~fixed).to(moments)
        if self._summed:
            keep = bool(self.scale_shape)
            moments = moments.sum(self._summed, keepdim=keep)
            if isinstance(count, Tensor):
                count = count.sum(self._summed, keepdim=keep)
        return moments, count

    def cross_entropy_given(
        self, mean: Tensor, logvar: Tensor, fixed: Tensor | None, scale: Tensor
    ) -> Tensor:
        r"""Returns :math:`-\mathbb{E}_q[\log p(\theta \mid \sigma_p)]` in nats.

        Arguments:
            mean: The means :math:`\mu`, of the parameter's shape.
            logvar: The log-variances :math:`\log \sigma^2`, likewise.
            fixed: Which elements are not random, and left out.
            scale: The deviations, with batch dimensions on the left.
        """
        moments, count = self.sums(torch.addcmul(logvar.exp(), mean, mean), fixed)
        terms = _cross_entropies(moments, count, scale.square().reciprocal(), scale.log())
        return terms.sum([*range(-len(self.scale_shape), 0)]) if self.scale_shape else terms

    def divergences(self, moments: Tensor, count: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        r"""Returns :math:`-\mathbb{E}_q[\log p(\theta \mid \sigma_p)] + D_{KL}(q \| p)(\sigma_p)`.

        It is that of each deviation, also of several parameters that have the same prior of it.

        Arguments:
            moments: The sums of second moments of what shares each deviation.
            count: The numbers of elements that do.
            mean: The means of :math:`\log \sigma_p`.
            logvar: The log-variances of :math:`\log \sigma_p`.
        """
        precision = (2 * (logvar.exp() - mean)).exp()
        entropy = mean + 0.5 * (logvar + math.log(2 * math.pi) + 1)
        nodes, weights = (t.to(mean) for t in _hermite(_NODES if mean.numel() < 4096 else 12))
        u = mean + (0.5 * logvar).exp() * nodes.reshape(-1, *[1] * mean.dim())
        log_p = torch.tensordot(weights, self._scale.log_prob(u.exp()), 1)
        terms: Tensor = _cross_entropies(moments, count, precision, mean) - entropy - log_p
        return terms

    def describe(self) -> str:
        return f"N(0, σ²), σ ~ {describe(self._scale)}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._scale = converted(self._scale, fn)
        super()._apply(fn, recurse)
        return self


def _dims(each: Any, count: int) -> tuple[int, ...]:
    if isinstance(each, str):
        if each not in ("tensor", "element"):
            raise ValueError(
                "Expected each to be 'tensor', 'element', a dimension or a tuple of dimensions; got"
                f" {each!r}."
            )
        return tuple(range(count)) if each == "element" else ()
    return Empirical(each).dims


def _cross_entropies(
    moments: Tensor, count: Tensor | float, precision: Tensor, log_scale: Tensor
) -> Tensor:
    log_normal = log_scale + 0.5 * math.log(2 * math.pi)
    return 0.5 * moments * precision + count * log_normal


@cache
def _hermite(count: int) -> tuple[Tensor, Tensor]:
    """Returns nodes and weights of expectations over a standard normal variable."""
    # The nodes are the eigenvalues of the recurrence of Hermite's polynomials.
    off = torch.arange(1, count, dtype=torch.double).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0].square()
