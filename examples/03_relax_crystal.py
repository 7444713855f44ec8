"""Relax positions and cell of strained copper."""

from pathlib import Path

import ase.build
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from mtinfer import MTCalculator

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests/data/reference/checkpoints/dpa1strip-separate-pt.pt"

copper = ase.build.bulk("Cu", cubic=True) * (2, 2, 2)
copper.set_cell(copper.cell * 1.02, scale_atoms=True)
copper.calc = MTCalculator(CHECKPOINT, head="copper", compile=False)
before = copper.get_potential_energy()
BFGS(FrechetCellFilter(copper), logfile=None).run(fmax=0.02, steps=40)
print(f"energy {before:.4f} -> {copper.get_potential_energy():.4f} eV")
print(f"lattice constant {copper.cell.lengths()[0] / 2:.3f} Å")
