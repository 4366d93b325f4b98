"""How an operator's output is drawn: with local noise, or by flipout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import is_any_autocast_enabled, is_transformed
from pyro_bayes.noise.flipout import elementwise_perturbation, perturbed, with_trailing
from pyro_bayes.noise.gaussian_tensor import (
    GaussianTensor,
    drawn,
    gaussians_in,
    mean_of,
    variance_of,
)
from pyro_bayes.noise.local import AddNoise, LinearOperator, LocalNoise


def draw_linear(
    operator: LinearOperator,
    inputs: Sequence[Any],
    weight: Any,
    bias: Any = None,
    *,
    example: int | None,
) -> Any:
    r"""Draws the output of an operator that is linear in its weight and its bias.

    With local noise, its elements are Gaussian with

    .. math:: m = f(x, \mu_w, \mu_b), \qquad v = f(x^2, \sigma_w^2, \sigma_b^2).

    With flipout, example :math:`n` has the weight :math:`\mu + \Delta \odot s_n^{out} s_n^{in}`,
    where :math:`\Delta = \sigma \epsilon` is the same for all examples, and hence the output

    .. math:: f(x_n, \mu_w, \mu_b) + s_n^{out} \odot f(s_n^{in} \odot x_n, \Delta_w, \Delta_b).

    A bias that has signs of its own already, or whose elements are no dimension of the weight,
    has :math:`s_n^b \odot \Delta_b` instead.

    Arguments:
        operator: The operator :math:`f`.
        inputs: What the weight is multiplied by.
        weight: The weight, a Gaussian tensor or not.
        bias: The bias, likewise, or `None`.
        example: The dimension of inputs and output that counts examples, if there is one.

    Returns:
        The output, or `NotImplemented` if an input is sparse.

    References:
        | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)
        | https://arxiv.org/abs/1506.02557

        | Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches
          (Wen et al., 2018)
        | https://arxiv.org/abs/1803.04386
    """
    inputs = [handed(operator.name, x) for x in inputs]
    if any([x.layout is not torch.strided for x in inputs]):
        return NotImplemented
    weight, bias = as_usable(operator.name, weight), as_usable(operator.name, bias)
    sources = gaussians_in((weight, bias))
    if not sources:
        return operator.apply(*inputs, weight, bias)
    noise, means = sources[0].noise, (mean_of(weight), mean_of(bias))
    source = (operator.name, *[s.key for s in sources])
    if noise.watched:
        noise.met(source, [s.parameter for s in sources], inputs)
    count = None if source in noise.shared else noise.example_rows(inputs[0], example)
    if count is None:
        return operator.apply(*inputs, *[handed(operator.name, v) for v in (weight, bias)])
    _note(sources)
    if noise.estimator == "flipout":
        mean = operator.apply(*inputs, *means)
        return perturbed(operator, inputs, weight, bias, mean, example, count).to(mean.dtype)
    if operator.gradients is not None and sources[0] is weight and _is_plain(inputs[0], means[0]):
        variances = variance_of(weight), variance_of(bias) if len(sources) == 2 else None
        return LocalNoise.apply(operator, noise, source, example, inputs[0], *means, *variances)
    mean = operator.apply(*inputs, *means)
    variance = _variance(operator, inputs, weight, bias, mean)
    return _with_noise(mean, variance, noise.normal(source, mean, example))


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether an output with local noise can be one node of the autograd graph."""
    if x.dtype is not weight.dtype or x.dtype.itemsize < 4:
        return False
    return not (is_transformed() or is_any_autocast_enabled())


def _variance(
    operator: LinearOperator, inputs: Sequence[Tensor], weight: Any, bias: Any, mean: Tensor
) -> Tensor:
    """Returns the variance of an output with local noise."""
    bias_variance = variance_of(bias) if isinstance(bias, GaussianTensor) else None
    if not isinstance(weight, GaussianTensor):
        return with_trailing(variance_of(bias), -operator.channel - 1).expand_as(mean)
    with wide(mean) as convert:
        squares = [convert(x).square() for x in inputs]
        return operator.apply(*squares, convert(variance_of(weight)), convert(bias_variance))


def noisy(
    operator: str,
    mean: Tensor,
    sources: Sequence[GaussianTensor],
    *,
    inputs: Sequence[Tensor],
    variance: Callable[[], Tensor],
    perturbation: Callable[[int | None], Tensor],
    example: int | None,
) -> Tensor:
    r"""Draws an operator's output as the context's estimator has it.

    That is :math:`m + \sqrt{v} \epsilon` with local noise, and :math:`m + \Delta` with flipout.

    Arguments:
        operator: The name of the operator.
        mean: The mean :math:`m` of the output.
        sources: The Gaussian tensors that the output depends on.
        inputs: What else it depends on.
        variance: Returns the variance :math:`v` of the output, of the same shape.
        perturbation: Returns each row's deviation :math:`\Delta` from the mean under the signs of
            its example, for a number of rows, or without signs for `None`.
        example: The dimension of the output that counts examples, if there is one.
    """
    noise = sources[0].noise
    source = (operator, *[s.key for s in sources])
    if noise.watched:
        noise.met(source, [s.parameter for s in sources], inputs)
    count = None if source in noise.shared else noise.example_rows(mean, example)
    if count is None:
        for each in sources:
            handed(operator, each)
    else:
        _note(sources)
    if count is None or noise.estimator == "flipout":
        return mean + perturbation(count).to(mean.dtype)
    return _with_noise(mean, variance(), noise.normal(source, mean, example))


def _with_noise(mean: Tensor, variance: Tensor, epsilon: Tensor) -> Tensor:
    if is_transformed() or variance.dtype != mean.dtype:
        # The gradient of a square root is infinite at zero, where the variance's own is zero: the
        # smallest normal number makes their product zero instead of NaN.
        scale = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt().to(mean.dtype)
        return torch.addcmul(mean, scale, epsilon)
    return AddNoise.apply(mean, variance, epsilon)[0]  # type: ignore[no-any-return]


def _note(sources: Sequence[GaussianTensor]) -> None:
    noise = sources[0].noise
    for source in sources:
        noise.ruled.add(source.parameter)
    if noise.uses is not None:
        for source in sources:
            noise.note(source.parameter, noise.estimator)


def as_usable(operator: str, value: Any) -> Any:
    """Returns a tensor that the estimator can use: its one draw if there is no other way.

    That is so for copies of one number, which are not independent, and where flipout lost its
    signs.
    """
    if not isinstance(value, GaussianTensor):
        return value
    lost = value.noise.estimator == "flipout" and value.axes is None
    return handed(operator, value) if lost or value.original is not None else value


def handed(operator: str, value: Any) -> Any:
    """Returns the one draw of a Gaussian tensor for an operator, and anything else as it is.

    What the operator returns is made of the draw from now on.
    """
    if not isinstance(value, GaussianTensor):
        return value
    value.noise.note(value.parameter, f"one draw ({operator})")
    value.noise.handed.add(value.parameter)
    return drawn(value)


def spread(
    operator: str, value: Any, term: Tensor, example: int | None, inputs: Sequence[Tensor] = ()
) -> Tensor:
    """Draws the sum of a tensor of the output's shape and one that is broadcast to it.

    Arguments:
        operator: The name of the operator.
        value: What is broadcast, a Gaussian tensor or not.
        term: The tensor of the output's shape.
        example: The dimension of the output that counts examples, if there is one.
        inputs: What the examples are known by, the term by default.
    """
    value = as_usable(operator, value)
    mean: Tensor = term + mean_of(value)
    if not isinstance(value, GaussianTensor):
        return mean
    return noisy(
        operator,
        mean,
        [value],
        inputs=inputs or [term],
        variance=lambda: variance_of(value).expand_as(mean),
        perturbation=lambda count: elementwise_perturbation(value, mean, example, count),
        example=example,
    )


def example_dim(sources: Sequence[Any], like: Any, leading: int) -> int | None:
    """Returns which of a tensor's leading dimensions counts examples, if it has any.

    Arguments:
        sources: The operator's arguments that may be Gaussian tensors.
        like: The tensor.
        leading: The number of its dimensions to the left of the features.
    """
    gaussians = gaussians_in(sources)
    if leading < 1 or not gaussians:
        return None
    noise = gaussians[0].noise
    dim, size = min(noise.batch_dim, leading - 1), noise.batch_size
    if size is None or size == 1 or like.shape[dim] == size:
        return dim
    # Other dimensions may come first, as those of a flow's samples.
    alike = [d for d in range(leading) if like.shape[d] == size]
    return alike[0] if len(alike) == 1 else dim


def aligned(value: Any) -> dict[int, int]:
    """Returns each dimension of an elementwise weight, with the one of the output that it is."""
    dims = 0 if value is None else mean_of(value).dim()
    return {d: d - dims for d in range(dims)}


@contextmanager
def wide(output: Tensor) -> Iterator[Callable[[Any], Any]]:
    """Yields a conversion to the precision of variances: single, where half would overflow.

    Under autocast, bfloat16 stays: it has the range of single precision.
    """
    cast = output.dtype == torch.bfloat16 and is_any_autocast_enabled()
    if cast or output.dtype.itemsize >= 4:
        yield lambda value: value
    else:
        with torch.autocast(output.device.type, enabled=False):
            yield lambda value: None if value is None else value.float()
