"""DPA-1 (`se_atten`) and `se_atten_v2`: type-aware pair features, gated self-attention, moments.

Zhang et al., npj Comput. Mater. 10, 94 (2024), arXiv:2208.08236.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..descriptor_kinds import KINDS, with_dialect_defaults
from ..errors import UnsupportedModelError
from ..inputs import GraphInputs, ParameterSpec
from .activations import known_activation
from .attention import Attention
from .descriptor import Setting
from .environment import (
    Environment,
    TypeEmbedding,
    add_to_first_row,
    directions,
    distances,
    invariants,
    statistics,
    statistics_parameters,
)
from .gather import lookup
from .layers import (
    Sloped,
    Weights,
    check_axis_neuron,
    precision,
    required,
    row_sum,
)
from .layout import (
    Argument,
    Layout,
    Pairs,
    Selection,
    VectorsOnSlots,
    on_slots,
    padded_rows,
    row_chunks,
    with_empty,
)
from .pair_network import PairNetwork
from .radial import along, radial_moment
from .stage import Keep

#: as for `row_chunks`: attention makes arrays of slots times slots of one centre
_WITH_ATTENTION = 6144, 38_000


class Centers(NamedTuple):
    """Further arguments of a call: what it knows of n centres and their m slots."""

    #: (n,)
    types: Tensor
    #: (n, m), row of the pair tables
    pair: Tensor
    #: (n,), row of the table of empty slots
    empty_pair: Tensor
    #: (n,) float64, empty slots
    n_empty: Tensor
    #: (n,) float64, slots that upstream has and the array lacks
    n_phantom: Tensor


@dataclass(frozen=True)
class DPA1:
    """Descriptor `se_atten` / `se_atten_v2`. Its graph arguments are those of `layouts`."""

    n_types: int
    sel: int
    environment: Environment
    axis_neuron: int
    pair_network: PairNetwork
    attention: Attention
    type_embedding: TypeEmbedding
    concat_output_tebd: bool
    dtype: torch.dtype
    selection: Selection = field(repr=False)
    #: prefix of its weights; the first stage of DPA-2 is a DPA-1, too
    block: str

    mixed_types = True
    reads_charge_spin = False
    default_chg_spin = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], setting: Setting, block: str = "descriptor.se_atten"
    ) -> DPA1:
        """Read a descriptor configuration; `block` is the prefix of its weights."""
        config = with_dialect_defaults(config, KINDS["se_atten"].defaults, setting.dialect)
        config = _with_v2_defaults(config)
        if int(config.get("lmax", 1)) > 1:
            raise UnsupportedModelError(
                f"se_atten option lmax={config['lmax']} is not supported; supported is 1"
            )
        if config.get("attn_mask"):
            raise UnsupportedModelError("se_atten option attn_mask=true is not supported")
        n_types = len(setting.type_map)
        dtype = precision(config.get("precision", "default"))
        neuron, axis_neuron = tuple(config.get("neuron", (25, 50, 100))), int(config["axis_neuron"])
        check_axis_neuron(axis_neuron, neuron[-1], "se_atten")
        smooth = bool(config.get("smooth_type_embedding", config.get("smooth_type_embdding", True)))
        sel = required(config, "sel", "se_atten")
        sel = sel if isinstance(sel, int) else sum(sel)
        hidden = int(config.get("attn", 128))
        temperature = config.get("temperature")
        scaling = float(config.get("scaling_factor", 1.0))
        tebd_dim = int(config.get("tebd_dim", 8))
        return cls(
            n_types=n_types,
            sel=sel,
            environment=Environment(
                float(required(config, "rcut", "se_atten")),
                float(required(config, "rcut_smth", "se_atten")),
                float(config.get("env_protection", 0.0)),
            ),
            axis_neuron=axis_neuron,
            pair_network=PairNetwork(
                block,
                neuron,
                known_activation(config.get("activation_function", "tanh")),
                bool(config.get("resnet_dt", False)),
                dtype,
                tebd_dim,
                _is_strip(config),
                bool(config.get("type_one_side", False)),
                smooth,
            ),
            attention=Attention(
                block,
                int(config.get("attn_layer", 2)),
                neuron[-1],
                hidden,
                dtype,
                smooth,
                bool(config.get("attn_dotr", True)),
                bool(config.get("normalize", True)),
                float(temperature) if temperature is not None else (hidden * scaling) ** -0.5,
                float(config.get("ln_eps") or 1e-5),
            ),
            type_embedding=TypeEmbedding(
                "descriptor.type_embedding",
                n_types,
                tebd_dim,
                bool(config.get("use_tebd_bias", False)),
                dtype,
                bool(config.get("use_econf_tebd", False)),
                setting.type_map,
            ),
            concat_output_tebd=bool(config.get("concat_output_tebd", True)),
            dtype=dtype,
            selection=Selection(
                n_types,
                None if setting.graph else (sel,),
                exclude=tuple((a, b) for a, b in config.get("exclude_types") or ()),
                pair_exclude=setting.pair_exclude,
            ),
            block=block,
        )

    @property
    def rcut(self) -> float:
        return self.environment.rcut

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""
        width = self.attention.width * self.axis_neuron
        return width + self.type_embedding.width if self.concat_output_tebd else width

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        return (
            statistics_parameters(self.block, self.n_types, self.sel, self.dtype)
            | self.pair_network.parameters()
            | self.attention.parameters()
            | self.type_embedding.parameters()
        )

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph, in the single group of this descriptor."""
        embedding = self.type_embedding.rows(weights)
        mean, stddev = statistics(weights, self.block)
        prepared = {
            "descriptor.type_embedding": embedding,
            f"{self.block}.mean": mean,
            f"{self.block}.stddev": stddev,
        }
        prepared |= self.pair_network.prepare(weights, embedding)
        prepared |= {name: weights[name] for name in self.attention.parameters()}
        prepared[f"{self.block}.empty"] = self._empty_slot(prepared)
        return [prepared]

    def _empty_slot(self, prepared: Weights) -> Tensor:
        """Contribution of one empty slot to component 0 of the moment, by pair of types, (n_types², g).

        Upstream lets an empty slot take part with a raw row of zeros, and with the type of the frame's
        first atom as its neighbour.
        """
        n_types = self.n_types
        s = (-prepared[f"{self.block}.mean"] / prepared[f"{self.block}.stddev"])[:, :1]
        s = s.repeat_interleave(n_types, 0)
        pair = torch.arange(n_types * n_types, device=s.device)
        nothing = torch.zeros_like(s)
        g = self.pair_network(Sloped(s, nothing), Sloped(nothing, nothing), pair, prepared).value.flatten(1)
        for k in range(self.attention.n_layers):
            g = self.attention.close(k, g, 0.0, prepared)
        return s * g

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph; see `__call__`."""
        index = torch.int64
        return [Argument(("atoms", "slots", 3))], [
            Argument(("atoms",), index),
            Argument(("atoms", "slots"), index),
            Argument(("atoms",), index),
            Argument(("atoms",)),
            Argument(("atoms",)),
        ]

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """Padded neighbour matrices, a few centres each."""
        limit, n_bytes = _WITH_ATTENTION if self.attention.n_layers else (None, None)
        calls = row_chunks(pairs.counts, split=split, limit=limit, n_bytes=n_bytes)
        return self.matrices(inputs, pairs, calls)

    def matrices(self, inputs: GraphInputs, pairs: Pairs, calls: Sequence[Tensor]) -> list[Layout]:
        """One padded neighbour matrix per call, whose centres `calls` lists, shape (n,)."""
        vectors = VectorsOnSlots(inputs.displacements, pairs.edges, self.rcut)
        types_j = with_empty(inputs.types.index_select(0, pairs.neighbors), 0)
        types_i = inputs.types * self.n_types
        empty_pairs = types_i + inputs.types[torch.searchsorted(inputs.frames, inputs.frames)]
        n_empty, n_phantom = pairs.n_empty[:, 0].to(torch.float64), pairs.n_phantom.to(torch.float64)
        layouts = []
        for atoms in calls:
            slots = padded_rows(pairs.counts, atoms)
            displacements, edges = vectors(slots)
            centers = Centers(
                inputs.types[atoms],
                types_i[atoms].unsqueeze(1) + on_slots(types_j, slots),
                empty_pairs[atoms],
                n_empty[atoms],
                n_phantom[atoms],
            )
            layouts.append(Layout(0, (displacements,), tuple(centers), (edges,), atoms))
        return layouts

    def __call__(
        self,
        displacements: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        weights: Weights,
        keep: Keep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre.

        Parameters
        ----------
        displacements
            one array, shape (n, m, 3), Å.
        tensors
            members of `Centers`.
        keep
            of a stage, without attention only: the moment (n, 4, g) is kept, and the pair features are
            evaluated anew for the derivative.

        Returns
        -------
        descriptor, shape (n, width), and types, shape (n,)
        """
        types, pair, empty_pair, n_empty, n_phantom = Centers(*tensors)
        vectors, normalization = displacements[0].to(self.dtype), self.normalization(types, weights)
        rows, w, mask = self.environment.rows(vectors, *normalization)
        r = distances(vectors)
        radial = self.environment.radial(r.detach(), *normalization)
        if self.attention.n_layers:
            # products of their own, or the compiler evaluates both anew for every pair of slots
            w, mask = row_sum(w), row_sum(mask)
            g = self.pair_network(*radial, pair, weights).each(lambda part: part.flatten(2))
            # each centre's phantoms: the slots that upstream has and this array lacks
            n_phantom = n_phantom.to(self.dtype)[:, None, None]
            doubles = rows
            if self.dtype != torch.float64:
                scales = (array.to(torch.float64) for array in normalization)
                doubles, _, _ = self.environment.rows(displacements[0], *scales)
            units = directions(doubles).to(self.dtype)
            features = self.attention(along(r, g), units, w, mask, n_phantom, weights)
            moment = rows.transpose(1, 2) @ features
        else:
            own = {name: weights[name] for name in weights if name.startswith(f"{self.block}.")}
            arrays = (*radial[0], *radial[1], pair)
            moment = radial_moment(self._pair_features, rows, r, arrays, own, again=keep is not None)
            moment = moment if keep is None else keep(moment)
        return self.features(moment, types, empty_pair, n_empty, weights), types

    def _pair_features(
        self, s: Tensor, s_slope: Tensor, w: Tensor, w_slope: Tensor, pair: Tensor, weights: Weights
    ) -> Sloped:
        return self.pair_network(Sloped(s, s_slope), Sloped(w, w_slope), pair, weights)

    def normalization(self, types: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the rows of centres of these types, (n,) -> (n, 1, 4) each."""
        mean, stddev = (weights[f"{self.block}.{name}"][types].unsqueeze(1) for name in ("mean", "stddev"))
        return mean, stddev

    def features(
        self, moment: Tensor, types: Tensor, empty_pair: Tensor, n_empty: Tensor, weights: Weights
    ) -> Tensor:
        """Descriptor, shape (n, width), from the moment of the neighbours, shape (n, 4, g)."""
        empty = lookup(weights[f"{self.block}.empty"], empty_pair)
        moment = add_to_first_row(moment, n_empty.to(self.dtype).unsqueeze(1) * empty)
        features = invariants(moment / self.sel, self.axis_neuron)
        if not self.concat_output_tebd:
            return features
        return torch.cat([features, lookup(weights["descriptor.type_embedding"], types)], dim=1)


def _is_strip(config: Mapping[str, Any]) -> bool:
    stripped = config.get("stripped_type_embedding")
    if stripped is not None:
        return bool(stripped)
    mode = config.get("tebd_input_mode", "concat")
    if mode not in ("concat", "strip"):
        raise UnsupportedModelError(f"tebd_input_mode {mode!r} is unknown; known are concat and strip")
    return bool(mode == "strip")


def _with_v2_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if config.get("type") != "se_atten_v2":
        return config
    forced = {"tebd_input_mode": "strip", "stripped_type_embedding": None, "smooth_type_embedding": True}
    return {**config, **forced}
