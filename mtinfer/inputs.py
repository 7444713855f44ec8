"""The values that cross a boundary: what goes into a model, what comes out, what a weight must look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["GraphInputs", "ParameterSpec", "Prediction"]


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and dtype that a weight of a given name must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class GraphInputs:
    """One or several structures, concatenated, with every pair inside the cutoff.

    Neighbours are local indices plus a displacement: periodic images are already accounted for, and there
    are no ghost atoms. Pairs are sorted by centre.
    """

    #: (n_atoms,) int64, index into the type map
    types: torch.Tensor
    #: (n_atoms,) int64, structure that the atom belongs to, ascending
    frames: torch.Tensor
    #: (n_edges,) int64, centre i, ascending
    centers: torch.Tensor
    #: (n_edges,) int64, neighbour j
    neighbors: torch.Tensor
    #: (n_edges, 3) float64, Å, r_j - r_i with the periodic shift of j
    displacements: torch.Tensor
    #: (n_frames, numb_fparam) float64
    fparam: torch.Tensor
    #: (n_atoms, numb_aparam) float64
    aparam: torch.Tensor
    #: (n_frames, 2) float64, total charge and spin (read by DPA-3 models with a charge/spin embedding)
    charge_spin: torch.Tensor
    #: atoms of each structure
    sizes: list[int]

    @property
    def n_frames(self) -> int:
        return len(self.sizes)

    @property
    def n_atoms(self) -> int:
        return int(self.types.shape[0])


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a head says of one structure.

    Attributes
    ----------
    energy
        eV.
    atom_energy
        shape (n_atoms,), eV; sums to `energy`.
    forces
        shape (n_atoms, 3), eV/Å.
    virial
        shape (3, 3), eV, -dE/dε; positive diagonal under compression.
    head
        name.
    """

    energy: float
    atom_energy: NDArray[np.float64]
    forces: NDArray[np.float64]
    virial: NDArray[np.float64]
    head: str

    def stress(self, volume: float) -> NDArray[Any]:
        """Stress of a periodic structure.

        Parameters
        ----------
        volume
            Å³.

        Returns
        -------
        shape (6,), eV/Å³
            -virial / volume, symmetrised, Voigt order xx yy zz yz xz xy, ASE's sign (tension positive).

        Raises
        ------
        ValueError
            The volume is not positive.
        """
        if not volume > 0.0:
            raise ValueError(f"volume is {volume} Å³; a stress needs a cell with a positive one")
        stress = -0.5 * (self.virial + self.virial.T) / volume
        return stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
