"""Train one input with mtinfer and with deepmd-kit: step time, peak memory, force error on held-out frames.

    python benchmarks/training.py INPUT DATA OUTPUT --dp /path/to/dp [--seeds 3] [--steps 6000] [--threads 2]

DATA holds a folder of deepmd/npy systems per task. Every fifth frame of each is held out. Both programs
train on the same files; the checkpoints of both are scored by ``mtinfer eval``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from mtinfer.train.curves import read_curve

COLOURS = {"mtinfer": "tab:blue", "dp --pt": "tab:orange", "dp --pt-expt": "tab:green"}


@dataclass(frozen=True)
class Run:
    """What one training gave."""

    engine: str
    seed: int
    #: wall time of the process, s
    seconds: float
    #: median over displays, ms
    step_ms: float
    peak_mib: float
    #: task -> RMSE of the force components of held-out frames, eV/Å
    force_rmse: dict[str, float]
    #: task -> (step, force RMSE of the validation batches)
    curve: dict[str, list[tuple[int, float]]]


def hold_out(source: Path, target: Path) -> None:
    """Copy deepmd/npy systems, every fifth frame into ``valid``, the others into ``train``."""
    for raw in sorted(source.glob("*/*/type.raw")):
        for kind in ("train", "valid"):
            folder = target / kind / raw.parent.relative_to(source)
            (folder / "set.000").mkdir(parents=True, exist_ok=True)
            for path in raw.parent.glob("*"):
                if path.is_file():
                    (folder / path.name).write_bytes(path.read_bytes())
            for path in sorted((raw.parent / "set.000").glob("*.npy")):
                frames = np.load(path)
                held = np.arange(len(frames)) % 5 == 4
                np.save(folder / "set.000" / path.name, frames[held if kind == "valid" else ~held])


def write_input(template: Path, data: Path, target: Path, *, seed: int, steps: int, every: int) -> None:
    """Input with the systems of `data`, a seed and a number of steps."""
    content = json.loads(template.read_text())
    training = content["training"]
    training |= {"seed": seed, "numb_steps": steps, "disp_freq": every, "save_freq": steps}
    for task, sections in training["data_dict"].items():
        for section, kind in (("training_data", "train"), ("validation_data", "valid")):
            systems = sorted(str(path) for path in (data / kind / task).iterdir())
            sections[section] = {"systems": systems, "batch_size": 1}
        sections["validation_data"]["numb_btch"] = 6
    for head in content["model"]["model_dict"].values():
        head["fitting_net"]["seed"] = seed
    for shared in content["model"]["shared_dict"].values():
        if isinstance(shared, dict):
            shared["seed"] = seed
    target.write_text(json.dumps(content, indent=1))


def run(command: Sequence[str], folder: Path, threads: int) -> tuple[float, float, str]:
    """Wall time (s), peak memory (MiB) and output of a process."""
    names = ("OMP_NUM_THREADS", "DP_INTRA_OP_PARALLELISM_THREADS", "TORCH_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"DP_INTER_OP_PARALLELISM_THREADS": "1"}
    log = folder / "log"
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024, log.read_text()


def train_mtinfer(folder: Path, threads: int) -> tuple[float, float, float, dict[str, Any], Path]:
    """Train with mtinfer in `folder`, which holds ``input.json``."""
    command = [sys.executable, "-m", "mtinfer", "train", "input.json", "--dialect", "pt"]
    seconds, peak, _ = run(command, folder, threads)
    rows = read_curve(folder / "lcurve.csv")
    at = {int(row["step"]): float(row["seconds"]) for row in rows}
    curve: dict[str, Any] = {}
    for row in rows:
        curve.setdefault(row["task"], []).append((int(row["step"]), float(row["rmse_force_valid"])))
    steps = sorted(at)
    per_step = [1e3 * (at[b] - at[a]) / (b - a) for a, b in itertools.pairwise(steps)]
    return seconds, statistics.median(per_step), peak, curve, folder / "model.ckpt.pt"


def train_deepmd(
    dp: str, backend: str, folder: Path, threads: int
) -> tuple[float, float, float, dict[str, Any], Path]:
    """Train with deepmd-kit in `folder`, which holds ``input.json``."""
    command = [dp, f"--{backend}", "train", "input.json", "--skip-neighbor-stat"]
    seconds, peak, output = run(command, folder, threads)
    per_step = [1e3 * float(t) for t in re.findall(r"avg = ([0-9.]+) s/batch", output)]
    if not per_step:
        every = json.loads((folder / "input.json").read_text())["training"]["disp_freq"]
        per_step = [1e3 * float(t) / every for t in re.findall(r"total wall time = ([0-9.]+) s", output)]
    lines = [line for line in (folder / "lcurve.out").read_text().splitlines() if line.strip()]
    names = next(line for line in lines if line.startswith("#") and "step" in line).lstrip("# ").split()
    curve: dict[str, Any] = {}
    for line in lines:
        if not line.startswith("#"):
            row = dict(zip(names, line.split(), strict=False))
            for name, value in row.items():
                if found := re.fullmatch(r"rmse_f_val_(.+)", name):
                    curve.setdefault(found[1], []).append((int(row["step"]), float(value)))
    newest = max(folder.glob("model.ckpt-*.pt"), key=lambda path: path.stat().st_mtime)
    return seconds, statistics.median(per_step[1:] or per_step), peak, curve, newest


def score(checkpoint: Path, data: Path, folder: Path, tasks: Iterable[str]) -> dict[str, float]:
    """RMSE of the force components of the held-out frames of every task."""
    found = {}
    for task in sorted(tasks):
        report = folder / f"score-{task}.json"
        command = [sys.executable, "-m", "mtinfer", "eval", "--head", task, str(checkpoint)]
        command += [str(data / "valid" / task), "--json", str(report)]
        subprocess.run(command, check=True, capture_output=True)
        rows = json.loads(report.read_text())["metrics"]
        # the last row of a quantity is that of all datasets
        found[task] = [row["rmse"] for row in rows if row["quantity"] == "forces"][-1]
    return found


def plot(runs: Sequence[Run], target: Path) -> None:
    """Force error of the validation batches over the steps, a panel per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted(runs[0].curve)
    figure = Figure(figsize=(4 * len(tasks), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(1, len(tasks), panel)
        for one in runs:
            if one.curve.get(task):
                label = one.engine if one.seed == runs[0].seed else None
                x, y = zip(*one.curve[task], strict=True)
                axes.plot(x, y, color=COLOURS[one.engine], alpha=0.7, linewidth=1, label=label)
        axes.set(title=task, xlabel="step", yscale="log")
        if panel == 1:
            axes.set_ylabel("force RMSE of validation frames (eV/Å)")
        axes.legend()
    figure.savefig(target, dpi=120)


@click.command()
@click.argument("template", type=click.Path(path_type=Path, exists=True))
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--dp", help="Program dp of deepmd-kit; without it only mtinfer trains.")
@click.option("--backend", "backends", multiple=True, default=("pt",), help="pt, pt-expt.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=6000, show_default=True)
@click.option("--every", default=300, show_default=True, help="Steps between displays.")
@click.option("--threads", default=2, show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Learning curves as PNG.")
def main(
    template: Path,
    source: Path,
    output: Path,
    dp: str | None,
    backends: tuple[str, ...],
    seeds: int,
    steps: int,
    every: int,
    threads: int,
    picture: Path | None,
) -> None:
    """Train, score, and print a Markdown table."""
    output = output.resolve()
    data = output / "data"
    hold_out(source, data)
    runs = []
    for seed in range(1, seeds + 1):
        for engine in ("mtinfer", *(f"dp --{backend}" for backend in backends if dp)):
            folder = output / f"{engine.replace(' --', '-')}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            write_input(template, data, folder / "input.json", seed=seed, steps=steps, every=every)
            if engine == "mtinfer":
                seconds, step_ms, peak, curve, checkpoint = train_mtinfer(folder, threads)
            else:
                backend = engine.partition("--")[2]
                seconds, step_ms, peak, curve, checkpoint = train_deepmd(str(dp), backend, folder, threads)
            rmse = score(checkpoint, data, folder, curve)
            runs.append(Run(engine, seed, seconds, step_ms, peak, rmse, curve))
            click.echo(f"{engine} seed {seed}: {seconds:.0f} s, {step_ms:.1f} ms a step, {rmse}", err=True)
    tasks = sorted(runs[0].force_rmse)
    heads = " | ".join(f"{task}, meV/Å" for task in tasks)
    click.echo(f"| engine | seed | wall s | ms/step | peak MiB | {heads} |\n|{'---|' * (5 + len(tasks))}")
    for one in runs:
        errors = " | ".join(f"{1e3 * one.force_rmse[task]:.1f}" for task in tasks)
        figures = f"{one.seconds:.0f} | {one.step_ms:.1f} | {one.peak_mib:.0f} | {errors}"
        click.echo(f"| {one.engine} | {one.seed} | {figures} |")
    if picture:
        plot(runs, picture)


if __name__ == "__main__":
    main()
