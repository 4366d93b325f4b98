"""Networks that compute again in the backward pass, and must find there what was there before."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pyro_bayes.base.swap import Swap
from pyro_bayes.base.torch_private import (
    Heard,
    after_backward,
    is_transformed,
    remove_hook,
    tree_leaves,
    tree_map_only,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Context: TypeAlias = Callable[[], AbstractContextManager[Any]]


def nodes(value: Tensor) -> Iterator[Any]:
    """Yields the nodes of the graph that a tensor was computed by.

    Arguments:
        value: The tensor.
    """
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def is_foreign(node: Any) -> bool:
    """Tells whether a node is a function of somebody else, whose backward pass may compute again.

    Arguments:
        node: A node of the autograd graph.
    """
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    return _is_of_others(type(node)._forward_cls)  # type: ignore[attr-defined]


class Applied:
    """That a context is open, in which what may compute again is noticed as it is applied.

    That are functions of others, and hooks on saved tensors, as of activation checkpointing. Their
    part of the backward pass runs in the context, whoever applied them: the network in a call, a
    submodule, or a method.

    Arguments:
        swap: What holds the values of the context.
        again: Returns what opens it again.

    Attributes:
        found: Whether any was applied.
    """

    __slots__ = ("__weakref__", "_entry", "again", "found", "swap", "thread")

    def __init__(self, swap: Swap, again: Callable[[], Context]) -> None:
        self.swap, self.again, self.found = swap, again, False
        self.thread = threading.get_ident()
        self._entry = weakref.ref(self)

    def __enter__(self) -> Self:
        if len(_open) > 9:  # interrupted contexts may leave theirs
            _open[:] = [entry for entry in _open if entry() is not None]
        _open.append(self._entry)
        _heard.begin()
        return self

    def __exit__(self, *_: object) -> None:
        if self._entry in _open:
            _open.remove(self._entry)
        if not _open:
            _heard.end()
            if _open:  # another thread has opened a context meanwhile
                _heard.begin()


def any_applied() -> bool:
    """Tells whether what may compute again was applied in the latest context of this thread."""
    present = _present() if _open else []
    return bool(present) and present[-1].found


_open: list[weakref.ref[Applied]] = []


def _present() -> list[Applied]:
    thread = threading.get_ident()
    living = [one for entry in [*_open] if (one := entry()) is not None]
    return [one for one in living if one.thread == thread and one.swap.is_open]


def _contexts() -> list[Context]:
    """Returns what opens each context of this thread again, which something was applied in."""
    present = _present()
    for one in present:
        one.found = True
    return [one.again() for one in present]


def _is_of_others(origin: Any) -> bool:
    module = getattr(origin, "__module__", None) or ""
    return not module.startswith(("pyro_bayes.", "torch._functorch."))


def _note_function(function: type, outputs: Any) -> None:
    if not _open or not _is_of_others(function):
        return
    found: set[Any] = {t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor)}
    own = [*filter(is_foreign, found)]
    for context in _contexts() if own else ():
        for node in own:
            node.register_prehook(partial(_reopen, context))


def _note_hooks(unpack: Callable[[Any], Any]) -> Callable[[Any], Any]:
    if not _open or not _is_of_others(unpack):
        return unpack
    contexts = _contexts()

    def unpacked(value: Any) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return unpack(value)

    return unpacked if contexts else unpack


def _reopen(context: Context, _: Any) -> None:
    opened = context()
    opened.__enter__()
    # After an error, the context is collected, which closes it.
    close: Callable[..., Any] = opened.__exit__
    after_backward(partial(close, None, None, None))


_heard = Heard(_note_function, _note_hooks)


def reopening(value: Tensor, context: Context) -> Tensor:
    """Returns a tensor behind which every backward pass runs in a context.

    The context is opened when the pass arrives at the tensor, and closed when it ends, also by an
    error.

    Arguments:
        value: The tensor.
        context: Returns the context.

    Example:
        >>> from contextlib import contextmanager
        >>> @contextmanager
        ... def context():
        ...     print("open")
        ...     yield
        ...     print("closed")
        >>> x = torch.ones(2, requires_grad=True)
        >>> reopening(x.sum(), context).backward()
        open
        closed
    """
    reopened: Tensor = _Reopening.apply(value, context)
    return reopened


class Recomputation:
    """Whether a network has functions of others in its graph, as its first call in a mode tells."""

    def __init__(self) -> None:
        self._known: dict[bool, bool] = {}

    def may_be(self, base: nn.Module) -> bool:
        """Tells whether the backward pass of a call may compute again.

        Arguments:
            base: The network.
        """
        return self._known.get(base.training, True) and torch.is_grad_enabled()

    @contextmanager
    def watch(self, base: nn.Module, again: Callable[[], Context]) -> Iterator[None]:
        """Lets the backward pass of calls, if it may compute again, do so in a context.

        Arguments:
            base: The network.
            again: Returns, in a call, what opens its context again.
        """

        def after(module: nn.Module, _: Any, output: Any) -> Any:
            outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if module.training not in self._known and outputs:
                found = (is_foreign(node) for tensor in outputs for node in nodes(tensor))
                self._known[module.training] = any(found)
            if not outputs or not self._known[module.training]:
                return output
            context = again()
            return tree_map_only(
                Tensor, lambda t: reopening(t, context) if t.requires_grad else t, output
            )

        # A compiler would take a hook for a change of the network.
        if torch.compiler.is_compiling() or is_transformed():
            yield
            return
        try:
            try:
                base.register_forward_hook(after)
                yield
            finally:
                remove_hook(base, after)
        finally:  # the first time may have been interrupted
            remove_hook(base, after)


class _Reopening(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, context: Any) -> Tensor:
        ctx.context = context
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor, None]:
        _reopen(ctx.context, grad)
        return grad, None
