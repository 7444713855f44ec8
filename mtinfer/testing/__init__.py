"""Checks that any head of a potential must pass.

`check_conformance` runs every check of `CONFORMANCE` on one head; each check is also usable by itself. They
build small structures from the elements of the head, need no reference numbers, and raise `AssertionError`
with the largest deviation.
"""

from .checks import (
    CONFORMANCE,
    DERIVATIVE_CHECKS,
    check_batch,
    check_compiled_equals_eager,
    check_conformance,
    check_energies,
    check_errors,
    check_forces,
    check_head_swap,
    check_inputs_unmodified,
    check_lattice_translation,
    check_mixed_periodicity,
    check_no_neighbors,
    check_parts,
    check_permutation,
    check_rotation,
    check_single_atom,
    check_supercell,
    check_virial,
)
from .deviations import TOLERANCES, Tolerance
from .structures import example_structure

__all__ = [
    "CONFORMANCE",
    "DERIVATIVE_CHECKS",
    "TOLERANCES",
    "Tolerance",
    "check_batch",
    "check_compiled_equals_eager",
    "check_conformance",
    "check_energies",
    "check_errors",
    "check_forces",
    "check_head_swap",
    "check_inputs_unmodified",
    "check_lattice_translation",
    "check_mixed_periodicity",
    "check_no_neighbors",
    "check_parts",
    "check_permutation",
    "check_rotation",
    "check_single_atom",
    "check_supercell",
    "check_virial",
    "example_structure",
]
