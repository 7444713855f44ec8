"""DPA-3: repflow layers over atoms, pairs and angles.

Zhang et al., arXiv:2506.01686.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import GraphInputs, ParameterSpec
from .activations import activation, known_activation
from .descriptor import Setting
from .environment import TypeEmbedding
from .gather import Index, lookup
from .layers import Weights, precision, required
from .layout import Argument, Layout, Pairs, Selection, at_once, is_too_much, ranks
from .repflow import Division, Repflow, RepflowOptions
from .repflow_layer import Lists
from .stage import Call, directly

#: what the tables of charges and of spins have rows for
CHARGES, SPINS = range(-100, 100), range(100)
#: numbers that the layers of one graph may keep for the derivative on a CPU
_LARGE = 5e7
#: numbers that a GPU has in memory at once for each of those (measured: 2.1)
_MEMORY = 2.5
#: edges and angles that are evaluated together where everything is too much
_ENTRIES_OF_PART = 40_000


@dataclass(frozen=True)
class DPA3:
    """Descriptor `dpa3`. Its graph arguments are those of `layouts`."""

    type_embedding: TypeEmbedding
    repflow: Repflow
    concat_output_tebd: bool
    reads_charge_spin: bool
    default_chg_spin: tuple[float, float] | None = field(repr=False)
    selection: Selection = field(repr=False)

    mixed_types = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], setting: Setting) -> DPA3:
        """Read a descriptor configuration; always truncated."""
        options = RepflowOptions.from_config(required(config, "repflow", "dpa3"))
        n_types, pt = len(setting.type_map), setting.dialect == "pt"
        dtype = precision(config.get("precision", "default"))
        default = config.get("default_chg_spin")
        edges = Selection(
            n_types,
            (options.e_sel,),
            exclude=tuple((a, b) for a, b in config.get("exclude_types") or ()),
            pair_exclude=setting.pair_exclude,
            closes_gaps=not pt,
        )
        angles = replace(edges, sel=(options.a_sel,), rcut=options.a_rcut)
        return cls(
            type_embedding=TypeEmbedding(
                "descriptor.type_embedding",
                n_types,
                options.n_dim,
                bool(config.get("use_tebd_bias", False)),
                dtype,
                bool(config.get("use_econf_tebd", False)),
                setting.type_map,
            ),
            repflow=Repflow(
                options,
                n_types,
                known_activation(config.get("activation_function", "silu"), of_messages=not pt),
                float(config.get("env_protection", 0.0)),
                dtype,
            ),
            concat_output_tebd=bool(config.get("concat_output_tebd", False)),
            reads_charge_spin=bool(config.get("add_chg_spin_ebd", False)),
            default_chg_spin=None if default is None else (float(default[0]), float(default[1])),
            selection=replace(edges, inner=(angles,) if options.update_angle else ()),
        )

    @property
    def rcut(self) -> float:
        return self.repflow.options.e_rcut

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""
        return self.repflow.options.n_dim * (2 if self.concat_output_tebd else 1)

    def _table(self, name: str, n_rows: int) -> TypeEmbedding:
        return TypeEmbedding(
            f"descriptor.{name}", n_rows, self.repflow.options.n_dim, False, self.repflow.dtype
        )

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        specs = self.type_embedding.parameters() | self.repflow.parameters()
        if self.reads_charge_spin:
            n = self.repflow.options.n_dim
            specs |= self._table("chg_embedding", len(CHARGES)).parameters()
            specs |= self._table("spin_embedding", len(SPINS)).parameters()
            specs["descriptor.mix_cs_mlp.w"] = ParameterSpec((2 * n, n), self.repflow.dtype)
            specs["descriptor.mix_cs_mlp.b"] = ParameterSpec((n,), self.repflow.dtype)
        return specs

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph, in the single group of this descriptor."""
        prepared = {"descriptor.type_embedding": self.type_embedding.rows(weights)}
        if self.reads_charge_spin:
            of_charge, of_spin = weights["descriptor.mix_cs_mlp.w"].chunk(2)
            charge = self._table("chg_embedding", len(CHARGES)).rows(weights) @ of_charge
            spin = self._table("spin_embedding", len(SPINS)).rows(weights) @ of_spin
            prepared["descriptor.charge"] = charge + weights["descriptor.mix_cs_mlp.b"]
            prepared["descriptor.spin"] = spin
        return [prepared | self.repflow.prepare(weights)]

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph; see `__call__`."""
        index = torch.int64
        tensors = [Argument(("atoms",), index)]
        if self.reads_charge_spin:
            tensors.append(Argument(("atoms", 2), index))
        return [Argument(("edges", 3))], [*tensors, *Lists.arguments(nearby="atoms")]

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """Flat lists of all edges and of all angles, in one call whatever `split`."""
        lists = Lists(
            Index.of(pairs.centers, inputs.n_atoms, ascending=True),
            Index.of(pairs.neighbors, inputs.n_atoms),
            *_angle_lists(self._near_edges(inputs, pairs), pairs.centers, inputs.n_atoms),
        )
        own = [self._rows_of_tables(inputs)] if self.reads_charge_spin else []
        return [
            Layout(
                group=0,
                displacements=(inputs.displacements[pairs.edges],),
                tensors=(inputs.types, *own, *lists.tensors),
                blocks=(pairs.edges,),
                atoms=torch.arange(inputs.n_atoms, device=inputs.types.device),
            )
        ]

    def _near_edges(self, inputs: GraphInputs, pairs: Pairs) -> Tensor:
        """Edges that form angles, ascending, shape (n_near,); the angle cutoff itself is outside."""
        near = torch.zeros_like(inputs.centers, dtype=torch.bool)
        for nearest in pairs.inner:
            r = torch.linalg.vector_norm(inputs.displacements[nearest.edges], dim=-1)
            near[nearest.edges] = r < self.repflow.options.a_rcut
        return near[pairs.edges].nonzero().squeeze(1)

    def _rows_of_tables(self, inputs: GraphInputs) -> Tensor:
        """Rows of the charge and the spin table of every atom, shape (n_atoms, 2)."""
        rows = inputs.charge_spin - inputs.charge_spin.new_tensor([CHARGES.start, SPINS.start])
        return rows.to(torch.int64)[inputs.frames]

    def __call__(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre.

        Parameters
        ----------
        displacements
            one array, shape (n_edges, 3), Å.
        tensors
            types (n,); with charge and spin their rows (n, 2); then the members of `Lists`.

        Returns
        -------
        descriptor, shape (n, width), and types, shape (n,)
        """
        division = Division((self._lists(tensors),))
        return self._evaluate(displacements[0], tensors, division, weights, directly)

    def is_large(self, layout: Layout) -> bool:
        """Whether what all layers keep for the derivative is too much for one call of the graph."""
        o = self.repflow.options
        n_angles = self._lists(layout.tensors).first.rows.shape[0]
        n_edges = layout.displacements[0].shape[0]
        kept = (n_angles * (o.a_dim + o.e_dim) + n_edges * (o.e_dim + o.n_dim)) * o.nlayers
        return is_too_much(kept, _LARGE, _MEMORY * self.repflow.dtype.itemsize, layout.atoms.device)

    def in_parts(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Do what `__call__` does layer after layer, and in a layer some centres after the others."""
        division = Division.of(self._lists(tensors), at_once(_ENTRIES_OF_PART, displacements[0].device))
        return self._evaluate(displacements[0], tensors, division, weights, call)

    def _lists(self, tensors: tuple[Tensor, ...]) -> Lists:
        return Lists.of(tensors[1 + self.reads_charge_spin :])

    def _evaluate(
        self,
        displacements: Tensor,
        tensors: tuple[Tensor, ...],
        division: Division,
        weights: Weights,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        types = tensors[0]
        node = lookup(weights["descriptor.type_embedding"], types)
        if self.reads_charge_spin:
            rows = tensors[1]
            charge, spin = (weights[f"descriptor.{name}"] for name in ("charge", "spin"))
            mixed = lookup(charge, rows[:, 0]) + lookup(spin, rows[:, 1])
            node = node + activation(self.repflow.activation)(mixed)
        features = self.repflow(displacements.to(self.repflow.dtype), types, node, division, weights, call)
        return torch.cat([features, node], dim=1) if self.concat_output_tebd else features, types


def _angle_lists(near: Tensor, centers: Tensor, n_atoms: int) -> list[Index]:
    """Last four members of `Lists`, from the edges (n_near,) that form angles and the centres of all edges.

    The angles of one centre with n near edges are a dense block of n x n ordered pairs, first edge slow, so
    that the transposed order follows without sorting.
    """
    near_centers = centers[near]
    counts = torch.bincount(near_centers, minlength=n_atoms)
    n_partners = counts[near_centers]
    starts = torch.cumsum(n_partners, 0) - n_partners
    n_near = near.shape[0]
    edges = torch.arange(n_near, device=near.device)
    rank = ranks(near_centers, n_atoms)
    first = torch.repeat_interleave(n_partners)  # edge k as often as it has partners
    order = torch.arange(first.shape[0], device=near.device)
    # partner k of an edge is the edge of rank k of its centre
    second = order + (edges - rank - starts).index_select(0, first)
    transposed = starts.index_select(0, second) + rank.index_select(0, first)
    return [
        Index.of(near, centers.shape[0], ascending=True),
        Index.of(near_centers, n_atoms, ascending=True),
        Index(first, order, starts),
        Index(second, transposed, starts),
    ]
