"""What a model reads of a structure beside its atoms: frame and atomic parameters, charge and spin."""

from __future__ import annotations

from typing import Any

import ase
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import StructureError
from .models import EnergyModel
from .models.dpa3 import CHARGES, SPINS

__all__ = ["aparam_of", "charge_spin_of", "fparam_of"]


def fparam_of(
    atoms: ase.Atoms, model: EnergyModel, default: ArrayLike | None, given: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Frame parameters, shape (numb_fparam,): those given, else ``atoms.info["fparam"]``, else the default.

    Raises
    ------
    StructureError
        If there are none and the model needs some, or of another shape; if some were given to a model that
        takes none.
    """
    size = model.fitting.numb_fparam
    if not size:
        return _none("fparam", given, (0,))
    value = given if given is not None else _of_info(atoms, "fparam", default)
    if value is None:
        raise StructureError(
            f"the model needs {size} frame parameter{'s' * (size > 1)} and has no default; "
            'set atoms.info["fparam"], in files fparam= (extxyz) or fparam.npy, or pass fparam='
        )
    return _shaped("fparam", value, (size,))


def _of_info(atoms: ase.Atoms, key: str, default: Any) -> Any:
    value = atoms.info.get(key)
    return default if value is None else value


def aparam_of(atoms: ase.Atoms, model: EnergyModel, given: ArrayLike | None = None) -> NDArray[np.float64]:
    """Atomic parameters, shape (n_atoms, numb_aparam): those given, else ``atoms.arrays["aparam"]``.

    Raises
    ------
    StructureError
        As `fparam_of` does.
    """
    shape = (len(atoms), model.fitting.numb_aparam)
    if not shape[1]:
        return _none("aparam", given, shape)
    value = given if given is not None else atoms.arrays.get("aparam")
    if value is None:
        raise StructureError(
            f"the model needs {shape[1]} parameter{'s' * (shape[1] > 1)} of every atom; "
            'set atoms.arrays["aparam"], in files a column aparam (extxyz) or aparam.npy, or pass aparam='
        )
    return _shaped("aparam", value, shape)


def charge_spin_of(
    atoms: ase.Atoms, model: EnergyModel, given: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Total charge and spin, shape (2,): those given, else those of ``atoms.info``, else the model's default.

    Zeros where the model does not read them.

    Raises
    ------
    StructureError
        If they are no whole numbers in the range that models know, or missing and the model has no default;
        if they were given to a model that does not read them.
    """
    if not model.descriptor.reads_charge_spin:
        return _none("charge_spin", given, (2,))
    if given is None:
        charge, spin = model.descriptor.default_chg_spin or (None, None)
        own = [_of_info(atoms, "charge", charge), _of_info(atoms, "spin", spin)]
        if any(number is None for number in own):
            raise StructureError(
                "the model needs the total charge and spin and has no default; "
                'set atoms.info["charge"] and atoms.info["spin"], in extxyz files charge= and spin=, or pass '
                "charge_spin="
            )
        given = own
    array = _shaped("charge_spin", given, (2,))
    if array[0] not in CHARGES or array[1] not in SPINS:
        raise StructureError(
            f"charge and spin are {array.tolist()}; the model knows whole charges from {CHARGES[0]} to "
            f"{CHARGES[-1]} and whole spins from {SPINS[0]} to {SPINS[-1]}"
        )
    return array


def _none(name: str, given: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if given is not None:
        raise StructureError(f"{name}= was given, but the model takes none; leave it out")
    return np.zeros(shape)


def _shaped(name: str, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise StructureError(f"{name} is {value!r}; the model needs numbers, shape {shape}") from None
    if [n for n in array.shape if n != 1] != [n for n in shape if n != 1]:  # axes of one may be left out
        raise StructureError(f"{name} has shape {array.shape}; the model needs {shape}")
    if not np.isfinite(array).all():
        raise StructureError(f"{name} is {value!r}; it must be finite numbers")
    return array.reshape(shape)
