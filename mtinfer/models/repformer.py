"""Repformer layers of DPA-2: message passing over node features g1, edge features g2 and directions h2.

Zhang et al., npj Comput. Mater. 10, 293 (2024), arXiv:2312.15492, SI.

Every linear map that upstream applies to gathered node features is contracted the other way round here:
the sum over neighbours comes first and the map acts on its result, or the map acts on the node before it is
gathered. The products of maps that this leaves are made in `Repformer.prepare`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..inputs import ParameterSpec
from .activations import activation
from .environment import Environment, statistics, statistics_parameters
from .fading_softmax import SHIFT, fading_softmax, saturated_slots, slot_occupancy
from .gather import Index, gather, settled
from .layers import (
    Weights,
    check_update_style,
    required,
    row_peak,
    row_sum,
    safe_norm,
    switch,
    updated,
    without_prefix,
)
from .layout import Argument
from .stage import Call, Nearby, Tensors, joined, pieces

BLOCK = "descriptor.repformers"
_GEOMETRY = f"{BLOCK}.geometry."


@dataclass(frozen=True)
class RepformerOptions:
    """Section `repformer` of a configuration; names and defaults are those of the format."""

    rcut: float
    rcut_smth: float
    nsel: int
    nlayers: int = 3
    g1_dim: int = 128
    g2_dim: int = 16
    axis_neuron: int = 4
    direct_dist: bool = False
    update_h2: bool = False
    update_g1_has_conv: bool = True
    update_g1_has_drrd: bool = True
    update_g1_has_grrg: bool = True
    update_g1_has_attn: bool = True
    update_g2_has_g1g1: bool = True
    update_g2_has_attn: bool = True
    attn1_hidden: int = 64
    attn1_nhead: int = 4
    attn2_hidden: int = 16
    attn2_nhead: int = 4
    attn2_has_gate: bool = False
    activation_function: str = "tanh"
    update_style: str = "res_avg"
    use_sqrt_nnei: bool = True
    g1_out_conv: bool = True
    g1_out_mlp: bool = True
    ln_eps: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the section; keys without a numerical role are passed over.

        Raises
        ------
        UnsupportedModelError
            If a required key is missing or `update_style` is unknown.
        """
        given = {
            f.name: required(config, f.name, "repformer") if f.default is MISSING else config[f.name]
            for f in fields(cls)
            if f.name in config or f.default is MISSING
        }
        options = cls(**given)
        check_update_style(options.update_style, "repformer")
        return options


@dataclass(frozen=True)
class Division:
    """Centres in parts: one part of all, or some centres after the others."""

    #: centres of each part, and slots that they fill at most; None where one part holds all
    sizes: tuple[tuple[int, int], ...] | None
    #: `Index` of the slots of each part among the atoms near it; its first member as (n, m)
    neighbors: tuple[Tensors, ...]
    #: None where one part sees all atoms
    nearby: Nearby | None = None

    @classmethod
    def of(cls, neighbors: Tensor, n_filled: Tensor, n_entries: int) -> Division:
        """Divide the centres into parts of about `n_entries` pairs of slots.

        Parameters
        ----------
        neighbors
            shape (n, m), the atom in each slot.
        n_filled
            shape (n,), leading slots that hold a neighbour; parts are narrowest where it ascends.
        """
        pairs = torch.cumsum(n_filled.clamp(min=1) ** 2, 0)
        counts = torch.unique_consecutive((pairs - 1) // n_entries, return_counts=True)[1].tolist()
        widths = [max(1, int(filled.max())) for filled in n_filled.split(counts)]
        sizes = tuple(zip(counts, widths, strict=True))
        rows = [part[:, :m].flatten() for part, m in zip(neighbors.split(counts), widths, strict=True)]
        nearby, own = Nearby.of(rows, neighbors.shape[0])
        shaped = ((index.rows.reshape(size), *index[1:]) for index, size in zip(own, sizes, strict=True))
        return cls(sizes, tuple(shaped), nearby)

    def of_centers(self, x: Tensor) -> Sequence[Tensor]:
        """Rows of atoms, by part: those of the centres."""
        return [x] if self.sizes is None else pieces(x, [count for count, _ in self.sizes])

    def of_slots(self, x: Tensor) -> Sequence[Tensor]:
        """Shape (n, m, ...), by part: slots that some centre of the part fills."""
        if self.sizes is None:
            return [x]
        widths = (width for _, width in self.sizes)
        return [part[:, :width] for part, width in zip(self.of_centers(x), widths, strict=True)]

    def of_nearby(self, x: Tensor) -> Sequence[Tensor]:
        """Rows of atoms, by part: those of all that are near the centres."""
        return [x] if self.nearby is None else self.nearby(x)


class _Edges(NamedTuple):
    """What a layer knows of the neighbour slots of each centre; n centres, m slots."""

    #: (n, m, 1), weight of a slot in a sum: the switch, or 1 where a slot holds a neighbour and 0 elsewhere
    weight: Tensor
    #: (n, 1, 1) or a number: factor on moments, and on means
    per_moment: Tensor | float
    per_neighbor: Tensor | float
    #: (n, 1, m), share of a slot that each neighbour takes; None where no centre has too many neighbours
    occupancy: Tensor | None


@dataclass(frozen=True)
class _Pairs:
    """What the edge attention knows of pairs of slots: factors and offset of logits, factor of the result.

    Shape (n, m, 1, m) each; without a gate or a switch some are unused or a mere mask.
    """

    scale: Tensor
    shift: Tensor
    result: Tensor


@dataclass(frozen=True)
class Repformer:
    """All repformer layers of one model."""

    options: RepformerOptions
    n_types: int
    environment: Environment
    smooth: bool
    dtype: torch.dtype

    # ---- weights -------------------------------------------------------------------------------------

    def _edge_updates(self, k: int) -> bool:
        """The last layer leaves the edges alone: nothing reads them any more."""
        return k < self.options.nlayers - 1

    @property
    def has_edge_attention(self) -> bool:
        """Whether slots attend to slots."""
        return self.options.update_g2_has_attn or self.options.update_h2

    def _layer_shapes(self, k: int) -> dict[str, tuple[int, ...]]:
        o = self.options
        d1, d2, nh1, nh2 = o.g1_dim, o.g2_dim, o.attn1_nhead, o.attn2_nhead
        edges = self._edge_updates(k)
        width = o.axis_neuron * (d2 * o.update_g1_has_grrg + d1 * o.update_g1_has_drrd)
        width += d1 * (not o.g1_out_mlp) + d2 * (o.update_g1_has_conv and not o.g1_out_conv)
        out_conv = o.update_g1_has_conv and o.g1_out_conv
        n_g1 = 1 + o.g1_out_mlp + out_conv + o.update_g1_has_attn
        n_g2 = 1 + o.update_g2_has_g1g1 + o.update_g2_has_attn
        residual = o.update_style == "res_residual"
        table: list[tuple[bool, str, tuple[int, ...], bool]] = [
            # present, name, shape of w, has a bias
            (True, "linear1", (width, d1), True),
            (o.g1_out_mlp, "g1_self_mlp", (d1, d1), True),
            (o.update_g1_has_conv, "proj_g1g2", (d2, d1) if o.g1_out_conv else (d1, d2), False),
            (o.update_g1_has_attn, "loc_attn.mapq", (d1, o.attn1_hidden * nh1), False),
            (o.update_g1_has_attn, "loc_attn.mapkv", (d1, (o.attn1_hidden + d1) * nh1), False),
            (o.update_g1_has_attn, "loc_attn.head_map", (d1 * nh1, d1), True),
            (edges, "linear2", (d2, d2), True),
            (edges and o.update_g2_has_g1g1, "proj_g1g1g2", (d1, d2), False),
            (edges and self.has_edge_attention, "attn2g_map.mapqk", (d2, 2 * o.attn2_hidden * nh2), False),
            (edges and o.update_g2_has_attn, "attn2_mh_apply.mapv", (d2, d2 * nh2), False),
            (edges and o.update_g2_has_attn, "attn2_mh_apply.head_map", (d2 * nh2, d2), True),
            (edges and o.update_h2, "attn2_ev_apply.head_map", (nh2, 1), False),
        ]
        shapes: dict[str, tuple[int, ...]] = {}
        for present, name, shape, bias in table:
            if present:
                shapes[f"{name}.w"] = shape
                if bias:
                    shapes[f"{name}.b"] = shape[1:]
        if edges and o.update_g2_has_attn:
            shapes |= {"attn2_lm.w": (d2,), "attn2_lm.b": (d2,)}
        if residual:
            counts = [("g1", n_g1, d1), ("g2", n_g2 * edges, d2), ("h2", o.update_h2 * edges, 1)]
            shapes |= {f"{name}_residual.{i}": (d,) for name, n, d in counts for i in range(n)}
        return shapes

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        shapes = {
            f"{BLOCK}.g2_embd.w": (1, self.options.g2_dim),
            f"{BLOCK}.g2_embd.b": (self.options.g2_dim,),
        }
        for k in range(self.options.nlayers):
            shapes |= {f"{BLOCK}.layers.{k}.{name}": s for name, s in self._layer_shapes(k).items()}
        specs = {name: ParameterSpec(shape, self.dtype) for name, shape in shapes.items()}
        return specs | statistics_parameters(BLOCK, self.n_types, self.options.nsel, self.dtype)

    def prepare(self, weights: Weights) -> dict[str, Tensor]:
        """Weights for the graph, products of maps multiplied out."""
        mean, stddev = statistics(weights, BLOCK)
        prepared = {f"{_GEOMETRY}mean": mean, f"{_GEOMETRY}stddev": stddev}
        prepared |= {f"{_GEOMETRY}g2_embd.{leaf}": weights[f"{BLOCK}.g2_embd.{leaf}"] for leaf in "wb"}
        for k in range(self.options.nlayers):
            layer = f"{BLOCK}.layers.{k}"
            own = {name: weights[f"{layer}.{name}"] for name in self._layer_shapes(k)}
            prepared |= {f"{layer}.{name}": tensor for name, tensor in self._multiplied_out(own).items()}
        return prepared

    def _multiplied_out(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the maps of both attentions by products: query with key, value with output.

        With rows x_m of one kind, x_m Wq (x_n Wk)ᵀ = x_m (Wq Wkᵀ) x_nᵀ, and Σ_n A_mn (x_n Wv) Wo =
        (Σ_n A_mn x_n) (Wv Wo), head by head. Maps hold the head index fastest, but the head map of the
        local attention holds it slowest.
        """
        o = self.options
        own = dict(own)
        if "attn2g_map.mapqk.w" in own:
            qk = own.pop("attn2g_map.mapqk.w").unflatten(1, (o.attn2_hidden, 2 * o.attn2_nhead))
            q, k = qk.split(o.attn2_nhead, dim=2)
            own["attn2.qk"] = torch.einsum("iah,jah->ihj", q, k).flatten(1) / math.sqrt(o.attn2_hidden)
        if "attn2_mh_apply.mapv.w" in own:
            v = own.pop("attn2_mh_apply.mapv.w").unflatten(1, (o.g2_dim, o.attn2_nhead))
            out = own.pop("attn2_mh_apply.head_map.w").unflatten(0, (o.g2_dim, o.attn2_nhead))
            # the layer norm that follows subtracts the mean over features, which is linear, too
            vo, b = torch.einsum("ich,chj->hij", v, out).flatten(0, 1), own.pop("attn2_mh_apply.head_map.b")
            own["attn2.vo"], own["attn2.b"] = vo - vo.mean(1, keepdim=True), b - b.mean()
        if "loc_attn.mapq.w" in own:
            q = own.pop("loc_attn.mapq.w").unflatten(1, (o.attn1_hidden, o.attn1_nhead))
            kv = own.pop("loc_attn.mapkv.w").unflatten(1, (o.attn1_hidden + o.g1_dim, o.attn1_nhead))
            k, v = kv.split([o.attn1_hidden, o.g1_dim], dim=1)
            out = own.pop("loc_attn.head_map.w").unflatten(0, (o.attn1_nhead, o.g1_dim))
            own["loc_attn.qk"] = torch.einsum("iah,jah->ihj", q, k).flatten(1) / math.sqrt(o.attn1_hidden)
            own["loc_attn.vo"] = torch.einsum("ich,hcj->hij", v, out).flatten(0, 1)
        return own

    # ---- mathematics ---------------------------------------------------------------------------------

    def __call__(
        self,
        g1: Tensor,
        types: Tensor,
        displacements: Tensor,
        division: Division,
        saturated: Tensor | None,
        weights: Weights,
        call: Call,
    ) -> Tensor:
        """Node features after all layers.

        Parameters
        ----------
        g1
            shape (n, g1_dim), node features before the first activation.
        types
            shape (n,).
        displacements
            shape (n, m, 3), Å; empty slots as `layout.far_away` makes them.
        saturated
            shape (n, m), as `saturated_slots` makes it; None where no centre has too many neighbours.

        Returns
        -------
        shape (n, g1_dim)
        """
        geometry = RepformerGeometry(self, has_occupancy=saturated is not None)
        own = without_prefix(weights, _GEOMETRY)
        given = [division.of_slots(displacements), division.of_centers(types)]
        if saturated is not None:
            given.append(division.of_slots(saturated))
        edges = [
            call(geometry, (vectors,), tuple(fixed), own) for vectors, *fixed in zip(*given, strict=True)
        ]
        g1 = activation(self.options.activation_function)(g1)
        for k in range(self.options.nlayers):
            layer = RepformerLayer(self, self._edge_updates(k), has_occupancy=saturated is not None)
            own = without_prefix(weights, f"{BLOCK}.layers.{k}.")
            of_g1 = division.of_centers(g1), division.of_nearby(g1)
            new = [
                call(layer, (mine, near, *rest), index, own)
                for mine, near, rest, index in zip(*of_g1, edges, division.neighbors, strict=True)
            ]
            g1 = joined([part[0] for part in new])
            edges = [(*part[1:], *old[len(part) - 1 :]) for part, old in zip(new, edges, strict=True)]
        return g1

    def saturated(self, displacements: Tensor) -> Tensor:
        """`saturated_slots` of padded displacements, shape (n, m, 3) -> (n, m)."""
        r = torch.linalg.vector_norm(displacements, dim=-1)
        return saturated_slots(switch(r, self.options.rcut_smth, self.options.rcut), self.options.nsel)


@dataclass(frozen=True)
class RepformerGeometry:
    """Stage before the layers: g2 and h2 of every slot, and what stays the same in all layers."""

    block: Repformer
    has_occupancy: bool

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacements (n, m, 3), Å; types (n,), saturated slots (n, m)."""
        fixed = [Argument(("atoms",), torch.int64)]
        if self.has_occupancy:
            fixed.append(Argument(("atoms", "slots"), torch.bool))
        return [Argument(("atoms", "slots", 3), self.block.dtype)], fixed

    def outputs(self) -> list[Argument]:
        """g2 (n, m, g2_dim), h2 (n, m, 3), weight (n, m, 1), occupancy (n, 1, m)."""
        widths = (self.block.options.g2_dim, 3, 1)
        declared = [Argument(("atoms", "slots", width), self.block.dtype) for width in widths]
        if self.has_occupancy:
            declared.append(Argument(("atoms", 1, "slots"), self.block.dtype))
        return declared

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors:
        """Evaluate on weights as `Repformer.prepare` makes them (names without the prefix)."""
        o = self.block.options
        (displacements,), (types, *saturated) = varied, fixed
        mean, stddev = (weights[name][types].unsqueeze(1) for name in ("mean", "stddev"))
        rows, w, mask = self.block.environment.rows(displacements, mean, stddev)
        rows, w = settled(rows), settled(w)
        if o.direct_dist:
            scaled = displacements * (mask / o.rcut)
            distance, h2 = safe_norm(scaled), scaled
        else:
            distance, h2 = torch.split(rows, [1, 3], dim=-1)
        g2 = distance * weights["g2_embd.w"][0] + weights["g2_embd.b"]
        occupancy = [slot_occupancy(w.squeeze(2), slots, o.nsel).unsqueeze(1) for slots in saturated]
        weight = w if self.block.smooth else mask
        return activation(o.activation_function)(g2), h2, weight, *occupancy


@dataclass(frozen=True)
class RepformerLayer:
    """One layer for some centres, on weights as `Repformer.prepare` makes them (names without the prefix)."""

    block: Repformer
    updates_edges: bool
    has_occupancy: bool

    @property
    def options(self) -> RepformerOptions:
        return self.block.options

    @property
    def smooth(self) -> bool:
        return self.block.smooth

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """g1 of the centres and of atoms near them, outputs of `RepformerGeometry`; `Index` of the slots."""
        width, dtype = self.options.g1_dim, self.block.dtype
        g1 = [Argument(("atoms", width), dtype), Argument(("nearby", width), dtype)]
        axes: list[tuple[str, ...]] = [("atoms", "slots"), ("slots of all atoms",), ("nearby",)]
        index = [Argument(shape, torch.int64) for shape in axes]
        return g1 + RepformerGeometry(self.block, self.has_occupancy).outputs(), index

    def outputs(self) -> list[Argument]:
        """g1; what is updated of g2 and h2."""
        g1 = Argument(("atoms", self.options.g1_dim), self.block.dtype)
        n_updated = (1 + self.options.update_h2) if self.updates_edges else 0
        return [g1, *RepformerGeometry(self.block, self.has_occupancy).outputs()[:n_updated]]

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors:
        """New g1, g2 and h2, all from the old ones."""
        g1, nearby, g2, h2, weight, *occupancy = varied
        neighbors, order, starts = fixed
        edges = self._edges(weight, *occupancy)
        g1_j = gather(nearby, Index(neighbors.flatten(), order, starts)).unflatten(0, neighbors.shape)
        update = partial(updated, self.options.update_style)
        new_g1 = update("g1", g1, self._g1_terms(g1, g1_j, g2, h2, edges, weights), weights)
        if not self.updates_edges:
            return (new_g1,)
        pairs = self._pairs(h2, edges) if self.block.has_edge_attention else None
        g2_terms, h2_terms = self._edge_terms(g1, g1_j, g2, h2, edges, pairs, weights)
        new = (new_g1, update("g2", g2, g2_terms, weights))
        return (*new, update("h2", h2, h2_terms, weights)) if self.options.update_h2 else new

    def _edges(self, weight: Tensor, occupancy: Tensor | None = None) -> _Edges:
        o = self.options
        if self.smooth:
            per_moment = o.nsel**-0.5 if o.use_sqrt_nnei else 1.0 / o.nsel
            return _Edges(weight, per_moment, 1.0 / o.nsel, occupancy)
        count = weight.sum(1, keepdim=True)
        per_neighbor = 1.0 / (1e-4 + count)
        of_moment = 1.0 / (1e-4 + torch.sqrt(count)) if o.use_sqrt_nnei else per_neighbor
        return _Edges(weight, of_moment, per_neighbor, occupancy)

    def _g1_terms(
        self, g1: Tensor, g1_j: Tensor, g2: Tensor, h2: Tensor, edges: _Edges, own: Weights
    ) -> list[Tensor]:
        o = self.options
        act = activation(o.activation_function)
        terms: list[Tensor] = []
        inputs: list[Tensor] = []
        (terms if o.g1_out_mlp else inputs).append(
            act(g1 @ own["g1_self_mlp.w"] + own["g1_self_mlp.b"]) if o.g1_out_mlp else g1
        )
        # every sum over neighbours of g1_j times something of the edge, in one product
        left = [h2 * (edges.weight * edges.per_moment)]
        if o.update_g1_has_conv:
            left.append(g2 * (edges.weight * edges.per_neighbor))
        sums = torch.cat(left, dim=2).transpose(1, 2) @ g1_j
        moment, *rest = torch.split(sums, [x.shape[2] for x in left], dim=1)
        if o.update_g1_has_conv:
            if o.g1_out_conv:
                terms.append((rest[0] * own["proj_g1g2.w"]).sum(1))
            else:
                inputs.append((rest[0] * own["proj_g1g2.w"].T).sum(2))
        if o.update_g1_has_grrg:
            inputs.append(self._symmetrised(left[0].transpose(1, 2) @ g2))
        if o.update_g1_has_drrd:
            inputs.append(self._symmetrised(moment))
        terms.append(act(torch.cat(inputs, dim=1) @ own["linear1.w"] + own["linear1.b"]))
        if o.update_g1_has_attn:
            terms.append(self._local_attention(g1, g1_j, edges, own))
        return terms

    def _symmetrised(self, moment: Tensor) -> Tensor:
        """Invariants of a moment, shape (n, 3, c) -> (n, axis·c), c fastest."""
        return (moment[:, :, : self.options.axis_neuron].transpose(1, 2) @ moment).flatten(1) / 3.0

    def _local_attention(self, g1: Tensor, g1_j: Tensor, edges: _Edges, own: Weights) -> Tensor:
        o = self.options
        query = (g1 @ own["loc_attn.qk"]).unflatten(1, (o.attn1_nhead, o.g1_dim))
        logits = query @ g1_j.transpose(1, 2)
        weight = edges.weight.transpose(1, 2)
        if self.smooth:
            attention = fading_softmax((logits + SHIFT) * weight, o.nsel, edges.occupancy) * weight
        else:
            attention = _masked_softmax(logits, weight)
        return (attention @ g1_j).flatten(1) @ own["loc_attn.vo"] + own["loc_attn.head_map.b"]

    def _edge_terms(
        self,
        g1: Tensor,
        g1_j: Tensor,
        g2: Tensor,
        h2: Tensor,
        edges: _Edges,
        pairs: _Pairs | None,
        own: Weights,
    ) -> tuple[list[Tensor], list[Tensor]]:
        o = self.options
        act = activation(o.activation_function)
        g2_terms, h2_terms = [act(g2 @ own["linear2.w"] + own["linear2.b"])], []
        if o.update_g2_has_g1g1:
            g2_terms.append((g1_j @ (g1.unsqueeze(2) * own["proj_g1g1g2.w"])) * edges.weight)
        if pairs is not None:
            attention = self._edge_weights(g2, pairs, edges, own)
            if o.update_g2_has_attn:
                mixed = (attention.flatten(1, 2) @ g2).unflatten(1, attention.shape[1:3]).flatten(2)
                centred = mixed @ own["attn2.vo"] + own["attn2.b"]
                variance = row_sum(centred * centred) / o.g2_dim
                normed = centred * torch.rsqrt(variance + (o.ln_eps or 1e-5))
                g2_terms.append(normed * own["attn2_lm.w"] + own["attn2_lm.b"])
            if o.update_h2:
                h2_terms.append((attention * own["attn2_ev_apply.head_map.w"]).sum(2) @ h2)
        return g2_terms, h2_terms

    def _edge_weights(self, g2: Tensor, pairs: _Pairs, edges: _Edges, own: Weights) -> Tensor:
        """Attention of every slot to every slot of the same centre, shape (n, m, n_head, m)."""
        o = self.options
        query = (g2 @ own["attn2.qk"]).unflatten(2, (o.attn2_nhead, o.g2_dim))
        logits = (query.flatten(1, 2) @ g2.transpose(1, 2)).unflatten(1, query.shape[1:3])
        if self.smooth:
            occupancy = None if edges.occupancy is None else edges.occupancy.unsqueeze(1)
            attention = fading_softmax(logits * pairs.scale + pairs.shift, o.nsel, occupancy)
        else:
            attention = _masked_softmax(logits * pairs.scale if o.attn2_has_gate else logits, pairs.shift)
        return attention * pairs.result

    def _pairs(self, h2: Tensor, edges: _Edges) -> _Pairs:
        products = (h2 * edges.weight, edges.weight)
        gate, weight = (settled((x @ x.transpose(1, 2)).unsqueeze(2)) for x in products)
        scale = gate if self.options.attn2_has_gate else weight
        shift = SHIFT * weight if self.smooth else weight
        return _Pairs(scale, shift, gate * 3.0**-0.5)


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries of the last axis where `mask` is 1, zero elsewhere."""
    logits = torch.where(mask > 0, logits, -torch.inf)
    share = torch.exp(logits - torch.clamp(row_peak(logits), min=torch.finfo(torch.float32).min))
    total = row_sum(share)
    return share * (1.0 / torch.where(total > 0, total, 1.0))
