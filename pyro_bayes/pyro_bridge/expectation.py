"""Log-densities that are expectations: what may be done with them, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import without_torch_function

NO_WEIGHTS = (
    "Expected an ELBO that is a sum of log-densities, as Trace_ELBO, TraceMeanField_ELBO or"
    " TraceGraph_ELBO, for exact_kl(), whose sites are whole distributions and have no densities of"
    " draws; got an estimator that computes importance weights{}. Use `bnn.guide`."
)
"""Why importance weights are refused; the gap is for the function that asked."""

_NONLINEAR = {
    getattr(place, name)
    for place in (torch, Tensor)
    for name in (
        *("exp", "exp_", "expm1", "exp2", "logsumexp", "logaddexp", "softmax", "log_softmax"),
        *("sigmoid", "argsort", "sort", "topk", "max", "amax", "argmax", "cumsum", "logcumsumexp"),
    )
    if hasattr(place, name)
}


_DIFFERENCES = {
    getattr(Tensor, name)
    for name in ("sub", "sub_", "__sub__", "__rsub__", "__isub__", "neg", "__neg__", "item")
} | {torch.sub, torch.rsub, torch.neg}


class Expectation(Tensor):
    """A log-density that is an expectation, as are its sums and multiples, but not exponentials.

    What is computed from it is one, too, except for the sum of all elements: that is all that an
    ELBO needs, so it costs next to nothing.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _NONLINEAR:
            raise RuntimeError(NO_WEIGHTS.format(f" ({func.__name__})"))
        if func is Tensor.sum and len(args) == 1 and not kwargs:
            with without_torch_function():
                return func(*args).as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


class NoDensity(Tensor):
    """What stands for the log-density of a draw that there is not: it cannot weigh anything.

    Pyro looks at its shape and whether it is a number, before it computes an ELBO in another way.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _NONLINEAR or func in _DIFFERENCES:
            raise RuntimeError(NO_WEIGHTS.format(""))
        return super().__torch_function__(func, types, args, kwargs or {})
