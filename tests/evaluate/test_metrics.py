from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from toy_potential import harmonic, labelled, random_atoms

from mtinfer.evaluate import ErrorAccumulator, Score


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


def test_stress_needs_a_volume() -> None:
    wire = random_atoms(4)
    wire.cell[1:] = 0
    wire.pbc = [True, False, False]
    errors = ErrorAccumulator()
    errors.add("a", labelled(wire, labels="virial"), harmonic(wire, 1.0))
    assert [score.quantity for score in errors.scores()] == ["virial"]


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
