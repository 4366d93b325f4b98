"""The prior p(θ): one Pyro sample site per included parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints, register_kl
from torch.distributions.utils import lazy_property

from pyro_bayes.base.checks import is_number
from pyro_bayes.base.nested import plant
from pyro_bayes.base.torch_private import is_batched, is_transformed
from pyro_bayes.noise.gaussian_tensor import GaussianTensor
from pyro_bayes.posterior.gaussian import divergence_terms
from pyro_bayes.posterior.rounding import keeping_precision, wide
from pyro_bayes.priors.variance import PriorVariances
from pyro_bayes.pyro_bridge.free import FreeElements
from pyro_bayes.pyro_bridge.site import Posterior, SiteNormal

if TYPE_CHECKING:
    from typing_extensions import Self


class GaussianSite:
    r"""The prior :math:`\mathcal{N}(0, \sigma_p^2 I)` of one parameter, as a Pyro prior function.

    Arguments:
        shape: The shape of the parameter.
        variances: The variances of all parameters.
        name: The dotted name of the parameter.
        like: The name of a buffer of the site's module, which shows the dtype and device.
        present: What tells the run of the prior that is under way.
    """

    def __init__(
        self, shape: torch.Size, variances: PriorVariances, name: str, like: str, present: Present
    ) -> None:
        self.shape, self.variances, self.name, self.like = shape, variances, name, like
        self.present = present

    def __call__(self, module: nn.Module) -> dist.TorchDistribution:
        like: Any = module._buffers[self.like]  # get_buffer walks through Pyro's attributes
        return Prior(self.shape, self.variances, self.name, like, self.present.run)


class Present:
    """The run of a prior that is under way, if any."""

    run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Run:
    """The values of all sites in one run of a prior, whose log-densities are computed at once.

    Arguments:
        variances: The variances of all parameters.
    """

    def __init__(self, variances: PriorVariances) -> None:
        self.values: dict[str, Tensor] = {}
        self._variances = variances
        self._log_probs: dict[bool, dict[str, Tensor]] = {}

    def log_prob(self, name: str, like: Any) -> Tensor:
        """Returns the log-density of one site's value, a draw under a fixed variance.

        Arguments:
            name: The name of the parameter.
            like: The value, of whose dtype and device others may be.
        """
        grad = torch.is_grad_enabled()
        if name not in self._log_probs.setdefault(grad, {}):
            values = {n: v for n, v in self.values.items() if self._is_alike(n, v, like)}
            variances = [float(self._variances.rules[n]) for n in values]  # type: ignore[arg-type]
            log_probs = _LogPriors.apply(variances, *values.values())
            self._log_probs[grad].update(zip(values, log_probs.unbind(), strict=True))
        return self._log_probs[grad][name]

    def _is_alike(self, name: str, value: Tensor, like: Tensor) -> bool:
        fixed = isinstance(self._variances.rules[name], float)
        same = value.dtype == like.dtype and value.device == like.device
        return fixed and same and not isinstance(value, GaussianTensor)


class Prior(dist.Independent):
    r"""The distribution :math:`\mathcal{N}(0, \sigma_p^2)` of one parameter.

    Its log-density of a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor`, which is the
    posterior :math:`q` itself instead of a draw, is :math:`-D_{KL}(q \| p)`, in closed form.
    That of a draw takes an empirical :math:`\sigma_p^2` as fixed: in expectation, the gradient of
    the ELBO is the same.

    Arguments:
        shape: The shape of the parameter.
        variances: The variances of all parameters.
        name: The name of the parameter.
        like: A tensor of the dtype and device.
        run: The run of the prior that the distribution is of, if any.
    """

    has_rsample = True

    def __init__(
        self,
        shape: torch.Size,
        variances: PriorVariances,
        name: str,
        like: Tensor,
        run: Run | None = None,
    ) -> None:
        # What the base classes' constructors would do, of which most steps need nothing.
        self.variances, self.name, self._like, self._run = variances, name, like, run
        self._batch_shape, self._event_shape = torch.Size(), shape
        self.reinterpreted_batch_ndims = len(shape)

    @lazy_property
    def _variance(self) -> float | Tensor:
        variance = self.variances.present(self.name)
        return variance.to(self._like) if isinstance(variance, Tensor) else variance

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The support, in which elements that carry no information have their values."""
        fixed = self.variances.fixed(self.name)
        if fixed is None:
            return super().support  # type: ignore[no-any-return]
        return FreeElements(self.variances.mean(self.name).to(self._like), fixed)

    @lazy_property
    def base_dist(self) -> dist.Normal:
        variance: Any = self._variance
        fixed = self.variances.fixed(self.name)
        if fixed is not None:
            mean = self.variances.mean(self.name).to(self._like).masked_fill(~fixed, 0.0)
            logvar = torch.as_tensor(variance).to(self._like).log().expand(mean.shape)
            return SiteNormal(mean, logvar.masked_fill(fixed, -math.inf), fixed=fixed)
        scale = self._like.new_tensor(variance).sqrt() if is_number(variance) else variance.sqrt()
        normal = dist.Normal(torch.zeros_like(scale), scale, validate_args=False)
        return normal.expand(self._event_shape)  # type: ignore[no-any-return]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Prior:
        new = type(self).__new__(type(self))
        new.variances, new.name, new._like, new._run = self.variances, self.name, self._like, None
        new._variance = self._variance
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):
            if value.noise.divergence is None:
                precision = 1 / torch.as_tensor(self._variance)
                terms = divergence_terms(*value.posterior, precision)
                fixed = self.variances.fixed(self.name)
                divergence = (terms if fixed is None else terms.masked_fill(fixed, 0.0)).sum()
            else:
                divergence = value.noise.divergence(value.parameter, self.variances)
            shape = value.shape[: len(value.shape) - len(self._event_shape)]
            return -divergence.expand(self._batch_shape if self._batch_shape else shape)
        variance: Any = self._variance
        plain = not self._batch_shape and value.is_floating_point()
        plain = plain and self.variances.fixed(self.name) is None
        if not plain or value.shape != self.event_shape or isinstance(variance, Tensor):
            return super().log_prob(value)  # type: ignore[no-any-return]
        if is_transformed() or value.dtype.itemsize < 4:
            constant = value.numel() * math.log(2 * math.pi * variance)
            half: Tensor = 0.5 * (value.square().sum() / variance + constant)
            return -half
        if self._run is not None and value is self._run.values.get(self.name):
            return self._run.log_prob(self.name, value)
        log_probs: Tensor = _LogPriors.apply([variance], value)
        return log_probs[0]


class _LogPriors(torch.autograd.Function):
    r"""The log-density of each of several draws under :math:`\mathcal{N}(0, \sigma_p^2 I)`."""

    @staticmethod
    def forward(ctx: Any, variances: Sequence[float], *values: Tensor) -> Tensor:
        ctx.variances = variances
        ctx.save_for_backward(*values)
        flats = [value.reshape(-1) for value in values]
        squares: list[Any] = [torch.dot(flat, flat) for flat in flats]
        if values[0].is_cpu:  # other devices would have to be waited for
            squares = [float(square) for square in squares]
        log_probs = [
            -0.5 * (square / variance + len(flat) * math.log(2 * math.pi * variance))
            for square, variance, flat in zip(squares, variances, flats, strict=True)
        ]
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
    divergence = posterior.joint.divergence(posterior.name, prior.variances)
    return divergence.expand(posterior.batch_shape)


class GaussianPrior(PyroModule):
    r"""Independent Gaussian priors over named parameters.

    .. math:: p(\theta) = \prod_i \mathcal{N}(\theta_i \mid 0, \sigma_p^2)

    Each site bears the dotted name of its parameter, behind `site_prefix` and a dot if there is
    one. The distributions follow the module's dtype and device, but stay in single precision when
    the module is converted to half.

    Arguments:
        parameters: The included parameters by dotted name; only shape, dtype and device are used.
        variance: The variance :math:`\sigma_p^2`: of every element, or the variances by parameter.
        site_prefix: What stands in front of each site's name.

    Example:
        >>> prior = GaussianPrior({"w": nn.Parameter(torch.zeros(2))}, variance=4.0)
        >>> prior()["w"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        variance: float | PriorVariances,
        site_prefix: str = "",
    ) -> None:
        """Makes the prior, whose class describes the arguments."""
        super().__init__(site_prefix)
        # Sites are attributes of this module under any name that a parameter may have. So what else
        # it has bears a mangled name, and the buffers a name that no attribute has.
        if not isinstance(variance, PriorVariances):
            variance = PriorVariances(dict.fromkeys(parameters, variance))
        self.__variances, self.__present = variance, Present()
        sites, likes = {}, {}
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            like = f"{leaf}:like"
            sites[name] = PyroSample(
                GaussianSite(parameter.shape, variance, name, like, self.__present)
            )
            likes[path, like] = parameter.detach().new_zeros((), dtype=wide(parameter.dtype))
        plant(self, sites, node=PyroModule)
        for (path, like), zero in likes.items():
            self.get_submodule(path).register_buffer(like, zero, persistent=False)
        owners = ((name, *name.rpartition(".")[::2]) for name in parameters)
        self.__sites = [(name, self.get_submodule(path), leaf) for name, path, leaf in owners]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(keeping_precision(fn), recurse)
        return self

    @staticmethod
    def variances_of(prior: GaussianPrior) -> PriorVariances:
        """Returns the variances of a prior.

        Arguments:
            prior: The prior, whose own attributes bear the names of parameters.
        """
        return prior.__variances

    def forward(self) -> dict[str, Tensor]:
        """Makes the sample statements.

        Returns:
            The value of each site by the name of its parameter.
        """
        run = self.__present.run = Run(self.__variances)
        try:
            run.values = {name: getattr(module, leaf) for name, module, leaf in self.__sites}
        finally:
            self.__present.run = None
        return dict(run.values)


@contextmanager
def distinct_sites() -> Iterator[None]:
    """Says what to do when Pyro finds two sites of one name.

    Raises:
        RuntimeError: If the sites of a model or guide were already there.
    """
    try:
        yield
    except RuntimeError as error:
        if "Multiple sample sites" not in str(error):
            raise
        raise RuntimeError(
            f"Expected each site once per run of a Pyro model or guide; got two ({error}). Open one"
            " `with bnn.lift() as net:` and call `net` as often as needed. Two models need names of"
            " their own: BayesianModel(..., name='encoder')."
        ) from error
