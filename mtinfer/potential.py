"""A loaded file: pick a head, hand over structures, get energies, forces and virials."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import ase
import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .checkpoint.heads import find_head
from .errors import PredictionWarning, StructureError, UnsupportedModelError, nearest, user_level
from .graph import Compilation, CompileMode, SharedGraph, compile_mode
from .heads import HeadState, Refused
from .inputs import GraphInputs, Prediction
from .models import EnergyModel, edge_gradients, forces_and_virial
from .models.layout import Layout, Selection
from .models.tabulated import covers
from .neighbors import Candidates, find_candidates, graph_inputs
from .parameters import aparam_of, charge_spin_of, fparam_of
from .value_graphs import ValueGraphs

__all__ = ["Potential", "truncation"]


class Potential:
    """All heads of a file; those of one architecture share one graph.

    Made by `load`. A pickle of it names the file, which is loaded again unless it has changed; a deep copy is
    the potential itself.
    """

    def __init__(
        self,
        heads: Mapping[str, HeadState],
        refused: Mapping[str, Refused],
        device: torch.device,
        *,
        loads_again: partial[Potential] | None = None,
    ):
        self._loads_again = loads_again
        self._heads = dict(heads)
        self._refused = dict(refused)
        self._warned: set[str] = set()
        self._values = ValueGraphs()
        self.device = device

    def __reduce__(self) -> tuple[Any, ...]:
        if self._loads_again is None:
            raise TypeError("only a Potential made by mtinfer.load can be pickled: its file is loaded again")
        return partial(self._loads_again, compile=self._compilation.mode), ()

    def __repr__(self) -> str:
        return f"Potential(heads={self.heads}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: object) -> Potential:
        return self

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that can be evaluated, in the order of the file."""
        return tuple(self._heads)

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Aliases of every head."""
        return {name: state.aliases for name, state in self._heads.items()}

    @property
    def refused(self) -> dict[str, str]:
        """Heads of the file that can't be evaluated, and why."""
        return {name: refused.reason for name, refused in self._refused.items()}

    @property
    def graphs_compiled(self) -> int:
        """How many graphs were compiled in this process for this potential."""
        return sum(graph.n_compiled for graph in self.graphs)

    @property
    def graphs(self) -> list[SharedGraph]:
        """One per architecture; and where they were needed those of `energies`, and of stages."""
        states = [own for state in self._heads.values() for own in (state, state.exact) if own is not None]
        shared = {id(state.stages): state.stages for state in states}.values()
        own = [graph for stages in shared for graph in (stages.whole, *stages.graphs)]
        return own + self._values.graphs

    @property
    def _compilation(self) -> Compilation:
        """What all graphs share."""
        return next(iter(self._heads.values())).graph.compilation

    @property
    def type_map(self) -> tuple[str, ...]:
        """Elements that every head knows, in the order of the first head."""
        first, *others = (state.model.type_map for state in self._heads.values())
        return tuple(symbol for symbol in first if all(symbol in other for other in others))

    @property
    def rcut(self) -> float:
        """Largest cutoff of all heads, Å."""
        return max(state.model.rcut for state in self._heads.values())

    def compile(self, mode: bool | CompileMode) -> None:
        """Choose when the graphs of all heads are compiled, as `mtinfer.load` has it.

        Those that were given up, which a `GraphWarning` said, are tried again.

        Raises
        ------
        ValueError
            There is no such mode.
        """
        self._compilation.mode = compile_mode(mode)
        for graph in self.graphs:
            graph.again()

    def head(self, name: str | None = None) -> HeadState:
        """Find a head by name or alias; None picks the only one of the file, or the one called ``Default``.

        Raises
        ------
        UnknownHeadError
            If there is no such head, or none was named where several exist; lists the heads.
        UnsupportedModelError
            If the head uses a feature that is not supported.
        """
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"head={name!r} is not a name; Potential.energies takes several")
        refused = {head: known.aliases for head, known in self._refused.items()}
        found = find_head(name, {**self.aliases, **refused})
        if found in self._refused:
            raise UnsupportedModelError(self._refused[found].reason)
        return self._heads[found]

    @overload
    def evaluate(
        self,
        atoms: ase.Atoms,
        head: str | None = None,
        *,
        fparam: ArrayLike | None = None,
        aparam: ArrayLike | None = None,
        charge_spin: ArrayLike | None = None,
    ) -> Prediction: ...
    @overload
    def evaluate(
        self,
        atoms: Sequence[ase.Atoms],
        head: str | None = None,
        *,
        fparam: ArrayLike | None = None,
        charge_spin: ArrayLike | None = None,
    ) -> list[Prediction]: ...

    def evaluate(
        self,
        atoms: ase.Atoms | Sequence[ase.Atoms],
        head: str | None = None,
        *,
        fparam: ArrayLike | None = None,
        aparam: ArrayLike | None = None,
        charge_spin: ArrayLike | None = None,
    ) -> Prediction | list[Prediction]:
        """Energy, atomic energies, forces and virial of one structure or several of any sizes.

        Parameters
        ----------
        atoms
            one structure, or a sequence of them, which is evaluated in one batch.
        head
            name or alias; may be left out where the file has only one.
        fparam
            shape (numb_fparam,), for all structures; else ``atoms.info["fparam"]``, else the model's default.
        aparam
            shape (n_atoms, numb_aparam), for a single structure; else ``atoms.arrays["aparam"]``.
        charge_spin
            shape (2,), total charge and spin; else ``atoms.info["charge"]`` and ``["spin"]``, else the
            model's default.

        Returns
        -------
        a `Prediction`, or a list of them

        Raises
        ------
        StructureError
            Unknown element, positions that are not finite, singular cell, missing parameters.
        """
        state = self.head(head)
        if isinstance(atoms, ase.Atoms):
            candidates = [find_candidates(atoms, state.model.rcut)]
            inputs = self.inputs([atoms], candidates, state, fparam, aparam, charge_spin)
            return self.predict(inputs, state)[0]
        structures = _structures(atoms)
        if aparam is not None:
            raise StructureError(
                'aparam= is for a single structure; set atoms.arrays["aparam"] of every structure instead'
            )
        if not structures:
            return []
        candidates = [find_candidates(structure, state.model.rcut) for structure in structures]
        return self.predict(self.inputs(structures, candidates, state, fparam, None, charge_spin), state)

    @torch.inference_mode(False)  # there would be no derivatives in a caller's inference mode
    def inputs(
        self,
        structures: Sequence[ase.Atoms],
        candidates: Sequence[Candidates],
        state: HeadState,
        fparam: ArrayLike | None = None,
        aparam: ArrayLike | None = None,
        charge_spin: ArrayLike | None = None,
        *,
        type_dict: Mapping[str, int] | None = None,
    ) -> GraphInputs:
        """Structures and their candidate pairs as the model takes them; see `evaluate` for the parameters.

        Parameters
        ----------
        type_dict
            symbol -> index into the type map; default: what the type map says.
        """
        fparam, aparam, charge_spin = self._parameters(structures, state, fparam, aparam, charge_spin)
        return graph_inputs(
            structures,
            candidates,
            [self._types(structure, state, type_dict) for structure in structures],
            state.model.rcut,
            fparam=fparam,
            aparam=aparam,
            charge_spin=charge_spin,
        )

    def _parameters(
        self,
        structures: Sequence[ase.Atoms],
        state: HeadState,
        fparam: ArrayLike | None = None,
        aparam: ArrayLike | None = None,
        charge_spin: ArrayLike | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`fparam`, `aparam` and `charge_spin` of `GraphInputs`."""
        model, found = state.model, []
        for k, atoms in enumerate(structures):
            try:
                own = fparam_of(atoms, model, state.default_fparam, fparam), aparam_of(atoms, model, aparam)
                found.append((*own, charge_spin_of(atoms, model, charge_spin)))
            except StructureError as err:
                where = f", structure {k}" if len(structures) > 1 else ""
                raise StructureError(f"head {state.name!r}{where}: {err}") from err
        of_frames, of_atoms, charges = zip(*found, strict=True)
        arrays = np.stack(of_frames), np.concatenate(of_atoms), np.stack(charges)
        first, second, third = (torch.from_numpy(array).to(self.device) for array in arrays)
        return first, second, third

    @torch.inference_mode(False)
    def energies(
        self, atoms: ase.Atoms | Sequence[ase.Atoms], heads: str | Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Energies alone, of several heads at once; heads with the same descriptor evaluate it once.

        For comparing heads and for screening: K heads cost one descriptor without derivatives, and K fitting
        nets.

        Parameters
        ----------
        atoms
            one structure or several of any sizes; their parameters are read as `evaluate` reads them.
        heads
            name or alias, or several; default: all heads.

        Returns
        -------
        name of the head -> shape (n_structures,), eV

        Raises
        ------
        StructureError, UnknownHeadError, UnsupportedModelError
            As `evaluate` and `head` do.
        """
        structures = _structures(atoms)
        heads = [heads] if isinstance(heads, str) else heads
        chosen = [self.head(name) for name in (self.heads if heads is None else heads)]
        states = [state.exact or state for state in chosen]
        energies = {state.name: np.zeros(len(structures)) for state in states}
        if states:
            self._compilation.n_answers += 1
        for family in self._values.families(states) if structures else ():
            first = family[0]
            candidates = [find_candidates(structure, first.model.rcut) for structure in structures]
            inputs = self.inputs(structures, candidates, first)
            layouts = self._layouts(inputs, first)
            with torch.autocast(self.device.type, enabled=False):
                described = self._values.describe(layouts, first)
            for state in family:
                for structure in structures:
                    self._types(structure, state)  # warns of elements that this head never saw
                fparam, aparam, _ = self._parameters(structures, state)
                own = replace(inputs, fparam=fparam, aparam=aparam)
                with torch.autocast(self.device.type, enabled=False):
                    energies[state.name] = self._values.fit(described, own, state).numpy()
                if not np.isfinite(energies[state.name]).all():
                    raise StructureError(_not_finite(inputs))
        return energies

    def _layouts(self, inputs: GraphInputs, state: HeadState) -> list[Layout]:
        layouts, n_truncated = state.model.layouts(inputs)
        if n_truncated:
            text = truncation(n_truncated, inputs.n_atoms, state.name, state.model)
            self._warn(
                f"{text}; the nearest are used, as in training, and the energy is not smooth there "
                "(said once, of the structures evaluated first)",
                key=f"truncated {state.name}",
            )
        return layouts

    @torch.inference_mode(False)
    def predict(self, inputs: GraphInputs, state: HeadState) -> list[Prediction]:
        """Evaluate a head on prepared inputs, one prediction per structure."""
        if state.exact is not None and not covers(state.model.descriptor, inputs):
            state = state.exact
        self._compilation.n_answers += 1
        layouts = self._layouts(inputs, state)
        energies = state.bias[inputs.types]
        gradients = []
        with torch.autocast(self.device.type, enabled=False):  # of the caller, to half precision
            for layout in layouts:
                atom_energies, *gradient = self._call(layout, state)
                energies[layout.atoms] += atom_energies
                gradients.append(gradient)
        forces, virials = forces_and_virial(edge_gradients(layouts, gradients, inputs), inputs)
        energies, forces, virials = (x.cpu() for x in (energies, forces, virials))
        if not (torch.isfinite(energies).all() and torch.isfinite(forces).all()):
            raise StructureError(_not_finite(inputs))
        return [
            Prediction(
                energy=float(atom_energy.sum()),
                # copies, so that one kept prediction does not keep those of all structures
                atom_energy=atom_energy.clone().numpy(),
                forces=force.clone().numpy(),
                virial=virial.clone().numpy(),
                head=state.name,
            )
            for atom_energy, force, virial in zip(
                torch.split(energies, inputs.sizes), torch.split(forces, inputs.sizes), virials, strict=True
            )
        ]

    def _call(self, layout: Layout, state: HeadState) -> tuple[Tensor, ...]:
        """Atomic energies and gradients of a layout: through the graph, or in parts where it is too large."""
        if not state.model.is_large(layout):
            return state.graph((*layout.displacements, *layout.tensors), state.weights[layout.group])
        named = state.named(layout.group)
        return state.model.in_parts(layout.displacements, layout.tensors, named, state.stages)

    def _types(
        self, atoms: ase.Atoms, state: HeadState, type_dict: Mapping[str, int] | None = None
    ) -> NDArray[np.int64]:
        type_map = state.model.type_map
        index = {symbol: k for k, symbol in enumerate(type_map)} if type_dict is None else type_dict
        numbers = {number: _symbol(number) for number in set(atoms.numbers.tolist())}
        unknown = [number for number, symbol in numbers.items() if symbol not in index]
        if unknown:
            position = int(np.isin(atoms.numbers, unknown).argmax())
            symbol = numbers[int(atoms.numbers[position])]
            what = f"head {state.name!r} does not know; its type map is {', '.join(type_map)}"
            if type_dict is not None:
                what = f"type_dict lacks; it has {', '.join(type_dict) or 'none'}"
            raise StructureError(f"atom {position} is {symbol}, which {what}{nearest(symbol, index)}")
        if state.observed_types is not None:
            seen = {symbol for symbol, t in index.items() if type_map[t] in state.observed_types}
            for symbol in sorted(set(numbers.values()) - seen):
                self._warn(
                    f"head {state.name!r} never saw {symbol} in training (it saw "
                    f"{', '.join(sorted(state.observed_types))}); its numbers for {symbol} mean little",
                    key=f"unseen {state.name} {symbol}",
                )
        types = np.zeros(len(atoms), dtype=np.int64)
        for number, symbol in numbers.items():
            types[atoms.numbers == number] = index[symbol]
        return types

    def _warn(self, text: str, *, key: str) -> None:
        """Warn once per potential and key."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, PredictionWarning, stacklevel=user_level())


def _symbol(number: int) -> str:
    return chemical_symbols[number] if 0 <= number < len(chemical_symbols) else f"element {number}"


def _structures(atoms: Any) -> list[ase.Atoms]:
    structures = [atoms] if isinstance(atoms, ase.Atoms) else list(atoms)
    for structure in structures:
        if not isinstance(structure, ase.Atoms):
            raise TypeError(f"{atoms!r} is no ase.Atoms, nor a list of them; ase.io.read reads files")
    return structures


def _not_finite(inputs: GraphInputs) -> str:
    """Say which atoms are too close, where energy or forces are not finite."""
    text = "energy or forces are not finite"
    if inputs.displacements.shape[0]:
        distances = torch.linalg.vector_norm(inputs.displacements, dim=1)
        pair = int(distances.argmin())
        frame = inputs.frames[inputs.centers[pair]]
        first_of_frame = int(torch.searchsorted(inputs.frames, frame))
        a, b = sorted(int(ends[pair]) - first_of_frame for ends in (inputs.centers, inputs.neighbors))
        apart = f"{float(distances[pair]):.3g} Å"
        of_which = f" of structure {int(frame)}" if inputs.n_frames > 1 else ""
        text += f"; the closest atoms, {a} and {b}{of_which}, are {apart} apart"
    return f"{text}: check the step before this structure"


def truncation(n_truncated: int, n_atoms: int, head: str, model: EnergyModel) -> str:
    """Say how many atoms have more neighbours than a head keeps."""
    limits = _limits(model.descriptor.selection, model.rcut)
    return f"{n_truncated} of {n_atoms} atoms have more neighbours than head {head!r} keeps ({limits})"


def _limits(selection: Selection, rcut: float) -> str:
    """How many neighbours the lists of a model hold, and within which cutoffs."""
    rcut = selection.rcut or rcut
    own = [] if selection.sel is None else [f"{'+'.join(map(str, selection.sel))} within {rcut:g} Å"]
    return ", ".join(own + [_limits(shorter, rcut) for shorter in selection.inner if shorter.sel])
