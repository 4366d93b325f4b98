"""The noise of one context: drawn when first needed, and kept until the context closes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import (
    has_saved_tensors_hooks,
    outside_transforms,
    transform_level,
)

Estimator: TypeAlias = Literal["weights", "local", "flipout"]

_SIGNS_OF_BYTES = torch.tensor([*product((-1.0, 1.0), repeat=8)], dtype=torch.float32, device="cpu")
_HERE: AbstractContextManager[None] = nullcontext()


class ContextNoise:
    """The noise of one context: an operator meets the same noise whenever it is called.

    Noise belongs to the position of an example in a batch. Rows are drawn in order and kept, so
    that the first rows of a larger batch meet the noise that a smaller batch met. It is drawn
    outside of `torch.func` transforms and inference mode that were entered within the context:
    what is kept must serve there and elsewhere.

    Arguments:
        estimator: What is random: the weights, each operator's outputs, or the weights of each
            example.
        batch_dim: The dimension of an operator's input that counts examples.
        check_examples: Whether to see that examples do not meet.
        seed: The seed of its random numbers; by default, they are torch's global ones.

    Attributes:
        batch_size: How many examples a batch has, `None` until a batch or an operator says so.
        shared: The operators, with their parameters, whose input is the same for all examples.
    """

    def __init__(
        self,
        estimator: Estimator,
        batch_dim: int = 0,
        check_examples: bool = True,
        *,
        seed: int | None = None,
    ) -> None:
        self.estimator: Estimator = estimator
        self.batch_dim = batch_dim
        self.check_examples = check_examples
        self.batch_size: int | None = None
        self.shared: Set[tuple[str, ...]] = frozenset()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self.pinned: set[str] = set()
        """Names of parameters whose one draw stands for them from now on."""
        self.ruled: set[str] = set()
        """Names of parameters that some rule has used."""
        self.handed: set[str] = set()
        """Names of parameters of which some operator has had the one draw."""
        self.uses: dict[str, list[str]] | None = None
        """What became of each parameter by name, if somebody wants to know."""
        self._level = transform_level()
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self.divergence: Callable[[str, Any], Tensor] | None = None
        """Returns what one pass has of the divergence of a parameter by name, for priors."""
        self.statements: dict[str, tuple[Any, Any]] = {}
        """The scale and the mask of a guide's sites by the names of parameters."""
        self._seen: dict[tuple[object, ...], list[Tensor]] = {}
        self._sharing: dict[tuple[str, ...], tuple[str, ...]] = {}

    def fresh(self) -> ContextNoise:
        """Returns noise of the same kind for a context of its own."""
        return ContextNoise(self.estimator, self.batch_dim, self.check_examples)

    def rows_per_example(self, count: int) -> int | None:
        """Returns how many of an operator's rows each example has.

        Arguments:
            count: The number of rows.

        Returns:
            Their number, `None` if they are not the examples'. A network may fold positions into
            the dimension of examples; or the rows may be something else, as learned queries.
        """
        if self.batch_size is None:
            return 1
        return None if count % max(self.batch_size, 1) else count // max(self.batch_size, 1)

    def example_rows(self, like: Tensor, example: int | None) -> int | None:
        """Returns how many rows of an operator's output are told by examples.

        Arguments:
            like: The output.
            example: Its dimension that counts examples, if there is one.

        Returns:
            The number, `None` if it is not known whose they are. One draw serves for all then.
        """
        if example is None:
            return 1 if self.batch_size in (None, 1) else None
        count = like.shape[example]
        return None if self.rows_per_example(count) is None else count

    def met(
        self, source: tuple[str, ...], parameters: Sequence[str], inputs: Sequence[Tensor]
    ) -> None:
        """Is told of each operator that meets Gaussian tensors, where somebody watches.

        Arguments:
            source: The operator and its Gaussian tensors.
            parameters: The names of their parameters.
            inputs: What else it meets.
        """

    watched = False

    def normal(self, source: tuple[str, ...], like: Tensor, example: int | None = 0) -> Tensor:
        """Returns standard normal noise for an operator's output.

        Arguments:
            source: What the noise belongs to: the operator and its Gaussian parameters.
            like: A tensor of the wanted shape, dtype and device; the last dimension holds features.
            example: Its dimension that counts examples, if there is one.
        """
        shape = (like.movedim(example, 0) if example else like).shape
        last = len(shape) - 1 if len(shape) > 1 or example is None else 1
        rows = self._rows(source, math.prod(shape[:last]), shape[last:], like, self._randn)
        noise = rows if len(shape) == 2 else rows.view(shape)
        return noise.movedim(0, example) if example else noise

    def signs(self, source: tuple[str, ...], count: int, size: int, like: Tensor) -> Tensor:
        """Returns the vector of random signs that each row's example has.

        Arguments:
            source: What the signs belong to: a parameter and one of its dimensions.
            count: The number of rows, see :meth:`rows_per_example`.
            size: The length of a vector.
            like: A tensor of the wanted dtype and device.

        Returns:
            Signs of shape `(count, size)`.
        """
        source = self._sharing.setdefault(source, source)
        each = self.rows_per_example(count) or 1
        signs = self._rows(("signs", *source), count // each, (size,), like, self._random_signs)
        if each == 1:
            return signs
        return signs.repeat_interleave(each, 0) if self.batch_dim == 0 else signs.repeat(each, 1)

    def share(self, source: tuple[str, ...], other: tuple[str, ...]) -> bool:
        """Lets a source have the signs of another, unless it has signs already.

        Arguments:
            source: What the signs belong to.
            other: What the same signs belong to.

        Returns:
            Whether it has these signs.
        """
        shared = self._sharing.setdefault(other, other)
        return self._sharing.setdefault(source, shared) == shared

    def of_parameter(self, name: str, like: Tensor) -> Tensor:
        """Returns the standard normal noise of a parameter's one draw.

        Arguments:
            name: The name of the parameter.
            like: A tensor of its shape, dtype and device.
        """
        key = (name, like.shape, like.dtype, like.device)
        if key not in self._kept:
            with self.outside():
                self._kept[key] = self._randn(like.shape, dtype=like.dtype, device=like.device)
        return self._kept[key]

    def note(self, name: str, use: str) -> None:
        """Notes what became of a parameter, if somebody wants to know."""
        if self.uses is not None and use not in self.uses.setdefault(name, []):
            self.uses[name].append(use)

    def token(self, key: str, value: object) -> object:
        """Returns what tells a value from others that a key met: itself, or its number.

        Arguments:
            key: What the value is used with.
            value: A tensor, which is told by what it holds, or something with a representation.
        """
        if not isinstance(value, Tensor):
            return value
        if self.is_transformed():
            return 0
        number = self._number(key, value)
        if number is not None:
            return number
        seen = self._seen.setdefault((key, value.shape, value.dtype, value.device), [])
        seen.append(value.detach())
        return len(seen) - 1

    def has_met(self, key: str, value: Tensor) -> bool:
        """Tells whether a key met an equal tensor before, see :meth:`token`."""
        return not self.is_transformed() and self._number(key, value) is not None

    def _number(self, key: str, value: Tensor) -> int | None:
        seen = self._seen.get((key, value.shape, value.dtype, value.device), ())
        for number, earlier in enumerate(seen):
            if earlier is value or torch.equal(earlier, value):
                return number
        return None

    def is_transformed(self) -> bool:
        """Tells whether a compiler or a transform entered within the context is at work."""
        return torch.compiler.is_compiling() or transform_level() > self._level

    def outside(self) -> AbstractContextManager[None]:
        """Leaves inference mode, saved-tensor hooks and transforms entered within the context."""
        if torch.compiler.is_compiling():
            return _HERE
        levels, inference = transform_level() - self._level, torch.is_inference_mode_enabled()
        hooked = has_saved_tensors_hooks()
        if not (levels or inference or hooked):
            return _HERE
        return _left(levels, inference, hooked)

    def _rows(
        self,
        source: tuple[str, ...],
        count: int,
        features: tuple[int, ...],
        like: Tensor,
        sample: Callable[..., Tensor],
    ) -> Tensor:
        key = (source, features, like.dtype, like.device)
        rows = self._kept.get(key)
        kept = 0 if rows is None else rows.shape[0]
        if kept < count or rows is None:
            with self.outside():
                more = sample((count - kept, *features), dtype=like.dtype, device=like.device)
                rows = more if rows is None else torch.cat((rows, more))
            self._kept[key] = rows
            return rows
        return rows if kept == count else rows[:count]

    def _randn(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(tuple(shape), dtype=dtype, device=device, **self._source(device))

    def _random_signs(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        count, source = math.prod(shape), self._source(device)
        if device.type != "cpu" or count < 1024:
            bits = torch.randint(2, tuple(shape), dtype=dtype, device=device, **source)
            return torch.rsub(bits, 1, alpha=2)
        # A CPU draws number after number: one random byte serves for eight signs.
        random_bytes = torch.randint(256, (math.ceil(count / 8),), device=device, **source)
        signs = _SIGNS_OF_BYTES.index_select(0, random_bytes)
        return signs.view(-1)[:count].view(*shape).to(dtype)

    def _source(self, device: torch.device) -> dict[str, Any]:
        """Returns where random numbers come from, nothing for torch's global generator."""
        if self._seed is None:
            return {}
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return {"generator": self._generators[device]}


class ParticleNoise(ContextNoise):
    """The noise of one particle among those that :func:`torch.vmap` evaluates together.

    Arguments:
        noise: The noise of the context, which keeps that of all particles.
        size: The number of particles.
        index: Which of them it is, a 0-dim tensor.
    """

    def __init__(self, noise: ContextNoise, size: int, index: Tensor) -> None:
        super().__init__(noise.estimator, noise.batch_dim, noise.check_examples)
        self._all, self._size, self._index = noise, size, index
        self._sharing, self.shared = noise._sharing, noise.shared
        self.batch_size, self.pinned = noise.batch_size, set(noise.pinned)

    def of_parameter(self, name: str, like: Tensor) -> Tensor:
        shape = (self._size, *like.shape)
        with self._all.outside():
            expanded = like.new_empty(()).expand(shape)
        return self._own(self._all.of_parameter(name, expanded))

    def _rows(
        self,
        source: tuple[str, ...],
        count: int,
        features: tuple[int, ...],
        like: Tensor,
        sample: Callable[..., Tensor],
    ) -> Tensor:
        every = (self._size, *features)
        return self._own(self._all._rows(source, count, every, like, sample), dim=1)

    def _own(self, noise: Tensor, dim: int = 0) -> Tensor:
        index = self._index.to(noise.device).reshape(1)
        return noise.index_select(dim, index).squeeze(dim)


def context_noise(
    local_trick: bool | str, batch_dim: int, check_examples: bool = True
) -> ContextNoise:
    """Returns the noise of a context for the arguments that a user gave.

    Raises:
        ValueError: If `local_trick` is neither `True`, `False` nor `"flipout"`, `batch_dim` is
            negative, or `check_examples` is neither `True` nor `False`.
    """
    if not isinstance(local_trick, bool) and local_trick != "flipout":
        raise ValueError(
            f"Expected local_trick to be True, False or 'flipout'; got {local_trick!r}."
        )
    if not isinstance(batch_dim, int) or isinstance(batch_dim, bool) or batch_dim < 0:
        raise ValueError(
            f"Expected batch_dim to be 0 or, for inputs that have time first, 1; got {batch_dim!r}."
        )
    if not isinstance(check_examples, bool):
        raise ValueError(f"Expected check_examples to be True or False; got {check_examples!r}.")
    if local_trick == "flipout":
        return ContextNoise("flipout", batch_dim, check_examples)
    return ContextNoise("local" if local_trick else "weights", batch_dim, check_examples)


@contextmanager
def _left(levels: int, inference: bool, hooked: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if hooked:
            # Activation checkpointing counts what is saved, and would not see it again.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_identity, _identity))
        if inference:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(outside_transforms(levels))
        yield


def _identity(value: Tensor) -> Tensor:
    return value
