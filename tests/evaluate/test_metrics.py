from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.stress import full_3x3_to_voigt_6_stress
from toy_potential import harmonic, labelled, random_atoms

from mtinfer.data import read_frames
from mtinfer.evaluate import ErrorAccumulator, Score
from mtinfer.evaluate.metrics import SCORED, VIRIAL_PER_ATOM


def by_quantity(scores: tuple[Score, ...], dataset: str | None = "data") -> dict[str, Score]:
    return {score.quantity: score for score in scores if score.dataset == dataset}


def test_errors_of_known_size() -> None:
    errors = ErrorAccumulator()
    sizes = (1, 3, 20)
    frames = [labelled(random_atoms(n, seed=n), stiffness=1.0) for n in sizes]
    truths = [harmonic(frame.atoms, 1.0) for frame in frames]
    for frame in frames:
        errors.add("a", frame, harmonic(frame.atoms, 1.5))
    scores = by_quantity(errors.scores())
    volume = 24.0  # Å³
    expected = {  # the head is half as stiff again, so each error is half the label
        "energy": ("eV", [[truth.energy] for truth in truths]),
        "energy_per_atom": ("eV/atom", [[truth.energy / n] for truth, n in zip(truths, sizes, strict=True)]),
        "forces": ("eV/Å", [truth.forces.ravel() for truth in truths]),
        "virial": ("eV", [truth.virial.ravel() for truth in truths]),
        "stress": ("eV/Å³", [truth.virial.ravel() / volume for truth in truths]),
    }
    assert list(scores) == list(expected)
    for quantity, (unit, labels) in expected.items():
        error = 0.5 * np.abs(np.concatenate(labels))
        score = scores[quantity]
        assert (score.head, score.unit, score.n) == ("a", unit, error.size)
        np.testing.assert_allclose(
            [score.mae, score.rmse, score.max],
            [error.mean(), math.sqrt((error**2).mean()), error.max()],
            rtol=1e-12,
        )


def test_only_labels_that_exist_are_scored() -> None:
    errors = ErrorAccumulator()
    periodic, open_ = random_atoms(4), random_atoms(4, pbc=False)
    errors.add("a", labelled(periodic, labels="energy"), harmonic(periodic, 1.0))
    errors.add("a", labelled(open_, labels="forces virial"), harmonic(open_, 1.0))
    counts = {score.quantity: score.n for score in errors.scores()}
    assert counts == {"energy": 1, "energy_per_atom": 1, "forces": 12}
    errors.add("a", labelled(random_atoms(2), labels=""), harmonic(random_atoms(2), 1.0))
    assert {score.quantity: score.n for score in errors.scores()} == counts


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_stress_needs_a_volume(n_vectors: int) -> None:
    atoms = random_atoms(4)
    atoms.cell[n_vectors:] = 0
    atoms.pbc = [k < n_vectors for k in range(3)]
    errors = ErrorAccumulator()
    errors.add("a", labelled(atoms, labels="virial"), harmonic(atoms, 1.0))
    assert [score.quantity for score in errors.scores()] == ["virial"]


def test_stress_is_that_of_ase_and_virials_are_divided_by_atoms(tmp_path: Path) -> None:
    atoms = bulk("Cu", a=3.8, cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = EMT()
    expected = atoms.get_stress()
    assert expected[0] > 0.01  # it is stretched
    ase.io.write(tmp_path / "copper.traj", atoms)
    (frame,) = read_frames([tmp_path / "copper.traj"])
    prediction = replace(harmonic(atoms, 1.0), virial=3 * frame.virial)
    of_stress = next(quantity for quantity in SCORED if quantity.name == "stress").pair(frame, prediction)
    per_atom = VIRIAL_PER_ATOM.pair(frame, prediction)
    for factor, stress, virial in zip((1, 3), of_stress, per_atom, strict=True):
        np.testing.assert_allclose(
            full_3x3_to_voigt_6_stress(stress.reshape(3, 3)), factor * expected, rtol=1e-12
        )
        np.testing.assert_allclose(virial, factor * frame.virial.ravel() / 4, rtol=1e-12)
    np.testing.assert_allclose(prediction.stress(atoms.get_volume()), 3 * expected, rtol=1e-12)


def test_all_datasets_together_count_every_label_alike() -> None:
    errors, together = ErrorAccumulator(), ErrorAccumulator()
    for n_atoms, dataset in ((2, "small"), (9, "large"), (3, "small")):
        frame = labelled(random_atoms(n_atoms, seed=n_atoms), dataset=dataset)
        for head, stiffness in (("a", 1.1), ("b", 2.0)):
            prediction = harmonic(frame.atoms, stiffness)
            errors.add(head, frame, prediction)
            together.add(head, replace(frame, dataset="one"), prediction)
    scores = errors.scores()
    groups = [(score.head, score.dataset) for score in scores]
    assert list(dict.fromkeys(groups)) == [
        (head, dataset) for head in "ab" for dataset in ("small", "large", None)
    ]
    totals = [score for score in scores if score.dataset is None]
    for total, one in zip(totals, together.scores(), strict=True):
        assert replace(one, dataset=None, mae=0, rmse=0) == replace(total, mae=0, rmse=0)
        assert (total.mae, total.rmse) == pytest.approx((one.mae, one.rmse), rel=1e-12)


def test_predictions_that_are_not_numbers_stay_visible() -> None:
    errors = ErrorAccumulator()
    for energy in (math.nan, 1.0):
        frame = labelled(random_atoms(3))
        errors.add("a", frame, replace(harmonic(frame.atoms, 1.0), energy=energy))
    energy = by_quantity(errors.scores())["energy"]
    assert all(math.isnan(value) for value in (energy.mae, energy.rmse, energy.max))
