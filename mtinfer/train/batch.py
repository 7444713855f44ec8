"""A batch as the compiled step takes it: labelled frames, padded neighbour arrays, and where sums go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..data import Frame
from ..errors import DataError, StructureError, nearest
from ..inputs import GraphInputs
from ..models import EnergyModel
from ..models.gather import Index
from ..models.layout import Argument, Layout, on_slots, with_empty
from ..neighbors import find_candidates, graph_inputs
from ..parameters import aparam_of, charge_spin_of, fparam_of

__all__ = ["Batch", "Labels", "arguments", "make_batch", "parameters_of"]


class Labels(NamedTuple):
    """Labels of a batch, and the weight of every squared error in the loss.

    All normalisation and all prefactors are in the weights, so that they are data for the compiled step; a
    label that a frame lacks has weight zero.
    """

    #: (n_frames,), eV
    energy: Tensor
    energy_weight: Tensor
    #: (n_atoms, 3), eV/Å, and (n_atoms,)
    forces: Tensor
    force_weight: Tensor
    #: (n_frames, 9), eV, and (n_frames,)
    virial: Tensor
    virial_weight: Tensor


@dataclass(frozen=True)
class Batch:
    """Frames of one task, ready for a step."""

    #: arguments of the graph that depend on structures alone, as `arguments` declares them
    structure: tuple[Tensor, ...]
    #: energies, forces and virials of the frames; zeros where `has` says that there is none
    energy: Tensor
    forces: Tensor
    virial: Tensor
    #: (n_frames, 3) float64, 1 where a frame has an energy, forces, a virial
    has: Tensor
    #: (n_frames,) float64, atoms that count in the loss
    n_atoms: Tensor
    #: (n_atoms,) int64
    frames: Tensor
    #: (n_atoms,) float64, 0 for atoms of excluded types
    counted: Tensor
    #: atoms with more neighbours than the model keeps
    n_truncated: int

    @cached_property
    def per_atom(self) -> Tensor:
        """1/N of every frame, where N are the atoms that count, shape (n_frames,)."""
        return 1.0 / self.n_atoms.clamp(min=1.0)

    @cached_property
    def error_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights that make sums of (ΔE/N)², |ΔF|² and (ΔW/N)²: (n_frames,), (n_atoms,), (n_frames,)."""
        has_energy, has_forces, has_virial = self.has.unbind(1)
        square = self.per_atom * self.per_atom
        return has_energy * square, has_forces[self.frames] * self.counted, has_virial * square

    @cached_property
    def n_terms(self) -> Tensor:
        """Terms of the sums that `error_weights` make, (3,), on the CPU."""
        has_energy, _, has_virial = self.has.unbind(1)
        terms = [has_energy.sum(), 3.0 * self.error_weights[1].sum(), 9.0 * has_virial.sum()]
        return torch.stack(terms).cpu()

    @cached_property
    def mean_weights(self) -> Labels:
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
    def types(self) -> Tensor:
        """Type of every atom, shape (n_atoms,), int64."""
        return self.structure[-1]

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(x.numel() * x.element_size() for x in (*self.structure, self.forces))

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; the batch itself where it is there."""
        if self.energy.device == device:
            return self
        moved = {
            name: getattr(self, name).to(device)
            for name in ("energy", "forces", "virial", "has", "n_atoms", "frames", "counted")
        }
        return replace(self, structure=tuple(x.to(device) for x in self.structure), **moved)


def arguments(model: EnergyModel) -> list[Argument]:
    """Declare the arguments of the step that depend on structures alone, as `Batch.structure` orders them."""
    displacements, tensors = model.arguments()
    index = torch.int64
    declared = []
    for call in range(n_calls(model)):
        own = [_renamed(argument, call) for argument in (*displacements, *tensors)]
        blocks = [Argument(argument.axes[:-1], index) for argument in own[: len(displacements)]]
        declared += [*own, Argument((f"atoms in call {call}",), index), *blocks, *blocks]
    for entries, rows in (("ends", "all atoms"), ("all slots", "frames"), ("all rows", "frames")):
        declared += [Argument((entries,), index), Argument((rows,), index)]
    return [*declared, Argument(("all atoms",), index), Argument(("all atoms",), index)]


def _renamed(argument: Argument, call: int) -> Argument:
    axes = tuple(f"{axis} in call {call}" if isinstance(axis, str) else axis for axis in argument.axes)
    return Argument(axes, argument.dtype)


def n_calls(model: EnergyModel) -> int:
    """How often a step calls the model: once per weight group."""
    return 1 if model.descriptor.mixed_types else len(model.type_map)


def make_batch(frames: Sequence[Frame], model: EnergyModel, default_fparam: Tensor | None) -> Batch:
    """Build a batch of frames of any sizes.

    Parameters
    ----------
    default_fparam
        shape (numb_fparam,), for frames that carry none; None where the model has no default.

    Raises
    ------
    DataError
        An element is not in the type map, or a frame lacks a parameter that the model needs.
    """
    inputs = frame_inputs(frames, model, default_fparam)
    layouts, n_truncated = model.layouts(inputs, split=False)
    counted = torch.ones(len(model.type_map), dtype=torch.float64)
    counted[list(model.atom_exclude_types)] = 0.0
    counted = counted[inputs.types]
    virials = [frame.comparable_virial for frame in frames]
    return Batch(
        structure=_structure(layouts, inputs),
        energy=torch.tensor([frame.energy or 0.0 for frame in frames], dtype=torch.float64),
        forces=torch.from_numpy(
            np.concatenate([np.zeros((len(f.atoms), 3)) if f.forces is None else f.forces for f in frames])
        ),
        virial=torch.from_numpy(np.stack([np.zeros(9) if v is None else v.reshape(9) for v in virials])),
        has=torch.tensor(
            [[x is not None for x in (f.energy, f.forces, v)] for f, v in zip(frames, virials, strict=True)],
            dtype=torch.float64,
        ),
        n_atoms=torch.zeros(len(frames), dtype=torch.float64).index_add_(0, inputs.frames, counted),
        frames=inputs.frames,
        counted=counted,
        n_truncated=n_truncated,
    )


def frame_inputs(
    frames: Sequence[Frame], model: EnergyModel, default_fparam: Tensor | None = None
) -> GraphInputs:
    """All pairs of some frames within the cutoff of a model; see `make_batch`."""
    atoms = [frame.atoms for frame in frames]
    parameters = [parameters_of(frame, model, default_fparam) for frame in frames]
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
    frame: Frame, model: EnergyModel, default_fparam: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Frame parameters, atomic parameters, and charge and spin of a frame.

    Raises
    ------
    DataError
        The frame lacks what the model needs, or has it in another shape.
    """
    atoms = frame.atoms
    try:
        return fparam_of(atoms, model, default_fparam), aparam_of(atoms, model), charge_spin_of(atoms, model)
    except StructureError as err:
        raise DataError(f"{frame.name}: {err}") from err


def _structure(layouts: Sequence[Layout], inputs: GraphInputs) -> tuple[Tensor, ...]:
    arrays: list[Tensor] = []
    of_pairs = [with_empty(which, 0) for which in (inputs.centers, inputs.neighbors)]
    centers, neighbors, atoms = [], [], []
    for layout in layouts:
        arrays += [*layout.displacements, *layout.tensors, layout.atoms]
        # an empty slot, whose gradient is zero, names atom 0
        ends = [[on_slots(which, block) for block in layout.blocks] for which in of_pairs]
        arrays += [*ends[0], *ends[1]]
        centers += [end.reshape(-1) for end in ends[0]]
        neighbors += [end.reshape(-1) for end in ends[1]]
        atoms.append(layout.atoms)
    of_slots = torch.cat(centers)
    both = torch.cat([of_slots, *neighbors])
    for rows, n in (
        (both, inputs.n_atoms),
        (inputs.frames[of_slots], inputs.n_frames),
        (inputs.frames[torch.cat(atoms)], inputs.n_frames),
    ):
        arrays += Index.of(rows, n)[1:]
    return (*arrays, inputs.frames, inputs.types)
