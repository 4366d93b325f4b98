"""One pass over the memory of all parameters, which draws and sums at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bayes.posterior.anchor import Totals
from pyro_bayes.posterior.flat import blocks, gather, parts, room, scatter
from pyro_bayes.posterior.gpu import kernels
from pyro_bayes.posterior.slopes import Kind


class Sweep(NamedTuple):
    r"""What one pass over all parameters gives.

    Arguments:
        slices: Which parameters are side by side, see :func:`~pyro_bayes.posterior.flat.parts`.
        outputs: What was computed of each parameter.
        spreads: Of each part, the deviations :math:`\sigma \epsilon` or the variances
            :math:`\sigma^2`, side by side.
        scores: The sums of :math:`\log 2 \pi \sigma^2 + \epsilon^2` and of the squares of each
            draw, of shape `(2, number of draws)`, if they were wanted.
        known: All means and log-variances side by side, if they were copied.
    """

    slices: Sequence[slice]
    outputs: list[Tensor]
    spreads: list[Tensor]
    scores: Tensor | None
    known: tuple[Tensor, Tensor] | None


def sweep(
    kind: Kind,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    apart: bool,
    scored: bool,
    totals: Totals | None,
) -> Sweep:
    r"""Draws several parameters, or computes their deviations or variances.

    Arguments:
        kind: What to compute.
        means: The means :math:`\mu`.
        logvars: The :math:`\log \sigma^2`.
        apart: Whether the deviations of draws are kept, too.
        scored: Whether draws are summed.
        totals: Where totals of each block go, if they are wanted.
    """
    slices = parts(means)
    device = kernels(means, logvars)
    if device:
        output, spread, scores = device.draw(kind, means, logvars, apart, scored)
        return Sweep(slices, [*scatter(output, means)], [spread], scores, None)
    number = as_number(means[0])
    outputs: list[Tensor] = []
    spreads: list[Tensor] = []
    surprises: list[Any] = []
    squares: list[Any] = []
    memory = room(means, slices, 2 if apart else 1)
    for part, (output, *kept) in zip(slices, memory, strict=True):
        mean, logvar = gather(means[part]), gather(logvars[part])
        spread = kept[0] if apart else output
        sums: list[Any] = []
        for m, v, s, o in blocks(mean, logvar, spread, output):
            if kind == "variances":
                torch.exp(v, out=s)
            else:
                s.normal_()
                if scored:
                    torch.addcmul(v, s, s, out=o)
                    found = [number(own.sum()) for own in _owned(o, means[part])]
                scale = torch.mul(v, 0.5).exp_()
                s.mul_(scale)
                if kind == "draws":
                    torch.add(m, s, out=o)
                if scored:
                    found += [number(torch.dot(own, own)) for own in _owned(o, means[part])]
                    sums = [*map(add, sums, found)] if sums else found
            if totals is not None:  # while the block is at hand
                variance = s.sum() if kind == "variances" else torch.dot(scale, scale)
                second, logs = float(torch.dot(m, m)), float(v.sum())
                totals.append((len(v), second, float(variance), logs))
        outputs += scatter(output, means[part])
        spreads.append(spread)
        surprises += sums[: len(sums) // 2]
        squares += sums[len(sums) // 2 :]
    # Elsewhere, all parameters are one part, of which a copy would be large.
    small = means[0].is_cpu and len(means) > 1 and len(slices) == 1
    known = (mean, logvar) if small else None
    if not scored:
        return Sweep(slices, outputs, spreads, None, known)
    constants = [m.numel() * math.log(2 * math.pi) for m in means]
    scores = joined([*map(add, surprises, constants), *squares], means[0]).view(2, -1)
    return Sweep(slices, outputs, spreads, scores, known)


def _owned(block: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The elements of each of several parameters side by side, or a block of one."""
    if len(parameters) == 1:
        return (block,)
    sizes = [parameter.numel() for parameter in parameters]
    return block.split(sizes)  # type: ignore[no-any-return]


def as_number(like: Tensor) -> Callable[[Tensor], Any]:
    """Returns what makes a number of a 0-dim tensor, or leaves it if it had to be waited for."""
    return float if like.is_cpu else _itself


def joined(numbers: Sequence[Any], like: Tensor) -> Tensor:
    """Returns numbers, or tensors of them, as one tensor of another's type and device."""
    return like.new_tensor(numbers) if isinstance(numbers[0], float) else torch.stack([*numbers])


def _itself(value: Tensor) -> Tensor:
    return value
