from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_potential import Harmonic, labelled, random_atoms

from mtinfer.data import read_frames
from mtinfer.errors import StructureError
from mtinfer.evaluate import evaluate_frames

FRAMES = Path(__file__).parents[1] / "data" / "frames"


def test_frames_of_any_sizes_are_batched_in_order() -> None:
    frames = [labelled(random_atoms(n, seed=n)) for n in (11, 3, 4, 4, 20, 1, 9, 2)]
    potential = Harmonic({"a": 1.0, "b": 2.0})
    done: list[int] = []
    evaluation = evaluate_frames(potential, ["b", "a", "b"], frames, progress=done.append, batch_atoms=10)
    batches = [[11], [3, 4], [4], [20], [1, 9], [2]]
    assert potential.calls == [(head, sizes) for sizes in batches for head in "ba"]
    assert sum(done) == len(frames) * 2
    assert evaluation.heads == ("b", "a")
    for head, stiffness in (("a", 1.0), ("b", 2.0)):
        for frame, prediction in zip(frames, evaluation.predictions[head], strict=True):
            np.testing.assert_array_equal(prediction.forces, -stiffness * frame.atoms.positions)
    assert {score.max for score in evaluation.scores if score.head == "a"} == {0.0}
    assert min(score.max for score in evaluation.scores if score.head == "b") > 0.01


def test_files_to_scores() -> None:
    paths = [FRAMES / "copper", FRAMES / "clusters.extxyz"]
    evaluation = evaluate_frames(Harmonic({"a": 0.0}), ["a"], read_frames(paths))
    assert evaluation.datasets == tuple(map(str, paths))
    counts = {(score.dataset, score.quantity): score.n for score in evaluation.scores}
    assert counts[str(paths[0]), "virial"] == 27
    assert counts[str(paths[0]), "forces"] == 3 * (31 + 32 + 32)
    assert (str(paths[1]), "virial") not in counts
    assert counts[None, "energy"] == 9


def test_frame_that_can_not_be_evaluated_is_named() -> None:
    frames = [labelled(random_atoms(2, seed=i), index=i) for i in range(5)]
    frames[3] = replace(frames[3], atoms=random_atoms(2, symbol="Fe"))
    with pytest.raises(StructureError, match=r"^data/system, frame 3: element Fe is not in the type map$"):
        evaluate_frames(Harmonic({"a": 1.0}), ["a"], frames)


def test_error_of_the_batch_alone_is_kept() -> None:
    class OnlySingles(Harmonic):
        def evaluate(self, atoms, head=None):
            if len(atoms) > 1:
                raise StructureError("too many structures")
            return super().evaluate(atoms, head)

    with pytest.raises(StructureError, match=r"^too many structures$"):
        evaluate_frames(OnlySingles({"a": 1.0}), ["a"], [labelled(random_atoms(2)) for _ in range(2)])
