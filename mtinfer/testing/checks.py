"""The conformance checks, one function each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import ase
import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray

from ..errors import MtinferError, StructureError, UnknownHeadError
from ..graph import Compilation
from ..heads import HeadState
from ..inputs import Prediction
from ..models.descriptor import InParts
from ..potential import Potential
from ..stage_graphs import StageGraphs
from .deviations import TOLERANCES, require_close, require_same
from .structures import (
    any_element,
    example_structure,
    inputs_of,
    structures_of_all_kinds,
    with_parameters,
)

Array = NDArray[np.float64]
Check = Callable[[Potential, str], None]

#: Å and strain, of the five-point stencil; small, since models with random weights bend sharply
_STEP = 3e-5


def _evaluate(
    potential: Potential, structures: Sequence[ase.Atoms], state: HeadState, *, batched: bool = False
) -> list[Prediction]:
    with any_element():
        if batched:
            return potential.evaluate(structures, state.name)
        return [potential.evaluate(atoms, state.name) for atoms in structures]


def _five_point(
    potential: Potential, state: HeadState, moved: Callable[[float], Iterable[ase.Atoms]]
) -> Array:
    """Derivative of the energy along each of several directions."""
    energy = {}
    for multiple in (-2, -1, 1, 2):
        structures = list(moved(multiple * _STEP))
        predictions = _evaluate(potential, structures, state, batched=True)
        energy[multiple] = np.array([prediction.energy for prediction in predictions])
    return np.asarray((8.0 * (energy[1] - energy[-1]) - (energy[2] - energy[-2])) / (12.0 * _STEP))


def _float64_state(potential: Potential, head: str) -> HeadState:
    state = potential.head(head)
    if state.precision != torch.float64:
        raise ValueError(
            f"head {head!r} computes in float32, where finite differences say little; "
            "give a potential loaded with dtype='float64'"
        )
    return state


def check_forces(potential: Potential, head: str) -> None:
    """Forces are -dE/dr, by finite differences on an atom of each element; the head computes in float64."""
    state = _float64_state(potential, head)
    for pbc in (True, False):
        atoms = example_structure(potential, head, pbc=pbc)

        def moved(step: float, atoms: ase.Atoms = atoms) -> Iterator[ase.Atoms]:
            for index in np.ndindex(3, 3):
                copy = atoms.copy()
                copy.positions[index] += step
                yield copy

        forces = _evaluate(potential, [atoms], state)[0].forces[:3]
        expected = -_five_point(potential, state, moved).reshape(-1, 3)
        require_close(f"forces, pbc={pbc}", forces, expected, TOLERANCES[torch.float64].derivative)


def check_virial(potential: Potential, head: str) -> None:
    """Virials are -dE/dε, by finite differences of every strain; the head computes in float64."""
    state = _float64_state(potential, head)
    for pbc in (True, False):
        atoms = example_structure(potential, head, pbc=pbc)

        def strained(step: float, atoms: ase.Atoms = atoms) -> Iterator[ase.Atoms]:
            for index in np.ndindex(3, 3):
                strain = np.eye(3)
                strain[index] += step
                copy = atoms.copy()
                copy.set_cell(atoms.cell.array @ strain.T)
                copy.positions = atoms.positions @ strain.T
                yield copy

        virial = _evaluate(potential, [atoms], state)[0].virial
        expected = -_five_point(potential, state, strained).reshape(3, 3)
        require_close(f"virial, pbc={pbc}", virial, expected, TOLERANCES[torch.float64].derivative)


def check_permutation(potential: Potential, head: str) -> None:
    """The order of atoms does not matter.

    The first atom is exchanged for one of its own element: in the dense lists of DPA-1 and DPA-2 with
    statistics that are not zero, empty slots read the element of the first atom, as they do in training.
    """
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    atoms = example_structure(potential, head)
    numbers = atoms.numbers
    order = np.random.default_rng(1).permutation(len(atoms))
    alike = [k for k, index in enumerate(order) if numbers[index] == numbers[0]]
    first = next((k for k in alike if order[k] != 0), alike[0])
    order[[0, first]] = order[[first, 0]]
    original, shuffled = _evaluate(potential, [atoms, atoms[order]], state)
    expected = replace(original, atom_energy=original.atom_energy[order], forces=original.forces[order])
    require_same("permutation", shuffled, expected, tolerance)


def check_rotation(potential: Potential, head: str) -> None:
    """Energies are invariant, forces and virials turn with the structure; proper and mirrored rotations."""
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    for turn, pbc in ((rotation, True), (-rotation, True), (rotation, False)):
        atoms = example_structure(potential, head, pbc=pbc)
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ turn)
        turned.positions = atoms.positions @ turn
        original, got = _evaluate(potential, [atoms, turned], state)
        expected = replace(original, forces=original.forces @ turn, virial=turn.T @ original.virial @ turn)
        require_same(f"rotation, pbc={pbc}, det={np.linalg.det(turn):.0f}", got, expected, tolerance)


def check_lattice_translation(potential: Potential, head: str) -> None:
    """Nothing changes when atoms move by lattice vectors, each by its own, and all by one vector."""
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    for pbc in (True, False):
        atoms = example_structure(potential, head, pbc=pbc)
        moved = atoms.copy()
        moved.positions += np.array([1.7, -23.1, 0.4])
        if pbc:
            multiples = np.random.default_rng(3).integers(-4, 5, (len(atoms), 3))
            moved.positions += multiples @ atoms.cell.array
        original, got = _evaluate(potential, [atoms, moved], state)
        require_same(f"lattice translation, pbc={pbc}", got, original, tolerance)


def check_supercell(potential: Potential, head: str) -> None:
    """A repeated cell has the energies and forces of the cell in every copy."""
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    atoms = example_structure(potential, head)
    original, got = _evaluate(potential, [atoms, atoms.repeat((2, 1, 3))], state)
    expected = replace(
        original,
        energy=6.0 * original.energy,
        atom_energy=np.tile(original.atom_energy, 6),
        forces=np.tile(original.forces, (6, 1)),
        virial=6.0 * original.virial,
    )
    require_same("supercell", got, expected, tolerance)


def check_batch(potential: Potential, head: str) -> None:
    """Structures of different sizes and periodicity give the same numbers in one batch and one by one."""
    state = potential.head(head)
    structures = structures_of_all_kinds(potential, head)
    singles = _evaluate(potential, structures, state)
    batch = _evaluate(potential, structures, state, batched=True)
    for atoms, got, expected in zip(structures, batch, singles, strict=True):
        what = f"batch, {len(atoms)} atoms, pbc={atoms.pbc.tolist()}"
        require_same(what, got, expected, TOLERANCES[state.precision].order)


def check_single_atom(potential: Potential, head: str) -> None:
    """One atom feels no force: alone, wherever it stands, and among its own images along one axis."""
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    edge = state.model.rcut * np.array([[0.6, 0.0, 0.0], [0.1, 3.0, 0.0], [0.0, 0.0, 3.0]])
    symbols = example_structure(potential, head).symbols[:3]
    alone = [with_parameters(ase.Atoms([symbol], [[0.3, 0.0, -7.0]]), state) for symbol in symbols]
    elsewhere = [atoms.copy() for atoms in alone]
    chains = [atoms.copy() for atoms in alone]
    for moved, chain in zip(elsewhere, chains, strict=True):
        moved.positions += 11.0
        chain.set_cell(edge)
        chain.pbc = True
    groups = [_evaluate(potential, group, state, batched=True) for group in (alone, elsewhere, chains)]
    for symbol, first, second, chained in zip(symbols, *groups, strict=True):
        require_same(f"single {symbol}, moved", second, first, tolerance)
        require_close(f"single {symbol}, virial", first.virial, np.zeros((3, 3)), 0.0)
        for prediction in (first, chained):
            require_close(f"single {symbol}, forces", prediction.forces, np.zeros((1, 3)), tolerance)
            require_close(f"single {symbol}, energy", prediction.energy, prediction.atom_energy[0], 0.0)


def check_no_neighbors(potential: Potential, head: str) -> None:
    """Atoms out of each other's reach have the energies of single atoms and no forces."""
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    apart = np.array([[0.0, 0.0, 0.0], [0.0, 1.01 * state.model.rcut, 0.0]])
    symbols = example_structure(potential, head).symbols[:3]
    pairs = [with_parameters(ase.Atoms([symbol] * 2, apart), state) for symbol in symbols]
    both = _evaluate(potential, pairs, state, batched=True)
    singles = _evaluate(potential, [pair[k : k + 1] for pair in pairs for k in (0, 1)], state, batched=True)
    for k, (symbol, got) in enumerate(zip(symbols, both, strict=True)):
        energies = [single.energy for single in singles[2 * k : 2 * k + 2]]
        require_close(f"no neighbours, {symbol}, atom_energy", got.atom_energy, energies, tolerance)
        require_close(f"no neighbours, {symbol}, forces", got.forces, np.zeros((2, 3)), 0.0)
        require_close(f"no neighbours, {symbol}, virial", got.virial, np.zeros((3, 3)), 0.0)


def check_mixed_periodicity(potential: Potential, head: str) -> None:
    """Axes are periodic one by one; an axis that is not has no images, whatever its cell vector."""
    state = potential.head(head)
    tolerance = TOLERANCES[state.precision].order
    for pbc in ((True, True, False), (False, True, False)):
        atoms = example_structure(potential, head, pbc=pbc)
        atoms.positions += 2.5 * atoms.cell.array[2]
        blank = atoms.copy()
        spaced = atoms.copy()
        cell = atoms.cell.array.copy()
        for axis in np.flatnonzero(np.logical_not(pbc)):
            cell[axis] = 0.0
        blank.set_cell(cell)
        complete = blank.cell.complete().array
        far = np.ptp(atoms.positions @ complete.T, axis=0) + 2.0 * state.model.rcut
        spaced.set_cell(np.where(np.array(pbc)[:, None], cell, complete * far[:, None]))
        spaced.pbc = True
        expected, *others = _evaluate(potential, [spaced, atoms, blank], state)
        for what, got in zip(("short", "zero"), others, strict=True):
            require_same(f"pbc={pbc}, {what} cell vector off the periodic axes", got, expected, tolerance)


def check_inputs_unmodified(potential: Potential, head: str) -> None:
    """Evaluating changes neither the structures nor the weights."""
    state = potential.head(head)
    structures = structures_of_all_kinds(potential, head)
    copies = [atoms.copy() for atoms in structures]
    weights = [weight.clone() for group in state.weights for weight in group]
    _evaluate(potential, structures, state, batched=True)
    for atoms, copy in zip(structures, copies, strict=True):
        contents = [
            *atoms.arrays.items(),
            *atoms.info.items(),
            ("cell", atoms.cell.array),
            ("pbc", atoms.pbc),
        ]
        before = {**copy.arrays, **copy.info, "cell": copy.cell.array, "pbc": copy.pbc}
        changed = [name for name, value in contents if not np.array_equal(value, before.pop(name, None))]
        if changed or before:
            raise AssertionError(f"evaluating changed {', '.join([*changed, *before])} of a structure")
    kept = [weight for group in potential.head(head).weights for weight in group]
    if not all(map(torch.equal, kept, weights)):
        raise AssertionError("evaluating changed the weights")


def check_head_swap(potential: Potential, head: str) -> None:
    """A head gives the same numbers, bit for bit, before and after every other head was used."""
    state = potential.head(head)
    atoms = example_structure(potential, head)
    before = _evaluate(potential, [atoms], state)[0]
    for name in potential.heads:
        other = potential.head(name)
        if set(atoms.symbols) <= set(other.model.type_map):
            _evaluate(potential, [with_parameters(atoms.copy(), other)], other)
        require_same(f"{head} after {name}", _evaluate(potential, [atoms], state)[0], before, 0.0)


def check_compiled_equals_eager(potential: Potential, head: str) -> None:
    """One compiled graph gives what eager evaluation gives, for every number and structures of any size."""
    state = potential.head(head)
    structures = structures_of_all_kinds(potential, head)
    results = {}
    graph = state.graph
    for mode in ("off", "wait"):
        own = replace(graph, compilation=Compilation(mode))
        inputs = [inputs_of(potential, atoms, state) for atoms in structures]
        results[mode] = [
            potential.predict(each, replace(state, stages=StageGraphs(own)))[0] for each in inputs
        ]
    if not own.is_compiled:
        raise AssertionError("no compiled graph could be had")
    for atoms, got, expected in zip(structures, results["wait"], results["off"], strict=True):
        require_same(f"compiled, {len(atoms)} atoms", got, expected, TOLERANCES[state.precision].compiled)


def check_parts(potential: Potential, head: str) -> None:
    """Models that have parts give the same part by part, as large structures are evaluated."""
    state = potential.head(head)
    if not isinstance(state.model.descriptor, InParts):
        return
    graph, tolerance = state.graph, TOLERANCES[state.precision].order
    eager = StageGraphs(replace(graph, compilation=Compilation("off")))
    for atoms in structures_of_all_kinds(potential, head):
        layouts, _ = state.model.layouts(inputs_of(potential, atoms, state))
        for layout in layouts:
            data, weights = (layout.displacements, layout.tensors), state.named(layout.group)
            parts = state.model.in_parts(*data, weights, eager)
            whole = state.model.energies_and_gradients(*data, weights)
            names = ("energies", *(f"gradient {k}" for k in range(len(layout.displacements))))
            for name, got, expected in zip(names, parts, whole, strict=True):
                require_close(f"in parts, {len(atoms)} atoms, {name}", got.cpu(), expected.cpu(), tolerance)


def check_energies(potential: Potential, head: str) -> None:
    """`Potential.energies`, which makes no derivatives, gives the energies of `Potential.evaluate`."""
    state, structures = potential.head(head), structures_of_all_kinds(potential, head)
    got = potential.energies(structures, [head])[state.name]
    expected = [prediction.energy for prediction in _evaluate(potential, structures, state)]
    require_close("energies without derivatives", got, expected, TOLERANCES[state.precision].order)


def check_errors(potential: Potential, head: str) -> None:
    """A wrong head or structure raises, in one line that lists what is allowed."""
    atoms = example_structure(potential, head)
    known = potential.head(head).model.type_map
    _require_error(potential, atoms, f"{head}~", UnknownHeadError, potential.heads)
    foreign = atoms.copy()
    foreign.symbols[2] = next((symbol for symbol in chemical_symbols if symbol not in known), "X")
    _require_error(potential, foreign, head, StructureError, ("atom 2", foreign.symbols[2], *known))
    lost = atoms.copy()
    lost.positions[1, 2] = np.nan
    _require_error(potential, lost, head, StructureError, ("atom 1", "nan"))
    flat = atoms.copy()
    flat.cell[1] = 2.0 * flat.cell[0]
    _require_error(potential, flat, head, StructureError, ("pbc",))
    if "aparam" in atoms.arrays:
        del atoms.arrays["aparam"]
        _require_error(potential, atoms, head, StructureError, ("aparam",))


def _require_error(
    potential: Potential, atoms: ase.Atoms, head: str, kind: type[MtinferError], words: Iterable[str]
) -> None:
    try:
        potential.evaluate(atoms, head)
    except kind as err:
        text = str(err)
        missing = [word for word in words if word not in text]
        if missing or "\n" in text:
            raise AssertionError(f"the error {text!r} is not one line with {missing}") from err
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


#: every check, in the order in which `check_conformance` runs them
CONFORMANCE: tuple[Check, ...] = (
    check_forces,
    check_virial,
    check_permutation,
    check_rotation,
    check_lattice_translation,
    check_supercell,
    check_batch,
    check_single_atom,
    check_no_neighbors,
    check_mixed_periodicity,
    check_inputs_unmodified,
    check_head_swap,
    check_parts,
    check_energies,
    check_errors,
    check_compiled_equals_eager,
)
#: those that need a head that computes in float64
DERIVATIVE_CHECKS: tuple[Check, ...] = (check_forces, check_virial)


def check_conformance(potential: Potential, head: str, *, float64: Potential | None = None) -> None:
    """Run every check on one head.

    Parameters
    ----------
    potential
        as `mtinfer.load` gives it, in any compile mode.
    head
        name of the head.
    float64
        the same file loaded with ``dtype="float64"``, for the finite differences of a float32 head.

    Raises
    ------
    AssertionError
        At the first check that fails, with the largest deviation.
    """
    for check in CONFORMANCE:
        check(float64 if float64 is not None and check in DERIVATIVE_CHECKS else potential, head)
