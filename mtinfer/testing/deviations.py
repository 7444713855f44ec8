"""How far two results may be apart."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..inputs import Prediction


@dataclass(frozen=True)
class Tolerance:
    """Largest deviations accepted, relative to the largest number compared where that exceeds 1.

    Energies in eV, forces in eV/Å, virials in eV.
    """

    #: the same sum in another order
    order: float
    #: compiled against eager
    compiled: float
    #: analytic against finite differences
    derivative: float


TOLERANCES = {
    torch.float64: Tolerance(order=1e-10, compiled=1e-10, derivative=1e-7),
    torch.float32: Tolerance(order=2e-4, compiled=2e-4, derivative=float("nan")),
}


def require_close(what: str, got: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    expected = np.asarray(expected)
    deviation = float(np.max(np.abs(np.asarray(got) - expected), initial=0.0))
    allowed = tolerance * max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    if not deviation <= allowed:
        raise AssertionError(f"{what}: largest deviation {deviation:.3g}, accepted {allowed:.3g}")


def require_same(what: str, got: Prediction, expected: Prediction, tolerance: float) -> None:
    """Compare every number of two predictions."""
    for field in fields(Prediction):
        value = getattr(expected, field.name)
        if not isinstance(value, str):
            require_close(f"{what}, {field.name}", getattr(got, field.name), value, tolerance)
