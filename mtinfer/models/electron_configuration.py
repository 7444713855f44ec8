"""Electron configurations of the elements as 118-long vectors, for the `econf` type embedding."""

from __future__ import annotations

import math

from ..errors import UnsupportedModelError

_SYMBOLS = tuple(
    """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
    Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu
    Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr
    Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
    """.split()  # noqa: SIM905
)

#: subshells in the order of the vector, and in Madelung filling order
_VECTOR_ORDER = tuple("1s 2s 2p 3s 3p 3d 4s 4p 4d 4f 5s 5p 5d 5f 6s 6p 6d 7s 7p".split())  # noqa: SIM905
_FILLING_ORDER = tuple("1s 2s 2p 3s 3p 4s 3d 4p 5s 4d 5p 6s 4f 5d 6p 7s 5f 6d 7p".split())  # noqa: SIM905
_BOXES = {"s": 1, "p": 3, "d": 5, "f": 7}

#: ground states that break the filling order (NIST Atomic Spectra Database; 110 and 111 by convention)
_EXCEPTIONS = {
    "Cr": "3d5 4s1",
    "Cu": "3d10 4s1",
    "Nb": "4d4 5s1",
    "Mo": "4d5 5s1",
    "Ru": "4d7 5s1",
    "Rh": "4d8 5s1",
    "Pd": "4d10 5s0",
    "Ag": "4d10 5s1",
    "La": "4f0 5d1",
    "Ce": "4f1 5d1",
    "Gd": "4f7 5d1",
    "Pt": "5d9 6s1",
    "Au": "5d10 6s1",
    "Ac": "5f0 6d1",
    "Th": "5f0 6d2",
    "Pa": "5f2 6d1",
    "U": "5f3 6d1",
    "Np": "5f4 6d1",
    "Cm": "5f7 6d1",
    "Ds": "6d9 7s1",
    "Rg": "6d10 7s1",
}


def _occupation(symbol: str) -> dict[str, int]:
    left = _SYMBOLS.index(symbol) + 1
    occupation = {}
    for subshell in _FILLING_ORDER:
        occupation[subshell] = min(left, 2 * _BOXES[subshell[1]])
        left -= occupation[subshell]
    for entry in _EXCEPTIONS.get(symbol, "").split():
        occupation[entry[:2]] = int(entry[2:])
    return occupation


def electron_configuration(symbol: str) -> list[float]:
    """Vector of 59 boxes x 2 entries, each ±1/sqrt(118): boxes fill singly in order, then doubly.

    Raises
    ------
    UnsupportedModelError
        If `symbol` is not a chemical element.
    """
    if symbol not in _SYMBOLS:
        raise UnsupportedModelError(
            f"type {symbol!r} has no electron configuration; "
            "use_econf_tebd needs element symbols in the type map"
        )
    occupation = _occupation(symbol)
    entries: list[int] = []
    for subshell in _VECTOR_ORDER:
        n_boxes, n_electrons = _BOXES[subshell[1]], occupation[subshell]
        for box in range(n_boxes):
            entries += [1 if n_electrons > n_boxes + box else -1, 1 if n_electrons > box else -1]
    return [entry / math.sqrt(118) for entry in entries]
