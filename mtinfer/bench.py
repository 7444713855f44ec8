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
from torch.utils._python_dispatch import TorchDispatchMode

from .checkpoint.heads import DEFAULT_HEAD
from .errors import MtinferError

__all__ = ["ARCHITECTURES", "Figures", "measure", "water"]

_FITTING = {"type": "ener", "neuron": [240, 240, 240], "resnet_dt": True, "precision": "float64"}
_SE_ATTEN = {
    "type": "se_atten",
    "rcut": 6.0,
    "rcut_smth": 0.5,
    "sel": 140,
    "neuron": [25, 50, 100],
    "axis_neuron": 16,
    "tebd_input_mode": "strip",
    "smooth_type_embedding": True,
    "precision": "float64",
}
#: name -> head configuration at the sizes that people publish; random weights are as fast as trained ones
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "se_e2_a": {
        "descriptor": {
            "type": "se_e2_a",
            "rcut": 6.0,
            "rcut_smth": 0.5,
            "sel": [60, 100],
            "neuron": [25, 50, 100],
            "axis_neuron": 16,
            "type_one_side": True,
            "precision": "float64",
        },
        "fitting_net": _FITTING,
    },
    "dpa1": {"descriptor": {**_SE_ATTEN, "attn_layer": 0}, "fitting_net": _FITTING},
    "dpa1-attention": {
        "descriptor": {**_SE_ATTEN, "attn_layer": 2, "attn": 128, "tebd_input_mode": "concat"},
        "fitting_net": _FITTING,
    },
    "dpa2-medium": {
        "descriptor": {
            "type": "dpa2",
            "repinit": {
                "tebd_dim": 8,
                "rcut": 6.0,
                "rcut_smth": 0.5,
                "nsel": 120,
                "neuron": [25, 50, 100],
                "axis_neuron": 12,
                "activation_function": "tanh",
                "three_body_sel": 48,
                "three_body_rcut": 4.0,
                "three_body_rcut_smth": 3.5,
                "use_three_body": True,
            },
            "repformer": {
                "rcut": 4.0,
                "rcut_smth": 3.5,
                "nsel": 48,
                "nlayers": 6,
                "g1_dim": 128,
                "g2_dim": 32,
                "attn2_hidden": 32,
                "attn2_nhead": 4,
                "attn1_hidden": 128,
                "attn1_nhead": 4,
                "axis_neuron": 4,
                "update_h2": False,
                "update_g1_has_conv": True,
                "update_g1_has_grrg": True,
                "update_g1_has_drrd": True,
                "update_g1_has_attn": False,
                "update_g2_has_g1g1": False,
                "update_g2_has_attn": True,
                "update_style": "res_residual",
                "update_residual": 0.01,
                "update_residual_init": "norm",
                "attn2_has_gate": True,
                "use_sqrt_nnei": True,
                "g1_out_conv": True,
                "g1_out_mlp": True,
            },
            "precision": "float64",
            "add_tebd_to_repinit_out": False,
        },
        "fitting_net": _FITTING,
    },
    "dpa3": {
        "descriptor": {
            "type": "dpa3",
            "repflow": {
                "n_dim": 128,
                "e_dim": 64,
                "a_dim": 32,
                "nlayers": 6,
                "e_rcut": 6.0,
                "e_rcut_smth": 5.3,
                "e_sel": 1200,
                "a_rcut": 4.0,
                "a_rcut_smth": 3.5,
                "a_sel": 300,
                "axis_neuron": 4,
                "fix_stat_std": 0.3,
                "a_compress_rate": 1,
                "a_compress_e_rate": 2,
                "a_compress_use_split": True,
                "update_angle": True,
                "smooth_edge_update": True,
                "edge_init_use_dist": True,
                "use_exp_switch": True,
                "use_dynamic_sel": True,
                "sel_reduce_factor": 10.0,
                "update_style": "res_residual",
                "update_residual": 0.1,
                "update_residual_init": "const",
                "n_multi_edge_message": 1,
                "optim_update": True,
            },
            "activation_function": "silut:10.0",
            "precision": "float32",
            "use_tebd_bias": False,
            "concat_output_tebd": False,
        },
        "fitting_net": {**_FITTING, "activation_function": "silut:10.0", "precision": "float32"},
    },
}


@dataclass(frozen=True)
class Figures:
    """What one process found for one model, one size."""

    model: str
    engine: str
    #: radial embedding nets evaluated by series
    tabulated: bool
    n_atoms: int
    n_edges: int
    #: reading the file, s
    load_s: float
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
        return 1e3 * self.n_atoms / self.median_ms


def water(n_atoms: int, seed: int = 0) -> ase.Atoms:
    """Water of 1 g/cm³: randomly turned molecules on a slightly disturbed cubic grid, periodic.

    Raises
    ------
    MtinferError
        If `n_atoms` is not a multiple of 3.
    """
    n_molecules, rest = divmod(n_atoms, 3)
    if rest or not n_molecules:
        raise MtinferError(f"{n_atoms} atoms of water asked for; give a multiple of 3, such as 192")
    rng = np.random.default_rng(seed)
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


def measure(
    model: str, head: str | None, n_atoms: int, *, steps: int, threads: int, device: str, tabulate: bool
) -> Figures:
    """Measure mtinfer in a fresh process.

    Parameters
    ----------
    model
        name of `ARCHITECTURES`, which gets random weights, or path of a model with the elements O and H.
    head
        head of the file; None where it has only one.
    """
    request = {
        "model": model,
        "head": head,
        "n_atoms": n_atoms,
        "steps": steps,
        "threads": threads,
        "device": device,
        "tabulate": tabulate,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "mtinfer.bench", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MtinferError(f"measuring {model} at {n_atoms} atoms failed: {reason}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def measure_deepmd(
    python: Path,
    script: Path,
    model: str,
    head: str | None,
    n_atoms: int,
    *,
    steps: int,
    threads: int,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Measure deepmd-kit on the same weights and the same structure with the interpreter `python`.

    Returns
    -------
    form of the model (``pt``, ``pt-no-jit``, ``pth``, ``pt2``) -> its figures, or ``{"error": ...}``
    """
    with tempfile.TemporaryDirectory() as folder:
        structure = Path(folder) / "water.extxyz"
        ase.io.write(structure, water(n_atoms))
        command = [
            str(python),
            str(script),
            str(_file_of(model, Path(folder))),
            "--head",
            head or DEFAULT_HEAD,
        ]
        command += [
            "--structure",
            str(structure),
            "--steps",
            str(steps),
            "--threads",
            str(threads),
            "--freeze",
        ]
        # else deepmd-kit takes the first GPU, where there is one
        environment = {**os.environ, "DEVICE": "cpu"} if device == "cpu" else None
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


def _measure_here(
    model: str, head: str | None, n_atoms: int, steps: int, threads: int, device: str, tabulate: bool
) -> Figures:
    from .calculator import MTCalculator

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = _file_of(model, Path(folder))
        began = time.perf_counter()
        calculator = MTCalculator(path, head=head, device=device, compile="wait", tabulate=tabulate)
    load_s = time.perf_counter() - began
    atoms = water(n_atoms)
    start = atoms.get_positions()
    rng = np.random.default_rng(0)
    seconds = []
    warm_up = 3
    for step in range(1 + warm_up + steps):
        atoms.set_positions(start + (rng.normal(0, 0.01, start.shape) if step else 0.0))
        began = time.perf_counter()
        calculator.calculate(atoms)
        seconds.append(time.perf_counter() - began)
    peak = _peak_mib(calculator.potential.device)
    gflop, gbyte, n_edges = _count(calculator, atoms)
    rate = _matmul_gflops(*_largest_weight(calculator))
    return Figures(
        model=model,
        engine="mtinfer",
        tabulated=tabulate,
        n_atoms=n_atoms,
        n_edges=n_edges,
        load_s=load_s,
        first_call_s=seconds[0],
        median_ms=1e3 * statistics.median(seconds[1 + warm_up :]),
        peak_mib=peak,
        graphs_compiled=calculator.potential.graphs_compiled,
        gflop=gflop,
        gbyte=gbyte,
        roofline_ms=1e3 * max(gflop / rate, gbyte / _copy_gbytes(calculator.potential.device)),
    )


def _count(calculator: Any, atoms: ase.Atoms) -> tuple[float, float, int]:
    """Operations and bytes of the matrix products of one step (Gflop, GB), and number of pairs.

    Counted on fake tensors, on the function of the single graph: nothing is computed twice.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from .neighbors import find_candidates

    potential = calculator.potential
    state = potential.head(calculator.head)
    inputs = potential.inputs([atoms], [find_candidates(atoms, state.model.rcut)], state)
    layouts, _ = state.model.layouts(inputs)
    traffic = _Traffic()
    with FakeTensorMode() as fake, FlopCounterMode(display=False) as counter, traffic:
        for layout in layouts:
            data = (*layout.displacements, *layout.tensors, *state.weights[layout.group])
            state.graph.function(*map(fake.from_tensor, data))
    return counter.get_total_flops() / 1e9, traffic.n_bytes / 1e9, int(inputs.centers.shape[0])


class _Traffic(TorchDispatchMode):
    """Counts what matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            self.n_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)


def _copy_gbytes(device: Any) -> float:
    """Rate of a large copy, GB/s, read and written bytes together."""
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        float(target.copy_(source)[0])
        seconds.append(time.perf_counter() - began)
    return 2e-9 * source.numel() * source.element_size() / min(seconds)


def _largest_weight(calculator: Any) -> tuple[Any, torch.dtype]:
    """Device and dtype of the largest weight: those of most products."""
    weights = calculator.potential.head(calculator.head).weights[0]
    largest = max(weights, key=torch.Tensor.numel)
    return largest.device, largest.dtype


def _matmul_gflops(device: Any, dtype: torch.dtype) -> float:
    """Rate of a large matrix product, Gflop/s."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.rand(n, n, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - began)
    return 2e-9 * n**3 / min(seconds)


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
        Path(figures.model).name + (", tabulated" if figures.tabulated else ""),
        f"{figures.n_atoms}",
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
        print(json.dumps(asdict(_measure_here(**json.loads(sys.argv[1])))))
    except MtinferError as err:
        sys.exit(str(err))
