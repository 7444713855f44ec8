"""The conformance checks find what they look for, and random checkpoints look like trained ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from reference_files import DATA, FILES, STRIP, heads

import mtinfer
from mtinfer import Potential, Prediction, testing
from mtinfer.checkpoint.load import read
from mtinfer.errors import StructureError, UnsupportedModelError
from mtinfer.models import EnergyModel
from mtinfer.random_checkpoint import write_random_checkpoint
from mtinfer.testing import (
    CONFORMANCE,
    DERIVATIVE_CHECKS,
    check_compiled_equals_eager,
    check_conformance,
    check_forces,
    check_inputs_unmodified,
    checks,
    example_structure,
)

Spoil = Callable[[ase.Atoms, Prediction, int], Prediction]


class Spoiled(Potential):
    """A potential whose predictions are changed: by structure and by position in the batch."""

    def __init__(self, potential: Potential, spoil: Spoil) -> None:
        super().__init__(potential._heads, potential._refused, potential.device)
        self.spoil = spoil

    def evaluate(self, atoms: Any, head: str | None = None, **parameters: Any) -> Any:
        result = super().evaluate(atoms, head, **parameters)
        if isinstance(result, Prediction):
            return self.spoil(atoms, result, 0)
        return [
            self.spoil(one, prediction, k)
            for k, (one, prediction) in enumerate(zip(atoms, result, strict=True))
        ]


def energy_plus(change: Callable[[ase.Atoms, int], float]) -> Spoil:
    return lambda atoms, got, k: replace(got, energy=got.energy + change(atoms, k))


def forget_the_allowed(atoms: ase.Atoms, got: Prediction, k: int) -> Prediction:
    raise StructureError("something is wrong")


def write_into(atoms: ase.Atoms, got: Prediction, k: int) -> Prediction:
    atoms.info["energy"] = got.energy
    return got


def drifting() -> Spoil:
    n_calls = [0]

    def spoil(atoms: ase.Atoms, got: Prediction, k: int) -> Prediction:
        n_calls[0] += 1
        return replace(got, forces=got.forces * (1.0 + 1e-14 * n_calls[0]))

    return spoil


#: a fault for every check that eager evaluation can fail
FAULTS: dict[str, Spoil] = {
    "forces": lambda atoms, got, k: replace(got, forces=got.forces * (1.0 + 1e-5)),
    "virial": lambda atoms, got, k: replace(got, virial=got.virial * (1.0 + 1e-5)),
    "permutation": lambda atoms, got, k: replace(
        got, atom_energy=got.atom_energy + 1e-6 * np.arange(len(atoms))
    ),
    "rotation": lambda atoms, got, k: replace(got, forces=got.forces * [1.0, 1.0, 1.0 + 1e-6]),
    "lattice_translation": energy_plus(lambda atoms, k: 1e-7 * atoms.positions[0, 0]),
    "supercell": energy_plus(lambda atoms, k: 1e-6 * len(atoms) ** 2),
    "batch": energy_plus(lambda atoms, k: 1e-6 * k),
    "single_atom": lambda atoms, got, k: replace(got, forces=got.forces + 1e-6 * (len(atoms) == 1)),
    "no_neighbors": lambda atoms, got, k: replace(
        got, atom_energy=got.atom_energy + 1e-6 * (len(atoms) == 2)
    ),
    "mixed_periodicity": energy_plus(lambda atoms, k: 1e-5 * (atoms.pbc.sum() in (1, 2))),
    "inputs_unmodified": write_into,
    "head_swap": drifting(),
    "energies": energy_plus(lambda atoms, k: 1e-5 * (len(atoms) > 1)),
}


@pytest.fixture
def potential(eager: Callable[..., Potential]) -> Potential:
    return eager(STRIP)


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_its_fault(name: str, potential: Potential) -> None:
    check = getattr(testing, f"check_{name}")
    assert check in CONFORMANCE
    with pytest.raises(AssertionError, match=r"largest deviation|changed"):
        check(Spoiled(potential, FAULTS[name]), "water")


def test_every_check_has_a_fault() -> None:
    named = {check.__name__.removeprefix("check_") for check in CONFORMANCE}
    assert named == FAULTS.keys() | {"parts", "errors", "compiled_equals_eager"}


def test_nan_is_no_agreement(potential: Potential) -> None:
    spoiled = Spoiled(potential, lambda atoms, got, k: replace(got, forces=got.forces * np.nan))
    with pytest.raises(AssertionError, match="largest deviation nan"):
        check_forces(spoiled, "water")


@pytest.mark.parametrize("fault", ["no-error", "no-list"])
def test_errors_check_finds_its_faults(fault: str, potential: Potential) -> None:
    class Careless(Potential):
        def evaluate(self, atoms: Any, head: str | None = None, **_: Any) -> Any:
            if fault == "no-list":
                raise mtinfer.errors.UnknownHeadError("no such head")
            return None

    careless = Careless(potential._heads, potential._refused, potential.device)
    with pytest.raises(AssertionError, match=r"no UnknownHeadError was raised|is not one line with"):
        testing.check_errors(careless, "water")


def test_changed_weights_are_found(potential: Potential) -> None:
    state = potential.head("water")
    weights = tuple(tuple(weight.clone() for weight in group) for group in state.weights)
    own = Potential({"water": replace(state, weights=weights)}, {}, potential.device)

    def wear(atoms: ase.Atoms, got: Prediction, k: int) -> Prediction:
        weights[0][0].mul_(1.0 + 1e-12)
        return got

    with pytest.raises(AssertionError, match="changed the weights"):
        check_inputs_unmodified(Spoiled(own, wear), "water")


@pytest.mark.parametrize(("name", "last"), [("dpa2-separate-pt", 2), ("dpa3-shared-pt", 0)])
def test_parts_check_finds_its_fault(
    eager: Callable[..., Potential], monkeypatch: pytest.MonkeyPatch, name: str, last: int
) -> None:
    potential = eager(DATA / f"reference/checkpoints/{name}.pt", "float64")
    testing.check_parts(potential, "water")
    right = EnergyModel.in_parts

    def wrong(self: EnergyModel, *values: Any) -> tuple[Any, ...]:
        *others, gradient = right(self, *values)
        return *others, gradient + 1e-8

    monkeypatch.setattr(EnergyModel, "in_parts", wrong)
    with pytest.raises(AssertionError, match=f"in parts, 6 atoms, gradient {last}: largest deviation 1e-08"):
        testing.check_parts(potential, "water")


def test_compiled_check_finds_its_faults(potential: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unequal(Potential):
        def predict(self, inputs: Any, state: Any) -> list[Prediction]:
            (got,) = super().predict(inputs, state)
            return [replace(got, virial=got.virial + 1e-6 * (state.graph.mode == "wait"))]

    graph = mtinfer.graph.SharedGraph
    monkeypatch.setattr(graph, "_compile", lambda self, store: self.function)
    monkeypatch.setattr("mtinfer.graph_store.GraphStore.find", lambda self: None)
    check_compiled_equals_eager(potential, "water")
    with pytest.raises(AssertionError, match="compiled, 6 atoms, virial: largest deviation 1e-06"):
        check_compiled_equals_eager(Unequal(potential._heads, {}, potential.device), "water")
    monkeypatch.setattr(graph, "_obtain", lambda self, device: None)
    with pytest.raises(AssertionError, match="no compiled graph could be had"):
        check_compiled_equals_eager(potential, "water")


def test_conformance_runs_every_check(potential: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Potential]] = []

    def recorder(check: checks.Check) -> checks.Check:
        return lambda given, head: seen.append((check.__name__, given))

    recorded = tuple(map(recorder, CONFORMANCE))
    monkeypatch.setattr(checks, "CONFORMANCE", recorded)
    monkeypatch.setattr(checks, "DERIVATIVE_CHECKS", recorded[: len(DERIVATIVE_CHECKS)])
    float64 = Potential(potential._heads, {}, potential.device)
    check_conformance(potential, "water", float64=float64)
    assert [name for name, _ in seen] == [check.__name__ for check in CONFORMANCE]
    assert {name for name, given in seen if given is float64} == {"check_forces", "check_virial"}


def test_finite_differences_need_float64(eager: Callable[..., Potential]) -> None:
    with pytest.raises(ValueError, match=r"head 'water' computes in float32.*loaded with dtype='float64'"):
        check_forces(eager(STRIP, "float32"), "water")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_structure_is_smooth_and_has_neighbors(path: Path, eager: Callable[..., Potential]) -> None:
    potential = eager(path)
    for head in heads(path):
        atoms = example_structure(potential, head)
        model = potential.head(head).model
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(len(atoms), 1)]
        assert 0.5 < distances.min() < model.rcut
        assert set(atoms.symbols) <= set(model.type_map)
        assert len(set(atoms.symbols)) == min(3, len(model.type_map))


# --- random checkpoints


def layout_of(content: dict[str, Any], head: str) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    """Key -> shape and dtype of what a file holds for a head, less what compiled graphs left behind."""
    found = {}
    for key, value in content["model"].items():
        key = key.replace(".original_model.", ".")
        if key.startswith(f"model.{head}.") and "compiled_forward" not in key and "_task_" not in key:
            found[key] = (tuple(value.shape), value.dtype)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layout_is_that_of_a_trained_file(path: Path, tmp_path: Path) -> None:
    trained, checkpoint = torch.load(path, weights_only=True), read(path)
    head, written = heads(path)[-1], tmp_path / "random.pt"
    write_random_checkpoint(written, checkpoint.head(head).config, heads=[head], dialect=checkpoint.dialect)
    content = torch.load(written, weights_only=True)
    assert layout_of(content, head) == layout_of(trained, head)
    assert mtinfer.load(written, compile=False).heads == (head,)


CONFIG = {
    "type_map": ["O", "H"],
    "descriptor": {
        **{"type": "se_atten", "rcut": 4.0, "rcut_smth": 1.0, "sel": 30, "neuron": [3, 6], "axis_neuron": 2},
        **{"attn_layer": 0, "tebd_input_mode": "strip", "precision": "float64"},
    },
    "fitting_net": {"neuron": [5, 5], "dim_case_embd": 2, "numb_fparam": 1, "default_fparam": [0.3]},
}


def test_heads_share_a_descriptor_and_nothing_else(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "random.pt", CONFIG, heads=["water", "ice"])
    water, ice = read(tmp_path / "random.pt").heads.values()
    for name in water.weights:
        shared = water.weights[name].data_ptr() == ice.weights[name].data_ptr()
        assert shared == name.startswith("descriptor."), name
    assert water.weights["fitting_net.case_embd"].tolist() == [1.0, 0.0]
    assert ice.weights["fitting_net.case_embd"].tolist() == [0.0, 1.0]
    assert water.weights["fitting_net.default_fparam_tensor"].tolist() == [0.3]
    potential = mtinfer.load(tmp_path / "random.pt", compile=False)
    assert len(potential.graphs) == 1
    molecule = ase.Atoms("OH2", [[0, 0, 0], [0, 0.8, 0.6], [0, -0.8, 0.6]])
    energies = [potential.evaluate(molecule, head).energy for head in potential.heads]
    assert energies[0] != pytest.approx(energies[1], abs=1e-3)
    assert np.abs(potential.evaluate(molecule, "water").forces).max() > 1e-4


def test_seed_decides_the_weights_in_either_dialect(tmp_path: Path) -> None:
    def weights(seed: int, dialect: str) -> dict[str, torch.Tensor]:
        path = tmp_path / f"{seed}-{dialect}.pt"
        write_random_checkpoint(path, CONFIG, dialect=dialect, seed=seed)
        return read(path).head().weights

    first, again, other = weights(1, "pt"), weights(1, "pt_expt"), weights(2, "pt")
    assert all(torch.equal(first[name], again[name]) for name in first.keys() | again.keys())
    net = "fitting_net.nets.0.layers.1.w"
    assert not torch.equal(first[net], other[net])


def test_unsupported_configuration_writes_nothing(tmp_path: Path) -> None:
    config = CONFIG | {"descriptor": {"type": "se_t", "sel": [3]}}
    with pytest.raises(UnsupportedModelError, match="descriptor 'se_t' is not supported"):
        write_random_checkpoint(tmp_path / "random.pt", config)
    assert list(tmp_path.iterdir()) == []


def test_data_folder_is_found() -> None:
    assert DATA.is_dir()
    assert len(FILES) > 60
