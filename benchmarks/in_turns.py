"""Step times of mtinfer and of deepmd-kit in turns, so that a slow minute of the host is one for both.

    python benchmarks/in_turns.py MODEL THEIRS --deepmd-python PYTHON [--head water] [--atoms 192]

THEIRS is the same model in the form that deepmd-kit is to read (``.pt``, ``.pth``, ``.pt2``). Each program
has a process of its own. A turn is two steps, of which the second counts: the first finds the caches full of
what the other left.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ase
import ase.io
import numpy as np
from deepmd_baseline import DISPLACEMENT, WARM_UP, threads_environment, with_deepmd


def with_mtinfer(model: str, head: str | None, atoms: ase.Atoms) -> Callable[[np.ndarray], float]:
    """Load a model, and return what gives the energy (eV) at positions (Å), and makes all else with it."""
    from mtinfer import MTCalculator

    calculator = MTCalculator(model, head=head, compile="wait")

    def evaluate(positions: np.ndarray) -> float:
        atoms.positions = positions
        calculator.calculate(atoms)
        return float(calculator.results["energy"])

    return evaluate


def serve(program: str, model: str, head: str, structure: str) -> None:
    """Make a step for every line of standard input, and print its time, s."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries say goes to stderr
    atoms = ase.io.read(structure)
    make = {"mtinfer": with_mtinfer, "deepmd": with_deepmd}[program]
    evaluate = make(model, head or None, atoms)
    start, rng = atoms.get_positions(), np.random.default_rng(0)
    for _ in sys.stdin:
        positions = start + rng.normal(0, DISPLACEMENT, start.shape)
        began = time.perf_counter()
        evaluate(positions)
        print(time.perf_counter() - began, file=answers, flush=True)


class Program:
    """A process that makes steps when it is asked to."""

    def __init__(self, python: str, threads: int, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [python, __file__, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads_environment(threads),
            text=True,
        )

    def turn(self) -> float:
        """Make two steps, and return the time of the second, ms."""
        self.step()
        return self.step()

    def step(self) -> float:
        """Make a step, and return its time, ms."""
        assert self._process.stdin
        assert self._process.stdout
        print(file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._process.args[0]} ended; what it said stands above")
        return 1e3 * float(answer)


def main() -> None:
    """Print the times of every turn and their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("theirs")
    parser.add_argument("--deepmd-python", required=True)
    parser.add_argument("--head", default="")
    parser.add_argument("--atoms", type=int, default=192)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from mtinfer.bench import water

    with tempfile.TemporaryDirectory() as folder:
        structure = str(Path(folder) / "water.extxyz")
        ase.io.write(structure, water(options.atoms))
        rest = options.head, structure
        programs = [
            Program(sys.executable, options.threads, "mtinfer", str(Path(options.model).resolve()), *rest),
            Program(
                options.deepmd_python, options.threads, "deepmd", str(Path(options.theirs).resolve()), *rest
            ),
        ]
        for program in programs:
            for _ in range(1 + WARM_UP):
                program.step()
        print("| turn | mtinfer, ms | deepmd-kit, ms | speed |\n|---|---|---|---|")
        turns = []
        for turn in range(1, options.steps + 1):
            ours, theirs = (program.turn() for program in programs)
            turns.append((ours, theirs))
            print(f"| {turn} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.1f}x |", flush=True)
    ours, theirs = (statistics.median(times) for times in zip(*turns, strict=True))
    speeds = [theirs / ours for ours, theirs in turns]
    print(f"| median | {ours:.1f} | {theirs:.1f} | {statistics.median(speeds):.1f}x |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
