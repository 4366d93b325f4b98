"""Draws that bring their log-densities, which the pass over memory that draws them computes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.posterior import gaussian
from pyro_bayes.posterior.anchor import Posterior, Shared
from pyro_bayes.posterior.flat import keeps_graph
from pyro_bayes.posterior.fused import Outputs, by_formula, groups, noise


def scored_draws(posterior: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Draws :math:`\mu + \sigma \epsilon` for each parameter.

    Arguments:
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.

    Returns:
        The draws and their log-densities under the posterior by name, differentiable with respect
        to it.

    Example:
        >>> scored_draws({"w": (torch.tensor([1.0, 2.0]), torch.full((2,), -80.0))})["w"][0]
        tensor([1., 2.])
    """
    found: dict[str, Any] = dict.fromkeys(posterior)  # keeps the order
    for names, means, logvars in groups(posterior):
        if by_formula(means):
            for name, mean, logvar, epsilon in zip(
                names, means, logvars, noise(means), strict=True
            ):
                draw = gaussian.draw(mean, logvar, epsilon)
                found[name] = draw, gaussian.log_density(logvar, epsilon)
            continue
        *draws, squares, scores = Outputs.apply("draws", "scores", Shared(), *means, *logvars)
        found.update(zip(names, zip(draws, scores.unbind(), strict=True), strict=True))
        if squares.requires_grad:
            probe = torch.empty((), requires_grad=True).view(())
            halves = _Squares.apply(squares, probe, *draws).unbind()
            for draw, half in zip(draws, halves, strict=True):
                draw._half_square = half, draw._version
    return found


def half_square(draw: Tensor) -> Tensor | None:
    r"""Returns :math:`\frac{1}{2} \sum_i \theta_i^2` of a draw, if it is known.

    Arguments:
        draw: The draw :math:`\theta`.
    """
    known = getattr(draw, "_half_square", None)
    # A copy or a pickle has the attribute too, but is no function of what its gradient would go to.
    return known[0] if known and not draw.is_leaf and draw._version == known[1] else None


class _Squares(torch.autograd.Function):
    """Half the sums of squares of draws, as functions of them.

    A backward pass through the whole graph takes the short way, to the node of the draws without
    a gradient of each draw. Any other may ask for these, as for that of a log-density by a draw.
    """

    @staticmethod
    def forward(ctx: Any, squares: Tensor, probe: Tensor, *draws: Tensor) -> Tensor:
        # Nobody can ask for a gradient of the probe, so only the whole graph has its node.
        ctx.probe, ctx.draws = probe.grad_fn, [weakref.ref(draw) for draw in draws]
        ctx.save_for_backward(*draws)
        ctx.values = [(draw.detach(), draw._version) for draw in draws]
        return squares.view_as(squares)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        draws = [draw() for draw in ctx.draws]
        watched = any(d is not None and (d.retains_grad or d._backward_hooks) for d in draws)
        if torch._C._will_engine_execute_node(ctx.probe) and not watched:
            if not keeps_graph():
                ctx.values = None
            return grad, None, *[None] * len(draws)
        if torch.is_grad_enabled() or ctx.values is None:
            values = ctx.saved_tensors
        else:  # of these, what no density was read of may have been changed in place
            pairs = zip(grad.unbind(), ctx.values, strict=True)
            changed = any(v._version != version and bool(by) for by, (v, version) in pairs)
            values = ctx.saved_tensors if changed else [v for v, _ in ctx.values]
        products = (by * value for by, value in zip(grad.unbind(), values, strict=True))
        return None, None, *products
