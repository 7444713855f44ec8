"""Frames of deepmd/npy systems: folders with ``type.raw``, ``type_map.raw`` and ``set.*/*.npy``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .frame import Array, Frame, make_frame

_SYSTEM = "a system is a folder with type.raw (or type_map.raw) and set.*/coord.npy"

#: label -> its file in a set, and the numbers per frame for n atoms
_LABELS: dict[str, tuple[str, Callable[[int], int]]] = {
    "energy": ("energy.npy", lambda n_atoms: 1),
    "forces": ("force.npy", lambda n_atoms: 3 * n_atoms),
    "virial": ("virial.npy", lambda n_atoms: 9),
}


@dataclass(frozen=True)
class _System:
    """What all sets of a system share."""

    folder: Path
    #: type index of each atom; None where every set has a ``real_atom_types.npy``
    types: NDArray[np.int64] | None
    #: element of each type index
    type_map: tuple[str, ...]
    periodic: bool


@dataclass(frozen=True)
class _Set:
    """The arrays of one set; None where the file is not there."""

    #: (n_frames, n_atoms), -1 pads
    types: NDArray[np.int64]
    #: (n_frames, n_atoms, 3), Å
    coord: Array
    #: (n_frames, 3, 3), rows are cell vectors, Å
    box: Array | None
    #: energy (n_frames, 1), eV; forces (n_frames, 3 n_atoms), eV/Å; virial (n_frames, 9), eV
    labels: dict[str, Array]
    #: (n_frames, n_fparam)
    fparam: Array | None
    #: (n_frames, n_atoms, n_aparam)
    aparam: Array | None
    #: (n_frames, 2), total charge and spin
    charge_spin: Array | None


def read_deepmd_folder(path: Path, *, type_map: Sequence[str] | None = None) -> list[Frame]:
    """Read every deepmd/npy system in a folder and the folders below it.

    Sets are read in numeric order. Types are mapped to elements by name through ``type_map.raw``;
    systems of mixed type (``real_atom_types.npy``) lose their padding atoms. An empty file ``nopbc``
    marks a system without periodicity.

    Parameters
    ----------
    path
        Folder.
    type_map
        Element of each type index where a system has no ``type_map.raw``.

    Raises
    ------
    DataError
        There is no system or no frame, a file can't be read, or its shape does not fit the others.
    """
    folders = list(_find_systems(path))
    if not folders:
        raise DataError(
            f"{path}: no deepmd/npy system in this folder; {_SYSTEM}; name extxyz and other files one by one"
        )
    frames: list[Frame] = []
    for folder in folders:
        frames += _read_system(folder, dataset=str(path), type_map=type_map)
    return frames


def _find_systems(path: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for name, subfolders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:  # a link to a folder above would be walked for ever
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        if {"type.raw", "type_map.raw"} & set(files) and any(sub.startswith("set.") for sub in subfolders):
            yield Path(name)


def _read_system(folder: Path, *, dataset: str, type_map: Sequence[str] | None) -> list[Frame]:
    map_file, type_file = folder / "type_map.raw", folder / "type.raw"
    if map_file.exists():
        type_map = _words(map_file)
    elif type_map is None:
        raise DataError(
            f"{folder}: has no type_map.raw; write it (one element per type index) or name the type map"
        )
    system = _System(
        folder=folder,
        types=_type_indices(type_file) if type_file.exists() else None,
        type_map=tuple(type_map),
        periodic=not (folder / "nopbc").exists(),
    )
    frames: list[Frame] = []
    for set_folder in sorted((sub for sub in folder.glob("set.*") if sub.is_dir()), key=_set_order):
        frames += _set_frames(_read_set(set_folder, system), system, dataset, first=len(frames))
    if not frames:
        raise DataError(f"{folder}: the sets of this system hold no frames, at least 1 is needed")
    return frames


def _set_order(folder: Path) -> tuple[float, str]:
    suffix = folder.name.removeprefix("set.")
    return (int(suffix) if suffix.isdecimal() else float("inf"), suffix)


def _set_frames(data: _Set, system: _System, dataset: str, *, first: int) -> Iterator[Frame]:
    from ase import Atoms
    from ase.data import atomic_numbers

    numbers = np.array([atomic_numbers.get(name, -1) for name in system.type_map])
    for index in np.unique(data.types[data.types >= 0]):  # a type that does not occur may have any name
        if numbers[index] < 0:
            raise DataError(
                f"{system.folder}: type {index} is called {system.type_map[index]!r}, which is no chemical"
                " element; name elements in type_map.raw"
            )
    for i, types in enumerate(data.types):
        real = types >= 0
        atoms = Atoms(
            numbers=numbers[types[real]],
            positions=data.coord[i][real],
            cell=None if data.box is None else data.box[i],
            pbc=data.box is not None,
        )
        if data.fparam is not None:
            atoms.info["fparam"] = data.fparam[i]
        if data.aparam is not None:
            atoms.arrays["aparam"] = data.aparam[i][real]
        if data.charge_spin is not None:
            charge, spin = data.charge_spin[i].tolist()
            atoms.info |= {"charge": charge, "spin": spin}
        labels: dict[str, Any] = {label: values[i] for label, values in data.labels.items()}
        if "forces" in labels:
            labels["forces"] = labels["forces"].reshape(-1, 3)[real]
        yield make_frame(atoms, labels, dataset=dataset, source=str(system.folder), index=first + i)


def _read_set(folder: Path, system: _System) -> _Set:
    if not (folder / "coord.npy").exists():
        raise DataError(f"{folder}: has no coord.npy; {_SYSTEM}")
    coord = _load(folder / "coord.npy")
    n_frames = coord.shape[0] if coord.ndim > 1 else 1
    types = _set_types(folder, system, n_frames)
    n_atoms = types.shape[1]
    coord = _rows(coord, folder / "coord.npy", n_frames, n_atoms, 3 * n_atoms)

    def rows(name: str, width: int | None = None) -> Array | None:
        path = folder / name
        return _rows(_load(path), path, n_frames, n_atoms, width) if path.exists() else None

    box = rows("box.npy", 9) if system.periodic else None
    if box is None and system.periodic:
        raise DataError(
            f"{folder}: has no box.npy; add it, or, if nothing is periodic, an empty file"
            f" {system.folder / 'nopbc'}"
        )
    aparam = rows("aparam.npy")
    if aparam is not None and aparam.shape[1] % n_atoms:
        raise DataError(
            f"{folder / 'aparam.npy'}: has {aparam.shape[1]} numbers per frame, expected a multiple of"
            f" {n_atoms} (a row for each atom); correct or remove the file"
        )
    labels = {label: rows(name, width(n_atoms)) for label, (name, width) in _LABELS.items()}
    return _Set(
        types=types,
        coord=coord.reshape(n_frames, n_atoms, 3),
        box=None if box is None else box.reshape(-1, 3, 3),
        labels={label: values for label, values in labels.items() if values is not None},
        fparam=rows("fparam.npy"),
        aparam=None if aparam is None else aparam.reshape(n_frames, n_atoms, aparam.shape[1] // n_atoms),
        charge_spin=rows("charge_spin.npy", 2),
    )


def _set_types(folder: Path, system: _System, n_frames: int) -> NDArray[np.int64]:
    """Return the type index of every atom of every frame, shape (n_frames, n_atoms)."""
    path = folder / "real_atom_types.npy"
    if path.exists():
        loaded = _load(path)
        types = loaded.astype(np.int64)
        if types.ndim != 2 or len(types) != n_frames or (types != loaded).any():
            raise DataError(
                f"{path}: has shape {types.shape} and type {loaded.dtype}, expected integers of shape"
                f" ({n_frames}, atoms per frame); correct the file"
            )
    elif system.types is not None:
        path = system.folder / "type.raw"
        types = np.broadcast_to(system.types, (n_frames, len(system.types)))
    else:
        raise DataError(f"{folder}: has neither ../type.raw nor real_atom_types.npy; add one of them")
    if types.shape[1] == 0:
        raise DataError(f"{path}: names no atoms, at least 1 is needed; correct the file")
    for index in np.unique(types):
        if not -1 <= index < len(system.type_map):
            raise DataError(
                f"{path}: type index {index} is out of the type map {' '.join(system.type_map)}, allowed are"
                f" 0 to {len(system.type_map) - 1} (-1 pads); correct type_map.raw or the indices"
            )
    return types


def _rows(array: NDArray[Any], path: Path, n_frames: int, n_atoms: int, width: int | None) -> Array:
    """Return an array as float64 of shape (n_frames, width), any width where it is None."""
    if width is None:
        width = array.size // max(n_frames, 1)
    single = n_frames == 1 and array.ndim < 2
    if array.size != n_frames * width or (not single and array.shape[:1] != (n_frames,)):
        raise DataError(
            f"{path}: has shape {array.shape}, expected ({n_frames}, {width}) for {n_frames} frames of"
            f" {n_atoms} atoms; correct or remove the file"
        )
    return array.reshape(n_frames, width).astype(np.float64)


def _load(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        raise DataError(
            f"{path}: not a readable .npy file of numbers: {reason}; write it anew (a ragged array as one"
            " system per number of atoms: pickled ones are not read)"
        ) from err
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        kind = getattr(array, "dtype", "an archive")
        raise DataError(f"{path}: holds {kind}, expected an array of floats or integers; correct the file")
    return array


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: can't be read as text: {err}; correct the file") from err


def _type_indices(path: Path) -> NDArray[np.int64]:
    try:
        return np.array([int(word) for word in _words(path)], dtype=np.int64)
    except ValueError as err:
        raise DataError(f"{path}: {err}; expected one type index (0, 1, ...) per atom") from err
