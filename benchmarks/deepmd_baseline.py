"""Time and memory of deepmd-kit for energy, forces and virial, as JSON: what mtinfer is compared with.

Runs in an environment that holds deepmd-kit, numpy and ase; mtinfer is neither needed nor imported::

    python deepmd_baseline.py CHECKPOINT --head water --water 192 --threads 2 --freeze

Every form of the model is measured in a process of its own, one after the other: the checkpoint as
``DeepPot`` loads it (``pt``); in the pt dialect also without TorchScript (``pt-no-jit``), which is often the
faster one; with ``--freeze`` the frozen file of the dialect (``pth`` or ``pt2``). A form that fails is
reported with its error in place of its figures.
"""

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np

#: 96 atoms of liquid water in a cubic cell, 9.85 Å wide
WATER = Path(__file__).parents[1] / "tests/data/reference/structures.extxyz@0"
#: standard deviation of the displacement of each coordinate from its start, another one at every step, Å
DISPLACEMENT = 0.01
#: calls between the first and the first that counts: TorchScript still specialises its code in these
WARM_UP = 3


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    model: str
    head: str
    structure: str
    #: number of atoms to which the structure is repeated, None: as it is
    n_atoms: int | None
    steps: int
    no_jit: bool = False


@dataclass(frozen=True)
class Figures:
    """What one process found."""

    n_atoms: int
    #: importing deepmd-kit and reading the file
    load_s: float
    first_call_s: float
    median_ms: float
    min_ms: float
    max_ms: float
    #: before the first call, with all libraries loaded
    loaded_mib: float
    peak_mib: float
    #: of the structure as it is, to see that all forms computed the same
    energy_ev: float


def repeated(atoms: ase.Atoms, n_atoms: int) -> ase.Atoms:
    """Return the periodic `atoms` repeated to `n_atoms`, as near to a cube as possible."""
    copies, rest = divmod(n_atoms, len(atoms))
    if rest or not copies:
        raise SystemExit(f"{n_atoms} atoms asked for: not a multiple of the {len(atoms)} of the structure")
    factors = [n for n in range(1, copies + 1) if copies % n == 0]
    repeats = [(a, b, copies // (a * b)) for a in factors for b in factors if copies % (a * b) == 0]
    lengths = atoms.cell.lengths()
    return atoms.repeat(min(repeats, key=lambda counts: np.ptp(np.log(lengths * counts))))


def peak_mib() -> float:
    """Return the largest resident set of this process so far, or of its tensors on a GPU, MiB."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # unlike `ru_maxrss`, not inherited from the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def with_deepmd(
    model: str, head: str | None, atoms: ase.Atoms, *, no_jit: bool = False
) -> Callable[[np.ndarray], float]:
    """Load a model, and return what gives the energy (eV) at positions (Å), and makes all else with it."""
    from deepmd.infer import DeepPot

    frozen = Path(model).suffix in (".pth", ".pt2")
    options = {} if frozen else {"head": head, "no_jit": no_jit}
    potential = DeepPot(model, **options)
    types = [potential.get_type_map().index(symbol) for symbol in atoms.get_chemical_symbols()]
    cell = atoms.cell.array.reshape(1, 9) if atoms.pbc.any() else None
    return lambda positions: float(potential.eval(positions[None], cell, types)[0].item())


def measure(task: Task) -> Figures:
    """Evaluate the model of `task` step by step; for a process of its own."""
    os.dup2(2, 1)  # deepmd-kit's words go to stderr
    atoms = ase.io.read(task.structure)
    atoms = atoms if task.n_atoms is None else repeated(atoms, task.n_atoms)
    start = time.perf_counter()
    evaluate = with_deepmd(task.model, task.head, atoms, no_jit=task.no_jit)
    load_s = time.perf_counter() - start
    rng = np.random.default_rng(0)
    loaded_mib = peak_mib()
    energy, seconds = math.nan, []
    for step in range(1 + WARM_UP + task.steps):
        moved = atoms.positions + (rng.normal(0, DISPLACEMENT, (len(atoms), 3)) if step else 0.0)
        start = time.perf_counter()
        found = evaluate(moved)
        seconds.append(time.perf_counter() - start)
        if step == 0:
            energy = found
    counted = [1000 * value for value in seconds[1 + WARM_UP :]]
    return Figures(
        n_atoms=len(atoms),
        load_s=load_s,
        first_call_s=seconds[0],
        median_ms=statistics.median(counted),
        min_ms=min(counted),
        max_ms=max(counted),
        loaded_mib=loaded_mib,
        peak_mib=peak_mib(),
        energy_ev=energy,
    )


def in_own_process(task: Task) -> dict[str, Any]:
    """Return the figures of `task`, or ``{"error": ...}``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return asdict(pool.submit(measure, task).result())
        except Exception as err:  # whatever deepmd-kit raises, or the death of the process
            return {"error": f"{type(err).__name__}: {err}"}


def threads_environment(n_threads: int) -> dict[str, str]:
    """Variables that give deepmd-kit, and torch, a number of threads."""
    return {
        "OMP_NUM_THREADS": str(n_threads),
        "DP_INTRA_OP_PARALLELISM_THREADS": str(n_threads),
        "DP_INTER_OP_PARALLELISM_THREADS": "1",
    }


def is_pt_expt(checkpoint: Path) -> bool:
    """Tell whether the checkpoint holds the pt_expt dialect (``w``) and not pt (``matrix``)."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    return any(key.endswith(".w") for key in content.get("model", content))


def freeze(checkpoint: Path, head: str, frozen: Path) -> None:
    """Freeze one head into `frozen` with deepmd-kit's command."""
    backend = "--pt" if frozen.suffix == ".pth" else "--pt-expt"
    command = [sys.executable, "-m", "deepmd", backend, "freeze", "-c", str(checkpoint), "--head", head]
    done = subprocess.run([*command, "-o", str(frozen)], capture_output=True, text=True, cwd=frozen.parent)
    if done.returncode or not frozen.exists():
        lines = done.stderr.splitlines()
        reasons = [line.strip() for line in lines if re.match(r"[\w.]*(Error|Exception|Node)\w*: ", line)]
        raise RuntimeError(f"dp freeze, status {done.returncode}: {' '.join(reasons[-1:])}")


def all_forms(checkpoint: Path, task: Task, *, with_frozen: bool) -> dict[str, dict[str, Any]]:
    """Return the figures of the checkpoint and of its other forms, by form."""
    forms = {"pt": in_own_process(task)}
    pt_expt = is_pt_expt(checkpoint)
    if not pt_expt:
        forms["pt-no-jit"] = in_own_process(replace(task, no_jit=True))
    if with_frozen:
        form = "pt2" if pt_expt else "pth"
        with tempfile.TemporaryDirectory() as folder:
            frozen = Path(folder) / f"frozen.{form}"
            start = time.perf_counter()
            try:
                freeze(checkpoint, task.head, frozen)
            except RuntimeError as err:
                return forms | {form: {"error": str(err)}}
            freeze_s = time.perf_counter() - start
            forms[form] = {"freeze_s": freeze_s, **in_own_process(replace(task, model=str(frozen)))}
    return forms


def parse_arguments() -> argparse.Namespace:
    """Return the command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--head", required=True)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--structure", metavar="FILE", help="file that ase reads, as FILE or FILE@INDEX")
    size.add_argument("--water", type=int, metavar="N", help="N atoms of water, a multiple of 96")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="calls that count (default: 10)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--freeze", action="store_true", help="measure the frozen model as well")
    return parser.parse_args()


def main() -> None:
    """Print the figures of one checkpoint as JSON."""
    arguments = parse_arguments()
    os.environ |= threads_environment(arguments.threads)
    checkpoint = arguments.checkpoint.resolve()
    task = Task(
        model=str(checkpoint),
        head=arguments.head,
        structure=arguments.structure or str(WATER),
        n_atoms=arguments.water,
        steps=arguments.steps,
    )
    report = {
        "deepmd_kit": importlib.metadata.version("deepmd-kit"),
        "torch": importlib.metadata.version("torch"),
        "checkpoint": str(checkpoint),
        "head": arguments.head,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "forms": all_forms(checkpoint, task, with_frozen=arguments.freeze),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
