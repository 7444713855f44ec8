"""A training input of deepmd-kit, checked and settled: tasks, what they share, loss, data, run options."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.heads import DEFAULT_HEAD, check_aliases
from ..checkpoint.refusals import refusal
from ..errors import CheckpointError, ConfigError, nearest
from ..models.hybrid import member_name
from . import schema
from .loss import LossConfig
from .schema import complete

__all__ = ["DataConfig", "Link", "OptimizerConfig", "RunOptions", "TaskConfig", "TrainConfig", "read_config"]

#: parts of a head that may name an entry of `shared_dict`
_PARTS = ("type_map", "descriptor", "fitting_net")


@dataclass(frozen=True)
class Link:
    """Heads that share one entry of `shared_dict`."""

    #: "descriptor", "descriptor.descrpt_list.<i>" for a member of a hybrid one, or "fitting_net"
    part: str
    #: key in `shared_dict`
    name: str
    #: (head, level), the base first; level 0 shares everything, level 1 the type embedding
    heads: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class DataConfig:
    """Section `training_data` or `validation_data` of a task."""

    systems: tuple[str, ...]
    #: a number, one per system, "auto", "auto:N", "max:N", or "filter:N"
    batch_size: int | tuple[int, ...] | str
    auto_prob: str
    sys_probs: tuple[float, ...] | None
    #: batches per validation
    n_batches: int = 1


@dataclass(frozen=True)
class TaskConfig:
    """One task: the head that it trains, its loss and its data."""

    name: str
    #: entry of `model_dict`, references resolved and defaults filled in
    model: dict[str, Any]
    loss: LossConfig
    training: DataConfig
    validation: DataConfig | None
    #: relative probability, or number of epochs; None where the input gives neither
    weight: float | None
    epochs: float | None


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam or AdamW."""

    name: str
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True)
class RunOptions:
    """Section `training`, without the data."""

    n_steps: int | None
    n_epochs: float | None
    seed: int
    disp_freq: int
    save_freq: int
    save_ckpt: str
    max_ckpt_keep: int
    gradient_max_norm: float
    #: decay of the exponential moving average of the weights; None for none
    ema_decay: float | None


@dataclass(frozen=True)
class TrainConfig:
    """A whole training input."""

    path: Path
    multitask: bool
    #: as given; stored with the checkpoint
    shared_dict: dict[str, Any]
    tasks: tuple[TaskConfig, ...]
    links: tuple[Link, ...]
    #: completed section
    learning_rate: dict[str, Any]
    optimizer: OptimizerConfig
    run: RunOptions
    #: keys that were given and have no effect here
    without_effect: tuple[str, ...]


def read_config(path: Path) -> TrainConfig:
    """Read and check a training input, multitask or single-task.

    Raises
    ------
    ConfigError
        The file can't be read, has an unknown key, lacks one, or asks for what is not supported.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{str(path)!r} can't be read: {err.strerror}") from err
    except ValueError as err:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {err}") from err
    return parse_config(content, path)


def parse_config(content: object, path: Path) -> TrainConfig:
    """Check the content of a training input; see `read_config`."""
    top = complete(content, schema.TOP, "the input")
    if isinstance(top["validating"], Mapping) and top["validating"].get("full_validation"):
        raise ConfigError("validating.full_validation is true, which is not supported; supported: false")
    training = complete(top["training"], schema.TRAINING, "training")
    multitask = isinstance(top["model"], Mapping) and "model_dict" in top["model"]
    shared, heads, links = _heads(top["model"]) if multitask else ({}, {DEFAULT_HEAD: top["model"]}, ())
    models = {name: _head(name, config, multitask) for name, config in heads.items()}
    try:
        check_aliases({name: tuple(model["model_branch_alias"]) for name, model in models.items()})
    except CheckpointError as err:
        raise ConfigError(str(err)) from err
    _check_case_embedding(models)
    tasks = _tasks(models, top, training, multitask)
    without_effect = [f"training.{key}" for key in schema.WITHOUT_EFFECT if key in training]
    return TrainConfig(
        path=path,
        multitask=multitask,
        shared_dict=shared,
        tasks=tasks,
        links=links,
        learning_rate=complete(top["learning_rate"], schema.LEARNING_RATE, "learning_rate"),
        optimizer=_optimizer(top["optimizer"]),
        run=_run(training),
        without_effect=tuple(without_effect),
    )


# ---- model -------------------------------------------------------------------------------------------


def _heads(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], tuple[Link, ...]]:
    """Resolve the references of all heads to `shared_dict`."""
    shared, entries = model.get("shared_dict", {}), model["model_dict"]
    if not isinstance(shared, Mapping) or not isinstance(entries, Mapping) or not entries:
        raise ConfigError(
            "model.shared_dict and model.model_dict must be sections, and name at least one head"
        )
    common = {k: v for k, v in model.items() if k not in ("shared_dict", "model_dict") and k[:1] != "_"}
    used: dict[tuple[str, str], list[tuple[str, int]]] = {}
    heads: dict[str, dict[str, Any]] = {}
    for head, entry in entries.items():
        if not head or "." in head or not isinstance(entry, Mapping):
            raise ConfigError(
                f"model_dict: {head!r} is no valid head; a name has no '.', and an entry is a section"
            )
        heads[head] = copy.deepcopy(dict(common) | dict(entry))
        for part, place, key in _references(heads[head]):
            name, level = _reference(place[key], shared, f"model_dict.{head}.{part}")
            place[key] = copy.deepcopy(shared[name])
            used.setdefault((part, name), []).append((head, level))
    _check_places(used)
    links = []
    for (part, name), members in used.items():
        if part != "type_map" and len(members) > 1:
            members = sorted(members, key=lambda member: member[1])
            _check_levels(part, name, members, shared[name])
            links.append(Link(part, name, tuple(members)))
    return dict(shared), heads, tuple(links)


def _references(entry: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Parts of a head that are named instead of given: part, and the container and key that hold the name.

    The members of a hybrid descriptor come after the descriptor, which may itself have been named.
    """
    for part in _PARTS:
        if isinstance(entry.get(part), str):
            yield part, entry, part
    descriptor = entry.get("descriptor")
    members = descriptor.get("list") if isinstance(descriptor, Mapping) else None
    for index, member in enumerate(members if isinstance(members, list) else ()):
        if isinstance(member, str):
            yield member_name(index, "descriptor"), members, index


def _check_places(used: Mapping[tuple[str, str], Any]) -> None:
    """Refuse an entry that descriptors use at different places: their weights have different names."""
    places: dict[str, str] = {}
    for part, name in used:
        if part.startswith("descriptor") and places.setdefault(name, part) != part:
            raise ConfigError(
                f"shared_dict.{name} is used as {places[name]} and as {part}; sharing a descriptor across "
                "places is not supported: use it at the same place, or give it twice under two names"
            )


def _reference(reference: str, shared: Mapping[str, Any], where: str) -> tuple[str, int]:
    name, _, level = reference.partition(":")
    if name not in shared:
        hint = nearest(name, shared) or f"; it has {', '.join(shared) or 'no entries'}"
        raise ConfigError(f"{where} names {name!r}, which is not in shared_dict{hint}")
    if level and not level.isdecimal():
        raise ConfigError(f"{where} is {reference!r}; a share level is a number, as in {name}:1")
    return name, int(level or 0)


def _check_levels(part: str, name: str, members: list[tuple[str, int]], entry: Any) -> None:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    highest = 0 if part == "fitting_net" or kind in ("se_e2_a", "se_a", "hybrid") else 1
    for head, level in members:
        if level > highest:
            raise ConfigError(
                f"head {head!r} shares {name!r} at level {level}; allowed for this {part} are 0 to {highest}"
            )


def _head(name: str, given: Any, multitask: bool) -> dict[str, Any]:
    where = f"model_dict.{name}" if multitask else "model"
    if isinstance(given, Mapping) and (reason := refusal(name, given, {}, trains=True)):
        raise ConfigError(reason)
    head = complete(given, schema.HEAD, where)
    type_map = head["type_map"]
    if not isinstance(type_map, list) or len(set(type_map)) != len(type_map) or not type_map:
        raise ConfigError(f"{where}.type_map is {type_map!r}; expected a list of different elements")
    head["descriptor"] = _descriptor(head["descriptor"], f"{where}.descriptor")
    head["fitting_net"] = complete(head["fitting_net"], schema.FITTING, f"{where}.fitting_net")
    return head


def _descriptor(given: Any, where: str, *, within_hybrid: bool = False) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected a section {{...}} or the name of a shared one")
    kind = str(given.get("type", "se_e2_a"))
    kind = schema.DESCRIPTOR_ALIASES.get(kind, kind)
    if kind == "hybrid" and not within_hybrid:
        return _hybrid(given, where)
    if kind not in schema.DESCRIPTORS:
        raise ConfigError(
            f"{where}.type is {kind!r}, which can't be trained{nearest(kind, schema.DESCRIPTORS)}; "
            f"supported are {', '.join(schema.DESCRIPTORS)}{'' if within_hybrid else ', hybrid'}"
        )
    found = complete({**given, "type": kind}, schema.DESCRIPTORS[kind], where)
    for section, key, _ in schema.NEIGHBOR_COUNTS[kind]:
        count = (found if section is None else found[section])[key]
        if isinstance(count, str) and not re.fullmatch(r"auto(:\d+(\.\d*)?)?", count):
            path = f"{where}.{key}" if section is None else f"{where}.{section}.{key}"
            raise ConfigError(f"{path} is {count!r}; supported are numbers, 'auto' and 'auto:FACTOR'")
    return found


def _hybrid(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = complete(given, schema.HYBRID, where)
    members = found["list"]
    if not isinstance(members, list) or not members:
        raise ConfigError(f"{where}.list is {members!r}; expected a list of descriptors")
    found["list"] = [
        _descriptor(member, f"{where}.list[{index}]", within_hybrid=True)
        for index, member in enumerate(members)
    ]
    return found


def _check_case_embedding(models: Mapping[str, dict[str, Any]]) -> None:
    for name, model in models.items():
        width = model["fitting_net"]["dim_case_embd"]
        if width and width < len(models):
            raise ConfigError(
                f"model_dict.{name}.fitting_net.dim_case_embd is {width}; with {len(models)} heads it must "
                f"be at least {len(models)}"
            )


# ---- tasks -------------------------------------------------------------------------------------------


def _tasks(
    models: Mapping[str, dict[str, Any]], top: dict[str, Any], training: dict[str, Any], multitask: bool
) -> tuple[TaskConfig, ...]:
    if multitask:
        losses = _by_head("loss_dict", top["loss_dict"], models)
        data = _by_head("training.data_dict", training["data_dict"], models)
        losses_at, data_at = "loss_dict.{}", "training.data_dict.{}"
    else:
        losses = {DEFAULT_HEAD: top["loss"] or {}}
        sections = {key: training[key] for key in ("training_data", "validation_data")}
        data = {DEFAULT_HEAD: {key: value for key, value in sections.items() if value is not None}}
        losses_at, data_at = "loss", "training"
    weights, epochs = (_numbers(key, training[key], models) for key in ("model_prob", "num_epoch_dict"))
    tasks = []
    for name, model in models.items():
        own = complete(data[name], schema.TASK_DATA, data_at.format(name))
        where = data_at.format(name)
        validation = own["validation_data"]
        tasks.append(
            TaskConfig(
                name=name,
                model=model,
                loss=LossConfig.from_config(complete(losses[name], schema.LOSS, losses_at.format(name))),
                training=_data(own["training_data"], schema.TRAINING_DATA, f"{where}.training_data"),
                validation=_data(validation, schema.VALIDATION_DATA, f"{where}.validation_data")
                if validation is not None
                else None,
                weight=weights.get(name),
                epochs=epochs.get(name),
            )
        )
    return tuple(tasks)


def _by_head(where: str, given: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is missing; it needs an entry for each of {', '.join(models)}")
    given = {key: value for key, value in given.items() if key[:1] != "_"}
    for key in given:
        if key not in models:
            hint = nearest(key, models) or f"; heads: {', '.join(models)}"
            raise ConfigError(f"{where} has an entry {key!r}, which is no head{hint}")
    for name in models:
        if name not in given:
            raise ConfigError(f"{where} lacks an entry for the head {name!r}")
    return dict(given)


def _numbers(key: str, given: Any, models: Mapping[str, Any]) -> dict[str, float]:
    if not given:
        return {}
    entries = _by_head(f"training.{key}", given, models)
    for name, value in entries.items():
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"training.{key}.{name} is {value!r}; expected a number that is not negative")
    if not sum(entries.values()):
        raise ConfigError(f"training.{key}: all entries are 0; at least one must be positive")
    return {name: float(value) for name, value in entries.items()}


def _data(given: Any, section: schema.Section, where: str) -> DataConfig:
    found = complete(given, section, where)
    systems = [found["systems"]] if isinstance(found["systems"], str) else found["systems"]
    if not isinstance(systems, list) or not systems or not all(isinstance(name, str) for name in systems):
        raise ConfigError(f"{where}.systems is {systems!r}; expected a path or a list of paths")
    size = found["batch_size"]
    sizes = size if isinstance(size, list) else [size]
    numbers = all(isinstance(n, int) and n > 0 for n in sizes)
    if not numbers and not (isinstance(size, str) and re.fullmatch(r"auto|(auto|max|filter):[1-9]\d*", size)):
        raise ConfigError(
            f"{where}.batch_size is {size!r}; supported are a positive number, a list of one per system, "
            "'auto', 'auto:N', 'max:N' and 'filter:N'"
        )
    probabilities = found["sys_probs"]
    return DataConfig(
        systems=tuple(systems),
        batch_size=tuple(size) if isinstance(size, list) else size,
        auto_prob=str(found["auto_prob"]),
        sys_probs=None if probabilities is None else tuple(map(float, probabilities)),
        n_batches=int(found.get("numb_btch", 1)),
    )


# ---- run ---------------------------------------------------------------------------------------------


def _optimizer(given: Any) -> OptimizerConfig:
    name = given.get("type", "Adam") if isinstance(given, Mapping) else None
    if name not in schema.OPTIMIZERS:
        raise ConfigError(
            f"optimizer.type is {name!r}, which is not supported; supported: {', '.join(schema.OPTIMIZERS)}"
        )
    found = complete(given, schema.OPTIMIZERS[name], "optimizer")
    betas = float(found["adam_beta1"]), float(found["adam_beta2"])
    return OptimizerConfig(name, betas, float(found["weight_decay"]))


def _run(training: Mapping[str, Any]) -> RunOptions:
    for key in ("disp_freq", "save_freq", "max_ckpt_keep"):
        if not isinstance(training[key], int) or training[key] < 1:
            raise ConfigError(f"training.{key} is {training[key]!r}; expected a positive number")
    given = [key for key in ("numb_steps", "numb_epoch", "num_epoch_dict") if training[key]]
    if len(given) != 1:
        raise ConfigError(
            f"training gives {' and '.join(given) or 'no number of steps'}; give one of numb_steps, "
            "numb_epoch, num_epoch_dict"
        )
    return RunOptions(
        n_steps=None if training["numb_steps"] is None else int(training["numb_steps"]),
        n_epochs=None if training["numb_epoch"] is None else float(training["numb_epoch"]),
        seed=int(training["seed"] or 0),
        disp_freq=training["disp_freq"],
        save_freq=training["save_freq"],
        save_ckpt=Path(training["save_ckpt"]).name,
        max_ckpt_keep=training["max_ckpt_keep"],
        gradient_max_norm=float(training["gradient_max_norm"]),
        ema_decay=float(training["ema_decay"]) if training["enable_ema"] else None,
    )
