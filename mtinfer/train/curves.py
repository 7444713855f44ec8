"""Learning curves: a table in a file, and a picture for each task."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import replacing
from .loss import Errors

__all__ = ["COLUMNS", "CURVE", "PICTURES", "LearningCurve", "picture_name"]

#: name of the file of all tasks, and pattern of those of one
CURVE, PICTURES = "lcurve.csv", "lcurve-*.png"

_LABELS = {"energy": "energy per atom (eV)", "force": "force (eV/Å)", "virial": "virial per atom (eV)"}
COLUMNS = (
    "step",
    "task",
    "lr",
    *(f"rmse_{quantity}_{kind}" for kind in ("train", "valid") for quantity in _LABELS),
    "seconds",
)


class LearningCurve:
    """File ``lcurve.csv``: a row for every task at every display.

    Training errors are those of all batches since the display before, of all processes; validation errors are
    those of the task's validation batches. Root mean squares: energy per atom (eV), force component (eV/Å),
    virial per atom (eV); empty where there is no label.

    Parameters
    ----------
    path
        file, which is replaced.
    kept
        rows to begin with, those of the run that a resumed one goes on from.
    """

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = path
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, step: int, task: str, lr: float, seconds: float, errors: Sequence[Errors | None]) -> None:
        """Append a row; `errors` are those of training and of validation."""
        values = [value for found in errors for value in (found.rmse if found else (None,) * 3)]
        row = [step, task, f"{lr:.6g}", *("" if v is None else f"{v:.6g}" for v in values), f"{seconds:.3f}"]
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(row)
        except OSError as err:
            raise OutputError(f"{str(self.path)!r} can't be written: {err.strerror}") from err


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Rows of a learning curve, but for one that a full disk cut off.

    Raises
    ------
    OutputError
        The file is not one, or can't be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), tuple(reader.fieldnames or COLUMNS)
    except (OSError, ValueError, csv.Error) as err:
        raise OutputError(f"{str(path)!r} can't be read: {err}") from err
    if columns != COLUMNS or not all((row["step"] or "").isdecimal() for row in rows):
        raise OutputError(f"{str(path)!r} is no learning curve of this program; move it away")
    return [row for row in rows if None not in row.values()]


def picture_name(task: str) -> str:
    """Name of the picture of a task; a slash in the name of the task is percent-encoded."""
    return PICTURES.replace("*", task.replace("%", "%25").replace("/", "%2F"))


def plot_curve(rows: Sequence[Mapping[str, str]], task: str, picture: Path) -> None:
    """Draw the learning curve of one task as PNG, a panel for each quantity that has labels.

    Parameters
    ----------
    rows
        of all tasks, as `read_curve` returns them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["task"] == task]
    panels = [(label, lines) for quantity, label in _LABELS.items() if (lines := _lines(rows, quantity))]
    figure = Figure(figsize=(1 + 3.4 * max(1, len(panels)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (label, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(
            1, len(panels), number, xlabel="step", ylabel=f"RMSE of {label}", yscale="log"
        )
        for kind, points in lines.items():
            style = "-" if kind == "train" else "--"
            axes.plot(*zip(*points, strict=True), style, marker=".", label=kind)
        axes.legend()
    figure.suptitle(task if panels else f"{task}: no errors yet").set_parse_math(False)
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=120)


def _lines(rows: Sequence[Mapping[str, str]], quantity: str) -> dict[str, list[tuple[int, float]]]:
    """Kind of error -> steps and errors; kinds without any are left out."""
    found = {}
    for kind in ("train", "valid"):
        errors = [(int(row["step"]), row[f"rmse_{quantity}_{kind}"]) for row in rows]
        if points := [(step, float(error)) for step, error in errors if error]:
            found[kind] = points
    return found
