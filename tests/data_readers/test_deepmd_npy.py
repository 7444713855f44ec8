from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtinfer.data import read_frames
from mtinfer.errors import DataError


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def test_values_and_units_of_a_frame(cluster: Path) -> None:
    frame = read_frames([cluster])[1]
    data = {name: np.load(cluster / "set.000" / f"{name}.npy")[1] for name in ("coord", "force", "energy")}
    types = [int(word) for word in (cluster / "type.raw").read_text().split()]
    assert frame.atoms.get_chemical_symbols() == [["H", "O", "Cu"][index] for index in types]
    np.testing.assert_array_equal(frame.atoms.positions.ravel(), data["coord"])
    np.testing.assert_array_equal(frame.forces.ravel(), data["force"])
    assert frame.energy == data["energy"]
    assert frame.virial is None


def test_virial_is_row_major(copper: Path) -> None:
    edit(copper / "set.000" / "virial.npy", lambda virial: np.arange(18.0).reshape(2, 9))
    assert read_frames([copper])[1].virial.tolist() == [[9, 10, 11], [12, 13, 14], [15, 16, 17]]


def test_sets_are_read_in_numeric_order(cluster: Path) -> None:
    for suffix, energy in (("2", 2.0), ("0010", 10.0), ("x", 99.0)):
        shutil.copytree(cluster / "set.000", cluster / f"set.{suffix}")
        np.save(cluster / f"set.{suffix}" / "energy.npy", [energy, energy])
    frames = read_frames([cluster])
    assert [frame.energy for frame in frames[2:]] == [2, 2, 10, 10, 99, 99]
    assert [frame.index for frame in frames] == list(range(8))


def test_labels_may_be_missing_and_arrays_shaped_otherwise(copper: Path) -> None:
    data = copper / "set.000"
    before = read_frames([copper])
    (data / "virial.npy").unlink()
    edit(data / "coord.npy", lambda array: array.reshape(2, 32, 3))
    edit(data / "force.npy", lambda array: array.reshape(2, 32, 3))
    edit(data / "energy.npy", lambda array: array.reshape(2, 1))
    for a, b in zip(before, read_frames([copper]), strict=True):
        assert b.virial is None
        assert b.energy == a.energy
        np.testing.assert_array_equal(b.forces, a.forces)
        np.testing.assert_array_equal(b.atoms.positions, a.atoms.positions)
    (data / "energy.npy").unlink()
    (data / "force.npy").unlink()
    assert {(frame.energy, frame.forces) for frame in read_frames([copper])} == {(None, None)}


def test_single_frame_without_frame_axis(cluster: Path) -> None:
    first = read_frames([cluster])[0]
    for name in ("coord", "force"):
        edit(cluster / "set.000" / f"{name}.npy", lambda array: array[0])
    np.save(cluster / "set.000" / "energy.npy", first.energy)
    (frame,) = read_frames([cluster])
    assert frame.energy == first.energy
    np.testing.assert_array_equal(frame.atoms.positions, first.atoms.positions)


def test_type_map_is_mapped_by_name(cluster: Path) -> None:
    symbols = read_frames([cluster])[0].atoms.get_chemical_symbols()
    names = (cluster / "type_map.raw").read_text().split()
    types = [names.index(symbol) for symbol in symbols]
    order = ["Zz", "O", "Cu", "H"]  # a name that no atom has may be anything
    (cluster / "type_map.raw").write_text(" ".join(order) + "\n")
    (cluster / "type.raw").write_text("\n".join(str(order.index(names[index])) for index in types))
    assert read_frames([cluster])[0].atoms.get_chemical_symbols() == symbols


def test_type_map_of_the_model_stands_in(cluster: Path) -> None:
    symbols = read_frames([cluster])[0].atoms.get_chemical_symbols()
    names = (cluster / "type_map.raw").read_text().split()
    (cluster / "type_map.raw").unlink()
    assert read_frames([cluster], type_map=names)[0].atoms.get_chemical_symbols() == symbols
    with pytest.raises(DataError, match=r"cluster: has no type_map\.raw; write it"):
        read_frames([cluster])


def test_type_map_of_the_system_goes_before_that_of_the_model(cluster: Path) -> None:
    symbols = [frame.atoms.get_chemical_symbols() for frame in read_frames([cluster])]
    names = (cluster / "type_map.raw").read_text().split()
    again = read_frames([cluster], type_map=names[::-1])
    assert [frame.atoms.get_chemical_symbols() for frame in again] == symbols


def test_nopbc_leaves_the_box_out(copper: Path) -> None:
    (copper / "nopbc").touch()
    frame = read_frames([copper])[0]
    assert not frame.atoms.pbc.any()
    assert frame.atoms.cell.rank == 0


def test_mixed_type_system_loses_its_padding(cluster: Path) -> None:
    data = cluster / "set.000"
    np.save(data / "real_atom_types.npy", np.array([[1, 0, 0], [2, -1, 1]], dtype=np.int32))
    np.save(data / "aparam.npy", np.arange(12.0).reshape(2, 6))
    coord, force = (np.load(data / f"{name}.npy").reshape(2, 3, 3) for name in ("coord", "force"))
    for type_file in (True, False):
        if not type_file:
            (cluster / "type.raw").unlink()
        whole, padded = read_frames([cluster])
        assert whole.atoms.get_chemical_symbols() == ["O", "H", "H"]
        assert padded.atoms.get_chemical_symbols() == ["Cu", "O"]
        np.testing.assert_array_equal(padded.atoms.positions, coord[1, [0, 2]])
        np.testing.assert_array_equal(padded.forces, force[1, [0, 2]])
        np.testing.assert_array_equal(padded.atoms.arrays["aparam"], [[6, 7], [10, 11]])


def test_frame_and_atom_parameters(cluster: Path) -> None:
    np.save(cluster / "set.000" / "fparam.npy", [[0.1, 0.7], [0.2, 0.8]])
    np.save(cluster / "set.000" / "aparam.npy", np.arange(6.0).reshape(2, 3))
    frame = read_frames([cluster])[1]
    np.testing.assert_array_equal(frame.atoms.info["fparam"], [0.2, 0.8])
    np.testing.assert_array_equal(frame.atoms.arrays["aparam"], [[3], [4], [5]])


def test_charge_and_spin(cluster: Path) -> None:
    assert not {"charge", "spin"} & set(read_frames([cluster])[1].atoms.info)
    np.save(cluster / "set.000" / "charge_spin.npy", [[0.0, 1.0], [-1.0, 2.0]])
    atoms = read_frames([cluster])[1].atoms
    assert (atoms.info["charge"], atoms.info["spin"]) == (-1.0, 2.0)


def test_systems_are_found_at_any_depth_and_through_links(copper: Path, tmp_path: Path) -> None:
    top = tmp_path / "top"
    shutil.copytree(copper, top / "a" / "b" / "c")
    (top / "linked").symlink_to(copper)
    (top / "a" / "loop").symlink_to(top)
    frames = read_frames([top])
    assert [frame.source for frame in frames[::2]] == [f"{top}/a/b/c", f"{top}/linked"]


def save_ragged(path: Path) -> None:
    np.save(path, np.array([np.zeros(3), np.zeros(4)], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda d: (d / "set.000" / "coord.npy").unlink(),
            r"set\.000: has no coord\.npy; a system is a folder",
        ),
        (
            lambda d: (d / "set.000" / "box.npy").unlink(),
            r"has no box\.npy; add it, or, if nothing is periodic",
        ),
        (lambda d: (d / "type.raw").unlink(), r"has neither \.\./type\.raw nor real_atom_types\.npy"),
        (lambda d: (d / "type.raw").write_text("0 1 x"), r"type\.raw: .*'x'; expected one type index"),
        (lambda d: (d / "type.raw").write_text(""), r"type\.raw: names no atoms, at least 1"),
        (
            lambda d: (d / "type.raw").write_text("3 " * 32),
            r"type\.raw: type index 3 is out of the type map H O Cu, allowed are 0 to 2 \(-1 pads\)",
        ),
        (lambda d: (d / "type_map.raw").write_text("H O Xx"), r"type 2 is called 'Xx', which is no chemical"),
        (
            lambda d: (d / "type_map.raw").write_bytes(b"\xff\xfe\xff"),
            r"type_map\.raw: can't be read as text",
        ),
        (
            lambda d: (d / "type.raw").write_text("2 " * 31),
            r"coord\.npy: has shape \(2, 96\), expected \(2, 93\) for 2 frames of 31 atoms",
        ),
        (
            lambda d: edit(d / "set.000" / "force.npy", lambda force: force[:, :93]),
            r"force\.npy: has shape \(2, 93\), expected \(2, 96\) for 2 frames of 32 atoms; correct",
        ),
        (
            lambda d: edit(d / "set.000" / "energy.npy", lambda energy: energy[:1]),
            r"energy\.npy: has shape \(1,\), expected \(2, 1\) for 2 frames",
        ),
        (
            lambda d: edit(d / "set.000" / "force.npy", lambda force: force.T),
            r"force\.npy: has shape \(96, 2\), expected \(2, 96\)",
        ),
        (
            lambda d: np.save(d / "set.000" / "charge_spin.npy", np.zeros((2, 3))),
            r"charge_spin\.npy: has shape \(2, 3\), expected \(2, 2\)",
        ),
        (
            lambda d: np.save(d / "set.000" / "aparam.npy", np.zeros((2, 33))),
            r"aparam\.npy: has 33 numbers per frame, expected a multiple of 32",
        ),
        (
            lambda d: np.save(d / "set.000" / "real_atom_types.npy", np.full((2, 32), 0.5)),
            r"real_atom_types\.npy: has shape \(2, 32\) and type float64, expected integers of shape",
        ),
        *[
            (
                lambda d, n=n: np.save(d / "set.000" / "real_atom_types.npy", np.full((n, 32), 2)),
                rf"real_atom_types\.npy: has shape \({n}, 32\) .*expected integers of shape \(2, atoms per",
            )
            for n in (1, 3)
        ],
        (
            lambda d: np.save(d / "set.000" / "real_atom_types.npy", np.full((2, 32), [-2] + [2] * 31)),
            r"real_atom_types\.npy: type index -2 is out of the type map H O Cu, allowed are 0 to 2",
        ),
        (lambda d: (d / "type.raw").write_text("-2 " + "2 " * 31), r"type\.raw: type index -2 is out of"),
        (
            lambda d: edit(d / "set.000" / "energy.npy", lambda energy: energy * [1, np.nan]),
            r"copper, frame 1: energy holds NaN or infinity",
        ),
        (
            lambda d: edit(d / "set.000" / "box.npy", lambda box: box * np.inf),
            r"copper, frame 0: cell holds NaN or infinity",
        ),
        (
            lambda d: edit(d / "set.000" / "coord.npy", lambda coord: coord[:0]),
            r"(energy|box)\.npy: has shape .* for 0 frames",
        ),
        (
            lambda d: save_ragged(d / "set.000" / "force.npy"),
            r"force\.npy: not a readable \.npy .*ragged array as one",
        ),
        (lambda d: (d / "set.000" / "force.npy").write_bytes(b""), r"force\.npy: not a readable \.npy file"),
        (
            lambda d: (d / "set.000" / "force.npy").write_bytes(b"junk"),
            r"force\.npy: not a readable \.npy file",
        ),
        (
            lambda d: np.save(d / "set.000" / "force.npy", ["a"]),
            r"force\.npy: holds <U1, expected an array of",
        ),
    ],
)
def test_damaged_systems(copper: Path, damage: Callable[[Path], None], text: str) -> None:
    damage(copper)
    with pytest.raises(DataError, match=text) as caught:
        read_frames([copper])
    assert str(copper) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_frames(tmp_path: Path, cluster: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty: no deepmd/npy system in this folder; a system is a folder with"
    ):
        read_frames([tmp_path / "empty"])
    for name in ("coord", "force", "energy"):
        edit(cluster / "set.000" / f"{name}.npy", lambda array: array[:0])
    with pytest.raises(DataError, match=r"cluster: the sets of this system hold no frames"):
        read_frames([cluster])
