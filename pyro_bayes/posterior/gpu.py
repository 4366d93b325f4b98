"""Whether kernels of our own can serve parameters: on GPUs that Triton compiles for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn


def kernels(means: Sequence[Tensor], logvars: Sequence[Tensor]) -> ModuleType | None:
    """Returns the module `pyro_bayes.posterior.kernels` if it can serve parameters, or else `None`.

    Arguments:
        means: The means, contiguous, of one device and one floating-point type.
        logvars: The log-variances.
    """
    first = means[0]
    if not first.is_cuda or first.dtype != torch.float32:
        return None
    if not all([logvar.is_contiguous() for logvar in logvars]):
        return None
    # Of other classes, as those that only pretend to have memory, no address is known.
    return _kernels(first.device) if type(first) in (Tensor, nn.Parameter) else None


@lru_cache
def _kernels(device: torch.device) -> ModuleType | None:
    try:
        from pyro_bayes.posterior import kernels
    except ImportError:  # PyTorch brings Triton where it has a release for the system
        return None
    try:
        kernels.divergences([torch.ones(1, device=device)], [torch.ones(1, device=device)], 1.0)
    except Exception as error:
        if torch.cuda.is_current_stream_capturing():
            raise  # which says nothing of Triton
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"Expected Triton to compile a kernel for {device}, for which it needs a C compiler;"
            f" got {reason}. Operators of PyTorch stand in, with the same results in more time.",
            stacklevel=2,
        )
        return None
    return kernels
