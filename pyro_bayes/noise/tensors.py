"""What stands in the parameters' place while a context is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import is_transformed
from pyro_bayes.noise.context import ContextNoise, Estimator
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, Moment
from pyro_bayes.posterior.draws import draw
from pyro_bayes.posterior.layout import Drawn, Flat, Layout
from pyro_bayes.posterior.passes import Kind, Number
from pyro_bayes.priors.priors import Priors

_KINDS: dict[Estimator, tuple[Kind, Moment]] = {
    "weights": ("draws", "draw"),
    "flipout": ("deviations", "perturbation"),
    "local": ("variances", "variance"),
}


def gaussian_tensors(
    posterior: Sequence[Flat],
    noise: ContextNoise,
    priors: Priors | None = None,
    number: Number = "divergence",
    named: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[dict[str, GaussianTensor], list[Tensor]]:
    r"""Returns the Gaussian tensors of a posterior, and what was computed in the same pass.

    Arguments:
        posterior: The parameters of each dtype and device.
        noise: The noise of the context.
        priors: The priors, if divergences are wanted.
        number: Which divergences.
        named: The means and log-variances by name, as functions of leaves also where gradients are
            off, since they may be on again while the context is open.

    Returns:
        The tensors by name, and the number or numbers of each dtype and device, if wanted: what
        one pass has of them.
    """
    kind, moment = _KINDS[noise.estimator]
    values: dict[str, GaussianTensor] = {}
    numbers: list[Tensor] = []
    for flat in posterior:
        drawn = _drawn(flat, kind, priors, number)
        views: Callable[[str], tuple[Tensor, Tensor]] = _Views(flat)
        means = drawn.means or flat.layout.split(flat.mean.detach())
        if named is not None and not torch.is_grad_enabled():
            views, means = named.__getitem__, [named[name][0] for name in flat.layout.names]
        triples = zip(flat.layout.names, means, drawn.outputs, strict=True)
        new = [
            GaussianTensor(
                mean, {moment: value}, parameter=name, key=name, noise=noise,
                posterior=partial(views, name),
            )
            for name, mean, value in triples
        ]  # fmt: skip
        if noise.estimator != "weights" and flat.mean.requires_grad and not is_transformed():
            spread = drawn.outputs if noise.estimator == "flipout" else None
            with torch.enable_grad():
                new = _Handed.apply(flat.layout, noise, spread, new, flat.mean, flat.logvar)
        values.update(zip(flat.layout.names, new, strict=True))
        if drawn.number is not None:
            numbers.append(drawn.number)
    return values, numbers


class _Handed(torch.autograd.Function):
    r"""Gaussian tensors as functions of the posterior, for operators that torch does not report.

    They are handed to functions of autograd, for whose backward passes the gradient of each is that
    of its one draw, :math:`\mu + \sigma \epsilon`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        noise: ContextNoise,
        spread: Sequence[Tensor] | None,
        new: list[GaussianTensor],
        mean: Tensor,
        logvar: Tensor,
    ) -> tuple[GaussianTensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.noise, ctx.spread, ctx.pair = layout, noise, spread, (mean, logvar)
        return tuple(new)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, (mean, logvar) = ctx.layout, ctx.pair
        of_mean = layout.flatten(grads, mean)
        spread = ctx.spread
        if spread is None:
            pairs = [layout.split(p) for p in (mean, logvar)]
            spread = [
                None if grad is None else (0.5 * v).exp() * ctx.noise.of_parameter(name, m)
                for name, m, v, grad in zip(layout.names, *pairs, grads, strict=True)
            ]
        of_logvar = 0.5 * of_mean * layout.flatten(spread, mean)
        return None, None, None, None, of_mean, of_logvar


class _Views:
    """The means and log-variances by name, as functions of flat tensors, made when first needed."""

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str) -> tuple[Tensor, Tensor]:
        if not self._pairs:
            layout, *flats = self._flat
            with torch.enable_grad():
                pairs = zip(*map(layout.split, flats), strict=True)
                self._pairs.update(zip(layout.names, pairs, strict=True))
        return self._pairs[name]


def held_values(
    posterior: Sequence[Flat],
    noise: ContextNoise,
    priors: Priors | None = None,
    named: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[Mapping[str, Tensor], list[Tensor]]:
    """Returns what a base holds in the place of its parameters: draws, or Gaussian tensors.

    Arguments:
        posterior: The parameters of each dtype and device.
        noise: The noise of the context.
        priors: The priors, if the divergence is wanted.
        named: The means and log-variances by name, as in :func:`gaussian_tensors`.

    Returns:
        The values by name, and the divergence of each dtype and device, if wanted.
    """
    if noise.estimator != "weights":
        return gaussian_tensors(posterior, noise, priors, named=named)
    drawn = [_drawn(flat, "draws", priors, "divergence") for flat in posterior]
    values: dict[str, Tensor] = {}
    for flat, (_, outputs, _) in zip(posterior, drawn, strict=True):
        values.update(zip(flat.layout.names, outputs, strict=True))
    return values, [d.number for d in drawn if d.number is not None]


def _drawn(flat: Flat, kind: Kind, priors: Priors | None, number: Number) -> Drawn:
    if priors is None:
        return draw(flat, kind)
    return draw(flat, kind, number, *priors.flat(flat))


def as_dtypes(
    values: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> Mapping[str, Tensor]:
    """Returns values in the dtypes of the parameters that they stand for.

    Arguments:
        values: Draws or Gaussian tensors by name.
        dtypes: The dtypes by name; others stay.
    """
    converted = dict(values)
    for name in values.keys() & dtypes.keys():
        value = values[name]
        if isinstance(value, GaussianTensor):
            # Where gradients are off, they may be on again while the context is open.
            with value.noise.outside(), torch.enable_grad():
                converted[name] = value.to(dtypes[name])
        else:
            converted[name] = value.to(dtypes[name])
    return converted
