"""Gaussian tensors, which reach an operator before they are drawn, and its rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import (
    is_transformed,
    tree_leaves,
    tree_map,
    without_torch_function,
    wrapper_subclass,
)
from pyro_bayes.noise.context import ContextNoise
from pyro_bayes.noise.metadata import METADATA
from pyro_bayes.posterior import gaussian
from pyro_bayes.posterior.rounding import keeping_precision

_HERE = nullcontext()  # an interrupt may skip the exit of the innermost context, and of no other

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What each operator does with Gaussian tensors, by the function that torch reports."""


def rule(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what operators do with Gaussian tensors.

    Arguments:
        functions: Every function under which torch may report the operator.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return register


Moment: TypeAlias = Literal["variance", "draw", "perturbation"]
r"""The variances :math:`\sigma^2`, one ordinary draw, the same at each call, and that draw less the
mean, :math:`\sigma \epsilon`."""


class Axis(NamedTuple):
    """Along one dimension of a tensor, which signs of its parameter flipout takes.

    Arguments:
        source: The parameter and its dimension, once for each factor of the signs.
        size: The length of that dimension, likewise.
        lines: Which of the signs, in order; `None` for all.
    """

    source: tuple[tuple[str, ...], ...]
    size: tuple[int, ...]
    lines: tuple[Tensor | None, ...]


class GaussianTensor(torch.Tensor):
    r"""A tensor of independent Gaussian elements, :math:`\mathcal{N}(\mu, \sigma^2)`.

    It has no values of its own. Its shape, dtype and device are those of the mean. An operator with
    a rule in :data:`RULES` makes the output's noise from the mean and variance. Any other operator
    gets one ordinary draw of the tensor, the same for as long as the context is open.

    Arguments:
        mean: The means :math:`\mu`.
        moments: Those of its moments that were computed before: `"variance"`, `"draw"` and
            `"perturbation"`, which is the draw less the mean.
        make: Computes a moment when it is first needed; by default, from the posterior.
        parameter: The name of the parameter it comes from.
        key: What tells it from other tensors that come from the same parameter.
        axes: The signs that flipout takes along each dimension, if any; `None` if they cannot be
            told by dimension any more. By default, those of the whole parameter.
        noise: The noise of the context.
        posterior: Returns :math:`\mu` and :math:`\log \sigma^2` of the whole parameter.

    Attributes:
        original: What it is an expansion of, in which no element is a copy of another.
    """

    original: GaussianTensor | None = None
    _is_its_draw = False

    def __new__(cls, mean: Tensor, *args: Any, **kwargs: Any) -> GaussianTensor:
        # A wrapper without storage: an operator that went around the rules would fail, not use the
        # mean without a word.
        return wrapper_subclass(cls, mean)  # type: ignore[no-any-return]

    def __init__(
        self,
        mean: Tensor,
        moments: dict[Moment, Tensor],
        make: Callable[[Moment], Tensor] | None = None,
        *,
        parameter: str,
        key: str,
        axes: tuple[Axis | None, ...] | None = None,
        noise: ContextNoise,
        posterior: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self._mean, self._moments, self._make, self._axes = mean, moments, make, axes
        self.parameter, self.key, self.noise, self._posterior = parameter, key, noise, posterior
        self._pair = posterior  # of this tensor, which may be several copies of the parameter

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        r""":math:`\mu` and :math:`\log \sigma^2` of the whole parameter."""
        return self._posterior()

    @classmethod
    def of(
        cls,
        mean: Tensor,
        logvar: Tensor,
        name: str,
        noise: ContextNoise,
        moments: dict[Moment, Tensor] | None = None,
    ) -> GaussianTensor:
        r"""Makes the Gaussian tensor of a posterior with :math:`\mu` and :math:`\log \sigma^2`.

        Arguments:
            mean: The means :math:`\mu`.
            logvar: The log-variances :math:`\log \sigma^2`.
            name: The name of the parameter.
            noise: The noise of the context.
            moments: Those of its moments that were computed before.
        """
        return cls(
            mean, moments or {}, parameter=name, key=name, noise=noise,
            posterior=lambda: (mean, logvar),
        )  # fmt: skip

    def moment(self, name: Moment) -> Tensor:
        """Returns a moment: once computed, the same, unless it had no gradient and needs one."""
        kept = self._moments.get(name)
        if kept is not None and (kept.requires_grad or not self._trains()):
            return kept
        if self._make is not None:
            value = self._make(name)
        else:  # it serves the whole context, not only the place where it is made
            with self.noise.outside():
                value = self._of_posterior(name, kept)
        if name != "perturbation" or kept is None:  # the draw has a graph of its own
            self._moments[name] = value
        return value

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.posterior)

    def _of_posterior(self, name: Moment, kept: Tensor | None) -> Tensor:
        mean, logvar = self._pair()
        # Each serves all losses of a context, whose backward passes may be several.
        if name == "variance":
            return gaussian.spread(logvar, logvar.detach().exp(), 1.0)
        if kept is not None:
            # It was made without a gradient, maybe in inference mode, and has one from now on.
            kept = kept.clone()
            if name == "perturbation":
                return gaussian.spread(logvar, kept, 0.5)
            deviation = (kept - mean).detach()
            moved = gaussian.spread(logvar, deviation, 0.5) - deviation
            return kept + (mean - mean.detach()) + moved
        if name == "draw" and "perturbation" in self._moments:
            return mean + self.moment("perturbation")
        epsilon = self.noise.of_parameter(self.parameter, mean)
        deviation = gaussian.spread(logvar, (0.5 * logvar.detach()).exp() * epsilon, 0.5)
        return deviation if name == "perturbation" else mean + deviation

    @property
    def axes(self) -> tuple[Axis | None, ...] | None:
        """The signs that flipout takes along each dimension."""
        if self._axes is None and self._make is None:
            self._axes = tuple(
                Axis(((self.parameter, str(dim)),), (size,), (None,)) if dim < 2 else None
                for dim, size in enumerate(self._mean.shape)
            )
        return self._axes

    def batched(self, shape: torch.Size) -> GaussianTensor:
        """Returns independent copies of the whole parameter, for several draws at a time.

        Arguments:
            shape: The parameter's shape, with dimensions for the copies on its left.
        """
        mean, logvar = (p.expand(shape) for p in self.posterior)
        copies = GaussianTensor.of(mean, logvar, self.parameter, self.noise)
        copies._posterior = self._posterior
        return copies

    def through(
        self, operator: Callable[[Tensor], Tensor], key: str, axes: tuple[Axis | None, ...] | None
    ) -> GaussianTensor:
        """Returns what an operator that only arranges or converts elements makes of the tensor."""
        mean, of = operator(self._mean), {"variance": keeping_precision(operator)}
        return self._derived(
            mean, lambda name: of.get(name, operator)(self.moment(name)), key, axes, operator
        )

    def times(self, factor: Tensor | float) -> GaussianTensor:
        """Returns the product with a constant of the same shape, or one that broadcasts to it."""

        def make(name: Moment) -> Tensor:
            product = self.moment(name) * factor
            return product * factor if name == "variance" else product

        key = f"{self.key}*{self.noise.token(self.key, factor)}"
        mean = self._mean * factor
        return self._derived(mean, make, key, self.axes, lambda x: x * factor)

    def plus(self, term: Tensor | float) -> GaussianTensor:
        """Returns the sum with a constant of the same shape, or one that broadcasts to it."""

        def make(name: Moment) -> Tensor:
            return self.moment(name) + term if name == "draw" else self.moment(name)

        self.noise.token(self.key, term)  # so that the term counts as a constant from now on
        return self._derived(self._mean + term, make, self.key, self.axes, lambda x: x + term)

    def _derived(
        self,
        mean: Tensor,
        make: Callable[[Moment], Tensor],
        key: str,
        axes: tuple[Axis | None, ...] | None,
        operator: Callable[[Tensor], Tensor],
    ) -> GaussianTensor:
        def new() -> GaussianTensor:
            return GaussianTensor(
                mean, {}, make, parameter=self.parameter, key=key, axes=axes, noise=self.noise,
                posterior=self._posterior,
            )  # fmt: skip

        if not torch.is_grad_enabled() or is_transformed() or not has_gradient(self):
            return new()
        derived: GaussianTensor = _Derived.apply(new, operator, self)
        return derived

    def signs(self, dim: int, count: int) -> Tensor | None:
        """Returns the signs of the examples of `count` rows along a dimension: `(count, size)`."""
        axis = (self.axes or ())[dim]
        if axis is None:
            return None
        product: Tensor | None = None
        for source, size, index in zip(*axis, strict=True):
            signs = self.noise.signs(source, count, size, self._mean)
            signs = signs if index is None else signs[:, index]
            product = signs if product is None else product * signs
        return product

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GaussianTensor({self.parameter!r}, shape={tuple(self._mean.shape)})"

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        apply_rule = RULES.get(func)
        if apply_rule is None:
            if func == _REQUIRES_GRAD:
                return _pin(args[0])
            if func in METADATA:
                if len(args) == 1 and not kwargs:
                    return func(args[0]._mean)
                return func(*tree_map(mean_of, args), **tree_map(mean_of, kwargs))
        gaussians = gaussians_in((*args, *kwargs.values()) if kwargs else args)
        if apply_rule is not None and not (gaussians and gaussians[0].noise.estimator == "weights"):
            if any([g.parameter in g.noise.pinned for g in gaussians]):
                return func(*tree_map(_unless_pinned, args), **tree_map(_unless_pinned, kwargs))
            output = apply_rule(*args, **kwargs)
            if output is not NotImplemented:
                return output
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, GaussianTensor):
                value.noise.note(value.parameter, f"one draw ({func.__name__})")
                value.noise.handed.add(value.parameter)
        changed = kwargs.get("out", args[0] if args and _is_in_place(func) else None)
        if isinstance(changed, GaussianTensor):
            # From now on, the draw is what was made of it.
            with torch.enable_grad():
                drawn(changed)
            changed.noise.pinned.add(changed.parameter)
        return func(*tree_map(drawn, args), **tree_map(drawn, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and _is_pinned(args[0]):
            return args[0]  # see `_pin`
        # Below autograd, a draw would cut the gradient.
        raise RuntimeError(
            f"Expected an operator that torch reports to tensor subclasses; got {func}, called from"
            " where local noise cannot reach. Use reparameterize(local_trick=False), or exclude the"
            " parameters that it uses."
        )


def mean_of(value: Any) -> Any:
    """Returns the mean of a Gaussian tensor, and anything else as it is."""
    return value._mean if isinstance(value, GaussianTensor) else value


def variance_of(value: GaussianTensor) -> Tensor:
    """Returns the variance of a Gaussian tensor."""
    return value.moment("variance")


def drawn(value: Any) -> Any:
    """Returns the one draw of a Gaussian tensor in this context, and anything else as it is."""
    return value.moment("draw") if isinstance(value, GaussianTensor) else value


def perturbation_of(value: GaussianTensor) -> Tensor:
    """Returns the perturbation of a Gaussian tensor: its one draw less its mean."""
    return value.moment("perturbation")


def gaussians_in(values: Iterable[Any]) -> list[GaussianTensor]:
    """Returns the Gaussian tensors among some values."""
    return [value for value in values if isinstance(value, GaussianTensor)]


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _pin(value: GaussianTensor) -> bool:
    """Returns whether the tensor requires a gradient, and lets its one draw stand for it if so.

    Whoever asks is about to differentiate with respect to the tensor itself, as flows do that hand
    their parameters to an :class:`torch.autograd.Function`. The wrapper has no values, so torch is
    told by a copy in place that its gradient is the draw's.
    """
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in value.posterior)
    if value.parameter in value.noise.ruled and value.parameter not in value.noise.pinned:
        return trains  # what a rule has used stays what it is, for a context is a function
    value.noise.pinned.add(value.parameter)
    value.noise.note(value.parameter, "one draw (requires_grad)")
    if not trains:
        return False
    sample = drawn(value)
    if not value._is_its_draw:
        value._is_its_draw = True
        with without_torch_function(), _HERE:
            value.copy_(sample)
    return True


def has_gradient(value: Tensor) -> bool:
    """Tells whether autograd knows a tensor, past all rules."""
    with without_torch_function(), _HERE:
        return value.requires_grad


class _Derived(torch.autograd.Function):
    """What a linear or affine operator makes of a Gaussian tensor, for autograd's eyes."""

    @staticmethod
    def forward(
        ctx: Any,
        new: Callable[[], GaussianTensor],
        operator: Callable[[Tensor], Tensor],
        value: GaussianTensor,
    ) -> GaussianTensor:
        ctx.operator, ctx.like = operator, mean_of(value).detach()
        return new()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            like = ctx.like.requires_grad_()
            output = ctx.operator(like)
        return None, None, torch.autograd.grad(output, like, grad)[0]


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    special = name in ("__setitem__", "__set__") or name.startswith("__i")
    return special or (name.endswith("_") and not name.endswith("__"))


def _is_pinned(value: Any) -> bool:
    return isinstance(value, GaussianTensor) and value.parameter in value.noise.pinned


def _unless_pinned(value: Any) -> Any:
    if not _is_pinned(value):
        return value
    value.noise.note(value.parameter, "one draw")
    return drawn(value)
