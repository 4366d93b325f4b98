"""Kernels for GPUs: one launch for all parameters, which are read where they lie.

Import this module only where Triton is installed, see `pyro_bayes.posterior.gpu`. A program of a kernel works
on one row of a table: up to :data:`BLOCK` elements of one parameter. Random numbers come from a
counter (Philox), with a key that PyTorch's generator draws, so that they depend on its seed alone
and are drawn anew whenever a CUDA graph is replayed. None is beyond 5.7 standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024

_captured: dict[int, Table] = {}  # CUDA graphs refer to these, and nobody knows how long


class Table(NamedTuple):
    """Where the elements of parameters are.

    Arguments:
        rows: For each block, the addresses of its means and its log-variances, its place among all
            elements side by side, its number of elements, and which parameter it belongs to.
        starts: The first row of each parameter, and behind them the number of rows.
        size: The number of elements of all parameters.
    """

    rows: Tensor
    starts: Tensor
    size: int


def draw(
    kind: str, means: Sequence[Tensor], logvars: Sequence[Tensor], apart: bool, scored: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Draws several parameters, or computes their variances.

    Arguments:
        kind: What to compute: draws :math:`\mu + \sigma \epsilon`, their deviations
            :math:`\sigma \epsilon` from the mean, or variances :math:`\sigma^2`.
        means: The means :math:`\mu`, contiguous and in single precision.
        logvars: The :math:`\log \sigma^2`, likewise.
        apart: Whether to keep the deviations of draws, too.
        scored: Whether to return sums over each draw.

    Returns:
        What was computed, side by side, deviations or the same again, and the sums of
        :math:`\log 2 \pi \sigma^2 + \epsilon^2` and of squares, of shape `(2, number of draws)`.
    """
    table = _table_of(means, logvars)
    output = means[0].new_empty(table.size)
    spread = torch.empty_like(output) if apart else output
    partial = output.new_empty(2, len(table.rows)) if scored else output
    variances = kind == "variances"
    key = table.rows if variances else _key(output.device)
    with torch.cuda.device_of(output):
        _draw[(len(table.rows),)](
            table.rows, key, output, spread, partial, len(table.rows), math.log(2 * math.pi),
            variances=variances, draws=kind == "draws", apart=apart, scored=scored, block=BLOCK,
        )  # fmt: skip
    return output, spread, _sums(table, partial) if scored else None


def slopes(
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    factor: tuple[Tensor, Tensor] | None,
    grad: Tensor | None,
    spread: Tensor | None,
    weight: float,
    of_draws: bool,
    of_squares: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of all means and log-variances, see :func:`pyro_bayes.posterior.slopes.slopes`.

    Arguments:
        means: The means, contiguous and in single precision.
        logvars: The log-variances, likewise.
        factor: The factors of the divergence, numbers or one for each parameter.
        grad: The gradient of the outputs, side by side.
        spread: The deviations or variances, side by side.
        weight: The slope of a spread by the log-variance, relative to the spread.
        of_draws: Whether the outputs are draws.
        of_squares: Whether the divergence is one of the draws' squares.
    """
    table = _table_of(means, logvars)
    of_mean, of_logvar = means[0].new_empty(2, table.size).unbind()
    by, less = factor or (of_mean, of_mean)
    with torch.cuda.device_of(of_mean):
        _slopes[(len(table.rows),)](
            table.rows, of_mean if grad is None else grad, of_mean if spread is None else spread,
            by, less, *(f.stride(0) if f.dim() else 0 for f in (by, less)), of_mean, of_logvar,
            weight=weight, given=grad is not None, anchored=factor is not None,
            of_draws=of_draws, of_squares=of_squares, block=BLOCK,
        )  # fmt: skip
    return of_mean, of_logvar


def rows(mean: Tensor, scale: Tensor, out: Tensor, seed: int, start: int) -> None:
    r"""Writes draws :math:`\mu + \sigma \epsilon`, one in each row.

    Arguments:
        mean: The mean of all elements side by side.
        scale: Their standard deviations.
        out: Where draws go, of shape `(number of draws, elements)`, each row contiguous.
        seed: The seed. Each draw depends on it and on its number alone.
        start: The number of the first draw.
    """
    blocks = triton.cdiv(len(mean), BLOCK)
    with torch.cuda.device_of(out):
        _rows[(blocks * len(out),)](
            mean, scale, out, seed, start, len(mean), out.stride(0), blocks, block=BLOCK
        )


def divergences(means: Sequence[Tensor], logvars: Sequence[Tensor], prior_var: float) -> Tensor:
    """Returns the divergence of each parameter from a centred Gaussian, in nats.

    Arguments:
        means: The means, contiguous and in single precision.
        logvars: The log-variances, likewise.
        prior_var: The variance of that Gaussian.
    """
    table = _table_of(means, logvars)
    partial = means[0].new_empty(1, len(table.rows))
    with torch.cuda.device_of(partial):
        _divergence[(len(table.rows),)](
            table.rows, partial, 1 / prior_var, math.log(prior_var), block=BLOCK
        )
    return _sums(table, partial)[0].mul_(0.5)


def _key(device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (1,), device=device)


def _sums(table: Table, partial: Tensor) -> Tensor:
    """The sums over the rows of each parameter, in an order that is always the same."""
    sums = partial.new_empty(len(partial), len(table.starts) - 1)
    with torch.cuda.device_of(sums):
        _sum_rows[tuple(sums.T.shape)](  # the second number may be no more than 65535
            table.starts, partial, sums, partial.shape[1], sums.shape[1], block=BLOCK
        )
    return sums


def _table_of(means: Sequence[Tensor], logvars: Sequence[Tensor]) -> Table:
    addresses = tuple([t.data_ptr() for t in (*means, *logvars)])
    sizes = tuple([m.numel() for m in means])
    table = _table(addresses, sizes, means[0].device)
    if means[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(table)] = table
    return table


@lru_cache(maxsize=64)
def _table(addresses: Sequence[int], sizes: Sequence[int], device: torch.device) -> Table:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Expected a step with these parameters before a CUDA graph captures one; got none. Make"
            " some steps on another stream first, and capture a step then."
        )
    columns, counts, place = [], [], 0
    for i, size in enumerate(sizes):
        firsts = torch.arange(0, size, BLOCK)
        mean, logvar = addresses[i], addresses[len(sizes) + i]
        rows = [
            mean + 4 * firsts,
            logvar + 4 * firsts,
            place + firsts,
            (size - firsts).clamp(max=BLOCK),
        ]
        columns.append(torch.stack([*rows, torch.full_like(firsts, i)], 1))
        counts.append(len(firsts))
        place += size
    starts = torch.tensor([0, *counts]).cumsum(0)
    return Table(torch.cat(columns).to(device), starts.to(device), place)


@triton.jit
def _draw(
    rows, key, output, spread, partial, count, log_two_pi,
    variances: tl.constexpr, draws: tl.constexpr, apart: tl.constexpr, scored: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(rows + 5 * row).to(tl.pointer_type(tl.float32))
    logvar = tl.load(rows + 5 * row + 1).to(tl.pointer_type(tl.float32))
    place = tl.load(rows + 5 * row + 2)
    i = tl.arange(0, block)
    mask = i < tl.load(rows + 5 * row + 3)
    v = tl.load(logvar + i, mask=mask, other=0.0)
    if variances:
        tl.store(output + place + i, tl.exp(v), mask=mask)
    else:
        epsilon = tl.randn(tl.load(key), place + i)
        s = tl.exp(0.5 * v) * epsilon
        if apart:
            tl.store(spread + place + i, s, mask=mask)
        o = tl.load(mean + i, mask=mask, other=0.0) + s if draws else s
        tl.store(output + place + i, o, mask=mask)
        if scored:
            tl.store(partial + row, tl.sum(tl.where(mask, v + log_two_pi + epsilon * epsilon, 0.0)))
            tl.store(partial + count + row, tl.sum(tl.where(mask, o * o, 0.0)))


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
def _slopes(
    rows, grad, spread, by, less, by_stride, less_stride, of_mean, of_logvar,
    weight: tl.constexpr, given: tl.constexpr, anchored: tl.constexpr, of_draws: tl.constexpr,
    of_squares: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(rows + 5 * row + 2)
    i = tl.arange(0, block)
    mask = i < tl.load(rows + 5 * row + 3)
    slope = tl.zeros([block], dtype=tl.float32)
    curve = tl.zeros([block], dtype=tl.float32)
    if given:
        g = tl.load(grad + place + i, mask=mask, other=0.0)
        if of_draws:
            slope = g
    if anchored:
        which = tl.load(rows + 5 * row + 4)
        b = tl.load(by + which * by_stride)
        mean = tl.load(rows + 5 * row).to(tl.pointer_type(tl.float32))
        m = tl.load(mean + i, mask=mask, other=0.0)
        curve = curve + tl.load(less + which * less_stride)
        if of_squares:
            s = tl.load(spread + place + i, mask=mask, other=0.0)
            slope = slope + b * (m + s)
            curve = curve + weight * s * slope
        else:
            logvar = tl.load(rows + 5 * row + 1).to(tl.pointer_type(tl.float32))
            v = tl.load(logvar + i, mask=mask, other=0.0)
            slope = slope + b * m
            curve = curve + 0.5 * b * tl.exp(v)
    if given and not (anchored and of_squares):
        s = tl.load(spread + place + i, mask=mask, other=0.0)
        curve = curve + weight * s * g
    tl.store(of_mean + place + i, slope, mask=mask)
    tl.store(of_logvar + place + i, curve, mask=mask)


@triton.jit
def _divergence(rows, partial, precision, shift, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(rows + 5 * row).to(tl.pointer_type(tl.float32))
    logvar = tl.load(rows + 5 * row + 1).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, block)
    mask = i < tl.load(rows + 5 * row + 3)
    m = tl.load(mean + i, mask=mask, other=0.0)
    r = tl.load(logvar + i, mask=mask, other=0.0) - shift
    # e^r - 1 - r by its series where the difference would lose digits.
    series = 1.0 + r / 9.0
    for k in tl.static_range(8, 2, -1):
        series = 1.0 + r / k * series
    terms = tl.where(tl.abs(r) < 0.5, 0.5 * r * r * series, tl.exp(r) - 1.0 - r)
    tl.store(partial + row, tl.sum(tl.where(mask, terms + m * m * precision, 0.0)))


@triton.jit
def _sum_rows(starts, partial, sums, count, parameters, block: tl.constexpr):
    which = tl.program_id(0)
    kind = tl.program_id(1)
    i = tl.load(starts + which)
    end = tl.load(starts + which + 1)
    total = tl.zeros([block], dtype=tl.float32)
    while i < end:
        j = i + tl.arange(0, block)
        total += tl.load(partial + kind * count + j, mask=j < end, other=0.0)
        i += block
    tl.store(sums + kind * parameters + which, tl.sum(total))
