"""Posteriors of parameters in half precision: kept in single, and rounded where the base is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.mutex import Mutex
from pyro_bayes.base.torch_private import outside_transforms
from pyro_bayes.posterior.layout import Layout
from pyro_bayes.posterior.leaves import alias, whole

_BITS = {1: torch.int8, 2: torch.int16}


def is_low(dtype: torch.dtype) -> bool:
    """Tells whether a dtype is too coarse for a posterior: half precision and less."""
    return dtype.itemsize < 4


def wide(dtype: torch.dtype) -> torch.dtype:
    r"""Returns the dtype in which the posterior of a parameter is kept.

    In bfloat16, steps of an optimiser round to none: :math:`\log \sigma^2 = -9` has the neighbours
    -9.0625 and -8.9375. In float16, small variances are 0.

    Arguments:
        dtype: The dtype of the parameter.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if is_low(dtype) else dtype


def keeping_precision(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a conversion that keeps single precision where another would go below.

    Arguments:
        convert: The other conversion, such as one to a dtype or a device.

    Example:
        >>> keeping_precision(Tensor.half)(torch.tensor(1e-9))
        tensor(1.0000e-09)
    """

    def apply(value: Tensor) -> Tensor:
        converted = convert(value)
        if not is_low(converted.dtype):
            return converted
        return value.to(converted.device, wide(converted.dtype))

    return apply


class Rounded:
    """Means rounded to the dtype of a base, in memory that the base's parameters share.

    Arguments:
        layout: Where each parameter lies.
        mean: The means, a flat tensor.
        dtype: The dtype of the base's parameters.

    Example:
        >>> mean = torch.tensor([0.1, 0.2])
        >>> rounded = Rounded(Layout({"w": mean}), mean, torch.bfloat16)
        >>> parameter = rounded.parameters()["w"]
        >>> parameter[0] = 3.0
        >>> rounded.take()
        >>> mean
        tensor([3.0000, 0.2000])
    """

    def __init__(self, layout: Layout, mean: Tensor, dtype: torch.dtype) -> None:
        self._layout, self._mean = layout, mean
        self._values = whole(mean.to(dtype))
        self._shown = self._values.clone()
        self._mutex = Mutex("the means in half precision")

    def parameters(self) -> dict[str, Tensor]:
        """Returns the rounded mean of each parameter by name, each with a storage of its own."""
        return {part.name: alias(self._values, part) for part in self._layout.parts}

    def take(self, mean: Tensor | None = None) -> None:
        """Takes over what was written to the base's parameters since the means were last shown.

        Arguments:
            mean: The means if they have moved. They keep their digits where nothing was written.
        """
        with self._mutex.turn():
            self._take(self._mean if mean is None else mean)

    def _take(self, mean: Tensor) -> None:
        values, shown = _bits(self._values), _bits(self._shown)
        if _is_out_of_sight(values) or torch.equal(values, shown):
            return
        present = _bits(mean.to(self._values.dtype).to(values.device))
        written = ((values != shown) & (values != present)).to(mean.device)
        mean.copy_(torch.where(written, self._values.to(mean), mean))
        self._shown.copy_(self._values)

    def show(self) -> None:
        """Lets the base's parameters be the means, after :meth:`take`."""
        with self._mutex.turn():
            self._take(self._mean)
            if not _is_out_of_sight(self._values):
                self._values.copy_(self._mean)
                self._shown.copy_(self._values)


class Rounding:
    """The parameters of a posterior that a base has in lower precision.

    Arguments:
        layouts: The layouts of all flat tensors.
        dtypes: The dtypes that the base has them in.

    Attributes:
        dtypes: The dtype in the base, by name, of each parameter whose posterior has another.
        means: Their rounded means, which the base's parameters are to share the memory of.
    """

    dtypes: dict[str, torch.dtype]
    means: dict[str, Tensor]

    def __init__(self, layouts: Sequence[Layout], dtypes: Sequence[torch.dtype]) -> None:
        self._layouts = layouts
        self._low = [dtype if is_low(dtype) else None for dtype in dtypes]
        self._rounded: list[Rounded | None] = [None] * len(layouts)

    def follow(self, means: Sequence[Tensor]) -> None:
        """Rounds means that have moved, or whose base was converted.

        Arguments:
            means: The means, flat tensors.
        """
        for rounded, mean in zip(self._rounded, means, strict=True):
            if rounded is not None:  # what was written to the former copy stays
                rounded.take(mean)
        triples = zip(self._layouts, means, self._low, strict=True)
        self._rounded = [
            None if dtype is None else Rounded(layout, mean, dtype)
            for layout, mean, dtype in triples
        ]
        pairs = zip(self._layouts, self._low, strict=True)
        self.dtypes = {name: dtype for own, dtype in pairs if dtype for name in own.names}
        self.means = {}
        for rounded in self._rounded:
            self.means.update({} if rounded is None else rounded.parameters())

    def convert(self, convert: Callable[[Tensor], Tensor], means: Sequence[Tensor]) -> None:
        """Notes the dtypes that the base's parameters are about to have.

        Arguments:
            convert: What they are converted by.
            means: The means, flat tensors.
        """
        for i, mean in enumerate(means):
            present = self._low[i] or mean.dtype
            dtype = convert(torch.empty(0, dtype=present, device=mean.device)).dtype
            self._low[i] = dtype if is_low(dtype) else None

    def take(self) -> None:
        """Takes over what was written to the base's parameters since the means were last shown."""
        self._each(Rounded.take)

    def show(self) -> None:
        """Lets the base's parameters be the means."""
        self._each(Rounded.show)

    def _each(self, call: Callable[[Rounded], None]) -> None:
        with outside_transforms():
            for rounded in self._rounded:
                if rounded is not None:
                    call(rounded)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _rounded=[None] * len(self._layouts), means={})


def _bits(values: Tensor) -> Tensor:
    # NaN is not equal to itself, and float8 has no comparison.
    return values.view(_BITS[values.element_size()])


def _is_out_of_sight(values: Tensor) -> bool:
    """Tells whether a branch on values is impossible now."""
    return values.is_meta or (values.is_cuda and torch.cuda.is_current_stream_capturing())
