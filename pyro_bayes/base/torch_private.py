"""What torch and Pyro have no public call for, in one place.

Other files take these from here. `tests/base/test_torch_private.py` says what each must do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from pyro.poutine import Trace, runtime
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._utils import _flatten_dense_tensors as flatten_dense
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "Heard",
    "TorchDispatchMode",
    "after_backward",
    "flatten_dense",
    "has_saved_tensors_hooks",
    "is_any_autocast_enabled",
    "is_batched",
    "is_enumerated",
    "is_transformed",
    "open_traces",
    "outside_transforms",
    "parametrization_cache",
    "remove_hook",
    "saved_tensors_hooks",
    "transform_level",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "untracked_views",
    "without_torch_function",
    "wrapper_subclass",
]

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
without_torch_function: Callable[[], AbstractContextManager[Any]] = (
    torch._C.DisableTorchFunctionSubclass
)


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Removes a hook before or after the forward pass, also one whose registration was interrupted.

    Arguments:
        module: The module.
        hook: The hook.
    """
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, own in hooks.items() if own is hook]:
            del hooks[key]
            with_kwargs.pop(key, None)


def transform_level() -> int:
    """Returns how many `torch.func` transforms are active."""
    return torch._C._functorch.maybe_current_level() or 0


@contextmanager
def outside_transforms(levels: int | None = None) -> Iterator[None]:
    """Leaves the innermost `torch.func` transforms while the context is open.

    Arguments:
        levels: How many; all by default.
    """
    with ExitStack() as stack:
        for _ in range(transform_level() if levels is None else levels):
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


def is_transformed() -> bool:
    """Tells whether a compiler, a `torch.func` transform or forward differentiation is at work."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return forward_ad._current_level >= 0


def is_batched(gradients: Iterable[Tensor | None]) -> bool:
    """Tells whether any gradient is one of many that a backward pass computes at once.

    Arguments:
        gradients: The gradients.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor
    return any([batched(gradient) for gradient in gradients if gradient is not None])


def parametrization_cache() -> dict[Any, Any] | None:
    """Returns the weights that parametrizations keep in `parametrize.cached()`, if it is open."""
    return parametrize._cache if parametrize._cache_enabled else None


def is_assigned(metadata: Mapping[str, Any]) -> bool:
    """Tells whether `load_state_dict(assign=True)` is at work, by what its hooks are given.

    Arguments:
        metadata: The metadata of the module that is loaded.
    """
    return bool(metadata.get("assign_to_params_buffers", False))


def saved_tensors_hooks() -> Any:
    """Returns the default hooks on saved tensors, such as those of activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def has_saved_tensors_hooks() -> bool:
    """Tells whether default hooks on saved tensors are set, as by activation checkpointing."""
    return saved_tensors_hooks() is not None


def after_backward(function: Callable[[], None]) -> None:
    """Calls a function when the backward pass that is running has ended, unless by an error.

    Arguments:
        function: The function.
    """
    torch.autograd.Variable._execution_engine.queue_callback(function)


class Heard:
    """What is applied while somebody listens: functions of autograd, and hooks on saved tensors.

    Torch has no hook for either: its `Function.apply` and `saved_tensors_hooks.__enter__` are
    replaced from :meth:`begin` to :meth:`end`.

    Arguments:
        functions: Is called with each `torch.autograd.Function` that was applied, and its outputs.
        hooks: Is called with the hook that unpacks, and returns the one to use.
    """

    def __init__(self, functions: Callable[[type, Any], None], hooks: Callable[[Any], Any]) -> None:
        applied: Any = torch.autograd.Function.__dict__["apply"]
        entered: Any = torch.autograd.graph.saved_tensors_hooks.__enter__

        @wraps(applied.__func__)
        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = applied.__func__(cls, *args, **kwargs)
            if not is_transformed():
                functions(cls, outputs)
            return outputs

        @wraps(entered)
        def enter(own: Any) -> None:
            if is_transformed():
                entered(own)
                return
            unpack = own.unpack_hook
            own.unpack_hook = hooks(unpack)
            try:
                entered(own)
            finally:
                own.unpack_hook = unpack

        self._own: tuple[Any, Any] = applied, entered
        self._heard: tuple[Any, Any] = classmethod(apply), enter

    def begin(self) -> None:
        """Begins to listen; nothing happens if it listens already."""
        self._put(self._heard)

    def end(self) -> None:
        """Gives torch its own back."""
        self._put(self._own)

    def _put(self, pair: tuple[Any, Any]) -> None:
        function: Any = torch.autograd.Function
        hooks: Any = torch.autograd.graph.saved_tensors_hooks
        function.apply, hooks.__enter__ = pair


def untracked_views() -> AbstractContextManager[None]:
    """Makes views that autograd takes for tensors of their own, which may change in place."""
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_VIEWS)
    return guard


def wrapper_subclass(cls: type[Tensor], like: Tensor) -> Any:
    """Returns a tensor of a subclass, without values, of another tensor's shape and kind.

    Arguments:
        cls: The subclass.
        like: The other tensor.
    """
    return torch.Tensor._make_wrapper_subclass(
        cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
    )


def open_traces() -> list[Trace]:
    """Returns the traces that Pyro is recording, the outermost first."""
    return [h.trace for h in runtime._PYRO_STACK if isinstance(h, TraceMessenger)]


def is_enumerated() -> bool:
    """Tells whether Pyro runs this model or guide to enumerate discrete variables."""
    return any(isinstance(h, EnumMessenger) for h in runtime._PYRO_STACK)
