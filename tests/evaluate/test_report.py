from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from rich.console import Console
from toy_potential import Harmonic, labelled, random_atoms

from mtinfer.data import read_frames
from mtinfer.errors import OutputError
from mtinfer.evaluate import (
    Evaluation,
    evaluate_frames,
    score_table,
    to_dict,
    write_csv,
    write_json,
    write_predictions,
)
from mtinfer.evaluate.report import short_names
from mtinfer.files import check_output


@pytest.fixture
def evaluation() -> Evaluation:
    frames = [
        labelled(random_atoms(5, seed=1), dataset="/long/way/to/sets/bulk.extxyz"),
        labelled(random_atoms(3, seed=2, pbc=False), dataset="/long/way/to/sets/gas", labels="energy forces"),
        labelled(random_atoms(3, seed=3), dataset="/long/way/to/sets/gas", index=1, labels=""),
    ]
    return evaluate_frames(
        Harmonic({"water": 1.5, "_task_copper[x]": -3e4}), ["water", "_task_copper[x]"], frames
    )


def printed(evaluation: Evaluation, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(score_table(evaluation.scores))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_table_is_whole_at_80_columns(evaluation: Evaluation) -> None:
    lines = printed(evaluation, 80)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert lines[0].split() == ["head", "dataset", "quantity", "unit", "n", "MAE", "RMSE", "max"]
    rows = [line.split() for line in printed(evaluation, 120)]
    energy = next(score for score in evaluation.scores if score.quantity == "energy")
    numbers = [f"{value:#.3g}" for value in (energy.mae, energy.rmse, energy.max)]
    assert ["water", "bulk.extxyz", "energy", "eV", "1", *numbers] in rows
    assert any(row[:3] == ["_task_copper[x]", "all", "energy"] for row in rows)
    assert any(row[:3] == ["forces", "eV/Å", "15"] for row in rows)


def test_short_names_tell_paths_apart() -> None:
    assert short_names(["/a/b/c", "/a/b/d"]) == {"/a/b/c": "c", "/a/b/d": "d"}
    assert short_names(["x/1/set", "x/2/set", "y"]) == {"x/1/set": "1/set", "x/2/set": "2/set", "y": "y"}
    assert short_names(["a", "b/a"]) == {"a": "a", "b/a": "b/a"}
    assert short_names([]) == {}


def test_json(evaluation: Evaluation, tmp_path: Path) -> None:
    write_json(tmp_path / "scores.json", evaluation, Path("model.pt"))
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data == to_dict(evaluation, "model.pt")
    assert data["schema"] == "mtinfer.evaluation"
    assert data["schema_version"] == 1
    assert data["model"] == "model.pt"
    assert data["heads"] == ["water", "_task_copper[x]"]
    assert data["datasets"][1] == {"path": "/long/way/to/sets/gas", "n_frames": 2, "n_atoms": 6}
    assert len(data["metrics"]) == len(evaluation.scores)
    first, score = data["metrics"][0], evaluation.scores[0]
    assert first == {
        "head": "water",
        "dataset": "/long/way/to/sets/bulk.extxyz",
        "quantity": "energy",
        "unit": "eV",
        "n": 1,
        "mae": score.mae,
        "rmse": score.rmse,
        "max": score.max,
    }
    assert data["metrics"][-1]["dataset"] is None


def test_json_of_what_is_not_finite(evaluation: Evaluation, tmp_path: Path) -> None:
    broken = replace(evaluation, scores=(replace(evaluation.scores[0], mae=math.nan, max=math.inf),))
    write_json(tmp_path / "scores.json", broken, "model.pt")
    (metrics,) = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert (metrics["mae"], metrics["max"]) == (None, None)
    assert metrics["rmse"] == evaluation.scores[0].rmse


def test_csv(evaluation: Evaluation, tmp_path: Path) -> None:
    write_csv(tmp_path / "scores.csv", evaluation.scores)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["head", "dataset", "quantity", "unit", "n", "mae", "rmse", "max"]
    assert [float(row["rmse"]) for row in rows] == [score.rmse for score in evaluation.scores]
    assert rows[-1]["dataset"] == ""


def test_predictions_leave_out_what_extxyz_can_not_hold(evaluation: Evaluation, tmp_path: Path) -> None:
    bad = {5: 1, "note": "a\nb", "Lattice": "x", "Properties": "y", "": 1, "a\nb": 2, "a=b": 3}
    bad |= {"path": "C:\\data\\", "line": "a\r", "page": "a\x0cb", "kept": 3, "text": "a b=c, 'd' \"e\""}
    frames = []
    for frame in evaluation.frames:
        atoms = frame.atoms.copy()
        atoms.info |= bad
        frames.append(replace(frame, atoms=atoms))
    write_predictions(tmp_path / "out.xyz", replace(evaluation, frames=frames))
    for image in ase.io.read(tmp_path / "out.xyz", ":"):
        assert {key: image.info[key] for key in set(bad) & set(image.info)} == {
            "kept": 3,
            "text": bad["text"],
        }
        assert {"head", "source", "source_index"} <= set(image.info)
        assert image.get_forces().shape == (len(image), 3)


def test_predictions_that_ase_can_not_write(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("argument of type 'int' is not iterable")

    monkeypatch.setattr(ase.io, "write", fail)
    with pytest.raises(OutputError, match=r"out.xyz: frames hold what extxyz can't \(TypeError: argument"):
        write_predictions(tmp_path / "out.xyz", evaluation)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.extxyz", "out.xyz.gz"])
def test_predictions(evaluation: Evaluation, tmp_path: Path, name: str) -> None:
    write_predictions(tmp_path / name, evaluation)
    images = ase.io.read(tmp_path / name, ":")
    assert [(image.info["head"], image.info["source_index"]) for image in images] == [
        (head, index) for head in evaluation.heads for index in (0, 0, 1)
    ]
    bulk, gas, bare = images[:3]
    frame, prediction = evaluation.frames[0], evaluation.predictions["water"][0]
    close = {"rtol": 0, "atol": 1e-7}  # extxyz keeps 8 digits
    np.testing.assert_allclose(bulk.get_potential_energy(), prediction.energy, **close)
    np.testing.assert_allclose(bulk.get_forces(), prediction.forces, **close)
    np.testing.assert_allclose(bulk.get_stress(), prediction.stress(24.0), **close)
    np.testing.assert_allclose(bulk.info["virial"], prediction.virial, **close)
    np.testing.assert_allclose(bulk.info["ref_energy"], frame.energy, **close)
    np.testing.assert_allclose(bulk.arrays["ref_forces"], frame.forces, **close)
    np.testing.assert_allclose(bulk.info["ref_virial"], frame.virial, **close)
    np.testing.assert_allclose(bulk.info["ref_stress"], -frame.virial / 24, **close)
    assert "ref_forces" in gas.arrays
    assert not {"virial", "ref_virial", "ref_stress"} & set(gas.info)
    assert "stress" not in gas.calc.results
    assert not any(key.startswith("ref_") for key in (*bare.info, *bare.arrays))
    assert "energy" not in evaluation.frames[0].atoms.info  # the frames are as they were
    again = read_frames([tmp_path / name])  # predictions can serve as labels
    np.testing.assert_allclose(again[0].virial, prediction.virial, **close)


@pytest.mark.parametrize(
    ("pbc", "n_vectors", "has_stress"),
    [((True, True, False), 3, True), ((True, True, False), 2, False), ((True, False, False), 1, False)],
    ids=["slab in a box", "slab", "wire"],
)
def test_predictions_of_what_is_periodic_along_some_axes(
    tmp_path: Path, pbc: tuple[bool, ...], n_vectors: int, has_stress: bool
) -> None:
    atoms = random_atoms(4)
    atoms.pbc = pbc
    atoms.cell[n_vectors:] = 0
    evaluation = evaluate_frames(Harmonic({"a": 2.0}), ["a"], [labelled(atoms)])
    write_predictions(tmp_path / "out.xyz", evaluation)
    image = ase.io.read(tmp_path / "out.xyz")
    assert image.pbc.tolist() == list(pbc)
    virial = evaluation.predictions["a"][0].virial
    np.testing.assert_allclose(image.info["virial"], virial, rtol=0, atol=1e-7)
    np.testing.assert_allclose(image.info["ref_virial"], virial / 2, rtol=0, atol=1e-7)
    assert ("stress" in image.calc.results, "ref_stress" in image.info) == (has_stress, has_stress)
    if has_stress:
        np.testing.assert_allclose(image.info["ref_stress"], -virial / 48, rtol=0, atol=1e-7)
        np.testing.assert_allclose(image.get_stress(voigt=False), -virial / 24, rtol=0, atol=1e-7)


def test_outputs_that_can_not_be_written(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"no/scores\.json: folder .*no does not exist; make it or choose"):
        write_json(tmp_path / "no" / "scores.json", evaluation, "model.pt")
    with pytest.raises(OutputError, match=r"exists and is not a regular file; choose another path"):
        write_csv(tmp_path, evaluation.scores)
    with pytest.raises(OutputError, match=r"the name ends in '.xyz', allowed are .png, .pdf"):
        check_output(tmp_path / "plot.xyz", suffixes=(".png", ".pdf"))
    check_output(tmp_path / "plot.PNG", suffixes=(".png", ".pdf"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match=r"folder .* is not writable; choose another path"):
        check_output(tmp_path / "scores.csv")


def test_an_interrupted_write_leaves_the_old_file(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.extxyz"
    path.write_text("old")

    def full(partial: Path, *_: object, **__: object) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ase.io, "write", full)
    with pytest.raises(OutputError, match=r"out\.extxyz: can't be written: No space left on device; choose"):
        write_predictions(path, evaluation)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"out.extxyz": "old"}
