"""Special functions that torch does not have, or not precisely enough."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bayes.base.state import where_double


def wide(x: Tensor) -> Tensor:
    """Returns a tensor in double precision, where its device has that.

    Differences of large numbers, as of two values of the log-gamma function, need it.

    Arguments:
        x: The tensor.
    """
    return x if x.device.type == "mps" else x.double()


def betainc(a: Tensor, b: Tensor, x: Tensor, *, complement: Tensor) -> Tensor:
    r"""Computes the regularised incomplete beta function :math:`I_x(a, b)`.

    By Lentz's method for its continued fraction, in double precision, without gradients.

    Arguments:
        a: The first parameter, positive.
        b: The second parameter, positive.
        x: The argument, between 0 and 1.
        complement: :math:`1 - x`, which near :math:`x = 1` only the caller has exactly.

    Returns:
        The values, of the parameters' and arguments' common shape and the dtype of `x`.

    References:
        | Numerical Recipes, section 6.4 (Press et al., 2007)
        | https://dlmf.nist.gov/8.17#v

    Example:
        >>> x = torch.tensor(0.3)
        >>> betainc(torch.tensor(1.0), torch.tensor(2.0), x, complement=1 - x)  # 1 - (1 - x)²
        tensor(0.5100)
    """
    with torch.no_grad():
        parts = [where_double(part).double() for part in (a, b, x, complement)]
        a, b, u, v = torch.broadcast_tensors(*parts)
        # The fraction converges fast on the left of the mean only.
        mirrored = u > (a + 1) / (a + b + 2)
        a, b = torch.where(mirrored, b, a), torch.where(mirrored, a, b)
        u, v = torch.where(mirrored, v, u), torch.where(mirrored, u, v)
        logs = torch.special.xlogy(a, u) + torch.special.xlogy(b, v)
        front = (logs + (a + b).lgamma() - a.lgamma() - b.lgamma()).exp() / a
        value = front / _fraction(a, b, u, max(torch.finfo(x.dtype).eps / 64, 1e-15))
        return torch.where(mirrored, 1 - value, value).to(x)


def _fraction(a: Tensor, b: Tensor, x: Tensor, precision: float) -> Tensor:
    """Returns 1 + d₁ / (1 + d₂ / (1 + …)) of the continued fraction (8.17.22 of the DLMF)."""
    tiny = torch.finfo(x.dtype).tiny  # in the place of 0, which is met exactly if at all
    value, c, d = torch.ones_like(x), torch.ones_like(x), torch.zeros_like(x)
    for n in range(1, 20_001):  # it takes about the square root of a or b
        m = n // 2
        if n % 2:
            term = -((a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))) * x
        else:
            term = (m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))) * x
        c = torch.div(term, c).add_(1)
        d = term.mul_(d).add_(1)
        c.masked_fill_(c == 0, tiny)
        d.masked_fill_(d == 0, tiny).reciprocal_()
        factor = c * d
        value.mul_(factor)
        if n % 4 == 0 and not ((factor - 1).abs() >= precision).any():
            break
    return value
