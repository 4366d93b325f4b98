"""Any distribution as a prior: its checks, its tensors, and its divergence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, kl_divergence
from torch.distributions.transforms import Transform

from pyro_bayes.base.checks import check_finite, is_finite
from pyro_bayes.posterior import gaussian
from pyro_bayes.posterior.rounding import wide
from pyro_bayes.priors.gaussian import check_range
from pyro_bayes.priors.parameter import NormalPrior, ParameterPrior

if TYPE_CHECKING:
    from typing_extensions import Self

_FAR = 1e15
"""Where a density is at most one over this, if it falls from some place nearer to 0 on."""

_REAL = constraints.real, constraints.real_vector


class DistributionPrior(ParameterPrior):
    r"""The prior of one parameter, a distribution of each element or of all of them.

    Where PyTorch or Pyro know the divergence of a Gaussian from it, this is used. Else
    :math:`\mathbb{E}_q[\log p]` is the mean over draws.

    Arguments:
        name: The dotted name of the parameter.
        shape: Its shape.
        distribution: The distribution. Its batch and event dimensions together are those of the
            parameter, or it has none.
        label: What it is, in few characters; by default, its class and parameters.
        device: The device of its tensors.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        distribution: Any,
        label: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Makes the prior, whose class describes the arguments."""
        super().__init__(name, shape)
        self._distribution, self._label = distribution, label
        self._dims = len(distribution.event_shape)
        zeros = torch.zeros(shape, device=device)
        self.is_exact = self._divergence(zeros, zeros) is not None

    def elements(self, like: Tensor, scale: Tensor | None = None) -> dist.TorchDistribution:
        batch_shape = self.shape[: len(self.shape) - self._dims]
        own = converted(self._distribution, as_like(like))
        return own.expand(batch_shape)  # type: ignore[no-any-return]

    @property
    def is_alike(self) -> bool:
        """Whether all elements are independent and have the same distribution."""
        return len(self._distribution.batch_shape + self._distribution.event_shape) == 0

    def cross_entropies(
        self, mean: Tensor, logvar: Tensor, fixed: Tensor | None, num_samples: int = 1
    ) -> Tensor:
        r"""Returns :math:`-\mathbb{E}_q[\log p(\theta)]` of each element, or of those that belong
        together, in nats.

        Arguments:
            mean: The means :math:`\mu`, of the parameter's shape; of any if all elements are alike.
            logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
            fixed: Which elements are not random, and left out.
            num_samples: The number of draws where it is estimated.
        """
        if fixed is not None:
            self.check_separable()
            logvar = logvar.masked_fill(fixed, 0.0)
        if self.is_exact:
            entropy = -gaussian.divergence_terms(mean, logvar, 0.0)
            if self._dims:
                entropy = entropy.flatten(-self._dims).sum(-1)
            terms: Tensor = self._divergence(mean, logvar) + entropy
        else:
            epsilon = torch.randn_like(mean.expand(num_samples, *mean.shape))
            draws = gaussian.draw(mean, logvar, epsilon)
            terms = -self._distribution.log_prob(draws).mean(0)
        return terms if fixed is None else terms.masked_fill(fixed, 0.0)

    def check_separable(self) -> None:
        if self._dims:
            raise ValueError(
                f"Expected independent elements in the prior of '{self.name}', some of which are"
                f" padding or pruned and not random; got {self.describe()}."
            )

    def _divergence(self, mean: Tensor, logvar: Tensor) -> Any:
        if not _is_known(self._distribution):
            return None
        q = dist.Normal(mean, (0.5 * logvar).exp(), validate_args=False)
        try:
            return kl_divergence(q.to_event(self._dims) if self._dims else q, self._distribution)
        except NotImplementedError:
            return None

    def describe(self) -> str:
        return self._label or describe(self._distribution)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._distribution = converted(self._distribution, fn)
        super()._apply(fn, recurse)
        return self


def prior_of_distribution(
    name: str, parameter: Tensor, distribution: Any, label: str | None = None
) -> ParameterPrior:
    """Returns a distribution as the prior of a parameter.

    Arguments:
        name: The dotted name of the parameter.
        parameter: The parameter.
        distribution: The distribution, of one element or of all.
        label: What it is, in few characters.

    Raises:
        ValueError: If its shape, its support or its density does not fit, or it would have to be
            learned.
    """
    shape, whole = parameter.shape, distribution.batch_shape + distribution.event_shape
    if whole not in (torch.Size(), shape):
        raise ValueError(
            f"Expected the prior of '{name}' to be a distribution of one element, of shape (), or"
            f" of all of them, of shape {tuple(shape)}; got {type(distribution).__name__} of shape"
            f" {tuple(whole)}. Where shapes differ, give a function: prior=lambda name, p: …."
        )
    support = _support(distribution)
    if support is not None and not _is_real(support):
        raise ValueError(
            f"Expected the prior of '{name}' to be over all real numbers, as the posterior is; got"
            f" {type(distribution).__name__}, over {support}."
        )
    like = torch.zeros((), dtype=wide(parameter.dtype), device=parameter.device)

    def own(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            raise ValueError(
                f"Expected the prior of '{name}' to be fixed; got {type(distribution).__name__}"
                " with a tensor that requires a gradient. A scale is learned by"
                ' priors.Hierarchical(…) or prior_var="empirical".'
            )
        tensor = tensor.detach().clone()
        return as_like(like)(tensor)

    distribution = converted(distribution, own)
    normal = distribution
    while isinstance(normal, torch.distributions.Independent):
        normal = normal.base_dist
    if type(normal) in (dist.Normal, torch.distributions.Normal) and label is None:
        _check_normal(name, parameter, normal)
        variance = normal.scale.double().square()
        if len(shape) and normal.batch_shape == shape:
            return NormalPrior(name, shape, variance.to(like), normal.loc.to(like))
        return NormalPrior(name, shape, float(variance), float(normal.loc))
    numbers = [getattr(normal, key, None) for key in normal.arg_constraints]
    if any(isinstance(n, Tensor) and not n.is_floating_point() for n in numbers):
        raise ValueError(
            f"Expected the prior of '{name}' to have real numbers as parameters; got"
            f" {type(normal).__name__} with integers, of which PyTorch makes no draws. Write 1.0"
            " instead of 1."
        )
    _check_density(name, parameter, distribution)
    return DistributionPrior(name, shape, distribution, label, parameter.device)


def as_like(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns what converts tensors to the device of another, and real numbers to its dtype.

    Arguments:
        like: The other tensor.
    """
    return lambda t: t.to(like) if t.is_floating_point() else t.to(like.device)


def describe(distribution: Any) -> str:
    """Returns a distribution's name and parameters, in few characters.

    Arguments:
        distribution: The distribution.

    Example:
        >>> describe(dist.Laplace(0.0, 0.5))
        'Laplace(0, 0.5)'
    """
    numbers = []
    for key in distribution.arg_constraints:
        value = getattr(distribution, key, None)
        if isinstance(value, Tensor) and value.numel():
            low, high = value.detach().double().aminmax()
            numbers.append(f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}")
    for part in ("base_dist", "component_distribution"):
        if not numbers and hasattr(distribution, part):
            numbers.append(describe(getattr(distribution, part)))
    return f"{type(distribution).__name__}({', '.join(numbers)})"


def _check_normal(name: str, parameter: Tensor, normal: Any) -> None:
    """Raises an error unless a Gaussian's mean and variance are numbers that can be used."""
    check_finite(f"the mean of the prior of '{name}'", normal.loc)
    check_finite(f"the scale of the prior of '{name}'", normal.scale)
    if not (normal.scale.is_meta or bool((normal.scale > 0).all())):
        raise ValueError(
            f"Expected the scale of the prior of '{name}' to be positive; got"
            f" {float(normal.scale.min()):g}."
        )
    variance = normal.scale.double().square()
    check_range("the variance of the prior", name, variance, parameter.dtype)


def _check_density(name: str, parameter: Tensor, distribution: Any) -> None:
    """Raises an error unless a distribution has a density, near the initial values and far away."""
    values = parameter.detach().to(wide(parameter.dtype))
    dims, kind = len(distribution.event_shape), type(distribution).__name__
    try:
        densities = distribution.log_prob(values + 0.01)  # some have a pole at 0
        far = distribution.log_prob(torch.full_like(values, _FAR)) if not dims else None
        distribution.expand(values.shape[: values.dim() - dims])
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"Expected the prior of '{name}' to have a density of values of shape"
            f" {tuple(parameter.shape)}; got {kind}, which failed with: {error}"
        ) from error
    if parameter.is_meta:
        return
    if not is_finite(densities):
        raise ValueError(
            f"Expected the prior of '{name}' to have a density everywhere, as the posterior has;"
            f" got {kind}, whose log-density near the initial values is not finite."
        )
    if far is not None and bool((far + math.log(_FAR) > 1).any()):
        raise ValueError(
            f"Expected the prior of '{name}' to have a density that integrates to 1; got {kind},"
            " whose density does not fall to 0 far from 0."
        )


def _support(distribution: Any) -> Any:
    try:
        return distribution.support
    except NotImplementedError:
        return None


def _is_real(support: Any) -> bool:
    while hasattr(support, "base_constraint"):  # of independent elements, or of mixtures
        support = support.base_constraint
    return support in _REAL


def _is_known(distribution: Any) -> bool:
    """Tells whether a distribution's density is that of its class in PyTorch or Pyro."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    module: str = type(distribution).log_prob.__module__
    return "log_prob" not in vars(distribution) and module.startswith(
        ("torch.distributions.", "pyro.distributions.")
    )


def converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of a distribution with its tensors converted, which checks no arguments.

    Arguments:
        value: The distribution.
        convert: What converts a tensor.
    """
    return _converted(value, convert, {})


def _converted(value: Any, convert: Callable[[Tensor], Tensor], known: dict[int, Any]) -> Any:
    if id(value) in known:  # a transform and its inverse refer to each other
        return known[id(value)]
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)._apply(convert)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_converted(item, convert, known) for item in value)
    if isinstance(value, dict):
        return {key: _converted(item, convert, known) for key, item in value.items()}
    if isinstance(value, Distribution | Transform):
        new = known[id(value)] = copy.copy(value)
        vars(new).update({k: _converted(v, convert, known) for k, v in vars(value).items()})
        if isinstance(new, Distribution):
            new._validate_args = False
        return new
    return value
