"""Networks that compute again in the backward pass, and must find there what was there before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_bayes.base.torch_private import (
    after_backward,
    is_transformed,
    remove_hook,
    saved_tensors_hooks,
    tree_leaves,
    tree_map_only,
)

Context: TypeAlias = Callable[[], AbstractContextManager[Any]]


class Watch(TorchFunctionMode):
    """Notes, while it is open, whether an operator ran where autograd saves tensors in its own way.

    That is how activation checkpointing works: it saves none, and computes them again.

    Attributes:
        hooked: Whether one did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before, self.hooked = saved_tensors_hooks(), False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.hooked and saved_tensors_hooks() != self._before:
            self.hooked = True
        return func(*args, **(kwargs or {}))


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
    origin: str = type(node)._forward_cls.__module__  # type: ignore[attr-defined]
    return not origin.startswith(("pyro_bayes.", "torch._functorch."))


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
        context = ctx.context()
        context.__enter__()
        # After an error, the context is collected, which closes it.
        after_backward(partial(context.__exit__, None, None, None))
        return grad, None
