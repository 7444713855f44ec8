"""DPA-2: a type-aware first stage over the long cutoff, message passing over a short one.

Zhang et al., npj Comput. Mater. 10, 293 (2024), arXiv:2312.15492.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import GraphInputs, ParameterSpec
from .activations import known_activation
from .descriptor import Setting
from .dpa1 import DPA1, Centers
from .environment import Environment, TypeEmbedding
from .gather import Index, lookup
from .layers import Weights, precision, required
from .layout import (
    EMPTY_BEYOND,
    Argument,
    Layout,
    Pairs,
    Selection,
    VectorsOnSlots,
    at_once,
    is_too_much,
    on_slots,
    padded_rows,
    with_empty,
)
from .repformer import BLOCK, Division, Repformer, RepformerOptions
from .stage import Call, Keep, Tensors, directly, joined
from .three_body import ThreeBody

#: keys of section `repinit` that have a default in the format
REPINIT_DEFAULTS = {
    "neuron": (25, 50, 100),
    "axis_neuron": 16,
    "tebd_dim": 8,
    "tebd_input_mode": "concat",
    "activation_function": "tanh",
    "resnet_dt": False,
    "type_one_side": False,
    "use_three_body": False,
    "three_body_neuron": (2, 4, 8),
    "three_body_sel": 40,
    "three_body_rcut": 4.0,
    "three_body_rcut_smth": 0.5,
}


#: entries of the attention maps of all layers that one graph may keep on a CPU
_LARGE = 2e6
#: numbers that a GPU has in memory at once for each of those (measured: 10 to 13)
_MEMORY = 15
#: pairs of slots that are evaluated together where everything is too much
_ENTRIES_OF_PART = 80_000


class Given(NamedTuple):
    """Further arguments of a call."""

    #: centres of the first stage
    repinit: Centers
    #: (n, m), the atom in each slot of the repformer
    neighbors: Index
    #: (n, m) bool, slots of centres that have more neighbours than slots; None where the model never has such
    saturated: Tensor | None
    #: (n, m), types of the neighbours in the three-body block; None without it
    types_of_pairs: Tensor | None

    @classmethod
    def of(cls, model: DPA2, tensors: Tensors) -> Given:
        """Name the tensors of a call."""
        given = iter(tensors)
        return cls(
            Centers(*itertools.islice(given, len(Centers._fields))),
            Index(*itertools.islice(given, len(Index._fields))),
            next(given) if model.can_overflow else None,
            next(given) if model.three_body is not None else None,
        )

    @property
    def tensors(self) -> Tensors:
        """All, in the order of a call."""
        at_hand = (x for x in (self.saturated, self.types_of_pairs) if x is not None)
        return (*self.repinit, *self.neighbors, *at_hand)

    @property
    def before_repformer(self) -> Tensors:
        """What the first stage and the three-body block read."""
        return (*self.repinit, *(() if self.types_of_pairs is None else (self.types_of_pairs,)))


@dataclass(frozen=True)
class DPA2:
    """Descriptor `dpa2`. Its graph arguments are those of `layouts`."""

    repinit: DPA1
    three_body: ThreeBody | None
    repformer: Repformer
    add_type_to_repinit: bool
    concat_output_tebd: bool
    dtype: torch.dtype
    selection: Selection = field(repr=False)
    #: keeps all neighbours, so that smooth attention may see more of them than it has slots
    can_overflow: bool

    mixed_types = True
    reads_charge_spin = False
    default_chg_spin = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], setting: Setting) -> DPA2:
        """Read a descriptor configuration; missing keys get the defaults of the format.

        `pt_expt` closes the gaps of excluded pairs before it cuts the shorter lists.
        """
        pt = setting.dialect == "pt"
        section = REPINIT_DEFAULTS | dict(required(config, "repinit", "dpa2"))
        options = RepformerOptions.from_config(required(config, "repformer", "dpa2"))
        function = known_activation(options.activation_function, of_messages=not pt)
        options = replace(options, activation_function=function)
        dtype = precision(config.get("precision", "default"))
        smooth = bool(config.get("smooth", True))
        # upstream keeps the truncated list where an empty slot could count
        zero_mean = all(config[name].get("set_davg_zero", True) for name in ("repinit", "repformer"))
        graph = setting.graph and zero_mean and not section["use_three_body"]
        repinit = _repinit(config, section, replace(setting, graph=graph))
        three_body = _three_body(section, repinit, smooth) if section["use_three_body"] else None
        protection = repinit.environment.protection
        repformer = Repformer(
            options,
            repinit.n_types,
            Environment(float(options.rcut), float(options.rcut_smth), protection),
            smooth,
            dtype,
        )
        blocks = [(options.rcut, options.nsel)]
        if three_body is not None:
            blocks.append((three_body.environment.rcut, three_body.sel))
        inner = tuple(
            replace(repinit.selection, sel=None if graph else (int(sel),), rcut=float(rcut))
            for rcut, sel in blocks
        )
        return cls(
            repinit=repinit,
            three_body=three_body,
            repformer=repformer,
            add_type_to_repinit=bool(config.get("add_tebd_to_repinit_out", False)),
            concat_output_tebd=bool(config.get("concat_output_tebd", True)),
            dtype=dtype,
            selection=replace(repinit.selection, inner=inner, closes_gaps=not pt),
            can_overflow=graph and smooth,
        )

    @property
    def rcut(self) -> float:
        return self.repinit.rcut

    @property
    def type_embedding(self) -> TypeEmbedding:
        """Shared by all blocks."""
        return self.repinit.type_embedding

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""
        width = self.repformer.options.g1_dim
        return width + self.type_embedding.width if self.concat_output_tebd else width

    @property
    def _width_before_transform(self) -> int:
        return self.repinit.width + (self.three_body.width if self.three_body is not None else 0)

    @property
    def is_transformed(self) -> bool:
        """Whether a linear map stands between the first stage and the repformer."""
        return self._width_before_transform != self.repformer.options.g1_dim

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        g1_dim = self.repformer.options.g1_dim
        specs = self.repinit.parameters() | self.repformer.parameters()
        if self.three_body is not None:
            specs |= self.three_body.parameters()
        if self.is_transformed:
            shape = (self._width_before_transform, g1_dim)
            specs["descriptor.g1_shape_tranform.w"] = ParameterSpec(shape, self.dtype)
        if self.add_type_to_repinit:
            shape = (self.type_embedding.width, g1_dim)
            specs["descriptor.tebd_transform.w"] = ParameterSpec(shape, self.dtype)
        return specs

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph, in the single group of this descriptor."""
        (prepared,) = self.repinit.prepare(weights)
        embedding = prepared["descriptor.type_embedding"]
        prepared |= self.repformer.prepare(weights)
        if self.three_body is not None:
            prepared |= self.three_body.prepare(weights, embedding)
        if self.is_transformed:
            prepared["descriptor.g1_shape_tranform.w"] = weights["descriptor.g1_shape_tranform.w"]
        if self.add_type_to_repinit:
            prepared["descriptor.type_shift"] = embedding @ weights["descriptor.tebd_transform.w"]
        return [prepared]

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph; see `__call__`."""
        displacements, tensors = self.repinit.arguments()
        displacements.append(Argument(("atoms", "near slots", 3)))
        tensors += [
            Argument(("atoms", "near slots"), torch.int64),
            Argument(("near slots of all atoms",), torch.int64),
            Argument(("atoms",), torch.int64),
        ]
        if self.can_overflow:
            tensors.append(Argument(("atoms", "near slots"), torch.bool))
        if self.three_body is not None:
            displacements.append(Argument(("atoms", "slots of pairs", 3)))
            tensors.append(Argument(("atoms", "slots of pairs"), torch.int64))
        return displacements, tensors

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """One call for all centres: a padded neighbour matrix per block.

        With `split` the centres come in the order of their number of neighbours in the repformer, so that
        parts (`in_parts`) have few empty slots.
        """
        in_order = torch.arange(inputs.n_atoms, device=inputs.types.device)
        atoms = torch.argsort(pairs.inner[0].counts, stable=True) if split else in_order
        row = torch.empty_like(atoms).index_copy_(0, atoms, in_order)
        (layout,) = self.repinit.matrices(inputs, pairs, [atoms])
        layout, neighbors = _extended(layout, inputs, pairs.inner[0], self.repformer.environment.rcut)
        neighbors = row[neighbors]
        given = Given(
            Centers(*layout.tensors),
            Index.of(neighbors.flatten(), inputs.n_atoms)._replace(rows=neighbors),
            self.repformer.saturated(layout.displacements[1]) if self.can_overflow else None,
            None,
        )
        if self.three_body is not None:
            layout, neighbors = _extended(layout, inputs, pairs.inner[1], self.three_body.environment.rcut)
            given = given._replace(types_of_pairs=inputs.types[neighbors])
        return [replace(layout, tensors=given.tensors)]

    def __call__(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre.

        Parameters
        ----------
        displacements
            one array per block, shape (n, m, 3), Å.
        tensors
            members of `Given`, one after the other.

        Returns
        -------
        descriptor, shape (n, width), and types, shape (n,)
        """
        given = Given.of(self, tensors)
        return self._evaluate(displacements, given, Division(None, (given.neighbors,)), weights, directly)

    def is_large(self, layout: Layout) -> bool:
        """Whether what all layers keep for the derivative is too much for one call of the graph."""
        o = self.repformer.options
        n, m, _ = layout.displacements[1].shape
        n_bytes = _MEMORY * self.dtype.itemsize
        return is_too_much(n * m * m * o.attn2_nhead * o.nlayers, _LARGE, n_bytes, layout.atoms.device)

    def in_parts(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Do what `__call__` does layer after layer, and in a layer some centres after the others."""
        n_filled = _n_filled(displacements[1], self.repformer.environment.rcut)
        n_entries = at_once(_ENTRIES_OF_PART, n_filled.device)
        given = Given.of(self, tensors)
        division = Division.of(given.neighbors.rows, n_filled, n_entries)
        return self._evaluate(displacements, given, division, weights, call)

    def _evaluate(
        self,
        displacements: tuple[Tensor, ...],
        given: Given,
        division: Division,
        weights: Weights,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        far, near, *of_pairs = (array.to(self.dtype) for array in displacements)
        before = BeforeRepformer(self, in_parts=division.sizes is not None)
        mine = {name: weights[name] for name in weights if before.reads(name)}
        varied = zip(*map(division.of_centers, (far, *of_pairs)), strict=True)
        fixed = zip(*map(division.of_centers, given.before_repformer), strict=True)
        parts = list(zip(varied, fixed, strict=True))
        if division.sizes is not None:
            parts = [before.without_empty_slots(*part) for part in parts]
        g1 = joined([call(before, *part, mine)[0] for part in parts])
        types = given.repinit.types
        g1 = self.repformer(g1, types, near, division, given.saturated, weights, call)
        if self.concat_output_tebd:
            g1 = torch.cat([g1, lookup(weights["descriptor.type_embedding"], types)], dim=1)
        return g1, types


@dataclass(frozen=True)
class BeforeRepformer:
    """Stage that makes the first node features; no centre needs another one."""

    model: DPA2
    #: keeps the moment, and none of the pair features
    in_parts: bool

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Those of `DPA1`; further the displacements and types of the three-body block."""
        displacements, tensors = self.model.repinit.arguments()
        if self.model.three_body is not None:
            displacements.append(Argument(("atoms", "slots of pairs", 3)))
            tensors.append(Argument(("atoms", "slots of pairs"), torch.int64))
        return [replace(argument, dtype=self.model.dtype) for argument in displacements], tensors

    def outputs(self) -> list[Argument]:
        """g1 before its first activation."""
        return [Argument(("atoms", self.model.repformer.options.g1_dim), self.model.dtype)]

    def kept(self) -> list[Argument]:
        """Moment of the neighbours."""
        repinit = self.model.repinit
        if not self.in_parts:
            return []
        return [Argument(("atoms", 4, repinit.pair_network.neuron[-1]), repinit.dtype)]

    def reads(self, name: str) -> bool:
        """Whether it reads the weight of this name."""
        return name.startswith("descriptor.") and not name.startswith(BLOCK)

    def without_empty_slots(self, varied: Tensors, fixed: Tensors) -> tuple[Tensors, Tensors]:
        """Arguments with as many slots as the centres fill at most."""
        (far, *of_pairs), (centers, *types_of_pairs) = varied, _with_centers(fixed)
        width = _width(far, self.model.rcut)
        centers = centers._replace(pair=centers.pair[:, :width])
        far = far[:, :width]
        if self.model.three_body is not None:
            width = _width(of_pairs[0], self.model.three_body.environment.rcut)
            of_pairs, types_of_pairs = ([x[:, :width] for x in own] for own in (of_pairs, types_of_pairs))
        return (far, *of_pairs), (*centers, *types_of_pairs)

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors:
        """Evaluate on weights as `DPA2.prepare` makes them."""
        (far, *of_pairs), (centers, *types_of_pairs) = varied, _with_centers(fixed)
        model = self.model
        g1, types = model.repinit((far,), centers, weights, keep if self.in_parts else None)
        if model.three_body is not None:
            g1 = torch.cat([g1, model.three_body(types, of_pairs[0], types_of_pairs[0], weights)], dim=1)
        if model.is_transformed:
            g1 = g1 @ weights["descriptor.g1_shape_tranform.w"]
        if model.add_type_to_repinit:
            g1 = g1 + lookup(weights["descriptor.type_shift"], types)
        return (g1,)


def _with_centers(tensors: Tensors) -> tuple[Centers, *Tensors]:
    """Name what the first stage reads."""
    n = len(Centers._fields)
    return (Centers(*tensors[:n]), *tensors[n:])


def _repinit(config: Mapping[str, Any], section: Mapping[str, Any], setting: Setting) -> DPA1:
    """Build the first stage: a DPA-1 without attention that keeps its type embedding to itself."""
    common = ("precision", "exclude_types", "env_protection", "use_econf_tebd", "use_tebd_bias")
    described = {key: config[key] for key in common if key in config} | dict(section)
    described |= {
        "sel": int(required(section, "nsel", "dpa2 repinit")),
        "attn_layer": 0,
        "smooth_type_embedding": bool(config.get("smooth", True)),
        "concat_output_tebd": False,
    }
    return DPA1.from_config(described, setting, block="descriptor.repinit")


def _three_body(section: Mapping[str, Any], repinit: DPA1, smooth: bool) -> ThreeBody:
    return ThreeBody(
        n_types=repinit.n_types,
        sel=int(section["three_body_sel"]),
        environment=Environment(
            float(section["three_body_rcut"]),
            float(section["three_body_rcut_smth"]),
            repinit.environment.protection,
        ),
        neuron=tuple(section["three_body_neuron"]),
        activation=repinit.pair_network.activation,
        resnet_dt=repinit.pair_network.resnet_dt,
        dtype=repinit.dtype,
        tebd_dim=repinit.type_embedding.width,
        strip=repinit.pair_network.strip,
        smooth=smooth,
    )


def _extended(layout: Layout, inputs: GraphInputs, pairs: Pairs, rcut: float) -> tuple[Layout, Tensor]:
    """Append the padded displacements of a further block; also return its neighbours, shape (n, m).

    An empty slot names its centre: sums over them all in one row would be the work of one thread of a GPU.
    """
    slots = padded_rows(pairs.counts, layout.atoms)
    displacements, edges = VectorsOnSlots(inputs.displacements, pairs.edges, rcut)(slots)
    layout = replace(
        layout,
        displacements=(*layout.displacements, displacements),
        blocks=(*layout.blocks, edges),
    )
    neighbors = on_slots(with_empty(pairs.neighbors, -1), slots)
    return layout, torch.where(neighbors < 0, layout.atoms.unsqueeze(1), neighbors)


def _n_filled(displacements: Tensor, rcut: float) -> Tensor:
    """Leading slots that hold a neighbour, shape (n, m, 3) -> (n,)."""
    return (displacements[..., 0] < EMPTY_BEYOND * rcut).sum(1)


def _width(displacements: Tensor, rcut: float) -> int:
    return max(1, int(_n_filled(displacements, rcut).max()))
