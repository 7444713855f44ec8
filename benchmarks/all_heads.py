"""Energies of many heads at once, against energy, forces and virial of one.

python benchmarks/all_heads.py [ARCHITECTURE]...

Eight heads with one descriptor and fitting nets of their own, random weights at published sizes, 192 atoms of
water; medians in milliseconds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mtinfer
from mtinfer.architectures import ARCHITECTURES
from mtinfer.bench import water
from mtinfer.random_checkpoint import write_random_checkpoint

N_HEADS, N_THREADS, N_CALLS = 8, 2, 21


def median_ms(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3 + N_CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[3:])


def measure(name: str) -> None:
    heads = [f"head{k}" for k in range(N_HEADS)]
    atoms = water(192)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        write_random_checkpoint(path, {"type_map": ["O", "H"], **ARCHITECTURES[name]}, heads=heads)
        potential = mtinfer.load(path, device="cpu", compile="wait")
    forces = median_ms(lambda: potential.evaluate(atoms, heads[0]))
    one = median_ms(lambda: potential.energies([atoms], heads[:1]))
    every = median_ms(lambda: potential.energies([atoms]))
    print(
        f"{name}: one head with forces {forces:.1f} ms, energies of one {one:.1f} ms, of {N_HEADS} heads "
        f"{every:.1f} ms: {every / forces:.2f}x and {every / one:.2f}x"
    )


if __name__ == "__main__":
    torch.set_num_threads(N_THREADS)
    for architecture in sys.argv[1:] or ["se_e2_a", "dpa1", "dpa1-attention", "dpa2-medium", "dpa3"]:
        measure(architecture)
