"""ASE calculator."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any, SupportsFloat

import ase
import torch
from ase.calculators.calculator import (
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.data import chemical_symbols
from ase.outputs import Properties, all_outputs

from .errors import MtinferError, nearest
from .graph import CompileMode
from .heads import HeadState
from .loading import load
from .models import EnergyModel
from .neighbors import VerletList
from .potential import Potential

__all__ = ["MTCalculator"]

#: keywords of deepmd-kit's `DP` that have no meaning here -> why
_FOREIGN_KEYWORDS = {
    "label": "it only names output files of deepmd-kit",
    "neighbor_list": "neighbours are found by vesin with a Verlet skin; set skin= instead",
    "auto_batch_size": "frames are batched by mtinfer.load(...).evaluate(list_of_atoms)",
    "no_jit": "say compile=False to evaluate eagerly",
}


_KEYWORDS_OF_ASE = {"restart", "directory", "atoms"}
_KEYWORDS = (
    *("model", "head", "device", "dtype", "compile", "tabulate", "skin", "type_dict"),
    *sorted(_KEYWORDS_OF_ASE),
)


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
        crossed it. 0 searches whenever one has moved.
    type_dict
        as in deepmd-kit's `DP`: symbol -> index into the type map, where that does not hold the symbols of
        the structures.

    Notes
    -----
    Results: energy, free_energy, energies, forces, stress (where the cell has a volume and some axis is
    periodic; eV/Å³, Voigt), and ``results["virial"]`` (3, 3), eV, which is no property of ASE's:
    ``export_properties()``, and with it trajectories, leave it out. Parameters of a structure are read from
    ``atoms.info["fparam"]``, ``atoms.arrays["aparam"]``, ``atoms.info["charge"]`` and
    ``atoms.info["spin"]``. Copies share the potential; pickles, as for a pool of processes, hold the path of
    the file, which is loaded again.
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
        for keyword in kwargs.keys() - _KEYWORDS_OF_ASE:
            reason = _FOREIGN_KEYWORDS.get(keyword, f"it is unknown{nearest(keyword, _KEYWORDS)}")
            raise TypeError(f"MTCalculator does not take {keyword}=: {reason}")
        if not (isinstance(skin, SupportsFloat) and 0 <= skin < math.inf):
            raise ValueError(f"skin={skin!r}; expected a finite number of Å, 0 or more")
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        if isinstance(model, Potential):
            if device is not None or dtype is not None or tabulate or compile is not True:
                raise TypeError(
                    "device=, dtype=, compile= and tabulate= belong to mtinfer.load; the model given is "
                    "loaded already"
                )
            self.potential = model
        else:
            self.potential = load(model, device=device, dtype=dtype, compile=compile, tabulate=tabulate)
        self._state = self.potential.head(head)
        self._lists: dict[float, VerletList] = {}
        self._evaluated: dict[str, Any] = {}
        self._skin = skin
        self._type_dict = None if type_dict is None else dict(type_dict)
        self._check_type_dict(self._state)

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
        state = self.potential.head(name)
        self._check_type_dict(state)
        self._state = state
        self.reset()  # type: ignore[no-untyped-call]

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate `atoms` with the head in use; called by ASE."""
        self.results = {}  # else those of another structure would be found where this call fails
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        if self.atoms is None:
            raise CalculatorSetupError("no structure was given; set atoms.calc, or pass atoms")
        structure, state = self.atoms, self._state
        rcut = state.model.rcut
        neighbors = self._lists.setdefault(rcut, VerletList(rcut, self._skin, self.potential.device))
        found = [neighbors.candidates(structure)]
        inputs = self.potential.inputs([structure], found, state, type_dict=self._type_dict)
        prediction = self.potential.predict(inputs, state)[0]
        # a copy: arrays in `info` may be changed in place
        self._evaluated = _parameters(structure, state.model)
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

    def export_properties(self) -> Properties:
        """Results that ASE has a name for: all but the virial."""
        return Properties({name: value for name, value in self.results.items() if name in all_outputs})

    def check_state(self, atoms: ase.Atoms, tol: float = 1e-15) -> list[str]:
        """Changes since the last calculation, those of the parameters of a structure included."""
        changes: list[str] = super().check_state(atoms, tol)  # type: ignore[no-untyped-call]
        if self.atoms is None or changes:
            return changes
        return [] if self._evaluated == _parameters(atoms, self._state.model) else ["info"]

    def __copy__(self) -> MTCalculator:
        """Copy with neighbour lists of its own, which another thread may use."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.results, copied._lists = dict(self.results), {}
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """All but the state of the head, which is the potential's."""
        return {**self.__dict__, "_state": self.head}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._state = self.potential.head(state["_state"])

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Set ``head=``; nothing else can be set after the calculator was made."""
        if unknown := kwargs.keys() - {"head"}:
            raise TypeError(
                f"{min(unknown)}= can't be set; make another MTCalculator, which may share the model"
            )
        if "head" in kwargs and kwargs["head"] != self.head:
            self.head = kwargs["head"]
            return kwargs
        return {}

    def _check_type_dict(self, state: HeadState) -> None:
        type_map = state.model.type_map
        for symbol, index in (self._type_dict or {}).items():
            if not isinstance(index, Integral) or index not in range(len(type_map)):
                raise MtinferError(
                    f"type_dict maps {symbol} to {index!r}, but head {state.name!r} has the types "
                    f"{dict(enumerate(type_map))}"
                )
            if type_map[index] in chemical_symbols and type_map[index] != symbol:
                raise MtinferError(
                    f"type_dict maps {symbol} to {index}, which is {type_map[index]} in the type map of head "
                    f"{state.name!r}; leave type_dict out"
                )


def _parameters(atoms: ase.Atoms, model: EnergyModel) -> dict[str, Any]:
    """Copy what a model reads beside atoms."""
    names = ["fparam"] if model.fitting.numb_fparam else []
    if model.descriptor.reads_charge_spin:
        names += ["charge", "spin"]
    values = {name: atoms.info.get(name) for name in names}
    if model.fitting.numb_aparam:
        values["aparam"] = atoms.arrays.get("aparam")
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """Copy of a value that can be compared, arrays as lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else copy.deepcopy(value)
