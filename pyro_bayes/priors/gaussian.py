"""Gaussian priors as users write them, and the usual scalings with the size of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_finite, check_positive, is_number, is_positive
from pyro_bayes.posterior.rounding import wide
from pyro_bayes.priors.empirical import Empirical
from pyro_bayes.priors.parameter import NormalPrior, ParameterPrior

Var: TypeAlias = "float | Tensor | Empirical | Literal['empirical']"
Mean: TypeAlias = "float | Tensor | Mapping[str, Tensor] | Literal['base']"


@dataclass(frozen=True, eq=False)
class Gaussian:
    r"""A Gaussian prior with any mean and variance.

    .. math:: p(\theta) = \prod_i \mathcal{N}(\theta_i \mid \mu_{p,i}, \sigma_{p,i}^2)

    Arguments:
        var: The variance :math:`\sigma_p^2`: a number, a tensor of the parameter's shape,
            `"empirical"` or an :class:`~pyro_bayes.priors.Empirical`.
        mean: The mean :math:`\mu_p`: a number, a tensor of the parameter's shape, a mapping that
            has one for each parameter by its dotted name, such as a state dict, or `"base"`: the
            base's parameters as they are when the model is made. With pretrained ones, this is
            MOPED, and what fine-tuning knows as L2-SP.

    References:
        | Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes (MOPED)
          (Krishnan et al., 2020)
        | https://arxiv.org/abs/1906.05323

        | Explicit Inductive Bias for Transfer Learning with Convolutional Networks (L2-SP)
          (Li et al., 2018)
        | https://arxiv.org/abs/1802.01483

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> pretrained = torch.nn.Linear(3, 1)
        >>> bnn = BayesianModel(pretrained, prior=Gaussian(var=0.01, mean="base"))
        >>> closer = BayesianModel(pretrained, prior=Gaussian(var=0.01)).kl_divergence()
        >>> bool(bnn.kl_divergence() < closer)
        True
    """

    var: Var = 1.0
    mean: Mean = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.var, Tensor):
            check_finite("var", self.var)
            if not bool((self.var > 0).all()):
                raise ValueError(
                    f"Expected var to be positive; got {self.var.detach().min().item():g}."
                )
        elif not (isinstance(self.var, Empirical) or self.var == "empirical"):
            if not is_positive(self.var):
                raise ValueError(
                    "Expected var to be a positive, finite number, a tensor of such, 'empirical' or"
                    f" an Empirical; got {self.var!r}."
                )
            object.__setattr__(self, "var", float(self.var))
        if isinstance(self.mean, Mapping):
            tensors = {k: v for k, v in self.mean.items() if isinstance(v, Tensor)}
            object.__setattr__(self, "mean", {k: v.detach() for k, v in tensors.items()})
        elif isinstance(self.mean, Tensor):
            check_finite("mean", self.mean)
        elif self.mean != "base" and not (is_number(self.mean) and math.isfinite(self.mean)):
            raise ValueError(
                "Expected mean to be a finite number, a tensor, a mapping from the names of"
                f" parameters to tensors, or 'base'; got {self.mean!r}."
            )

    def of(self, name: str, parameter: Tensor) -> NormalPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.

        Raises:
            ValueError: If a tensor is of another shape, or a mapping lacks the parameter.
        """
        var: Any = Empirical() if isinstance(self.var, str) else self.var
        if isinstance(var, Empirical):
            var.check(name, parameter.shape)
        else:
            check_range("var", name, var, parameter.dtype)
            var = _fitting("var", name, var, parameter)
        mean: Any = self.mean
        if isinstance(mean, str):
            mean = parameter
        elif isinstance(mean, Mapping):
            if name not in mean:
                raise ValueError(
                    f"Expected mean to have a tensor for each parameter; got none for '{name}'."
                    ' Give new parameters a prior of their own: prior={"head": priors.Gaussian(),'
                    ' "": priors.Gaussian(mean=…)}.'
                )
            mean = mean[name]
        return NormalPrior(name, parameter.shape, var, _fitting("mean", name, mean, parameter))


def check_range(argument: str, name: str, variance: float | Tensor, dtype: torch.dtype) -> None:
    """Raises a `ValueError` unless variances and their inverses are numbers of a dtype.

    Arguments:
        argument: The name of the argument that they are of.
        name: The name of the parameter.
        variance: The variances.
        dtype: The dtype of the parameter; posteriors are kept in single precision at least.
    """
    dtype = wide(dtype)
    tiny = torch.finfo(dtype).tiny
    values = torch.as_tensor(variance, dtype=torch.double).detach()
    if values.numel() == 0 or values.is_meta:
        return
    for value in (float(values.min()), float(values.max())):
        if not tiny <= value <= 1 / tiny:
            raise ValueError(
                f"Expected {argument} to be between {tiny:.2g} and {1 / tiny:.2g} for '{name}',"
                f" whose divergence is computed in {dtype}, where a smaller variance or its inverse"
                f" is no number; got {value:g}."
            )


def _fitting(argument: str, name: str, value: float | Tensor, parameter: Tensor) -> float | Tensor:
    """Returns a number, or a copy of a tensor of a parameter's shape, in the posterior's dtype."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.shape == () and parameter.shape != ():
        return float(value)
    if value.shape != parameter.shape:
        raise ValueError(
            f"Expected {argument} of '{name}' to be a number or a tensor of shape"
            f" {tuple(parameter.shape)}; got shape {tuple(value.shape)}. Parameters of other shapes"
            " get a prior of their own by pattern."
        )
    return value.detach().to(parameter.device, wide(parameter.dtype), copy=True)


Scaling: TypeAlias = Callable[[str, Tensor], Gaussian]
"""A prior as a function of the name and the parameter."""


def fan_in(gain: float = 1.0, *, bias_var: float = 1.0) -> Scaling:
    r"""Returns the prior :math:`\mathcal{N}(0, g^2 / n_\text{in})` of weights.

    A layer whose inputs are of order one then has outputs of order one. A weight's number of inputs
    is that of the elements of `weight[0]`, as :mod:`torch.nn.init` counts them. As measured in the
    guide on priors, it is narrow for wide networks with few data.

    Arguments:
        gain: The factor :math:`g`.
        bias_var: The variance of parameters with fewer than two dimensions, which have no inputs.

    Returns:
        A function of the name and the parameter, for `prior=`.

    References:
        | Priors for Infinite Networks (Neal, 1996)
        | https://doi.org/10.1007/978-1-4612-0745-0_2

    Example:
        >>> fan_in()("weight", torch.zeros(5, 4)).var
        0.25
    """
    check_positive("gain", gain)
    check_positive("bias_var", bias_var)
    return lambda name, p: Gaussian(bias_var if p.dim() < 2 else gain**2 / _fans(p)[0])


def he(*, bias_var: float = 1.0) -> Scaling:
    r"""Returns the prior :math:`\mathcal{N}(0, 2 / n_\text{in})` of weights, for ReLU networks.

    Arguments:
        bias_var: The variance of parameters with fewer than two dimensions, as in :func:`fan_in`.

    Returns:
        A function of the name and the parameter, for `prior=`.

    References:
        | Delving Deep into Rectifiers (He et al., 2015)
        | https://arxiv.org/abs/1502.01852

    Example:
        >>> he()("weight", torch.zeros(5, 4)).var
        0.5
    """
    check_positive("bias_var", bias_var)
    return lambda name, p: Gaussian(bias_var if p.dim() < 2 else 2 / _fans(p)[0])


def glorot(*, bias_var: float = 1.0) -> Scaling:
    r"""Returns the prior :math:`\mathcal{N}(0, 2 / (n_\text{in} + n_\text{out}))` of weights.

    Arguments:
        bias_var: The variance of parameters with fewer than two dimensions, as in :func:`fan_in`.

    Returns:
        A function of the name and the parameter, for `prior=`.

    References:
        | Understanding the Difficulty of Training Deep Feedforward Neural Networks
          (Glorot and Bengio, 2010)
        | https://proceedings.mlr.press/v9/glorot10a.html

    Example:
        >>> glorot()("weight", torch.zeros(6, 4)).var
        0.2
    """
    check_positive("bias_var", bias_var)
    return lambda name, p: Gaussian(bias_var if p.dim() < 2 else 2 / sum(_fans(p)))


def radford(*, bias_var: float = 1.0) -> Scaling:
    """Returns Radford Neal's scaling, which is :func:`fan_in` with a gain of 1.

    Arguments:
        bias_var: The variance of parameters with fewer than two dimensions, as in :func:`fan_in`.

    Returns:
        A function of the name and the parameter, for `prior=`.

    Example:
        >>> radford()("weight", torch.zeros(5, 4)).var
        0.25
    """
    return fan_in(bias_var=bias_var)


def _fans(parameter: Tensor) -> tuple[int, int]:
    outputs, inputs, *window = parameter.shape
    area = torch.Size(window).numel()
    return max(inputs * area, 1), max(outputs * area, 1)


class FormerPosterior:
    r"""A posterior as the prior of another model, see :meth:`pyro_bayes.BayesianModel.as_prior`.

    Arguments:
        pairs: The means and log-variances by the dotted names of parameters.
        new: The prior of parameters that it lacks, by name and parameter.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        new: Callable[[str, Tensor], ParameterPrior],
    ) -> None:
        """Makes the prior, whose class describes the arguments."""
        self._new = new
        self._pairs = {
            name: (mean.detach().clone(), logvar.detach().clone())
            for name, (mean, logvar) in pairs.items()
        }

    @property
    def names(self) -> list[str]:
        """The names of the posterior's parameters."""
        return [*self._pairs]

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def of(self, name: str, parameter: Tensor) -> ParameterPrior:
        """Returns the prior of one parameter.

        Arguments:
            name: The dotted name of the parameter.
            parameter: The parameter.

        Raises:
            ValueError: If the posterior's parameter of this name is of another shape.
        """
        if name not in self._pairs:
            return self._new(name, parameter)
        mean, logvar = self._pairs[name]
        if mean.shape != parameter.shape:
            raise ValueError(
                f"Expected the former posterior to have '{name}' of shape {tuple(parameter.shape)};"
                f" got {tuple(mean.shape)}. Give what has changed a prior of its own:"
                f' prior={{"{name}": priors.Gaussian(), "": former.as_prior()}}.'
            )
        variance = logvar.exp().masked_fill(logvar.isneginf(), 1.0)  # not random, in no divergence
        check_range("the former posterior's variances", name, variance, parameter.dtype)
        pair = (_fitting("prior", name, tensor, parameter) for tensor in (variance, mean))
        return NormalPrior(name, parameter.shape, *pair)
