"""Neighbour lists against a search over all images that is too slow for anything but tests."""

from __future__ import annotations

import itertools
import math

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtinfer.errors import StructureError
from mtinfer.neighbors import Candidates, VerletList, find_candidates, graph_inputs

TRICLINIC = np.array([[3.1, 0.0, 0.0], [1.4, 2.7, 0.0], [-1.1, 0.9, 3.3]])


def image_ranges(atoms: ase.Atoms, radius: float) -> list[range]:
    """More images than can be within reach, however skewed the cell and far outside the atoms."""
    spread = np.ptp(atoms.positions, axis=0).sum() + radius
    reciprocal = np.linalg.pinv(np.where(atoms.pbc[:, None], atoms.cell.array, 0.0))
    reach = np.ceil(np.linalg.norm(reciprocal, axis=0) * spread).astype(int) + 1
    return [range(-n, n + 1) if periodic else range(1) for n, periodic in zip(reach, atoms.pbc, strict=True)]


def brute_force(atoms: ase.Atoms, radius: float) -> list[tuple[float, ...]]:
    """(centre, neighbour, displacement) of every pair, sorted."""
    positions, cell = atoms.positions, atoms.cell.array
    images = np.array(list(itertools.product(*image_ranges(atoms, radius))))
    vectors = (images @ cell)[:, None, None] + positions[None, None] - positions[None, :, None]
    inside = np.linalg.norm(vectors, axis=-1) <= radius
    inside &= images.any(axis=1)[:, None, None] | ~np.eye(len(atoms), dtype=bool)
    _, centers, neighbors = np.nonzero(inside)
    return in_order(
        [(float(i), float(j), *d) for i, j, d in zip(centers, neighbors, vectors[inside], strict=True)]
    )


def pairs_of(atoms: ase.Atoms, candidates: Candidates, radius: float) -> list[tuple[float, ...]]:
    vectors = candidates.displacements(atoms).numpy()
    rows = zip(candidates.centers.tolist(), candidates.neighbors.tolist(), vectors, strict=True)
    return in_order([(float(i), float(j), *d) for i, j, d in rows if np.linalg.norm(d) <= radius])


def in_order(pairs: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    return sorted(pairs, key=lambda pair: tuple(round(x, 6) for x in pair))


def require_same_pairs(got: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> None:
    assert len(got) == len(expected)
    if expected:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def random_atoms(seed: int, n_atoms: int, cell: np.ndarray, pbc: object) -> ase.Atoms:
    random = np.random.default_rng(seed)
    return ase.Atoms(f"O{n_atoms}", random.random((n_atoms, 3)) @ cell, cell=cell, pbc=pbc)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(np.diag([7.0, 8.0, 9.0]), id="larger"),
        pytest.param(np.diag([2.1, 2.5, 3.0]), id="smaller"),
        pytest.param(TRICLINIC, id="triclinic"),
        pytest.param(TRICLINIC[[1, 0, 2]], id="left-handed"),
        pytest.param(np.diag([2.1, -2.5, 3.0]), id="negative"),
        pytest.param(np.array([[6.0, 0, 0], [5.0, 2.0, 0], [0, 5.0, 2.5]]), id="very-skewed"),
    ],
)
@pytest.mark.parametrize("pbc", list(itertools.product((True, False), repeat=3)), ids=str)
def test_pairs_of_any_cell(cell: np.ndarray, pbc: tuple[bool, ...]) -> None:
    atoms = random_atoms(0, 4, cell, pbc)
    require_same_pairs(pairs_of(atoms, find_candidates(atoms, 4.0), 4.0), brute_force(atoms, 4.0))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_atoms=st.integers(1, 5),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    radius=st.floats(0.5, 4.5),
)
def test_pairs_of_random_cells(seed: int, n_atoms: int, pbc: tuple[bool, ...], radius: float) -> None:
    random = np.random.default_rng(seed)
    cell = random.normal(size=(3, 3)) + 3.0 * np.eye(3)[random.permutation(3)]
    atoms = random_atoms(seed, n_atoms, cell, pbc)
    atoms.positions += random.integers(-2, 3, (n_atoms, 3)) @ cell  # unwrapped, off the periodic axes, too
    # one cell in a hundred is flat, and would have more images than memory holds
    assume(math.prod(map(len, image_ranges(atoms, radius))) < 500_000)
    require_same_pairs(pairs_of(atoms, find_candidates(atoms, radius), radius), brute_force(atoms, radius))


def test_atoms_far_outside_the_cell() -> None:
    inside = random_atoms(1, 5, TRICLINIC, True)
    outside = inside.copy()
    outside.positions += np.array([[40, -7, 0], [0, 0, 0], [-31, 2, 9], [0, 55, -3], [1, 1, 1]]) @ TRICLINIC
    require_same_pairs(
        pairs_of(outside, find_candidates(outside, 4.0), 4.0),
        pairs_of(inside, find_candidates(inside, 4.0), 4.0),
    )


def test_single_atoms() -> None:
    alone = ase.Atoms("O", [[1.0, -3.0, 2.0]])
    assert find_candidates(alone, 6.0).centers.shape == (0,)
    primitive = bulk("Cu", "fcc", a=3.6)
    distances = np.linalg.norm(
        np.array(pairs_of(primitive, find_candidates(primitive, 3.7), 3.7))[:, 2:], axis=1
    )
    np.testing.assert_allclose(np.sort(distances), [3.6 / 2**0.5] * 12 + [3.6] * 6)


@pytest.mark.parametrize("pbc", [(True, False, False), (False, True, True), (False, False, False)])
def test_cell_vectors_off_the_periodic_axes_do_not_matter(pbc: tuple[bool, ...]) -> None:
    atoms = random_atoms(2, 5, TRICLINIC, pbc)
    blank = atoms.copy()
    blank.cell[np.logical_not(pbc)] = 0.0
    require_same_pairs(
        pairs_of(blank, find_candidates(blank, 4.0), 4.0), pairs_of(atoms, find_candidates(atoms, 4.0), 4.0)
    )


def test_centers_ascend() -> None:
    candidates = find_candidates(random_atoms(3, 6, TRICLINIC, True), 5.0)
    assert (torch.diff(candidates.centers) >= 0).all()
    assert candidates.n_atoms == 6


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_position_that_is_not_finite(number: float) -> None:
    atoms = ase.Atoms("OH2", np.eye(3))
    atoms.positions[1, 2] = number
    with pytest.raises(StructureError, match=r"position of atom 1 \(H\) is .*must be finite"):
        find_candidates(atoms, 4.0)


def test_cell_that_is_not_finite() -> None:
    atoms = random_atoms(0, 2, TRICLINIC, True)
    atoms.cell[0, 0] = np.nan
    with pytest.raises(StructureError, match="cell vectors must be finite"):
        find_candidates(atoms, 4.0)


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.zeros((3, 3)), True),
        (np.array([[3.0, 0, 0], [6.0, 0, 0], [0, 0, 3.0]]), True),
        (np.array([[3.0, 0, 0], [0, 0, 0], [0, 0, 3.0]]), (True, True, False)),
    ],
    ids=["zero", "parallel", "zero-on-a-periodic-axis"],
)
def test_cell_without_volume(cell: np.ndarray, pbc: object) -> None:
    atoms = ase.Atoms("O", cell=cell, pbc=pbc)
    with pytest.raises(StructureError, match="no volume along its periodic axes"):
        find_candidates(atoms, 4.0)


def test_parallel_vectors_off_the_periodic_axes_are_fine() -> None:
    atoms = ase.Atoms("O", cell=[[2.0, 0, 0], [4.0, 0, 0], [0, 0, 0]], pbc=(True, False, False))
    require_same_pairs(pairs_of(atoms, find_candidates(atoms, 4.5), 4.5), brute_force(atoms, 4.5))


def test_graph_inputs_concatenate_and_cut() -> None:
    structures = [random_atoms(4, 3, TRICLINIC, True), ase.Atoms("O"), random_atoms(5, 4, TRICLINIC, False)]
    inputs = graph_inputs(
        structures,
        [find_candidates(atoms, 5.0) for atoms in structures],
        [np.arange(len(atoms)) for atoms in structures],
        3.0,
        fparam=torch.zeros(3, 0),
        aparam=torch.zeros(8, 0),
        charge_spin=torch.zeros(3, 2),
    )
    assert inputs.sizes == [3, 1, 4]
    assert inputs.n_atoms == 8
    assert inputs.types.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert inputs.frames.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    rows = zip(inputs.centers.tolist(), inputs.neighbors.tolist(), inputs.displacements.tolist(), strict=True)
    expected = [
        (i + offset, j + offset, *vector)
        for atoms, offset in zip(structures, (0, 3, 4), strict=True)
        for i, j, *vector in brute_force(atoms, 3.0)
    ]
    require_same_pairs(in_order([(float(i), float(j), *d) for i, j, d in rows]), in_order(expected))


def test_pairs_just_outside_of_the_cutoff_are_no_inputs() -> None:
    atoms = ase.Atoms("O4", [[0, 0, 0], [3 * (1 - 1e-12), 0, 0], [0, 3 * (1 + 1e-9), 0], [0, 0, 3.015]])
    no_numbers = torch.zeros(1, 0, dtype=torch.float64)
    parameters = {"fparam": no_numbers, "aparam": no_numbers[[0] * 4], "charge_spin": no_numbers}
    types = [np.zeros(4, dtype=np.int64)]
    inputs = graph_inputs([atoms], [find_candidates(atoms, 5.0)], types, 3.0, **parameters)
    assert list(zip(inputs.centers.tolist(), inputs.neighbors.tolist(), strict=True)) == [(0, 1), (1, 0)]


def require_complete(verlet: VerletList, atoms: ase.Atoms) -> None:
    """Compare the pairs within the cutoff with those of a new search."""
    new = find_candidates(atoms, verlet.rcut)
    require_same_pairs(
        pairs_of(atoms, verlet.candidates(atoms), verlet.rcut), pairs_of(atoms, new, verlet.rcut)
    )


def water_box(seed: int = 0) -> ase.Atoms:
    return random_atoms(seed, 12, np.diag([6.0, 6.5, 7.0]) + 0.3, True)


def test_verlet_list_misses_no_pair_while_atoms_move() -> None:
    random = np.random.default_rng(0)
    atoms, verlet, n_steps = water_box(), VerletList(4.0, 1.0), 150
    velocity = random.normal(0.0, 0.02, (len(atoms), 3))
    for _ in range(n_steps):
        atoms.positions += velocity + random.normal(0.0, 0.01, velocity.shape)
        require_complete(verlet, atoms)
    assert 1 < verlet.n_searches < n_steps / 5


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)], ids=str)
def test_verlet_list_misses_no_pair_while_the_cell_changes(pbc: tuple[bool, ...]) -> None:
    random = np.random.default_rng(1)
    atoms, verlet, n_steps = water_box(1), VerletList(4.0, 1.0), 150
    atoms.pbc = pbc
    for step in range(n_steps):
        strain = np.eye(3) + 0.004 * np.sin(0.15 * step) * np.array(
            [[1.0, 0.5, 0], [0, -0.7, 0], [0.3, 0, 0.9]]
        )
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += random.normal(0.0, 0.03, atoms.positions.shape)
        require_complete(verlet, atoms)
    assert 1 < verlet.n_searches < n_steps / 5


def test_verlet_list_follows_pure_strain_without_a_search() -> None:
    atoms, verlet = water_box(2), VerletList(4.0, 1.0)
    verlet.candidates(atoms)
    for factor in (1.05, 0.92, 1.2):
        atoms.set_cell(atoms.cell.array * factor, scale_atoms=True)
        verlet.candidates(atoms)
    assert verlet.n_searches == 1


def test_verlet_list_sees_strain_that_uses_up_the_skin() -> None:
    atoms, verlet = water_box(2), VerletList(4.0, 1.0)
    verlet.candidates(atoms)
    atoms.set_cell(atoms.cell.array @ np.diag([1.0, 0.78, 1.0]), scale_atoms=True)
    require_complete(verlet, atoms)
    assert verlet.n_searches == 2


def test_verlet_list_sees_a_cell_that_changes_under_still_atoms() -> None:
    atoms, verlet = water_box(3), VerletList(4.0, 0.5)
    verlet.candidates(atoms)
    atoms.set_cell(atoms.cell.array * 0.8)
    require_complete(verlet, atoms)


def test_verlet_list_sees_one_atom_jump() -> None:
    atoms, verlet = water_box(4), VerletList(4.0, 1.0)
    verlet.candidates(atoms)
    atoms.positions[3] += [0.0, 0.51, 0.0]
    verlet.candidates(atoms)
    assert verlet.n_searches == 2


@pytest.mark.parametrize("change", ["pbc", "atoms"])
def test_verlet_list_sees_another_structure(change: str) -> None:
    atoms, verlet = water_box(5), VerletList(4.0, 1.0)
    verlet.candidates(atoms)
    if change == "pbc":
        atoms.pbc = (True, False, True)
    else:
        atoms = atoms[:-1]
    require_complete(verlet, atoms)


def test_verlet_list_without_skin_searches_at_every_move() -> None:
    atoms, verlet = water_box(6), VerletList(4.0, 0.0)
    for expected in (1, 2, 3):
        atoms.positions[0] += 1e-3
        verlet.candidates(atoms)
        assert verlet.n_searches == expected


def test_verlet_list_checks_positions() -> None:
    atoms, verlet = water_box(7), VerletList(4.0, 1.0)
    verlet.candidates(atoms)
    atoms.positions[2] = np.nan
    with pytest.raises(StructureError, match="position of atom 2"):
        verlet.candidates(atoms)


@pytest.mark.parametrize(
    ("atoms", "reason"),
    [
        (ase.Atoms("OH", [[0, 0, 0], [1e6, 0, 0]]), "1e\\+06 Å long.*remove atoms that flew away"),
        (ase.Atoms("OH", [[0, 0, 0], [0, 0, 1e6]], cell=[9, 9, 9], pbc=[True, True, False]), "Å long"),
        (ase.Atoms("O", cell=[1e7, 5, 5], pbc=True), "1e\\+07 Å long.*check its cell"),
        (
            ase.Atoms("O", cell=[[5, 0, 0], [5, 1e-4, 0], [0, 0, 5]], pbc=True),
            "0.0001 Å high.*check its vectors",
        ),
        (
            ase.Atoms("OH", [[0, 0, 0], [3e9, 0, 1]], cell=[1, 9, 9], pbc=True),
            r"atom 1 \(H\) is 3e\+09 lattice vectors away.*check the step before",
        ),
        (
            ase.Atoms("OH", [[0, 1e300, 0], [0, 0, 1]], cell=[9, 9, 9], pbc=True),
            r"atom 0 \(O\) is 1.11e\+299",
        ),
    ],
)
def test_structures_that_no_search_can_be_made_of(atoms: ase.Atoms, reason: str) -> None:
    with pytest.raises(StructureError, match=reason):
        find_candidates(atoms, 6.0)


def test_long_structures() -> None:
    """Positions far outside of a periodic cell are no matter, nor is a long chain."""
    periodic = ase.Atoms("OH", [[0, 0, 0], [1e8 + 1.0, 0, 0]], cell=[4.0, 9, 9], pbc=True)
    assert len(find_candidates(periodic, 3.5).centers) == 4
    chain = ase.Atoms("O3", [[0, 0, 0], [1e5, 0, 0], [1e5 + 1, 0, 0]])
    assert len(find_candidates(chain, 6.0).centers) == 2


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i8"])
def test_positions_of_any_type_are_taken_as_doubles(dtype: str) -> None:
    atoms = water_box()
    atoms.positions = np.round(atoms.positions)
    other = atoms.copy()
    other.arrays["positions"] = atoms.positions.astype(dtype)
    no_numbers = torch.zeros(1, 0, dtype=torch.float64)

    def displacements(atoms: ase.Atoms) -> torch.Tensor:
        candidates = VerletList(3.0, 0.5).candidates(atoms)
        types = [np.zeros(len(atoms), dtype=np.int64)]
        parameters = {"fparam": no_numbers, "aparam": no_numbers[[0] * len(atoms)], "charge_spin": no_numbers}
        return graph_inputs([atoms], [candidates], types, 3.0, **parameters).displacements

    assert torch.equal(displacements(other), displacements(atoms))
