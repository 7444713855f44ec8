"""Evaluate many structures at once and compare what the heads of a file say of them."""

from pathlib import Path

import ase.io
import numpy as np

import mtinfer

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests/data/reference/checkpoints/dpa1strip-separate-pt.pt"

potential = mtinfer.load(CHECKPOINT, compile=False)
clusters = ase.io.read(ROOT / "tests/data/frames/clusters.extxyz", index=":")
print(f"{len(clusters)} clusters of {min(map(len, clusters))} to {max(map(len, clusters))} atoms")
for head in ("clusters", "water"):
    predictions = potential.evaluate(clusters, head=head)
    per_atom = [p.energy / len(p.forces) for p in predictions]
    largest = max(float(np.abs(p.forces).max()) for p in predictions)
    print(f"head {head:9}  energy {np.mean(per_atom):9.4f} eV/atom  largest force {largest:.2f} eV/Å")
