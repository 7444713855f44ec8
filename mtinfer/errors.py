"""Errors that mtinfer raises, and warnings. The text is interface: what, got, allowed, next step."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GraphWarning",
    "MtinferError",
    "OutputError",
    "PredictionWarning",
    "StructureError",
    "TrainingError",
    "UnknownHeadError",
    "UnsupportedModelError",
    "nearest",
]


class MtinferError(Exception):
    """Base of all errors that a user can mend; the command line prints its text as one line."""


class CheckpointError(MtinferError):
    """A file is not a checkpoint, is damaged, or its weights and configuration disagree."""


class UnsupportedModelError(MtinferError):
    """A head uses a feature that mtinfer does not evaluate; other heads of the file still load."""


class UnknownHeadError(MtinferError):
    """The head asked for does not exist, or none was named where several exist."""


class StructureError(MtinferError):
    """A structure can't be evaluated: unknown element, NaN positions, singular cell, missing input."""


class DataError(MtinferError):
    """Labelled data can't be read: empty folder, label of the wrong shape, unknown format."""


class ConfigError(MtinferError):
    """A training input has an unknown key, a wrong value, or asks for what is not supported."""


class TrainingError(MtinferError):
    """Training can't go on: the loss is not a number, a process died, a checkpoint does not fit."""


class OutputError(MtinferError):
    """An output can't be written, or exists and must not be replaced."""


class GraphWarning(UserWarning):
    """No compiled graph can be had or trusted, so that results are eager ones; or it could not be stored."""


class PredictionWarning(UserWarning):
    """Numbers that may mean little: an unseen element, neighbours beyond `sel`, an option passed over."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'water'?)"`` for the closest of `allowed`, or an empty string."""
    lowered = {candidate.lower(): candidate for candidate in allowed}
    match = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" (did you mean {lowered[match[0]]!r}?)" if match else ""


def first_line(err: BaseException) -> str:
    """Type and first line of an error of another library."""
    text = str(err).strip().splitlines()
    return f"{type(err).__name__}: {text[0][:200]}" if text else type(err).__name__


#: packages whose lines are not those of a user
_PASSED_THROUGH = ("mtinfer", "torch", "ase")


def user_level() -> int:
    """`stacklevel` with which a warning of the calling function points at the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH:
        if frame.f_back is None:
            return 2
        frame, level = frame.f_back, level + 1
    return level
