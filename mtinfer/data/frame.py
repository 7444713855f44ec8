"""One labelled structure, and the checks that every label passes whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Frame:
    """A structure with the labels that its file holds; a label that the file lacks is None."""

    #: structure without calculator; frame and atom parameters of the model, where the data has them,
    #: are ``atoms.info["fparam"]`` and ``atoms.arrays["aparam"]``
    atoms: Atoms
    #: eV
    energy: float | None
    #: (n_atoms, 3), eV/Å
    forces: Array | None
    #: (3, 3), eV; minus the derivative of the energy by the strain
    virial: Array | None
    #: path that the user gave
    dataset: str
    #: file or system folder that holds the frame
    source: str
    #: position of the frame in `source`
    index: int

    @property
    def comparable_virial(self) -> Array | None:
        """The virial where an axis is periodic; elsewhere a label of it means nothing."""
        return self.virial if self.atoms.pbc.any() else None

    @property
    def labels(self) -> tuple[float | None, Array | None, Array | None]:
        """Energy, forces and virial, as far as they can be compared with a prediction."""
        return self.energy, self.forces, self.comparable_virial

    @property
    def has_labels(self) -> bool:
        """Whether anything can be compared with a prediction."""
        return any(label is not None for label in self.labels)

    @property
    def name(self) -> str:
        """Where the frame stands, for error texts."""
        return frame_name(self.source, self.index)


def frame_name(source: str, index: int) -> str:
    """Return the name of a frame (the first is 0) in error texts."""
    return f"{source}, frame {index}"


def make_frame(atoms: Atoms, labels: Mapping[str, Any], *, dataset: str, source: str, index: int) -> Frame:
    """Check the labels of one structure and make a frame of them.

    Parameters
    ----------
    atoms
        Structure; must have at least one atom.
    labels
        Any of ``energy`` (eV), ``forces`` of shape (n_atoms, 3) (eV/Å) and ``virial`` of shape (3, 3)
        or (9,), row by row (eV).
    dataset, source, index
        See `Frame`.

    Raises
    ------
    DataError
        There are no atoms, or positions, cell or a label are not numeric, of another shape, or hold NaN.
    """
    name = frame_name(source, index)
    if len(atoms) == 0:
        raise DataError(f"{name}: has 0 atoms, at least 1 is needed; remove the frame")
    as_numbers(atoms.positions, "positions", (len(atoms), 3), name=name)
    as_numbers(atoms.cell.array, "cell", (3, 3), name=name)
    energy = labels.get("energy")
    forces = labels.get("forces")
    virial = labels.get("virial")
    return Frame(
        atoms=atoms,
        energy=None if energy is None else float(as_numbers(energy, "energy", (), (1,), name=name).item()),
        forces=None if forces is None else as_numbers(forces, "forces", (len(atoms), 3), name=name),
        virial=None
        if virial is None
        else as_numbers(virial, "virial", (3, 3), (9,), name=name).reshape(3, 3),
        dataset=dataset,
        source=source,
        index=index,
    )


def as_numbers(value: Any, label: str, *shapes: tuple[int, ...], name: str) -> Array:
    """Return a label as finite float64 numbers of one of the `shapes` allowed, or raise a DataError."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        shown = " ".join(repr(value).split())[:60]
        raise DataError(f"{name}: {label} is not numeric: {shown}; correct or remove it") from err
    if array.shape not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise DataError(f"{name}: {label} has shape {array.shape}, expected {allowed}; correct or remove it")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: {label} holds NaN or infinity; correct it or remove the frame")
    return array
