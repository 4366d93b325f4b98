r"""Draws from a posterior and its divergence from a prior, as functions of its parameters.

Each is one node of the autograd graph, with its gradient in closed form. Second derivatives,
`torch.func` transforms, `torch.compile` and half precision go through the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import is_transformed, untracked_views
from pyro_bayes.posterior import gaussian, passes
from pyro_bayes.posterior.layout import Layout
from pyro_bayes.posterior.passes import Kind, Number

Precision: TypeAlias = "float | Tensor | Callable[[Tensor, Tensor], Tensor]"
r"""The precision :math:`1 / \sigma_p^2` of the prior: of all elements; of each; or a function of
means and log-variances that returns that of each with which the divergence is least."""


class Flat(NamedTuple):
    r"""The parameters of one posterior that have one dtype and device.

    Arguments:
        layout: Where each lies.
        mean: All means :math:`\mu`, a flat tensor.
        logvar: All :math:`\log \sigma^2`, likewise.
    """

    layout: Layout
    mean: Tensor
    logvar: Tensor


class Drawn(NamedTuple):
    """What was computed of each parameter.

    Arguments:
        means: The means, if draws were not asked for; else none.
        outputs: What was asked for.
        number: The divergence, that of each parameter, or log-densities, if asked for.
    """

    means: list[Tensor]
    outputs: list[Tensor]
    number: Tensor | None


def draw(
    posterior: Flat,
    kind: Kind = "draws",
    number: Number | None = None,
    precision: Precision = 1.0,
) -> Drawn:
    r"""Draws parameters, or computes deviations or variances.

    Arguments:
        posterior: The posterior.
        kind: What to compute.
        number: What to compute in the same pass, if anything. Log-densities of draws are functions
            of the draws, too.
        precision: The precision :math:`1 / \sigma_p^2` of the prior, for divergences.

    Returns:
        Tensors of the parameters' shapes, in order, and the number or numbers, in nats.

    References:
        | Auto-Encoding Variational Bayes (Kingma and Welling, 2014)
        | https://arxiv.org/abs/1312.6114

    Example:
        >>> flat = Flat(Layout({"w": torch.zeros(2)}), torch.ones(2), torch.full((2,), -80.0))
        >>> draw(flat).outputs
        [tensor([1., 1.])]
    """
    layout, mean, logvar = posterior
    if _by_formula(mean):
        return _by_formulas(posterior, kind, number, precision)
    beside = None if number == "log_densities" else number
    *tensors, spread, value = _Draw.apply(layout, kind, number, precision, mean, logvar)
    count = len(layout.parts)
    outputs = tensors[-count:]
    if number == "log_densities":
        value = _LogDensity.apply(layout, spread, value, mean, logvar, *outputs)
    return Drawn(tensors[:-count], outputs, value if beside or number else None)


def divergence(
    posterior: Flat, precision: Precision = 1.0, number: Number = "divergence"
) -> Tensor:
    r"""Computes :math:`D_{KL}(q \| \mathcal{N}(0, \sigma_p^2))`.

    Arguments:
        posterior: The posterior.
        precision: The precision :math:`1 / \sigma_p^2`.
        number: Whether it is summed over all parameters, or one number for each.

    Returns:
        The divergence in nats, a 0-dim tensor, or a vector.

    Example:
        >>> flat = Flat(Layout({"w": torch.zeros(3)}), torch.ones(3), torch.zeros(3))
        >>> divergence(flat, precision=2.0)
        tensor(3.4603)
    """
    layout, mean, logvar = posterior
    if _by_formula(mean):
        return _divergence_by_formula(posterior, number, precision)
    value: Tensor = _Divergence.apply(layout, number, precision, mean, logvar)
    return value


def _by_formula(mean: Tensor) -> bool:
    return mean.dtype.itemsize < 4 or is_transformed()


def _present(precision: Precision, mean: Tensor, logvar: Tensor) -> float | Tensor:
    return precision(mean, logvar) if callable(precision) else precision


def _by_formulas(posterior: Flat, kind: Kind, number: Number | None, precision: Precision) -> Drawn:
    layout, mean, logvar = posterior
    means = [] if kind == "draws" else layout.split(mean)
    value: Tensor | None = None
    if number in ("divergence", "divergences"):
        value = _divergence_by_formula(posterior, number, precision)
    if kind == "variances":  # of which half precision has no small ones
        logvar = logvar.float() if logvar.dtype == torch.float16 else logvar
        return Drawn(means, layout.split(logvar.exp()), value)
    spread = gaussian.draw(torch.zeros_like(mean), logvar)
    output = mean + spread if kind == "draws" else spread
    if number == "log_densities":
        deviation = _deviation(spread, output, mean)
        value = layout.sums(gaussian.log_densities(deviation, torch.zeros_like(mean), logvar))
    return Drawn(means, layout.split(output), value)


def _deviation(spread: Tensor, draw: Tensor, mean: Tensor) -> Tensor:
    """The deviation of a draw as a function of it and of the mean, with all digits it has."""
    return spread.detach() + (draw - draw.detach()) - (mean - mean.detach())


def _divergence_by_formula(posterior: Flat, number: Number, precision: Precision) -> Tensor:
    layout, mean, logvar = posterior
    terms = gaussian.divergence_terms(mean, logvar, _present(precision, mean, logvar))
    return (terms.sum() if number == "divergence" else layout.sums(terms)).to(mean.dtype)


class _Draw(torch.autograd.Function):
    """What :func:`draw` returns, and the deviations of draws from the mean."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        kind: Kind,
        number: Number | None,
        precision: Precision,
        mean: Tensor,
        logvar: Tensor,
    ) -> tuple[Tensor | None, ...]:
        present = _present(precision, mean, logvar) if number else 1.0
        output, spread, value = passes.sample(layout, kind, mean, logvar, number, present)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.kind, ctx.number = layout, kind, number
        ctx.precision, ctx.present = precision, present
        ctx.save_for_backward(mean, logvar, spread)
        # What changes the means in place is to be noticed; draws are the user's to change.
        means = [] if kind == "draws" else layout.views(mean)
        with untracked_views():
            outputs = layout.views(output)
        kept = spread if number == "log_densities" else None
        ctx.mark_non_differentiable(*[kept] if kept is not None else [])
        return *means, *outputs, kept, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, logvar, spread = ctx.saved_tensors
        *tensors, _, of_number = grads
        count = len(ctx.layout.parts)
        of_number = None if ctx.number == "log_densities" else of_number
        of_means, of_outputs = (_any(tensors[:-count]), _any(tensors[-count:]))
        if of_means is None and of_outputs is None and of_number is None:
            return (None,) * 6
        compute, precision = passes.gradients, ctx.present
        if torch.is_grad_enabled():
            compute, precision = _gradients_by_formula, ctx.precision
        given = of_means, of_outputs, of_number, precision
        pair = compute(ctx.layout, ctx.kind, mean, logvar, spread, *given)
        return None, None, None, None, *pair


class _Divergence(torch.autograd.Function):
    """What :func:`divergence` returns."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        number: Number,
        precision: Precision,
        mean: Tensor,
        logvar: Tensor,
    ) -> Tensor:
        ctx.layout, ctx.precision = layout, precision
        ctx.present = _present(precision, mean, logvar)
        ctx.save_for_backward(mean, logvar)
        return passes.divergence(layout, number, mean, logvar, ctx.present)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        mean, logvar = ctx.saved_tensors
        compute, precision = passes.gradients, ctx.present
        if torch.is_grad_enabled():
            compute, precision = _gradients_by_formula, ctx.precision
        pair = compute(ctx.layout, "draws", mean, logvar, None, None, None, grad, precision)
        return None, None, None, *pair


class _LogDensity(torch.autograd.Function):
    r"""The log-density of each draw, as a function of it and of the posterior."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        spread: Tensor,
        values: Tensor,
        mean: Tensor,
        logvar: Tensor,
        *draws: Tensor,
    ) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(spread, mean, logvar, *draws)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        spread, mean, logvar, *draws = ctx.saved_tensors
        layout: Layout = ctx.layout
        if torch.is_grad_enabled():
            deviation = _deviation(spread, layout.flatten(draws), mean)
            grad = layout.spread(grad)
            scaled = grad * deviation * (-logvar).exp()
            of_logvar = 0.5 * (scaled * deviation - grad)
            return None, None, None, scaled, of_logvar, *layout.split(-scaled)
        of_mean, of_logvar, of_draws = passes.log_density_gradients(layout, logvar, spread, grad)
        return None, None, None, of_mean, of_logvar, *layout.views(of_draws)


def _gradients_by_formula(
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
    """What :func:`passes.gradients` returns, differentiable."""
    weight = 1.0 if kind == "variances" else 0.5
    of_mean, of_logvar = torch.zeros_like(mean), torch.zeros_like(mean)
    of_means = of_outputs if kind == "draws" else of_means
    if of_means is not None:
        of_mean = of_mean + layout.flatten(_filled(layout, of_means, mean))
    if of_outputs is not None and spread is not None:
        spread = spread * (weight * (logvar - logvar.detach())).exp()
        of_output = layout.flatten(_filled(layout, of_outputs, mean))
        of_logvar = of_logvar + weight * of_output * spread
    if of_number is not None:
        factor = of_number if of_number.dim() == 0 else layout.spread(of_number)
        present = _present(precision, mean, logvar)
        of_mean = of_mean + factor * present * mean
        of_logvar = of_logvar + 0.5 * factor * (present * logvar.exp() - 1)
    return of_mean, of_logvar


def _any(grads: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    if not any([grad is not None for grad in grads]):
        return None
    return [g.to_dense() if g is not None and g.is_sparse else g for g in grads]


def _filled(layout: Layout, grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    pairs = zip(layout.parts, grads, strict=True)
    return [like.new_zeros(part.shape) if g is None else g for part, g in pairs]
