r"""Draws from a posterior and its divergence from a prior, as functions of its parameters.

Each is one node of the autograd graph, with its gradient in closed form. Second derivatives,
`torch.func` transforms and `torch.compile` go through the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.base.kept import Kept
from pyro_bayes.base.torch_private import is_batched, is_transformed, untracked_views
from pyro_bayes.posterior import gaussian, passes
from pyro_bayes.posterior.fixed import warn_of_use
from pyro_bayes.posterior.layout import Drawn, Flat, Layout
from pyro_bayes.posterior.passes import Kind, Number

Precision: TypeAlias = "float | Tensor | Callable[[Tensor, Tensor], Tensor]"
r"""The precision :math:`1 / \sigma_p^2` of the prior: of all elements; of each; or a function of
means and log-variances that returns that of each with which the divergence is least. Where it is 0,
the divergence counts the negative entropy alone."""


def draw(
    posterior: Flat,
    kind: Kind = "draws",
    number: Number | None = None,
    precision: Precision = 1.0,
    prior_mean: Tensor | None = None,
) -> Drawn:
    r"""Draws parameters, or computes deviations or variances.

    Arguments:
        posterior: The posterior.
        kind: What to compute.
        number: What to compute in the same pass, if anything. Log-densities of draws are functions
            of the draws, too.
        precision: The precision :math:`1 / \sigma_p^2` of the prior, for divergences.
        prior_mean: The mean of the prior, a flat tensor, likewise; 0 by default.

    Returns:
        Tensors of the parameters' shapes, in order, and the number or numbers, in nats.

    Example:
        >>> flat = Flat(Layout({"w": torch.zeros(2)}), torch.ones(2), torch.full((2,), -80.0))
        >>> draw(flat).outputs
        [tensor([1., 1.])]
    """
    layout, mean, logvar = posterior
    if is_transformed():
        return _by_formulas(posterior, kind, number, precision, prior_mean)
    prior = precision, prior_mean
    *tensors, spread, value = _Draw.apply(layout, kind, number, prior, mean, logvar)
    means, outputs = tensors[: -len(layout.parts)], tensors[-len(layout.parts) :]
    if number == "log_densities":
        value = _LogDensity.apply(layout, spread, value, mean, logvar, *outputs)
    return Drawn(means, outputs, value)


def divergence(
    posterior: Flat,
    precision: Precision = 1.0,
    number: Number = "divergence",
    prior_mean: Tensor | None = None,
) -> Tensor:
    r"""Computes :math:`D_{KL}(q \| \mathcal{N}(\mu_p, \sigma_p^2))`.

    Arguments:
        posterior: The posterior.
        precision: The precision :math:`1 / \sigma_p^2`.
        number: Whether it is summed over all parameters, or one number for each.
        prior_mean: The mean :math:`\mu_p`, a flat tensor; 0 by default.

    Returns:
        The divergence in nats, a 0-dim tensor, or a vector.

    Example:
        >>> flat = Flat(Layout({"w": torch.zeros(3)}), torch.ones(3), torch.zeros(3))
        >>> divergence(flat, precision=2.0)
        tensor(3.4603)
    """
    layout, mean, logvar = posterior
    if is_transformed():
        return _divergence_by_formula(posterior, number, precision, prior_mean)
    *_, value = _Draw.apply(layout, None, number, (precision, prior_mean), mean, logvar)
    return value  # type: ignore[no-any-return]


def _present(precision: Precision, mean: Tensor, logvar: Tensor) -> float | Tensor:
    return precision(mean, logvar) if callable(precision) else precision


def _by_formulas(
    posterior: Flat,
    kind: Kind,
    number: Number | None,
    precision: Precision,
    prior_mean: Tensor | None,
) -> Drawn:
    layout, mean, logvar = posterior
    means = [] if kind == "draws" else layout.split(mean)
    value: Tensor | None = None
    if number in ("divergence", "divergences"):
        value = _divergence_by_formula(posterior, number, precision, prior_mean)
    if kind == "variances":
        return Drawn(means, layout.split(logvar.exp()), value)
    spread = gaussian.draw(torch.zeros_like(mean), logvar)
    output = mean + spread if kind == "draws" else spread
    if number == "log_densities":
        deviation = _deviation(spread, output, mean)
        logvar = layout.without_fixed(logvar)
        terms = gaussian.log_densities(deviation, torch.zeros_like(mean), logvar)
        value = layout.sums(layout.without_fixed(terms))
    return Drawn(means, layout.split(output), value)


def _deviation(spread: Tensor, draw: Tensor, mean: Tensor) -> Tensor:
    """The deviation of a draw as a function of it and of the mean, with all digits it has."""
    return spread.detach() + (draw - draw.detach()) - (mean - mean.detach())


def _divergence_by_formula(
    posterior: Flat, number: Number, precision: Precision, prior_mean: Tensor | None
) -> Tensor:
    layout, mean, logvar = posterior
    precision = _present(precision, mean, logvar)
    every = gaussian.divergence_terms(mean, logvar, precision, prior_mean)
    terms = layout.without_fixed(every)
    return terms.sum() if number == "divergence" else layout.sums(terms)


class _Draw(torch.autograd.Function):
    """The tensors of :func:`draw`, deviations for log-densities, and the number; or this alone."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        kind: Kind | None,
        number: Number | None,
        prior: tuple[Precision, Tensor | None],
        mean: Tensor,
        logvar: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.kind, ctx.prior = layout, kind, prior
        ctx.is_log = number == "log_densities"
        precision, prior_mean = prior
        ctx.present = (_present(precision, mean, logvar) if number else 1.0), prior_mean
        output, spread, value = passes.sample(layout, kind, mean, logvar, number, *ctx.present)
        if kind is None:
            ctx.kept = Kept(mean, logvar, None)
            return (value,)
        ctx.kept = Kept(mean, logvar, spread)
        # What changes the means in place is to be noticed; draws are the user's to change.
        means = [] if kind == "draws" else layout.views(mean)
        with untracked_views():
            outputs = layout.views(output)
        if not ctx.is_log:
            return *means, *outputs, None, value
        ctx.mark_non_differentiable(spread)
        return *means, *outputs, spread, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, logvar, spread = ctx.kept.tensors
        *tensors, of_number = grads
        count = len(ctx.layout.parts)
        of_outputs = _any(tensors[-count - 1 : -1])
        of_means = of_outputs if ctx.kind == "draws" else _any(tensors[: -count - 1])
        of_number = None if ctx.is_log else of_number
        if ctx.layout.checks and of_means is not None:
            warn_of_use(ctx.layout, of_means)
        if of_means is None and of_outputs is None and of_number is None:
            return (None,) * 6
        compute: Any = passes.gradients
        prior = ctx.present
        if torch.is_grad_enabled() or is_batched(grads):
            compute, prior = _gradients_by_formula, ctx.prior
        weight = 1.0 if ctx.kind == "variances" else 0.5
        rest = of_means, of_outputs, of_number, *prior
        gradients = compute(ctx.layout, weight, mean, logvar, spread, *rest)
        if ctx.layout.checks and compute is passes.gradients:  # other uses are looked at later
            for gradient in gradients:
                gradient.index_fill_(0, ctx.layout.fixed, 0.0)
        return None, None, None, None, *gradients


class _LogDensity(torch.autograd.Function):
    """The log-density of each draw, as a function of it and of the posterior."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, spread: Tensor, value: Tensor, *others: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.kept = Kept(spread, *others)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        spread, mean, logvar, *draws = ctx.kept.tensors
        layout: Layout = ctx.layout
        if torch.is_grad_enabled() or is_batched([grad]):
            deviation = _deviation(spread, layout.flatten(draws), mean)
            grad, logvar = layout.spread(grad), layout.without_fixed(logvar)
            scaled = grad * deviation * (-logvar).exp()
            of_logvar = 0.5 * (scaled * deviation - grad)
            return None, None, None, scaled, of_logvar, *layout.split(-scaled)
        of_mean, of_logvar, of_draws = passes.log_density_gradients(layout, logvar, spread, grad)
        return None, None, None, of_mean, of_logvar, *layout.views(of_draws)


def _gradients_by_formula(
    layout: Layout,
    weight: float,
    mean: Tensor,
    logvar: Tensor,
    spread: Tensor | None,
    of_means: Sequence[Tensor | None] | None,
    of_outputs: Sequence[Tensor | None] | None,
    of_number: Tensor | None,
    precision: Precision,
    prior_mean: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What :func:`passes.gradients` returns, differentiable."""
    of_mean, of_logvar = torch.zeros_like(mean), torch.zeros_like(mean)
    if of_means is not None:
        of_mean = of_mean + layout.flatten(of_means, mean)
    if of_outputs is not None and spread is not None:
        change = layout.without_fixed(logvar - logvar.detach())
        spread = spread * (weight * change).exp()
        of_output = layout.flatten(of_outputs, mean)
        of_logvar = of_logvar + weight * of_output * spread
    if of_number is not None:
        factor = of_number if of_number.dim() == 0 else layout.spread(of_number)
        present = _present(precision, mean, logvar)
        deviation = mean if prior_mean is None else mean - prior_mean
        of_mean = of_mean + factor * present * deviation
        of_logvar = of_logvar + 0.5 * factor * (present * logvar.exp() - 1)
    return of_mean, of_logvar


def _any(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
    return grads if any([grad is not None for grad in grads]) else None
