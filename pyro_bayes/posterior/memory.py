"""The memory of a posterior: all means in one flat tensor, all log-variances in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pyro_bayes.base.fixed import FixedElements
from pyro_bayes.base.nested import plant
from pyro_bayes.base.torch_private import is_transformed
from pyro_bayes.posterior.fixed import Fixed
from pyro_bayes.posterior.layout import Flat, Layout, Part
from pyro_bayes.posterior.leaves import Join, Leaf, NamedView, alias, joined, whole
from pyro_bayes.posterior.rounding import Rounding, wide

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
    r"""Where :math:`\mu` and :math:`\log \sigma^2` are: flat tensors, a pair per dtype and device.

    With flat leaves, these are the parameters `mean` and `logvar` of a module (`mean_1`, … for
    further types), and a parameter by name is a view that shares its values and its gradient. With
    named leaves, the parameters by name are the leaves, in the same memory. What the base has in
    half precision is kept in single.

    Arguments:
        module: The module whose parameters they become.
        initial: The initial means, of the base's dtypes, and log-variances by dotted name.
        leaves: Which leaves to have.
        elements: Which elements carry no information.

    Attributes:
        means: A module of the means under the parameters' own names.
        logvars: A module of the log-variances, likewise.
        leaves: Which leaves there are.
        addresses: The address of each mean by name, where the base is to have it; 0 if empty.
        rounding: The parameters that the base has in lower precision.
        fixed: The elements that carry no information; `None` if there never are any.
    """

    addresses: dict[str, int]

    def __init__(
        self,
        module: nn.Module,
        initial: Mapping[str, tuple[Tensor, Tensor]],
        leaves: Leaves,
        elements: FixedElements | None = None,
    ) -> None:
        self.leaves, self._names = leaves, tuple(initial)
        # A reference to the module itself would be a cycle.
        self._parameters: dict[str, Any] = module._parameters
        self._modules: dict[str, Any] = module._modules
        types: dict[Any, dict[str, Tensor]] = {}
        for name, (mean, _) in initial.items():
            types.setdefault((mean.dtype, mean.device), {})[name] = mean
        self._layouts = [Layout(group) for group in types.values()]
        self.rounding = Rounding(self._layouts, [dtype for dtype, _ in types])
        self.fixed = Fixed(elements, self._layouts) if elements else None
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
        Elements that carry no information have no variance.

        Arguments:
            values: What to take instead of leaves, by the names that :meth:`stored` has for them.
        """
        if values is None and self._is_intact():
            return self.fixed.hold(self._intact) if self.fixed else self._intact
        if not torch.compiler.is_compiling() and self._has_moved():
            self.refresh()
        pairs = zip(self._layouts, self._keys, self._flats, strict=True)
        flats = [
            Flat(
                layout,
                self._flat(layout, "mean", keys[0], pair[0], values or {}),
                self._flat(layout, "logvar", keys[1], pair[1], values or {}),
            )
            for layout, keys, pair in pairs
        ]
        return self.fixed.hold(flats) if self.fixed else flats

    def by_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the mean and the log-variance of each parameter by name."""
        means, logvars = (self._places[kind] for kind in KINDS)
        pairs = {name: (means[name].present, logvars[name].present) for name in self._names}
        return self.fixed.hold_by_name(pairs) if self.fixed else pairs

    def stored(self) -> dict[str, nn.Parameter]:
        """Returns the leaves by the names that Pyro's param store has for them."""
        if self.leaves == "flat":
            return {key: self._parameters[key] for keys in self._keys for key in keys}
        return {
            f"{kind}s.{name}": place.holder[place.key]
            for kind in KINDS
            for name, place in self._places[kind].items()
        }

    def unlike(self) -> dict[str, Tensor]:
        """Returns the same memory by the names that the other kind of leaves has in the store."""
        if self.leaves == "named":
            pairs = zip(self._keys, self._flats, strict=True)
            return {k: flat for keys, pair in pairs for k, flat in zip(keys, pair, strict=True)}
        return {
            f"{kind}s.{name}": place.own
            for kind in KINDS
            for name, place in self._places[kind].items()
        }

    def parts(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """Splits a tensor of the shape of a leaf, such as its gradient, by parameter.

        Arguments:
            key: The name of the leaf, as in :meth:`stored`.
            value: The tensor.

        Returns:
            The parts by the names that named leaves have.
        """
        for layout, keys in zip(self._layouts, self._keys, strict=True):
            if self.leaves == "flat" and key in keys:
                kind = KINDS[keys.index(key)]
                pairs = zip(layout.names, layout.split(value), strict=True)
                return {f"{kind}s.{name}": part for name, part in pairs}
        return {key: value}

    def mean(self, name: str) -> Tensor:
        """Returns the mean of a parameter as the base has it, with a storage of its own.

        It is in the memory of the means or, in lower precision, of a rounded copy.
        """
        rounded = self.rounding.means.get(name)
        return self._places["mean"][name].own.data if rounded is None else rounded

    def _flat(
        self, layout: Layout, kind: Kind, key: str, memory: Tensor, values: Mapping[str, Tensor]
    ) -> Tensor:
        """Returns a flat tensor as a function of the leaves."""
        places = self._by_layout[layout, kind]
        # A compiler would take every view for an input.
        own = (self.leaves == "flat" and torch.compiler.is_compiling()) or all(
            [holder[key] is leaf for holder, key, leaf, _ in places]
        )
        if self.leaves == "flat":
            leaf: Any = self._parameters[key]
            if isinstance(leaf, Leaf) and leaf.frozen:
                leaf.check_frozen(layout.names)
            leaf = values.get(key, leaf)
            if own:
                return leaf  # type: ignore[no-any-return]
            pairs = zip(places, layout.split(leaf), strict=True)
            return layout.flatten(v if p.present is p.own else p.present for p, v in pairs)
        leaves = [holder[key] for holder, key, _, _ in places]
        if values:
            names = [f"{kind}s.{name}" for name in layout.names]
            leaves = [values.get(n, leaf) for n, leaf in zip(names, leaves, strict=True)]
            own = own and all(
                [v.data_ptr() == p.own.data_ptr() for v, p in zip(leaves, places, strict=True)]
            )
        if is_transformed() or not own:
            return layout.flatten(leaves)
        joined: Tensor = Join.apply(layout, memory, *leaves)
        return joined

    def take(self) -> None:
        """Takes over what was written to a base in lower precision, whose memory is its own."""
        if self._is_rounded():
            self.rounding.take()

    def show(self) -> None:
        """Rounds the means to where the base has them in lower precision."""
        if self._is_rounded():
            self.rounding.show()

    def _is_rounded(self) -> bool:
        if not self.rounding.dtypes or torch.compiler.is_compiling():  # then it comes later
            return False
        if self._has_moved():
            self.refresh()
        return True

    def converted_by(self, convert: Any) -> None:
        """Notes the dtypes that the base's parameters are about to have, by what converts them."""
        self.take()
        self.rounding.convert(convert, [mean for mean, _ in self._flats])

    # Keeping it whole

    def refresh(self) -> None:
        """Makes all of one memory again, after leaves were converted, loaded or replaced."""
        with torch.inference_mode(False), torch.no_grad():
            self._refresh()

    def _refresh(self) -> None:
        if self.leaves == "flat":
            for place in [place for places in self._places.values() for place in places.values()]:
                if place.present is not place.own:  # somebody put another there for good
                    place.own.data.copy_(place.present)
            self._build([[self._parameters[key].detach() for key in keys] for keys in self._keys])
            return
        self._trees = {kind: self._modules[f"{kind}s"] for kind in KINDS}
        named = {kind: dict(tree.named_parameters()) for kind, tree in self._trees.items()}
        flats = [
            [joined(layout, [named[kind][n].detach() for n in layout.names]) for kind in KINDS]
            for layout in self._layouts
        ]
        if any(p.is_cpu and p.is_shared() for p in named["mean"].values()):
            flats = [[flat.share_memory_() for flat in pair] for pair in flats]
        self._build(flats)

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Takes over values with their dtype and device.

        Arguments:
            values: The values by name, behind `"means."` or `"logvars."`; others stay.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._assign(values)

    def _assign(self, values: Mapping[str, Tensor]) -> None:
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
        self._flats = [[whole(flat.to(wide(flat.dtype))) for flat in pair] for pair in flats]
        self.rounding.follow([mean for mean, _ in self._flats])
        for i, kind in enumerate(KINDS):
            objects: dict[str, tuple[Leaf, Part]] = {}
            for layout, keys, pair in zip(self._layouts, self._keys, self._flats, strict=True):
                leaf = self._flat_leaf(keys[i], pair[i]) if self.leaves == "flat" else None
                for j, part in enumerate(layout.parts):
                    objects[part.name] = self._own(kind, leaf, pair[i], j, layout), part
            if kind not in self._trees:
                # Modules refuse to register views, which then take the places of these.
                vacant = {name: nn.Parameter(torch.empty(0)) for name in self._names}
                self._trees[kind] = plant(nn.Module(), vacant)
                if self.leaves == "named":
                    self._modules[f"{kind}s"] = self._trees[kind]
            self._places[kind] = {}
            for name in self._names:
                path, _, key = name.rpartition(".")
                holder: Any = self._trees[kind].get_submodule(path)._parameters
                own, part = objects[name]
                holder[key] = own
                self._places[kind][name] = Place(holder, key, own, part)
        self._by_layout = {
            (layout, kind): [self._places[kind][name] for name in layout.names]
            for layout in self._layouts
            for kind in KINDS
        }
        self._note_addresses()
        if self.fixed:
            self.fixed.place([pair[0].device for pair in self._flats])
        if self.leaves == "flat":
            leaves = {key: self._parameters[key] for keys in self._keys for key in keys}
            self._watched = [(key, leaf, leaf.data_ptr()) for key, leaf in leaves.items()]
            self._every_place = [p for places in self._by_layout.values() for p in places]
            pairs = zip(self._layouts, self._keys, strict=True)
            self._intact = [Flat(layout, *(leaves[key] for key in keys)) for layout, keys in pairs]

    def _flat_leaf(self, key: str, flat: Tensor) -> Leaf:
        leaf = self._parameters.get(key)
        if leaf is None:
            leaf = self._parameters[key] = Leaf(flat)
        leaf.__class__ = Leaf  # a pickle makes a plain parameter of it, which optimisers refer to
        leaf.adopt(flat)
        return leaf

    def _own(self, kind: Kind, leaf: Leaf | None, flat: Tensor, index: int, layout: Layout) -> Leaf:
        """Returns the object of one parameter by name, the former if there is one."""
        part = layout.parts[index]
        if leaf is not None:
            place = self._places.get(kind, {}).get(part.name)
            view = NamedView(leaf, index, len(layout.parts), part)
            # Whoever holds a former view still writes to this memory.
            if place is not None and isinstance(place.own, NamedView):
                former = [place.own, *place.own.former()]
                for other in former:
                    other.adopt(view.data)
                view.keep(former)
            return view
        tree = self._trees.get(kind)
        if tree is None:
            return Leaf(alias(flat, part))
        own: Any = tree.get_parameter(part.name)
        own.__class__ = Leaf  # as above
        own.adopt(alias(flat, part))
        return own  # type: ignore[no-any-return]

    def _is_intact(self) -> bool:
        """Tells whether flat leaves are all that counts, as they are in almost every step."""
        if self.leaves == "named" or torch.compiler.is_compiling():
            return False
        for key, leaf, where in self._watched:
            if self._parameters[key] is not leaf or leaf.data_ptr() != where or leaf.frozen:
                return False
        return all([holder[key] is own for holder, key, own, _ in self._every_place])

    def _has_moved(self) -> bool:
        """Tells whether the memory of any leaf is another than that of the posterior."""
        if self.leaves == "named":
            return any([leaf.data_ptr() != where for leaf, where in self._where])
        present = [(self._parameters[key], where) for key, where in self._where]
        # What stands in a leaf's place for the time being need not have memory.
        return any([isinstance(p, Leaf) and p.data_ptr() != where for p, where in present])

    def _note_addresses(self) -> None:
        self._where: list[Any] = []
        self.addresses = {}
        for layout, keys, pair in zip(self._layouts, self._keys, self._flats, strict=True):
            for kind, key, flat in zip(KINDS, keys, pair, strict=True):
                where = layout.addresses(flat)
                if self.leaves == "flat":
                    self._where.append((key, flat.data_ptr()))
                else:
                    own = [place.own for place in self._by_layout[layout, kind]]
                    self._where += zip(own, where, strict=True)
                if kind == "mean":
                    self.addresses.update(zip(layout.names, where, strict=True))
        rounded = self.rounding.means.items()
        self.addresses.update({name: mean.data_ptr() for name, mean in rounded})

    def __getstate__(self) -> dict[str, Any]:
        return dict(
            vars(self),
            _trees={},
            _places={},
            _flats=[],
            _by_layout={},
            _where=[],
            _watched=[],
            _every_place=[],
            _intact=[],
        )
