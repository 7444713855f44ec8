"""Speed and memory of energy, forces and virial on water, beside deepmd-kit where it is installed.

Every figure comes from a process of its own, so that peak memory is that of one model and one size.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase
import ase.build
import ase.io
import numpy as np
import torch

from .architectures import ARCHITECTURES
from .checkpoint.heads import DEFAULT_HEAD
from .errors import MtinferError
from .roofline import roofline

__all__ = ["HEADER", "Figures", "Task", "measure", "measure_deepmd", "row", "water"]


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    #: name of `ARCHITECTURES`, which gets random weights, or path of a model with the elements O and H
    model: str
    #: head of the file; None where it has only one
    head: str | None
    n_atoms: int
    #: that are timed, after three that are not
    steps: int
    threads: int
    device: str
    #: radial embedding nets evaluated by series
    tabulate: bool = False


@dataclass(frozen=True)
class Figures:
    """What one process found."""

    task: Task
    n_edges: int
    #: first energy, forces and virial, compilation included, s
    first_call_s: float
    median_ms: float
    #: of the process; on a GPU of its memory there
    peak_mib: float
    graphs_compiled: int
    #: floating-point operations of all matrix products of a step, and what they read and write
    gflop: float
    gbyte: float
    #: time that those products take at the measured rate of a large product, or of a large copy, ms
    roofline_ms: float

    @property
    def atom_steps_per_second(self) -> float:
        """Atoms times steps per second."""
        return 1e3 * self.task.n_atoms / self.median_ms


def water(n_atoms: int) -> ase.Atoms:
    """Water of 1 g/cm³: randomly turned molecules on a slightly disturbed cubic grid, periodic.

    Raises
    ------
    MtinferError
        If `n_atoms` is not a multiple of 3.
    """
    n_molecules, rest = divmod(n_atoms, 3)
    if rest or not n_molecules:
        raise MtinferError(f"{n_atoms} atoms of water asked for; give a multiple of 3, such as 192")
    rng = np.random.default_rng(0)
    edge = (29.915 * n_molecules) ** (1 / 3)
    per_axis = math.ceil(n_molecules ** (1 / 3) - 1e-9)
    sites = np.stack(np.meshgrid(*[np.arange(per_axis)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = sites[rng.permutation(len(sites))[:n_molecules]] * (edge / per_axis)
    atoms = ase.Atoms(cell=[edge] * 3, pbc=True)
    for site in sites:
        molecule = ase.build.molecule("H2O")
        molecule.rotate(360 * rng.random(), rng.normal(size=3))
        molecule.translate(site + rng.normal(scale=0.05, size=3))
        atoms += molecule
    return atoms


def measure(task: Task) -> Figures:
    """Measure mtinfer in a fresh process.

    Raises
    ------
    MtinferError
        The process failed: its last line.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads)}
    command = [sys.executable, "-m", "mtinfer.bench", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MtinferError(f"measuring {task.model} at {task.n_atoms} atoms failed: {reason}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]) | {"task": task})


def measure_deepmd(python: Path, script: Path, task: Task) -> dict[str, dict[str, Any]]:
    """Measure deepmd-kit on the same weights and the same structure with the interpreter `python`.

    Returns
    -------
    form of the model (``pt``, ``pt-no-jit``, ``pth``, ``pt2``) -> its figures, or ``{"error": ...}``

    Raises
    ------
    MtinferError
        The process failed: its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        structure = Path(folder) / "water.extxyz"
        ase.io.write(structure, water(task.n_atoms))
        command = [str(python), str(script), str(_file_of(task.model, Path(folder)))]
        command += ["--head", task.head or DEFAULT_HEAD, "--structure", str(structure)]
        command += ["--steps", str(task.steps), "--threads", str(task.threads), "--freeze"]
        # else deepmd-kit takes the first GPU, where there is one
        environment = {**os.environ, "DEVICE": "cpu"} if task.device == "cpu" else None
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MtinferError(f"{python} could not measure deepmd-kit: {reason}")
    forms: dict[str, dict[str, Any]] = json.loads(done.stdout)["forms"]
    return forms


def _file_of(model: str, folder: Path) -> Path:
    """Path of a model that is given by name or path; named ones are written into `folder`."""
    if model not in ARCHITECTURES:
        return Path(model)
    from .random_checkpoint import write_random_checkpoint

    path = folder / "model.pt"
    write_random_checkpoint(path, {"type_map": ["O", "H"], **ARCHITECTURES[model]})
    return path


def _measure_here(task: Task) -> Figures:
    from .calculator import MTCalculator

    torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = _file_of(task.model, Path(folder))
        calculator = MTCalculator(
            path, head=task.head, device=task.device, compile="wait", tabulate=task.tabulate
        )
    atoms = water(task.n_atoms)
    start = atoms.get_positions()
    rng = np.random.default_rng(0)
    seconds = []
    warm_up = 3
    for step in range(1 + warm_up + task.steps):
        atoms.set_positions(start + (rng.normal(0, 0.01, start.shape) if step else 0.0))
        began = time.perf_counter()
        calculator.calculate(atoms)
        seconds.append(time.perf_counter() - began)
    peak = _peak_mib(calculator.potential.device)
    least = roofline(calculator, atoms)
    return Figures(
        task=task,
        n_edges=least.n_edges,
        first_call_s=seconds[0],
        median_ms=1e3 * statistics.median(seconds[1 + warm_up :]),
        peak_mib=peak,
        graphs_compiled=calculator.potential.graphs_compiled,
        gflop=least.gflop,
        gbyte=least.gbyte,
        roofline_ms=least.ms,
    )


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # unlike `ru_maxrss`, not inherited from the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


#: columns of the table of `row`, as Markdown
HEADER = "\n".join(
    [
        "| model | atoms | ms/step | atoms·step/s | over roofline | peak MiB | first call s | graphs "
        "| deepmd-kit ms/step | speed | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
)


def row(figures: Figures, forms: dict[str, dict[str, Any]]) -> str:
    """Figures as a row of a Markdown table; the last columns compare with deepmd-kit's fastest form."""
    ran = {form: value for form, value in forms.items() if "median_ms" in value}
    theirs = ["", "", ""]
    if ran:
        form, best = min(ran.items(), key=lambda item: item[1]["median_ms"])
        theirs = [
            f"{best['median_ms']:.1f} ({form})",
            f"{best['median_ms'] / figures.median_ms:.1f}x",
            f"{figures.peak_mib / best['peak_mib']:.2f}x",
        ]
    elif forms:
        theirs[0] = "failed"
    cells = [
        Path(figures.task.model).name + (", tabulated" if figures.task.tabulate else ""),
        f"{figures.task.n_atoms}",
        f"{figures.median_ms:.1f}",
        f"{figures.atom_steps_per_second:.0f}",
        f"{figures.median_ms / figures.roofline_ms:.1f}x of {figures.roofline_ms:.1f}",
        f"{figures.peak_mib:.0f}",
        f"{figures.first_call_s:.1f}",
        f"{figures.graphs_compiled}",
        *theirs,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure_here(Task(**json.loads(sys.argv[1]))))))
    except MtinferError as err:
        sys.exit(str(err))
