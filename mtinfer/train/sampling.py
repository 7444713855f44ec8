"""Which frames a step sees: a task, one of its systems, a batch of that system.

Every draw is a function of the seed, the step and the number of batches drawn before, so that a resumed run
goes on exactly as the first would have.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers
from numpy.typing import NDArray

from ..data import Frame, read_frames
from ..errors import ConfigError, DataError, StructureError
from ..models import EnergyModel
from ..neighbors import check_geometry
from .batch import Batch, make_batch, type_indices
from .config import DataConfig

__all__ = ["Batches", "Sampler", "System", "load_systems"]

#: memory for prepared batches that come again
_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class System:
    """Frames that are shuffled and batched together: a deepmd/npy system, or one file."""

    frames: tuple[Frame, ...]
    batch_size: int

    @property
    def n_batches(self) -> int:
        return math.ceil(len(self.frames) / self.batch_size)

    def batch(self, order: NDArray[np.int64], position: int) -> tuple[int, ...]:
        """Frames of the batch at `position` of a shuffled pass, in their own order: a batch is a set."""
        start = position * self.batch_size
        return tuple(sorted(int(k) for k in order[start : start + self.batch_size]))


def elements(systems: Sequence[System]) -> set[str]:
    """Chemical symbols that are in the frames."""
    return {symbol for system in systems for frame in system.frames for symbol in frame.atoms.symbols}


def load_systems(config: DataConfig, type_map: Sequence[str], folder: Path) -> list[System]:
    """Read the data of a task.

    Parameters
    ----------
    folder
        where relative paths are looked up that do not exist in the working directory: that of the input.

    Raises
    ------
    DataError
        A path is missing or unreadable, or a frame has an element that is not in the type map, positions
        that are not finite, or a cell without volume along a periodic axis.
    ConfigError
        The number of batch sizes is not that of the systems that the paths hold, or no frame is as small as
        "filter:N" says.
    """
    found: list[list[Frame]] = []
    for name in config.systems:
        path = Path(name)
        path = path if path.exists() or path.is_absolute() else folder / path
        grouped: dict[str, list[Frame]] = {}
        for frame in read_frames([path], type_map=type_map):
            grouped.setdefault(frame.source, []).append(frame)
        found += grouped.values()
    given = config.batch_size
    sizes = given if isinstance(given, tuple) else (given,) * len(found)
    if len(sizes) != len(found):
        raise ConfigError(
            f"{config.where}.batch_size is {list(sizes)}; expected a number, or a list of {len(found)}, one "
            "per system that was found"
        )
    systems: list[System] = []
    for frames, size in zip(found, sizes, strict=True):
        if isinstance(size, str) and size.startswith("filter:"):
            frames = [frame for frame in frames if len(frame.atoms) <= int(size.partition(":")[2])]
        _check_elements(frames, type_map)
        _check_geometry(frames)
        if frames:
            systems.append(System(tuple(frames), _batch_size(size, frames)))
    if not systems:
        raise ConfigError(
            f"{config.where}.batch_size {given!r} leaves no frame of {', '.join(config.systems)}; give a "
            "larger number"
        )
    return systems


def _check_geometry(frames: Sequence[Frame]) -> None:
    """Raise a DataError that names the first frame without neighbours to find: now, not when it is drawn."""
    for frame in frames:
        try:
            check_geometry(frame.atoms, frame.atoms.get_positions())
        except StructureError as err:
            raise DataError(f"{frame.name}: {err}") from err


def _check_elements(frames: Sequence[Frame], type_map: Sequence[str]) -> None:
    """Raise a DataError that names the first frame with an element that is not in the type map."""
    known = {atomic_numbers[symbol] for symbol in type_map if symbol in atomic_numbers}
    for frame in frames:
        if not known.issuperset(frame.atoms.numbers.tolist()):
            type_indices(frame, type_map)


def _batch_size(size: int | str, frames: Sequence[Frame]) -> int:
    """Frames of a batch, if all were as large as the largest.

    At least N atoms for "auto:N"; at most N, or one frame, for "max:N" and "filter:N".
    """
    if isinstance(size, int):
        return size
    kind, _, number = size.partition(":")
    n_wanted, n_atoms = int(number or 32), max(len(frame.atoms) for frame in frames)
    return max(1, math.ceil(n_wanted / n_atoms) if kind == "auto" else n_wanted // n_atoms)


def system_probabilities(config: DataConfig, systems: Sequence[System]) -> NDArray[np.float64]:
    """Probability of each system of a task, shape (n_systems,).

    Raises
    ------
    ConfigError
        `sys_probs` has another length, or `auto_prob` is not understood.
    """
    n_batches = np.array([system.n_batches for system in systems], dtype=np.float64)
    if config.sys_probs is not None:
        weights = np.array(config.sys_probs)
        if len(weights) != len(systems) or not weights.sum():
            raise ConfigError(
                f"{config.where}.sys_probs is {list(config.sys_probs)}; expected a list of {len(systems)}, "
                "one per system, not all 0"
            )
    elif config.auto_prob == "prob_uniform":
        weights = np.ones(len(systems))
    else:
        weights = _block_weights(config.auto_prob, n_batches)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _block_weights(text: str, n_batches: NDArray[np.float64]) -> NDArray[np.float64]:
    """``prob_sys_size``, or ``prob_sys_size;0:3:0.5;3:7:0.5``: blocks of systems with their probability."""
    blocks = text.split(";")[1:]
    if not blocks:
        return n_batches
    weights = np.zeros_like(n_batches)
    for start, end, weight in (block.split(":") for block in blocks):
        part = slice(int(start), int(end))
        weights[part] = float(weight) * n_batches[part] / n_batches[part].sum()
    if not weights.sum() > 0:
        n = len(n_batches)
        raise ConfigError(
            f"auto_prob is {text!r}; its blocks must lie within 0:{n} and have a weight above 0"
        )
    return weights


def batches_per_epoch(systems: Sequence[System], probabilities: NDArray[np.float64]) -> int:
    """Steps of a task in which every system is expected to be seen whole."""
    n_batches = np.array([system.n_batches for system in systems], dtype=np.float64)
    drawn = probabilities > 0
    return math.ceil(float((n_batches[drawn] / probabilities[drawn]).max()))


@dataclass
class Sampler:
    """Draws the task and the batch of every step.

    Parameters
    ----------
    seed
        of all draws.
    tasks
        systems and their probabilities, one entry per task.
    probabilities
        shape (n_tasks,).
    rank, n_ranks
        all ranks draw the same task and system, and each its own batches.
    """

    seed: int
    tasks: Sequence[tuple[Sequence[System], NDArray[np.float64]]]
    probabilities: NDArray[np.float64]
    rank: int = 0
    n_ranks: int = 1
    #: batches drawn so far, per task and system, by all ranks; all that a resumed run needs
    drawn: list[list[int]] = field(default_factory=list)
    _orders: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.drawn:
            self.drawn = [[0] * len(systems) for systems, _ in self.tasks]

    def draw(self, step: int) -> tuple[int, int, tuple[int, ...]]:
        """Task, system and frames of a step."""
        generator = np.random.default_rng((self.seed, 1, step))
        task = _chosen(generator, self.probabilities)
        systems, probabilities = self.tasks[task]
        index = _chosen(generator, probabilities)
        count = self.drawn[task][index] + self.rank
        self.drawn[task][index] += self.n_ranks
        epoch, position = divmod(count, systems[index].n_batches)
        return task, index, systems[index].batch(self._order(task, index, epoch), position)

    def _order(self, task: int, index: int, epoch: int) -> NDArray[np.int64]:
        known = self._orders.get((task, index))
        if known is None or known[0] != epoch:
            generator = np.random.default_rng((self.seed, 2, task, index, epoch))
            known = epoch, generator.permutation(len(self.tasks[task][0][index].frames))
            self._orders[task, index] = known
        return known[1]


def _chosen(generator: np.random.Generator, probabilities: NDArray[np.float64]) -> int:
    """Draw as `Generator.choice` does, in a tenth of its time."""
    cumulative = probabilities.cumsum()
    return int((cumulative / cumulative[-1]).searchsorted(generator.random(), side="right"))


class Batches:
    """Makes batches, and keeps those that come again while memory allows.

    Parameters
    ----------
    models
        one per task.
    device
        where they are put.
    """

    def __init__(self, models: Sequence[EnergyModel], device: torch.device | None = None) -> None:
        self._models, self._device = models, device or torch.device("cpu")
        self._kept: OrderedDict[tuple[int, int, tuple[int, ...]], Batch] = OrderedDict()
        self._n_bytes = 0

    def __call__(self, task: int, index: int, system: System, chosen: tuple[int, ...]) -> Batch:
        """Batch of some frames of a system; `index` tells the system from the others of its task."""
        key = (task, index, chosen)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        batch = make_batch([system.frames[k] for k in chosen], self._models[task]).to(self._device)
        if system.batch_size == 1 or system.n_batches == 1:
            self._keep(key, batch)
        return batch

    def _keep(self, key: tuple[int, int, tuple[int, ...]], batch: Batch) -> None:
        self._kept[key] = batch
        self._n_bytes += batch.n_bytes
        while self._n_bytes > _CACHE_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._n_bytes -= dropped.n_bytes
