"""Scores as a table, JSON and CSV; predictions as extxyz."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..data import Frame
from ..errors import OutputError, first_line
from ..files import replacing
from ..inputs import Prediction
from .metrics import Array, Score
from .run import Evaluation

if TYPE_CHECKING:
    from ase import Atoms
    from rich.table import Table

#: endings of the name of a file of predictions
PREDICTION_SUFFIXES = (".extxyz", ".xyz", ".gz")

SCHEMA = "mtinfer.evaluation"
SCHEMA_VERSION = 1


def score_table(scores: Sequence[Score]) -> Table:
    """Return a table for a terminal of 80 columns or more.

    Datasets are named by the end of their paths, as long as needed to tell them apart.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    names = short_names([score.dataset for score in scores if score.dataset is not None])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in ("head", "dataset"):
        table.add_column(title, overflow="fold")
    for title in ("quantity", "unit"):
        table.add_column(title, no_wrap=True)
    for title in ("n", "MAE", "RMSE", "max"):
        table.add_column(title, no_wrap=True, justify="right")
    for (head, dataset), group in groupby(scores, key=lambda score: (score.head, score.dataset)):
        labels = [Text(head), Text("all" if dataset is None else names[dataset])]
        for score in group:
            numbers = [f"{value:#.3g}".rstrip(".") for value in (score.mae, score.rmse, score.max)]
            quantity = score.quantity.removesuffix("_per_atom")  # the unit says it
            table.add_row(*labels, quantity, score.unit, str(score.n), *numbers)
            labels = [Text(), Text()]
        table.add_section()
    return table


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path its shortest end, of whole components, that no other path has."""
    parts = {path: PurePath(path).parts for path in paths}
    for length in range(1, max(map(len, parts.values()), default=0)):
        names = {path: str(PurePath(*parts[path][-length:])) for path in parts}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def to_dict(evaluation: Evaluation, model: str | Path) -> dict[str, Any]:
    """Return model, heads, datasets and scores as plain values for JSON.

    Parameters
    ----------
    evaluation
        Any evaluation.
    model
        File that the heads came from.

    Returns
    -------
    dict
        ``metrics`` holds the fields of `Score`; ``dataset`` is null over all datasets, a number that is
        not finite is null.
    """
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "model": str(model),
        "heads": list(evaluation.heads),
        "datasets": [_describe(evaluation, dataset) for dataset in evaluation.datasets],
        "metrics": [
            {key: None if _is_not_finite(value) else value for key, value in asdict(score).items()}
            for score in evaluation.scores
        ],
    }


def _describe(evaluation: Evaluation, dataset: str) -> dict[str, Any]:
    sizes = [len(frame.atoms) for frame in evaluation.frames if frame.dataset == dataset]
    return {"path": dataset, "n_frames": len(sizes), "n_atoms": sum(sizes)}


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write_json(path: str | Path, evaluation: Evaluation, model: str | Path) -> None:
    """Write what `to_dict` returns; raises OutputError."""
    text = json.dumps(to_dict(evaluation, model), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def write_csv(path: str | Path, scores: Sequence[Score]) -> None:
    """Write the fields of `Score`, one row each; an empty dataset means all; raises OutputError."""
    names = [column.name for column in fields(Score)]
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores)


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Write every frame with what each head predicts for it, as extxyz (compressed if the name ends in .gz).

    The predicted energy, forces, stress and virial have the usual keys; the labels of the data are
    ``ref_energy``, ``ref_forces``, ``ref_virial`` and ``ref_stress``, in the same units (eV, eV/Å, eV,
    eV/Å³). ``head``, ``source`` and ``source_index`` say where a frame comes from. Entries of ``atoms.info``
    that extxyz can't hold are left out.

    Raises
    ------
    OutputError
        The file can't be written, or frames hold what ASE can't write.
    """
    import ase.io

    with replacing(path) as partial:
        try:
            ase.io.write(partial, list(_predicted(evaluation)), format="extxyz")
        except (TypeError, ValueError, KeyError, AttributeError) as err:
            raise OutputError(
                f"{path}: frames hold what extxyz can't ({first_line(err)}); evaluate them without --output"
            ) from err


def _predicted(evaluation: Evaluation) -> Iterator[Atoms]:
    for head, predictions in evaluation.predictions.items():
        for frame, prediction in zip(evaluation.frames, predictions, strict=True):
            yield _predicted_atoms(head, frame, prediction)


def _predicted_atoms(head: str, frame: Frame, prediction: Prediction) -> Atoms:
    atoms = deepcopy(frame.atoms)
    atoms.info = {key: value for key, value in atoms.info.items() if _is_readable(key, value)}
    # under these keys in info and arrays, ASE writes and reads them as results of a calculator
    atoms.info |= {"head": head, "source": frame.source, "source_index": frame.index}
    atoms.info["energy"] = prediction.energy
    atoms.arrays["forces"] = prediction.forces
    if frame.energy is not None:
        atoms.info["ref_energy"] = frame.energy
    if frame.forces is not None:
        atoms.arrays["ref_forces"] = frame.forces
    if atoms.pbc.any():
        atoms.info |= _virial_info("", prediction.virial, atoms)
        if frame.virial is not None:
            atoms.info |= _virial_info("ref_", frame.virial, atoms)
    return atoms


def _is_readable(key: object, value: object) -> bool:
    """Whether an entry of `info` comes back from extxyz, with the rest of the frame."""
    if not isinstance(key, str) or not key or "=" in key or key in ("Lattice", "Properties", "pbc"):
        return False
    texts = [key, value] if isinstance(value, str) else [key]
    return all(len(text.splitlines()) <= 1 and not {*text} & {"\\", "\n", "\r"} for text in texts)


def _virial_info(prefix: str, virial: Array, atoms: Atoms) -> dict[str, Array]:
    """Return the virial, and the stress where the structure has a volume."""
    info = {f"{prefix}virial": virial}
    if atoms.cell.rank == 3:
        info[f"{prefix}stress"] = -0.5 * (virial + virial.T) / atoms.cell.volume
    return info
