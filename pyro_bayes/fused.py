"""Draws and divergences of all parameters at once, in few passes over memory.

Each is one node of the autograd graph, with its gradient in closed form. Second derivatives,
`torch.func` transforms and `torch.compile` go through the formulas for one parameter.

The list operations `torch._foreach_*` are not part of torch's public interface, but its optimisers
rest on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes import gaussian

Posterior = Mapping[str, tuple[Tensor, Tensor]]


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
    return {name: draw for name, (draw, _) in draws_and_noise(posterior).items()}


def draws_and_noise(posterior: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Returns draws with their noise :math:`\epsilon`, see :func:`draws`."""
    found: dict[str, Any] = dict.fromkeys(posterior)  # in the parameters' order
    for names in _groups(posterior):
        means, logvars = zip(*(posterior[name] for name in names), strict=True)
        epsilons = _noise(means)
        if _by_formula():
            drawn = tuple(map(gaussian.draw, means, logvars, epsilons))
        else:
            drawn = _Draws.apply(*epsilons, *means, *logvars)
        found.update(zip(names, zip(drawn, epsilons, strict=True), strict=True))
    return found


def kl_divergence(posterior: Posterior, prior_var: float) -> Tensor:
    r"""Returns :math:`D_{KL}(q \| p)`, summed over all parameters.

    Arguments:
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.
        prior_var: The variance :math:`\sigma_p^2 > 0` of the prior.

    Returns:
        A 0-dim tensor, in nats.

    Example:
        >>> kl_divergence({"w": (torch.ones(3), torch.zeros(3))}, prior_var=0.5)
        tensor(3.4603)
    """
    terms = [term.sum() for _, term in _divergences(posterior, prior_var)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    dtypes = {mean.dtype for mean, _ in posterior.values()}
    kl: Tensor = total.to(dtypes.pop()) if len(dtypes) == 1 else total
    return kl


def kl_divergences(posterior: Posterior, prior_var: float) -> dict[str, Tensor]:
    r"""Returns :math:`D_{KL}(q \| p)` of each parameter by name, see :func:`kl_divergence`."""
    found: dict[str, Tensor] = {}
    for names, terms in _divergences(posterior, prior_var):
        found.update(zip(names, terms.unbind(), strict=True))
    return found


def _divergences(posterior: Posterior, prior_var: float) -> Iterator[tuple[list[str], Tensor]]:
    """The names of each group of parameters with a vector of their divergences."""
    for names in _groups(posterior):
        means, logvars = zip(*(posterior[name] for name in names), strict=True)
        if _by_formula() or means[0].dtype.itemsize < 4:
            terms = [gaussian.kl_divergence(*posterior[name], prior_var) for name in names]
            yield names, torch.stack(terms)
        else:
            yield names, _Divergences.apply(prior_var, *means, *logvars)


def _by_formula() -> bool:
    compiling = torch.compiler.is_compiling()
    return compiling or torch._C._functorch.maybe_current_level() is not None


def _groups(posterior: Posterior) -> Iterable[list[str]]:
    """The names of parameters of one dtype on one device."""
    groups: dict[Any, list[str]] = {}
    for name, (mean, _) in posterior.items():
        groups.setdefault((mean.dtype, mean.device), []).append(name)
    return groups.values()


def _noise(means: Sequence[Tensor]) -> list[Tensor]:
    """Standard normal noise for several tensors, from one call of the generator."""
    sizes = [mean.numel() for mean in means]
    flat = torch.randn(sum(sizes), dtype=means[0].dtype, device=means[0].device)
    return [part.view(m.shape) for part, m in zip(flat.split(sizes), means, strict=True)]


class _Draws(torch.autograd.Function):
    """The draws of several parameters; its inputs are ε, μ and log σ² of each, kind by kind."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(inputs) // 3
        epsilons, means, logvars = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
        changes = torch._foreach_mul(logvars, 0.5)
        torch._foreach_exp_(changes)
        torch._foreach_mul_(changes, epsilons)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*changes, *logvars)
        return tuple(torch._foreach_add(means, changes))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        count = len(grads)
        changes, logvars = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        of_logvars: list[Tensor | None] = [None] * count
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if torch.is_grad_enabled():
            for i in used:  # the change as a function of log σ², for a second derivative
                change = changes[i] * (0.5 * (logvars[i] - logvars[i].detach())).exp()
                of_logvars[i] = 0.5 * grads[i] * change
        elif used:
            products = torch._foreach_mul([grads[i] for i in used], [changes[i] for i in used])
            torch._foreach_mul_(products, 0.5)
            for i, product in zip(used, products, strict=True):
                of_logvars[i] = product
        return *[None] * count, *grads, *of_logvars


class _Divergences(torch.autograd.Function):
    """The divergences of several parameters; its inputs are σ²_p, and μ and log σ² of each."""

    @staticmethod
    def forward(ctx: Any, prior_var: float, *parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        means, logvars = parameters[:count], parameters[count:]
        ratios = torch._foreach_sub(logvars, math.log(prior_var))
        excesses = torch._foreach_expm1(ratios)
        ctx.prior_var = prior_var
        ctx.save_for_backward(*parameters, *excesses)
        variances = torch.stack([term.sum() for term in torch._foreach_sub(excesses, ratios)])
        squares = torch.stack(torch._foreach_norm(means)).square()
        return 0.5 * (variances + squares / prior_var)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 3
        means, logvars, excesses = (
            ctx.saved_tensors[i * count : (i + 1) * count] for i in range(3)
        )
        grads = (0.5 * grad).unbind()
        if torch.is_grad_enabled():
            shift, factor = math.log(ctx.prior_var), 2 / ctx.prior_var
            of_means = [factor * g * mean for g, mean in zip(grads, means, strict=True)]
            of_logvars = [g * (v - shift).expm1() for g, v in zip(grads, logvars, strict=True)]
            return None, *of_means, *of_logvars
        scaled = torch._foreach_mul(means, (grad / ctx.prior_var).unbind())
        return None, *scaled, *torch._foreach_mul(excesses, grads)
