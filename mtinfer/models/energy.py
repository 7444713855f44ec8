"""A head as an energy model: descriptor, fitting net, per-type biases, and the derivatives of the energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor

from ..descriptor_kinds import KINDS, kind_of
from ..errors import UnsupportedModelError
from ..inputs import GraphInputs, ParameterSpec
from .descriptor import Descriptor, DescriptorKind, InParts, Setting
from .fitting import EnergyFitting
from .gather import Index, segment_sum
from .hybrid import SINGLE, Hybrid
from .layers import Weights, required
from .layout import Argument, Layout
from .stage import Call

#: kind of descriptor -> class
_DESCRIPTORS: dict[str, DescriptorKind] = {**SINGLE, "hybrid": Hybrid}


@dataclass(frozen=True)
class EnergyModel:
    """Architecture of one head: everything about it except its weights.

    Its repr is the signature of its graph: fields that reach the graph as data are left out of it, here and
    in all parts.
    """

    type_map: tuple[str, ...] = field(repr=False)
    descriptor: Descriptor
    fitting: EnergyFitting
    #: types whose energy is zero, and types whose fitting net is left out (their `out_bias` stays)
    atom_exclude_types: tuple[int, ...] = field(repr=False)
    fitting_exclude_types: tuple[int, ...] = field(repr=False)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], dialect: str, *, graph_lower_disabled: bool = False
    ) -> EnergyModel:
        """Build from the configuration of one head.

        Parameters
        ----------
        config
            entry of `model_dict` of a checkpoint (or the whole of `model_params` of a single-task one).
        dialect
            "pt" or "pt_expt"; decides the neighbour semantics and a few defaults.
        graph_lower_disabled
            flag stored by pt_expt: the model keeps the dense neighbour list.

        Raises
        ------
        UnsupportedModelError
            If the head uses a feature that is not supported.
        """
        config = _without_nulls(config)
        described = required(config, "descriptor", "the head")
        kind = kind_of(described)
        if kind not in _DESCRIPTORS:
            raise UnsupportedModelError(
                f"descriptor {kind!r} is not supported; supported are {', '.join(sorted(_DESCRIPTORS))}"
            )
        type_map = tuple(required(config, "type_map", "the head"))
        descriptor = _DESCRIPTORS[kind].from_config(
            described,
            Setting(
                type_map,
                dialect,
                pair_exclude=tuple((a, b) for a, b in config.get("pair_exclude_types") or ()),
                graph=dialect == "pt_expt" and not graph_lower_disabled and KINDS[kind].graph_native,
            ),
        )
        fitting = EnergyFitting.from_config(
            required(config, "fitting_net", "the head"),
            n_types=len(type_map),
            descriptor_width=descriptor.width,
            mixed_types=descriptor.mixed_types,
            dialect=dialect,
        )
        excluded = config.get("atom_exclude_types") or ()
        of_fitting = config["fitting_net"].get("exclude_types", excluded)
        types = range(len(type_map))  # others are passed over, as upstream does
        return cls(
            type_map,
            descriptor,
            fitting,
            atom_exclude_types=tuple(t for t in excluded if t in types),
            fitting_exclude_types=tuple(t for t in of_fitting if t in types),
        )

    @property
    def rcut(self) -> float:
        """Cutoff of the neighbour list, Å."""
        return self.descriptor.rcut

    def parameters(self) -> dict[str, ParameterSpec]:
        """Every weight that a file must hold: canonical name -> shape and dtype."""
        n_types = len(self.type_map)
        return {
            "out_bias": ParameterSpec((1, n_types, 1), torch.float64),
            "out_std": ParameterSpec((1, n_types, 1), torch.float64),
            "min_nbor_dist": ParameterSpec((), torch.float64),
            **self.descriptor.parameters(),
            **self.fitting.parameters(),
        }

    def prepare(
        self, weights: Weights, of_descriptor: Sequence[Mapping[str, Tensor]] | None = None
    ) -> list[dict[str, Tensor]]:
        """Weights as the graph reads them, one dict per weight group.

        What depends on weights alone is multiplied out here, once per head. Differentiable.

        Parameters
        ----------
        weights
            canonical name -> tensor, as `parameters` lists them.
        of_descriptor
            ``descriptor.prepare(weights)`` where a head with the same descriptor has it.
        """
        if of_descriptor is None:
            of_descriptor = self.descriptor.prepare(weights)
        excluded = (*self.atom_exclude_types, *self.fitting_exclude_types)
        shared = {"energy.kept": self._kept(excluded, weights)}
        return [
            {**shared, **group, **self.fitting.group(weights, index)}
            for index, group in enumerate(of_descriptor)
        ]

    def bias(self, weights: Weights) -> Tensor:
        """Energy of every type that is added to what the graph returns, shape (n_types,), eV, float64.

        Outside of the graph, since next to it a wrong interaction energy could pass for rounding.
        """
        return weights["out_bias"][0, :, 0] * self._kept(self.atom_exclude_types, weights)

    def _kept(self, excluded: Sequence[int], weights: Weights) -> Tensor:
        kept = torch.ones(len(self.type_map), dtype=torch.float64, device=weights["out_bias"].device)
        kept[list(excluded)] = 0.0
        return kept

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph, as `layouts` makes them."""
        displacements, tensors = self.descriptor.arguments()
        return displacements, [*tensors, *self.parameter_arguments()]

    def parameter_arguments(self) -> list[Argument]:
        """Declare what `parameters_of` returns, the last tensors of a layout."""
        return [Argument(("atoms", n)) for n in (self.fitting.numb_fparam, self.fitting.numb_aparam)]

    @staticmethod
    def parameters_of(inputs: GraphInputs, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Frame and atomic parameters of some atoms, shapes (n, numb_fparam) and (n, numb_aparam)."""
        return inputs.fparam[inputs.frames[atoms]], inputs.aparam[atoms]

    @staticmethod
    def of_descriptor(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tensors of a layout that the descriptor reads: all but the frame and atomic parameters."""
        return tensors[:-2]

    def layouts(self, inputs: GraphInputs, *, split: bool = True) -> tuple[list[Layout], int]:
        """Arguments of the graph for `inputs`, and how many atoms lost neighbours to truncation.

        With `split` there are as many calls as run fastest; without, one per weight group, in their order.
        """
        pairs = self.descriptor.selection(inputs)
        layouts = self.descriptor.layouts(inputs, pairs, split=split)
        complete = (
            replace(layout, tensors=(*layout.tensors, *self.parameters_of(inputs, layout.atoms)))
            for layout in layouts
        )
        return list(complete), pairs.n_truncated

    def atom_energies(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> Tensor:
        """Atomic energies without `bias` of the centres of one layout, shape (n_centers,), eV, float64.

        Parameters
        ----------
        displacements, tensors
            as in `Layout`.
        weights
            one group of `prepare`.
        """
        return self._energies(self.descriptor, displacements, tensors, weights)

    def _energies(
        self,
        describe: Callable[..., tuple[Tensor, Tensor]],
        displacements: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        weights: Weights,
    ) -> Tensor:
        *own, fparam, aparam = tensors
        features, types = describe(displacements, tuple(own), weights)
        return self.fitted(features, types, fparam, aparam, weights)

    def fitted(
        self, features: Tensor, types: Tensor, fparam: Tensor, aparam: Tensor, weights: Weights
    ) -> Tensor:
        """Atomic energies without `bias` from the descriptor (n, width) of each atom, (n,), eV, float64."""
        energies = self.fitting(features, types, fparam, aparam, weights).to(torch.float64)
        return energies * weights["energy.kept"][types]

    def energies_and_gradients(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, ...]:
        """Atomic energies without `bias`, and dE/d(displacement) for every displacement array, eV/Å.

        Plain functions of tensors all the way down, so that it can be traced; differentiable by weights that
        require a gradient.
        """
        further = any(weight.requires_grad for weight in weights.values())
        return _differentiated(
            lambda varied: self.atom_energies(varied, tensors, weights), displacements, further=further
        )

    def is_large(self, layout: Layout) -> bool:
        """Whether a call of the graph on `layout` would take too much memory; see `in_parts`."""
        return self._staged is not None and self._staged.is_large(layout)

    @cached_property
    def _staged(self) -> InParts | None:
        return self.descriptor if isinstance(self.descriptor, InParts) else None

    def in_parts(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights, call: Call
    ) -> tuple[Tensor, ...]:
        """Do what `energies_and_gradients` does stage by stage, with less memory; not to be traced.

        Parameters
        ----------
        call
            calls a stage, and is differentiable for torch's autograd.
        """
        describe = partial(self._describe_in_parts, call=call)
        return _differentiated(
            lambda varied: self._energies(describe, varied, tensors, weights), displacements
        )

    def described_in_parts(self, layout: Layout, weights: Weights, call: Call) -> Tensor:
        """Descriptor of the centres of a layout in parts, without derivatives, shape (n_centers, width)."""
        with torch.no_grad():
            own = self.of_descriptor(layout.tensors)
            return self._describe_in_parts(layout.displacements, own, weights, call)[0]

    def _describe_in_parts(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights, call: Call
    ) -> tuple[Tensor, Tensor]:
        if self._staged is None:
            raise TypeError(f"{type(self.descriptor).__name__} is not evaluated in parts")
        return self._staged.in_parts(displacements, tensors, weights, call)


def _without_nulls(config: Any) -> Any:
    """Leave out keys without a value, for which the format has its defaults."""
    if isinstance(config, Mapping):
        return {key: _without_nulls(value) for key, value in config.items() if value is not None}
    if isinstance(config, list) and any(isinstance(entry, Mapping) for entry in config):
        return [_without_nulls(entry) for entry in config]
    return config


def _differentiated(
    energies_of: Callable[[tuple[Tensor, ...]], Tensor],
    displacements: tuple[Tensor, ...],
    *,
    further: bool = False,
) -> tuple[Tensor, ...]:
    """Energies and the gradient of their sum, which can be differentiated `further`.

    By torch.autograd, not torch.func.grad: that imports the compiler, a second and 80 MiB, even where nothing
    is compiled.
    """
    with torch.enable_grad():
        varied = tuple(array.detach().requires_grad_(True) for array in displacements)
        energies = energies_of(varied)
        gradients = torch.autograd.grad(energies.sum(), varied, create_graph=further, materialize_grads=True)
    return (energies if further else energies.detach(), *gradients)


def edge_gradients(
    layouts: Sequence[Layout], gradients: Sequence[Sequence[Tensor]], inputs: GraphInputs
) -> Tensor:
    """Collect the gradients of all layouts on the pairs of `inputs`, shape (n_edges, 3), eV/Å."""
    n_edges = inputs.displacements.shape[0]
    # layouts have no centre in common, hence no pair; blocks of one layout may
    blocks = zip(*(layout.blocks for layout in layouts), strict=True)
    totals = []
    for of_layouts, arrays in zip(blocks, zip(*gradients, strict=True), strict=True):
        edges = torch.cat([block.flatten() for block in of_layouts])
        values = torch.cat([gradient.reshape(-1, 3) for gradient in arrays])
        total = inputs.displacements.new_zeros(n_edges + 1, 3)  # the last is for empty slots
        totals.append(total.index_copy_(0, edges, values)[:-1])
    return reduce(torch.add, totals) if totals else torch.zeros_like(inputs.displacements)


def forces_and_virial(gradient: Tensor, inputs: GraphInputs) -> tuple[Tensor, Tensor]:
    """Forces and virial from g = dE/dd of every pair, d = r_j - r_i.

    F_k = Σ_(k,j) g - Σ_(i,k) g and W = -Σ g ⊗ d, summed in the same order at every call.

    Parameters
    ----------
    gradient
        shape (n_edges, 3), eV/Å.

    Returns
    -------
    forces (n_atoms, 3), eV/Å, and virial (n_frames, 3, 3), eV
    """
    if gradient.device.type == "cpu":
        ends = torch.cat([inputs.centers, inputs.neighbors])
        forces = gradient.new_zeros(inputs.n_atoms, 3)
        forces.index_add_(0, ends, torch.cat([gradient, -gradient]))
    else:  # where `index_add_` adds in any order
        outgoing = Index.of(inputs.centers, inputs.n_atoms, ascending=True)
        incoming = Index.of(inputs.neighbors, inputs.n_atoms)
        forces = segment_sum(gradient, outgoing) - segment_sum(gradient, incoming)
    pieces = zip(_by_frame(gradient, inputs), _by_frame(inputs.displacements, inputs), strict=True)
    virial = torch.stack([-(g.t() @ d) for g, d in pieces])
    return forces, virial


def _by_frame(of_pairs: Tensor, inputs: GraphInputs) -> tuple[Tensor, ...]:
    """Rows of each frame of an array (n_edges, ...): pairs are sorted by centre, hence by frame."""
    if inputs.n_frames == 1:
        return (of_pairs,)
    per_frame = torch.bincount(inputs.frames[inputs.centers], minlength=inputs.n_frames)
    return torch.split(of_pairs, per_frame.tolist())
