"""Repformer block of DPA-2: its options, its weights, and the way from displacements to node features.

Zhang et al., npj Comput. Mater. 10, 293 (2024), arXiv:2312.15492, SI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..inputs import ParameterSpec
from .activations import activation
from .environment import Environment, statistics, statistics_parameters
from .fading_softmax import saturated_slots
from .layers import Weights, check_axis_neuron, check_update_style, required, switch, without_prefix
from .repformer_layer import RepformerGeometry, RepformerLayer
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
            If a required key is missing, `update_style` is unknown, `axis_neuron` is too large, or a layer
            has no input.
        """
        given = {
            f.name: required(config, f.name, "repformer") if f.default is MISSING else config[f.name]
            for f in fields(cls)
            if f.name in config or f.default is MISSING
        }
        options = cls(**given)
        check_update_style(options.update_style, "repformer")
        if options.update_g1_has_grrg:
            check_axis_neuron(options.axis_neuron, options.g2_dim, "repformer")
        if options.update_g1_has_drrd:
            check_axis_neuron(options.axis_neuron, options.g1_dim, "repformer")
        conv = options.update_g1_has_conv and not options.g1_out_conv
        if options.g1_out_mlp and not (conv or options.update_g1_has_grrg or options.update_g1_has_drrd):
            raise UnsupportedModelError(
                "the repformer has g1_out_mlp, and its linear layer no input; update_g1_has_grrg, "
                "update_g1_has_drrd, or update_g1_has_conv without g1_out_conv gives it one"
            )
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
