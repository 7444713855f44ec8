"""From atoms to `GraphInputs`; the only place that knows periodic images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ase
import numpy as np
import torch
from ase.geometry import complete_cell
from numpy.typing import NDArray
from vesin import NeighborList

from .errors import StructureError
from .inputs import GraphInputs

__all__ = ["Candidates", "VerletList", "find_candidates", "graph_inputs"]


@dataclass(frozen=True)
class Candidates:
    """Pairs of one structure within a radius, sorted by centre: indices and periodic shifts."""

    #: (n_pairs,) int64
    centers: torch.Tensor
    #: (n_pairs,) int64
    neighbors: torch.Tensor
    #: (n_pairs, 3) float64, whole multiples of the cell vectors added to the neighbour
    shifts: torch.Tensor
    n_atoms: int

    def displacements(self, atoms: ase.Atoms) -> torch.Tensor:
        """r_j + shift·cell - r_i of a structure, shape (n_pairs, 3), Å."""
        device = self.centers.device
        positions = torch.from_numpy(positions_of(atoms)).to(device)
        cell = torch.from_numpy(np.array(atoms.cell, dtype=np.float64)).to(device)
        moved = positions.index_select(0, self.neighbors) - positions.index_select(0, self.centers)
        return moved.add_(self.shifts @ cell)

    def to(self, device: torch.device) -> Candidates:
        """Copy to `device`; no copy where it is there already."""
        if self.centers.device == device:
            return self
        centers, neighbors, shifts = (x.to(device) for x in (self.centers, self.neighbors, self.shifts))
        return Candidates(centers, neighbors, shifts, self.n_atoms)


def positions_of(atoms: ase.Atoms) -> NDArray[np.float64]:
    """Positions as native doubles, shape (n_atoms, 3), Å, whatever `atoms.arrays` holds."""
    return np.ascontiguousarray(atoms.get_positions(), dtype=np.float64)


def find_candidates(atoms: ase.Atoms, radius: float) -> Candidates:
    """All pairs of a structure no further apart than `radius`.

    Parameters
    ----------
    atoms
        positions may lie outside the cell; each axis is periodic or not on its own.
    radius
        Å.

    Raises
    ------
    StructureError
        For positions that are not finite, and for a cell without volume along its periodic axes.
    """
    positions = positions_of(atoms)
    check_geometry(atoms, positions)
    _check_extent(atoms, positions, radius)
    search = NeighborList(cutoff=radius, full_list=True, sorted=True, n_threads=torch.get_num_threads())
    pairs, shifts = search.compute(
        positions, box=_box(atoms), periodic=np.asarray(atoms.pbc, dtype=bool), quantities="PS"
    )
    pairs = torch.from_numpy(pairs.astype(np.int64))
    return Candidates(
        pairs[:, 0].contiguous(),
        pairs[:, 1].contiguous(),
        torch.from_numpy(shifts.astype(np.float64)),
        len(atoms),
    )


#: longest and thinnest structure along an axis, in cutoffs; the search fails beyond some 60,000 (vesin 0.6.2)
_LONGEST, _THINNEST = 20_000, 0.005
#: lattice vectors from the cell to the farthest atom; the search counts them in 32 bits
_FARTHEST = 2**30


def _check_extent(atoms: ase.Atoms, positions: NDArray[np.float64], radius: float) -> None:
    """Raise StructureError for structures that are too long or too thin for a neighbour search."""
    if not len(positions):
        return
    inverse = np.linalg.inv(_box(atoms))
    heights = 1.0 / np.linalg.norm(inverse, axis=0)
    fractional = positions @ inverse
    away = np.where(atoms.pbc, np.abs(fractional), 0.0).max(axis=1)
    if not away.max() < _FARTHEST:
        index = int(np.argmax(away))
        raise StructureError(
            f"atom {index} ({atoms.symbols[index]}) is {away[index]:.3g} lattice vectors away from the cell, "
            f"at {positions[index].tolist()}: check the step before this structure"
        )
    occupied = np.ptp(fractional, axis=0) * heights
    longest = float(np.where(atoms.pbc, heights, occupied).max())
    if longest > _LONGEST * radius:
        raise StructureError(
            f"the structure is {longest:.3g} Å long; neighbours are searched in up to "
            f"{_LONGEST * radius:.3g} Å: check its cell, and remove atoms that flew away"
        )
    thinnest = float(np.where(atoms.pbc, heights, np.inf).min())
    if thinnest < _THINNEST * radius:
        raise StructureError(
            f"cell {np.asarray(atoms.cell).tolist()} is {thinnest:.3g} Å high along a periodic axis; "
            "check its vectors"
        )


def check_geometry(atoms: ase.Atoms, positions: NDArray[np.float64]) -> None:
    """Raise StructureError for positions or cells that no neighbour list can be built from."""
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        index = int(np.argmin(finite))
        raise StructureError(
            f"position of atom {index} ({atoms.symbols[index]}) is {positions[index].tolist()}; "
            "positions must be finite numbers: check the step before this structure"
        )
    cell = np.asarray(atoms.cell)
    if not np.isfinite(cell).all():
        raise StructureError(f"cell is {cell.tolist()}; cell vectors must be finite numbers")
    periodic = cell[np.asarray(atoms.pbc, dtype=bool)]
    if len(periodic) and np.linalg.matrix_rank(periodic, tol=1e-6) < len(periodic):
        raise StructureError(
            f"cell {cell.tolist()} has no volume along its periodic axes (pbc={atoms.pbc.tolist()}); "
            "give it independent vectors there, or set pbc to False for that axis"
        )


def _box(atoms: ase.Atoms) -> NDArray[np.float64]:
    if not np.any(atoms.pbc):
        return np.eye(3)
    cell = np.array(atoms.cell, dtype=np.float64)
    cell[~np.asarray(atoms.pbc, dtype=bool)] = 0.0
    return np.asarray(complete_cell(cell), dtype=np.float64)


class VerletList:
    """Candidates of one evolving structure, searched again only when the skin may have been crossed.

    Strain of the cell does not count as movement: what remains of the displacements after the affine map of
    the cells decides, so that a barostat does not force a search at every step.

    Parameters
    ----------
    rcut
        cutoff of the model, Å.
    skin
        added to the cutoff when searching, Å; 0 searches whenever an atom has moved.
    device
        where the candidates are kept.
    """

    def __init__(self, rcut: float, skin: float, device: torch.device | None = None) -> None:
        self.rcut = rcut
        self.skin = skin
        self._device = device or torch.device("cpu")
        self.n_searches = 0
        self._candidates: Candidates | None = None
        self._positions = np.empty((0, 3))
        self._box = np.eye(3)
        self._pbc = np.zeros(3, dtype=bool)

    def candidates(self, atoms: ase.Atoms) -> Candidates:
        """All pairs no further apart than the cutoff, and some that are within the skin."""
        positions = positions_of(atoms)
        check_geometry(atoms, positions)
        if self._candidates is None or not self._still_covers(atoms, positions):
            self._candidates = find_candidates(atoms, self.rcut + self.skin).to(self._device)
            self._positions, self._box, self._pbc = positions, _box(atoms), atoms.pbc.copy()
            self.n_searches += 1
        return self._candidates

    def _still_covers(self, atoms: ase.Atoms, positions: NDArray[np.float64]) -> bool:
        if positions.shape != self._positions.shape or not np.array_equal(atoms.pbc, self._pbc):
            return False
        box = _box(atoms)
        reach = self.rcut + self.skin
        expected = self._positions
        if not np.array_equal(box, self._box):
            affine = np.linalg.solve(self._box, box)
            expected = expected @ affine
            reach *= np.linalg.svd(affine, compute_uv=False)[-1]
        moved = np.sqrt(((positions - expected) ** 2).sum(axis=1).max(initial=0.0))
        return bool(reach - 2.0 * moved >= self.rcut)


def graph_inputs(
    structures: Sequence[ase.Atoms],
    candidates: Sequence[Candidates],
    types: Sequence[NDArray[np.int64]],
    rcut: float,
    *,
    fparam: torch.Tensor,
    aparam: torch.Tensor,
    charge_spin: torch.Tensor,
) -> GraphInputs:
    """Concatenate structures and keep the pairs inside the cutoff.

    Parameters
    ----------
    structures, candidates, types
        atoms, their candidate pairs and the type index of every atom, one entry per structure.
    rcut
        Å.
    fparam, aparam, charge_spin
        as in `GraphInputs`; their device is the device of the result.
    """
    device = fparam.device
    centers, neighbors, displacements = [], [], []
    offset = 0
    for atoms, pairs in zip(structures, candidates, strict=True):
        pairs = pairs.to(device)
        vectors = pairs.displacements(atoms)
        # a product with ones is several times as fast as a sum over three columns
        squared = (vectors * vectors) @ vectors.new_ones(3)
        inside = (squared <= rcut * rcut).nonzero().squeeze(1)
        centers.append(pairs.centers.index_select(0, inside) + offset)
        neighbors.append(pairs.neighbors.index_select(0, inside) + offset)
        displacements.append(vectors.index_select(0, inside))
        offset += pairs.n_atoms
    sizes = [len(atoms) for atoms in structures]
    return GraphInputs(
        types=torch.from_numpy(np.concatenate(types)).to(device),
        frames=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device),
        centers=torch.cat(centers),
        neighbors=torch.cat(neighbors),
        displacements=torch.cat(displacements),
        fparam=fparam,
        aparam=aparam,
        charge_spin=charge_spin,
        sizes=sizes,
    )
