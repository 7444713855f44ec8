"""Fine-tuning: tasks that start from heads of a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint.load import read
from ..checkpoint.records import Checkpoint, HeadRecord
from ..checkpoint.writer import parts
from ..data.frame import Frame
from ..descriptor_kinds import kind_of
from ..errors import CheckpointError, ConfigError
from ..models import EnergyModel
from ..models.environment import with_shortcut
from ..options import COUNT_KEYS
from .model_section import Link
from .plan import Plan, Task
from .starting import changes
from .statistics import energy_bias
from .weights import AllWeights, Owners

__all__ = ["Origin", "finetuned", "refuse_heads", "shifted_bias"]

#: word of deepmd-kit for a task whose fitting net starts anew
_RANDOM = "RANDOM"
_CASE = "fitting_net.case_embd"
#: last part of a weight's name -> its axis that runs over the type map
_AXIS_OF_TYPES = {"mean": 0, "stddev": 0, "out_bias": 1, "out_std": 1, "bias_atom_e": 0}
#: weights of a type embedding, a row for each type unless it reads electron configurations
_EMBEDDING = "type_embedding.layers.0.w"
#: weights of a fitting net that say what the input says
_OF_INPUT = (_CASE, "fitting_net.default_fparam_tensor")
#: keys of a descriptor that fine-tuning may change: neighbour counts, and what is no part of its formula
_FREE = COUNT_KEYS | {
    "precision",
    "trainable",
    "trainable_ln",
    "set_davg_zero",
    "fix_stat_std",
    "skip_stat",
    "update_residual",
    "update_residual_init",
}
_TEXTS = {
    "head": "goes on from head {!r}",
    "networks": "starts from head {!r}, with the energy bias of its own data",
    "descriptor": "starts from the descriptor of head {!r}, with a new fitting net",
}


@dataclass(frozen=True)
class Origin:
    """The head that a task starts from, and what it takes of it."""

    head: HeadRecord
    #: all of it; all but the energy bias, which follows the data; or the descriptor alone
    taken: Literal["head", "networks", "descriptor"]

    def __str__(self) -> str:
        return _TEXTS[self.taken].format(self.head.name)


def finetuned(path: Path, head: str | None, plan: Plan, weights: AllWeights) -> dict[str, Origin]:
    """Start all tasks from heads of a checkpoint.

    A task with `finetune_head` starts from that head, and its energy bias is to follow the new data; so do
    all tasks where `head` is given. Else a task of a multitask input goes on from the head of its name. One
    that has none there, or whose `finetune_head` is "RANDOM", starts from a descriptor alone: that of the
    head from which another task with the same descriptor starts, or of the first.

    Networks and statistics are taken over; a fitting net only where its shapes and its activation are the
    same (else a warning says so). Case embeddings stay with heads that go on, and with fitting nets of one
    task; other tasks get one that is free. The default of the frame parameters is that of the input.
    Neighbour counts may differ, and so may the type map: a task takes its elements from those of the head.

    Returns
    -------
    dict
        What each task started from.

    Raises
    ------
    CheckpointError
        The descriptor of a task is another than that of the head, the head lacks an element, or tasks that
        share a weight start from heads that differ in it.
    ConfigError
        Both `head` and `finetune_head` are given.
    UnknownHeadError
        A head is not in the checkpoint, or none is named and it has several.
    """
    checkpoint = read(path)
    origins = {
        task.name: _started(task, origin, checkpoint.dialect, plan.dialect, weights[task.name])
        for task, origin in zip(plan.tasks, _origins(checkpoint, head, plan), strict=True)
    }
    for link in plan.config.links:
        if link.part == "fitting_net":
            _settle_cases(link, origins, weights)
    _check_shared(plan.owners, origins, weights)
    weights.update(plan.owners.joined(weights))
    return origins


def refuse_heads(plan: Plan) -> None:
    """Raise ConfigError where a task names a head to start from, and there is no checkpoint that has it."""
    for task in plan.tasks:
        if (named := task.config.model.get("finetune_head")) is not None:
            raise ConfigError(
                f"task {task.name!r} has finetune_head {named!r}, a head of the checkpoint of --finetune, "
                "which is not given; give it, or leave finetune_head out"
            )


def _origins(checkpoint: Checkpoint, head: str | None, plan: Plan) -> list[Origin]:
    """Head of every task, as `finetune_head`, `head` or the name of the task say it."""
    found: dict[str, Origin] = {}
    for task in plan.tasks:
        named = task.config.model.get("finetune_head")
        if named is not None and head is not None:
            raise ConfigError(
                f"task {task.name!r} has finetune_head {named!r} in the input, and --head is {head!r}; leave "
                "out one of them"
            )
        named = named or head
        if named is None and plan.config.multitask:
            if task.name in checkpoint.heads:
                found[task.name] = Origin(checkpoint.head(task.name), "head")
        elif named != _RANDOM:
            found[task.name] = Origin(checkpoint.head(named), "networks")
    for task in plan.tasks:
        if task.name not in found:
            links = [dict(link.heads) for link in plan.config.links if link.part.startswith("descriptor")]
            beside = (found[other] for own in links if task.name in own for other in own if other in found)
            one = next(beside, None)
            record = checkpoint.head(next(iter(checkpoint.heads))) if one is None else one.head
            found[task.name] = Origin(record, "descriptor")
    return [found[task.name] for task in plan.tasks]


def _started(task: Task, origin: Origin, source: str, dialect: str, own: dict[str, Tensor]) -> Origin:
    """Put weights of a head in the place of those of a task; what it took in the end.

    Parameters
    ----------
    source
        dialect of the checkpoint.
    own
        weights of the task; changed.
    """
    record = origin.head
    weights_of_types = _of_types(record, task)
    _check_descriptor(record, source, task, dialect)
    other = {n: _on_slots(n, tensor, own[n]) for n, tensor in weights_of_types.items() if n in own}
    for name in own:
        fits = name in other and other[name].shape == own[name].shape
        if name.startswith("descriptor.") and not fits:
            raise CheckpointError(
                f"task {task.name!r} can't start from head {record.name!r}: their descriptors differ in "
                f"{name!r}"
            )
    taken = [name for name in own if name.startswith("descriptor.")]
    fitting = [name for name in own if name.startswith("fitting_net.") and name not in _OF_INPUT]
    if origin.taken != "descriptor":
        same = _activation(record, source) == task.model.fitting.activation and all(
            name in other and other[name].shape == own[name].shape for name in fitting
        )
        if same:
            cases = [_CASE] if _CASE in own and _CASE in other else []
            taken += [*fitting, *cases, "out_bias", *(["out_std"] if origin.taken == "head" else [])]
        else:
            warnings.warn(
                f"the fitting net of task {task.name!r} has another form than that of head {record.name!r}, "
                "and starts anew",
                stacklevel=2,
            )
            origin = replace(origin, taken="descriptor")
    for name in taken:
        own[name] = other[name].to(own[name].dtype).clone()
    return origin


def _settle_cases(link: Link, origins: Mapping[str, Origin], weights: AllWeights) -> None:
    """Let tasks that share a fitting net differ in their case embeddings; those of heads that go on stay."""
    used: list[Tensor] = []
    for head in sorted(dict(link.heads), key=lambda head: origins[head].taken != "head"):
        if (case := weights[head].get(_CASE)) is not None:
            free = [one for one in torch.eye(len(case), dtype=case.dtype) if not _among(one, used)]
            if origins[head].taken != "head" and _among(case, used):
                case = weights[head][_CASE] = free[0]
            used.append(case)


def _among(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(torch.equal(tensor, other) for other in others)


def _check_shared(owners: Owners, origins: Mapping[str, Origin], weights: AllWeights) -> None:
    """Refuse to start a weight that tasks share from two."""
    for task, own in weights.items():
        for name, tensor in own.items():
            owner = owners(task, name)
            if not torch.equal(tensor, weights[owner][name]):
                raise CheckpointError(
                    f"tasks {owner!r} and {task!r} share {name!r}, which would start with two values: "
                    f"{owner} {origins[owner]}, {task} {origins[task]}; let both start from one head, with "
                    "finetune_head"
                )


def _of_types(record: HeadRecord, task: Task) -> Mapping[str, Tensor]:
    """Weights of a head for the type map of a task, whose elements it must know."""
    source, target = tuple(record.config["type_map"]), task.model.type_map
    if source == target:
        return record.weights
    said = f"head {record.name!r} has the type map {', '.join(source)}; task {task.name!r} has"
    if missing := [symbol for symbol in target if symbol not in source]:
        raise CheckpointError(
            f"{said} {', '.join(missing)}, too; it can't start from a head without; leave "
            "them out of type_map, or name another head in finetune_head"
        )
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
        found = sorted(changes(stored, given, f"{task.name}.descriptor"), key=lambda c: " was None, " in c)
        raise CheckpointError(
            f"task {task.name!r} can't start from head {record.name!r}: {found[0]}; give it the descriptor "
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


def shifted_bias(task: Task, bias: Tensor, residuals: list[tuple[Frame, float]]) -> tuple[Tensor, Tensor]:
    """Energy bias of a task that starts from a head: the head's, and what the new data ask for.

    Parameters
    ----------
    bias
        that of the head, shape (1, n_types, 1), eV.
    residuals
        frames and their energy labels minus predictions with that bias, eV.

    Returns
    -------
    bias, std
        `out_bias` and `out_std`; a type with a preset bias has that. See `energy_bias`.
    """
    shift, std = energy_bias(
        [replace(frame, energy=value) for frame, value in residuals],
        task.model.type_map,
        task.config.model["preset_out_bias"],
        excluded=task.model.atom_exclude_types,
        present=bias,
    )
    return bias + shift, std
