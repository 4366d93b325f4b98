"""Elements of parameters that carry no information: padding rows, and what pruning has masked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag


class FixedElements:
    """Which elements of a base's parameters are not used, and so keep the value that they have.

    These are the row `padding_idx` of an embedding, and the elements of `weight_orig` where
    :mod:`torch.nn.utils.prune` has set the buffer `weight_mask` to 0. An element of a parameter
    that stands in several places (tied) is fixed if it is so in each: the padding row of a table
    that is an output layer too is used there.

    Arguments:
        base: The module that owns the parameters.
        names: All names of each parameter by its first one.

    Example:
        >>> net = nn.Embedding(3, 2, padding_idx=0)
        >>> FixedElements(net, {"weight": ["weight"]}).masks()["weight"].tolist()
        [[True, True], [False, False], [False, False]]
    """

    def __init__(self, base: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
        modules = dict(base.named_modules(remove_duplicate=False))
        parameters = dict(base.named_parameters(remove_duplicate=False))
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name, aliases in names.items():
            pairs = [alias.rpartition(".")[::2] for alias in aliases]
            places = [(modules[path], key) for path, key in pairs]
            if all([_has_padding(*place) or place[1].endswith("_orig") for place in places]):
                self._places[name], self._shapes[name] = places, parameters[name].shape
        self._seen: list[tuple[Any, str, Any, int]] | None = None
        for path, module in modules.items():
            prefix = f"{path}." if path else ""
            computed = _has_padding(module, "weight") and not _own_weight(module)
            if computed and any(name.startswith(prefix) for name in names):
                warnings.warn(
                    f"Expected the embedding '{path}' to hold its weight; got one that is computed"
                    " from other parameters, so that its padding row is random like the others."
                    f" Exclude it, as in exclude_params={prefix!r}, or remove the parametrization.",
                    stacklevel=3,
                )

    def __bool__(self) -> bool:
        """Tells whether any element may be fixed, now or later."""
        return bool(self._places)

    def changed(self) -> bool:
        """Tells whether padding or masks are others than when :meth:`masks` was called."""
        return self._seen is None or any(
            [
                place.get(key) is not value or _version(value) != n
                for place, key, value, n in self._seen
            ]
        )

    def masks(self) -> dict[str, Tensor]:
        """Returns where the elements are that are fixed now, by the names of their parameters."""
        self._seen = [
            (place, key, place.get(key), _version(place.get(key)))
            for places in self._places.values()
            for module, parameter in places
            for place, key in _sources(module, parameter)
        ]
        masks = {}
        for name, places in self._places.items():
            each = [_mask(module, key, self._shapes[name]) for module, key in places]
            mask = reduce(torch.logical_and, each)
            if mask.any():
                masks[name] = mask
        return masks

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _seen=None)


def _has_padding(module: nn.Module, key: str) -> bool:
    return isinstance(module, _EMBEDDINGS) and key in ("weight", "weight_orig")


def _own_weight(module: nn.Module) -> bool:
    return module.padding_idx is None or not {"weight", "weight_orig"}.isdisjoint(
        module._parameters
    )


def _sources(module: nn.Module, key: str) -> Iterator[tuple[Any, str]]:
    """Returns what decides about a parameter: containers and keys."""
    if _has_padding(module, key):
        yield vars(module), "padding_idx"
    if key.endswith("_orig"):
        yield module._buffers, key.removesuffix("_orig") + "_mask"


def _mask(module: nn.Module, key: str, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    for place, source in _sources(module, key):
        value = place.get(source)
        if isinstance(value, Tensor) and value.shape == shape and not value.is_meta:
            mask |= (value == 0).cpu()
        elif isinstance(value, int):
            mask[value] = True
    return mask


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
