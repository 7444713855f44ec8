"""Loss of a task: squared errors of energy, forces and virial, with prefactors tied to the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Labels

__all__ = ["LABELS", "Errors", "LossConfig"]

#: what a loss compares, in the order of prefactors and of `Batch.has`
LABELS = ("energy", "forces", "virial")


@dataclass(frozen=True)
class LossConfig:
    """Loss `ener` with mean squared errors; prefactors of energy, forces and virial."""

    #: at the first step
    start: tuple[float, float, float]
    #: approached as the learning rate goes to zero
    limit: tuple[float, float, float]
    #: divide energy and virial terms by the number of atoms squared instead of the number
    intensive: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LossConfig:
        """Read a completed section."""
        start, limit = (
            tuple(float(config[f"{edge}_pref_{label}"]) for label in "efv") for edge in ("start", "limit")
        )
        return cls(start, limit, bool(config["intensive_ener_virial"]))  # type: ignore[arg-type]

    def in_dialect(self, dialect: str) -> LossConfig:
        """Return the loss with the terms that count in a dialect.

        In `pt` a term with a prefactor of 0 at the start or at the limit is left out.
        """
        if dialect != "pt":
            return self
        kept = [all(ends) for ends in zip(self.start, self.limit, strict=True)]
        start, limit = (
            tuple(factor if keep else 0.0 for factor, keep in zip(factors, kept, strict=True))
            for factors in (self.start, self.limit)
        )
        return replace(self, start=start, limit=limit)  # type: ignore[arg-type]

    @property
    def counted(self) -> list[str]:
        """Labels that count at any step."""
        ends = zip(LABELS, self.start, self.limit, strict=True)
        return [name for name, start, limit in ends if start or limit]

    def labels(self, batch: Batch, ratio: float) -> Labels[Tensor]:
        """Labels of a batch with the weight of every squared error.

        p_E·mean_f(ΔE²/N^q) + p_F·Σ|ΔF|²/(3 Σ_f N) + p_V·mean_f(mean_9(ΔW²)/N^q), where q is 2 for an
        intensive loss and else 1, and each term runs over the frames of the batch that have its label.

        Parameters
        ----------
        ratio
            learning rate of the step over that at the start.
        """
        p_energy, p_forces, p_virial = (
            limit + (start - limit) * ratio for start, limit in zip(self.start, self.limit, strict=True)
        )
        mean = batch.mean_weights
        per_frame = batch.per_atom if self.intensive else 1.0
        return mean._replace(
            energy_weight=p_energy * mean.energy_weight * per_frame,
            force_weight=p_forces * mean.force_weight,
            virial_weight=p_virial * mean.virial_weight * per_frame,
        )


@dataclass(frozen=True)
class Errors:
    """Sums of squared errors, that add up over batches."""

    #: (3,), Σ(ΔE/N)², Σ|ΔF|², Σ(ΔW/N)²
    squares: Tensor
    #: (3,), terms in each sum
    counts: Tensor

    @classmethod
    def none(cls) -> Errors:
        """Return the errors of no batch."""
        return cls(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    @classmethod
    def of(cls, batch: Batch, energy: Tensor, forces: Tensor, virial: Tensor) -> Errors:
        """Compare predictions with the labels that the batch has."""
        differences = (energy - batch.energy).unsqueeze(1), forces - batch.forces, virial - batch.virial
        squares = [
            (difference * difference).sum(1) @ weight
            for difference, weight in zip(differences, batch.error_weights, strict=True)
        ]
        return cls(torch.stack(squares).cpu(), batch.n_terms)

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.squares + other.squares, self.counts + other.counts)

    @property
    def rmse(self) -> tuple[float | None, float | None, float | None]:
        """Root mean square errors: energy per atom (eV), force component (eV/Å), virial per atom (eV)."""
        energy, forces, virial = (
            float((square / count) ** 0.5) if count else None
            for square, count in zip(self.squares, self.counts, strict=True)
        )
        return energy, forces, virial
