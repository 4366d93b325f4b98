"""The rules: what each operator does with Gaussian tensors.

A rule is a function of the operator's own signature. It returns the operator's output, or
`NotImplemented` for arguments that it does not cover, which then get one ordinary draw.
:func:`~pyro_bayes.noise.gaussian_tensor.rule` puts it under the names by which torch reports the
operator, and :func:`~pyro_bayes.noise.estimator.draw_linear` draws the output of any operator that
is linear in its weight and bias:

>>> import torch
>>> from pyro_bayes import BayesianModel
>>> from pyro_bayes.noise.estimator import draw_linear
>>> from pyro_bayes.noise.gaussian_tensor import rule
>>> from pyro_bayes.noise.local import LinearOperator
>>> vdot = LinearOperator("vdot", lambda x, w, b: torch.vdot(x, w), into={0: (0, -1)}, out={})
>>> @rule(torch.vdot)
... def _vdot(input, weight):
...     return draw_linear(vdot, (input,), weight, example=None)

The laws that every rule obeys are tested over the whole registry: a rule without a case there fails
a test.
"""

from __future__ import annotations

from pyro_bayes.noise import (
    arithmetic,
    arrangement,
    attention,
    convolution,
    einsum,
    embedding,
    linear,
    normalization,
)

__all__ = [
    "arithmetic",
    "arrangement",
    "attention",
    "convolution",
    "einsum",
    "embedding",
    "linear",
    "normalization",
]
