from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtinfer.data import Frame, read_frames
from mtinfer.errors import DataError


def sorted_rows(values: np.ndarray) -> np.ndarray:
    return values[np.lexsort(values.T)]


@pytest.mark.parametrize(("name", "n_frames"), [("water", 4), ("clusters", 6), ("copper", 3)])
def test_deepmd_folder_and_extxyz_hold_the_same_frames(frames_dir: Path, name: str, n_frames: int) -> None:
    folder = read_frames([frames_dir / name])
    file = read_frames([frames_dir / f"{name}.extxyz"])
    assert len(folder) == len(file) == n_frames
    for a, b in zip(folder, file, strict=True):  # the extxyz files keep atoms in another order
        assert a.energy == b.energy
        assert sorted(a.atoms.numbers) == sorted(b.atoms.numbers)
        np.testing.assert_allclose(
            sorted_rows(a.atoms.positions), sorted_rows(b.atoms.positions), atol=1e-8, rtol=0
        )
        np.testing.assert_allclose(sorted_rows(a.forces), sorted_rows(b.forces), atol=1e-8, rtol=0)
        np.testing.assert_allclose(a.atoms.cell.array, b.atoms.cell.array, atol=1e-12, rtol=0)
        assert list(a.atoms.pbc) == list(b.atoms.pbc) == [name != "clusters"] * 3
        assert a.atoms.calc is None
        assert b.atoms.calc is None
        if name == "clusters":
            assert a.virial is None
            assert b.virial is None
        else:
            np.testing.assert_allclose(a.virial, b.virial, atol=1e-9, rtol=0)


def test_frames_know_where_they_come_from(frames_dir: Path) -> None:
    folder, file = str(frames_dir / "copper"), str(frames_dir / "water.extxyz")
    frames = read_frames([folder, file, folder])  # what is named twice is read once
    assert [(frame.dataset, frame.source, frame.index) for frame in frames] == [
        (folder, f"{folder}/Cu31_31", 0),
        (folder, f"{folder}/Cu32_32", 0),
        (folder, f"{folder}/Cu32_32", 1),
        *[(file, file, index) for index in range(4)],
    ]
    assert frames[2].name == f"{folder}/Cu32_32, frame 1"
    assert isinstance(frames[0], Frame)


def test_missing_path_and_nothing_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all\.hdf5#/water: HDF5 files are not supported"):
        read_frames([tmp_path / "all.hdf5#/water"])
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; give an extxyz file"):
        read_frames([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no data was named; give at least one"):
        read_frames([])


def test_importing_the_readers_is_cheap() -> None:
    code = "import sys, mtinfer.data; sys.exit(bool({'ase', 'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
