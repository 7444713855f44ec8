"""Energies of several heads at once: heads with one descriptor evaluate it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from reference_files import DATA, SE_E2_A, SHARED, STRIP, expected

import mtinfer
from mtinfer.errors import PredictionWarning, StructureError, UnknownHeadError
from mtinfer.random_checkpoint import write_random_checkpoint

DPA2 = DATA / "reference/checkpoints/dpa2-separate-pt.pt"
DPA3 = DATA / "reference/checkpoints/dpa3-shared-pt.pt"
PARAMETERS = DATA / "reference/variants/checkpoints/dpa1n-pt.pt"

pytestmark = pytest.mark.filterwarnings(f"ignore::{PredictionWarning.__module__}.PredictionWarning")


def require_energies(potential: mtinfer.Potential, path: Path, leads: tuple[str, ...] = ()) -> None:
    for lead in leads or potential.heads:
        structures = [atoms for atoms, _ in expected(path, lead)]
        together = potential.energies(structures)
        assert tuple(together) == potential.heads
        for head, energies in together.items():
            single = [prediction.energy for prediction in potential.evaluate(structures, head)]
            sizes = np.array([len(atoms) for atoms in structures])
            accepted = 1e-10 if potential.head(head).precision == torch.float64 else 2e-6
            np.testing.assert_allclose(energies / sizes, single / sizes, rtol=accepted, atol=accepted)


@pytest.mark.parametrize("path", [SE_E2_A, STRIP, SHARED, DPA2, DPA3, PARAMETERS], ids=lambda path: path.stem)
def test_energies_equal_those_of_evaluate(path: Path) -> None:
    require_energies(mtinfer.load(path, device="cpu", compile=False), path)


@pytest.mark.parametrize("tabulate", [False, True])
@pytest.mark.parametrize("path", [SE_E2_A, STRIP], ids=lambda path: path.stem)
def test_in_a_callers_inference_mode(path: Path, tabulate: bool) -> None:
    structures = [atoms for atoms, _ in expected(path, "water")]
    there = mtinfer.load(path, device="cpu", compile=False, tabulate=tabulate).energies(structures, ["water"])
    with torch.inference_mode():
        potential = mtinfer.load(path, device="cpu", compile=False, tabulate=tabulate)
        np.testing.assert_array_equal(potential.energies(structures, ["water"])["water"], there["water"])
    after = [prediction.energy for prediction in potential.evaluate(structures, "water")]
    np.testing.assert_allclose(after, there["water"], rtol=1e-12)


@pytest.mark.parametrize("path", [DPA2, DPA3], ids=lambda path: path.stem)
def test_large_structures_go_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dpa2", "dpa3"):
        monkeypatch.setattr(f"mtinfer.models.{name}._LARGE", -1)
        monkeypatch.setattr(f"mtinfer.models.{name}._ENTRIES_OF_PART", 1000)
    potential = mtinfer.load(path, device="cpu", compile=False)
    require_energies(potential, path, potential.heads[:1])
    assert potential.head(potential.heads[0]).stages.graphs


def test_what_is_not_finite_is_no_energy() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False)
    good = expected(STRIP, "water")[0][0]
    bad = ase.Atoms("OH2", [[0, 0, 0], [0, 0, 0.96], [0, 0, 0.96]])
    with pytest.raises(StructureError, match="the closest atoms, 1 and 2 of structure 1, are 0 Å apart"):
        potential.energies([good, bad], ["water"])


def test_the_default_device_of_torch_is_not_ours() -> None:
    structures = [expected(STRIP, "water")[0][0]]
    there = mtinfer.load(STRIP, device="cpu", compile=False, tabulate=True).energies(structures, ["water"])
    try:
        torch.set_default_device("meta")  # as "cuda", and nobody computes there
        potential = mtinfer.load(STRIP, device="cpu", compile=False, tabulate=True)
        np.testing.assert_array_equal(potential.energies(structures, ["water"])["water"], there["water"])
    finally:
        torch.set_default_device(None)


def test_one_graph_for_descriptors_and_one_for_fitting_nets() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile="wait")
    before = len(potential.graphs)
    require_energies(potential, STRIP)
    first, second = potential.graphs[before:]
    assert first.is_compiled
    assert second.is_compiled


def test_a_shared_descriptor_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False)
    descriptor = type(potential.head("water").model.descriptor)
    calls = []
    evaluate = descriptor.__call__
    monkeypatch.setattr(descriptor, "__call__", lambda *values: calls.append(1) or evaluate(*values))
    atoms = expected(STRIP, "water")[0][0]
    potential.energies([atoms], ["water"])
    n_calls = len(calls)
    potential.energies([atoms])
    assert len(calls) == 2 * n_calls


def test_a_shared_descriptor_is_in_memory_once() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False)
    first, second = (potential.head(name) for name in ("water", "copper"))
    for name, mine, theirs in zip(first.weight_names, first.weights[0], second.weights[0], strict=True):
        assert (mine is theirs) == name.startswith("descriptor."), name


def test_heads_whose_descriptors_differ_are_not_mixed() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False)
    state = potential.head("copper")
    name = next(name for name in state.weight_names if name.startswith("descriptor."))
    changed = dict(zip(state.weight_names, state.weights[0], strict=True))
    changed[name] = changed[name] + 1e-3
    object.__setattr__(state, "weights", (tuple(changed[name] for name in state.weight_names),))
    require_energies(potential, STRIP)


def test_heads_of_one_descriptor_read_parameters_of_their_own(
    tmp_path: Path,
) -> None:
    descriptor = {"type": "se_atten", "rcut": 4.0, "rcut_smth": 1.0, "sel": 20, "attn_layer": 0}
    descriptor |= {"neuron": [4, 8], "axis_neuron": 4}
    fittings: dict[str, dict[str, object]] = {
        "none": {},
        "low": {"numb_fparam": 1, "default_fparam": [-1.0]},
        "high": {"numb_fparam": 1, "default_fparam": [1.0]},
        "two": {"numb_fparam": 2, "default_fparam": [0.5, 0.2]},
        "atomic": {"numb_aparam": 1},
    }
    states = {}
    for head, fitting in fittings.items():
        config = {"type_map": ["O", "H"], "descriptor": descriptor}
        config["fitting_net"] = {"type": "ener", "neuron": [8], **fitting}
        write_random_checkpoint(tmp_path / f"{head}.pt", config, heads=(head,), dialect="pt_expt")
        states[head] = mtinfer.load(tmp_path / f"{head}.pt", device="cpu", compile=False).head(head)
    structures = [molecule("H2O"), molecule("H2")]
    for atoms in structures:
        atoms.arrays["aparam"] = np.linspace(0.1, 0.9, len(atoms))[:, None]
    for order in (list(states), list(states)[::-1]):
        potential = mtinfer.Potential({head: states[head] for head in order}, {}, torch.device("cpu"))
        assert len(potential._values.families(states.values())) == 1
        energies = potential.energies(structures)
        for head in order:
            expected = [prediction.energy for prediction in potential.evaluate(structures, head)]
            np.testing.assert_allclose(energies[head], expected, rtol=0, atol=1e-10)
    assert np.abs(energies["low"] - energies["high"]).min() > 1e-6


@pytest.mark.filterwarnings(f"always::{PredictionWarning.__module__}.PredictionWarning")
def test_every_head_warns_of_elements_that_it_never_saw() -> None:
    atoms = bulk("Cu", cubic=True)
    ways: tuple[Callable[[mtinfer.Potential], object], ...] = (
        lambda potential: [potential.energies(atoms) for _ in range(2)],
        lambda potential: [potential.evaluate(atoms, head) for head in 2 * potential.heads],
    )
    for way in ways:
        potential = mtinfer.load(STRIP, device="cpu", compile=False)
        with pytest.warns(PredictionWarning) as caught:
            way(potential)
        texts = [str(warning.message).partition(" in training")[0] for warning in caught]
        assert texts == [f"head {head!r} never saw Cu" for head in ("water", "clusters")]


def test_the_type_map_of_all_heads_is_what_each_of_them_knows() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False)
    maps = {"water": ("H", "O", "Cu"), "clusters": ("O", "H"), "copper": ("Cu", "O")}
    states = {
        head: replace(potential.head(head), model=replace(potential.head(head).model, type_map=type_map))
        for head, type_map in maps.items()
    }
    assert mtinfer.Potential(states, {}, potential.device).type_map == ("O",)


def test_no_structures_and_unknown_heads() -> None:
    potential = mtinfer.load(STRIP, device="cpu", compile=False)
    assert potential.energies([], ["water"])["water"].shape == (0,)
    atoms = expected(STRIP, "water")[0][0]
    assert potential.energies(atoms, ["water"])["water"].shape == (1,)
    with pytest.raises(TypeError, match=r"is not a name; Potential\.energies takes several"):
        potential.evaluate([], head=["water"])  # type: ignore[arg-type]
    with pytest.raises(UnknownHeadError, match="watr"):
        potential.energies([], ["watr"])
