"""The main job on the bundled checkpoint: heads, conversion, evaluation, molecular dynamics, head swap.

Run with ``make demo`` or ``python examples/01_demo.py [OUTPUT_FOLDER]``.
"""

import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
from ase import units
from ase.md.verlet import VelocityVerlet

from mtinfer import MTCalculator

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests/data/reference/checkpoints/dpa1strip-separate-pt.pt"
FRAMES = ROOT / "tests/data/frames"


def run(*arguments: str | Path) -> None:
    """Run an mtinfer command and show it as a user would type it."""
    words = [
        str(a.relative_to(ROOT)) if isinstance(a, Path) and a.is_relative_to(ROOT) else str(a)
        for a in arguments
    ]
    print(f"\n$ mtinfer {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "mtinfer", *words], cwd=ROOT, check=True)


def molecular_dynamics(model: Path, n_steps: int = 100) -> None:
    """NVE dynamics of water, then the same structure with another head in the same calculator."""
    atoms = ase.io.read(FRAMES / "water.extxyz", index=0)
    calculator = MTCalculator(model, head="water", compile="wait")
    atoms.calc = calculator
    thermal = np.sqrt(300 * units.kB * atoms.get_masses())[:, None]
    atoms.set_momenta(thermal * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    print(f"\nNVE of {len(atoms)} atoms of water, head {calculator.head!r}, 0.5 fs per step")
    print("  (the graph is compiled first, once on a machine)", flush=True)
    began = time.perf_counter()
    atoms.get_forces()
    print(f"  first forces after {time.perf_counter() - began:.1f} s")
    start = None
    for step in range(0, n_steps + 1, 20):
        total = atoms.get_potential_energy() + atoms.get_kinetic_energy()
        start = total if start is None else start
        print(
            f"  step {step:3d}  E_pot {atoms.get_potential_energy():12.4f} eV  "
            f"E_tot - E_tot(0) {1e3 * (total - start) / len(atoms):+.4f} meV/atom"
        )
        if step < n_steps:
            began = time.perf_counter()
            dynamics.run(20)
            took = 1e3 * (time.perf_counter() - began) / 20
            compiled = calculator.potential.graphs[0].is_compiled
            how = "compiled" if compiled else "eager: see the warning"
            print(f"            {took:.1f} ms per step ({how})")
    for head in ("clusters", "water"):
        began = time.perf_counter()
        calculator.head = head
        swapped = time.perf_counter() - began
        print(
            f"calc.head = {head!r:10}  {1e6 * swapped:4.0f} µs   energy {atoms.get_potential_energy():.4f} eV"
        )


def main() -> None:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "demo-output").resolve()
    output.mkdir(parents=True, exist_ok=True)
    model = output / "model.safetensors"
    run("info", CHECKPOINT)
    run("convert", CHECKPOINT, "-o", model, "--force")
    for head in ("water", "clusters", "copper"):
        run("eval", "--head", head, model, FRAMES / head, "--plot", output / f"parity-{head}.png")
    molecular_dynamics(model)
    print(f"\nparity plots: {output}/parity-*.png")


if __name__ == "__main__":
    main()
