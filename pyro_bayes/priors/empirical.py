"""The prior variance that the posterior itself makes most probable, and groups of elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        check_dims(self.dims, name, shape)

    def variance(self, mean: Tensor, logvar: Tensor, fixed: Tensor | None = None) -> Tensor:
        r"""Computes :math:`\sigma_p^2`, of a shape that broadcasts to that of the parameter.

        It never falls below the least normal number of the dtype, where a logarithm ends.

        Arguments:
            mean: The means :math:`\mu`.
            logvar: The log-variances :math:`\log \sigma^2`, of the same shape.
            fixed: Which elements are not random, and left out. Where all are, the variance is 1.
        """
        kept = {dim % mean.dim() for dim in self.dims}
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
    def dims(self) -> tuple[int, ...]:
        """The dimensions, a tuple."""
        return self.each if isinstance(self.each, tuple) else (self.each,)


def check_dims(dims: tuple[int, ...], name: str, shape: torch.Size) -> None:
    """Raises a `ValueError` unless a parameter has dimensions.

    Arguments:
        dims: The dimensions.
        name: The name of the parameter.
        shape: Its shape.
    """
    for dim in dims:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(
                "Expected each to name dimensions that every parameter has; got"
                f" each={dim} for '{name}' of shape {tuple(shape)}. Give parameters of other shapes"
                ' another prior, by pattern: {"**weight": …, "": …}.'
            )


def _is_dim(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
