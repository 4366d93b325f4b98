"""Classes."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch

from pyro_bayes.likelihoods.likelihood import Likelihood


class Categorical(Likelihood):
    r"""One of :math:`C` classes, whose logits are the last dimension of the output."""

    targets = "class labels, integers from 0 to C - 1"

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

    def distribution(self, output: Any, *, batch_dims: int = 1) -> dist.TorchDistribution:
        categorical = dist.Categorical(logits=output, validate_args=False)
        return categorical.to_event(output.dim() - 1 - batch_dims)
