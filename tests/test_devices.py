"""Every tensor on the device of its model: checked without a GPU on torch's `meta` device, and on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.md.verlet import VelocityVerlet
from devices import GPU, OneDevice, on_gpu, on_meta
from reference_files import COMPILED, DATA, FILES, SE_E2_A, STRIP, WITH_NUMBERS, heads, require_agreement

import mtinfer
from mtinfer import MTCalculator
from mtinfer.bench import water
from mtinfer.errors import PredictionWarning
from mtinfer.neighbors import find_candidates
from mtinfer.testing import example_structure

pytestmark = pytest.mark.filterwarnings(f"ignore::{PredictionWarning.__module__}.PredictionWarning")

DPA2 = DATA / "reference/checkpoints/dpa2-separate-pt.pt"
DPA3 = DATA / "reference/checkpoints/dpa3-shared-pt.pt"


# ---- without a GPU -----------------------------------------------------------------------------------------


def test_two_devices_are_noticed() -> None:
    with OneDevice(), pytest.raises(RuntimeError, match=r"mm\.default on cpu and meta"):
        torch.ones(2, 2) @ torch.ones(2, 2, device="meta")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_graph_has_no_tensors_of_its_own_elsewhere(path: Path) -> None:
    potential = mtinfer.load(path, device="cpu", compile=False)
    for head in potential.heads[:1]:
        state = potential.head(head)
        atoms = example_structure(potential, head)
        inputs = potential.inputs([atoms], [find_candidates(atoms, state.model.rcut)], state)
        layouts, _ = state.model.layouts(inputs)
        for layout in layouts:
            data = (*layout.displacements, *layout.tensors, *state.weights[layout.group])
            with OneDevice():
                outputs = state.graph.function(*on_meta(data))
            assert {output.device.type for output in outputs} == {"meta"}


# ---- on a GPU ----------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("path", WITH_NUMBERS, ids=lambda path: path.stem)
def test_eager_agrees_with_deepmd_kit(path: Path) -> None:
    potential = mtinfer.load(path, device=GPU, compile=False)
    for head in heads(path):
        require_agreement(potential, head, path)


@on_gpu
@pytest.mark.parametrize(
    "path", [path for path in WITH_NUMBERS if path.stem in COMPILED], ids=lambda p: p.stem
)
def test_compiled_agrees_with_deepmd_kit(path: Path) -> None:
    potential = mtinfer.load(path, device=GPU, compile="wait")
    for head in heads(path):
        for _ in range(2):  # the first call of a graph checks it
            require_agreement(potential, head, path)
    assert all(graph.is_compiled for graph in potential.graphs)
    stored = mtinfer.load(path, device=GPU, compile="stored")
    stored.evaluate(water(6), heads(path)[0])
    assert all(graph.is_compiled for graph in stored.graphs)


@on_gpu
@pytest.mark.parametrize("path", [DPA2, DPA3], ids=lambda path: path.stem)
def test_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtinfer.models.layout.SHARE_OF_GPU", 0.0)
    monkeypatch.setattr("mtinfer.models.layout.ACCELERATOR_OVER_CPU", 1)
    for name in ("dpa2", "dpa3"):
        monkeypatch.setattr(f"mtinfer.models.{name}._ENTRIES_OF_PART", 1000)
    potential = mtinfer.load(path, device=GPU, compile=False)
    require_agreement(potential, potential.heads[0], path)
    assert potential.head(potential.heads[0]).stages.graphs


def trajectory(device: torch.device, *, tabulate: bool) -> np.ndarray:
    atoms = water(96)
    atoms.calc = MTCalculator(STRIP, head="water", device=device, compile=False, tabulate=tabulate)
    VelocityVerlet(atoms, 0.5 * units.fs).run(20)
    return np.concatenate([atoms.positions, atoms.get_forces(), [[atoms.get_potential_energy(), 0.0, 0.0]]])


@on_gpu
@pytest.mark.parametrize("tabulate", [False, True])
def test_dynamics_are_those_of_the_cpu_and_repeat_bit_for_bit(tabulate: bool) -> None:
    there, again = (trajectory(GPU, tabulate=tabulate) for _ in range(2))
    np.testing.assert_array_equal(there, again)
    np.testing.assert_allclose(there, trajectory(torch.device("cpu"), tabulate=tabulate), atol=1e-8)


@on_gpu
@pytest.mark.parametrize("path", [SE_E2_A, STRIP, DPA2, DPA3], ids=lambda path: path.stem)
def test_energies_of_all_heads(path: Path) -> None:
    structures = [water(6), water(30)]
    there, here = (mtinfer.load(path, device=d, compile=False).energies(structures) for d in (GPU, "cpu"))
    for head, energies in here.items():
        accepted = 2e-6 if path == DPA3 else 1e-10
        np.testing.assert_allclose(there[head], energies, rtol=accepted, atol=accepted)
