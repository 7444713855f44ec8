"""Series in place of radial embedding nets: the same numbers, one graph, and the nets where series end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from reference_files import DATA, SE_E2_A, SHARED, STRIP, WITH_NUMBERS, expected

import mtinfer
from mtinfer import MTCalculator
from mtinfer.errors import PredictionWarning, UnsupportedModelError
from mtinfer.inputs import Prediction
from mtinfer.models.tabulated import CLOSEST, ChebyshevSeries, covers, tabulated
from mtinfer.neighbors import find_candidates
from mtinfer.random_checkpoint import write_random_checkpoint
from mtinfer.testing import check_conformance

#: eV, eV/Å, eV per atom
ACCEPTED = {torch.float64: 1e-9, torch.float32: 1e-5}

pytestmark = pytest.mark.filterwarnings(f"ignore::{PredictionWarning.__module__}.PredictionWarning")


def is_covered(potential: mtinfer.Potential, atoms: ase.Atoms, head: str) -> bool:
    state = potential.head(head)
    inputs = potential.inputs([atoms], [find_candidates(atoms, state.model.rcut)], state)
    return covers(state.model.descriptor, inputs)


def require_close(got: Prediction, exact: Prediction, accepted: float) -> None:
    np.testing.assert_allclose(got.atom_energy, exact.atom_energy, rtol=accepted, atol=accepted)
    np.testing.assert_allclose(got.forces, exact.forces, rtol=accepted, atol=accepted)
    n_atoms = len(exact.forces)
    np.testing.assert_allclose(got.virial / n_atoms, exact.virial / n_atoms, rtol=accepted, atol=accepted)


@pytest.mark.parametrize("path", WITH_NUMBERS, ids=lambda path: path.stem)
def test_series_equal_the_nets(path: Path, eager: Callable[..., mtinfer.Potential]) -> None:
    exact = eager(path)
    try:
        series = mtinfer.load(path, device="cpu", compile=False, tabulate=True)
    except UnsupportedModelError as err:
        assert "without tabulate" in str(err)  # noqa: PT017
        kinds = {type(exact.head(head).model.descriptor).__name__ for head in exact.heads}
        # the activation of sea3 bends too sharply for a polynomial
        assert kinds <= {"DPA1", "DPA2", "DPA3", "Hybrid"} or path.stem.startswith("sea3")
        return
    n_covered = 0
    for head in series.heads:
        accepted = ACCEPTED[exact.head(head).precision]
        for atoms, _ in expected(path, head):
            n_covered += is_covered(series, atoms, head)
            require_close(series.evaluate(atoms, head), exact.evaluate(atoms, head), accepted)
    assert n_covered > 0


@pytest.mark.parametrize("path", [SE_E2_A, STRIP, SHARED], ids=lambda path: path.stem)
def test_which_reference_files_can_be_tabulated(path: Path) -> None:
    potential = mtinfer.load(path, device="cpu", compile=False, tabulate=True)
    assert len(potential.heads) > 1
    assert all(potential.head(head).exact is not None for head in potential.heads)


@pytest.mark.parametrize(
    "path", [pytest.param(SE_E2_A, marks=pytest.mark.slow, id="se_e2_a"), pytest.param(STRIP, id="strip")]
)
def test_conformance_on_one_graph(path: Path) -> None:
    potential = mtinfer.load(path, device="cpu", compile="wait", tabulate=True)
    for head in potential.heads:
        check_conformance(potential, head)
        for atoms, _ in expected(path, head):
            potential.evaluate(atoms, head)
    graphs = {id(potential.head(head).graph): potential.head(head).graph for head in potential.heads}
    assert [graph.is_compiled for graph in graphs.values()] == [True]


def test_atoms_closer_than_the_series_hold_are_evaluated_by_the_net(
    eager: Callable[..., mtinfer.Potential],
) -> None:
    series = mtinfer.load(STRIP, device="cpu", compile=False, tabulate=True)
    for distance, covered in ((CLOSEST - 0.01, False), (CLOSEST + 0.01, True)):
        pair = ase.Atoms("OH", positions=[(0, 0, 0), (0, 0, distance)])
        assert is_covered(series, pair, "water") is covered
        got, exact = series.evaluate(pair, "water"), eager(STRIP).evaluate(pair, "water")
        assert np.array_equal(got.forces, exact.forces) is not covered
        require_close(got, exact, 1e-9 * np.abs(exact.forces).max())


def test_elements_that_a_head_never_saw_are_evaluated_by_the_net(
    eager: Callable[..., mtinfer.Potential],
) -> None:
    series = mtinfer.load(STRIP, device="cpu", compile=False, tabulate=True)
    atoms = ase.Atoms("Cu2", positions=[(0, 0, 0), (0, 0, 2.2)])
    assert not is_covered(series, atoms, "water")
    exact = eager(STRIP).evaluate(atoms, "water")
    assert np.array_equal(series.evaluate(atoms, "water").forces, exact.forces)


def test_energies_alone_are_those_of_the_nets(eager: Callable[..., mtinfer.Potential]) -> None:
    series = mtinfer.load(STRIP, device="cpu", compile=False, tabulate=True)
    atoms, _ = expected(STRIP, "water")[0]
    assert series.energies(atoms) == eager(STRIP).energies(atoms)


def test_calculator_takes_it() -> None:
    atoms, _ = expected(STRIP, "water")[0]
    atoms = atoms.copy()
    forces = []
    for tabulate in (False, True):
        atoms.calc = MTCalculator(STRIP, head="water", device="cpu", compile=False, tabulate=tabulate)
        forces.append(atoms.get_forces())
    np.testing.assert_allclose(*forces, rtol=1e-9, atol=1e-9)
    assert not np.array_equal(*forces)
    with pytest.raises(TypeError, match="tabulate= belong to"):
        MTCalculator(atoms.calc.potential, head="water", tabulate=True)


def test_other_heads_of_a_file_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="head 'water': only se_e2_a, and se_atten in strip"):
        mtinfer.load(DATA / "reference/checkpoints/dpa3-shared-pt.pt", device="cpu", tabulate=True)
    with pytest.raises(UnsupportedModelError, match="se_atten in strip mode without attention"):
        mtinfer.load(DATA / "reference/checkpoints/dpa1-separate-pt.pt", device="cpu", tabulate=True)


def test_a_head_that_saw_no_element_is_refused(eager: Callable[..., mtinfer.Potential]) -> None:
    descriptor = eager(STRIP).head("water").model.descriptor
    with pytest.raises(UnsupportedModelError, match="for elements that the head saw in training"):
        tabulated(descriptor, {}, [])


def test_a_net_too_steep_is_refused(tmp_path: Path) -> None:
    radial = {"rcut": 4.0, "rcut_smth": 0.5, "neuron": [4, 8], "axis_neuron": 4}
    config = {
        "type_map": ["O", "H"],
        "descriptor": {"type": "se_e2_a", "sel": [20, 20], **radial},
        "fitting_net": {"type": "ener", "neuron": [8]},
    }
    path = tmp_path / "steep.pt"
    write_random_checkpoint(path, config)
    state = mtinfer.load(path, device="cpu", compile=False).head("water")
    model = state.model
    weights = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in model.parameters().items()}
    weights = {name: w + 1.0 if name.endswith("stddev") else w for name, w in weights.items()}
    assert tabulated(model.descriptor, weights, [0, 1]).n_terms == 32
    steep = {name: w + 300.0 if name.endswith("layers.0.w") else w for name, w in weights.items()}
    with pytest.raises(UnsupportedModelError, match="too steep for a series"):
        tabulated(model.descriptor, steep, [0, 1])


@pytest.mark.parametrize("n_terms", [32, 48, 64])
def test_moment_is_the_sum_over_slots(n_terms: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    s = torch.rand(3, 7, generator=generator, dtype=torch.float64) * 5.0 - 1.0

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sin(x), torch.exp(-x), x**5], -1)

    series = ChebyshevSeries("series", n_terms)
    weights = series.fit(function, torch.tensor(-1.0).double(), torch.tensor(4.0).double())
    moment = torch.einsum("ncm,nmg->ncg", rows, function(s.unsqueeze(-1)))
    torch.testing.assert_close(series.moment(rows, s, weights), moment, rtol=1e-10, atol=1e-9)


def test_terms_are_those_of_the_steepest_head() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False, tabulate=True)
    descriptors = [potential.head(head).model.descriptor for head in potential.heads]
    assert len({descriptor.n_terms for descriptor in descriptors}) == 1
    fewer = replace(descriptors[0], n_terms=32)
    assert repr(fewer) != repr(descriptors[0])
