from __future__ import annotations

import gzip
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mtinfer.data import read_frames
from mtinfer.errors import DataError

CELL = 'Lattice="2 0 0 0 3 0 0 0 4" '  # 24 Å³
SYMMETRIC = "1 6 5 6 2 4 5 4 3"


def write(path: Path, comment: str, atoms: str = "H 0 0 0 1 2 3\n", forces: str = "forces") -> Path:
    columns = f":{forces}:R:{len(atoms.split()) - 4}" if forces else ""
    path.write_text(f"1\n{comment} Properties=species:S:1:pos:R:3{columns}\n{atoms}")
    return path


def test_compressed_extxyz(frames_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "water.xyz.gz"
    path.write_bytes(gzip.compress((frames_dir / "water.extxyz").read_bytes()))
    assert [frame.energy for frame in read_frames([path])] == [
        frame.energy for frame in read_frames([frames_dir / "water.extxyz"])
    ]


@pytest.mark.parametrize("name", ["frames.db", "frames.traj", "a@0.extxyz"])
def test_formats_that_ase_reads(tmp_path: Path, name: str) -> None:
    atoms = Atoms("CuH", [[0, 0, 0], [0, 0, 1.5]], cell=[2, 3, 4], pbc=True)
    stress = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.5, forces=[[0, 0, 1], [0, 0, -1]], stress=stress)
    ase.io.write(tmp_path / name, [atoms, atoms])
    frames = read_frames([tmp_path / name])
    assert len(frames) == 2
    assert frames[1].energy == -1.5
    np.testing.assert_array_equal(frames[1].forces, [[0, 0, 1], [0, 0, -1]])
    expected = -24 * np.array([[0.1, 0.6, 0.5], [0.6, 0.2, 0.4], [0.5, 0.4, 0.3]])
    np.testing.assert_allclose(frames[1].virial, expected, rtol=1e-14)


def test_stress_becomes_a_virial_in_a_left_handed_cell_and_is_symmetrised(tmp_path: Path) -> None:
    atoms = Atoms("Cu", cell=[[0, 3, 0], [2, 0, 0], [0, 0, 4]], pbc=True)
    atoms.calc = SinglePointCalculator(atoms, stress=np.arange(9.0).reshape(3, 3))
    ase.io.write(tmp_path / "a.traj", atoms)
    (frame,) = read_frames([tmp_path / "a.traj"])
    np.testing.assert_allclose(frame.virial, [[0, -48, -96], [-48, -96, -144], [-96, -144, -192]], rtol=1e-14)


@pytest.mark.parametrize("key", ["virial", "virials"])
def test_labels_under_other_keys_are_taken_out_of_the_structure(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.xyz", f'{CELL}energy=-2 {key}="{SYMMETRIC}" fparam="0.1 0.7"', forces="force")
    (frame,) = read_frames([path])
    assert frame.energy == -2
    np.testing.assert_array_equal(frame.forces, [[1, 2, 3]])
    np.testing.assert_array_equal(frame.virial, [[1, 6, 5], [6, 2, 4], [5, 4, 3]])
    assert list(frame.atoms.info) == ["fparam"]
    np.testing.assert_array_equal(frame.atoms.info["fparam"], [0.1, 0.7])
    assert set(frame.atoms.arrays) == {"numbers", "positions"}


def test_virial_label_goes_before_stress(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", f'{CELL}virial="{SYMMETRIC}" stress="9 0 0 0 9 0 0 0 9"')
    assert read_frames([path])[0].virial[0, 1] == 6


def test_results_of_a_calculator_go_before_other_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3:force:R:3:forces:R:3\nH 0 0 0 1 2 3 4 5 6\n")
    (frame,) = read_frames([path])
    assert frame.forces.tolist() == [[4, 5, 6]]


def test_stress_without_volume_is_no_label(tmp_path: Path) -> None:
    (frame,) = read_frames([write(tmp_path / "a.xyz", f'stress="{SYMMETRIC}" pbc="F F F"')])
    assert frame.virial is None


def test_structure_without_labels(tmp_path: Path) -> None:
    (frame,) = read_frames([write(tmp_path / "a.xyz", "", atoms="H 0 0 0\n", forces="")])
    assert (frame.energy, frame.forces, frame.virial) == (None, None, None)


def test_aparam_stays_an_array(tmp_path: Path) -> None:
    (frame,) = read_frames([write(tmp_path / "a.xyz", "", forces="aparam")])
    np.testing.assert_array_equal(frame.atoms.arrays["aparam"], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("comment", "atoms", "text"),
    [
        ("energy=nan", "H 0 0 0 1 2 3\n", "energy holds NaN or infinity; correct it or remove the frame"),
        ("energy=abc", "H 0 0 0 1 2 3\n", "energy is not numeric: 'abc'; correct or remove it"),
        ('energy="1 2 3"', "H 0 0 0 1 2 3\n", r"energy has shape \(3,\), expected \(\) or \(1,\)"),
        ("", "H 0 0 0 1 2\n", r"forces has shape \(1, 2\), expected \(1, 3\); correct or remove it"),
        ("", "H 0 0 0 1 nan 3\n", "forces holds NaN or infinity"),
        ("", "H 0 nan 0 1 2 3\n", "positions holds NaN or infinity"),
        (f'{CELL}virials="1 2 3 4 5 6"', "H 0 0 0 1 2 3\n", r"virial has shape \(6,\), expected \(3, 3\) or"),
        (f'{CELL}stress="nan {SYMMETRIC[2:]}"', "H 0 0 0 1 2 3\n", "stress holds NaN or infinity"),
    ],
)
def test_bad_labels_name_file_and_frame(tmp_path: Path, comment: str, atoms: str, text: str) -> None:
    path = write(tmp_path / "bad.xyz", comment, atoms)
    good = write(tmp_path / "good.xyz", "energy=1")
    path.write_text(good.read_text() + path.read_text())
    with pytest.raises(DataError, match=rf"bad\.xyz, frame 1: {text}") as caught:
        read_frames([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.extxyz", b""),
        ("cut.extxyz", b"3\nenergy=1\nH 0 0 0\n"),
        ("prose.xyz", b"hello\nworld\n"),
        ("noise.bin", bytes(range(256))),
        ("broken.xyz.gz", b"\x1f\x8b nothing"),
        ("broken.db", b"SQLite format 3\x00 nothing"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: ASE can't read this file: .+; give extxyz") as caught:
        read_frames([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_file_without_frames_or_atoms(tmp_path: Path) -> None:
    with ase.io.Trajectory(tmp_path / "empty.traj", "w"):
        pass
    with pytest.raises(DataError, match=r"empty\.traj: (holds no frames|ASE can't read)"):
        read_frames([tmp_path / "empty.traj"])
    (tmp_path / "zero.xyz").write_text("0\nenergy=1\n")
    with pytest.raises(DataError, match=r"zero\.xyz, frame 0: has 0 atoms, at least 1 is needed"):
        read_frames([tmp_path / "zero.xyz"])
