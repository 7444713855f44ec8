"""The ASE calculator in the hands of ASE's drivers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

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

from mtinfer import MTCalculator, MtinferError, Potential
from mtinfer.errors import StructureError, UnknownHeadError


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


def test_keywords_of_deepmd_kit_scripts(potential: Potential) -> None:
    calculator = MTCalculator(model=potential, head="water", type_dict={"H": 0, "O": 1})
    assert calculator.head == "water"
    with pytest.raises(MtinferError, match="type_dict maps O to 0, but the type map of head 'water' is"):
        MTCalculator(model=potential, head="water", type_dict={"O": 0})
    with pytest.raises(TypeError, match="does not take neighbor_list=: neighbours are found by vesin"):
        MTCalculator(model=potential, head="water", neighbor_list=object())
    with pytest.raises(TypeError, match=r"belong to mtinfer\.load"):
        MTCalculator(potential, head="water", dtype="float32")
    with pytest.raises(ValueError, match=r"skin=-1\.0 is negative"):
        MTCalculator(potential, head="water", skin=-1.0)


@pytest.mark.filterwarnings("ignore:.*never saw Cu.*:mtinfer.potential.PredictionWarning")
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
