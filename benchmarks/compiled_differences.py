"""Largest difference between compiled and eager evaluation: every reference file, head and structure.

python benchmarks/compiled_differences.py [THREADS]...
"""

from __future__ import annotations

import sys
from pathlib import Path

import ase.io
import numpy as np
import torch

import mtinfer

REFERENCE = Path(__file__).parent.parent / "tests/data/reference"


def differences(path: Path, structures: list[ase.Atoms]) -> tuple[str, list[float]]:
    """Precision of the networks, and largest differences: energy per atom, forces, virial per atom."""
    eager = mtinfer.load(path, device="cpu", compile="off")
    compiled = mtinfer.load(path, device="cpu", compile="wait")
    worst = np.zeros(3)
    for head in eager.heads:
        known = [atoms for atoms in structures if set(atoms.symbols) <= set(eager.head(head).model.type_map)]
        # the first answer of a compiled graph is the eager one of its self-check
        compiled.evaluate(known[:1], head=head)
        pairs = zip(compiled.evaluate(known, head=head), eager.evaluate(known, head=head), strict=True)
        for got, want in pairs:
            n = len(want.atom_energy)
            found = (
                abs(got.energy - want.energy) / n,
                abs(got.forces - want.forces).max(),
                abs(got.virial - want.virial).max() / n,
            )
            worst = np.maximum(worst, found)
    dtype = eager.head(eager.heads[0]).model.fitting.dtype
    return str(dtype).removeprefix("torch."), worst.tolist()


def main() -> None:
    """Print a Markdown table."""
    print("| file | precision | threads | energy, eV/atom | forces, eV/Å | virial, eV/atom |")
    print("|---|---|---|---|---|---|")
    structures = ase.io.read(REFERENCE / "structures.extxyz", ":")
    for path in sorted((REFERENCE / "checkpoints").glob("*.pt")):
        for threads in map(int, sys.argv[1:] or ("1", "2")):
            torch.set_num_threads(threads)
            precision, worst = differences(path, structures)
            numbers = " | ".join(f"{value:.1e}" for value in worst)
            print(f"| {path.stem} | {precision} | {threads} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
