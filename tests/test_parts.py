"""Large structures of DPA-2, DPA-3 and hybrids, evaluated stage by stage and part by part."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from reference_files import DATA, WITH_NUMBERS, cases, expected

import mtinfer
from mtinfer import Potential, Prediction
from mtinfer.errors import PredictionWarning
from mtinfer.graph import SharedGraph, require_declared
from mtinfer.models.layers import Weights
from mtinfer.models.stage import Stage, Tensors, derivative, directly, value
from mtinfer.stage_graphs import StageGraphs

#: largest difference of energies, atomic energies, forces and virials
ACCEPTED = {torch.float64: 1e-9, torch.float32: 2e-4}
FILES = [path for path in WITH_NUMBERS if path.stem.startswith(("dpa2", "dpa3", "hyb"))]

pytestmark = pytest.mark.filterwarnings(f"ignore::{PredictionWarning.__module__}.PredictionWarning")


def in_small_parts(monkeypatch: pytest.MonkeyPatch, n_entries: int = 1000) -> None:
    for name in ("dpa2", "dpa3", "hybrid"):
        monkeypatch.setattr(f"mtinfer.models.{name}._LARGE", -1)
        monkeypatch.setattr(f"mtinfer.models.{name}._ENTRIES_OF_PART", n_entries)


def predictions(potential: Potential, path: Path, head: str) -> list[Prediction]:
    """Of all structures in one batch, and of the first one alone."""
    structures = [atoms for atoms, _ in expected(path, head)]
    return [*potential.evaluate(structures, head), potential.evaluate(structures[0], head)]


def require_same(potential: Potential, head: str, got: list[Prediction], wanted: list[Prediction]) -> None:
    accepted = ACCEPTED[potential.head(head).precision]
    for mine, theirs in zip(got, wanted, strict=True):
        for name in ("energy", "atom_energy", "forces", "virial"):
            value = getattr(theirs, name)
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(
                getattr(mine, name), value, rtol=0, atol=accepted * scale, err_msg=name
            )


def as_declared(graph: SharedGraph, data: Tensors, weights: Tensors) -> Tensors:
    """Evaluate a graph eagerly on what its compiled form would accept."""
    require_declared(graph.arguments, data, graph.weights[0].device)
    return graph.function(*data, *weights)


#: all but the head of a hybrid's file that has one of its members for a descriptor
@pytest.mark.parametrize(("path", "head"), [case for case in cases(FILES) if "steam" not in case.values])
def test_parts_give_what_one_call_gives(path: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    potential = mtinfer.load(path, device="cpu", compile=False)
    wanted = predictions(potential, path, head)
    in_small_parts(monkeypatch)
    monkeypatch.setattr(potential.head(head).graph, "function", None)  # not called
    monkeypatch.setattr(SharedGraph, "__call__", as_declared)
    require_same(potential, head, predictions(potential, path, head), wanted)
    assert potential.head(head).stages.graphs


def require_kept_is_read(stage: Stage, varied: Tensors, fixed: Tensors, weights: Weights) -> None:
    """The derivative is that of the stage, and every part of what is kept enters it."""
    varied = tuple(x.detach().requires_grad_(True) for x in varied)
    outputs = directly(stage, varied, fixed, weights)
    cotangents = tuple(map(torch.randn_like, outputs))
    wanted = torch.autograd.grad(outputs, varied, cotangents, materialize_grads=True)
    with torch.no_grad():
        kept = value(stage, varied, fixed, weights)[len(outputs) :]
    torch.testing.assert_close(derivative(stage, varied, fixed, kept, cotangents, weights), wanted)
    for k, known in enumerate(kept):
        poisoned = (*kept[:k], torch.full_like(known, torch.nan), *kept[k + 1 :])
        gradients = derivative(stage, varied, fixed, poisoned, cotangents, weights)
        assert any(bool(x.isnan().any()) for x in gradients), (stage, k)


@pytest.mark.parametrize("name", ["dpa2-separate-pt", "dpa3-shared-pt"])
def test_derivatives_read_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DATA / f"reference/checkpoints/{name}.pt"
    potential = mtinfer.load(path, device="cpu", compile=False)
    calls: dict[str, tuple[Stage, Tensors, Tensors, Weights]] = {}

    def noted(graphs: StageGraphs, stage: Stage, *arguments: Any) -> Tensors:
        calls[repr(stage)] = (stage, *arguments)
        return directly(stage, *arguments)

    monkeypatch.setattr(StageGraphs, "__call__", noted)
    in_small_parts(monkeypatch)
    predictions(potential, path, potential.heads[0])
    assert any(stage.kept() for stage, *_ in calls.values())
    for call in calls.values():
        require_kept_is_read(*call)


@pytest.mark.parametrize("name", [pytest.param("dpa2-separate-pt", marks=pytest.mark.slow), "dpa3-shared-pt"])
def test_compiled_stages_serve_all_heads_and_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DATA / f"reference/checkpoints/{name}.pt"
    potential = mtinfer.load(path, device="cpu", compile=False)
    wanted = {head: predictions(potential, path, head) for head in potential.heads}
    in_small_parts(monkeypatch)
    potential = mtinfer.load(path, device="cpu", compile="wait")
    graphs = set()
    for head in potential.heads:
        require_same(potential, head, predictions(potential, path, head), wanted[head])
        graphs.add(tuple(map(id, potential.graphs)))
    whole, *stages = potential.graphs
    assert len(graphs) == 1
    assert not whole.is_compiled
    assert all(graph.is_compiled for graph in stages)


@pytest.mark.parametrize("mode", [False, pytest.param("wait", marks=pytest.mark.slow)])
def test_members_of_a_hybrid_have_stages(mode: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are called once per centre type, of which there may be none."""
    path, head = DATA / "variants/checkpoints/hyb1-pt.pt", "water"
    structures = [atoms for atoms, _ in expected(path, head)]
    for atoms in structures:
        del atoms[atoms.numbers == atoms.numbers.min()]
    wanted = mtinfer.load(path, device="cpu", compile=False).evaluate(structures, head)
    in_small_parts(monkeypatch)
    potential = mtinfer.load(path, device="cpu", compile=mode)
    require_same(potential, head, potential.evaluate(structures, head), wanted)
    whole, *stages = potential.graphs
    assert not whole.is_compiled
    assert len(stages) == 4  # those of a value and of a derivative, of each member
    assert all(graph.is_compiled == bool(mode) for graph in stages)


def test_a_crystal_may_be_the_first_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments vanish but for rounding, and the self-check accepts that."""
    in_small_parts(monkeypatch)
    potential = mtinfer.load(DATA / "reference/checkpoints/dpa3-shared-pt.pt", device="cpu", compile="wait")
    potential.evaluate(ase.build.bulk("Cu", "fcc", a=3.61, cubic=True) * (2, 2, 2), "copper")
    stages = potential.graphs[1:]
    assert all(graph.is_compiled for graph in stages)
    assert any(graph.n_sums for graph in stages[::2])  # of values; those between are of derivatives
    assert not any(graph.n_sums for graph in stages[1::2])


def test_a_single_evaluation_never_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MTINFER_CACHE", str(tmp_path))
    in_small_parts(monkeypatch, 10)
    path = DATA / "reference/checkpoints/dpa3-shared-pt.pt"
    potential = mtinfer.load(path, device="cpu")
    atoms, _ = expected(path, potential.heads[0])[0]
    n_threads = threading.active_count()
    for _ in range(3):
        potential.evaluate(atoms, potential.heads[0])
    assert threading.active_count() == n_threads
    assert len(potential.graphs) > 1


def test_parts_are_compiled_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    path = DATA / "reference/checkpoints/dpa3-shared-pt.pt"
    in_small_parts(monkeypatch, 10_000)
    potential = mtinfer.load(path, device="cpu")
    head = potential.heads[0]
    wanted = predictions(potential, path, head)
    for _ in range(3):
        predictions(potential, path, head)
    for graph in potential.graphs:
        graph.join()
    assert all(graph.is_compiled for graph in potential.graphs[1:])
    require_same(potential, head, predictions(potential, path, head), wanted)
    require_same(potential, head, predictions(potential, path, head), wanted)
