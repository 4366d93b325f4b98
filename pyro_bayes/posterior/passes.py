"""Passes over the memory of a posterior: draws, divergences and their gradients.

Each goes once through the elements, chunk by chunk on a CPU, where memory is what a pass waits for.
On GPUs that Triton compiles for, each is a kernel. Nothing here is seen by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.posterior import gaussian
from pyro_bayes.posterior.gpu import kernels
from pyro_bayes.posterior.layout import Chunk, Layout

Kind: TypeAlias = Literal["draws", "deviations", "variances"]
r"""What to compute: draws :math:`\mu + \sigma \epsilon`, deviations :math:`\sigma \epsilon` or
variances :math:`\sigma^2`."""
Number: TypeAlias = Literal["divergence", "divergences", "log_densities"]
"""A number to compute beside: the divergence, that of each parameter, or log-densities of draws."""


def sample(
    layout: Layout,
    kind: Kind | None,
    mean: Tensor,
    logvar: Tensor,
    number: Number | None,
    precision: float | Tensor,
    prior_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Draws all parameters, or computes deviations or variances, or a divergence alone.

    Arguments:
        layout: Where parameters lie.
        kind: What to compute, if anything but the number.
        mean: The means :math:`\mu`, a flat tensor.
        logvar: The :math:`\log \sigma^2`, likewise.
        number: What to compute beside, in nats, if anything.
        precision: The precision :math:`1 / \sigma_p^2` of the prior, of all elements or of each; 0
            for elements whose negative entropy is wanted.
        prior_mean: The mean of the prior, a flat tensor; 0 by default.

    Returns:
        What was asked for, a flat tensor; the deviations of draws, or the same again; the number.
    """
    device = kernels(mean)
    if device:
        output, spread = device.sample(kind, mean, logvar) if kind else (mean, mean)
        if number is None:
            return output, spread, None
        if number == "log_densities":
            terms = gaussian.log_densities(spread, torch.zeros_like(mean), logvar)
        else:
            deviation = mean if prior_mean is None else mean - prior_mean
            terms = device.divergence_terms(deviation, logvar, precision)
        terms = layout.without_fixed(terms)
        return output, spread, terms.sum() if number == "divergence" else layout.sums(terms)
    output = torch.empty_like(mean) if kind else mean
    spread = torch.empty_like(mean) if kind == "draws" else output
    sums = _Sums(layout, number, mean)
    tensors = mean, logvar, output, spread, precision, prior_mean
    for chunk, m, v, o, s, p, c in layout.pieces(*tensors):
        total = None
        if kind in (None, "variances"):
            variances = torch.exp(v, out=s) if kind else v.exp()
            total = _weighted(variances, p) if number == "divergence" else None
        else:
            s.normal_()
            if number == "log_densities":
                sums.add(chunk, torch.addcmul(v, s, s, out=o))
            scale = torch.mul(v, 0.5).exp_()
            total = _weighted(scale, p, scale) if number == "divergence" else None
            s.mul_(scale)
            if kind == "draws":
                torch.add(m, s, out=o)
        if number in ("divergence", "divergences"):
            sums.add_divergence(chunk, m if c is None else m - c, v, total, p)
    return output, spread, sums.result() if number else None


def gradients(
    layout: Layout,
    weight: float,
    mean: Tensor,
    logvar: Tensor,
    spread: Tensor | None,
    of_means: Sequence[Tensor | None] | None,
    of_outputs: Sequence[Tensor | None] | None,
    of_number: Tensor | None,
    precision: float | Tensor,
    prior_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns the gradients by :math:`\mu` and :math:`\log \sigma^2`, flat tensors.

    The weight is the derivative of a spread by :math:`\log \sigma^2`, relative to the spread. The
    gradients of the means and of what was computed are given by parameter, if there are any; those
    of draws are both, the same sequence. That of the divergence is a number, or one for each
    parameter. The other arguments are as in :func:`sample`.
    """
    lines = None if of_outputs is None else layout.lines(of_outputs)
    mean_lines = lines
    if of_means is not of_outputs:
        mean_lines = None if of_means is None else layout.lines(of_means)
    device = kernels(mean)
    if device:
        deviation = mean if prior_mean is None else mean - prior_mean
        rest = spread, mean_lines, lines, of_number, precision, weight
        return device.gradients(layout, deviation, logvar, *rest)  # type: ignore[no-any-return]
    of_mean, of_logvar = torch.empty_like(mean), torch.empty_like(mean)
    tensors = mean, logvar, of_mean, of_logvar, mean if spread is None else spread, precision
    for chunk, m, v, a, b, s, p, c in layout.pieces(*tensors, prior_mean):
        of_output = None if lines is None else layout.gather(lines, chunk, mean)
        direct = of_output
        if mean_lines is not lines:
            direct = None if mean_lines is None else layout.gather(mean_lines, chunk, mean)
        if of_number is None:
            a.zero_() if direct is None else a.copy_(direct)
            b.zero_() if of_output is None else torch.mul(of_output, s, out=b).mul_(weight)
            continue
        factor = _number(of_number) if of_number.dim() == 0 else layout.each(of_number, chunk)
        half = 0.5 * factor
        if isinstance(p, Tensor):
            torch.exp(v, out=b).mul_(p).sub_(1).mul_(half)
        else:
            torch.exp(v, out=b).mul_(half * p).sub_(half)
        if of_output is not None:
            b.addcmul_(of_output, s, value=weight)
        if isinstance(p, Tensor) or c is not None:
            torch.mul(m if c is None else torch.sub(m, c, out=a), p, out=a)
            m, p = a, 1.0
        by = factor * p
        if direct is None:
            torch.mul(m, by, out=a)
        elif isinstance(by, Tensor):
            torch.addcmul(direct, m, by, out=a)
        else:
            torch.add(direct, m, alpha=by, out=a)
    return of_mean, of_logvar


def log_density_gradients(
    layout: Layout, logvar: Tensor, spread: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the gradients of log-densities by means, log-variances and draws, flat tensors.

    They follow from the deviations of the draws, and from the gradient of each log-density.
    """
    of_mean, of_logvar, of_draws = (torch.empty_like(logvar) for _ in range(3))
    for chunk, v, s, a, b, c in layout.pieces(logvar, spread, of_mean, of_logvar, of_draws):
        factor = layout.each(grad, chunk)
        torch.neg(v, out=a).exp_().mul_(s).mul_(factor)
        torch.mul(a, s, out=b).sub_(factor).mul_(0.5)
        torch.neg(a, out=c)
    if layout.fixed is not None:
        for gradient in (of_mean, of_logvar, of_draws):
            gradient.index_fill_(0, layout.fixed, 0.0)
    return of_mean, of_logvar, of_draws


class _Sums:
    """Sums over all elements or over those of each parameter, chunk by chunk."""

    def __init__(self, layout: Layout, number: Number | None, like: Tensor) -> None:
        self._layout, self._like, self._is_log = layout, like, number == "log_densities"
        self._total: Any = 0.0
        self._sums: list[Any] | None = None
        if number not in (None, "divergence"):
            self._sums = [0.0] * len(layout.parts)

    def add(self, chunk: Chunk, terms: Tensor) -> None:
        """Adds terms of a chunk, one for each element; those of fixed elements are left out."""
        fixed = self._layout.fixed_in(chunk)
        if fixed is not None:
            terms.index_fill_(0, fixed, 0.0)
        if self._sums is None:
            self._total += _number(terms.sum())
            return
        parts = terms.split(chunk.sizes) if len(chunk.sizes) > 1 else (terms,)
        for i, own in enumerate(parts, chunk.first):
            self._sums[i] += _number(own.sum())

    def add_divergence(
        self, chunk: Chunk, m: Tensor, v: Tensor, total: Tensor | None, precision: float | Tensor
    ) -> None:
        r"""Adds twice the divergence of a chunk.

        The means are those less the prior's. Their total of :math:`\sigma^2 / \sigma_p^2` may be at
        hand.
        """
        size, fixed = len(m), self._layout.fixed_in(chunk)
        if fixed is not None:
            m, v = m.index_fill(0, fixed, 0.0), v.index_fill(0, fixed, 0.0)
            size -= len(fixed)
        if total is not None and m.is_cpu:
            ratio = float(total)
            # Single precision loses up to 1e-4 of this sum, which is little beside the others.
            if ratio <= 0.018 * size:
                squares, logs = float(_weighted(m, precision, m)), _log_sum(precision, size, fixed)
                self._total += ratio + squares - size - float(v.sum()) - logs
                return
        self.add(chunk, 2 * gaussian.divergence_terms(m, v, precision))

    def result(self) -> Tensor:
        """Returns the number or numbers."""
        if self._sums is None:
            total = 0.5 * self._total
            return total if isinstance(total, Tensor) else self._like.new_tensor(total)
        numbers = [0.5 * s for s in self._sums]
        if self._is_log:
            pairs = zip(numbers, self._layout.free, strict=True)
            numbers = [-s - 0.5 * size * math.log(2 * math.pi) for s, size in pairs]
        if all([isinstance(n, float) for n in numbers]):
            return self._like.new_tensor(numbers)
        return torch.stack([torch.as_tensor(n, device=self._like.device) for n in numbers])


def _weighted(values: Tensor, precision: float | Tensor, others: Tensor | None = None) -> Tensor:
    """Returns the sum of values, or of products, times precisions."""
    if isinstance(precision, Tensor):
        return torch.dot(values if others is None else values * others, precision)
    return (values.sum() if others is None else torch.dot(values, others)) * precision


def _log_sum(precision: float | Tensor, size: int, fixed: Tensor | None) -> float:
    """Returns the sum of logarithms of precisions, as of :func:`gaussian.log_precision`."""
    if not isinstance(precision, Tensor):
        return size * float(gaussian.log_precision(precision))
    log = precision.log() if fixed is None else precision.index_fill(0, fixed, 1.0).log_()
    total = float(log.sum())
    if total == -math.inf:  # some elements have no prior
        return float(log.masked_fill_(log == -math.inf, math.log(2 * math.pi)).sum())
    return total


def _number(value: Tensor) -> Any:
    # Other devices would have to be waited for.
    return float(value) if value.is_cpu else value
