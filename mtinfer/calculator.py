"""ASE calculator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ase
import torch
from ase.calculators.calculator import (
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)

from .errors import MtinferError
from .graph import CompileMode
from .neighbors import VerletList
from .potential import Potential, load

__all__ = ["MTCalculator"]

#: keywords of deepmd-kit's `DP` that have no meaning here -> why
_FOREIGN_KEYWORDS = {
    "label": "it only names output files of deepmd-kit",
    "neighbor_list": "neighbours are found by vesin with a Verlet skin; set skin= instead",
    "auto_batch_size": "frames are batched by mtinfer.load(...).evaluate(list_of_atoms)",
    "no_jit": "say compile=False to evaluate eagerly",
}


class MTCalculator(Calculator):
    """Energies, forces and stress of one head at a time; setting `head` swaps it in place.

    Parameters
    ----------
    model
        file (checkpoint or converted), or a loaded `Potential`, which calculators may share.
    head
        name or alias; may be left out where the file has only one.
    device, dtype, compile, tabulate
        as in `mtinfer.load`; only where `model` is a file.
    skin
        Å by which the neighbour search exceeds the cutoff; a new search is made only when atoms may have
        crossed it. 0 searches at every step.
    type_dict
        accepted for scripts written for deepmd-kit's `DP`: symbol -> index; must agree with the type map.

    Notes
    -----
    Results: energy, free_energy, energies, forces, stress (periodic in three directions; eV/Å^3, Voigt), and
    ``results["virial"]`` (3, 3), eV. Parameters of a structure are read from ``atoms.info["fparam"]``,
    ``atoms.arrays["aparam"]``, ``atoms.info["charge"]`` and ``atoms.info["spin"]``. Copies share the
    potential; pickles, as for a pool of processes, hold the path of the file, which is loaded again.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self,
        model: str | os.PathLike[str] | Potential,
        head: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool | CompileMode = True,
        tabulate: bool = False,
        skin: float = 1.0,
        type_dict: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        for keyword in kwargs.keys() & _FOREIGN_KEYWORDS.keys():
            raise TypeError(f"MTCalculator does not take {keyword}=: {_FOREIGN_KEYWORDS[keyword]}")
        if skin < 0:
            raise ValueError(f"skin={skin} is negative; give 0 or more, in Å")
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        if isinstance(model, Potential):
            if device is not None or dtype is not None or tabulate:
                raise TypeError(
                    "device=, dtype= and tabulate= belong to mtinfer.load; the model given is loaded already"
                )
            self.potential = model
        else:
            self.potential = load(model, device=device, dtype=dtype, compile=compile, tabulate=tabulate)
        self._state = self.potential.head(head)
        self._lists: dict[float, VerletList] = {}
        self.skin = skin
        if type_dict is not None:
            self._check_type_dict(type_dict)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads to choose from."""
        return self.potential.heads

    @property
    def head(self) -> str:
        """Name of the head in use; assigning a name or alias swaps it and invalidates the results."""
        return self._state.name

    @head.setter
    def head(self, name: str) -> None:
        self._state = self.potential.head(name)
        self.reset()  # type: ignore[no-untyped-call]

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate `atoms` with the head in use; called by ASE."""
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        if self.atoms is None:
            raise CalculatorSetupError("no structure was given; set atoms.calc, or pass atoms")
        structure, state = self.atoms, self._state
        rcut = state.model.rcut
        neighbors = self._lists.setdefault(rcut, VerletList(rcut, self.skin))
        inputs = self.potential.inputs([structure], [neighbors.candidates(structure)], state)
        prediction = self.potential.predict(inputs, state)[0]
        self.results = {
            "energy": prediction.energy,
            "free_energy": prediction.energy,
            "energies": prediction.atom_energy,
            "forces": prediction.forces,
            "virial": prediction.virial,
        }
        if structure.cell.rank == 3 and structure.pbc.any():
            self.results["stress"] = prediction.stress(structure.get_volume())
        elif properties and "stress" in properties:
            raise PropertyNotImplementedError(
                f"stress needs a periodic structure with a volume; got pbc={structure.pbc.tolist()} and "
                f'cell {structure.cell.tolist()} (results["virial"] holds the virial)'
            )

    def check_state(self, atoms: ase.Atoms, tol: float = 1e-15) -> list[str]:
        """Changes since the last calculation, those of the parameters of a structure included."""
        changes: list[str] = super().check_state(atoms, tol)  # type: ignore[no-untyped-call]
        if self.atoms is not None and not changes and _parameters(self.atoms) != _parameters(atoms):
            changes.append("info")
        return changes

    def __getstate__(self) -> dict[str, Any]:
        """All but the state of the head, which is the potential's."""
        return {**self.__dict__, "_state": self.head}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._state = self.potential.head(state["_state"])

    def _check_type_dict(self, type_dict: Mapping[str, int]) -> None:
        type_map = self._state.model.type_map
        for symbol, index in type_dict.items():
            if not 0 <= index < len(type_map) or type_map[index] != symbol:
                raise MtinferError(
                    f"type_dict maps {symbol} to {index}, but the type map of head {self.head!r} is "
                    f"{dict(zip(type_map, range(len(type_map)), strict=True))}; leave type_dict out"
                )


def _parameters(atoms: ase.Atoms) -> dict[str, Any]:
    values = {name: atoms.info.get(name) for name in ("fparam", "charge", "spin")}
    values["aparam"] = atoms.arrays.get("aparam")
    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in values.items()
        if value is not None
    }
