"""The functions that read the shape and type of a tensor, and none of its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _metadata() -> set[Callable[..., Any]]:
    attributes = (
        "device dtype is_cpu is_cuda is_leaf is_meta is_mps is_nested is_quantized is_sparse"
        " is_sparse_csr is_xpu itemsize layout nbytes ndim shape"
    )
    methods = (
        "__len__ dim element_size get_device is_complex is_contiguous is_floating_point is_signed"
        " ndimension nelement numel size stride"
    )
    functions: set[Callable[..., Any]] = {
        getattr(Tensor, a).__get__ for a in attributes.split() if hasattr(Tensor, a)
    }
    functions |= {getattr(Tensor, m) for m in methods.split()}
    likes = "zeros ones empty full rand randn"
    functions |= {getattr(torch, f"{like}_like") for like in likes.split()}
    functions |= {getattr(Tensor, f"new_{like}") for like in likes.split()[:4]}
    return functions | {torch.numel, torch.is_floating_point, torch.is_complex, Tensor.new_tensor}


METADATA = _metadata()
"""These functions, as torch reports them."""
