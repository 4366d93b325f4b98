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

from pyro_bayes.base.nested import plant
from pyro_bayes.noise.gaussian_tensor import GaussianTensor
from pyro_bayes.posterior import fused
from pyro_bayes.posterior.scores import half_square
from pyro_bayes.priors.variance import Empirical, PriorVariances


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
        self._priors: dict[Any, Prior] = {}

    def __call__(self, module: nn.Module) -> dist.TorchDistribution:
        like: Any = module._buffers[self.like]  # get_buffer walks through Pyro's attributes
        rule = self.variances.rules[self.name]
        if isinstance(rule, Empirical):
            variance = torch.as_tensor(self.variances.present(self.name)).to(like)
            return EmpiricalPrior(self.shape, variance, rule)
        kind = (like.dtype, like.device)
        if kind not in self._priors:
            self._priors[kind] = Prior(self.shape, rule, like)
        return self._priors[kind]

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _priors={})


class Prior(dist.Independent):
    r"""The distribution :math:`\mathcal{N}(0, \sigma_p^2 I)` of one parameter.

    Its log-density of a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor`, which is the posterior
    :math:`q` itself instead of a draw from it, is :math:`-D_{KL}(q \| p)`, in closed form.

    Arguments:
        shape: The shape of the parameter.
        variance: The variance :math:`\sigma_p^2`.
        like: A tensor of the dtype and device.
    """

    def __init__(self, shape: torch.Size, variance: float, like: Tensor) -> None:
        self._variance = variance
        scale = like.new_full((), variance**0.5)
        normal = dist.Normal(torch.zeros_like(scale), scale, validate_args=False)
        super().__init__(normal.expand(shape), len(shape), validate_args=False)
        constant = -0.5 * shape.numel() * math.log(2 * math.pi * variance)
        self._constant = like.new_full((), constant)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Prior:
        new = type(self).__new__(type(self))
        new._variance, new._constant = self._variance, self._constant
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):
            divergences = value.noise.divergences
            if divergences is None:
                kl = fused.kl_divergence({"": value.posterior}, self._variance)
            else:
                kl = divergences(self._variance)[value.parameter]
            return -kl.expand(self.batch_shape)
        half = half_square(value) if value.shape == self.event_shape else None
        if half is None:
            dims = tuple(range(-len(self.event_shape), 0))
            half = 0.5 * (value.square().sum(dims) if dims else value.square())
        return torch.sub(self._constant, half, alpha=1 / self._variance)


class EmpiricalPrior(dist.Independent):
    r"""The distribution :math:`\mathcal{N}(0, \sigma_p^2)` of one parameter, by its posterior.

    The log-density of a draw takes :math:`\sigma_p^2` as fixed: in expectation, the gradient of the
    ELBO is the same. That of a :class:`~pyro_bayes.noise.gaussian_tensor.GaussianTensor` is as in
    :class:`Prior`.

    Arguments:
        shape: The shape of the parameter.
        variance: The present :math:`\sigma_p^2`, of a shape that broadcasts to it.
        empirical: What it is by.
    """

    def __init__(self, shape: torch.Size, variance: Tensor, empirical: Empirical) -> None:
        self._empirical = empirical
        normal = dist.Normal(torch.zeros_like(variance), variance.sqrt(), validate_args=False)
        super().__init__(normal.expand(shape), len(shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EmpiricalPrior:
        new = type(self).__new__(type(self))
        new._empirical = self._empirical
        return super().expand(batch_shape, _instance=new)  # type: ignore[no-any-return]

    def log_prob(self, value: Any) -> Tensor:
        if isinstance(value, GaussianTensor):
            return -self._empirical.kl_divergence(*value.posterior).expand(self.batch_shape)
        return super().log_prob(value)  # type: ignore[no-any-return]


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
