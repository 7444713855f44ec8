"""How a run starts: from a checkpoint of its own, or from one head of another."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.container import file_kind, of_file
from ..checkpoint.dialects import canonical_name
from ..checkpoint.heads import DEFAULT_HEAD
from ..checkpoint.load import check_weights, load_content, read
from ..checkpoint.records import Checkpoint, HeadRecord
from ..checkpoint.writer import parts
from ..descriptor_kinds import kind_of
from ..errors import CheckpointError
from ..models import EnergyModel
from ..models.environment import with_shortcut
from ..options import NEIGHBOR_COUNTS
from .plan import Plan, Task
from .sampling import elements
from .saving import OWN_ENTRY, RunState
from .statistics import energy_bias
from .weights import AllWeights, Owners, trained_labels

__all__ = ["Start", "finetuned", "resumed", "shifted_bias"]

#: entries of a head that decide what its weights mean and which of them are trained
_FIXED = ("type_map", "descriptor", "fitting_net", "pair_exclude_types", "atom_exclude_types")
#: entries that act on the start alone, and would not act now
_FIRST = ("preset_out_bias",)
#: neighbour counts, how a difference of one reads, and what to do where the data settled it
_COUNTS = {key for counts in NEIGHBOR_COUNTS.values() for _, key, _ in counts}
_COUNT = re.compile(rf"\.({'|'.join(sorted(_COUNTS))}) was ")
_HINT = " (numbers in place of auto, which other data settle otherwise)"
_CASE = "fitting_net.case_embd"
#: last part of a weight's name -> its axis that runs over the type map
_AXIS_OF_TYPES = {"mean": 0, "stddev": 0, "out_bias": 1, "out_std": 1, "bias_atom_e": 0}
#: weights of a type embedding, a row for each type unless it reads electron configurations
_EMBEDDING = "type_embedding.layers.0.w"
#: weights of a fitting net that say what the input says
_OF_INPUT = (_CASE, "fitting_net.default_fparam_tensor")
#: keys of a descriptor that fine-tuning may change: neighbour counts, and what is no part of its formula
_FREE = _COUNTS | {
    "precision",
    "trainable",
    "trainable_ln",
    "set_davg_zero",
    "fix_stat_std",
    "skip_stat",
    "update_residual",
    "update_residual_init",
}


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
    owners = Owners(plan.config.links)
    stored = {name: record.weights for name, record in checkpoint.heads.items()}
    for head, model in plan.models.items():
        with of_file(path):
            check_weights(head, stored[head], model.parameters(), dialect=checkpoint.spelling)
    weights = {
        head: {name: stored[owners(head, name)][name] for name in model.parameters()}
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
            yield from _changes(stored.get(key), given.get(key), f"{task.name}.{key}")
        if n_stored > len(task.systems):
            yield f"task {task.name!r} had {n_stored} systems, and has {len(task.systems)} in the input"
    owners = Owners(plan.config.links)
    for head, name in ((head, name) for head, model in plan.models.items() for name in model.parameters()):
        own_weight, shared = (checkpoint.heads[h].weights.get(name) for h in (head, owners(head, name)))
        if own_weight is not None and shared is not None and not torch.equal(own_weight, shared):
            yield f"heads {owners(head, name)!r} and {head!r} share {name!r} in the input only"
    labels = trained_labels(plan.config, plan.models)
    if own["trained"] != labels:
        others = sorted({*own["trained"]} ^ {*labels})
        which = f" ({others[0]!r} in one only)" if others else ""
        yield f"it trained {len(own['trained'])} weights, and the input trains {len(labels)}{which}"


def _changes(stored: Any, given: Any, where: str) -> Iterator[str]:
    """Yield where two sections differ; seeds matter at the start only."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted({*stored, *given} - {"seed"}, key=lambda key: (key != "type", key)):
            yield from _changes(stored.get(key), given.get(key), f"{where}.{key}")
    elif where.endswith(".list") and isinstance(stored, list) and len(stored) == len(given):
        for index, pair in enumerate(zip(stored, given, strict=True)):
            yield from _changes(*pair, f"{where}[{index}]")
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


def finetuned(path: Path, head: str | None, plan: Plan, weights: AllWeights) -> None:
    """Start all tasks from one head of a checkpoint; the energy bias then follows the new data.

    Networks and statistics are taken over; a fitting net only where its shapes and its activation are the
    same (else a warning says so), with its case embedding where there is only one task. The default of the
    frame parameters is that of the input. Neighbour counts may differ, and so may the type map: a task takes
    its elements from those of the head.

    Raises
    ------
    CheckpointError
        The descriptor of a task is another than that of the head, or the head lacks an element.
    """
    checkpoint = read(path)
    record = checkpoint.head(head)
    for task in plan.tasks:
        own = weights[task.name]
        weights_of_types = _of_types(record, task)
        _check_descriptor(record, checkpoint.dialect, task, plan.dialect)
        other = {n: _on_slots(n, tensor, own[n]) for n, tensor in weights_of_types.items() if n in own}
        for name in own:
            fits = name in other and other[name].shape == own[name].shape
            if name.startswith("descriptor.") and not fits:
                raise CheckpointError(
                    f"task {task.name!r} can't start from head {record.name!r}: their descriptors differ in "
                    f"{name!r}"
                )
        fitting = [name for name in own if name.startswith("fitting_net.") and name not in _OF_INPUT]
        same = _activation(record, checkpoint.dialect) == task.model.fitting.activation and all(
            name in other and other[name].shape == own[name].shape for name in fitting
        )
        if not same:
            warnings.warn(
                f"the fitting net of task {task.name!r} has another form than that of head {record.name!r}, "
                "and starts anew",
                stacklevel=2,
            )
        taken = [name for name in own if name.startswith("descriptor.")] + (fitting if same else [])
        for name in taken:
            own[name] = other[name].to(own[name].dtype).clone()
        if same:
            own["out_bias"] = other["out_bias"].clone()
        if same and _CASE in own and len(plan.tasks) == 1:  # several tasks must differ in it
            own[_CASE] = other[_CASE].to(own[_CASE].dtype).clone()
    weights.update(Owners(plan.config.links).joined(weights))


def _of_types(record: HeadRecord, task: Task) -> Mapping[str, Tensor]:
    """Weights of a head for the type map of a task, whose elements it must know."""
    source, target = tuple(record.config["type_map"]), task.model.type_map
    if source == target:
        return record.weights
    said = f"head {record.name!r} has the type map {', '.join(source)}; task {task.name!r} has"
    if missing := [symbol for symbol in target if symbol not in source]:
        raise CheckpointError(f"{said} {', '.join(missing)}, too; it can't start from a head without")
    configs = {prefix: config for prefix, config, _ in parts(record.config["descriptor"], record.weights)}
    if any(kind_of(config) == "se_e2_a" for config in configs.values()):
        raise CheckpointError(
            f"{said} {', '.join(target)}, and they must be the same: networks of se_e2_a belong to types"
        )
    rows = torch.tensor([source.index(symbol) for symbol in target])
    found = {}
    for name, tensor in record.weights.items():
        leaf = name.rpartition(".")[2]
        if leaf in _AXIS_OF_TYPES:
            tensor = tensor.index_select(_AXIS_OF_TYPES[leaf], rows)
        elif name.endswith(_EMBEDDING) and not configs[name.removesuffix(_EMBEDDING)].get("use_econf_tebd"):
            before, after = (torch.eye(len(types), dtype=tensor.dtype) for types in (source, target))
            tensor = with_shortcut(tensor, before)[rows]  # which depends on the place in the type map
            tensor = tensor - with_shortcut(torch.zeros_like(tensor), after)
        found[name] = tensor
    return found


def _activation(record: HeadRecord, dialect: str) -> str:
    """Activation of the fitting net of a head."""
    return EnergyModel.from_config(record.config, dialect).fitting.activation


def _check_descriptor(record: HeadRecord, source: str, task: Task, dialect: str) -> None:
    """Refuse a descriptor with another formula; warn of one that has another in the dialect of its file."""
    given = task.config.model["descriptor"]
    stored = _with_free(record.config["descriptor"], given)
    config = task.config.model | {"descriptor": stored}
    before = EnergyModel.from_config(config, source, graph_lower_disabled=record.graph_lower_disabled)
    if EnergyModel.from_config(config, dialect).descriptor != task.model.descriptor:
        # what the file leaves to a default may well be the same, so that it comes last
        changes = sorted(_changes(stored, given, f"{task.name}.descriptor"), key=lambda c: " was None, " in c)
        raise CheckpointError(
            f"task {task.name!r} can't start from head {record.name!r}: {changes[0]}; give it the descriptor "
            "of the head, of which neighbour counts, precision and what is trained may differ"
        )
    if before.descriptor != task.model.descriptor:
        of_file = "pt" if record.graph_lower_disabled else source
        warnings.warn(
            f"head {record.name!r} selects neighbours as the dialect {of_file} does, and goes on as "
            f"{dialect}, which selects others; --dialect {of_file} keeps them",
            stacklevel=2,
        )


def _with_free(stored: Any, given: Any) -> Any:
    """Return a stored descriptor with what may differ as it is given."""
    if isinstance(stored, dict) and isinstance(given, dict) and kind_of(stored) == kind_of(given):
        taken = {key: given[key] for key in _FREE & given.keys()}
        return {key: _with_free(value, given.get(key)) for key, value in stored.items()} | taken
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        return [_with_free(*pair) for pair in zip(stored, given, strict=True)]
    return stored


def _on_slots(name: str, given: Tensor, wanted: Tensor) -> Tensor:
    """Statistics (n_types, n_slots, 4) that are the same on all slots, for as many slots as are wanted."""
    if not name.endswith((".mean", ".stddev")) or not torch.equal(given, given[:, :1].expand_as(given)):
        return given
    return given[:, :1].expand(-1, wanted.shape[1], -1)


def shifted_bias(plan: Plan, weights: AllWeights, residuals: Mapping[str, list[Any]]) -> None:
    """Add to each `out_bias` what the least squares of energy residuals says; see `energy_bias`.

    A type with a preset bias gets that.
    """
    for task in plan.tasks:
        frames = [replace(frame, energy=value) for frame, value in residuals[task.name]]
        bias = weights[task.name]["out_bias"]
        shift, std = energy_bias(
            frames,
            task.model.type_map,
            task.config.model["preset_out_bias"],
            excluded=task.model.atom_exclude_types,
            present=bias,
        )
        weights[task.name]["out_bias"] = bias + shift
        weights[task.name]["out_std"] = std
