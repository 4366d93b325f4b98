"""Passes over the memory of a posterior: draws, divergences and their gradients.

Each goes once through the elements, chunk by chunk on a CPU, where memory is what a pass waits for.
On GPUs that Triton compiles for, each is a kernel. Nothing here is seen by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.posterior.gpu import kernels
from pyro_bayes.posterior.layout import Chunk, Layout

Kind: TypeAlias = Literal["draws", "deviations", "variances"]
r"""What to compute: draws :math:`\mu + \sigma \epsilon`, deviations :math:`\sigma \epsilon` or
variances :math:`\sigma^2`."""
Number: TypeAlias = Literal["divergence", "divergences", "log_densities"]
"""A number to compute beside: the divergence, that of each parameter, or log-densities of draws."""


def sample(
    layout: Layout,
    kind: Kind,
    mean: Tensor,
    logvar: Tensor,
    number: Number | None,
    precision: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Draws all parameters, or computes deviations or variances.

    Arguments:
        layout: Where parameters lie.
        kind: What to compute.
        mean: The means :math:`\mu`, a flat tensor.
        logvar: The :math:`\log \sigma^2`, likewise.
        number: What to compute beside, if anything.
        precision: The precision :math:`1 / \sigma_p^2` of the prior, of all elements or of each.

    Returns:
        What was asked for, a flat tensor; the deviations of draws, or the same again; the number.
    """
    device = kernels(mean)
    if device:
        output, spread = device.sample(kind, mean, logvar)
        if number == "log_densities":
            return output, spread, device.log_densities(layout, logvar, spread)
        if number is None:
            return output, spread, None
        return output, spread, divergence(layout, number, mean, logvar, precision)
    output = torch.empty_like(mean)
    spread = torch.empty_like(mean) if kind == "draws" else output
    sums = _Sums(layout, number, mean)
    for chunk, m, v, o, s in _pieces(layout, mean, logvar, output, spread):
        total = None
        if kind == "variances":
            torch.exp(v, out=s)
            total = s.sum() if number == "divergence" else None
        else:
            s.normal_()
            if number == "log_densities":
                sums.add(chunk, torch.addcmul(v, s, s, out=o))
            scale = torch.mul(v, 0.5).exp_()
            total = torch.dot(scale, scale) if number == "divergence" else None
            s.mul_(scale)
            if kind == "draws":
                torch.add(m, s, out=o)
        if number in ("divergence", "divergences"):
            sums.add_divergence(chunk, m, v, total, precision)
    return output, spread, sums.result() if number else None


def divergence(
    layout: Layout, number: Number, mean: Tensor, logvar: Tensor, precision: float | Tensor
) -> Tensor:
    r"""Computes :math:`D_{KL}(q \| p)` of all parameters or of each, in nats.

    Arguments:
        layout: Where parameters lie.
        number: Which of the two.
        mean: The means, a flat tensor.
        logvar: The log-variances, likewise.
        precision: The precision of the prior.
    """
    device = kernels(mean)
    if device:
        terms: Tensor = device.divergence_terms(mean, logvar, precision)
        return terms.sum() if number == "divergence" else layout.sums(terms)
    sums = _Sums(layout, number, mean)
    for chunk, m, v in _pieces(layout, mean, logvar):
        total = v.exp().sum() if number == "divergence" else None
        sums.add_divergence(chunk, m, v, total, precision)
    return sums.result()


def gradients(
    layout: Layout,
    kind: Kind,
    mean: Tensor,
    logvar: Tensor,
    spread: Tensor | None,
    of_means: Sequence[Tensor | None] | None,
    of_outputs: Sequence[Tensor | None] | None,
    of_number: Tensor | None,
    precision: float | Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Returns the gradients by :math:`\mu` and :math:`\log \sigma^2`, flat tensors.

    Arguments:
        layout: Where parameters lie.
        kind: What was computed.
        mean: The means, a flat tensor.
        logvar: The log-variances, likewise.
        spread: The deviations or variances, if there are gradients of outputs.
        of_means: The gradients of the means by parameter, if any.
        of_outputs: The gradients of what was computed by parameter, if any; those of draws are
            gradients of the means, too.
        of_number: The gradient of the divergence, or of that of each parameter, if any.
        precision: The precision of the prior.
    """
    weight = 1.0 if kind == "variances" else 0.5  # d spread / d log σ², relative to the spread
    lines = None if of_outputs is None else layout.lines(of_outputs)
    mean_lines = None if of_means is None else layout.lines(of_means)
    mean_lines = lines if kind == "draws" else mean_lines
    device = kernels(mean)
    if device:
        rest = spread, mean_lines, lines, of_number, precision, weight
        return device.gradients(layout, mean, logvar, *rest)  # type: ignore[no-any-return]
    of_mean, of_logvar = torch.empty_like(mean), torch.empty_like(mean)
    tensors = mean, logvar, of_mean, of_logvar, mean if spread is None else spread
    for chunk, m, v, a, b, s in _pieces(layout, *tensors):
        given = None if lines is None else layout.gather(lines, chunk, mean)
        direct = given
        if kind != "draws":
            direct = None if mean_lines is None else layout.gather(mean_lines, chunk, mean)
        if of_number is None:
            a.zero_() if direct is None else a.copy_(direct)
            b.zero_() if given is None else torch.mul(given, s, out=b).mul_(weight)
            continue
        factor = of_number if of_number.dim() == 0 else layout.each(of_number, chunk)
        by = factor * _piece(precision, chunk)
        torch.exp(v, out=b).mul_(by).sub_(factor)
        if given is not None:
            b.addcmul_(given, s, value=2 * weight)
        b.mul_(0.5)
        torch.mul(m, by, out=a) if direct is None else torch.addcmul(direct, m, by, out=a)
    return of_mean, of_logvar


def log_density_gradients(
    layout: Layout, logvar: Tensor, spread: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the gradients of log-densities by means, log-variances and draws, flat tensors.

    Arguments:
        layout: Where parameters lie.
        logvar: The log-variances, a flat tensor.
        spread: The deviations of the draws from the mean, likewise.
        grad: The gradient of each log-density.
    """
    of_mean, of_logvar, of_draws = (torch.empty_like(logvar) for _ in range(3))
    for chunk, v, s, a, b, c in _pieces(layout, logvar, spread, of_mean, of_logvar, of_draws):
        factor = layout.each(grad, chunk)
        torch.neg(v, out=a).exp_().mul_(s).mul_(factor)
        torch.mul(a, s, out=b).sub_(factor).mul_(0.5)
        torch.neg(a, out=c)
    return of_mean, of_logvar, of_draws


def _pieces(layout: Layout, *flats: Tensor) -> Iterator[tuple[Any, ...]]:
    """Returns the chunks of a layout, each with what flat tensors have there."""
    chunks = layout.chunks(flats[0])
    if len(chunks) == 1:
        yield chunks[0], *flats
        return
    for chunk in chunks:
        yield chunk, *[flat[chunk.start : chunk.stop] for flat in flats]


def _piece(precision: float | Tensor, chunk: Chunk) -> float | Tensor:
    return precision[chunk.start : chunk.stop] if isinstance(precision, Tensor) else precision


class _Sums:
    """Sums over all elements or over those of each parameter, chunk by chunk.

    Arguments:
        layout: Where parameters lie.
        number: What is summed, if anything.
        like: A tensor of the result's dtype and device.
    """

    def __init__(self, layout: Layout, number: Number | None, like: Tensor) -> None:
        self._layout, self._like, self._is_log = layout, like, number == "log_densities"
        self._total: Any = 0.0
        self._sums: list[Any] | None = None
        if number not in (None, "divergence"):
            self._sums = [0.0] * len(layout.parts)

    def add(self, chunk: Chunk, terms: Tensor) -> None:
        """Adds terms of a chunk, one for each element."""
        if self._sums is None:
            self._total += self._read(terms.sum())
            return
        parts = terms.split(chunk.sizes) if len(chunk.sizes) > 1 else (terms,)
        for i, own in enumerate(parts, chunk.first):
            self._sums[i] += self._read(own.sum())

    def add_divergence(
        self, chunk: Chunk, m: Tensor, v: Tensor, total: Tensor | None, precision: float | Tensor
    ) -> None:
        r"""Adds twice the divergence of a chunk, whose sum of :math:`\sigma^2` may be at hand."""
        if total is not None and not isinstance(precision, Tensor) and m.is_cpu:
            size, ratio = len(m), float(total) * precision
            # Single precision loses up to 1e-4 of this sum, which is little beside the others.
            if ratio <= 0.018 * size:
                logs = float(v.sum()) + size * math.log(precision)
                self._total += ratio + float(torch.dot(m, m)) * precision - size - logs
                return
        own = _piece(precision, chunk)
        a = v + (own.log() if isinstance(own, Tensor) else math.log(own))
        self.add(chunk, (torch.expm1(a) - a).add_(m.square().mul_(own)))

    def result(self) -> Tensor:
        """Returns the number or numbers."""
        if self._sums is None:
            total = 0.5 * self._total
            return total if isinstance(total, Tensor) else self._like.new_tensor(total)
        numbers = [0.5 * s for s in self._sums]
        if self._is_log:
            pairs = zip(numbers, self._layout.sizes, strict=True)
            numbers = [-s - 0.5 * size * math.log(2 * math.pi) for s, size in pairs]
        return torch.stack([torch.as_tensor(n).to(self._like) for n in numbers])

    def _read(self, total: Tensor) -> Any:
        # Other devices would have to be waited for.
        return float(total) if self._like.is_cpu else total
