"""Repflow block of DPA-3: its options, its weights, and the way from displacements to node features.

Zhang et al., arXiv:2506.01686 (DPA-3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..inputs import ParameterSpec
from .activations import activation
from .environment import statistics_parameters
from .gather import Index, gather, settled
from .layers import Weights, check_axis_neuron, check_update_style, safe_norm, switch, without_prefix
from .layout import Argument
from .repflow_layer import Lists, RepflowLayer, Surroundings
from .stage import Call, Keep, Nearby, Tensors, joined, pieces

BLOCK = "descriptor.repflows"
_GEOMETRY = f"{BLOCK}.geometry."
_PAIRS = ("node_edge_linear", "edge_self_linear")
_TRIPLES = ("edge_angle_linear1", "angle_self_linear")
#: older names of options
ALIASES = {"edge_use_dist": "edge_init_use_dist", "use_env_envelope": "use_exp_switch"}


@dataclass(frozen=True)
class RepflowOptions:
    """Section `repflow` of a configuration; names and defaults are those of the format."""

    n_dim: int = 128
    e_dim: int = 64
    a_dim: int = 64
    nlayers: int = 6
    e_rcut: float = 6.0
    e_rcut_smth: float = 5.0
    e_sel: int = 120
    a_rcut: float = 4.0
    a_rcut_smth: float = 3.5
    a_sel: int = 20
    a_compress_rate: int = 0
    a_compress_e_rate: int = 1
    a_compress_use_split: bool = False
    n_multi_edge_message: int = 1
    axis_neuron: int = 4
    update_angle: bool = True
    update_style: str = "res_residual"
    smooth_edge_update: bool = False
    edge_init_use_dist: bool = False
    use_exp_switch: bool = False
    use_dynamic_sel: bool = False
    sel_reduce_factor: float = 10.0
    sequential_update: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the section; keys without a numerical role are passed over.

        Raises
        ------
        UnsupportedModelError
            For an unknown `update_style`, and for combinations that the format does not define.
        """
        config = {ALIASES.get(key, key): value for key, value in config.items()}
        options = cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})
        check_update_style(options.update_style, "repflow")
        for width in (options.n_dim, options.e_dim):
            check_axis_neuron(options.axis_neuron, width, "repflow")
        for taken, width in zip(options.compressed, (options.n_dim, options.e_dim), strict=True):
            if options.update_angle and options.a_compress_use_split and taken > width:
                raise UnsupportedModelError(
                    f"repflow option a_compress_use_split=true takes {taken} of {width} features"
                )
        if options.use_dynamic_sel and not options.smooth_edge_update:
            raise UnsupportedModelError("repflow option use_dynamic_sel=true needs smooth_edge_update=true")
        if options.sequential_update and not (
            options.update_angle and options.update_style == "res_residual"
        ):
            raise UnsupportedModelError(
                "repflow option sequential_update=true needs update_angle=true and update_style=res_residual"
            )
        return options

    @property
    def n_edge_norm(self) -> float:
        """Number of neighbours that sums over edges are divided by."""
        return self.e_sel / (self.sel_reduce_factor if self.use_dynamic_sel else 1.0)

    @property
    def n_angle_norm(self) -> float:
        """Number of neighbours that sums over angles are divided by."""
        return self.a_sel / (self.sel_reduce_factor if self.use_dynamic_sel else 1.0)

    @property
    def compressed(self) -> tuple[int, int]:
        """Widths of the node and edge features that enter an angle."""
        if not self.a_compress_rate:
            return self.n_dim, self.e_dim
        return (
            self.a_dim // self.a_compress_rate,
            self.a_dim // (2 * self.a_compress_rate) * self.a_compress_e_rate,
        )

    @property
    def learns_compression(self) -> bool:
        """A linear map compresses; otherwise the leading components are taken."""
        return bool(self.a_compress_rate) and not self.a_compress_use_split


@dataclass(frozen=True)
class Division:
    """All centres at once, or some centres after the others."""

    #: of each part
    lists: tuple[Lists, ...]
    #: None where one part sees all atoms
    nearby: Nearby | None = None

    @classmethod
    def of(cls, lists: Lists, n_entries: int) -> Division:
        """Divide the centres into parts of about `n_entries` edges and angles.

        Parameters
        ----------
        lists
            of all centres, ascending by centre wherever `Lists` have an order.
        """
        n_atoms, n_edges = lists.centers.starts.shape[0], lists.centers.rows.shape[0]
        n_near, n_angles = lists.near.rows.shape[0], lists.first.rows.shape[0]
        edges = _ends(lists.centers.starts, n_edges)
        near = _ends(lists.near_centers.starts, n_near)
        angles = _ends(lists.first.starts, n_angles)[near]
        group = (edges[1:] + angles[1:] - 1).clamp(min=0) // n_entries
        sizes = torch.unique_consecutive(group, return_counts=True)[1]
        bounds = torch.cat([sizes.new_zeros(1), torch.cumsum(sizes, 0)])
        marks = torch.stack([bounds, edges[bounds], near[bounds], angles[bounds]], dim=1).tolist()
        of_parts = lists.neighbors.rows.split((edges[bounds[1:]] - edges[bounds[:-1]]).tolist())
        nearby, neighbors = Nearby.of(of_parts, n_atoms)
        parts = [
            Lists(
                centers=_cut(lists.centers, slice(e, e_end), slice(a, a_end), a, e),
                neighbors=own,
                near=_cut(lists.near, slice(m, m_end), slice(e, e_end), e, m),
                near_centers=_cut(lists.near_centers, slice(m, m_end), slice(a, a_end), a, m),
                first=_cut(lists.first, slice(g, g_end), slice(m, m_end), m, g),
                second=_cut(lists.second, slice(g, g_end), slice(m, m_end), m, g),
            )
            for own, ((a, e, m, g), (a_end, e_end, m_end, g_end)) in zip(
                neighbors, itertools.pairwise(marks), strict=True
            )
        ]
        return cls(tuple(parts), nearby)

    def of_centers(self, x: Tensor) -> Sequence[Tensor]:
        """Rows of atoms, by part: those of the centres."""
        return pieces(x, [lists.centers.starts.shape[0] for lists in self.lists])

    def of_edges(self, x: Tensor) -> Sequence[Tensor]:
        """Rows of edges, by part."""
        return pieces(x, [lists.centers.rows.shape[0] for lists in self.lists])

    def of_nearby(self, x: Tensor) -> Sequence[Tensor]:
        """Rows of atoms, by part: those of all that are near the centres."""
        return [x] if self.nearby is None else self.nearby(x)


def _ends(starts: Tensor, n: int) -> Tensor:
    """Where the entries of each row begin, and where those of the last end."""
    return torch.cat([starts, starts.new_tensor([n])])


def _cut(index: Index, entries: slice, rows: slice, first_row: int, first_entry: int) -> Index:
    """Part of an index whose entries and rows are contiguous."""
    return Index(
        index.rows[entries] - first_row, index.order[entries] - first_entry, index.starts[rows] - first_entry
    )


@dataclass(frozen=True)
class Repflow:
    """All layers, from node and edge lists to the final node features."""

    options: RepflowOptions
    n_types: int
    activation: str
    protection: float
    dtype: torch.dtype

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of one layer."""
        o = self.options
        pair, n_message = 2 * o.n_dim + o.e_dim, o.n_multi_edge_message
        shapes: dict[str, tuple[int, ...]] = {
            "node_self_mlp.w": (o.n_dim, o.n_dim),
            "node_sym_linear.w": (o.axis_neuron * (o.n_dim + o.e_dim), o.n_dim),
            "node_edge_linear.w": (pair, n_message * o.n_dim),
            "edge_self_linear.w": (pair, o.e_dim),
        }
        n_residuals = {"n": 2 + n_message, "e": 1, "a": 0}
        if o.update_angle:
            n_compressed, e_compressed = o.compressed
            triple = o.a_dim + n_compressed + 2 * e_compressed
            shapes["edge_angle_linear1.w"] = (triple, o.e_dim)
            shapes["edge_angle_linear2.w"] = (o.e_dim, o.e_dim)
            shapes["angle_self_linear.w"] = (triple, o.a_dim)
            n_residuals |= {"e": 2, "a": 1}
        shapes |= {name.replace(".w", ".b"): (shape[1],) for name, shape in shapes.items()}
        if o.update_angle and o.learns_compression:
            shapes["a_compress_n_linear.w"] = (o.n_dim, o.compressed[0])
            shapes["a_compress_e_linear.w"] = (o.e_dim, o.compressed[1])
        if o.update_style == "res_residual":
            widths = {"n": o.n_dim, "e": o.e_dim, "a": o.a_dim}
            for kind, n in n_residuals.items():
                shapes |= {f"{kind}_residual.{i}": (widths[kind],) for i in range(n)}
        return shapes

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        o = self.options
        specs = {
            f"{BLOCK}.edge_embd.w": ParameterSpec((1, o.e_dim), self.dtype),
            f"{BLOCK}.edge_embd.b": ParameterSpec((o.e_dim,), self.dtype),
            f"{BLOCK}.angle_embd.w": ParameterSpec((1, o.a_dim), self.dtype),
        }
        for k in range(o.nlayers):
            for name, shape in self._shapes().items():
                specs[f"{BLOCK}.layers.{k}.{name}"] = ParameterSpec(shape, self.dtype)
        return specs | statistics_parameters(BLOCK, self.n_types, o.e_sel, self.dtype)

    def _updates(self, k: int) -> tuple[bool, bool]:
        """Whether anything reads the edges, and the angles, that layer `k` makes."""
        o = self.options
        if o.sequential_update:
            return True, True
        return k < o.nlayers - 1, o.update_angle and k < o.nlayers - 2

    def prepare(self, weights: Weights) -> dict[str, Tensor]:
        """Weights for the graph: linear maps taken apart, what no layer reads left out."""
        embedding = weights[f"{BLOCK}.angle_embd.w"]
        prepared = {
            f"{_GEOMETRY}mean": weights[f"{BLOCK}.mean"][:, 0],
            f"{_GEOMETRY}stddev": weights[f"{BLOCK}.stddev"][:, 0],
            f"{_GEOMETRY}edge_embd.w": weights[f"{BLOCK}.edge_embd.w"],
            f"{_GEOMETRY}edge_embd.b": weights[f"{BLOCK}.edge_embd.b"],
        }
        if self._updates(0)[1]:
            prepared[f"{BLOCK}.layers.0.angle_embd"] = embedding
        for k in range(self.options.nlayers):
            layer = f"{BLOCK}.layers.{k}."
            own = without_prefix(weights, layer)
            prepared |= {layer + name: w for name, w in self._prepare_layer(k, own, embedding).items()}
        return prepared

    def _prepare_layer(self, k: int, own: Weights, embedding: Tensor) -> dict[str, Tensor]:
        has_angles = self.options.update_angle
        updates_edges, updates_angles = self._updates(k)
        used = {"node_self_mlp", "node_sym_linear", "node_edge_linear", "n_residual"}
        if updates_edges:
            used |= {"edge_self_linear", "e_residual"}
        if updates_edges and has_angles:
            used |= {"edge_angle_linear1", "edge_angle_linear2"}
        if updates_angles:
            used |= {"angle_self_linear", "a_residual"}
        as_they_are = used.difference(_PAIRS, _TRIPLES)
        prepared = {name: w for name, w in own.items() if name.split(".")[0] in as_they_are}
        for name in used.intersection(_PAIRS):
            prepared |= self._take_pair_apart(name, own)
        for name in used.intersection(_TRIPLES):
            # layer 0 reads the cosine in place of the angles, which are multiples of one vector
            of_cosine = k == 0 and not (self.options.sequential_update and name == "edge_angle_linear1")
            prepared |= self._take_triple_apart(name, own, embedding if of_cosine else None)
        return prepared

    def _take_pair_apart(self, name: str, own: Weights) -> dict[str, Tensor]:
        o = self.options
        of_i, of_j, of_edge = torch.split(own[f"{name}.w"], [o.n_dim, o.n_dim, o.e_dim])
        return {
            f"{name}.edge": of_edge,
            f"{name}.center": of_i,
            f"{name}.neighbor": of_j,
            f"{name}.b": own[f"{name}.b"],
        }

    def _take_triple_apart(self, name: str, own: Weights, embedding: Tensor | None) -> dict[str, Tensor]:
        o = self.options
        n_compressed, e_compressed = o.compressed
        sizes = [o.a_dim, n_compressed, e_compressed, e_compressed]
        of_angle, of_node, of_second, of_first = torch.split(own[f"{name}.w"], sizes)
        if o.learns_compression:
            of_node = own["a_compress_n_linear.w"] @ of_node
            of_first, of_second = (own["a_compress_e_linear.w"] @ w for w in (of_first, of_second))
        of_edges = torch.cat([of_first, of_second], dim=1)
        return {
            f"{name}.angle": of_angle if embedding is None else embedding @ of_angle,
            # components that compression leaves out meet zeros
            f"{name}.node": _beside_zeros(_above_zeros(of_node, o.n_dim)),
            f"{name}.edges": _above_zeros(of_edges, o.e_dim),
            f"{name}.b": _beside_zeros(own[f"{name}.b"]),
        }

    def __call__(
        self,
        displacements: Tensor,
        types: Tensor,
        node: Tensor,
        division: Division,
        weights: Weights,
        call: Call,
    ) -> Tensor:
        """Node features after the last layer.

        Parameters
        ----------
        displacements
            shape (n_edges, 3), Å.
        types
            shape (n_atoms,).
        node
            shape (n_atoms, n_dim), before the first activation.

        Returns
        -------
        shape (n_atoms, n_dim)
        """
        o = self.options
        node = activation(self.activation)(node)
        lists = [part.tensors for part in division.lists]
        geometry = RepflowGeometry(o, self.activation, self.protection, self.dtype)
        own = without_prefix(weights, _GEOMETRY)
        # what is listed below has one entry per part
        placed = [
            call(geometry, (vectors,), (of_centers, *flat), own)
            for vectors, of_centers, flat in zip(
                division.of_edges(displacements), division.of_centers(types), lists, strict=True
            )
        ]
        edges, *geometry_of_all = zip(*placed, strict=True)
        of_edges, of_angles = geometry_of_all[:2], geometry_of_all[2:]
        for k in range(o.nlayers):
            own = without_prefix(weights, f"{BLOCK}.layers.{k}.")
            layer = RepflowLayer(o, self.activation, self.dtype, *self._updates(k), from_cosine=k == 0)
            varied = [division.of_centers(node), edges, *of_edges]
            if layer.reads_angles:
                varied += of_angles
            varied += map(division.of_nearby, Surroundings.of(node, own).tensors)
            parts = zip(zip(*varied, strict=True), lists, strict=True)
            new = [call(layer, own_varied, flat, own) for own_varied, flat in parts]
            nodes, *updated = zip(*new, strict=True)
            node = joined(nodes)
            if layer.updates_edges:
                edges = updated[0]
            if layer.updates_angles:
                of_angles[0] = updated[1]
        return node


@dataclass(frozen=True)
class RepflowGeometry:
    """Stage before the layers: initial edge features, and what stays the same in all layers."""

    options: RepflowOptions
    activation: str
    protection: float
    dtype: torch.dtype

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacements (n_edges, 3), Å; types of the centres (n_centers,), `Lists`."""
        types = Argument(("atoms",), torch.int64)
        return [Argument(("edges", 3), self.dtype)], [types, *Lists.arguments()]

    def outputs(self) -> list[Argument]:
        """Edge features; `w` and `vectors`; with angles their cosines over sqrt(π), `v` and `v_second`."""
        shapes: list[tuple[str | int, ...]] = [("edges", self.options.e_dim), ("edges", 1), ("edges", 3)]
        if self.options.update_angle:
            shapes += [("angles", 1), ("near edges", 1), ("angles", 1)]
        return [Argument(shape, self.dtype) for shape in shapes]

    def kept(self) -> list[Argument]:
        """Nothing."""
        return []

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors:
        """Evaluate on weights as `Repflow.prepare` makes them (names without the prefix)."""
        o = self.options
        (displacements,), (types, *flat) = varied, fixed
        lists = Lists.of(flat)
        r = safe_norm(displacements)
        w = self._switch(r, o.e_rcut_smth, o.e_rcut)
        mean, stddev = (
            weights[name][types].index_select(0, lists.centers.rows) for name in ("mean", "stddev")
        )
        inverse = 1.0 / (r + self.protection)
        vectors = (displacements * (inverse * inverse * w) - mean[:, 1:]) / stddev[:, 1:]
        edge = r if o.edge_init_use_dist else (inverse * w - mean[:, :1]) / stddev[:, :1]
        edge = edge * weights["edge_embd.w"] + weights["edge_embd.b"]
        if not o.edge_init_use_dist:
            edge = activation(self.activation)(edge)
        w, vectors = w / o.n_edge_norm, vectors * (w * o.n_edge_norm**-0.5)
        if not o.update_angle:
            return edge, w, vectors
        near = settled(gather(torch.cat([displacements / (r + 1e-6), r], dim=1), lists.near))
        unit, r = torch.split(near, [3, 1], dim=1)
        cosine = (gather(unit, lists.first) * gather(unit, lists.second)).sum(1, keepdim=True)
        cosine = cosine * ((1.0 - 1e-6) / math.sqrt(math.pi))
        v = settled(self._switch(r, o.a_rcut_smth, o.a_rcut))
        return edge, w, vectors, cosine, v * o.n_angle_norm**-0.5, gather(v, lists.second)

    def _switch(self, r: Tensor, rcut_smth: float, rcut: float) -> Tensor:
        if not self.options.use_exp_switch:
            return switch(r, rcut_smth, rcut)
        return torch.exp(-torch.exp((torch.clamp(r, max=rcut) - rcut_smth) * (20.0 / rcut_smth)))


def _beside_zeros(w: Tensor) -> Tensor:
    return torch.cat([w, torch.zeros_like(w)], dim=-1)


def _above_zeros(w: Tensor, n_rows: int) -> Tensor:
    return torch.cat([w, w.new_zeros(n_rows - w.shape[0], w.shape[1])])
