"""Kernels for GPUs: one launch for all parameters.

Import this module only where Triton is installed, see `pyro_bayes.posterior.gpu`. Tensors are flat,
contiguous and in single precision. Random numbers come from a counter (Philox), with a key that
PyTorch's generator draws, so that they depend on its seed alone and are drawn anew whenever a CUDA
graph is replayed. None is beyond 5.7 standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_bayes.posterior.layout import Layout

BLOCK = 1024


def sample(kind: str, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Does what :func:`passes.sample` does; `kind` is as there."""
    output = torch.empty_like(mean)
    spread = torch.empty_like(mean) if kind == "draws" else output
    variances = kind == "variances"
    key = mean if variances else torch.randint(2**63 - 1, (1,), device=mean.device)
    _launch(_sample, mean, logvar, key, output, spread, mean.numel(),
            variances=variances, draws=kind == "draws")  # fmt: skip
    return output, spread


def rows(mean: Tensor, scale: Tensor, out: Tensor, seed: int, start: int) -> None:
    """Writes draws in rows, each of which depends on the seed and on its own number alone."""
    blocks = triton.cdiv(len(mean), BLOCK)
    with torch.cuda.device_of(out):
        _rows[(blocks * len(out),)](
            mean, scale, out, seed, start, len(mean), out.stride(0), blocks, block=BLOCK
        )


def divergence_terms(mean: Tensor, logvar: Tensor, precision: float | Tensor) -> Tensor:
    """Returns the divergence of each element, as :func:`gaussian.divergence_terms` does."""
    terms, each = torch.empty_like(mean), isinstance(precision, Tensor)
    number = 0.0 if isinstance(precision, Tensor) else precision
    shift = 0.0 if each else math.log(number or 2 * math.pi)
    _launch(_divergence, mean, logvar, precision if each else mean, terms, number, shift,
            mean.numel(), each=each, none=not each and number == 0)  # fmt: skip
    return terms


def gradients(
    layout: Layout,
    mean: Tensor,
    logvar: Tensor,
    spread: Tensor | None,
    mean_lines: Sequence[Tensor | None] | None,
    lines: Sequence[Tensor | None] | None,
    of_number: Tensor | None,
    precision: float | Tensor,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """Does what :func:`passes.gradients` does; lines are as in :meth:`Layout.lines`."""
    of_mean, of_logvar = torch.empty_like(mean), torch.empty_like(mean)
    (whole,) = layout.whole()
    outputs = None if lines is None else layout.gather(lines, whole, mean)
    direct = outputs if mean_lines is lines else None
    if mean_lines is not None and mean_lines is not lines:
        direct = layout.gather(mean_lines, whole, mean)
    factor = of_number
    if factor is not None and factor.dim():
        factor = layout.each(factor, whole)
    each = isinstance(precision, Tensor)
    _launch(
        _gradients, mean, logvar, *[mean if t is None else t for t in (spread, outputs, direct)],
        mean if factor is None else factor.contiguous(), precision if each else mean,
        0.0 if each else precision, of_mean, of_logvar, mean.numel(), weight=weight,
        with_outputs=outputs is not None and spread is not None, direct=direct is not None,
        scored=factor is not None, by_element=factor is not None and factor.dim() > 0, each=each,
    )  # fmt: skip
    return of_mean, of_logvar


def _launch(kernel: Any, *args: Any, **constants: Any) -> None:
    """Launches a kernel, one program for each block of elements, whose number is the last."""
    with torch.cuda.device_of(args[0]):
        kernel[(max(triton.cdiv(args[-1], BLOCK), 1),)](*args, block=BLOCK, **constants)


@triton.jit
def _sample(
    mean, logvar, key, output, spread, size,
    variances: tl.constexpr, draws: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = i < size
    v = tl.load(logvar + i, mask=mask, other=0.0)
    if variances:
        tl.store(output + i, tl.exp(v), mask=mask)
    else:
        s = tl.exp(0.5 * v) * tl.randn(tl.load(key), i)
        tl.store(spread + i, s, mask=mask)
        if draws:
            tl.store(output + i, tl.load(mean + i, mask=mask, other=0.0) + s, mask=mask)


@triton.jit(do_not_specialize=["seed", "start", "size", "stride", "blocks"])
def _rows(mean, scale, out, seed, start, size, stride, blocks, block: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * block + tl.arange(0, block)
    mask = i < size
    epsilon = tl.randn(seed, (start + row) * size + i)
    draw = tl.load(mean + i, mask=mask, other=0.0)
    draw += epsilon * tl.load(scale + i, mask=mask, other=0.0)
    tl.store(out + row * stride + i, draw, mask=mask)


@triton.jit
def _divergence(
    mean, logvar, precisions, terms, precision, shift, size,
    each: tl.constexpr, none: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = i < size
    m = tl.load(mean + i, mask=mask, other=0.0)
    r = tl.load(logvar + i, mask=mask, other=0.0)
    p = precision
    if each:
        p = tl.load(precisions + i, mask=mask, other=1.0)
        r = r + tl.log(tl.where(p > 0, p, 6.283185307179586))
    else:
        r = r + shift
    # e^r - 1 - r by its series where the difference would lose digits.
    series = 1.0 + r / 9.0
    for k in tl.static_range(8, 2, -1):
        series = 1.0 + r / k * series
    terms_ = tl.where(tl.abs(r) < 0.5, 0.5 * r * r * series, tl.exp(r) - 1.0 - r)
    if none:
        terms_ = -1.0 - r
    if each:  # where there is no prior, the negative entropy
        terms_ = tl.where(p > 0, terms_, -1.0 - r)
    tl.store(terms + i, 0.5 * (terms_ + m * m * p), mask=mask)


@triton.jit
def _gradients(
    mean, logvar, spread, of_outputs, of_means, factors, precisions, precision, of_mean, of_logvar,
    size, weight: tl.constexpr, with_outputs: tl.constexpr, direct: tl.constexpr,
    scored: tl.constexpr, by_element: tl.constexpr, each: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = i < size
    a = tl.zeros([block], dtype=tl.float32)
    b = tl.zeros([block], dtype=tl.float32)
    if direct:
        a = tl.load(of_means + i, mask=mask, other=0.0)
    if with_outputs:
        g = tl.load(of_outputs + i, mask=mask, other=0.0)
        b = weight * g * tl.load(spread + i, mask=mask, other=0.0)
    if scored:
        f = tl.load(factors + i, mask=mask, other=0.0) if by_element else tl.load(factors)
        p = precision
        if each:
            p = tl.load(precisions + i, mask=mask, other=0.0)
        a = a + f * p * tl.load(mean + i, mask=mask, other=0.0)
        b = b + 0.5 * f * (p * tl.exp(tl.load(logvar + i, mask=mask, other=0.0)) - 1.0)
    tl.store(of_mean + i, a, mask=mask)
    tl.store(of_logvar + i, b, mask=mask)
