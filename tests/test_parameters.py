"""Frame and atomic parameters, charge and spin of a structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
from ase.build import molecule
from reference_files import DATA, STRIP

import mtinfer
from mtinfer import Potential
from mtinfer.errors import StructureError, UnsupportedModelError
from mtinfer.parameters import _shaped
from mtinfer.random_checkpoint import write_random_checkpoint
from mtinfer.train.verify import verify

#: reads fparam (2 numbers, with a default) and aparam (1 number)
READER = DATA / "reference/variants/checkpoints/dpa1n-pt.pt"

_REPFLOW = {"n_dim": 8, "e_dim": 6, "a_dim": 4, "nlayers": 1, "e_rcut": 4.0, "e_rcut_smth": 3.0, "e_sel": 20}
DPA3 = {"type": "dpa3", "repflow": {**_REPFLOW, "a_rcut": 3.0, "a_rcut_smth": 2.0, "a_sel": 10}}
FITTING = {"type": "ener", "neuron": [8]}


def structure(n_aparam: int = 0) -> ase.Atoms:
    atoms = molecule("H2O")
    if n_aparam:
        atoms.arrays["aparam"] = np.linspace(0.1, 0.3, 3 * n_aparam).reshape(3, n_aparam)
    return atoms


@pytest.mark.parametrize(
    ("info", "given", "reason"),
    [
        ({"fparam": [0.1]}, {}, r"head '\w+': fparam has shape \(1,\); the model needs \(2,\)"),
        ({"fparam": ["a", "b"]}, {}, r"fparam is \['a', 'b'\]; the model needs numbers, shape \(2,\)"),
        ({"fparam": [0.1, np.nan]}, {}, r"fparam is \[0\.1, nan\]; it must be finite numbers"),
        ({}, {"aparam": [0.1]}, r"aparam has shape \(1,\); the model needs \(3, 1\)"),
        ({}, {"charge_spin": [1.0, 0.0]}, r"charge_spin= was given, but the model takes none; leave it out"),
    ],
)
def test_wrong_parameters(
    eager: Callable[..., Potential], info: dict[str, Any], given: dict[str, Any], reason: str
) -> None:
    potential = eager(READER)
    n_aparam = potential.head(potential.heads[0]).model.fitting.numb_aparam
    atoms = structure(n_aparam)
    atoms.info.update(info)
    with pytest.raises(StructureError, match=reason):
        potential.evaluate(atoms, potential.heads[0], **given)


def test_parameters_are_not_rearranged() -> None:
    for shape in [(2,), (1, 2), (2, 1)]:
        assert _shaped("fparam", np.arange(2.0).reshape(shape), (2,)).tolist() == [0.0, 1.0]
    for shape in [(2, 3), (6,), (1, 6)]:
        with pytest.raises(StructureError, match=r"the model needs \(3, 2\)"):
            _shaped("aparam", np.zeros(shape), (3, 2))


def test_missing_atomic_parameters(eager: Callable[..., Potential]) -> None:
    potential = eager(READER)
    with pytest.raises(StructureError, match=r'set atoms\.arrays\["aparam"\], in files .*, or pass aparam='):
        potential.evaluate(structure(), potential.heads[0])


def test_parameters_that_the_model_does_not_take(eager: Callable[..., Potential]) -> None:
    potential = eager(STRIP)
    for name in ("fparam", "aparam", "charge_spin"):
        with pytest.raises(StructureError, match=f"{name}= was given, but the model takes none"):
            potential.evaluate(structure(), "water", **{name: [0.1, 0.2]})
    expected = potential.evaluate(structure(), "water").energy
    labelled = structure(1)  # as in a file of which another model reads the columns
    labelled.info.update(fparam=[0.1], charge="neutral", spin=[0, 0, 0])
    assert potential.evaluate(labelled, "water").energy == expected


def test_atomic_parameters_of_several_structures(eager: Callable[..., Potential]) -> None:
    potential = eager(READER)
    with pytest.raises(StructureError, match="is for a single structure"):
        potential.evaluate([structure(), structure()], potential.heads[0], aparam=[[0.1]] * 3)  # type: ignore[call-overload]


@pytest.mark.parametrize("given", [{"fparam": [0.3]}, {"charge_spin": [1, 2]}], ids=["fparam", "charge_spin"])
def test_parameters_that_are_passed_go_before_those_of_the_structures(
    eager: Callable[..., Potential], given: dict[str, Any]
) -> None:
    """For one structure and for several, whatever each of them has in `info`."""
    potential = eager(DATA / "variants/checkpoints/dpa3z-pt.pt")
    structures = [structure(), molecule("H2O2"), structure()]
    for k, atoms in enumerate(structures):
        atoms.info |= {"fparam": [0.1 * k], "charge": -k, "spin": k}
    own = [potential.evaluate(atoms, "ice").energy for atoms in structures]
    singles = [potential.evaluate(atoms, "ice", **given).energy for atoms in structures]
    together = [prediction.energy for prediction in potential.evaluate(structures, "ice", **given)]
    np.testing.assert_allclose(together, singles, rtol=0, atol=1e-10)
    assert np.abs(np.subtract(own, singles)).min() > 1e-6
    for atoms in structures:
        charge, spin = given.get("charge_spin", (atoms.info["charge"], atoms.info["spin"]))
        atoms.info |= {"charge": charge, "spin": spin, "fparam": given.get("fparam", atoms.info["fparam"])}
    written = [prediction.energy for prediction in potential.evaluate(structures, "ice")]
    np.testing.assert_allclose(written, singles, rtol=0, atol=1e-10)


def hybrid(*defaults: list[float]) -> dict[str, Any]:
    members = [{**DPA3, "add_chg_spin_ebd": True, "default_chg_spin": default} for default in defaults]
    attention = {
        "type": "se_atten",
        "rcut": 4.0,
        "rcut_smth": 1.0,
        "sel": 20,
        "neuron": [4, 8],
        "axis_neuron": 4,
        "attn_layer": 0,
    }
    descriptor = {"type": "hybrid", "list": [attention, *members]}
    return {"type_map": ["O", "H"], "descriptor": descriptor, "fitting_net": FITTING}


def test_default_charge_and_spin_of_a_hybrid(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.pt"
    write_random_checkpoint(path, hybrid([2.0, 3.0]), dialect="pt_expt")
    potential = mtinfer.load(path, compile=False)
    as_default = potential.evaluate(structure())
    explicit = potential.evaluate(structure(), charge_spin=[2, 3])
    neutral = potential.evaluate(structure(), charge_spin=[0, 0])
    assert as_default.energy == explicit.energy
    assert abs(as_default.energy - neutral.energy) > 1e-6
    training = list(verify(path, compiled=False))
    assert training
    assert all(found.accepted for found in training)


def test_models_that_need_charge_and_spin_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "dpa3.pt"
    descriptor = {**DPA3, "add_chg_spin_ebd": True}
    write_random_checkpoint(path, {"type_map": ["O", "H"], "descriptor": descriptor, "fitting_net": FITTING})
    found = list(verify(path, compiled=False))
    assert found
    assert all(difference.accepted for difference in found)


@pytest.mark.parametrize("state", [[-101.0, 0.0], [100.0, 0.0], [0.0, -1.0], [0.0, 100.0], [0.5, 0.0]])
def test_charge_and_spin_that_the_model_does_not_know(state: list[float], tmp_path: Path) -> None:
    path = tmp_path / "dpa3.pt"
    descriptor = {**DPA3, "add_chg_spin_ebd": True, "default_chg_spin": [0, 1]}
    write_random_checkpoint(path, {"type_map": ["O", "H"], "descriptor": descriptor, "fitting_net": FITTING})
    potential = mtinfer.load(path, compile=False)
    known, unknown = structure(), structure()
    known.info |= {"charge": -100, "spin": 99}
    unknown.info |= dict(zip(("charge", "spin"), state, strict=True))
    potential.evaluate(known)
    of_model = r"whole charges from -100 to 99 and whole spins from 0 to 99"
    with pytest.raises(StructureError, match=rf"'water', structure 1: charge and spin are .*; .*{of_model}"):
        potential.evaluate([known, unknown])
    with pytest.raises(StructureError, match=rf"'water': charge and spin are .*; .*{of_model}"):
        potential.evaluate(known, charge_spin=state)


def test_members_with_different_defaults_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.pt"
    with pytest.raises(UnsupportedModelError, match="different default_chg_spin"):
        write_random_checkpoint(path, hybrid([2.0, 3.0], [0.0, 1.0]))


def test_none_in_info_is_as_if_not_there(tmp_path: Path) -> None:
    path = tmp_path / "parameters.pt"
    config = hybrid([2.0, 3.0])
    config["fitting_net"] = {**FITTING, "numb_fparam": 1, "default_fparam": [0.5]}
    write_random_checkpoint(path, config, dialect="pt_expt")
    potential = mtinfer.load(path, compile=False)
    atoms = structure()
    expected = potential.evaluate(atoms).energy
    atoms.info.update(fparam=None, charge=None, spin=None)
    assert potential.evaluate(atoms).energy == expected
