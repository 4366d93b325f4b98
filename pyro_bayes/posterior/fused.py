"""Draws and divergences of all parameters at once, in few passes over memory.

Draws are one node of the autograd graph and the divergence another, with gradients in closed form;
the divergence that follows draws sends its gradient through their node. Second derivatives,
`torch.func` transforms and `torch.compile` go through the formulas for one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bayes.posterior import gaussian
from pyro_bayes.posterior.anchor import Anchor, Group, Posterior, Serves, Shared, versions
from pyro_bayes.posterior.flat import blocks, gather, keeps_graph, parts, transformed
from pyro_bayes.posterior.gpu import kernels
from pyro_bayes.posterior.slopes import Kind, slopes
from pyro_bayes.posterior.sweep import as_number, joined, sweep


def draws(posterior: Posterior) -> dict[str, Tensor]:
    r"""Draws :math:`\mu + \sigma \epsilon` for each parameter.

    Arguments:
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.

    Returns:
        The draws by name, differentiable with respect to both.

    Example:
        >>> draws({"w": (torch.tensor([1.0, 2.0]), torch.full((2,), -80.0))})["w"]
        tensor([1., 2.])
    """
    return outputs_and_anchor("draws", posterior)[0]


def outputs_and_anchor(
    kind: Kind, posterior: Posterior, serves: Serves = "all"
) -> tuple[dict[str, Tensor], Anchor | None]:
    r"""Computes something of each parameter, and what lets a divergence share the nodes of it.

    Arguments:
        kind: What to compute: draws :math:`\mu + \sigma \epsilon`, their deviations
            :math:`\sigma \epsilon` from the mean, or variances :math:`\sigma^2`.
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.
        serves: Whether the anchor serves the divergence of all parameters or that of each.

    Returns:
        The tensors by name, all draws and such others as can be computed at once, and the anchor,
        if all can.
    """
    found: dict[str, Any] = dict.fromkeys(posterior) if kind == "draws" else {}  # keeps the order
    anchors: list[tuple[Group, Tensor, Shared]] = []
    together = [*groups(posterior)]
    for group in together:
        names, means, logvars = group
        outputs: Sequence[Tensor] = ()
        if not by_formula(means):
            shared = Shared()
            *outputs, zero = Outputs.apply(kind, serves, shared, *means, *logvars)
            if zero.requires_grad:
                anchors.append((group, zero, shared))
        elif kind != "variances":
            centers = means if kind == "draws" else map(torch.zeros_like, means)
            outputs = list(map(gaussian.draw, centers, logvars, noise(means)))
        found.update(zip(names, outputs, strict=False))
    whole = anchors and len(anchors) == len(together)
    return found, Anchor(anchors, serves) if whole else None


def kl_divergence(posterior: Posterior, prior_var: float, anchor: Anchor | None = None) -> Tensor:
    r"""Returns :math:`D_{KL}(q \| p)`, summed over all parameters.

    Arguments:
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.
        prior_var: The variance :math:`\sigma_p^2 > 0` of the prior.
        anchor: Where its gradient can go, if there are draws from the posterior.

    Returns:
        A 0-dim tensor, in nats.

    Example:
        >>> kl_divergence({"w": (torch.ones(3), torch.zeros(3))}, prior_var=0.5)
        tensor(3.4603)
    """
    terms: list[Any] = []
    if anchor and not transformed() and anchor.takes("all", posterior, prior_var):
        terms += [_anchored(prior_var, *group) for group in anchor.groups]
    else:
        for _, means, logvars in groups(posterior):
            if by_formula(means):
                pairs = zip(means, logvars, strict=True)
                terms.append(sum(gaussian.kl_divergence(*pair, prior_var) for pair in pairs))
            else:
                term = _Divergences.apply(prior_var, parts(means), *means, *logvars)
                terms.append(term.sum())
    if len(terms) == 1:
        return terms[0].to(next(iter(posterior.values()))[0].dtype)  # type: ignore[no-any-return]
    total: Tensor = sum(term.to(terms[0].device) for term in terms)
    dtypes = {mean.dtype for mean, _ in posterior.values()}
    return total.to(dtypes.pop()) if len(dtypes) == 1 else total


def kl_divergences(
    posterior: Posterior, prior_var: float, anchor: Anchor | None = None
) -> dict[str, Tensor]:
    r"""Returns :math:`D_{KL}(q \| p)` of each parameter by name, see :func:`kl_divergence`."""
    found: dict[str, Tensor] = {}
    if anchor and not transformed() and anchor.takes("each", posterior, prior_var):
        for (names, means, logvars), zeros, _ in anchor.groups:
            with torch.no_grad():
                values = _divergence_of_each((*means, *logvars), prior_var)
            found.update(zip(names, zeros.add(values).unbind(), strict=True))
        return found
    for names, means, logvars in groups(posterior):
        if by_formula(means):
            pairs = zip(means, logvars, strict=True)
            terms: Any = [gaussian.kl_divergence(*pair, prior_var) for pair in pairs]
        else:
            each = tuple(slice(i, i + 1) for i in range(len(names)))
            terms = _Divergences.apply(prior_var, each, *means, *logvars).unbind()
        found.update(zip(names, terms, strict=True))
    return found


def groups(posterior: Posterior) -> Iterator[Group]:
    """Returns the names, means and log-variances of what can be computed on together."""
    found: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
    for name, (mean, logvar) in posterior.items():
        dense = mean.is_contiguous() and logvar.is_contiguous()
        found.setdefault((mean.dtype, mean.device, dense), []).append((name, mean, logvar))
    for triples in found.values():
        names, means, logvars = zip(*triples, strict=True)
        yield names, means, logvars


def by_formula(means: Sequence[Tensor]) -> bool:
    """Tells whether parameters need the formulas for one parameter."""
    mean = means[0]
    return transformed() or mean.dtype.itemsize < 4 or not mean.is_contiguous()


def noise(means: Sequence[Tensor]) -> list[Tensor]:
    """Returns standard normal noise for several tensors, from one call of the generator."""
    sizes = [mean.numel() for mean in means]
    flat = torch.randn(sum(sizes), dtype=means[0].dtype, device=means[0].device)
    return [part.view(m.shape) for part, m in zip(flat.split(sizes), means, strict=True)]


class Outputs(torch.autograd.Function):
    r"""Draws of several parameters or the like, and zeros to which a divergence can be added.

    Its inputs are all μ and then all log σ². There is one zero for all parameters or one for each,
    and its gradient is the divergence's. If draws are scored, there are instead half the sum of
    squares and the log-density of each draw.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind,
        numbers: Serves | Literal["scores"],
        shared: Shared,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        means, logvars = parameters[:count], parameters[count:]
        scored, trains = numbers == "scores", any(ctx.needs_input_grad)
        # Other devices would have to be waited for.
        counts = trains and means[0].is_cpu and not scored
        apart = kind == "draws" and (trains or scored)
        ctx.slices, outputs, spreads, scores, ctx.flat = sweep(
            kind, means, logvars, apart, scored, shared.totals if counts else None
        )
        ctx.kind, ctx.scored, ctx.shared = kind, scored, shared
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*spreads)
        # The gradient of a divergence may come alone, and must leave what that of outputs needs.
        ctx.parameters, ctx.versions, ctx.spreads = parameters, versions(parameters), spreads
        if scores is None:
            return *outputs, means[0].new_zeros(() if numbers == "all" else count)
        surprises, squares = scores.unbind()
        return *outputs, squares * 0.5, surprises * -0.5

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *of_outputs, by, less = grads if ctx.scored else (*grads, None)
        if versions(ctx.parameters) != ctx.versions:
            raise RuntimeError(
                "Expected the posterior's parameters to be those that the weights were drawn with;"
                " got others, changed in place. Call backward() before optimizer.step()."
            )
        # Some optimisers change parameters without a trace, and steps come after this.
        known, ctx.flat = ctx.flat, None
        ctx.shared.totals.clear()
        anchored = by is not None or less is not None
        if ctx.scored and anchored:
            by = torch.zeros_like(less) if by is None else by
            less = torch.zeros_like(by) if less is None else -0.5 * less
        elif anchored:
            by, less = by / ctx.shared.prior_var, -0.5 * by
        spreads: Sequence[Tensor] = ()
        if (ctx.scored and anchored) or any([grad is not None for grad in of_outputs]):
            spreads = ctx.spreads or ctx.saved_tensors
            if not keeps_graph():
                ctx.spreads = None
        if not spreads and not anchored:
            return (None,) * len(ctx.needs_input_grad)
        same = (by, less) if anchored else None
        each = anchored and by.dim() > 0
        several = each and len(ctx.slices) > 1
        factors = [(by[part], less[part]) if several else same for part in ctx.slices]
        found = slopes(
            ctx.parameters,
            ctx.slices,
            factors,
            ctx.kind,
            of_outputs,
            spreads,
            known,
            of_squares=ctx.scored,
        )
        if anchored:
            return None, None, None, *found
        # What no output depends on that was used gets none, as if each had a node of its own.
        unused = [grad is None for grad in of_outputs]
        alone = [ctx.kind != "draws" or grad is None for grad in of_outputs]
        kept = (None if u else s for u, s in zip(alone + unused, found, strict=True))
        return None, None, None, *kept


class _Divergences(torch.autograd.Function):
    """The divergences of parts of the parameters; its inputs are all μ and then all log σ²."""

    @staticmethod
    def forward(ctx: Any, prior_var: float, slices: Sequence[slice], *parameters: Tensor) -> Tensor:
        ctx.prior_var, ctx.slices = prior_var, slices
        ctx.save_for_backward(*parameters)
        return joined(_divergences(parameters, prior_var, slices), parameters[0])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        factors = zip((grad / ctx.prior_var).unbind(), (-0.5 * grad).unbind(), strict=True)
        return None, None, *slopes(ctx.saved_tensors, ctx.slices, list(factors))


def _anchored(prior_var: float, group: Group, zero: Tensor, shared: Shared) -> Tensor:
    """The divergence of a group, whose gradient goes to the node of its draws."""
    _, means, logvars = group
    total: Any = _divergence_by_totals(shared, prior_var)
    if total is None:
        with torch.no_grad():
            total = sum(_divergences((*means, *logvars), prior_var, parts(means)))
    return zero.add(total)


def _divergence_by_totals(shared: Shared, prior_var: float) -> float | None:
    """The divergence, if totals give it to as many digits as the elements do."""
    totals = tuple(shared.totals)
    shift, total = math.log(prior_var), 0.0
    for size, squares, variances, logvars in totals:
        # Single precision loses up to 1e-4 of a sum of squares. It must be small beside the rest.
        if not variances <= 0.018 * prior_var * size:
            return None
        total += (squares + variances) / prior_var - size - (logvars - size * shift)
    return 0.5 * total if totals else None


def _divergences(
    parameters: Sequence[Tensor], prior_var: float, slices: Sequence[slice]
) -> list[Any]:
    """The divergences of parts of the parameters, numbers on a CPU and tensors elsewhere."""
    count = len(parameters) // 2
    means, logvars = parameters[:count], parameters[count:]
    device = kernels(means, logvars)
    if device:
        each = device.divergences(means, logvars, prior_var)
        return [each[part].sum() for part in slices] if len(slices) < count else [*each.unbind()]
    cpu = means[0].device.type == "cpu"
    number = as_number(means[0])
    shift = math.log(prior_var)
    totals = []
    for part in slices:
        total = 0.0
        for m, v in blocks(gather(means[part]), gather(logvars[part])):
            ratio = v - shift
            if cpu and len(ratio) > 4096 and float(ratio.amax()) < -0.5:  # e^a - 1 loses no digits
                total -= float(ratio.sum()) + len(ratio)
                total += float(ratio.exp_().sum())  # in a fifth of the time of expm1
            else:
                total = total + number((torch.expm1(ratio) - ratio).sum())
            total = total + number(torch.dot(m, m)) / prior_var
        totals.append(total * 0.5)
    return totals


def _divergence_of_each(parameters: Sequence[Tensor], prior_var: float) -> Tensor:
    """The divergence of each parameter."""
    count = len(parameters) // 2
    means, logvars = parameters[:count], parameters[count:]
    device = kernels(means, logvars)
    if device:
        return device.divergences(means, logvars, prior_var)  # type: ignore[no-any-return]
    number = as_number(means[0])
    totals = []
    for part in parts(means):
        if len(means[part]) == 1:
            totals += _divergences((*means[part], *logvars[part]), prior_var, [slice(0, 1)])
            continue
        mean, ratio = gather(means[part]), gather(logvars[part]) - math.log(prior_var)
        terms = torch.expm1(ratio).sub_(ratio).addcmul_(mean, mean, value=1 / prior_var)
        sizes = [m.numel() for m in means[part]]
        totals += [number(term.sum()) * 0.5 for term in terms.split(sizes)]
    return joined(totals, means[0])
