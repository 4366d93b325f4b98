"""Passes over the memory of a posterior: draws, divergences and their gradients.

Each goes once through the elements, chunk by chunk on a CPU, where memory is what a pass waits for.
On GPUs that Triton compiles for, each is a kernel. Nothing here is seen by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.posterior.gpu import kernels
from pyro_bayes.posterior.layout import Chunk, Layout

Kind: TypeAlias = Literal["draws", "deviations", "variances"]
r"""What to compute: draws :math:`\mu + \sigma \epsilon`, deviations :math:`\sigma \epsilon` or
variances :math:`\sigma^2`."""
Number: TypeAlias = Literal["divergence", "divergences", "log_densities"]
"""A number to compute beside: the divergence, that of each parameter, or log-densities of draws."""
Precision: TypeAlias = "float | Tensor"
r"""The precision :math:`1 / \sigma_p^2` of the prior, of all elements or of each."""


class Sampled(NamedTuple):
    r"""What a pass computes.

    Arguments:
        output: What was asked for, a flat tensor.
        spread: The deviations of draws from the mean, or the output again.
        number: The number or numbers, if asked for.
    """

    output: Tensor
    spread: Tensor
    number: Tensor | None


def sample(
    layout: Layout,
    kind: Kind,
    mean: Tensor,
    logvar: Tensor,
    number: Number | None,
    precision: Precision,
) -> Sampled:
    r"""Draws all parameters, or computes deviations or variances.

    Arguments:
        layout: Where parameters lie.
        kind: What to compute.
        mean: The means :math:`\mu`, a flat tensor.
        logvar: The :math:`\log \sigma^2`, likewise.
        number: What to compute beside, if anything.
        precision: The precision of the prior, for divergences.
    """
    device = kernels(mean)
    if device:
        output, spread = device.sample(kind, mean, logvar)
        if number == "log_densities":
            return Sampled(output, spread, device.log_densities(layout, logvar, spread))
        if number:
            return Sampled(output, spread, divergence(layout, number, mean, logvar, precision))
        return Sampled(output, spread, None)
    output = torch.empty_like(mean)
    spread = torch.empty_like(mean) if kind == "draws" else output
    sums = _Sums(layout, number, mean)
    for chunk in layout.chunks(mean):
        here = slice(chunk.start, chunk.stop)
        m, v, s = mean[here], logvar[here], spread[here]
        if kind == "variances":
            torch.exp(v, out=s)
            total = s.sum() if number == "divergence" else None
        else:
            s.normal_()
            if number == "log_densities":
                sums.add(chunk, torch.addcmul(v, s, s, out=output[here]))
            scale = torch.mul(v, 0.5).exp_()
            total = torch.dot(scale, scale) if number == "divergence" else None
            s.mul_(scale)
            if kind == "draws":
                torch.add(m, s, out=output[here])
        if number in ("divergence", "divergences"):
            sums.add_divergence(chunk, m, v, total, precision)
    return Sampled(output, spread, sums.result())


def divergence(
    layout: Layout, number: Number, mean: Tensor, logvar: Tensor, precision: Precision
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
        terms = device.divergence_terms(mean, logvar, precision)
        return terms.sum() if number == "divergence" else device.sums(layout, terms)
    sums = _Sums(layout, number, mean)
    for chunk in layout.chunks(mean):
        here = slice(chunk.start, chunk.stop)
        total = logvar[here].exp().sum() if number == "divergence" else None
        sums.add_divergence(chunk, mean[here], logvar[here], total, precision)
    result = sums.result()
    return mean.new_zeros(()) if result is None else result


def gradients(
    layout: Layout,
    kind: Kind,
    mean: Tensor,
    logvar: Tensor,
    spread: Tensor | None,
    of_means: Sequence[Tensor | None] | None,
    of_outputs: Sequence[Tensor | None] | None,
    of_number: Tensor | None,
    precision: Precision,
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
        return device.gradients(  # type: ignore[no-any-return]
            layout, mean, logvar, spread, mean_lines, lines, of_number, precision, weight
        )
    of_mean, of_logvar = torch.empty_like(mean), torch.empty_like(mean)
    for chunk in layout.chunks(mean):
        here = slice(chunk.start, chunk.stop)
        a, b = of_mean[here], of_logvar[here]
        given = None if lines is None else layout.gather(lines, chunk, mean)
        direct = given
        if kind != "draws" and mean_lines is not None:
            direct = layout.gather(mean_lines, chunk, mean)
        if of_number is None:
            a.zero_() if direct is None else a.copy_(direct)
            if given is None or spread is None:
                b.zero_()
            else:
                torch.mul(given, spread[here], out=b).mul_(weight)
            continue
        factor = of_number if of_number.dim() == 0 else layout.each(of_number, chunk)
        by = factor * (precision[here] if isinstance(precision, Tensor) else precision)
        torch.exp(logvar[here], out=b).mul_(by).sub_(factor)
        if given is not None and spread is not None:
            b.addcmul_(given, spread[here], value=2 * weight)
        b.mul_(0.5)
        if direct is None:
            torch.mul(mean[here], by, out=a)
        else:
            torch.addcmul(direct, mean[here], by, out=a)
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
    for chunk in layout.chunks(logvar):
        here = slice(chunk.start, chunk.stop)
        factor, s = layout.each(grad, chunk), spread[here]
        a = torch.neg(logvar[here], out=of_mean[here]).exp_().mul_(s).mul_(factor)
        torch.mul(a, s, out=of_logvar[here]).sub_(factor).mul_(0.5)
        torch.neg(a, out=of_draws[here])
    return of_mean, of_logvar, of_draws


class _Sums:
    """Sums over all elements or over those of each parameter, chunk by chunk.

    Arguments:
        layout: Where parameters lie.
        number: What is summed, if anything.
        like: A tensor of the result's dtype and device.
    """

    def __init__(self, layout: Layout, number: Number | None, like: Tensor) -> None:
        self._layout, self._number, self._like = layout, number, like
        self._sums: list[Any] = [0.0] * (1 if number == "divergence" else len(layout.parts))

    def add(self, chunk: Chunk, terms: Tensor) -> None:
        """Adds terms of a chunk, one for each element."""
        if self._number == "divergence":
            self._sums[0] += self._read(terms.sum())
            return
        several = len(chunk.sizes) > 1
        for i, own in enumerate(terms.split(chunk.sizes) if several else (terms,), chunk.first):
            self._sums[i] += self._read(own.sum())

    def add_divergence(
        self, chunk: Chunk, m: Tensor, v: Tensor, total: Tensor | None, precision: Precision
    ) -> None:
        r"""Adds twice the divergence of a chunk, whose sum of :math:`\sigma^2` may be at hand."""
        if total is not None and not isinstance(precision, Tensor) and m.is_cpu:
            size, ratio = len(m), float(total) * precision
            # Single precision loses up to 1e-4 of this sum, which is little beside the others.
            if ratio <= 0.018 * size:
                logs = float(v.sum()) + size * math.log(precision)
                self._sums[0] += ratio + float(torch.dot(m, m)) * precision - size - logs
                return
        logs = precision.log() if isinstance(precision, Tensor) else math.log(precision)
        if isinstance(precision, Tensor):
            precision, logs = precision[chunk.start : chunk.stop], logs[chunk.start : chunk.stop]
        a = v + logs
        self.add(chunk, (torch.expm1(a) - a).add_(m.square().mul_(precision)))

    def result(self) -> Tensor | None:
        """Returns the number or numbers; `None` if none was asked for."""
        if self._number is None:
            return None
        sums = self._sums
        if self._number == "log_densities":
            sizes = self._layout.sizes
            sums = [-s - n * math.log(2 * math.pi) for s, n in zip(sums, sizes, strict=True)]
        if all(isinstance(s, float) for s in sums):
            values = self._like.new_tensor(sums)
        else:
            values = torch.stack([torch.as_tensor(s).to(self._like) for s in sums])
        return values.mul_(0.5)[0] if self._number == "divergence" else values.mul_(0.5)

    def _read(self, total: Tensor) -> Any:
        # Other devices would have to be waited for.
        return float(total) if self._like.is_cpu else total
