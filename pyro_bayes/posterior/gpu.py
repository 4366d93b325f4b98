"""Whether kernels of our own can serve parameters: on GPUs that Triton compiles for."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn


def kernels(mean: Tensor) -> ModuleType | None:
    """Returns the module `pyro_bayes.posterior.kernels` if it can serve parameters, or `None`.

    Arguments:
        mean: The means, a flat tensor.
    """
    if not mean.is_cuda or mean.dtype != torch.float32:
        return None
    # Other subclasses of tensors may have no memory.
    plain = type(mean) is Tensor or isinstance(mean, nn.Parameter)
    return _kernels(mean.device) if plain else None


@lru_cache
def _kernels(device: torch.device) -> ModuleType | None:
    try:
        from pyro_bayes.posterior import kernels
    except ImportError:  # PyTorch brings Triton where it has a release for the system
        return None
    try:
        kernels.divergence_terms(torch.ones(1, device=device), torch.ones(1, device=device), 1.0)
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
