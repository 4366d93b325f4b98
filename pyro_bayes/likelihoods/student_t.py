"""Noise with heavy tails."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, distributions
from torch.distributions import Distribution

from pyro_bayes.base.checks import check_positive
from pyro_bayes.likelihoods.likelihood import Likelihood
from pyro_bayes.likelihoods.special import betainc, wide


class StudentT(Likelihood):
    r"""Student's t noise, which forgives outliers.

    .. math:: p(y \mid f) = \prod_k \frac{\Gamma(\frac{\nu + 1}{2})}
              {\Gamma(\frac{\nu}{2}) \sqrt{\pi \nu} s_k}
              \left(1 + \frac{(y_k - f_k)^2}{\nu s_k^2}\right)^{-\frac{\nu + 1}{2}}

    Output and target have the same shape, :math:`(B, *)`. A learned scale is the parameter
    `log_scale`. It is not the standard deviation, which is :math:`s \sqrt{\nu / (\nu - 2)}`.

    Arguments:
        scale: The scale :math:`s`, in the unit of the target: one number, or a tensor of the shape
            of one example's target.
        df: The degrees of freedom :math:`\nu`. The predictive variance is infinite up to 2, and
            there is no predictive mean up to 1.
        learn: Whether the scale is learned, by maximum likelihood and from `scale` on.

    Raises:
        TypeError: If `scale` is not of numbers.
        ValueError: If `scale` or `df` is not positive and finite.

    References:
        | Robust Statistical Modeling Using the t Distribution (Lange et al., 1989)
        | https://doi.org/10.1080/01621459.1989.10478852

    Example:
        >>> StudentT(1.0, df=3).log_prob(torch.zeros(2), torch.tensor([0.0, 10.0]))
        tensor([-1.0009, -8.0731])
    """

    def __init__(self, scale: float | Tensor, *, df: float = 4.0, learn: bool = False) -> None:
        super().__init__()
        check_positive("df", df)
        self._set_positive("scale", scale, learn)
        self.df = df

    @property
    def scale(self) -> Tensor:
        """The scale, of the shape that it was given with."""
        return self.log_scale.exp()  # type: ignore[operator]

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        mean = self.as_real(output, batch_dims)
        scale = self._get_positive("scale", mean, batch_dims)
        noise = _StudentT(mean.new_tensor(self.df), mean, scale, validate_args=False)
        return self.per_example(noise, batch_dims)


class _StudentT(distributions.StudentT, TorchDistributionMixin):
    """Student's t distribution, with a distribution function, also if it is nearly Gaussian."""

    def log_prob(self, value: Tensor) -> Tensor:
        df = wide(self.df)
        peak = ((df + 1) / 2).lgamma() - (df / 2).lgamma() - (math.pi * df).log() / 2
        squares = ((value - self.loc) / self.scale).square()
        decay: Tensor = (self.df + 1) / 2 * (squares / self.df).log1p()
        return peak.to(self.loc.dtype) - self.scale.log() - decay

    def cdf(self, value: Tensor) -> Tensor:
        df, squares = wide(self.df), wide((value - self.loc) / self.scale).square()
        within = betainc(
            torch.full_like(df, 0.5), df / 2, squares / (df + squares),
            complement=df / (df + squares),
        )  # fmt: skip
        return 0.5 + 0.5 * (value - self.loc).sign() * within.to(value.dtype)
