"""One repformer layer of DPA-2: message passing over node features g1, edge features g2 and directions h2.

Zhang et al., npj Comput. Mater. 10, 293 (2024), arXiv:2312.15492, SI.

Every linear map that upstream applies to gathered node features is contracted the other way round here:
the sum over neighbours comes first and the map acts on its result, or the map acts on the node before it is
gathered. The products of maps that this leaves are made in `Repformer.prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .activations import activation
from .fading_softmax import SHIFT, fading_softmax, slot_occupancy
from .gather import Index, gather, settled
from .layers import Weights, row_peak, row_sum, safe_norm, updated
from .layout import Argument
from .stage import Keep, Tensors

if TYPE_CHECKING:
    from .repformer import Repformer, RepformerOptions


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

    def kept(self) -> list[Argument]:
        """Nothing."""
        return []

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors:
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

    def kept(self) -> list[Argument]:
        """Small results of large products: moments, arguments of activations and of the layer norm."""
        o = self.options
        axes: list[tuple[str | int, ...]] = []
        if o.g1_out_mlp:
            axes.append(("atoms", o.g1_dim))
        if o.update_g1_has_grrg:
            axes.append(("atoms", 3, o.g2_dim))
        if o.update_g1_has_drrd:
            axes.append(("atoms", 3, o.g1_dim))
        axes.append(("atoms", o.g1_dim))
        if self.updates_edges:
            axes += [("atoms", "slots", o.g2_dim)] * (1 + o.update_g2_has_attn)
        return [Argument(shape, self.block.dtype) for shape in axes]

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors:
        """New g1, g2 and h2, all from the old ones."""
        g1, nearby, g2, h2, weight, *occupancy = varied
        neighbors, order, starts = fixed
        edges = self._edges(weight, *occupancy)
        g1_j = gather(nearby, Index(neighbors.flatten(), order, starts)).unflatten(0, neighbors.shape)
        update = partial(updated, self.options.update_style)
        new_g1 = update("g1", g1, self._g1_terms(g1, g1_j, g2, h2, edges, weights, keep), weights)
        if not self.updates_edges:
            return (new_g1,)
        pairs = self._pairs(h2, edges) if self.block.has_edge_attention else None
        g2_terms, h2_terms = self._edge_terms(g1, g1_j, g2, h2, edges, pairs, weights, keep)
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
        self, g1: Tensor, g1_j: Tensor, g2: Tensor, h2: Tensor, edges: _Edges, own: Weights, keep: Keep
    ) -> list[Tensor]:
        o = self.options
        act = activation(o.activation_function)
        terms: list[Tensor] = []
        inputs: list[Tensor] = []
        if o.g1_out_mlp:
            terms.append(act(keep(g1 @ own["g1_self_mlp.w"] + own["g1_self_mlp.b"])))
        else:
            inputs.append(g1)
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
            inputs.append(self._symmetrised(keep(left[0].transpose(1, 2) @ g2)))
        if o.update_g1_has_drrd:
            inputs.append(self._symmetrised(keep(moment)))
        terms.append(act(keep(torch.cat(inputs, dim=1) @ own["linear1.w"] + own["linear1.b"])))
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
        keep: Keep,
    ) -> tuple[list[Tensor], list[Tensor]]:
        o = self.options
        act = activation(o.activation_function)
        g2_terms, h2_terms = [act(keep(g2 @ own["linear2.w"] + own["linear2.b"]))], []
        if o.update_g2_has_g1g1:
            g2_terms.append((g1_j @ (g1.unsqueeze(2) * own["proj_g1g1g2.w"])) * edges.weight)
        if pairs is not None:
            attention = self._edge_weights(g2, pairs, edges, own)
            if o.update_g2_has_attn:
                mixed = (attention.flatten(1, 2) @ g2).unflatten(1, attention.shape[1:3]).flatten(2)
                centred = keep(mixed @ own["attn2.vo"] + own["attn2.b"])
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
