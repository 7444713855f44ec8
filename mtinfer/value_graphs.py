"""Energies of many heads without derivatives: the descriptor once, then the fitting net of every head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .graph import SharedGraph, signed
from .inputs import GraphInputs
from .models.layers import Weights
from .models.layout import Argument, Layout
from .models.stage import Tensors

if TYPE_CHECKING:
    from .heads import HeadState

__all__ = ["Described", "ValueGraphs"]


@dataclass(frozen=True)
class Described:
    """Descriptors of the atoms of one weight group."""

    group: int
    #: (n,) int64, place of the atoms among all
    atoms: Tensor
    #: (n, width) float64
    features: Tensor


@dataclass
class ValueGraphs:
    """Graphs of descriptors and of fitting nets, one for each architecture of either."""

    _graphs: dict[str, SharedGraph] = field(default_factory=dict)
    #: name of a head -> first head that was found to have the same descriptor
    _leaders: dict[str, HeadState] = field(default_factory=dict)

    @property
    def graphs(self) -> list[SharedGraph]:
        """Those that were needed so far."""
        return list(self._graphs.values())

    def families(self, states: Iterable[HeadState]) -> list[list[HeadState]]:
        """Heads whose descriptors are the same, in architecture and in every weight."""
        families: dict[str, list[HeadState]] = {}
        for state in states:
            families.setdefault(self._leader(state).name, []).append(state)
        return list(families.values())

    def _leader(self, state: HeadState) -> HeadState:
        if state.name not in self._leaders:
            known = {leader.name: leader for leader in self._leaders.values()}.values()
            found = (leader for leader in known if _same_descriptor(leader, state))
            self._leaders[state.name] = next(found, state)
        return self._leaders[state.name]

    def describe(self, layouts: Sequence[Layout], state: HeadState) -> list[Described]:
        """Descriptor of every atom, by weight group."""
        model = state.model
        names = [name for name in state.weight_names if name.startswith("descriptor.")]
        displacements, tensors = model.descriptor.arguments()
        n = len(displacements)

        def function(data: Tensors, named: Weights) -> Tensors:
            features, _ = model.descriptor(data[:n], data[n:], named)
            return (features.to(torch.float64),)

        by_group: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for layout in layouts:
            named = state.named(layout.group)
            if model.is_large(layout):
                features = model.described_in_parts(layout, named, state.stages).to(torch.float64)
            else:
                weights = {name: named[name] for name in names}
                graph = self._graph(
                    repr(model.descriptor), function, [*displacements, *tensors], weights, state
                )
                data = (*layout.displacements, *model.of_descriptor(layout.tensors))
                (features,) = graph(data, tuple(weights.values()))
            by_group.setdefault(layout.group, []).append((layout.atoms, features))
        return [
            Described(group, *(torch.cat(each) for each in zip(*found, strict=True)))
            for group, found in by_group.items()
        ]

    def fit(self, described: Sequence[Described], inputs: GraphInputs, state: HeadState) -> Tensor:
        """Energies of the structures of `inputs`, shape (n_frames,), eV, on the CPU."""
        model = state.model
        names = [name for name in state.weight_names if not name.startswith("descriptor.")]
        fitting = model.fitting
        arguments = [Argument(("atoms", model.descriptor.width)), Argument(("atoms",), torch.int64)]
        arguments += model.parameter_arguments()

        def function(data: Tensors, named: Weights) -> Tensors:
            features, types, fparam, aparam = data
            return (model.fitted(features, types, fparam, aparam, named),)

        energies = state.bias[inputs.types]
        for own in described:
            named = state.named(own.group)
            weights = {name: named[name] for name in names}
            graph = self._graph(repr(fitting), function, arguments, weights, state)
            data = (own.features, inputs.types[own.atoms], *model.parameters_of(inputs, own.atoms))
            (net,) = graph(data, tuple(weights.values()))
            energies[own.atoms] += net
        # on the CPU, where `index_add_` adds in the order of the atoms
        total = torch.zeros(inputs.n_frames, dtype=energies.dtype, device="cpu")
        return total.index_add_(0, inputs.frames.cpu(), energies.cpu())

    def _graph(
        self,
        architecture: str,
        function: Callable[[Tensors, Weights], Tensors],
        arguments: Sequence[Argument],
        weights: Mapping[str, Tensor],
        state: HeadState,
    ) -> SharedGraph:
        signature = signed(f"value {architecture}", weights)
        if signature not in self._graphs:
            self._graphs[signature] = SharedGraph.of_named(
                function, signature, arguments, weights, state.graph.compilation
            )
        return self._graphs[signature]


def _same_descriptor(a: HeadState, b: HeadState) -> bool:
    if (a.model.type_map, a.model.descriptor) != (b.model.type_map, b.model.descriptor):
        return False
    if len(a.weights) != len(b.weights):
        return False
    groups = [(_of_descriptor(a, k), _of_descriptor(b, k)) for k in range(len(a.weights))]
    return all(
        mine.keys() == theirs.keys()
        and all(w is theirs[name] or torch.equal(w, theirs[name]) for name, w in mine.items())
        for mine, theirs in groups
    )


def _of_descriptor(state: HeadState, group: int) -> dict[str, Tensor]:
    return {name: w for name, w in state.named(group).items() if name.startswith("descriptor.")}
