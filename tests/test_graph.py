"""One graph per architecture: how many are compiled, what is baked in, what is stored and trusted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from reference_files import DATA, SE_E2_A, STRIP

import mtinfer
from mtinfer import MTCalculator
from mtinfer.graph import GraphWarning, SharedGraph, trace
from mtinfer.models.layout import Argument
from mtinfer.potential import PredictionWarning

ARGUMENTS = [Argument(("rows", "columns")), Argument(("rows",), torch.int64)]


def toy(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.tanh(x * weight[index].unsqueeze(1)).sum(1),)


def toy_data(n: int, m: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + m)
    x = torch.randn(n, m, dtype=torch.float64, generator=generator)
    return [x, torch.randint(0, 4, (n,), generator=generator)]


def toy_graph(**options: object) -> SharedGraph:
    settings = {"mode": "wait", "signature": "toy", **options}
    weights = [torch.arange(4, dtype=torch.float64)]
    return SharedGraph(toy, settings["signature"], ARGUMENTS, weights, settings["mode"])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MTINFER_CACHE", str(cache))
    return cache


def structures(n_atoms: int) -> list[ase.Atoms]:
    """The same atoms in a cell and in the open."""
    rng = np.random.default_rng(n_atoms)
    edge = 2.2 * np.ceil(n_atoms ** (1 / 3)) + 0.5
    grid = np.stack(np.meshgrid(*[np.arange(np.ceil(n_atoms ** (1 / 3)))] * 3), -1).reshape(-1, 3)
    atoms = ase.Atoms("H" * n_atoms, 2.2 * grid[:n_atoms], cell=[edge] * 3, pbc=True)
    atoms.symbols[::3] = "O"
    atoms.rattle(0.1, seed=int(rng.integers(1000)))
    free = atoms.copy()
    free.pbc = False
    return [atoms, free]


@pytest.mark.filterwarnings(f"ignore::{PredictionWarning.__module__}.PredictionWarning")
@pytest.mark.parametrize(
    ("path", "n_steps"),
    [(STRIP, 10), (SE_E2_A, 10), pytest.param(STRIP, 200, marks=pytest.mark.slow)],
    ids=["dpa1", "se_e2_a", "dpa1-long"],
)
def test_one_graph_for_heads_sizes_and_dynamics(path: Path, n_steps: int, own_cache: Path) -> None:
    potential = mtinfer.load(path, device="cpu", compile="wait")
    eager = mtinfer.load(path, device="cpu", compile=False)
    assert len(potential.graphs) == 1
    for n_atoms in (1, 2, 31, 96):
        for atoms in structures(n_atoms):
            for head in potential.heads:
                atoms.calc = MTCalculator(potential, head=head)
                if atoms.pbc.any() and n_atoms > 1:
                    atoms.set_momenta(np.random.default_rng(0).normal(size=(n_atoms, 3)))
                    pressure = 0.1 * units.GPa
                    dynamics = IsotropicMTKNPT(
                        atoms, 0.2 * units.fs, 300, pressure, tdamp=50 * units.fs, pdamp=500 * units.fs
                    )
                    dynamics.run(n_steps)
                expected = eager.evaluate(atoms, head)
                assert atoms.get_potential_energy() == pytest.approx(expected.energy, rel=1e-12, abs=1e-9)
                scale = max(1.0, np.abs(expected.forces).max())
                assert np.abs(atoms.get_forces() - expected.forces).max() < 1e-9 * scale
    assert potential.graphs_compiled == 1
    assert potential.graphs[0].is_compiled


@pytest.mark.parametrize("path", [STRIP, SE_E2_A], ids=["dpa1", "se_e2_a"])
def test_no_size_is_baked_into_a_trace(path: Path) -> None:
    graph = mtinfer.load(path, device="cpu", compile=False).graphs[0]

    def code(sizes: list[int]) -> str:
        module, _ = trace(graph.function, graph.arguments, graph.weights, sizes=sizes)
        names: dict[str, str] = {}
        # symbols are numbered at random
        return re.sub(r"\bs\d+\b", lambda found: names.setdefault(found[0], f"n{len(names)}"), module.code)

    first, second = code([11, 17, 13, 19, 23]), code([41, 31, 37, 29, 43])
    assert first == second
    assert "17" not in re.findall(r"\b\d+\b", first)


def test_stored_graph_is_loaded_without_compiling(own_cache: Path) -> None:
    first = toy_graph()
    data = toy_data(5, 7)
    expected = first(data, first.weights)[0]
    assert first.n_compiled == 1
    second = toy_graph()
    assert torch.equal(second(data, second.weights)[0], expected)
    assert second.is_compiled
    assert second.n_compiled == 0
    for n, m in ((1, 1), (1, 9), (0, 4), (4, 0), (50, 3)):
        data = toy_data(n, m)
        assert torch.allclose(second(data, second.weights)[0], toy(*data, *second.weights)[0], rtol=1e-13)
    assert own_cache.stat().st_mode & 0o077 == 0


def test_damaged_store_is_not_loaded(own_cache: Path) -> None:
    first = toy_graph()
    first(toy_data(5, 7), first.weights)
    stored = next(own_cache.glob("*.graph"))
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    second = toy_graph()
    second(toy_data(5, 7), second.weights)
    assert second.n_compiled == 1


def test_directory_of_others_is_not_trusted(own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    graph = toy_graph()
    data = toy_data(3, 4)
    with pytest.warns(GraphWarning, match="must belong to you and be writable by you alone"):
        result = graph(data, graph.weights)
    assert torch.equal(result[0], toy(*data, *graph.weights)[0])
    assert not graph.is_compiled
    assert not list(own_cache.iterdir())


def test_graph_that_differs_from_eager_is_dropped(own_cache: Path) -> None:
    graph = toy_graph()
    data = toy_data(3, 4)
    graph(data, graph.weights)
    graph._compiled, graph._unchecked = (lambda *values: (toy(*values)[0] + 1e-6,)), True
    with pytest.warns(GraphWarning, match="differs from eager by .* times the accepted tolerance"):
        result = graph(data, graph.weights)
    assert torch.equal(result[0], toy(*data, *graph.weights)[0])
    assert graph.mode == "off"


def test_background_compilation_takes_over(own_cache: Path) -> None:
    graph = toy_graph(mode="background")
    data = toy_data(6, 5)
    expected = toy(*data, *graph.weights)[0]
    for _ in range(5):
        assert torch.allclose(graph(data, graph.weights)[0], expected, rtol=1e-13)
    graph.join()
    assert graph.is_compiled
    assert torch.allclose(graph(data, graph.weights)[0], expected, rtol=1e-13)


def test_single_points_do_not_compile(own_cache: Path) -> None:
    graph = toy_graph(mode="background")
    graph(toy_data(6, 5), graph.weights)
    graph.join()
    assert not graph.is_compiled
    assert not own_cache.exists()


def test_without_a_compiler_it_is_eager_and_says_so(tmp_path: Path) -> None:
    code = f"""
    import warnings, ase.io, mtinfer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        potential = mtinfer.load({str(SE_E2_A)!r}, compile="wait")
        atoms = ase.io.read({str(DATA / "frames/clusters.extxyz")!r})
        for _ in range(3):
            print(potential.evaluate(atoms, "clusters").energy)
    print([type(w.message).__name__ for w in caught if "eager" in str(w.message)])
    """
    environment = {**os.environ, "CXX": "/nonexistent/c++", "PATH": "", "MTINFER_CACHE": str(tmp_path / "c")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    *energies, warned = done.stdout.splitlines()
    assert len(set(energies)) == 1
    assert warned == "['GraphWarning']"


@pytest.mark.parametrize("path", [STRIP, SE_E2_A], ids=["dpa1", "se_e2_a"])
def test_forward_mathematics_stays_on_its_device(path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = mtinfer.load(path, device="cpu", compile=False).graphs[0]
    with FakeTensorMode():
        sizes = {"atoms": 5}
        data = [
            torch.empty(
                [axis if isinstance(axis, int) else sizes.get(axis, 7) for axis in argument.axes],
                dtype=argument.dtype,
                device="cuda",
            )
            for argument in graph.arguments
        ]
        weights = [torch.empty(w.shape, dtype=w.dtype, device="cuda") for w in graph.weights]
        results = graph.function(*data, *weights)
        assert {result.device.type for result in results} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):
            graph.function(*data, *[torch.empty(w.shape, dtype=w.dtype) for w in graph.weights])
