"""Draws and divergences of all parameters at once, in few passes over memory.

Draws are one node of the autograd graph and the divergence another, with gradients in closed form;
the divergence that follows draws sends its gradient through their node. Second derivatives,
`torch.func` transforms and `torch.compile` go through the formulas for one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes import gaussian
from pyro_bayes.flat import blocks, gather, parts, room, scatter, transformed
from pyro_bayes.slopes import Kind, slopes

Posterior = Mapping[str, tuple[Tensor, Tensor]]
_Group = tuple[list[str], tuple[Tensor, ...], tuple[Tensor, ...]]
_Moments = list[tuple[int, float, float, float, float]]
"""Of each block: its size, the sums of μ², σ² and log σ², and the largest log σ²."""


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


def draws_and_noise(posterior: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Returns draws with their noise :math:`\epsilon`, see :func:`draws`."""
    epsilons: dict[str, Tensor] = {}
    found, _ = outputs_and_anchor("draws", posterior, epsilons)
    return {name: (draw, epsilons[name]) for name, draw in found.items()}


def outputs_and_anchor(
    kind: Kind, posterior: Posterior, epsilons: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Anchor | None]:
    r"""Computes something of each parameter, and what lets a divergence share the nodes of it.

    Arguments:
        kind: What to compute: draws :math:`\mu + \sigma \epsilon`, their deviations
            :math:`\sigma \epsilon` from the mean, or variances :math:`\sigma^2`.
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.
        epsilons: Where to put the noise :math:`\epsilon` of draws by name, if it is wanted.

    Returns:
        The tensors by name, all draws and such others as can be computed at once, and the anchor,
        if all can.
    """
    found: dict[str, Any] = dict.fromkeys(posterior) if kind == "draws" else {}  # keeps the order
    anchors: list[tuple[_Group, Sequence[Tensor], _Moments]] = []
    count = 0
    for group in _groups(posterior):
        names, means, logvars = group
        count += len(names)
        noise: list[Tensor] | None = None if epsilons is None else []
        outputs: Sequence[Tensor] = ()
        if not _by_formula(means):
            moments: _Moments = []
            *outputs, by, less = _Outputs.apply(kind, noise, moments, *means, *logvars)
            if by.requires_grad:
                anchors.append((group, (by, less), moments))
        elif kind != "variances":
            noise = _noise(means)
            centers = means if kind == "draws" else map(torch.zeros_like, means)
            outputs = list(map(gaussian.draw, centers, logvars, noise))
        found.update(zip(names, outputs, strict=False))
        if epsilons is not None and noise is not None:
            epsilons.update(zip(names, noise, strict=True))
    whole = sum(len(names) for (names, _, _), _, _ in anchors) == count
    return found, Anchor(anchors) if anchors and whole else None


class Anchor:
    """Where the gradient of a posterior's divergence can go: to the nodes of draws from it.

    Arguments:
        groups: The parameters of each node, with the two outputs that take the gradient, and what
            the divergence can be computed from, if anything.
    """

    def __init__(self, groups: Sequence[tuple[_Group, Sequence[Tensor], _Moments]]) -> None:
        self.groups = groups
        self._parameters = [p for (_, m, v), _, _ in groups for p in (*m, *v)]
        self._state = self._look()

    def is_of(self, posterior: Posterior) -> bool:
        """Tells whether the posterior is the one that was drawn from, and has not changed since."""
        pairs = {id(p) for pair in posterior.values() for p in pair}
        return pairs == set(map(id, self._parameters)) and self._look() == self._state

    def _look(self) -> list[Any]:
        kinds = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        return [*_versions(self._parameters), *kinds]


class Latest:
    """The anchor of the latest draws of a model, which copies and pickles do without."""

    _anchor: Anchor | None = None

    def put(self, anchor: Anchor | None, originals: Mapping[str, Tensor]) -> None:
        """Keeps an anchor, while the base's own parameters stay what they are."""
        self._anchor, self._versions = anchor, _versions([*originals.values()])

    def take(self, originals: Mapping[str, Tensor]) -> Anchor | None:
        """Returns the anchor once, unless the base, whose storage the means share, has changed."""
        anchor, self._anchor = self._anchor, None
        return anchor if anchor and self._versions == _versions([*originals.values()]) else None

    def __reduce__(self) -> tuple[type[Latest], tuple[()]]:
        return Latest, ()


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
    if anchor and not transformed() and anchor.is_of(posterior):
        terms += [_anchored(prior_var, *group) for group in anchor.groups]
    else:
        for _, means, logvars in _groups(posterior):
            if _by_formula(means):
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


def kl_divergences(posterior: Posterior, prior_var: float) -> dict[str, Tensor]:
    r"""Returns :math:`D_{KL}(q \| p)` of each parameter by name, see :func:`kl_divergence`."""
    found: dict[str, Tensor] = {}
    for names, means, logvars in _groups(posterior):
        if _by_formula(means):
            pairs = zip(means, logvars, strict=True)
            terms: Any = [gaussian.kl_divergence(*pair, prior_var) for pair in pairs]
        else:
            each = tuple(slice(i, i + 1) for i in range(len(names)))
            terms = _Divergences.apply(prior_var, each, *means, *logvars).unbind()
        found.update(zip(names, terms, strict=True))
    return found


def _groups(posterior: Posterior) -> Iterator[_Group]:
    """The names, means and log-variances of parameters that can be computed on together."""
    groups: dict[Any, list[str]] = {}
    for name, (mean, logvar) in posterior.items():
        dense = mean.is_contiguous() and logvar.is_contiguous()
        groups.setdefault((mean.dtype, mean.device, dense), []).append(name)
    for names in groups.values():
        means, logvars = zip(*(posterior[name] for name in names), strict=True)
        yield names, means, logvars


def _by_formula(means: Sequence[Tensor]) -> bool:
    mean = means[0]
    return transformed() or mean.dtype.itemsize < 4 or not mean.is_contiguous()


def _noise(means: Sequence[Tensor]) -> list[Tensor]:
    """Standard normal noise for several tensors, from one call of the generator."""
    sizes = [mean.numel() for mean in means]
    flat = torch.randn(sum(sizes), dtype=means[0].dtype, device=means[0].device)
    return [part.view(m.shape) for part, m in zip(flat.split(sizes), means, strict=True)]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # what was made in inference mode has no version
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class _Outputs(torch.autograd.Function):
    """Draws of several parameters or the like, and the two numbers that are an anchor.

    Its inputs are all μ and then all log σ². The gradient of the anchor says what a divergence adds
    to theirs, see :func:`~pyro_bayes.slopes.slopes`.
    """

    @staticmethod
    def forward(
        ctx: Any, kind: Kind, noise: list[Tensor] | None, moments: _Moments, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        means, logvars = parameters[:count], parameters[count:]
        outputs: list[Tensor] = []
        spreads = []
        slices = parts(means)
        trains = any(ctx.needs_input_grad)
        apart = kind == "draws" and trains
        # Other devices would have to be waited for.
        counts = trains and noise is None and means[0].device.type == "cpu"
        memory = room(means, slices, 2 if apart else 1)
        for part in slices:
            mean, logvar = gather(means[part]), gather(logvars[part])
            output, *kept = next(memory)
            spread = kept[0] if apart else output
            epsilon = spread if noise is None else torch.empty_like(mean)
            for m, v, e, s, o in blocks(mean, logvar, epsilon, spread, output):
                if kind == "variances":
                    torch.exp(v, out=s)
                    variance = s.sum() if counts else None
                else:
                    e.normal_()
                    scale = torch.mul(v, 0.5).exp_()
                    torch.mul(e, scale, out=s)
                    if kind == "draws":
                        torch.add(m, s, out=o)
                    variance = torch.dot(scale, scale) if counts else None
                if variance is not None:  # while the block is at hand
                    squares = float(torch.dot(m, m))
                    largest = float(v.amax()) if len(v) else -math.inf
                    moments.append((len(v), squares, float(variance), float(v.sum()), largest))
            outputs += scatter(output, means[part])
            spreads.append(spread)
            if noise is not None:
                noise += scatter(epsilon, means[part])
        # Elsewhere, all parameters are one part, of which a copy would be large.
        small = count > 1 and len(slices) == 1 and means[0].device.type == "cpu"
        ctx.flat = (mean, logvar) if small else None
        ctx.kind, ctx.moments = kind, moments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*spreads)
        # The gradient of a divergence may come alone, and must leave what that of outputs needs.
        ctx.parameters, ctx.versions, ctx.spreads = parameters, _versions(parameters), spreads
        return *outputs, means[0].new_zeros(()), means[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *of_outputs, by, less = grads
        if _versions(ctx.parameters) != ctx.versions:
            raise RuntimeError(
                "Expected the posterior's parameters to be those that the weights were drawn with;"
                " got others, changed in place. Call backward() before optimizer.step()."
            )
        # Some optimisers change parameters without a trace, and steps come after this.
        known, ctx.flat = ctx.flat, None
        ctx.moments.clear()
        slices = parts(ctx.parameters[: len(of_outputs)])
        spreads: Sequence[Tensor] = ()
        if any(grad is not None for grad in of_outputs):
            spreads = ctx.spreads or ctx.saved_tensors
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                ctx.spreads = None
        if not spreads and by is None:
            return (None,) * len(ctx.needs_input_grad)
        factors = [None if by is None else (by, less)] * len(slices)
        found = slopes(ctx.parameters, slices, factors, ctx.kind, of_outputs, spreads, known)
        # What no output depends on that was used gets none, as if each had a node of its own.
        unused = [by is None and grad is None for grad in of_outputs]
        alone = [by is None and (ctx.kind != "draws" or grad is None) for grad in of_outputs]
        kept = (None if u else s for u, s in zip(alone + unused, found, strict=True))
        return None, None, None, *kept


class _Divergences(torch.autograd.Function):
    """The divergences of parts of the parameters; its inputs are all μ and then all log σ²."""

    @staticmethod
    def forward(ctx: Any, prior_var: float, slices: Sequence[slice], *parameters: Tensor) -> Tensor:
        ctx.prior_var, ctx.slices = prior_var, slices
        ctx.save_for_backward(*parameters)
        totals = _divergences(parameters, prior_var, slices)
        return (
            parameters[0].new_tensor(totals)
            if isinstance(totals[0], float)
            else torch.stack(totals)
        )

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        factors = zip((grad / ctx.prior_var).unbind(), (-0.5 * grad).unbind(), strict=True)
        return None, None, *slopes(ctx.saved_tensors, ctx.slices, list(factors))


def _anchored(
    prior_var: float, group: _Group, anchor: Sequence[Tensor], moments: _Moments
) -> Tensor:
    """The divergence of a group, whose gradient goes to an anchor: two zeros."""
    _, means, logvars = group
    total: Any = _divergence_by_moments(moments, prior_var)
    if total is None:
        with torch.no_grad():
            total = sum(_divergences((*means, *logvars), prior_var, parts(means)))
    by, less = anchor
    return by.mul(1 / prior_var).sub(less, alpha=0.5).add(total)


def _divergence_by_moments(moments: _Moments, prior_var: float) -> float | None:
    """The divergence, if moments give it to as many digits as the elements do."""
    shift, total = math.log(prior_var), 0.0
    for size, squares, variances, logvars, largest in tuple(moments):
        # Single precision loses up to 1e-4 of a sum of squares. It must be small beside the rest.
        if not largest - shift < -4:
            return None
        total += (squares + variances) / prior_var - size - (logvars - size * shift)
    return 0.5 * total if moments else None


def _divergences(
    parameters: Sequence[Tensor], prior_var: float, slices: Sequence[slice]
) -> list[Any]:
    """The divergences of parts of the parameters, numbers on a CPU and tensors elsewhere."""
    count = len(parameters) // 2
    means, logvars = parameters[:count], parameters[count:]
    cpu = means[0].device.type == "cpu"
    number: Any = float if cpu else _itself  # other devices would have to be waited for
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


def _itself(value: Any) -> Any:
    return value
