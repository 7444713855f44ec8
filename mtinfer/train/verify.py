"""Proof that what was trained is what is evaluated: every head, several ways, and how much they differ."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint.load import read
from ..data import Frame
from ..data.frame import make_frame
from ..errors import PredictionWarning, UnknownHeadError, first_line
from ..evaluate.run import batches
from ..heads import HeadState
from ..inputs import Prediction
from ..loading import load
from ..parameters import aparam_of, charge_spin_of, fparam_of
from ..potential import Potential
from .batch import make_batch
from .step import predict

__all__ = ["Difference", "Way", "sample_structures", "verify"]

#: largest differences accepted by the precision of the networks: energy per atom (eV), forces (eV/Å), virial
#: (eV); relative to the number where that is larger than 1
TOLERANCES = {torch.float64: (1e-10, 1e-10, 1e-9), torch.float32: (2e-6, 2e-5, 2e-4)}
_ATOMS_PER_BATCH = 2000


@dataclass(frozen=True)
class Difference:
    """Largest differences of one head between one way and eager evaluation."""

    head: str
    way: str
    n_frames: int
    #: eV per atom, eV/Å, eV; NaN where the way does not evaluate the head
    energy: float
    forces: float
    virial: float
    #: whether all are within the tolerance
    accepted: bool


class Numbers(NamedTuple):
    """What of a prediction is compared."""

    #: eV
    energy: float
    #: (n_atoms, 3), eV/Å
    forces: NDArray[np.float64]
    #: (3, 3), eV
    virial: NDArray[np.float64]


#: evaluates frames with a head
Way = Callable[[HeadState, Sequence[Frame]], Sequence[Numbers | Prediction]]


def verify(
    path: Path,
    frames: Sequence[Frame] | None = None,
    *,
    heads: Sequence[str] | None = None,
    compiled: bool = True,
) -> Iterator[Difference]:
    """Evaluate heads of a file several ways and compare.

    Eager evaluation is what the others are compared with: the function that training differentiates, the
    compiled graph, and deepmd-kit where it can be imported and the file is a checkpoint. Frames of other
    elements than a head was trained on are left out.

    Parameters
    ----------
    frames
        structures; None makes some up.
    heads
        names; None for all, those of which no frame has only elements that they know passed over.
    compiled
        whether to compile.

    Yields
    ------
    Difference
        Head by head, way by way.
    """
    eager = load(path, compile="off")
    ways: dict[str, Way] = {"training": _training(path)}
    if compiled:
        ways["compiled"] = _compiled(load(path, compile="wait"))
    if importlib.util.find_spec("deepmd") is not None and path.suffix == ".pt":
        try:
            ways["deepmd-kit"] = _deepmd(path, importlib.import_module("deepmd.infer").DeepPot)
        except Exception as err:  # built for another torch, say: nothing that speaks of the checkpoint
            warnings.warn(f"deepmd-kit can't be imported and is left out ({first_line(err)})", stacklevel=2)
    for reason in eager.refused.values() if heads is None else ():
        warnings.warn(f"left out: {reason}", stacklevel=2)
    states = [eager.head(name) for name in heads or eager.heads]
    of_heads = [sample_structures(state) if frames is None else _known(frames, state) for state in states]
    for state, chosen in zip(states, of_heads, strict=True):
        if not chosen and (heads or not any(of_heads)):
            raise UnknownHeadError(
                f"no frame has only elements that head {state.name!r} knows: "
                f"{', '.join(sorted(_seen(state)))}"
            )
        for way, evaluate in ways.items():
            # deepmd-kit knows cells that are periodic along all axes or none
            own = [f for f in chosen if way != "deepmd-kit" or len(set(f.atoms.pbc.tolist())) == 1]
            if not own:
                continue
            try:
                found = evaluate(state, own)
            except Exception as err:
                if way == "training":
                    raise
                warnings.warn(f"{way} does not evaluate head {state.name!r}: {first_line(err)}", stacklevel=2)
                yield Difference(state.name, way, len(own), math.nan, math.nan, math.nan, accepted=False)
            else:
                yield _compare(state, way, found, _potential(eager)(state, own))


def _compare(
    state: HeadState,
    way: str,
    found: Sequence[Numbers | Prediction],
    expected: Sequence[Numbers | Prediction],
) -> Difference:
    dtype = state.precision
    worst, accepted = [0.0, 0.0, 0.0], True
    for got, want in zip(found, expected, strict=True):
        n_atoms = len(want.forces)
        pairs = (
            (np.array(got.energy / n_atoms), np.array(want.energy / n_atoms)),
            (got.forces, want.forces),
            (got.virial, want.virial),
        )
        for k, ((a, b), tolerance) in enumerate(zip(pairs, TOLERANCES[dtype], strict=True)):
            difference = float(np.abs(a - b).max(initial=0.0))
            worst[k] = float(np.maximum(worst[k], difference))  # keeps NaN, unlike max()
            accepted = accepted and difference <= tolerance * max(1.0, float(np.abs(b).max(initial=0.0)))
    return Difference(state.name, way, len(found), worst[0], worst[1], worst[2], accepted)


def _potential(potential: Potential) -> Way:
    def evaluate(state: HeadState, frames: Sequence[Frame]) -> list[Prediction]:
        with warnings.catch_warnings():
            # whether the numbers mean something is not the question here
            warnings.simplefilter("ignore", PredictionWarning)
            return potential.evaluate([frame.atoms for frame in frames], state.name)

    return evaluate


def _compiled(potential: Potential) -> Way:
    evaluate = _potential(potential)

    def evaluate_compiled(state: HeadState, frames: Sequence[Frame]) -> Sequence[Numbers | Prediction]:
        found, own = evaluate(state, frames), potential.head(state.name)
        if any(graph.mode == "off" for graph in (own.graph, *own.stages.graphs)):
            raise RuntimeError("there is no compiled graph")
        return found

    return evaluate_compiled


def _training(path: Path) -> Way:
    """Evaluate with the function that the training step differentiates."""
    records = read(path).heads

    def evaluate(state: HeadState, frames: Sequence[Frame]) -> list[Numbers]:
        found: list[Numbers] = []
        for batch_frames in batches(frames, _ATOMS_PER_BATCH):
            batch = make_batch(batch_frames, state.model)
            energy, forces, virial = predict(state.model, batch.structures, records[state.name].weights)
            sizes = [len(frame.atoms) for frame in batch_frames]
            of_frames = zip(energy, forces.split(sizes), virial, strict=True)
            found += [Numbers(float(e), f.numpy(), w.reshape(3, 3).numpy()) for e, f, w in of_frames]
        return found

    return evaluate


def _deepmd(path: Path, deep_pot: Callable[..., Any]) -> Way:
    def evaluate(state: HeadState, frames: Sequence[Frame]) -> list[Numbers]:
        model = deep_pot(str(path), head=state.name, no_jit=True)
        index = {symbol: k for k, symbol in enumerate(model.get_type_map())}
        found = []
        for frame in frames:
            atoms, extra = frame.atoms, _parameters(frame.atoms, state)
            cell = atoms.cell.array.reshape(1, 9) if atoms.pbc.any() else None
            types = [index[symbol] for symbol in atoms.symbols]
            e, f, w = model.eval(atoms.positions[None], cell, types, **extra)[:3]
            found.append(Numbers(float(e[0, 0]), f[0], w[0].reshape(3, 3)))
        return found

    return evaluate


def _parameters(atoms: ase.Atoms, state: HeadState) -> dict[str, NDArray[np.float64]]:
    """What the model reads beside the atoms, as deepmd-kit takes it."""
    model, found = state.model, {}
    if model.fitting.numb_fparam:
        found["fparam"] = fparam_of(atoms, model, state.default_fparam)[None]
    if model.fitting.numb_aparam:
        found["aparam"] = aparam_of(atoms, model)[None]
    if model.descriptor.reads_charge_spin:
        found["charge_spin"] = charge_spin_of(atoms, model)[None]
    return found


def _known(frames: Sequence[Frame], state: HeadState) -> list[Frame]:
    """Frames of elements that the head was trained on."""
    return [frame for frame in frames if set(frame.atoms.get_chemical_symbols()) <= _seen(state)]


def _seen(state: HeadState) -> frozenset[str]:
    return state.observed_types or frozenset(state.model.type_map)


def sample_structures(state: HeadState) -> list[Frame]:
    """Make up a periodic crystal with noise, a cluster and a single atom, of elements that the head knows."""
    generator = np.random.default_rng(0)
    symbols = sorted(_seen(state))
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    structures = []
    for n_atoms, pbc in ((27, True), (9, False), (1, False)):
        positions = 2.1 * grid[:n_atoms] + generator.uniform(-0.25, 0.25, (n_atoms, 3))
        names = [symbols[k] for k in generator.integers(len(symbols), size=n_atoms)]
        structures.append(ase.Atoms(names, positions, cell=[6.4, 6.3, 6.5] if pbc else None, pbc=pbc))
    fitting = state.model.fitting
    frames = []
    for k, atoms in enumerate(structures):
        if fitting.numb_fparam:
            atoms.info["fparam"] = generator.uniform(0.0, 1.0, fitting.numb_fparam)
        if fitting.numb_aparam:
            atoms.arrays["aparam"] = generator.uniform(0.0, 1.0, (len(atoms), fitting.numb_aparam))
        if state.model.descriptor.reads_charge_spin:
            atoms.info |= {"charge": float(k - 1), "spin": float(k)}
        frames.append(make_frame(atoms, {}, dataset="made up", source="made up", index=k))
    return frames


def table(differences: Sequence[Difference]) -> Any:
    """Table for the terminal."""
    from rich.table import Table

    made = Table(title="largest differences from eager evaluation")
    for column in ("head", "way", "frames", "energy (eV/atom)", "forces (eV/Å)", "virial (eV)", ""):
        made.add_column(column, justify="left" if column in ("head", "way") else "right")
    for found in differences:
        numbers = (f"{value:.1e}" for value in (found.energy, found.forces, found.virial))
        failed = "failed" if math.isnan(found.energy) else "differs"
        made.add_row(found.head, found.way, str(found.n_frames), *numbers, "ok" if found.accepted else failed)
    return made
