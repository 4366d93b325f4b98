"""The prior p(θ): one Pyro sample site per included parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import register_kl
from torch.distributions.utils import lazy_property

from pyro_bayes.base.checks import is_number
from pyro_bayes.base.nested import plant
from pyro_bayes.base.torch_private import is_transformed
from pyro_bayes.noise.gaussian_tensor import GaussianTensor
from pyro_bayes.posterior.gaussian import divergence_terms
from pyro_bayes.priors.variance import PriorVariances
from pyro_bayes.pyro_bridge.site import Posterior


class GaussianSite:
    r"""The prior :math:`\mathcal{N}(0, \sigma_p^2 I)` of one parameter, as a Pyro prior function.

    Arguments:
        shape: The shape of the parameter.
        variances: The variances of all parameters.
        name: The dotted name of the parameter.
        like: The name of a buffer of the site's module, which shows the dtype and device.
    """

    def __init__(self, shape: torch.Size, variances: PriorVariances, name: str, like: str) -> None:
        self.shape, self.variances, self.name, self.like = shape, variances, name, like

    def __call__(self, module: nn.Module) -> dist.TorchDistribution:
        like: Any = module._buffers[self.like]  # get_buffer walks through Pyro's attributes
        return Prior(self.shape, self.variances, self.name, like)


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
    """

    has_rsample = True

    def __init__(
        self, shape: torch.Size, variances: PriorVariances, name: str, like: Tensor
    ) -> None:
        # What the base classes' constructors would do, of which most steps need nothing.
        self.variances, self.name, self._like = variances, name, like
        self._batch_shape, self._event_shape = torch.Size(), shape
        self.reinterpreted_batch_ndims = len(shape)

    @lazy_property
    def _variance(self) -> float | Tensor:
        variance = self.variances.present(self.name)
        return variance.to(self._like) if isinstance(variance, Tensor) else variance

    @lazy_property
    def base_dist(self) -> dist.Normal:
        variance: Any = self._variance
        scale = self._like.new_tensor(variance).sqrt() if is_number(variance) else variance.sqrt()
        normal = dist.Normal(torch.zeros_like(scale), scale, validate_args=False)
        return normal.expand(self._event_shape)  # type: ignore[no-any-return]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Prior:
        new = type(self).__new__(type(self))
        new.variances, new.name, new._like = self.variances, self.name, self._like
        new._variance = self._variance
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):
            if value.noise.divergence is None:
                precision = 1 / torch.as_tensor(self._variance)
                divergence = divergence_terms(*value.posterior, precision).sum()
            else:
                divergence = value.noise.divergence(value.parameter, self.variances)
            return -divergence.expand(self.batch_shape)
        variance: Any = self._variance
        if value.shape != self.event_shape or isinstance(variance, Tensor):
            return super().log_prob(value)  # type: ignore[no-any-return]
        if is_transformed() or value.dtype.itemsize < 4:
            constant = value.numel() * math.log(2 * math.pi * variance)
            half: Tensor = 0.5 * (value.square().sum() / variance + constant)
            return -half
        log_prob: Tensor = _LogPrior.apply(variance, value)
        return log_prob


class _LogPrior(torch.autograd.Function):
    r"""The log-density of one draw under :math:`\mathcal{N}(0, \sigma_p^2 I)`."""

    @staticmethod
    def forward(ctx: Any, variance: float, value: Tensor) -> Tensor:
        ctx.variance = variance
        ctx.save_for_backward(value)
        flat = value.reshape(-1)
        constant = flat.numel() * math.log(2 * math.pi * variance)
        return torch.dot(flat, flat).div_(variance).add_(constant).mul_(-0.5)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[None, Tensor]:
        (value,) = ctx.saved_tensors
        return None, value * (grad / -ctx.variance)


@register_kl(Posterior, Prior)  # type: ignore[untyped-decorator]
def _kl_divergence(posterior: Posterior, prior: Prior) -> Tensor:
    divergence = posterior.joint.divergence(posterior.name, prior.variances)
    return divergence.expand(posterior.batch_shape)


class GaussianPrior(PyroModule):
    r"""Independent Gaussian priors over named parameters.

    .. math:: p(\theta) = \prod_i \mathcal{N}(\theta_i \mid 0, \sigma_p^2)

    Each site bears the dotted name of its parameter, behind `site_prefix` and a dot if there is
    one. The distributions follow the module's dtype and device.

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
        super().__init__(site_prefix)
        # Sites are attributes of this module under any name that a parameter may have. So what else
        # it has bears a mangled name, and the buffers a name that no attribute has.
        if not isinstance(variance, PriorVariances):
            variance = PriorVariances(dict.fromkeys(parameters, variance))
        self.__variances = variance
        sites, likes = {}, {}
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            like = f"{leaf}:like"
            sites[name] = PyroSample(GaussianSite(parameter.shape, variance, name, like))
            likes[path, like] = parameter.detach().new_zeros(())
        plant(self, sites, node=PyroModule)
        for (path, like), zero in likes.items():
            self.get_submodule(path).register_buffer(like, zero, persistent=False)
        owners = ((name, *name.rpartition(".")[::2]) for name in parameters)
        self.__sites = [(name, self.get_submodule(path), leaf) for name, path, leaf in owners]

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
        return {name: getattr(module, leaf) for name, module, leaf in self.__sites}


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
