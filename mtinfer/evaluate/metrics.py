"""Errors of predictions against labels, summed as they come, per head, dataset and quantity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..data import Frame
from ..inputs import Prediction

Array = NDArray[np.float64]

#: labels and predicted values of one frame, in arrays of one shape
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Quantity:
    """Something that labels and predictions both tell of a frame."""

    name: str
    unit: str
    #: returns None where the frame has no label for it
    pair: Callable[[Frame, Prediction], Pair | None]


def _energy(frame: Frame, prediction: Prediction) -> Pair | None:
    if frame.energy is None:
        return None
    return np.array([frame.energy]), np.array([prediction.energy])


def _forces(frame: Frame, prediction: Prediction) -> Pair | None:
    return None if frame.forces is None else (frame.forces.ravel(), prediction.forces.ravel())


def _virial(frame: Frame, prediction: Prediction) -> Pair | None:
    virial = frame.comparable_virial
    return None if virial is None else (virial.ravel(), prediction.virial.ravel())


def _stress(frame: Frame, prediction: Prediction) -> Pair | None:
    if frame.atoms.cell.rank < 3:
        return None
    return _divided(_virial(frame, prediction), -frame.atoms.cell.volume)


def _divided(pair: Pair | None, number: float) -> Pair | None:
    return None if pair is None else (pair[0] / number, pair[1] / number)


ENERGY_PER_ATOM = Quantity("energy_per_atom", "eV/atom", lambda f, p: _divided(_energy(f, p), len(f.atoms)))
FORCES = Quantity("forces", "eV/Å", _forces)
VIRIAL_PER_ATOM = Quantity("virial_per_atom", "eV/atom", lambda f, p: _divided(_virial(f, p), len(f.atoms)))

#: what is scored: energies count once per frame, forces once per component, virial and stress nine times
#: per frame that is periodic along some axis
SCORED = (
    Quantity("energy", "eV", _energy),
    ENERGY_PER_ATOM,
    FORCES,
    Quantity("virial", "eV", _virial),
    Quantity("stress", "eV/Å³", _stress),
)


@dataclass(frozen=True)
class Score:
    """Errors of one head in one quantity."""

    head: str
    #: path that the user gave, or None for all datasets together, every label counting alike
    dataset: str | None
    quantity: str
    unit: str
    #: how many numbers were compared
    n: int
    mae: float
    rmse: float
    #: largest absolute error
    max: float


@dataclass
class _ErrorSums:
    """Running sums over errors, each of which counts alike."""

    n: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    largest: float = 0.0

    def add(self, errors: Array) -> None:
        absolute = np.abs(errors)
        self.merge(
            _ErrorSums(errors.size, float(absolute.sum()), float((errors**2).sum()), float(absolute.max()))
        )

    def merge(self, other: _ErrorSums) -> None:
        self.n += other.n
        self.absolute += other.absolute
        self.squared += other.squared
        self.largest = float(np.maximum(self.largest, other.largest))  # keeps NaN, unlike max()

    def score(self, head: str, dataset: str | None, quantity: Quantity) -> Score:
        mae, rmse = self.absolute / self.n, math.sqrt(self.squared / self.n)
        return Score(head, dataset, quantity.name, quantity.unit, self.n, mae, rmse, self.largest)


@dataclass
class ErrorAccumulator:
    """Collects errors frame by frame; its size does not grow with the number of frames."""

    #: head -> dataset -> quantity -> sums
    _sums: dict[str, dict[str, dict[str, _ErrorSums]]] = field(default_factory=dict)

    def add(self, head: str, frame: Frame, prediction: Prediction) -> None:
        """Add the errors of all quantities that the frame has labels for."""
        sums = self._sums.setdefault(head, {}).setdefault(frame.dataset, {})
        for quantity in SCORED:
            pair = quantity.pair(frame, prediction)
            if pair is not None:
                sums.setdefault(quantity.name, _ErrorSums()).add(pair[1] - pair[0])

    def scores(self) -> tuple[Score, ...]:
        """Return the scores by head, dataset (then all datasets, where there are several) and quantity."""
        return tuple(score for head in self._sums for score in self._head_scores(head))

    def _head_scores(self, head: str) -> list[Score]:
        by_dataset = self._sums[head]
        groups: list[tuple[str | None, dict[str, _ErrorSums]]] = [*by_dataset.items()]
        if len(groups) > 1:
            groups.append((None, _total(by_dataset.values())))
        return [
            sums[quantity.name].score(head, dataset, quantity)
            for dataset, sums in groups
            for quantity in SCORED
            if quantity.name in sums
        ]


def _total(parts: Iterable[dict[str, _ErrorSums]]) -> dict[str, _ErrorSums]:
    total: dict[str, _ErrorSums] = {}
    for part in parts:
        for name, sums in part.items():
            total.setdefault(name, _ErrorSums()).merge(sums)
    return total
