"""One of several classes."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_bayes.likelihoods.likelihood import Likelihood


class Categorical(Likelihood):
    r"""Labels of one of :math:`C` classes, whose logits are the output.

    .. math:: p(y \mid f) = \prod_{k : y_k \ne i} \frac{e^{f_{k, y_k}}}{\sum_c e^{f_{k, c}}}

    The classes are the last dimension of the output, :math:`(B, *, C)`, and the target holds
    integers from 0 to :math:`C - 1`, of shape :math:`(B, *)`. Networks for images that have the
    classes second need `output.movedim(1, -1)`.

    Elements without a label, such as the padding of sentences, hold the number :math:`i`. They are
    not observed: they have the log-probability 0. An example stays one example, however many of its
    elements have a label, so that :math:`N` and the mean over a batch count all examples, also
    those without any label. Unlike PyTorch's loss, there is no such number by default.

    Arguments:
        ignore_index: The number :math:`i` that stands for no label, -100 in many libraries. By
            default, each element has a label.
        weight: There are no class weights, since what they make of a likelihood is not one: it does
            not say how probable a label is. Only `None` is taken.

    Raises:
        TypeError: If `ignore_index` is not an integer.
        ValueError: If there are class weights.

    Example:
        >>> Categorical().log_prob(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])
        >>> tokens = torch.tensor([[0, 3, 1], [2, -100, -100]])  # B = 2 sentences
        >>> Categorical(ignore_index=-100).log_prob(torch.zeros(2, 3, 4), tokens)
        tensor([-4.1589, -1.3863])
    """

    def __init__(self, *, ignore_index: int | None = None, weight: None = None) -> None:
        super().__init__()
        if ignore_index is not None and type(ignore_index) is not int:
            raise TypeError(
                "Expected ignore_index to be the integer that stands for no label, such as -100, or"
                f" None; got {ignore_index!r}."
            )
        if weight is not None:
            raise ValueError(
                "Expected no class weights; got some. A weighted log-probability is not one, and"
                " its posterior and predictions mean nothing. Weigh the costs of errors where you"
                " decide, by `predictive.probs`; for classes that are rarer than where you predict,"
                " add the logarithms of the ratios of frequencies to the logits there."
            )
        self.ignore_index = ignore_index

    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        logits = self.as_real(output, batch_dims)
        if logits.dim() == batch_dims or logits.shape[-1] < 2:
            raise ValueError(
                "Expected an output for Categorical whose last dimension holds the logits of two"
                f" or more classes; got the shape {tuple(logits.shape)}. One logit for 0 or 1 is"
                " for Bernoulli()."
            )
        labels = dist.Categorical(logits=logits, validate_args=False)
        if self.ignore_index is not None:
            labels = _Partial(logits=logits, validate_args=False)
            labels.ignore_index = self.ignore_index
        return self.per_example(labels, batch_dims)

    def extra_repr(self) -> str:
        return "" if self.ignore_index is None else f"ignore_index={self.ignore_index}"


class _Partial(dist.Categorical):
    """The categorical distribution, of which a number stands for a label that is not observed."""

    ignore_index: int = -100

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _Labels(self._num_events, self.ignore_index)

    def log_prob(self, value: Tensor) -> Tensor:
        ignored = value.eq(self.ignore_index)
        log_prob: Tensor = super().log_prob(value.masked_fill(ignored, 0))
        return log_prob.masked_fill(ignored, 0.0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Partial:
        new: _Partial = super().expand(torch.Size(batch_shape), _instance)
        new.ignore_index = self.ignore_index
        return new


class _Labels(constraints.integer_interval):
    """The labels of some number of classes, and one number beside."""

    def __init__(self, classes: int, ignored: int) -> None:
        super().__init__(0, classes - 1)
        self.ignored = ignored

    def check(self, value: Tensor) -> Tensor:
        inside: Tensor = super().check(value)
        return inside | (value == self.ignored)
