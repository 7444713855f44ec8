"""A batch as the compiled step takes it: labelled frames, padded neighbour arrays, and where sums go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Frame
from ..errors import DataError, StructureError, nearest
from ..inputs import GraphInputs
from ..models import EnergyModel
from ..models.gather import Index
from ..models.layout import Argument, Layout, on_slots, with_empty
from ..neighbors import find_candidates, graph_inputs
from ..parameters import aparam_of, charge_spin_of, fparam_of

__all__ = ["Batch", "Labels", "Structures", "declared", "make_batch", "parameters_of"]


T = TypeVar("T")


class ModelCall(NamedTuple, Generic[T]):
    """One call of the model, for one weight group: what it reads, and where its results belong."""

    #: as in `Layout`
    displacements: tuple[T, ...]
    tensors: tuple[T, ...]
    atoms: T
    #: one per displacement array, without its last axis: atoms at both ends of every slot
    centers: tuple[T, ...]
    neighbors: tuple[T, ...]


class Structures(NamedTuple, Generic[T]):
    """What a step reads of structures: tensors in a batch, declarations for a graph.

    Sums go as `Index` says, by order and starts: from ends of slots to atoms, from slots to their centres,
    from atoms to frames, and from rows of the atomic energies to frames.
    """

    #: by weight group
    calls: tuple[ModelCall[T], ...]
    ends: tuple[T, T]
    slots: tuple[T, T]
    atoms: tuple[T, T]
    rows: tuple[T, T]
    #: (n_atoms,) int64 each
    frames: T
    types: T


class Labels(NamedTuple, Generic[T]):
    """Labels of a batch, and the weight of every squared error in the loss.

    All normalisation and all prefactors are in the weights, so that they are data for the compiled step; a
    label that a frame lacks has weight zero.
    """

    #: (n_frames,), eV
    energy: T
    energy_weight: T
    #: (n_atoms, 3), eV/Å, and (n_atoms,)
    forces: T
    force_weight: T
    #: (n_frames, 9), eV, and (n_frames,)
    virial: T
    virial_weight: T


DECLARED_LABELS = Labels(
    Argument(("frames",)),
    Argument(("frames",)),
    Argument(("all atoms", 3)),
    Argument(("all atoms",)),
    Argument(("frames", 9)),
    Argument(("frames",)),
)


def leaves(nest: Any) -> Iterator[Any]:
    """Yield what is in nested tuples, in order."""
    if isinstance(nest, tuple):
        for part in nest:
            yield from leaves(part)
    else:
        yield nest


def like(nest: Any, values: Iterator[Any]) -> Any:
    """Nested tuples of the same kinds with other `values`, in the order of `leaves`."""
    if not isinstance(nest, tuple):
        return next(values)
    parts = [like(part, values) for part in nest]
    return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)


@dataclass(frozen=True)
class Batch:
    """Frames of one task, ready for a step."""

    #: as `declared` declares them
    structures: Structures[Tensor]
    #: energies, forces and virials of the frames; zeros where `has` says that there is none
    energy: Tensor
    forces: Tensor
    virial: Tensor
    #: (n_frames, 3) float64, 1 where a frame has an energy, forces, a virial
    has: Tensor
    #: (n_frames,) float64, atoms that count in the loss
    n_atoms: Tensor
    #: (n_atoms,) float64, 0 for atoms of excluded types
    counted: Tensor
    #: atoms with more neighbours than the model keeps
    n_truncated: int

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """Arguments of the graph that depend on structures alone."""
        return tuple(leaves(self.structures))

    @cached_property
    def per_atom(self) -> Tensor:
        """1/N of every frame, where N are the atoms that count, shape (n_frames,)."""
        return 1.0 / self.n_atoms.clamp(min=1.0)

    @cached_property
    def error_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights that make sums of (ΔE/N)², |ΔF|² and (ΔW/N)²: (n_frames,), (n_atoms,), (n_frames,)."""
        has_energy, has_forces, has_virial = self.has.unbind(1)
        square = self.per_atom * self.per_atom
        return has_energy * square, has_forces[self.structures.frames] * self.counted, has_virial * square

    @cached_property
    def n_terms(self) -> Tensor:
        """Terms of the sums that `error_weights` make, (3,), on the CPU."""
        has_energy, _, has_virial = self.has.unbind(1)
        terms = [has_energy.sum(), 3.0 * self.error_weights[1].sum(), 9.0 * has_virial.sum()]
        return torch.stack(terms).cpu()

    @cached_property
    def mean_weights(self) -> Labels[Tensor]:
        """Labels whose weights make means: of ΔE²/N, of |ΔF|² over components, and of ΔW²/N over components.

        Each mean is over the frames that have the label.
        """
        has_energy, _, has_virial = self.has.unbind(1)
        n_energies, n_forces, n_virials = self.n_terms.clamp(min=1.0)
        return Labels(
            energy=self.energy,
            energy_weight=has_energy * self.per_atom / n_energies,
            forces=self.forces,
            force_weight=self.error_weights[1] / n_forces,
            virial=self.virial,
            virial_weight=has_virial * self.per_atom / n_virials,
        )

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(x.numel() * x.element_size() for x in (*self.data, self.forces))

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; the batch itself where it is there."""
        if self.energy.device == device:
            return self
        moved = {
            name: getattr(self, name).to(device)
            for name in ("energy", "forces", "virial", "has", "n_atoms", "counted")
        }
        structures = like(self.structures, (x.to(device) for x in self.data))
        return replace(self, structures=structures, **moved)


def declared(model: EnergyModel) -> Structures[Argument]:
    """Declare what the step reads of structures."""
    displacements, tensors = map(tuple, model.arguments())
    index = torch.int64
    slots = tuple(Argument(argument.axes[:-1], index) for argument in displacements)
    call = ModelCall(displacements, tensors, Argument(("atoms",), index), slots, slots)
    n_calls = 1 if model.descriptor.mixed_types else len(model.type_map)
    calls = (like(call, (_within(argument, k) for argument in leaves(call))) for k in range(n_calls))
    ends, slots_of_all, rows, of_frames, of_atoms = (
        Argument((axis,), index) for axis in ("ends", "all slots", "all rows", "frames", "all atoms")
    )
    return Structures(
        tuple(calls),
        ends=(ends, of_atoms),
        slots=(slots_of_all, of_atoms),
        atoms=(of_atoms, of_frames),
        rows=(rows, of_frames),
        frames=of_atoms,
        types=of_atoms,
    )


def _within(argument: Argument, call: int) -> Argument:
    axes = tuple(f"{axis} in call {call}" if isinstance(axis, str) else axis for axis in argument.axes)
    return Argument(axes, argument.dtype)


def make_batch(frames: Sequence[Frame], model: EnergyModel) -> Batch:
    """Build a batch of frames of any sizes.

    Raises
    ------
    DataError
        An element is not in the type map, or a frame lacks a parameter that the model needs.
    """
    inputs = frame_inputs(frames, model)
    layouts, n_truncated = model.layouts(inputs, split=False)
    counted = torch.ones(len(model.type_map), dtype=torch.float64)
    counted[list(model.atom_exclude_types)] = 0.0
    counted = counted[inputs.types]
    virials = [frame.comparable_virial for frame in frames]
    return Batch(
        structures=_structures(layouts, inputs),
        energy=torch.tensor([frame.energy or 0.0 for frame in frames], dtype=torch.float64),
        forces=torch.from_numpy(
            np.concatenate([np.zeros((len(f.atoms), 3)) if f.forces is None else f.forces for f in frames])
        ),
        virial=torch.from_numpy(np.stack([np.zeros(9) if v is None else v.reshape(9) for v in virials])),
        has=torch.tensor(
            [[label is not None for label in frame.labels] for frame in frames], dtype=torch.float64
        ),
        n_atoms=torch.zeros(len(frames), dtype=torch.float64).index_add_(0, inputs.frames, counted),
        counted=counted,
        n_truncated=n_truncated,
    )


def frame_inputs(frames: Sequence[Frame], model: EnergyModel) -> GraphInputs:
    """All pairs of some frames within the cutoff of a model; see `make_batch`."""
    atoms = [frame.atoms for frame in frames]
    parameters = [parameters_of(frame, model) for frame in frames]
    fparam, aparam, charge_spin = zip(*parameters, strict=True)
    return graph_inputs(
        atoms,
        [find_candidates(structure, model.rcut) for structure in atoms],
        [type_indices(frame, model.type_map) for frame in frames],
        model.rcut,
        fparam=torch.from_numpy(np.stack(fparam)),
        aparam=torch.from_numpy(np.concatenate(aparam)),
        charge_spin=torch.from_numpy(np.stack(charge_spin)),
    )


def type_indices(frame: Frame, type_map: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Index into the type map of every atom."""
    index = {symbol: k for k, symbol in enumerate(type_map)}
    names = frame.atoms.get_chemical_symbols()
    for symbol in names:
        if symbol not in index:
            raise DataError(
                f"{frame.name}: has the element {symbol}, which is not in the type map "
                f"{', '.join(type_map)}{nearest(symbol, type_map)}"
            )
    return np.array([index[name] for name in names], dtype=np.int64)


def parameters_of(
    frame: Frame, model: EnergyModel
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Frame parameters, atomic parameters, and charge and spin of a frame.

    Raises
    ------
    DataError
        The frame lacks what the model needs, or has it in another shape.
    """
    atoms, default = frame.atoms, model.fitting.default_fparam
    try:
        return fparam_of(atoms, model, default), aparam_of(atoms, model), charge_spin_of(atoms, model)
    except StructureError as err:
        raise DataError(f"{frame.name}: {err}") from err


def _structures(layouts: Sequence[Layout], inputs: GraphInputs) -> Structures[Tensor]:
    of_pairs = [with_empty(ends, -1) for ends in (inputs.centers, inputs.neighbors)]

    def call(layout: Layout) -> ModelCall[Tensor]:
        ends = []
        for block in layout.blocks:
            found = [on_slots(which, block) for which in of_pairs]
            # an empty slot, whose gradient is zero, names the centre of its row: no row of a sum is long
            own = found[0][..., :1].clamp(min=0)
            ends.append([torch.where(which < 0, own, which) for which in found])
        centers, neighbors = zip(*ends, strict=True)
        return ModelCall(layout.displacements, layout.tensors, layout.atoms, centers, neighbors)

    calls = tuple(map(call, layouts))
    slots, ends = slots_and_ends(calls)
    rows = torch.cat([call.atoms for call in calls])
    return Structures(
        calls,
        ends=_sums(ends, inputs.n_atoms),
        slots=_sums(slots, inputs.n_atoms),
        atoms=_sums(inputs.frames, inputs.n_frames),
        rows=_sums(inputs.frames[rows], inputs.n_frames),
        frames=inputs.frames,
        types=inputs.types,
    )


def slots_and_ends(calls: Sequence[ModelCall[Tensor]]) -> tuple[Tensor, Tensor]:
    """Centre of every slot of all calls, (n_slots,), and atoms at all ends, centres first, (2 n_slots,)."""
    centers = [ends.reshape(-1) for call in calls for ends in call.centers]
    neighbors = [ends.reshape(-1) for call in calls for ends in call.neighbors]
    return torch.cat(centers), torch.cat([*centers, *neighbors])


def _sums(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    index = Index.of(rows, n)
    return index.order, index.starts
