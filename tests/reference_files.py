"""Checkpoints that deepmd-kit made, the structures and numbers that belong to them, and how near is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch

from mtinfer import Potential, Prediction
from mtinfer.checkpoint.peek import peek

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("**/checkpoints/*.pt"))
WITH_NUMBERS = [path for path in FILES if (path.parents[1] / "expected").is_dir()]
#: one file per architecture that is compiled in the default run; the others are compiled in the slow one
COMPILED = (
    "se_e2_a-separate-pt",
    "dpa1strip-separate-pt",
    "dpa1-separate-pt",
    "dpa2-separate-pt",
    "dpa3-shared-pt",
)

SE_E2_A = DATA / "reference/checkpoints/se_e2_a-separate-pt.pt"
STRIP = DATA / "reference/checkpoints/dpa1strip-separate-pt.pt"
SHARED = DATA / "reference/checkpoints/dpa1strip-shared-ptexpt.pt"


def heads(path: Path) -> list[str]:
    """All heads, each of which can be evaluated."""
    return [head.name for head in peek(path).heads]


def cases(paths: list[Path]) -> list[object]:
    """One parameter set (path, head) per head."""
    return [pytest.param(path, head, id=f"{path.stem}-{head}") for path in paths for head in heads(path)]


def slow_unless_compiled(paths: list[Path]) -> list[object]:
    """One parameter per file; those that compile a further architecture are marked as slow."""
    return [
        pytest.param(path, id=path.stem, marks=() if path.stem in COMPILED else pytest.mark.slow)
        for path in paths
    ]


@dataclass(frozen=True)
class Expected:
    """What deepmd-kit says of one structure."""

    energy: float
    atom_energy: np.ndarray
    forces: np.ndarray
    virial: np.ndarray
    #: (3,): change of energy per atom, forces and virial when coordinates change in their last digits
    noise: np.ndarray


@cache
def structures(folder: Path) -> tuple[ase.Atoms, ...]:
    return tuple(ase.io.read(folder / "structures.extxyz", ":"))


def expected(path: Path, head: str) -> list[tuple[ase.Atoms, Expected]]:
    """Structures, with the parameters that the numbers were made with, and the numbers."""
    folder = path.parents[1]
    with np.load(folder / "expected" / f"{path.stem}.npz") as numbers:
        return [
            _of_structure(path, atoms.copy(), f"{head}/{atoms.info['name']}", numbers)
            for atoms in structures(folder)
        ]


def _of_structure(
    path: Path, atoms: ase.Atoms, prefix: str, numbers: np.lib.npyio.NpzFile
) -> tuple[ase.Atoms, Expected]:
    given = {name: numbers.get(f"{prefix}/{name}") for name in ("fparam", "charge_spin")}
    if path.stem.startswith("dpa1n-") and atoms.info["name"] == "pbc":  # made before inputs were recorded
        given["fparam"] = np.array([0.1, 0.7])
    if given["fparam"] is not None:
        atoms.info["fparam"] = given["fparam"]
    if given["charge_spin"] is not None:
        atoms.info["charge"], atoms.info["spin"] = given["charge_spin"].tolist()
    values = {name: numbers[f"{prefix}/{name}"] for name in ("atom_energy", "forces", "virial")}
    noise = numbers.get(f"{prefix}/noise", np.zeros(3))
    return atoms, Expected(energy=float(numbers[f"{prefix}/energy"]), noise=noise, **values)


#: eV per atom, eV/Å, eV; relative to the size of the number where that exceeds 1
ACCEPTED = {torch.float64: (1e-10, 1e-10, 1e-9), torch.float32: (2e-6, 2e-5, 2e-4)}


def require_agreement(potential: Potential, head: str, path: Path) -> list[Prediction]:
    """Compare the numbers of all structures of a file, evaluated in one batch."""
    pairs = expected(path, head)
    predictions = potential.evaluate([atoms for atoms, _ in pairs], head)
    accepted = ACCEPTED[potential.head(head).precision]
    for (atoms, numbers), prediction in zip(pairs, predictions, strict=True):
        require_close(prediction, numbers, accepted, atoms.info["name"])
    return predictions


def require_close(got: Prediction, numbers: Expected, accepted: Sequence[float], structure: str) -> None:
    n_atoms = len(numbers.atom_energy)
    per_atom, force, virial = np.maximum(accepted, numbers.noise)
    compared = [
        ("energy per atom", got.energy / n_atoms, numbers.energy / n_atoms, per_atom),
        ("atom_energy", got.atom_energy, numbers.atom_energy, per_atom),
        ("forces", got.forces, numbers.forces, force),
        ("virial", got.virial, numbers.virial, virial),
    ]
    for what, value, reference, tolerance in compared:
        deviation = np.max(np.abs(np.asarray(value) - reference))
        allowed = tolerance * max(1.0, np.max(np.abs(reference)))
        assert deviation <= allowed, (
            f"{structure}: {what} deviates by {deviation:.2g}, accepted {allowed:.2g}"
        )
