"""What torch has no public call for: each private use has its place here, and a test."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.autograd import forward_ad

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def transform_level() -> int:
    """Returns how many `torch.func` transforms are active."""
    return torch._C._functorch.maybe_current_level() or 0


def is_transformed() -> bool:
    """Tells whether a compiler, a `torch.func` transform or forward differentiation is at work."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return forward_ad._current_level >= 0


def untracked_views() -> AbstractContextManager[None]:
    """Makes views that autograd takes for tensors of their own, which may change in place."""
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_VIEWS)
    return guard
