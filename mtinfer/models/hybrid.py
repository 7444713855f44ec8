"""Descriptor `hybrid`: the outputs of several descriptors side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..descriptor_kinds import kind_of
from ..errors import UnsupportedModelError
from ..inputs import GraphInputs, ParameterSpec
from .descriptor import Descriptor, DescriptorKind, InParts, Setting
from .dpa1 import DPA1
from .dpa2 import DPA2
from .dpa3 import DPA3
from .gather import Index, segment_sum
from .layers import Weights, required
from .layout import Argument, Layout, Pairs, Selection, at_once, is_too_much
from .se_e2_a import SeE2A
from .stage import Call, Keep, Tensors, joined

#: what the names of all members' weights begin with in a file
MEMBERS = "descriptor.descrpt_list."
#: kind of descriptor -> class, for all that stand on their own
SINGLE: dict[str, DescriptorKind] = {
    "se_e2_a": SeE2A,
    "se_atten": DPA1,
    "se_atten_v2": DPA1,
    "dpa2": DPA2,
    "dpa3": DPA3,
}

#: neighbour slots of all members whose centres are independent of each other: most in one call on a CPU, the
#: bytes that a GPU has in memory for each (an estimate, of attention), and those that are evaluated together
_LARGE = 100_000
_MEMORY = 38_000
_ENTRIES_OF_PART = 6144


class MemberCall(NamedTuple):
    """One evaluation of one member."""

    member: Descriptor
    #: what the names of its weights begin with
    prefix: str
    displacements: Tensors
    tensors: Tensors
    #: place of its centres among all atoms; None where they are all atoms, in order
    places: Index | None


@dataclass(frozen=True)
class Hybrid:
    """Descriptor `hybrid`.

    A graph holds each member once. Where a member with one weight group per centre type (se_e2_a) stands
    beside one with a single group, the graph holds it once per centre type, and an index puts the rows
    where the atoms are.
    """

    members: tuple[Descriptor, ...]
    n_types: int
    selection: Selection = field(repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], setting: Setting) -> Hybrid:
        """Read a descriptor configuration; always truncated, and so are its members."""
        members = tuple(
            _class(entry).from_config(entry, replace(setting, graph=False))
            for entry in required(config, "list", "hybrid")
        )
        if not members:
            raise UnsupportedModelError("a hybrid descriptor without members is not supported")
        defaults = {member.default_chg_spin for member in members if member.reads_charge_spin}
        if len(defaults) > 1:
            raise UnsupportedModelError(
                f"members of a hybrid with different default_chg_spin ({', '.join(map(str, defaults))}) "
                "are not supported"
            )
        sel = _slots(members)
        selection = Selection(
            len(setting.type_map),
            (sel,),
            pair_exclude=setting.pair_exclude,
            inner=tuple(_from_common_list(member, sel) for member in members),
            closes_gaps=setting.dialect != "pt",
        )
        return cls(members, len(setting.type_map), selection)

    @property
    def mixed_types(self) -> bool:
        """Whether one fitting net serves all types: as soon as one member has mixed types."""
        return any(member.mixed_types for member in self.members)

    @property
    def reads_charge_spin(self) -> bool:
        """Whether total charge and spin enter."""
        return any(member.reads_charge_spin for member in self.members)

    @property
    def default_chg_spin(self) -> tuple[float, float] | None:
        """Total charge and spin of structures that give none."""
        defaults = (m.default_chg_spin for m in self.members if m.reads_charge_spin)
        return next(defaults, None)

    @property
    def rcut(self) -> float:
        return float(max(member.rcut for member in self.members))

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""
        return sum(member.width for member in self.members)

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        return {
            member_name(i, name): spec
            for i, member in enumerate(self.members)
            for name, spec in member.parameters().items()
        }

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph: a single group, or one per centre type."""
        groups: list[dict[str, Tensor]] = [{} for _ in range(1 if self.mixed_types else self.n_types)]
        for i, member in enumerate(self.members):
            for c, own in enumerate(member.prepare(_renamed(weights, member_name(i, "descriptor.")))):
                prefix, group = (_part(i, c), groups[0]) if self.mixed_types else (_part(i, 0), groups[c])
                group |= {prefix + name.removeprefix("descriptor."): tensor for name, tensor in own.items()}
        return groups

    def _calls(self) -> Iterator[tuple[int, Descriptor, list[int]]]:
        """Position, member, and the centre types that it is called for one by one; [0] for all at once."""
        for i, member in enumerate(self.members):
            by_type = self.mixed_types and not member.mixed_types
            yield i, member, list(range(self.n_types)) if by_type else [0]

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph; see `__call__`."""
        displacements: list[Argument] = []
        tensors: list[Argument] = []
        for i, member, parts in self._calls():
            for c in parts:
                atoms = "atoms" if len(parts) == 1 else f"atoms of type {c}"
                for known, own in zip((displacements, tensors), member.arguments(), strict=True):
                    known += [_within_member(argument, i, c, atoms) for argument in own]
                if len(parts) > 1:
                    tensors += [Argument((axis,), torch.int64) for axis in (atoms, atoms, "atoms")]
        return displacements, tensors

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """One call for all centres, or one per centre type, whatever `split`."""
        own = [
            member.layouts(inputs, listed, split=False)
            for member, listed in zip(self.members, pairs.inner, strict=True)
        ]
        if not self.mixed_types:
            return [_joined(parts, parts[0].atoms) for parts in zip(*own, strict=True)]
        atoms = torch.arange(inputs.n_atoms, device=inputs.types.device)
        joined = []
        for (_, _, parts), layouts in zip(self._calls(), own, strict=True):
            if len(parts) > 1:
                layouts = [
                    replace(part, tensors=(*part.tensors, *Index.of(part.atoms, inputs.n_atoms)))
                    for part in layouts
                ]
            joined.append(_joined(layouts, atoms))
        return [replace(_joined(joined, atoms), group=0)]

    def __call__(self, displacements: Tensors, tensors: Tensors, weights: Weights) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre.

        Parameters
        ----------
        displacements, tensors
            those of every member in turn; of a member that is called once per centre type, those of every
            call, each followed by the `Index` of its centres among all atoms.

        Returns
        -------
        descriptor, shape (n, width), float64, and types, shape (n,)
        """

        def describe(call: MemberCall, own: Weights) -> tuple[Tensor, Tensor]:
            return call.member(call.displacements, call.tensors, own)

        return self._evaluate(displacements, tensors, weights, describe)

    def is_large(self, layout: Layout) -> bool:
        """Whether one call of the graph would take too much memory."""
        calls = list(itertools.chain(*self._divided(layout.displacements, layout.tensors)))
        slots = [
            array.shape[0] * array.shape[1]
            for call in calls
            for array in call.displacements
            if not isinstance(call.member, InParts)
        ]
        return is_too_much(sum(slots), _LARGE, _MEMORY, layout.atoms.device) or any(
            call.member.is_large(replace(layout, displacements=call.displacements, tensors=call.tensors))
            for call in calls
            if isinstance(call.member, InParts)
        )

    def in_parts(
        self, displacements: Tensors, tensors: Tensors, weights: Weights, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Do what `__call__` does, each member stage by stage."""
        return self._evaluate(displacements, tensors, weights, partial(_in_parts, by=call))

    def _divided(self, displacements: Tensors, tensors: Tensors) -> list[list[MemberCall]]:
        """Calls of each member."""
        vectors, values = iter(displacements), iter(tensors)
        divided = []
        for i, member, parts in self._calls():
            n_vectors, n_values = (len(own) for own in member.arguments())
            calls = []
            for c in parts:
                own_vectors = tuple(next(vectors) for _ in range(n_vectors))
                own_values = tuple(next(values) for _ in range(n_values))
                places = Index(*(next(values) for _ in Index._fields)) if len(parts) > 1 else None
                calls.append(MemberCall(member, _part(i, c), own_vectors, own_values, places))
            divided.append(calls)
        return divided

    def _evaluate(
        self,
        displacements: Tensors,
        tensors: Tensors,
        weights: Weights,
        describe: Callable[[MemberCall, Weights], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        outputs, types = [], torch.empty(0, dtype=torch.int64)
        for calls in self._divided(displacements, tensors):
            features = []
            for call in calls:
                result, of_rows = describe(call, _renamed(weights, call.prefix))
                result = result.to(torch.float64)
                if call.places is None:
                    types = of_rows
                else:
                    result = segment_sum(result, call.places)
                features.append(result)
            outputs.append(sum(features[1:], features[0]))
        return torch.cat(outputs, dim=1), types


@dataclass(frozen=True)
class Independent:
    """Stage that evaluates centres of a member which read nothing of other centres."""

    member: Descriptor

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Those of the member."""
        return self.member.arguments()

    def outputs(self) -> list[Argument]:
        """Descriptor of the member."""
        return [Argument(("atoms", self.member.width))]

    def kept(self) -> list[Argument]:
        """Nothing."""
        return []

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors:
        """Evaluate on weights as the member's `prepare` makes them."""
        features, _ = self.member(varied, fixed, weights)
        return (features.to(torch.float64),)


def _in_parts(call: MemberCall, weights: Weights, by: Call) -> tuple[Tensor, Tensor]:
    if isinstance(call.member, InParts):
        return call.member.in_parts(call.displacements, call.tensors, weights, by)
    types = call.tensors[0]
    n_slots = max(1, sum(array.shape[1] for array in call.displacements))
    n_rows = max(1, at_once(_ENTRIES_OF_PART, types.device) // n_slots)
    varied = zip(*(array.split(n_rows) for array in call.displacements), strict=True)
    fixed = zip(*(array.split(n_rows) for array in call.tensors), strict=True)
    stage = Independent(call.member)
    return joined([by(stage, *part, weights)[0] for part in zip(varied, fixed, strict=True)]), types


def _class(config: Mapping[str, Any]) -> DescriptorKind:
    kind = kind_of(config)
    if kind not in SINGLE:
        raise UnsupportedModelError(
            f"member {kind!r} of a hybrid descriptor is not supported; "
            f"supported are {', '.join(sorted(SINGLE))}"
        )
    return SINGLE[kind]


def _slots(members: Sequence[Descriptor]) -> int:
    """Length of the common neighbour list."""
    sels = [member.selection.sel or () for member in members]  # never None: members truncate
    if any(member.mixed_types for member in members):
        return int(max(sum(sel) for sel in sels))
    return int(sum(map(max, zip(*sels, strict=True))))


def _from_common_list(member: Descriptor, sel: int) -> Selection:
    """Selection of a member, cut from the common list, which reaches as far as the longest cutoff."""
    selection = member.selection
    # DPA-2 drops what lies beyond its cutoff; in other members it takes the place of an empty slot
    return replace(
        selection,
        rcut=member.rcut,
        keeps_beyond=not isinstance(member, DPA2),
        total=sel if selection.by_type else None,
    )


def member_name(i: int, name: str) -> str:
    """Name in a file of what member `i` calls `name`, a weight or the prefix of some."""
    return f"{MEMBERS}{i}{name.removeprefix('descriptor')}"


def _part(i: int, c: int) -> str:
    """Prefix of a member's weights in the graph, for centre type `c` where it has a group per type."""
    return member_name(i, f"descriptor.part.{c}.")


def _renamed(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Weights of one member, named as if it stood alone."""
    return {
        "descriptor." + name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _within_member(argument: Argument, i: int, c: int, atoms: str) -> Argument:
    """Rename the axes of a member's argument so that only the atoms are those of other members."""
    names = {"atoms": atoms}
    axes = (
        names.get(axis, f"{axis} of member {i}, part {c}") if isinstance(axis, str) else axis
        for axis in argument.axes
    )
    return replace(argument, axes=tuple(axes))


def _joined(layouts: Sequence[Layout], atoms: Tensor) -> Layout:
    """Arguments of several layouts one after the other."""
    return Layout(
        group=layouts[0].group,
        displacements=tuple(array for layout in layouts for array in layout.displacements),
        tensors=tuple(tensor for layout in layouts for tensor in layout.tensors),
        blocks=tuple(block for layout in layouts for block in layout.blocks),
        atoms=atoms,
    )
