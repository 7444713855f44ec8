"""Frames of one file, through ``ase.io.read``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .frame import Array, Frame, as_numbers, frame_name, make_frame

if TYPE_CHECKING:
    from ase import Atoms

#: label -> the keys under which files hold it; the first that is found counts
_KEYS = {
    "energy": ("energy",),
    "forces": ("forces", "force"),
    "virial": ("virial", "virials"),
    "stress": ("stress",),
}

#: position of each tensor component in the Voigt order xx yy zz yz xz xy
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


def read_ase_file(path: Path) -> list[Frame]:
    """Read all frames of a file.

    Labels are taken from the calculator that ASE attaches, else from ``atoms.info`` and
    ``atoms.arrays``, and removed from there. A stress label (eV/Å³, full or in Voigt order xx yy zz yz xz
    xy) becomes a virial (eV), -volume times the symmetrised stress, unless the frame has a virial or no
    volume.

    Parameters
    ----------
    path
        Any format that ``ase.io.read`` finds out by itself.

    Raises
    ------
    DataError
        The file can't be read or holds no frames, or a label is malformed.
    """
    import ase.io.formats

    try:
        images = ase.io.read(str(path), index=":", do_not_split_by_at_sign=True)
    except Exception as err:  # each of ASE's readers has errors of its own
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        if isinstance(err, ase.io.formats.UnknownFileTypeError):
            reason = f"unknown file type {reason!r}"
        raise DataError(
            f"{path}: ASE can't read this file: {reason}; give extxyz or another format that"
            " ase.io.read takes"
        ) from err
    if not images:
        raise DataError(f"{path}: holds no frames, at least 1 is needed; give another file")
    return [_to_frame(atoms, path, index) for index, atoms in enumerate(images)]


def _to_frame(atoms: Atoms, path: Path, index: int) -> Frame:
    labels = _pop_labels(atoms)
    stress = labels.pop("stress", None)
    if stress is not None and "virial" not in labels and atoms.cell.rank == 3:
        labels["virial"] = _stress_to_virial(stress, atoms, frame_name(str(path), index))
    return make_frame(atoms, labels, dataset=str(path), source=str(path), index=index)


def _pop_labels(atoms: Atoms) -> dict[str, Any]:
    """Take the labels out of the places where ASE keeps them, so that each is in one place only."""
    places: list[dict[str, Any]] = [getattr(atoms.calc, "results", {}), atoms.info, atoms.arrays]
    atoms.calc = None
    labels: dict[str, Any] = {}
    for place in places:
        for label, keys in _KEYS.items():
            for key in keys:
                value = place.pop(key, None)
                if value is not None:
                    labels.setdefault(label, value)
    return labels


def _stress_to_virial(stress: Any, atoms: Atoms, name: str) -> Array:
    full = as_numbers(stress, "stress", (6,), (3, 3), (9,), name=name)
    full = full[_VOIGT] if full.shape == (6,) else full.reshape(3, 3)
    volume = abs(np.linalg.det(atoms.cell.array))
    virial: Array = -0.5 * volume * (full + full.T)
    return virial
