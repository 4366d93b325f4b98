"""The memory of a posterior: all means in one flat tensor, all log-variances in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pyro_bayes.base.nested import plant
from pyro_bayes.base.torch_private import is_transformed
from pyro_bayes.posterior.draws import Flat
from pyro_bayes.posterior.layout import Layout, Part
from pyro_bayes.posterior.leaves import Join, Leaf, NamedView, alias, whole

Leaves: TypeAlias = Literal["flat", "named"]
Kind: TypeAlias = Literal["mean", "logvar"]
KINDS: tuple[Kind, Kind] = ("mean", "logvar")


class Place(NamedTuple):
    """Where one parameter by name stands.

    Arguments:
        holder: The dictionary of parameters that it stands in.
        key: Its key there.
        own: The object that stands there, unless somebody put another in its place.
        part: Where it lies in the flat tensor.
    """

    holder: dict[str, Any]
    key: str
    own: Leaf
    part: Part

    @property
    def present(self) -> Tensor:
        """What stands there now."""
        value: Tensor = self.holder[self.key]
        return value


class Memory:
    r"""Where :math:`\mu` and :math:`\log \sigma^2` are: a pair of flat tensors per dtype and device.

    With flat leaves, these are the parameters `mean` and `logvar` of a module (`mean_1`, … for
    further types), and a parameter by name is a view that shares its values and its gradient. With
    named leaves, the parameters by name are the leaves, in the same memory.

    Arguments:
        module: The module whose parameters they become.
        initial: The initial means and log-variances by dotted name.
        leaves: Which leaves to have.

    Attributes:
        means: A module of the means under the parameters' own names.
        logvars: A module of the log-variances, likewise.
        leaves: Which leaves there are.
    """

    def __init__(
        self, module: nn.Module, initial: Mapping[str, tuple[Tensor, Tensor]], leaves: Leaves
    ) -> None:
        self.leaves, self._module, self._names = leaves, module, tuple(initial)
        types: dict[Any, dict[str, Tensor]] = {}
        for name, (mean, _) in initial.items():
            types.setdefault((mean.dtype, mean.device), {})[name] = mean
        self._layouts = [Layout(group) for group in types.values()]
        self._keys: list[tuple[str, ...]] = [
            tuple(f"{kind}_{i}" if i else kind for kind in KINDS) for i in range(len(types))
        ]
        self._trees: dict[Kind, nn.Module] = {}
        self._places: dict[Kind, dict[str, Place]] = {}
        self._build(
            [
                [layout.flatten(initial[n][i].detach() for n in layout.names) for i in range(2)]
                for layout in self._layouts
            ]
        )

    @property
    def means(self) -> nn.Module:
        """A module of the means under the parameters' own names."""
        return self._trees["mean"]

    @property
    def logvars(self) -> nn.Module:
        """A module of the log-variances under the parameters' own names."""
        return self._trees["logvar"]

    # Reading

    def flats(self, values: Mapping[str, Tensor] | None = None) -> list[Flat]:
        """Returns the posterior of each dtype and device, as a function of the leaves.

        What stands in the leaves' places, as in :func:`torch.func.functional_call`, counts.

        Arguments:
            values: What to take instead of leaves, by the names that :meth:`stored` has for them.
        """
        if not torch.compiler.is_compiling() and self._look() != self._addresses:
            self.refresh()
        pairs = zip(self._layouts, self._keys, self._flats, strict=True)
        return [
            Flat(
                layout,
                *(self._flat(layout, *each, values or {}) for each in zip(KINDS, keys, pair)),
            )
            for layout, keys, pair in pairs
        ]

    def by_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the mean and the log-variance of each parameter by name."""
        means, logvars = (self._places[kind] for kind in KINDS)
        return {name: (means[name].present, logvars[name].present) for name in self._names}

    def stored(self) -> dict[str, nn.Parameter]:
        """Returns the leaves by the names that Pyro's param store has for them."""
        if self.leaves == "flat":
            parameters: Any = self._module._parameters
            return {key: parameters[key] for keys in self._keys for key in keys}
        return {
            f"{kind}s.{name}": place.holder[place.key]
            for kind in KINDS
            for name, place in self._places[kind].items()
        }

    def mean(self, name: str) -> Tensor:
        """Returns the mean of a parameter, in its memory and with a storage of its own."""
        return self._places["mean"][name].own.data

    def _flat(
        self, layout: Layout, kind: Kind, key: str, memory: Tensor, values: Mapping[str, Tensor]
    ) -> Tensor:
        """Returns a flat tensor as a function of the leaves."""
        places = [self._places[kind][name] for name in layout.names]
        own = all([place.holder[place.key] is place.own for place in places])
        if self.leaves == "flat":
            leaf: Any = values.get(key, self._module._parameters[key])
            if own:
                return leaf  # type: ignore[no-any-return]
            pairs = zip(places, layout.split(leaf), strict=True)
            return layout.flatten(v if p.present is p.own else p.present for p, v in pairs)
        names = [f"{kind}s.{name}" for name in layout.names] if values else layout.names
        leaves = [values.get(n, p.present) for n, p in zip(names, places, strict=True)]
        if values and own:
            pairs = zip(leaves, places, strict=True)
            own = all([leaf.data_ptr() == place.own.data_ptr() for leaf, place in pairs])
        if is_transformed() or not own:
            return layout.flatten(leaves)
        joined: Tensor = Join.apply(layout, memory, *leaves)
        return joined

    # Keeping it whole

    def refresh(self) -> None:
        """Makes all of one memory again, after leaves were converted, loaded or replaced."""
        if self.leaves == "flat":
            parameters: Any = self._module._parameters
            self._build([[parameters[key].detach() for key in keys] for keys in self._keys])
            return
        self._trees = {kind: self._module._modules[f"{kind}s"] for kind in KINDS}  # type: ignore[misc]
        named = {kind: dict(tree.named_parameters()) for kind, tree in self._trees.items()}
        self._build(
            [
                [layout.flatten(named[kind][n].detach() for n in layout.names) for kind in KINDS]
                for layout in self._layouts
            ]
        )

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Takes over values with their dtype and device.

        Arguments:
            values: The values by name, behind `"means."` or `"logvars."`; others stay.
        """
        pairs = []
        for layout in self._layouts:
            pair = []
            for kind in KINDS:
                own = [self._places[kind][name].own.data for name in layout.names]
                names = [f"{kind}s.{name}" for name in layout.names]
                like = next((values[n] for n in names if n in values), own[0])
                pair.append(
                    layout.flatten(
                        values.get(n, o).detach().to(like) for n, o in zip(names, own, strict=True)
                    )
                )
            pairs.append(pair)
        self._build(pairs)

    def _build(self, flats: list[list[Tensor]]) -> None:
        """Makes flat tensors the memory of all leaves and views."""
        self._flats = [[whole(flat) for flat in pair] for pair in flats]
        for i, kind in enumerate(KINDS):
            objects: dict[str, tuple[Leaf, Part]] = {}
            for layout, keys, pair in zip(self._layouts, self._keys, self._flats, strict=True):
                leaf = self._flat_leaf(keys[i], pair[i]) if self.leaves == "flat" else None
                for j, part in enumerate(layout.parts):
                    objects[part.name] = self._own(kind, leaf, pair[i], j, layout), part
            if kind not in self._trees:
                ordered = {name: objects[name][0] for name in self._names}
                self._trees[kind] = plant(nn.Module(), ordered)
                if self.leaves == "named":
                    self._module.add_module(f"{kind}s", self._trees[kind])
            self._places[kind] = {}
            for name in self._names:
                path, _, key = name.rpartition(".")
                holder: Any = self._trees[kind].get_submodule(path)._parameters
                own, part = objects[name]
                holder[key] = own
                self._places[kind][name] = Place(holder, key, own, part)
        self._addresses = self._look()

    def _flat_leaf(self, key: str, flat: Tensor) -> Leaf:
        parameters: Any = self._module._parameters
        leaf = parameters.get(key)
        if isinstance(leaf, Leaf):
            leaf.adopt(flat)
        else:
            leaf = parameters[key] = Leaf(flat, leaf is None or leaf.requires_grad)
        return leaf

    def _own(self, kind: Kind, leaf: Leaf | None, flat: Tensor, index: int, layout: Layout) -> Leaf:
        """Returns the object of one parameter by name, the former if there is one."""
        part = layout.parts[index]
        if leaf is not None:
            place = self._places.get(kind, {}).get(part.name)
            if place is None:
                return NamedView(leaf, index, len(layout.parts), part)
            place.own.attach(leaf)  # type: ignore[attr-defined]
            return place.own
        tree = self._trees.get(kind)
        former = None if tree is None else tree.get_parameter(part.name)
        if isinstance(former, Leaf):
            former.adopt(alias(flat, part))
            return former
        return Leaf(alias(flat, part), former is None or former.requires_grad)

    def _look(self) -> list[int]:
        """Returns where the leaves' memory is."""
        if self.leaves == "flat":
            leaves = [self._module._parameters[key] for keys in self._keys for key in keys]
        else:
            leaves = [p.own for kind in KINDS for p in self._places[kind].values()]
        # What stands in a leaf's place for the time being need not have memory.
        return [leaf.data_ptr() if isinstance(leaf, Leaf) else 0 for leaf in leaves]

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _trees={}, _places={}, _flats=[], _addresses=[])
