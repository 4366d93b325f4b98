"""Where each parameter lies in one flat piece of memory: the only bookkeeping of the posterior."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bayes.base.torch_private import flatten_dense

CHUNK = 2**16
"""The number of elements in a chunk on a CPU, of which a core's cache holds several at once."""


class Part(NamedTuple):
    """One parameter.

    Arguments:
        name: Its dotted name.
        shape: Its shape.
        stride: Its strides, which are dense but not always contiguous.
        order: The permutation after which it is contiguous; `None` if it is so already.
        offset: The place of its first element.
        size: The number of its elements.
    """

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    order: tuple[int, ...] | None
    offset: int
    size: int


class Chunk(NamedTuple):
    """A range of elements that one core's cache holds: several small parameters, or a piece of one.

    Arguments:
        start: The first element.
        stop: The element behind the last.
        first: The index of the first parameter in it.
        sizes: How many elements it has of that parameter and of each that follows.
    """

    start: int
    stop: int
    first: int
    sizes: tuple[int, ...]


class Layout:
    """Where each of several parameters lies in a flat tensor.

    Arguments:
        parameters: The parameters by dotted name, of one dtype and device. Only their shapes and
            strides are used.

    Attributes:
        parts: The parameters, in order.
        names: Their names.
        size: The number of all elements.
        fixed: The places of the elements that carry no information and are not random; `None` if
            there are none.
        masks: Which elements these are, by the names of the parameters that have any.
        free: How many elements of each parameter are random.
        checks: In how many backward passes to look whether a network uses what is fixed.

    Example:
        >>> layout = Layout({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        >>> [tuple(view.shape) for view in layout.views(torch.arange(8.0))]
        [(2, 3), (2,)]
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        sizes = [parameter.numel() for parameter in parameters.values()]
        starts = accumulate([0, *sizes])
        self.parts = tuple(
            Part(name, p.shape, *_arrangement(p), start, size)
            for (name, p), start, size in zip(parameters.items(), starts, sizes, strict=False)
        )
        self.names = tuple(parameters)
        self.sizes = sizes
        self.size = sum(sizes)
        self._where = [(part.shape, part.stride, part.offset) for part in self.parts]
        self._chunks = tuple(_chunks(sizes))
        self.fix({}, None)

    def fix(self, masks: Mapping[str, Tensor], device: torch.device | None) -> None:
        """Says which elements carry no information.

        Arguments:
            masks: Where they are by name. What is not here has none.
            device: The device of the flat tensors.
        """
        own = {name: mask for name, mask in masks.items() if name in self.names}
        self.fixed: Tensor | None = None
        self.checks = 10 if own else 0
        self.masks = {name: mask.to(device) for name, mask in own.items()}
        self.free = list(self.sizes)
        self._fixed_in: dict[tuple[int, int], Tensor] = {}
        if own:
            none = (torch.zeros(part.shape, dtype=torch.bool, device="cpu") for part in self.parts)
            every = [own.get(*pair) for pair in zip(self.names, none, strict=True)]
            where = self.flatten(every).nonzero().squeeze(-1)
            self.free = [int((~mask).sum()) for mask in every]
            self.fixed = where.to(device)
            for chunk in self._chunks:
                here = where[(where >= chunk.start) & (where < chunk.stop)]
                if len(here):
                    self._fixed_in[chunk.start, chunk.stop] = here - chunk.start
            self._fixed_in[0, self.size] = self.fixed

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), fixed=None, masks={}, free=list(self.sizes), _fixed_in={})

    def fixed_in(self, chunk: Chunk) -> Tensor | None:
        """Returns the places in a chunk of the elements that are fixed, if any are.

        Arguments:
            chunk: The chunk.
        """
        return self._fixed_in.get(chunk[:2])

    def without_fixed(self, terms: Tensor) -> Tensor:
        """Returns terms, a flat tensor, with zeros in the place of elements that are fixed.

        Arguments:
            terms: The terms.
        """
        return terms if self.fixed is None else terms.index_fill(-1, self.fixed, 0.0)

    def chunks(self, flat: Tensor) -> Sequence[Chunk]:
        """Returns the chunks that a pass over a flat tensor goes through: one, but on a CPU."""
        return self._chunks if flat.is_cpu else self.whole()

    def pieces(self, *flats: Any) -> Iterator[tuple[Any, ...]]:
        """Returns the chunks, each with what flat tensors have there.

        Arguments:
            flats: The flat tensors; what is no tensor stays as it is.
        """
        chunks = self.chunks(flats[0])
        if len(chunks) == 1:
            yield chunks[0], *flats
            return
        for chunk in chunks:
            here = slice(chunk.start, chunk.stop)
            yield chunk, *[flat[here] if isinstance(flat, Tensor) else flat for flat in flats]

    def whole(self) -> Sequence[Chunk]:
        """Returns a single chunk of all elements."""
        return (Chunk(0, self.size, 0, tuple(self.sizes)),)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns the parameters in a flat tensor, in its memory, without a gradient.

        Arguments:
            flat: The flat tensor, contiguous.
        """
        start = flat.storage_offset()
        if start:
            return [flat.as_strided(s, t, o + start) for s, t, o in self._where]
        return [flat.as_strided(*where) for where in self._where]

    def addresses(self, flat: Tensor) -> list[int]:
        """Returns the address of each parameter in a flat tensor, 0 if it has no elements."""
        start, width = flat.data_ptr(), flat.element_size()
        return [start + width * part.offset if part.size else 0 for part in self.parts]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Returns the parameters in a flat tensor, by operators that any transform understands.

        Arguments:
            flat: The flat tensor, of shape `(size,)`, or several of shape `(*, size)`.
        """
        lead, dims = flat.shape[:-1], flat.dim() - 1
        parts = []
        for part, piece in zip(self.parts, flat.split(self.sizes, -1), strict=True):
            if part.order is None:
                parts.append(piece.view((*lead, *part.shape)))
                continue
            back = [part.order.index(d) + dims for d in range(len(part.shape))]
            turned = piece.view((*lead, *(part.shape[d] for d in part.order)))
            parts.append(turned.permute(*range(dims), *back))
        return parts

    def flatten(self, tensors: Iterable[Tensor | None], like: Tensor | None = None) -> Tensor:
        """Returns parameters as a flat tensor, differentiable with respect to them.

        Arguments:
            tensors: Tensors of the parameters' shapes, in order, or `None` for zeros.
            like: A tensor of the dtype and device of the zeros, if there are any.
        """
        pairs = zip(self.parts, tensors, strict=True)
        lines = [_zeros(p, like) if v is None else _turned(p, v).reshape(-1) for p, v in pairs]
        return torch.cat(lines)

    def lines(self, tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Returns parameters with their dimensions in the order in which they lie.

        Arguments:
            tensors: Tensors of the parameters' shapes, or `None`, in order.
        """
        pairs = zip(self.parts, tensors, strict=True)
        turned = [None if tensor is None else _turned(part, tensor) for part, tensor in pairs]
        # What is cut into pieces is copied once, if at all.
        return [v if v is None or v.numel() <= CHUNK else v.reshape(-1) for v in turned]

    def gather(self, lines: Sequence[Tensor | None], chunk: Chunk, like: Tensor) -> Tensor:
        """Returns the elements that a chunk has of several parameters.

        Arguments:
            lines: What :meth:`lines` returns; zeros stand for `None`.
            chunk: The chunk.
            like: A tensor of the dtype and device of the zeros.
        """
        i, count = chunk.first, len(chunk.sizes)
        own = [
            _zeros(part, like) if line is None else line
            for part, line in zip(self.parts[i : i + count], lines[i : i + count], strict=True)
        ]
        if count > 1:
            return flatten_dense(own)  # type: ignore[no-any-return]
        offset = self.parts[i].offset
        return own[0].reshape(-1)[chunk.start - offset : chunk.stop - offset]

    def spread(self, numbers: Tensor) -> Tensor:
        """Returns one number for each parameter as one for each element, differentiable.

        Arguments:
            numbers: The numbers, one for each parameter.
        """
        pieces = zip(numbers.unbind(), self.sizes, strict=True)
        return torch.cat([number.expand(size) for number, size in pieces])

    def sums(self, terms: Tensor) -> Tensor:
        """Returns the sum over the elements of each parameter, differentiable.

        Arguments:
            terms: The terms, a flat tensor.
        """
        return torch.stack([own.sum() for own in terms.split(self.sizes)])

    def each(self, numbers: Tensor, chunk: Chunk) -> Tensor:
        """Returns one number for each parameter as one for each element of a chunk.

        Arguments:
            numbers: The numbers, one for each parameter.
            chunk: The chunk.

        Returns:
            A tensor that broadcasts to the chunk.
        """
        if len(chunk.sizes) == 1:
            return numbers[chunk.first]
        own = numbers[chunk.first : chunk.first + len(chunk.sizes)]
        if own.stride(0) == 0 or (own.is_cpu and len(set(own.tolist())) == 1):
            return own[0]
        sizes = torch.tensor(chunk.sizes, device=own.device)
        return own.repeat_interleave(sizes, output_size=chunk.stop - chunk.start)


class Flat(NamedTuple):
    r"""The parameters of one posterior that have one dtype and device.

    Arguments:
        layout: Where each lies.
        mean: All means :math:`\mu`, a flat tensor.
        logvar: All :math:`\log \sigma^2`, likewise.
    """

    layout: Layout
    mean: Tensor
    logvar: Tensor


class Drawn(NamedTuple):
    """What was computed of each parameter.

    Arguments:
        means: The means, if draws were not asked for; else none.
        outputs: What was asked for.
        number: The divergence, that of each parameter, or log-densities, if asked for.
    """

    means: list[Tensor]
    outputs: list[Tensor]
    number: Tensor | None


def _zeros(part: Part, like: Tensor | None) -> Tensor:
    return torch.zeros(part.size) if like is None else like.new_zeros(part.size)


def _turned(part: Part, tensor: Tensor) -> Tensor:
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor if part.order is None else tensor.permute(part.order)


def _arrangement(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Returns the strides of a dense copy, and the permutation that makes it contiguous."""
    copy = torch.empty_like(parameter, device="meta")
    stride = copy.stride()
    if copy.is_contiguous() or copy.numel() == 0:
        return stride, None
    order = sorted(range(copy.dim()), key=lambda d: (-stride[d], -copy.shape[d]))
    return stride, tuple(order)


def _chunks(sizes: Sequence[int]) -> Iterator[Chunk]:
    start = first = 0
    group: list[int] = []
    for i, size in enumerate([*sizes, CHUNK + 1]):
        if group and sum(group) + size > CHUNK:
            yield Chunk(start, start + sum(group), first, tuple(group))
            start, group = start + sum(group), []
        if i == len(sizes):
            return
        if size > CHUNK:
            ends = range(start, start + size, CHUNK)
            yield from (
                Chunk(a, b, i, (b - a,)) for a in ends for b in [min(a + CHUNK, start + size)]
            )
            start += size
            continue
        first = i if not group else first
        group.append(size)
