"""How a run starts, and how it goes on from a checkpoint of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.container import file_kind, of_file
from ..checkpoint.dialects import canonical_name
from ..checkpoint.heads import DEFAULT_HEAD
from ..checkpoint.load import check_weights, load_content, read
from ..checkpoint.records import Checkpoint
from ..errors import CheckpointError
from ..options import COUNT_KEYS
from .plan import Plan
from .sampling import elements
from .saving import OWN_ENTRY, RunState
from .weights import trained_labels

__all__ = ["Start", "changes", "resumed"]

#: entries of a head that decide what its weights mean and which of them are trained
_FIXED = ("type_map", "descriptor", "fitting_net", "pair_exclude_types", "atom_exclude_types")
#: entries that act on the start alone, and would not act now
_FIRST = ("preset_out_bias",)
#: how a difference of a neighbour count reads, and what to do where the data settled it
_COUNT = re.compile(rf"\.({'|'.join(sorted(COUNT_KEYS))}) was ")
_HINT = " (numbers in place of auto, which other data settle otherwise)"


@dataclass(frozen=True)
class Start:
    """Where a run starts: from nothing, from a checkpoint of its own, or from a head of another."""

    resume: Path | None = None
    finetune: Path | None = None
    #: head of `finetune`
    head: str | None = None
    #: whether to replace the files of an earlier training in the folder
    force: bool = False

    def __post_init__(self) -> None:
        for path in (self.resume, self.finetune):
            if path is not None and path.is_dir():
                inside = sorted(path.glob("*.pt"), key=lambda found: (not found.is_symlink(), found.name))
                named = f", as in {str(inside[0])!r}" if inside else ""
                raise CheckpointError(f"{str(path)!r} is a folder; name a checkpoint in it{named}")
            if path is not None and not path.exists():
                raise CheckpointError(f"no such file: {str(path)!r}")


def resumed(path: Path, plan: Plan) -> RunState:
    """Read a checkpoint that this program wrote, to go on from it.

    Optimizer state, draws and errors are stored by position: heads, their order, what they share and what is
    trained must be those of the input, and so must the models. Systems may follow on those of a task.

    Raises
    ------
    CheckpointError
        It was not written by a training of this input, or no step is left.
    """
    checkpoint = read(path)
    converted = file_kind(path) == "safetensors"
    content = {} if converted else load_content(path)
    own = content.get(OWN_ENTRY) if isinstance(content, dict) else None
    if not isinstance(content, dict) or own is None or "trained" not in own or "optimizer" not in content:
        raise CheckpointError(
            f"{str(path)!r} can't be resumed: it holds no state of a training of mtinfer; use --finetune"
        )
    if difference := next(_differences(checkpoint, own, plan), None):
        raise CheckpointError(
            f"{str(path)!r} can't be resumed: {difference}; use the input that it was trained with"
            f"{_HINT if plan.counts and _COUNT.search(difference) else ''}, or --finetune"
        )
    step, n_steps = int(checkpoint.step or 0), plan.schedule.n_steps
    if step >= n_steps:
        raise CheckpointError(
            f"{str(path)!r} is at step {step} of {n_steps}, and no step is left; give more with --steps or "
            "training.numb_steps"
        )
    stored = {name: record.weights for name, record in checkpoint.heads.items()}
    for head, model in plan.models.items():
        with of_file(path):
            check_weights(head, stored[head], model.parameters(), dialect=checkpoint.spelling)
    weights = {
        head: {name: stored[plan.owners(head, name)][name] for name in model.parameters()}
        for head, model in plan.models.items()
    }
    return RunState(
        step=step,
        weights=weights,
        optimizer=content["optimizer"],
        drawn=[
            [*drawn, *(0 for _ in task.systems[len(drawn) :])]
            for task, drawn in zip(plan.tasks, own["drawn"], strict=True)
        ],
        errors=own["errors"],
        ema=_stored_ema(content, plan),
        observed={
            task.name: sorted(
                {*checkpoint.heads[task.name].config["info"]["observed_type"], *elements(task.systems)}
            )
            for task in plan.tasks
        },
    )


def _differences(checkpoint: Checkpoint, own: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Yield what of a checkpoint is not as the input has it."""
    if own["dialect"] != plan.dialect:
        yield f"its dialect is {own['dialect']}, and --dialect is {plan.dialect}"
    if list(checkpoint.heads) != list(plan.models):
        yield f"it has the heads {', '.join(checkpoint.heads)}, and the input {', '.join(plan.models)}"
        return
    for task, n_stored in zip(plan.tasks, map(len, own["drawn"]), strict=True):
        stored, given = checkpoint.heads[task.name].config, json.loads(json.dumps(task.config.model))
        for key in (*_FIXED, *_FIRST):
            yield from changes(stored.get(key), given.get(key), f"{task.name}.{key}")
        if n_stored > len(task.systems):
            yield f"task {task.name!r} had {n_stored} systems, and has {len(task.systems)} in the input"
    for head, name in ((head, name) for head, model in plan.models.items() for name in model.parameters()):
        own_weight, shared = (checkpoint.heads[h].weights.get(name) for h in (head, plan.owners(head, name)))
        if own_weight is not None and shared is not None and not torch.equal(own_weight, shared):
            yield f"heads {plan.owners(head, name)!r} and {head!r} share {name!r} in the input only"
    labels = trained_labels(plan)
    if own["trained"] != labels:
        others = sorted({*own["trained"]} ^ {*labels})
        which = f" ({others[0]!r} in one only)" if others else ""
        yield f"it trained {len(own['trained'])} weights, and the input trains {len(labels)}{which}"


def changes(stored: Any, given: Any, where: str) -> Iterator[str]:
    """Yield where two sections differ; seeds matter at the start only."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted({*stored, *given} - {"seed"}, key=lambda key: (key != "type", key)):
            yield from changes(stored.get(key), given.get(key), f"{where}.{key}")
    elif where.endswith(".list") and isinstance(stored, list) and len(stored) == len(given):
        for index, pair in enumerate(zip(stored, given, strict=True)):
            yield from changes(*pair, f"{where}[{index}]")
    elif stored != given:
        yield f"{where} was {stored!r}, and is {given!r} in the input"


def _stored_ema(content: Mapping[str, Any], plan: Plan) -> dict[str, Tensor] | None:
    if "ema" not in content:
        return None
    found = {}
    for key, tensor in content["ema"]["model"].items():
        head, _, rest = key.partition(".") if plan.config.multitask else (DEFAULT_HEAD, "", key)
        found[f"{head}/{canonical_name(plan.dialect, rest)}"] = tensor
    return found
