"""Structures on which any head can be checked."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence

import ase
import numpy as np
import torch

from ..errors import PredictionWarning
from ..heads import HeadState
from ..inputs import GraphInputs
from ..models.layout import Selection
from ..neighbors import find_candidates
from ..potential import Potential

#: Å, from every cutoff of the model to the nearest distance of a pair: some models jump at their cutoffs
_CLEARANCE = 1e-3
#: edge of the cell in units of the cutoff; the first one is used at which no neighbour list is truncated
_CELL_EDGES = (0.8, 1.1, 1.4, 1.8, 2.3)
_SKEW = np.array([[1.0, 0.0, 0.0], [0.2, 0.95, 0.0], [-0.15, 0.25, 1.05]])
_CORNERS = np.array(list(itertools.product((0.2, 0.7), repeat=3)))


def example_structure(
    potential: Potential, head: str, *, pbc: bool | Sequence[bool] = True, n_atoms: int = 6
) -> ase.Atoms:
    """Atoms in a skewed cell on which a head is smooth: nothing truncated, no pair near a cutoff.

    Parameters
    ----------
    pbc
        periodic axes; the clearances hold for the fully periodic structure, too.
    n_atoms
        at most 8.

    Returns
    -------
    ase.Atoms
        The elements of the training data first, with parameters where the head takes some. The cell is
        smaller than the cutoff where the neighbour lists of the model allow it.
    """
    state = potential.head(head)
    cutoffs = list(_cutoffs(state.model.descriptor.selection, state.model.rcut))
    seen = state.observed_types or frozenset()
    symbols = sorted(state.model.type_map, key=lambda symbol: symbol not in seen)[:3]
    for edge, seed in itertools.product(_CELL_EDGES, range(4)):
        random = np.random.default_rng(seed)
        corners = random.permutation(_CORNERS)[:n_atoms] + random.uniform(-0.09, 0.09, (n_atoms, 3))
        cell = edge * state.model.rcut * _SKEW
        names = [symbols[k % len(symbols)] for k in range(n_atoms)]
        atoms = with_parameters(ase.Atoms(names, corners @ cell, cell=cell, pbc=True), state)
        if _is_smooth(potential, state, atoms, cutoffs):
            atoms.pbc = pbc
            return atoms
    raise ValueError(f"no structure of {n_atoms} atoms keeps clear of the cutoffs of head {head!r}")


def _cutoffs(selection: Selection, rcut: float) -> Iterator[float]:
    rcut = selection.rcut or rcut
    yield rcut
    for shorter in selection.inner:
        yield from _cutoffs(shorter, rcut)


def _is_smooth(potential: Potential, state: HeadState, atoms: ase.Atoms, cutoffs: Iterable[float]) -> bool:
    pairs = find_candidates(atoms, state.model.rcut + _CLEARANCE)
    distances = torch.linalg.vector_norm(pairs.displacements(atoms), dim=1)
    if any(bool((torch.abs(distances - cutoff) < _CLEARANCE).any()) for cutoff in cutoffs):
        return False
    n_truncated = state.model.layouts(inputs_of(potential, atoms, state))[1]
    return len(distances) > 0 and n_truncated == 0


def with_parameters(atoms: ase.Atoms, state: HeadState) -> ase.Atoms:
    """Set the parameters that the head reads."""
    random = np.random.default_rng(len(atoms))
    fitting = state.model.fitting
    if fitting.numb_fparam:
        atoms.info["fparam"] = random.uniform(-1.0, 1.0, fitting.numb_fparam)
    if fitting.numb_aparam:
        atoms.arrays["aparam"] = random.uniform(-1.0, 1.0, (len(atoms), fitting.numb_aparam))
    atoms.info |= {"charge": 1, "spin": 2}
    return atoms


@contextlib.contextmanager
def any_element() -> Iterator[None]:
    """Elements that the head never saw in training test the mathematics as well as others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PredictionWarning)
        yield


def inputs_of(potential: Potential, atoms: ase.Atoms, state: HeadState) -> GraphInputs:
    """Inputs of the graph for one structure."""
    with any_element():
        return potential.inputs([atoms], [find_candidates(atoms, state.model.rcut)], state)


def structures_of_all_kinds(potential: Potential, head: str) -> list[ase.Atoms]:
    """A cell, one atom, a cluster, two cells and a pair: sizes for one batch or one graph."""
    cell, cluster = (example_structure(potential, head, pbc=pbc) for pbc in (True, False))
    return [cell, cluster[:1], cluster, cell.repeat((1, 2, 1)), cluster[3:5]]
