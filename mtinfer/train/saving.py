"""Checkpoints of a training: what is in them, how many are kept, how a run goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.heads import DEFAULT_HEAD
from ..checkpoint.load import check_weights, read
from ..checkpoint.records import HeadRecord
from ..checkpoint.writer import check_no_debris, file_key, training_content, write_content
from ..errors import CheckpointError, TrainingError
from .plan import Plan
from .statistics import energy_bias
from .weights import AllWeights, Owners

__all__ = ["Keeper", "RunState", "finetuned", "head_records", "resumed"]

#: entry of a checkpoint that holds what only mtinfer needs to go on
_OWN = "mtinfer"


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


@dataclass
class Keeper:
    """Writes ``<name>-<step>.pt`` and keeps the newest few; ``<name>.pt`` leads to the newest."""

    folder: Path
    plan: Plan

    def save(self, state: RunState) -> Path:
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
                        f"{self._last_good()}"
                    )
        content: dict[str, Any] = {
            "model": self._model(state, state.weights),
            "optimizer": state.optimizer,
            _OWN: {
                "drawn": state.drawn,
                "errors": state.errors,
                "seed": self.plan.config.run.seed,
                "n_steps": self.plan.schedule.n_steps,
                "dialect": self.plan.dialect,
            },
        }
        name = self.plan.config.run.save_ckpt
        if state.ema is not None:
            content["ema"] = self._ema_entry(state)
            self._write(f"{name}_ema", state.step, {"model": self._model(state, self._averaged(state))})
        return self._write(name, state.step, content)

    def _model(self, state: RunState, weights: AllWeights) -> dict[str, Any]:
        return training_content(
            head_records(self.plan, weights, state.observed),
            self.plan.dialect,
            step=state.step,
            learning_rate=self.plan.schedule(max(state.step - 1, 0)),
            shared_dict=self.plan.config.shared_dict if self.plan.config.multitask else None,
        )

    def _averaged(self, state: RunState) -> AllWeights:
        owners, ema = Owners(self.plan.config.links), state.ema or {}
        return {
            head: {name: ema.get(f"{owners(head, name)}/{name}", tensor) for name, tensor in own.items()}
            for head, own in state.weights.items()
        }

    def _ema_entry(self, state: RunState) -> dict[str, Any]:
        averaged = {}
        for label, tensor in (state.ema or {}).items():
            head, name = label.split("/")
            prefix = f"{head}." if self.plan.config.multitask else ""
            averaged[prefix + file_key(self.plan.dialect, name)] = tensor.cpu()
        return {"decay": self.plan.config.run.ema_decay, "model": averaged, "validation_state": {}}

    def _write(self, name: str, step: int, content: Mapping[str, Any]) -> Path:
        check_no_debris(content)
        path = self.folder / f"{name}-{step}.pt"
        write_content(path, content)
        newest = self.folder / f"{name}.pt"
        newest.unlink(missing_ok=True)
        newest.symlink_to(path.name)
        for old in self.written(name)[: -self.plan.config.run.max_ckpt_keep]:
            old.unlink()
        return path

    def written(self, name: str | None = None) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        name = name or self.plan.config.run.save_ckpt
        found = {
            int(path.stem.removeprefix(f"{name}-")): path
            for path in self.folder.glob(f"{name}-*.pt")
            if path.stem.removeprefix(f"{name}-").isdecimal()
        }
        return [found[step] for step in sorted(found)]

    def _last_good(self) -> str:
        written = self.written()
        return f"the last good checkpoint is {written[-1]}" if written else "no checkpoint was written yet"


def resumed(path: Path, plan: Plan) -> RunState:
    """Read a checkpoint that this program wrote, to go on from it.

    Raises
    ------
    CheckpointError
        It was not written by a training of this input.
    """
    checkpoint = read(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    own = content.get(_OWN) if isinstance(content, dict) else None
    if own is None or "optimizer" not in content:
        raise CheckpointError(
            f"{str(path)!r} can't be resumed: it holds no state of a training of mtinfer; use --finetune"
        )
    if set(checkpoint.heads) != set(plan.models) or own["dialect"] != plan.dialect:
        raise CheckpointError(
            f"{str(path)!r} has the heads {', '.join(checkpoint.heads)} ({own['dialect']}); the input has "
            f"{', '.join(plan.models)} ({plan.dialect})"
        )
    owners = Owners(plan.config.links)
    stored = {name: record.weights for name, record in checkpoint.heads.items()}
    for head, model in plan.models.items():
        check_weights(head, stored[head], model.parameters())
    weights = {
        head: {name: stored[owners(head, name)][name] for name in model.parameters()}
        for head, model in plan.models.items()
    }
    return RunState(
        step=int(checkpoint.step or 0),
        weights=weights,
        optimizer=content["optimizer"],
        drawn=own["drawn"],
        errors=own["errors"],
        ema=_stored_ema(content, plan),
        observed={name: record.config["info"]["observed_type"] for name, record in checkpoint.heads.items()},
    )


def _stored_ema(content: Mapping[str, Any], plan: Plan) -> dict[str, Tensor] | None:
    if "ema" not in content:
        return None
    from ..checkpoint.dialects import canonical_name

    found = {}
    for key, tensor in content["ema"]["model"].items():
        head, _, rest = key.partition(".") if plan.config.multitask else (DEFAULT_HEAD, "", key)
        found[f"{head}/{canonical_name(plan.dialect, rest)}"] = tensor
    return found


def finetuned(path: Path, head: str | None, plan: Plan, weights: AllWeights) -> None:
    """Start all tasks from one head of a checkpoint; the energy bias then follows the new data.

    Networks and statistics are taken over; a fitting net only where its shapes are the same. Neighbour counts
    may differ.

    Raises
    ------
    CheckpointError
        The descriptor or the type map of a task is another than that of the head.
    """
    record = read(path).head(head)
    for task in plan.tasks:
        own = weights[task.name]
        if tuple(record.config["type_map"]) != task.model.type_map:
            raise CheckpointError(
                f"head {record.name!r} has the type map {', '.join(record.config['type_map'])}; task "
                f"{task.name!r} has {', '.join(task.model.type_map)}, and they must be the same"
            )
        other = {n: _on_slots(n, tensor, own[n]) for n, tensor in record.weights.items() if n in own}
        for name in own:
            fits = name in other and other[name].shape == own[name].shape
            if name.startswith("descriptor.") and not fits:
                raise CheckpointError(
                    f"task {task.name!r} can't start from head {record.name!r}: their descriptors differ in "
                    f"{name!r}"
                )
        fitting = [name for name in own if name.startswith("fitting_net.") and not name.endswith("case_embd")]
        same = all(name in other and other[name].shape == own[name].shape for name in fitting)
        taken = [name for name in own if name.startswith("descriptor.")] + (fitting if same else [])
        for name in taken:
            own[name] = other[name].to(own[name].dtype).clone()
        if same:
            own["out_bias"] = other["out_bias"].clone()
    owners = Owners(plan.config.links)
    for name_of_head, own in weights.items():
        for name in own:
            own[name] = weights[owners(name_of_head, name)][name]


def _on_slots(name: str, given: Tensor, wanted: Tensor) -> Tensor:
    """Statistics (n_types, n_slots, 4) that are the same on all slots, for as many slots as are wanted."""
    if not name.endswith((".mean", ".stddev")) or not torch.equal(given, given[:, :1].expand_as(given)):
        return given
    return given[:, :1].expand(-1, wanted.shape[1], -1)


def shifted_bias(plan: Plan, weights: AllWeights, residuals: Mapping[str, list[Any]]) -> None:
    """Add to each `out_bias` what the least squares of energy residuals says; see `energy_bias`."""
    for task in plan.tasks:
        frames = [replace(frame, energy=value) for frame, value in residuals[task.name]]
        shift, std = energy_bias(frames, task.model.type_map)
        weights[task.name]["out_bias"] = weights[task.name]["out_bias"] + shift
        weights[task.name]["out_std"] = std
