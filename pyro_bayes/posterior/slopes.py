"""The gradients of draws and divergences of several parameters, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bayes.posterior.flat import blocks, gather, room, scatter, transformed
from pyro_bayes.posterior.gpu import kernels

Kind = Literal["draws", "deviations", "variances"]


def slopes(
    parameters: Sequence[Tensor],
    slices: Sequence[slice],
    factors: Sequence[tuple[Tensor, Tensor] | None],
    kind: Kind = "draws",
    of_outputs: Sequence[Tensor | None] = (),
    spreads: Sequence[Tensor] = (),
    known: tuple[Tensor, Tensor] | None = None,
    *,
    of_squares: bool = False,
) -> list[Tensor | None]:
    r"""The gradients of all μ and then all log σ², from those of divergences and of outputs.

    That of :math:`\frac{a}{2} (\mu^2 + \sigma^2) + b \log \sigma^2`, with a divergence's factors a
    and b, one pair for each part, and that of outputs of which each spread is the deviation from
    the mean, or the variance. A factor is one number, or has one for each parameter of the part.
    The parameters may be known side by side.

    With `of_squares`, outputs are draws :math:`\theta`, and the first gradient is that of
    :math:`\frac{a}{2} \theta^2 + b \log \sigma^2`.
    """
    count = len(parameters) // 2
    means, logvars = parameters[:count], parameters[count:]
    weight = 1.0 if kind == "variances" else 0.5  # d spread / d log σ², relative to the spread
    of_outputs = [g.to_dense() if g is not None and g.is_sparse else g for g in of_outputs]
    if torch.is_grad_enabled() or transformed():  # second derivatives or many at once are wanted
        inputs = factors, kind == "draws", weight, of_outputs, spreads, of_squares
        return _by_formula(means, logvars, slices, *inputs)
    device = kernels(means, logvars)
    if device:
        grad, spread = (_given(of_outputs, means), spreads[0]) if spreads else (None, None)
        pair = factors[0] if len(factors) == 1 else _stacked(factors)
        of_mean, of_logvar = device.slopes(
            means, logvars, pair, grad, spread, weight, kind == "draws", of_squares
        )
        return [*scatter(of_mean, means), *scatter(of_logvar, means)]
    of_means: list[Tensor | None] = []
    of_logvars: list[Tensor | None] = []
    memory = room(means, slices, 2)
    for i, part in enumerate(slices):
        mean, logvar = known or (gather(means[part]), gather(logvars[part]))
        of_mean, of_logvar = memory[i]
        flat = [mean, logvar, of_mean, of_logvar]
        if spreads:
            flat += _given(of_outputs[part], means[part]), spreads[i]
        found = factors[i]
        factor = found and (
            _of_elements(found[0], means[part]),
            _of_elements(found[1], means[part]),
        )
        for m, v, of_m, of_v, *given in blocks(*flat):
            if factor is None:
                torch.mul(*given, out=of_v).mul_(weight)
                of_m.copy_(given[0])
                continue
            by, less = factor
            if of_squares:
                draw = torch.add(m, given[1], out=of_m)
                torch.addcmul(given[0], draw, by, out=of_m)
                torch.addcmul(less, given[1], of_m, value=weight, out=of_v)
                continue
            torch.addcmul(less, torch.exp(v, out=of_m), by, value=0.5, out=of_v)
            if given:
                of_v.addcmul_(*given, value=weight)
            if given and kind == "draws":
                torch.addcmul(given[0], m, by, out=of_m)
            else:
                torch.mul(m, by, out=of_m)
        of_means += scatter(of_mean, means[part])
        of_logvars += scatter(of_logvar, means[part])
    return of_means + of_logvars


def _by_formula(
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    slices: Sequence[slice],
    factors: Sequence[tuple[Tensor, Tensor] | None],
    of_draws: bool,
    weight: float,
    of_outputs: Sequence[Tensor | None],
    spreads: Sequence[Tensor],
    of_squares: bool,
) -> list[Tensor | None]:
    """What :func:`slopes` returns, differentiable."""
    of_means: list[Any] = [torch.zeros_like(mean) for mean in means]
    of_logvars: list[Any] = [torch.zeros_like(logvar) for logvar in logvars]
    for i, part in enumerate(slices):
        factor = factors[i]
        spread = scatter(spreads[i], means[part]) if spreads else ()
        for k in range(*part.indices(len(means))):
            mean, logvar = means[k], logvars[k]
            by, less = (_of_one(f, k - part.start) for f in factor or (None, None))
            grad = of_outputs[k] if spreads else None
            if spreads:
                varied = spread[k - part.start] * (weight * (logvar - logvar.detach())).exp()
                if of_squares and by is not None:
                    grad = by * (mean + varied) + (0 if grad is None else grad)
            if by is not None and not of_squares:
                of_means[k] = of_means[k] + by * mean
                of_logvars[k] = of_logvars[k] + 0.5 * by * logvar.exp()
            if less is not None:
                of_logvars[k] = of_logvars[k] + less
            if grad is not None:
                of_means[k] = of_means[k] + grad if of_draws else of_means[k]
                of_logvars[k] = of_logvars[k] + weight * grad * varied
    return of_means + of_logvars


def _stacked(factors: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """The factors of several parts that are one parameter each."""
    first, second = zip(*[pair for pair in factors if pair is not None], strict=True)
    return torch.stack(first), torch.stack(second)


def _given(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """The gradients of outputs side by side, zeros where there is none."""
    pairs = zip(grads, parameters, strict=True)
    return gather([torch.zeros_like(p) if g is None else g for g, p in pairs])


def _of_elements(factor: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """A factor of each element of parameters side by side, one number if it is the same for all."""
    if factor.dim() == 0:
        return factor
    same = factor.stride(0) == 0 or len(parameters) == 1
    # Other devices would have to be waited for.
    if same or (factor.device.type == "cpu" and len(set(factor.tolist())) == 1):
        return factor[0]
    pairs = zip(factor.unbind(), parameters, strict=True)
    return gather([one.expand(parameter.shape) for one, parameter in pairs])


def _of_one(factor: Tensor | None, index: int) -> Tensor | None:
    return factor if factor is None or factor.dim() == 0 else factor[index]
