"""The prior variance that the posterior itself makes most probable, and groups of elements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.checks import is_number


@dataclass(frozen=True)
class Empirical:
    r"""The prior variance that maximises the ELBO, in closed form (empirical Bayes).

    .. math:: \sigma_p^2 = \max\Big( \frac{1}{n} \sum_i (\mu_i^2 + \sigma_i^2), \; c \Big)

    The sum is over the :math:`n` elements of one tensor, or of each of its groups. Of all variances
    not below :math:`c`, it has the least divergence. So the loss is the negative ELBO under this
    prior, and at most that under any number in `prior_var` from :math:`c` on. The variance follows
    the posterior at every moment, so that nothing has to be updated. It is where the divergence is
    least, so the gradient is that at a fixed :math:`\sigma_p^2`, and estimators that draw from the
    posterior take it as fixed.

    **Why there is a least variance.** Initial weights of a wide layer are narrow: their variance is
    of the order of one over its inputs. With :math:`c = 0` the prior is as narrow. Its divergence
    pulls the means to 0 before the data have made any of them large, and the prior follows. On
    MNIST, a 784-50-50-10 network then predicts a constant; so does a 784-400-400-10 one that had
    `prior_var=1` for the first half of its training. A prior on :math:`\sigma_p^2` (Wu et al.)
    prevents that only if it is worth many weights. One that is worth :math:`\lambda n` weights of
    variance :math:`s^2` gives
    :math:`\sigma_p^2 = (\frac{1}{n} \sum_i (\mu_i^2 + \sigma_i^2) + \lambda s^2) / (1 + \lambda)`,
    which has a least value, too; it predicts as well, but adds a term to the loss.

    Pyro's sample sites have the variance of the moment at which the model runs. So SVI trains the
    same ELBO, a model that is run without a guide draws from the prior as the posterior has made
    it, and NUTS samples the posterior under that prior, which stays as it is meanwhile.

    Warning:
        A group that the data do not support is pulled to 0 as by `prior_var=c`. With `least=0`, it
        is switched off: its means and deviations shrink together. That may be most of a network, or
        all of it. The ELBO is higher then, and predictions may be worse than under `prior_var=1`:
        compare on data held out.

    Arguments:
        each: The dimensions each of whose indices has a variance of its own, `()` for one variance
            per tensor. In the weight of a :class:`torch.nn.Linear`, 1 gives each input its own
            (automatic relevance determination), and 0 each output.
        least: The least variance :math:`c`. With 0, nothing holds the prior of a group that
            collapses.

    References:
        | Deterministic Variational Inference for Robust Bayesian Neural Networks (Wu et al., 2019)
        | https://arxiv.org/abs/1810.03958

        | Collapsed Variational Bounds for Bayesian Neural Networks (Tomczak et al., 2021)
        | https://openreview.net/forum?id=ykN3tbJ0qmX

        | Bayesian Learning for Neural Networks (Neal, 1996)
        | https://doi.org/10.1007/978-1-4612-0745-0

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> net = torch.nn.Linear(3, 8)
        >>> bnn = BayesianModel(net, prior_var={"weight": Empirical(each=1), "bias": 1.0})
        >>> bnn.prior()["weight"].shape
        torch.Size([8, 3])
        >>> Empirical().variance(torch.tensor([0.1, 2.0]), torch.tensor([-9.0, -9.0]))
        tensor(2.0051)
        >>> Empirical().variance(torch.tensor([0.1, 0.2]), torch.tensor([-9.0, -9.0]))
        tensor(0.3000)
    """

    each: int | tuple[int, ...] = ()
    least: float = 0.3

    def __post_init__(self) -> None:
        dims = (self.each,) if _is_dim(self.each) else self.each
        if not isinstance(dims, tuple | list) or not all(map(_is_dim, dims)):
            raise ValueError(
                f"Expected each to be a dimension or a tuple of dimensions; got {self.each!r}."
            )
        if not is_number(self.least) or not 0 <= self.least < math.inf:
            raise ValueError(
                "Expected least to be a variance, 0 or a positive, finite number; got"
                f" {self.least!r}."
            )
        object.__setattr__(self, "each", tuple(dims))

    def check(self, name: str, shape: torch.Size) -> None:
        """Raises a `ValueError` unless a parameter has the dimensions."""
        check_dims(self.dims, name, shape)

    def variance(self, mean: Tensor, logvar: Tensor, fixed: Tensor | None = None) -> Tensor:
        r"""Computes :math:`\sigma_p^2`, of a shape that broadcasts to that of the parameter.

        It never falls below `least`, nor the least normal number of the dtype, where a logarithm
        ends.

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
        return average.clamp_min(max(self.least, torch.finfo(average.dtype).tiny))

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
