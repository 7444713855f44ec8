"""The ASE calculator in the hands of ASE's drivers."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from reference_files import DATA, SE_E2_A, STRIP

import mtinfer
from mtinfer import MTCalculator, MtinferError, Potential
from mtinfer.errors import (
    CheckpointError,
    PredictionWarning,
    StructureError,
    UnknownHeadError,
    UnsupportedModelError,
)
from mtinfer.graph import SharedGraph
from mtinfer.heads import Refused
from mtinfer.random_checkpoint import write_random_checkpoint


@pytest.fixture
def potential(eager: Callable[..., Potential]) -> Potential:
    return eager(STRIP)


def water() -> ase.Atoms:
    atoms = ase.io.read(DATA / "frames/water.extxyz", index=0)
    atoms.calc = None
    momenta = np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.set_momenta(momenta * np.sqrt(300 * units.kB * atoms.get_masses())[:, None])
    return atoms


def copper() -> ase.Atoms:
    atoms = ase.build.bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    return atoms


def test_results_are_those_of_the_potential(potential: Potential) -> None:
    atoms = copper()
    expected = potential.evaluate(atoms, "copper")
    atoms.calc = MTCalculator(potential, head="copper")
    # the skin changes the order in which pairs are found, hence the last digits of sums
    energy = pytest.approx(expected.energy, abs=1e-11)
    assert atoms.get_potential_energy() == energy
    assert atoms.get_potential_energy(force_consistent=True) == energy
    assert np.allclose(atoms.get_potential_energies(), expected.atom_energy, rtol=0, atol=1e-12)
    assert np.allclose(atoms.get_forces(), expected.forces, rtol=0, atol=1e-12)
    assert np.allclose(atoms.calc.results["virial"], expected.virial, rtol=0, atol=1e-11)
    assert np.allclose(atoms.get_stress(voigt=False), -expected.virial / atoms.get_volume(), atol=1e-11)


def test_copies_in_this_process_share_the_potential_and_pickles_load_the_file_again() -> None:
    atoms = water()
    atoms.calc = MTCalculator(STRIP, head="water", compile=False, dtype="float32")
    energy = atoms.get_potential_energy()
    copied, loaded = copy.deepcopy(atoms), pickle.loads(pickle.dumps(atoms))
    assert copied.calc.potential is atoms.calc.potential
    assert loaded.calc.potential is not atoms.calc.potential
    for other in (copied, loaded):
        assert other.calc.head == "water"
        other.calc.reset()
        assert other.get_potential_energy() == energy
        other.calc.head = "clusters"
        assert other.get_potential_energy() != energy
    assert atoms.calc.head == "water"
    assert not any(graph.mode != "off" for graph in loaded.calc.potential.graphs)
    with pytest.raises(TypeError, match=r"only a Potential made by mtinfer\.load can be pickled"):
        pickle.dumps(Potential(atoms.calc.potential._heads, {}, torch.device("cpu")))


def test_a_pickle_is_of_one_file(tmp_path: Path) -> None:
    shutil.copy(STRIP, tmp_path / "model-1.pt")
    link = tmp_path / "model.pt"
    link.symlink_to("model-1.pt")
    pickled = pickle.dumps(MTCalculator(link, head="water", compile=False))
    link.unlink()
    link.symlink_to("model-2.pt")
    assert pickle.loads(pickled).head == "water"
    os.utime(tmp_path / "model-1.pt", ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"model-1\.pt' is another file than the one that was pickled"):
        pickle.loads(pickled)


def test_results_are_exported_by_the_names_of_ase(potential: Potential) -> None:
    atoms = water()
    calculator = MTCalculator(potential, head="water")
    found = calculator.calculate_properties(atoms, ["energy", "stress"])
    assert found["energy"] == calculator.results["energy"]
    assert "virial" not in found


def test_swapping_the_head_invalidates_results(potential: Potential) -> None:
    atoms = water()
    atoms.calc = MTCalculator(potential, head="water")
    before = atoms.get_potential_energy()
    atoms.calc.head = "clusters"
    assert "energy" not in atoms.calc.results
    assert atoms.calc.head == "clusters"
    assert atoms.get_potential_energy() == pytest.approx(
        potential.evaluate(water(), "clusters").energy, abs=1e-9
    )
    atoms.calc.head = "water"
    assert atoms.get_potential_energy() == before


def test_unknown_head_leaves_the_calculator_as_it_was(potential: Potential) -> None:
    calculator = MTCalculator(potential, head="water")
    with pytest.raises(UnknownHeadError, match=r"no head 'watr' \(did you mean 'water'\?\); heads: water"):
        calculator.head = "watr"
    assert calculator.head == "water"
    assert calculator.heads == ("water", "clusters", "copper")


def test_alias_names_the_head() -> None:
    assert MTCalculator(SE_E2_A, head="liquid", compile=False).head == "water"


def test_energy_is_conserved(potential: Potential) -> None:
    atoms = water()
    atoms.calc = MTCalculator(potential, head="water")
    energies: list[float] = []
    dynamics = VelocityVerlet(atoms, timestep=0.25 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(20)
    assert np.ptp(energies) / len(atoms) < 5e-4
    assert atoms.calc._lists[5.0].n_searches == 1


@pytest.mark.parametrize("skin", [0.0, 1.0])
def test_skin_does_not_change_the_trajectory(potential: Potential, skin: float) -> None:
    atoms = water()
    atoms.calc = MTCalculator(potential, head="water", skin=skin)
    dynamics = Langevin(
        atoms,
        0.5 * units.fs,
        temperature_K=300,
        friction=0.01,
        fixcm=False,
        rng=np.random.RandomState(0),
    )
    dynamics.run(5)
    fresh = potential.evaluate(atoms, "water")
    assert atoms.get_potential_energy() == pytest.approx(fresh.energy, abs=1e-9)
    assert np.allclose(atoms.get_forces(), fresh.forces, rtol=0, atol=1e-11)


def test_constant_pressure_dynamics(potential: Potential) -> None:
    atoms = copper()
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    atoms.calc = MTCalculator(potential, head="copper")
    volume = atoms.get_volume()
    IsotropicMTKNPT(atoms, 1 * units.fs, 300, 1 * units.GPa, tdamp=50 * units.fs, pdamp=200 * units.fs).run(
        10
    )
    assert atoms.get_volume() != volume
    fresh = potential.evaluate(atoms, "copper")
    assert atoms.get_potential_energy() == pytest.approx(fresh.energy, abs=1e-9)


def test_relaxation_of_positions_and_cell(potential: Potential) -> None:
    atoms = copper()
    atoms.calc = MTCalculator(potential, head="copper")
    before = atoms.get_potential_energy()
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=60)
    assert atoms.get_potential_energy() < before
    assert np.abs(atoms.get_forces()).max() < 0.05


def test_open_structure_has_no_stress(potential: Potential) -> None:
    atoms = ase.build.molecule("H2O")
    atoms.calc = MTCalculator(potential, head="clusters")
    assert atoms.calc.results == {}
    atoms.get_forces()
    assert atoms.calc.results["virial"].shape == (3, 3)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    with pytest.raises(ValueError, match=r"volume is 0\.0"):
        potential.evaluate(atoms, head="clusters").stress(0.0)


@pytest.mark.parametrize(
    ("pbc", "n_vectors", "has_stress"),
    [
        ((False, False, False), 3, False),
        ((True, True, False), 2, False),
        ((True, True, False), 3, True),
        ((True, True, True), 3, True),
    ],
    ids=["molecule in a box", "slab", "slab in a box", "bulk"],
)
def test_stress_needs_a_volume_and_a_periodic_axis(
    potential: Potential, pbc: tuple[bool, ...], n_vectors: int, has_stress: bool
) -> None:
    atoms = copper()
    atoms.pbc = pbc
    atoms.cell[n_vectors:] = 0
    atoms.calc = MTCalculator(potential, head="copper")
    atoms.get_forces()
    assert ("stress" in atoms.calc.results) == has_stress
    if has_stress:
        virial = atoms.calc.results["virial"]
        assert np.allclose(atoms.get_stress(voigt=False), -virial / atoms.get_volume(), rtol=0, atol=1e-11)
    else:
        with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic structure with a vol"):
            atoms.get_stress()


def test_when_to_compile_is_chosen_later_as_well() -> None:
    potential = mtinfer.load(DATA / "variants/checkpoints/sea4-pt.pt", device="cpu")
    potential.compile(False)
    assert {graph.mode for graph in potential.graphs} == {"off"}
    with pytest.raises(ValueError, match=r"compile='on' is unknown; allowed are True, False, 'off'"):
        potential.compile("on")  # type: ignore[arg-type]
    assert {graph.mode for graph in potential.graphs} == {"off"}


def test_parameters_of_a_structure_count_as_a_change(eager: Callable[..., Potential]) -> None:
    potential = eager(DATA / "variants/checkpoints/sea4-pt.pt")
    atoms = ase.io.read(DATA / "variants/structures.extxyz", index=1)
    atoms.info["fparam"] = [0.1]
    atoms.calc = MTCalculator(potential, head="water")
    before = atoms.get_potential_energy()
    atoms.info["fparam"] = [0.4]
    after = atoms.get_potential_energy()
    assert after != before
    assert after == pytest.approx(potential.evaluate(atoms, "water", fparam=[0.4]).energy, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("reference/variants/checkpoints/dpa1n-pt.pt", "aparam"),
        ("variants/checkpoints/dpa3z-pt.pt", "charge"),
        ("variants/checkpoints/dpa3z-pt.pt", "spin"),
    ],
)
def test_every_parameter_of_a_structure_counts_as_a_change(
    eager: Callable[..., Potential], name: str, key: str
) -> None:
    potential = eager(DATA / name)
    model = potential.head("water").model
    atoms = ase.build.molecule("H2O")
    atoms.info |= {"fparam": np.full(model.fitting.numb_fparam, 0.1), "charge": 0, "spin": 1}
    atoms.arrays["aparam"] = np.full((3, model.fitting.numb_aparam), 0.2)
    atoms.calc = MTCalculator(potential, head="water")
    before = atoms.get_potential_energy()
    assert atoms.calc.check_state(atoms) == []
    if key == "aparam":
        atoms.arrays["aparam"][1] = 1.5
    else:
        atoms.info[key] += 2
    after = potential.evaluate(atoms, "water").energy
    assert abs(after - before) > 1e-6
    assert atoms.get_potential_energy() == pytest.approx(after, abs=1e-10)


def test_a_head_that_a_type_dict_does_not_fit_is_refused(potential: Potential) -> None:
    water = potential.head("water")
    other = replace(water, name="other", model=replace(water.model, type_map=("O", "H", "Cu")))
    both = Potential({"water": water, "other": other}, {}, potential.device)
    atoms = ase.build.molecule("H2O")
    atoms.calc = MTCalculator(both, head="water", type_dict={"H": 0, "O": 1})
    energy = atoms.get_potential_energy()
    with pytest.raises(MtinferError, match="maps H to 0, which is O in the type map of head 'other'; leave"):
        atoms.calc.head = "other"
    assert atoms.calc.head == "water"
    assert atoms.calc.check_state(atoms) == []
    assert atoms.calc.results["energy"] == energy


def test_keywords_of_deepmd_kit_scripts(potential: Potential) -> None:
    calculator = MTCalculator(model=potential, head="water", type_dict={"H": 0, "O": 1})
    assert calculator.head == "water"
    with pytest.raises(
        MtinferError, match="type_dict maps O to 0, which is H in the type map of head 'water'"
    ):
        MTCalculator(model=potential, head="water", type_dict={"O": 0})
    with pytest.raises(TypeError, match="does not take neighbor_list=: neighbours are found by vesin"):
        MTCalculator(model=potential, head="water", neighbor_list=object())
    with pytest.raises(TypeError, match=r"belong to mtinfer\.load"):
        MTCalculator(potential, head="water", dtype="float32")


@pytest.mark.parametrize("skin", [-1.0, np.nan, np.inf, None, "1"])
def test_skins_that_are_none(potential: Potential, skin: Any) -> None:
    with pytest.raises(ValueError, match=rf"skin={skin!r}; expected a finite number of Å, 0 or more"):
        MTCalculator(potential, head="water", skin=skin)


def test_warnings_point_at_the_line_of_the_user() -> None:
    ways: tuple[Callable[[Potential], object], ...] = (
        lambda potential: potential.evaluate(copper(), "water"),
        lambda potential: potential.energies([copper()], "water"),
        lambda potential: MTCalculator(potential, head="water").get_potential_energy(copper()),
    )
    for way in ways:
        potential = mtinfer.load(STRIP, compile=False)
        with pytest.warns(PredictionWarning, match="never saw Cu") as caught:
            way(potential)
        assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.filterwarnings("ignore:.*never saw Cu.*:mtinfer.errors.PredictionWarning")
def test_calculators_share_a_potential(potential: Potential) -> None:
    one, other = MTCalculator(potential, head="water"), MTCalculator(potential, head="copper")
    assert one.potential is other.potential
    one.head = "clusters"
    assert (one.head, other.head) == ("clusters", "copper")
    structures = [copper(), copper()]
    for atoms, calculator in zip(structures, (one, other), strict=True):
        atoms.calc = calculator
    energies = [atoms.get_potential_energy() for atoms in structures]
    assert energies[1] == pytest.approx(potential.evaluate(copper(), "copper").energy, abs=1e-9)
    assert energies[0] != energies[1]


def test_heads_that_are_refused_are_heads_of_the_file(potential: Potential) -> None:
    usable = {"water": potential.head("water")}
    of_dos = Potential(usable, {"dos": Refused("head 'dos': no energy", ("density",))}, potential.device)
    for name in ("dos", "density", "Density"):
        with pytest.raises(UnsupportedModelError, match="head 'dos': no energy"):
            of_dos.head(name)
    with pytest.raises(UnknownHeadError, match="no head was named and the file has several"):
        of_dos.head()
    of_default = Potential(usable, {"Default": Refused("head 'Default': no energy", ())}, potential.device)
    with pytest.raises(UnsupportedModelError, match="head 'Default': no energy"):
        of_default.head()


def test_head_must_be_named_where_there_are_several(potential: Potential) -> None:
    with pytest.raises(
        UnknownHeadError, match="no head was named and the file has several; choose one of: water"
    ):
        MTCalculator(potential)


@pytest.mark.parametrize("keyword", ["label", "neighbor_list", "auto_batch_size", "no_jit"])
def test_keywords_without_a_meaning_here(potential: Potential, keyword: str) -> None:
    with pytest.raises(TypeError, match=f"MTCalculator does not take {keyword}=: "):
        MTCalculator(potential, head="water", **{keyword: None})


def test_positions_that_are_not_finite_stop_a_simulation(potential: Potential) -> None:
    atoms = water()
    atoms.calc = MTCalculator(potential, head="water")
    atoms.get_forces()
    atoms.positions[5, 0] = np.nan
    with pytest.raises(StructureError, match=r"position of atom 5 .*check the step before"):
        atoms.get_forces()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forces_under_modes_without_gradients(
    potential: Potential, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    atoms = copper()
    atoms.calc = MTCalculator(potential, head="copper")
    expected = atoms.get_forces()
    atoms.calc = MTCalculator(potential, head="copper")
    with mode():
        np.testing.assert_array_equal(atoms.get_forces(), expected)
    atoms.positions += 1e-3  # the list of neighbours made in that mode serves on
    np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["dpa3-shared-pt", "dpa1strip-separate-pt"])
def test_a_callers_autocast_changes_no_bit(name: str) -> None:
    def load() -> Potential:
        path = DATA / f"reference/checkpoints/{name}.pt"
        return mtinfer.load(path, device="cpu", dtype="float32", compile=False)

    atoms, potential = water(), load()
    expected, energies = potential.evaluate(atoms, "water"), potential.energies(atoms, ["water"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, others = load().evaluate(atoms, "water"), potential.energies(atoms, ["water"])
    assert got.energy == expected.energy
    np.testing.assert_array_equal(got.forces, expected.forces)
    np.testing.assert_array_equal(others["water"], energies["water"])


def test_forces_that_are_no_numbers_end_a_run(potential: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = SharedGraph.__call__

    def without_forces(graph: SharedGraph, *arguments: Any) -> tuple[torch.Tensor, ...]:
        energies, *gradients = usual(graph, *arguments)
        return energies, *(gradient * torch.nan for gradient in gradients)

    monkeypatch.setattr(SharedGraph, "__call__", without_forces)
    with pytest.raises(StructureError, match="energy or forces are not finite"):
        potential.evaluate(water(), "water")


def test_a_copy_has_lists_and_results_of_its_own(potential: Potential) -> None:
    calculator, atoms = MTCalculator(potential, head="water"), water()
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    copied = copy.copy(calculator)
    assert copied.results["energy"] == energy
    assert copied.potential is potential
    other = water()
    other.rattle(0.1, seed=1)
    other.calc = copied
    assert other.get_potential_energy() != energy
    assert calculator.results["energy"] == energy
    assert calculator._lists[potential.rcut] is not copied._lists[potential.rcut]


def test_what_a_head_does_not_read_is_no_change(potential: Potential) -> None:
    atoms = water()
    atoms.calc = MTCalculator(potential, head="water")
    for value in ({"a": np.arange(2)}, object(), 3.0):
        atoms.info["charge"] = atoms.info["fparam"] = value
        atoms.get_potential_energy()
        atoms.info["charge"] = [value]
        assert atoms.calc.check_state(atoms) == []


def test_a_call_that_fails_leaves_no_results(potential: Potential) -> None:
    calculator = MTCalculator(potential, head="water")
    calculator.calculate(water())
    bad = ase.Atoms("H2", positions=np.zeros((2, 3)))
    with pytest.raises(StructureError):
        calculator.calculate(bad)
    bad.calc = calculator
    with pytest.raises(StructureError):
        bad.get_potential_energy()


def test_atoms_on_top_of_each_other(potential: Potential) -> None:
    """An energy that is no number ends a run at once."""
    atoms = ase.Atoms("OH2", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.96], [0.0, 0.0, 0.96]])
    atoms.calc = MTCalculator(potential, head="water")
    with pytest.raises(StructureError, match=r"atoms, 1 and 2, are 0 Å apart: check the step"):
        atoms.get_potential_energy()
    with pytest.raises(StructureError, match="1 and 2 of structure 1, are 0 Å apart"):
        potential.evaluate([water(), atoms], "water")


def test_unknown_device() -> None:
    with pytest.raises(MtinferError, match=r"device 'cuba' can't be used \(.*\); try cpu"):
        MTCalculator(STRIP, head="water", device="cuba")


def test_type_dict_names_types_that_are_no_elements(tmp_path: Path) -> None:
    """Scripts for `DP` say which type an element is."""
    for name, type_map in (("plain", ["H", "O", "Cu"]), ("sites", ["HW", "OW", "Cu"])):
        config = {
            "type_map": type_map,
            "descriptor": {
                "type": "se_e2_a",
                "rcut": 4.0,
                "rcut_smth": 1.0,
                "sel": [9, 9, 9],
                "neuron": [4, 8],
                "axis_neuron": 4,
            },
            "fitting_net": {"type": "ener", "neuron": [8]},
        }
        write_random_checkpoint(tmp_path / f"{name}.pt", config)
    atoms = ase.build.molecule("H2O")
    atoms.calc = MTCalculator(tmp_path / "plain.pt", compile=False)
    expected = atoms.get_potential_energy()
    of_types = {"H": np.int64(0), "O": 1, "Cu": 2}
    atoms.calc = MTCalculator(tmp_path / "sites.pt", compile=False, type_dict=of_types)
    assert atoms.get_potential_energy() == expected
    reasons = {"atom 0 is O, which type_dict lacks; it has H": {"H": 0}, "map is HW, OW, Cu": None}
    for reason, type_dict in reasons.items():
        atoms.calc = MTCalculator(tmp_path / "sites.pt", compile=False, type_dict=type_dict)
        with pytest.raises(StructureError, match=reason):
            atoms.get_potential_energy()
    with pytest.raises(MtinferError, match=r"type_dict maps Cu to 3, but head .* has the types"):
        MTCalculator(tmp_path / "sites.pt", compile=False, type_dict={"Cu": 3})
    for index in ("2", 2.0):
        with pytest.raises(MtinferError, match=rf"type_dict maps Cu to {index!r}, but head .* has the types"):
            MTCalculator(tmp_path / "sites.pt", compile=False, type_dict={"Cu": index})


def test_keywords_that_do_not_exist(potential: Potential) -> None:
    with pytest.raises(TypeError, match=r"does not take skinn=: it is unknown \(did you mean 'skin'\?\)"):
        MTCalculator(potential, head="water", skinn=2.0)
    with pytest.raises(TypeError, match=r"compile= and tabulate= belong to mtinfer\.load"):
        MTCalculator(potential, head="water", compile="wait")
    calculator = MTCalculator(potential, head="water")
    calculator.set(head="copper")
    assert calculator.head == "copper"
    with pytest.raises(TypeError, match="skin= can't be set"):
        calculator.set(skin=1.0)


def test_parameters_changed_in_place(eager: Callable[..., Potential]) -> None:
    potential = eager(DATA / "variants/checkpoints/sea4-pt.pt")
    atoms = ase.build.molecule("H2O")
    model = potential.head("water").model
    atoms.arrays["aparam"] = np.full((3, model.fitting.numb_aparam), 0.2)
    atoms.info["fparam"] = np.full(model.fitting.numb_fparam, 0.1)
    atoms.calc = MTCalculator(potential, head="water")
    before = atoms.get_potential_energy()
    assert atoms.calc.check_state(atoms) == []
    atoms.info["fparam"] = (np.array(0.1),) * model.fitting.numb_fparam  # the same, in another form
    assert atoms.calc.check_state(atoms) == []
    atoms.info["fparam"] = np.full(model.fitting.numb_fparam, 0.1)
    atoms.info["fparam"][0] = 5.0
    assert atoms.get_potential_energy() == pytest.approx(potential.evaluate(atoms, "water").energy, abs=1e-12)
    assert abs(atoms.get_potential_energy() - before) > 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("mode", ["off", "wait"])
def test_forked_children_evaluate(mode: str, graph_cache: Path) -> None:
    """In a process of its own, whose threads exist when it forks."""
    script = f"""
import multiprocessing, torch
from ase.build import molecule
from mtinfer import MTCalculator
torch.set_num_threads(2)
torch.rand(600, 600) @ torch.rand(600, 600)
calculator = MTCalculator({str(STRIP)!r}, head="water", compile={mode!r})
def energy(k):
    atoms = molecule("H2O")
    atoms.rattle(0.01, seed=k)
    atoms.calc = calculator
    return atoms.get_potential_energy()
here = [energy(k) for k in range(2)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    there = pool.map_async(energy, range(2)).get(timeout=60)
assert here == there or max(abs(a - b) for a, b in zip(here, there)) < 1e-12, (here, there)
"""
    environment = {**os.environ, "MTINFER_CACHE": str(graph_cache)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
