"""A potential simple enough to know its errors beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ase import Atoms

from mtinfer.data import Frame
from mtinfer.errors import StructureError
from mtinfer.inputs import Prediction


class Harmonic:
    """Atoms bound to the origin: energy stiffness/2 Σ r², virial -Σ r ⊗ dE/dr; a stiffness for each head."""

    def __init__(self, stiffness: Mapping[str, float], elements: str = "H O Cu") -> None:
        self.stiffness = stiffness
        self.elements = elements.split()
        #: head and numbers of atoms of each call
        self.calls: list[tuple[str, list[int]]] = []

    def evaluate(self, atoms: list[Atoms], head: str | None = None) -> list[Prediction]:
        assert head is not None
        self.calls.append((head, [len(structure) for structure in atoms]))
        for structure in atoms:
            for symbol in set(structure.symbols) - set(self.elements):
                raise StructureError(f"element {symbol} is not in the type map")
        return [harmonic(structure, self.stiffness[head], head) for structure in atoms]


def harmonic(atoms: Atoms, stiffness: float, head: str = "") -> Prediction:
    atom_energy = 0.5 * stiffness * (atoms.positions**2).sum(1)
    forces = -stiffness * atoms.positions
    return Prediction(
        energy=float(atom_energy.sum()),
        atom_energy=atom_energy,
        forces=forces,
        virial=forces.T @ atoms.positions,
        head=head,
    )


def labelled(
    atoms: Atoms,
    stiffness: float = 1.0,
    *,
    dataset: str = "data",
    index: int = 0,
    labels: str = "energy forces virial",
) -> Frame:
    """Return a frame whose labels come from a harmonic potential."""
    truth = harmonic(atoms, stiffness)
    return Frame(
        atoms=atoms,
        energy=truth.energy if "energy" in labels else None,
        forces=truth.forces if "forces" in labels else None,
        virial=truth.virial if "virial" in labels else None,
        dataset=dataset,
        source=f"{dataset}/system",
        index=index,
    )


def random_atoms(n_atoms: int, *, seed: int = 0, pbc: bool = True, symbol: str = "H") -> Atoms:
    positions = np.random.default_rng(seed).normal(size=(n_atoms, 3))
    return Atoms(f"{symbol}{n_atoms}", positions, cell=[2, 3, 4] if pbc else None, pbc=pbc)
