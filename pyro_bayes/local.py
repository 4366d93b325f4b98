"""Local noise: Gaussian tensors that reach an operator before they are drawn.

A :class:`GaussianTensor` stands in a parameter's place. An operator with a rule in :data:`RULES`
computes the mean and variance of its output and draws that. Any other operator gets one ordinary
draw of the tensor, the same one for as long as the context is open.

To add a rule, write one function of the operator's own signature that returns the output, or
`NotImplemented` for arguments it does not cover, and put it under the operator's name with
:func:`rule`. The helpers :func:`mean_of` and :func:`variance_of` read either kind of tensor, and
:func:`noisy` draws an output from its mean and variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_bayes import gaussian

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What each operator does with Gaussian tensors, by the function that torch reports."""


class LocalNoise:
    """The noise of one context: every output keeps its noise until the context closes.

    Rows are drawn in order and kept, so that the first rows of a larger batch meet the noise
    that a smaller batch met.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, source: tuple[str, ...], like: Tensor) -> Tensor:
        """Returns standard normal noise.

        Arguments:
            source: What the noise belongs to: the operator and its Gaussian parameters.
            like: A tensor of the wanted shape, dtype and device; the last dimension holds features.
        """
        features = like.shape[-1:]
        count = math.prod(like.shape[:-1])
        key = (source, features, like.dtype, like.device)
        rows = self._kept.get(key)
        if rows is None:
            rows = like.new_empty((0, *features))
        if len(rows) < count:
            more = torch.randn((count - len(rows), *features), dtype=like.dtype, device=like.device)
            rows = self._kept[key] = torch.cat((rows, more)) if len(rows) else more
        return rows[:count].view(like.shape)

    def of_parameter(self, name: str, like: Tensor) -> Tensor:
        """Returns the standard normal noise of a parameter's one draw.

        Arguments:
            name: The name of the parameter.
            like: A tensor of its shape, dtype and device.
        """
        key = (name, like.shape, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = torch.randn_like(like)
        return self._kept[key]


class _Once:
    """A tensor that is computed when it is first needed, and again if it then had no gradient."""

    def __init__(self, compute: Callable[[], Tensor], source: Tensor) -> None:
        self._compute, self._source = compute, source
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        wanted = torch.is_grad_enabled() and self._source.requires_grad
        if self._value is None or (wanted and not self._value.requires_grad):
            self._value = self._compute()
        return self._value


class GaussianTensor(torch.Tensor):
    r"""A tensor of independent Gaussian elements, :math:`\mathcal{N}(\mu, \sigma^2)`.

    It has no values of its own. Its shape, dtype and device are those of the mean.

    Arguments:
        mean: The means :math:`\mu`.
        variance: Returns the variances :math:`\sigma^2`, of the same shape.
        sample: Returns one ordinary draw, the same at each call.
        name: The name of the parameter it comes from.
        noise: The noise of the context.
    """

    def __new__(
        cls,
        mean: Tensor,
        variance: Callable[[], Tensor],
        sample: Callable[[], Tensor],
        name: str,
        noise: LocalNoise,
    ) -> GaussianTensor:
        # A wrapper without storage: an operator that went around the rules would fail, not use the
        # mean without a word.
        return torch.Tensor._make_wrapper_subclass(
            cls, mean.shape, strides=mean.stride(), dtype=mean.dtype, device=mean.device
        )

    def __init__(
        self,
        mean: Tensor,
        variance: Callable[[], Tensor],
        sample: Callable[[], Tensor],
        name: str,
        noise: LocalNoise,
    ) -> None:
        self._mean, self._name, self._noise = mean, name, noise
        self._get_variance, self._get_sample = _Once(variance, mean), _Once(sample, mean)

    @classmethod
    def of(cls, mean: Tensor, logvar: Tensor, name: str, noise: LocalNoise) -> GaussianTensor:
        r"""Makes the Gaussian tensor of a posterior with :math:`\mu` and :math:`\log \sigma^2`."""

        def sample() -> Tensor:
            return gaussian.draw(mean, logvar, noise.of_parameter(name, mean))

        return cls(mean, lambda: logvar.exp(), sample, name, noise)

    def times(self, factor: Tensor | float) -> GaussianTensor:
        """Returns the product with a constant."""
        return GaussianTensor(
            self._mean * factor,
            lambda: variance_of(self) * factor * factor,
            lambda: drawn(self) * factor,
            self._name,
            self._noise,
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GaussianTensor({self._name!r}, shape={tuple(self._mean.shape)})"

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            out = RULES[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        to_plain = mean_of if func in _METADATA else drawn
        return func(*tree_map(to_plain, args), **tree_map(to_plain, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Below autograd, a draw would cut the gradient.
        raise RuntimeError(
            f"Expected an operator that torch reports to tensor subclasses; got {func}, called from"
            " where local noise cannot reach. Use reparameterize(local_trick=False), or exclude the"
            " parameters that it uses."
        )


def _metadata() -> set[Callable[..., Any]]:
    attributes = (
        "device dtype is_cpu is_cuda is_leaf is_meta is_mps is_nested is_quantized is_sparse"
        " is_sparse_csr is_xpu itemsize layout nbytes ndim requires_grad shape"
    )
    methods = (
        "__len__ dim element_size get_device is_complex is_contiguous is_floating_point is_signed"
        " ndimension nelement numel size stride"
    )
    found: set[Callable[..., Any]] = {
        getattr(Tensor, a).__get__ for a in attributes.split() if hasattr(Tensor, a)
    }
    found |= {getattr(Tensor, m) for m in methods.split()}
    return found | {torch.numel, torch.is_floating_point, torch.is_complex}


_METADATA = _metadata()


def mean_of(value: Any) -> Any:
    """Returns the mean of a Gaussian tensor, and anything else as it is."""
    return value._mean if isinstance(value, GaussianTensor) else value


def variance_of(value: GaussianTensor) -> Tensor:
    """Returns the variance of a Gaussian tensor."""
    return value._get_variance()


def drawn(value: Any) -> Any:
    """Returns the one draw of a Gaussian tensor in this context, and anything else as it is."""
    return value._get_sample() if isinstance(value, GaussianTensor) else value


def noisy(operator: str, mean: Tensor, variance: Tensor, *sources: Any) -> Tensor:
    r"""Draws an operator's output, :math:`m + \sqrt{v} \epsilon`, with the context's noise.

    Arguments:
        operator: The name of the operator.
        mean: The mean :math:`m` of the output.
        variance: The variance :math:`v` of the output, of the same shape.
        sources: The operator's arguments that may be Gaussian tensors.

    References:
        | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)
        | https://arxiv.org/abs/1506.02557
    """
    gaussians = [s for s in sources if isinstance(s, GaussianTensor)]
    with _wide(mean) as wide:
        # The gradient of a square root is infinite at zero, where the variance's own is zero: the
        # smallest normal number makes their product zero instead of NaN.
        variance = wide(variance)
        scale = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt().to(mean.dtype)
    epsilon = gaussians[0]._noise((operator, *(g._name for g in gaussians)), mean)
    return torch.addcmul(mean, scale, epsilon)


@contextmanager
def _wide(output: Tensor) -> Iterator[Callable[[Any], Any]]:
    """Yields a conversion to the precision of variances: single, where half would overflow."""
    if output.dtype != torch.float16:
        yield lambda value: value
    else:
        with torch.autocast(output.device.type, enabled=False):
            yield lambda value: None if value is None else value.float()


def rule(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what operators do with Gaussian tensors.

    Arguments:
        functions: Every function under which torch may report the operator.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return register


@rule(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    input = drawn(input)
    mean = F.linear(input, mean_of(weight), mean_of(bias))
    if isinstance(weight, GaussianTensor):
        bias_variance = variance_of(bias) if isinstance(bias, GaussianTensor) else None
        with _wide(mean) as wide:
            squares, weight_variance = wide(input).square(), wide(variance_of(weight))
            variance = F.linear(squares, weight_variance, wide(bias_variance))
    elif isinstance(bias, GaussianTensor):
        variance = variance_of(bias).expand_as(mean)
    else:
        return F.linear(input, weight, bias)
    return noisy("linear", mean, variance, weight, bias)


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def _mul(input: Any, other: Any) -> Any:
    gaussian, factor = (input, other) if isinstance(input, GaussianTensor) else (other, input)
    if isinstance(factor, GaussianTensor):
        return NotImplemented
    if isinstance(factor, Tensor):
        # A mask keeps the shape. An activation times a parameter is an output, not a parameter.
        same = torch.broadcast_shapes(factor.shape, gaussian.shape) == gaussian.shape
        if not same or factor.requires_grad:
            return NotImplemented
    elif not isinstance(factor, (int, float)):
        return NotImplemented
    return gaussian.times(factor)
