"""Checkpoints of a training: what is in them, where they go, how many are kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.dialects import file_key
from ..checkpoint.records import HeadRecord
from ..checkpoint.writer import training_content, write_content
from ..errors import OutputError, TrainingError, user_level
from ..files import check_output
from .curves import CURVE, PICTURES, read_curve
from .plan import Plan
from .weights import AllWeights, trained_labels

__all__ = ["OWN_ENTRY", "Keeper", "RunState", "head_records"]

#: entry of a checkpoint that holds what only mtinfer needs to go on
OWN_ENTRY = "mtinfer"


@dataclass(frozen=True)
class RunState:
    """Everything that a resumed run needs besides the input."""

    #: steps completed
    step: int
    weights: AllWeights
    optimizer: dict[str, Any]
    #: batches drawn, as in `Sampler`
    drawn: list[list[int]]
    #: (n_tasks, 2, 3), squares and counts of the errors since the last display
    errors: Tensor
    #: averaged weights by owner and name; None without averaging
    ema: dict[str, Tensor] | None
    #: elements in the data, by head
    observed: dict[str, list[str]]


def head_records(plan: Plan, weights: AllWeights, observed: Mapping[str, list[str]]) -> dict[str, HeadRecord]:
    """Heads with their present weights, as a checkpoint holds them."""
    return {
        task.name: HeadRecord(
            name=task.name,
            aliases=tuple(task.config.model["model_branch_alias"]),
            config=task.config.model
            | {"info": task.config.model["info"] | {"observed_type": observed[task.name]}},
            weights={name: tensor.detach().cpu() for name, tensor in own.items()},
            graph_lower_disabled=False,
            refused=None,
        )
        for task, own in ((task, weights[task.name]) for task in plan.tasks)
    }


class Keeper:
    """Writes ``<name>-<step>.pt`` and keeps the newest few; ``<name>.pt`` leads to the newest.

    Older ones go when the weights of the newest have given a finite loss, or at the end of the run.
    It removes only what its own run wrote, and what `claim` was forced to replace.

    Parameters
    ----------
    output
        folder of the run; the name of its checkpoints, `training.save_ckpt`, may have a folder in this one.
    """

    def __init__(self, output: Path, plan: Plan) -> None:
        self.plan = plan
        self.output, self.folder = output, output / plan.config.run.save_ckpt.parent
        #: last checkpoint that was written, or resumed, and the last whose weights gave a finite loss
        self.newest: Path | None = None
        self._good: Path | None = None
        self._names = [plan.config.run.save_ckpt.name, f"{plan.config.run.save_ckpt.name}_ema"]
        #: name -> checkpoints of this run that are kept, oldest first
        self._written: dict[str, list[Path]] = {}
        self._replaced: list[Path] = []

    def claim(self, *, resume: Path | None, finetune: Path | None, force: bool) -> None:
        """Make sure that files can be written, and that none of an earlier training is in the way.

        Those of the resumed one are not.

        Raises
        ------
        OutputError
            The folder can't be made or written to, or there are such files and they may not be replaced.
        """
        self._check_folders()
        if self._goes_on(resume):
            return
        self._replaced = self._earlier()
        if self._replaced and not force:
            raise OutputError(
                f"{str(self.output)!r} holds {self._replaced[0].name} of an earlier training; go on from it "
                "with --resume, choose another --output, or replace it with --force"
            )
        source = resume or finetune
        if source is not None and source.resolve() in [path.resolve() for path in self._replaced]:
            raise OutputError(f"{str(source)!r} would be removed by --force; choose another --output")

    def _check_folders(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise OutputError(f"{str(self.folder)!r} can't be a folder: {err.strerror}") from err
        for path in (self.output / CURVE, *(self.folder / f"{name}.pt" for name in self._names)):
            check_output(path)

    def replaces(self, path: Path) -> bool:
        """Whether a file is of an earlier training, and goes."""
        return path in self._replaced

    def clear(self) -> None:
        """Remove the files that `claim` found."""
        for path in self._replaced:
            _remove(path)

    def go_on(self, resume: Path, step: int) -> None:
        """Count a resumed checkpoint as written, and with it those before in its folder."""
        self.newest = resume
        if self._goes_on(resume):
            for name in self._names:
                found = _checkpoints(self.folder, name)
                self._written[name] = [path for k, path in found.items() if k <= step]

    def _goes_on(self, resume: Path | None) -> bool:
        return resume is not None and resume.resolve().parent == self.folder.resolve()

    def _earlier(self) -> list[Path]:
        """Files of a run, newest checkpoint first; a learning curve counts where it has rows."""
        links = [self.folder / f"{name}.pt" for name in self._names]
        checkpoints = [
            path for name in self._names for path in reversed(_checkpoints(self.folder, name).values())
        ]
        found = checkpoints + [path for path in links if path.exists() or path.is_symlink()]
        curve = self.output / CURVE
        if curve.exists() and read_curve(curve):
            found += [curve, *self.output.glob(PICTURES)]
        return found

    def saved_elsewhere(self, step: int) -> None:
        """Note a checkpoint that another process writes."""
        self.newest = self._path(self._names[0], step)

    def accept(self) -> None:
        """Note that the weights gave a finite loss since the last checkpoint was written."""
        self._good = self.newest

    def thin_out(self) -> None:
        """Remove checkpoints beyond the number to keep, oldest first; for the process that writes them."""
        run = self.plan.config.run
        for name, n_kept in zip(self._names, (run.max_ckpt_keep, run.ema_ckpt_keep), strict=True):
            written = self._written.get(name, [])
            for old in written[:-n_kept]:
                try:
                    _remove(old)
                except OutputError as err:  # no reason to end a training
                    warnings.warn(str(err), stacklevel=user_level())
            del written[:-n_kept]

    def last_good(self) -> str:
        """Sentence that names the last checkpoint that is known to be good."""
        if self._good is not None:
            return f"the last good checkpoint is {self._good}"
        if self.newest is not None:
            return f"the checkpoint {self.newest} gave no finite loss"
        return "no checkpoint was written yet"

    def save(self, state: RunState) -> None:
        """Write a checkpoint, and one of the averaged weights where there are any.

        Raises
        ------
        TrainingError
            A weight is not finite; the checkpoints before stay as they are.
        """
        for head, own in state.weights.items():
            for name, tensor in own.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise TrainingError(
                        f"the weight {name!r} of head {head!r} is NaN or infinite after step {state.step}; "
                        f"{self.last_good()}"
                    )
        content: dict[str, Any] = {
            "model": self._model(state, state.weights),
            "optimizer": state.optimizer,
            OWN_ENTRY: {
                "drawn": state.drawn,
                "errors": state.errors,
                "trained": trained_labels(self.plan),
                "dialect": self.plan.dialect,
            },
        }
        name, ema_name = self._names
        if state.ema is not None:
            content["ema"] = self._ema_entry(state)
            averaged = {"model": self._model(state, self._averaged(state))}
            self._write(ema_name, state.step, averaged)
        self.newest = self._write(name, state.step, content)

    def _model(self, state: RunState, weights: AllWeights) -> dict[str, Any]:
        return training_content(
            head_records(self.plan, weights, state.observed),
            self.plan.dialect,
            step=state.step,
            learning_rate=self.plan.schedule(max(state.step - 1, 0)),
            shared_dict=self.plan.config.shared_dict if self.plan.config.multitask else None,
        )

    def _averaged(self, state: RunState) -> AllWeights:
        owners, ema = self.plan.owners, state.ema or {}
        return {
            head: {name: ema.get(f"{owners(head, name)}/{name}", tensor) for name, tensor in own.items()}
            for head, own in state.weights.items()
        }

    def _ema_entry(self, state: RunState) -> dict[str, Any]:
        averaged = {}
        for label, tensor in (state.ema or {}).items():
            head, _, name = label.rpartition("/")
            prefix = f"{head}." if self.plan.config.multitask else ""
            averaged[prefix + file_key(self.plan.dialect, name)] = tensor.cpu()
        return {"decay": self.plan.config.run.ema_decay, "model": averaged, "validation_state": {}}

    def _write(self, name: str, step: int, content: Mapping[str, Any]) -> Path:
        path = self._path(name, step)
        write_content(path, content)
        _lead(self.folder / f"{name}.pt", path.name)
        self._written.setdefault(name, []).append(path)
        return path

    def _path(self, name: str, step: int) -> Path:
        return self.folder / f"{name}-{step}.pt"


def _checkpoints(folder: Path, name: str) -> dict[int, Path]:
    """Checkpoints in a folder by step, oldest first."""
    found = {}
    for path in folder.glob("*.pt"):
        stem, _, step = path.stem.rpartition("-")
        if stem == name and step.isdecimal():
            found[int(step)] = path
    return dict(sorted(found.items()))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        raise OutputError(f"{str(path)!r} can't be removed: {err.strerror}") from err


def _lead(link: Path, target: str) -> None:
    """Make a link lead to a file beside it; there is no moment without the link."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
    except OSError as err:
        raise OutputError(f"{str(link)!r} can't be made to lead to {target}: {err.strerror}") from err
