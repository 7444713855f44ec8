"""Descriptor `se_e2_a`: one embedding net per neighbour type (one-sided) or pair of types.

Zhang et al., NeurIPS 2018, arXiv:1805.09003.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..descriptor_kinds import KINDS, with_dialect_defaults
from ..inputs import GraphInputs, ParameterSpec
from .activations import known_activation
from .descriptor import Setting
from .environment import Environment, add_to_first_row, invariants, statistics, statistics_parameters
from .layers import Network, Sloped, Weights, check_axis_neuron, precision, required
from .layout import Argument, Layout, Pairs, Selection, VectorsOnSlots, padded_rows, row_chunks
from .radial import radial_moment

_BLOCK = "descriptor"


@dataclass(frozen=True)
class SeE2A:
    """Descriptor `se_e2_a`.

    One call of the graph evaluates the centres of one type, with the weights of that type as its weight
    group, so that one graph serves every centre type and one- and two-sided nets alike.
    """

    n_types: int
    sel: tuple[int, ...]
    environment: Environment
    neuron: tuple[int, ...]
    axis_neuron: int
    activation: str
    resnet_dt: bool
    one_sided: bool = field(repr=False)
    dtype: torch.dtype
    selection: Selection = field(repr=False)

    mixed_types = False
    reads_charge_spin = False
    default_chg_spin = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], setting: Setting) -> SeE2A:
        """Read a descriptor configuration; always truncated."""
        config = with_dialect_defaults(config, KINDS["se_e2_a"].defaults, setting.dialect)
        n_types = len(setting.type_map)
        sel = tuple(required(config, "sel", "se_e2_a"))
        neuron, axis_neuron = tuple(config["neuron"]), int(config["axis_neuron"])
        check_axis_neuron(axis_neuron, neuron[-1], "se_e2_a")
        return cls(
            n_types=n_types,
            sel=sel,
            environment=Environment(
                float(required(config, "rcut", "se_e2_a")),
                float(required(config, "rcut_smth", "se_e2_a")),
                float(config.get("env_protection", 0.0)),
            ),
            neuron=neuron,
            axis_neuron=axis_neuron,
            activation=known_activation(config.get("activation_function", "tanh")),
            resnet_dt=bool(config.get("resnet_dt", False)),
            one_sided=bool(config.get("type_one_side", True)),
            dtype=precision(config.get("precision", "default")),
            selection=Selection(
                n_types,
                sel,
                by_type=True,
                exclude=tuple((a, b) for a, b in config.get("exclude_types") or ()),
                pair_exclude=setting.pair_exclude,
            ),
        )

    @property
    def rcut(self) -> float:
        return self.environment.rcut

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""
        return self.neuron[-1] * self.axis_neuron

    def network(self, index: int) -> Network:
        """Embedding net of a neighbour type, or of a pair of types, by its stored index."""
        return Network(
            f"{_BLOCK}.embeddings.{index}", (1, *self.neuron), self.activation, self.resnet_dt, self.dtype
        )

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        specs = statistics_parameters(_BLOCK, self.n_types, sum(self.sel), self.dtype)
        for index in range(self.n_types if self.one_sided else self.n_types**2):
            specs |= self.network(index).parameters()
        return specs

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph, one group per centre type."""
        mean, stddev = statistics(weights, _BLOCK)
        return [self._group(weights, mean[c], stddev[c], c) for c in range(self.n_types)]

    def _group(self, weights: Weights, mean: Tensor, stddev: Tensor, center: int) -> dict[str, Tensor]:
        group = {"descriptor.mean": mean, "descriptor.stddev": stddev}
        s = (-mean / stddev)[:1].reshape(1, 1)
        for t in range(self.n_types):
            stored = self.network(t if self.one_sided else t * self.n_types + center)
            for name in stored.parameters():
                group[self.network(t).prefix + name.removeprefix(stored.prefix)] = weights[name]
            # an empty slot takes part with a raw row of zeros
            group[f"descriptor.empty.{t}"] = s * stored(s, weights)
        return group

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph; see `__call__`."""
        sections = [Argument(("atoms", f"slots of type {t}", 3)) for t in range(self.n_types)]
        return sections, [Argument(("atoms",), torch.int64), Argument(("atoms", self.n_types))]

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """One call or several per centre type; one padded matrix per neighbour type."""
        n_types, n_atoms = self.n_types, inputs.n_atoms
        # pairs by neighbour type, then by centre: one section after the other
        section = inputs.types.index_select(0, pairs.neighbors)
        by_type = torch.cat([(section == t).nonzero().squeeze(1) for t in range(n_types)])
        vectors = VectorsOnSlots(inputs.displacements, pairs.edges.index_select(0, by_type), self.rcut)
        counts = torch.bincount(section * n_atoms + pairs.centers, minlength=n_types * n_atoms)
        totals = counts.reshape(n_types, n_atoms).sum(0)
        n_empty = pairs.n_empty.to(torch.float64)
        layouts = []
        for c in range(n_types):
            of_type = (inputs.types == c).nonzero().squeeze(1)
            for chunk in row_chunks(totals[of_type], split=split):
                atoms = of_type[chunk]
                sections = [vectors(padded_rows(counts, t * n_atoms + atoms)) for t in range(n_types)]
                displacements, blocks = zip(*sections, strict=True)
                layouts.append(Layout(c, displacements, (inputs.types[atoms], n_empty[atoms]), blocks, atoms))
        return layouts

    def __call__(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre, all of one type.

        Parameters
        ----------
        displacements
            one array per neighbour type, shape (n, m_t, 3), Å.
        tensors
            types (n,), number of empty slots per section (n, n_types).

        Returns
        -------
        descriptor, shape (n, width), and types, shape (n,)
        """

        def moment(t: int, rows: Tensor) -> Tensor:
            net, s = self.network(t), rows[..., :1]

            def features(s: Tensor, weights: Weights) -> Sloped:
                first, shift = Sloped(s, torch.ones_like(s)), weights[f"{net.prefix}.layers.0.b"]
                return net.on_scalar(first, None, shift, weights)

            own = {name: weights[name] for name in net.parameters()}
            return radial_moment(features, rows, s, (s.detach(),), own)

        return self.describe(displacements, tensors, weights, moment)

    def describe(
        self,
        displacements: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        weights: Weights,
        moment_of: Callable[[int, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Do what a call does, given the moment (n, 4, g) of neighbour type t and its rows (n, m_t, 4)."""
        types, n_empty = tensors
        n_empty = n_empty.to(self.dtype)
        moment = torch.zeros((), dtype=self.dtype, device=types.device)
        empty = torch.zeros((), dtype=self.dtype, device=types.device)
        for t, vectors in enumerate(displacements):
            rows, _, _ = self.environment.rows(
                vectors.to(self.dtype), weights["descriptor.mean"], weights["descriptor.stddev"]
            )
            moment = moment + moment_of(t, rows)
            empty = empty + n_empty[:, t : t + 1] * weights[f"descriptor.empty.{t}"]
        moment = add_to_first_row(moment, empty) / sum(self.sel)
        return invariants(moment, self.axis_neuron), types
