"""Labelled frames from files: everything that ``ase.io.read`` takes, and deepmd/npy folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .ase_files import read_ase_file
from .deepmd_npy import read_deepmd_folder
from .frame import Frame

__all__ = ["Frame", "read_frames"]


def read_frames(paths: Sequence[str | Path], *, type_map: Sequence[str] | None = None) -> list[Frame]:
    """Read all frames of all `paths`, in the order given.

    Parameters
    ----------
    paths
        Files that ``ase.io.read`` understands (extxyz, ASE database, trajectory, also compressed) and
        folders with deepmd/npy systems at any depth. A path that is given twice is read once.
    type_map
        Element of each type index, for deepmd/npy systems without a ``type_map.raw`` of their own:
        the model's type map.

    Returns
    -------
    list of Frame
        At least one; ``Frame.dataset`` is the path as it was given.

    Raises
    ------
    DataError
        A path is missing, unreadable or holds no frames, or a label is malformed.
    """
    frames: list[Frame] = []
    for path in dict.fromkeys(Path(path) for path in paths):
        if path.is_dir():
            frames += read_deepmd_folder(path, type_map=type_map)
        elif path.is_file():
            frames += read_ase_file(path)
        elif "#" in str(path):  # group of a file, as deepmd-kit names it
            raise DataError(
                f"{path}: HDF5 files are not supported; give an extxyz file or a deepmd/npy folder"
            )
        else:
            raise DataError(f"{path}: no such file or folder; give an extxyz file or a deepmd/npy folder")
    if not frames:
        raise DataError("no data was named; give at least one extxyz file or deepmd/npy folder")
    return frames
