"""A training input of deepmd-kit, checked and settled: tasks, what they share, loss, data, run options."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.heads import DEFAULT_HEAD, check_aliases
from ..checkpoint.refusals import refusal
from ..descriptor_kinds import KINDS, kind_of
from ..errors import CheckpointError, ConfigError, nearest
from ..models.hybrid import member_name
from . import schema
from .loss import LossConfig
from .schema import complete
from .values import NOT_NEGATIVE, SECTION, WITHOUT_EFFECT

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
    #: path of the section in the input, for error texts
    where: str
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
    #: where checkpoints go, before "-<step>.pt"; relative to the folder of the run
    save_ckpt: Path
    max_ckpt_keep: int
    #: of averaged weights
    ema_ckpt_keep: int
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
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except OSError as err:
        raise ConfigError(f"{str(path)!r} can't be read: {err.strerror}") from err
    except ValueError as err:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {err}") from err
    return parse_config(content, path)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Section of a JSON file; a key given twice is refused, as the first would be lost, comments apart."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and key[:1] != "_":
            raise ConfigError(f"the input has the key {key!r} twice in one section; give it once")
        found[key] = value
    return found


def parse_config(content: object, path: Path) -> TrainConfig:
    """Check the content of a training input; see `read_config`."""
    top = complete(content, schema.TOP, "the input")
    if (full := (top["validating"] or {}).get("full_validation", False)) is not False:
        raise ConfigError(f"validating.full_validation is {full!r}, which is not supported; supported: false")
    training = complete(top["training"], schema.TRAINING, "training")
    multitask = isinstance(top["model"], Mapping) and "model_dict" in top["model"]
    _check_kind_of_input(top, training, multitask)
    shared, heads, links = _heads(top["model"]) if multitask else ({}, {DEFAULT_HEAD: top["model"]}, ())
    models = {name: _head(name, config, multitask) for name, config in heads.items()}
    try:
        check_aliases({name: tuple(model["model_branch_alias"]) for name, model in models.items()})
    except CheckpointError as err:
        raise ConfigError(str(err)) from err
    _check_type_maps(models, links)
    _check_case_embedding(models)
    tasks = _tasks(models, top, training, multitask)
    return TrainConfig(
        path=path,
        multitask=multitask,
        shared_dict=shared,
        tasks=tasks,
        links=links,
        learning_rate=_learning_rate(top),
        optimizer=_optimizer(top["optimizer"]),
        run=_run(training),
        without_effect=tuple(_without_effect(top, training, heads, multitask)),
    )


def _without_effect(
    top: Mapping[str, Any], training: Mapping[str, Any], heads: Mapping[str, Any], multitask: bool
) -> Iterator[str]:
    """Yield keys that are given and change no number here; of `validating`, all but the one checked."""
    sections = {"training": training, "loss": top["loss"] or {}, "validating": top["validating"] or {}}
    sections |= {f"model_dict.{name}" if multitask else "model": head for name, head in heads.items()}
    for path in ("loss_dict", "training.data_dict"):
        entries = _at(path, top, training) or {}
        sections |= {f"{path}.{name}": entry for name, entry in entries.items() if name in heads}
    for where, section in sections.items():
        for key in section:
            unread = where == "validating" and key != "full_validation" and key[:1] != "_"
            if unread or key in (*WITHOUT_EFFECT, "data_bias_nsample", "huber_delta"):
                yield f"{where}.{key}"
    rate, own = top["learning_rate"], _learning_rate(top)["type"]
    others = {key for kind, keys in schema.KEYS_OF_SCHEDULES.items() if kind != own for key in keys}
    yield from (f"learning_rate.{key}" for key in rate if key in others)
    for where, data in _data_sections(training, heads, multitask):
        validation = data.get("validation_data") or {}
        # it goes through all systems in turn
        yield from (f"{where}.validation_data.{key}" for key in validation if key in schema.PROBABILITIES)


def _data_sections(
    training: Mapping[str, Any], heads: Iterable[str], multitask: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where the data of each task are given, and the section that holds them."""
    if not multitask:
        yield "training", training
        return
    for name in heads:
        yield f"training.data_dict.{name}", training["data_dict"][name]


#: keys of an input for several tasks, and of one for a single task
_OF_SEVERAL = ("loss_dict", "training.data_dict", "training.model_prob", "training.num_epoch_dict")
_OF_ONE = ("loss", "training.training_data", "training.validation_data")


def _check_kind_of_input(top: Mapping[str, Any], training: Mapping[str, Any], multitask: bool) -> None:
    """Refuse keys that the other kind of input has, which would be passed over, and those that exclude."""
    given = {key for key in (*_OF_SEVERAL, *_OF_ONE) if _at(key, top, training) not in (None, {})}
    wrong, right = (_OF_ONE, _OF_SEVERAL) if multitask else (_OF_SEVERAL, _OF_ONE)
    for key in wrong:
        if key in given:
            kind = "several tasks (model.model_dict)" if multitask else "one task (no model.model_dict)"
            raise ConfigError(f"{key} is given, but the input is for {kind}, which has {', '.join(right)}")
    if {"training.model_prob", "training.num_epoch_dict"} <= given:
        raise ConfigError("training gives model_prob and num_epoch_dict, which sets probabilities; give one")


def _at(path: str, top: Mapping[str, Any], training: Mapping[str, Any]) -> Any:
    section, _, key = path.rpartition(".")
    return (training if section else top)[key]


# ---- model -------------------------------------------------------------------------------------------


def _heads(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], tuple[Link, ...]]:
    """Resolve the references of all heads to `shared_dict`."""
    shared, entries = model.get("shared_dict", {}), model["model_dict"]
    for key, section in (("shared_dict", shared), ("model_dict", entries)):
        SECTION.check(section, f"model.{key}")
    entries = {head: entry for head, entry in entries.items() if head[:1] != "_"}  # without comments
    if not entries:
        raise ConfigError("model.model_dict names no head; give at least one entry")
    common = {k: v for k, v in model.items() if k not in ("shared_dict", "model_dict") and k[:1] != "_"}
    used: dict[tuple[str, str], list[tuple[str, int]]] = {}
    heads: dict[str, dict[str, Any]] = {}
    for head, entry in entries.items():
        SECTION.check(entry, f"model_dict.{head}")
        if not head or "." in head:
            raise ConfigError(f"model_dict has the head {head!r}; expected a name without '.'")
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
    kind = KINDS.get(kind_of(entry)) if isinstance(entry, Mapping) else None
    highest = 0 if part == "fitting_net" or (kind and not kind.type_embedding) else 1
    for head, level in members:
        if level > highest:
            raise ConfigError(
                f"head {head!r} shares {name!r} at level {level}; allowed for this {part} are 0 to {highest}"
            )


def _head(name: str, given: Any, multitask: bool) -> dict[str, Any]:
    where = f"model_dict.{name}" if multitask else "model"
    if reason := _refusal(name, given):
        raise ConfigError(reason)
    head = complete(given, schema.HEAD, where)
    type_map = head["type_map"]
    if len(set(type_map)) != len(type_map) or not type_map:
        raise ConfigError(f"{where}.type_map is {type_map!r}; expected a list of different elements")
    n_types = len(type_map)
    _check_types(head, where, n_types, indices=("pair_exclude_types", "atom_exclude_types"))
    _check_types(head["preset_out_bias"] or {}, f"{where}.preset_out_bias", n_types, lists=("energy",))
    head["descriptor"] = _descriptor(head["descriptor"], f"{where}.descriptor", n_types)
    head["fitting_net"] = _fitting(head["fitting_net"], f"{where}.fitting_net", n_types)
    return head


def _refusal(name: str, given: Any) -> str | None:
    try:
        return refusal(name, given, {}, trains=True) if isinstance(given, Mapping) else None
    except TypeError:  # a value of the wrong type, which `complete` names
        return None


def _check_types(
    section: Mapping[str, Any],
    where: str,
    n_types: int,
    *,
    indices: Iterable[str] = (),
    lists: Iterable[str] = (),
) -> None:
    """Check keys that hold indices into the type map, and lists with an entry for each of it."""
    for key in indices:
        found = [index for entry in section[key] for index in (entry if isinstance(entry, list) else [entry])]
        if any(index >= n_types for index in found):
            raise ConfigError(
                f"{where}.{key} is {section[key]!r}; expected indices into type_map, 0 to {n_types - 1}"
            )
    for key in lists:
        value = section.get(key)
        if value and not isinstance(value, str) and not (isinstance(value, list) and len(value) == n_types):
            raise ConfigError(
                f"{where}.{key} is {value!r}; expected a list of {n_types}, one per entry of type_map"
            )


def _fitting(given: Any, where: str, n_types: int) -> dict[str, Any]:
    found = complete(given, schema.FITTING, where)
    _check_types(found, where, n_types, lists=("atom_ener",))
    default, size = found["default_fparam"], found["numb_fparam"]
    if default is not None and len(default) != size:
        raise ConfigError(
            f"{where}.default_fparam is {default!r}; expected {size} numbers, as numb_fparam says"
        )
    return found


def _descriptor(given: Any, where: str, n_types: int, *, within_hybrid: bool = False) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected a section {{...}} or the name of a shared one")
    kind = kind_of(given)
    if kind == "hybrid" and not within_hybrid:
        return _hybrid(given, where, n_types)
    if kind not in schema.DESCRIPTORS:
        supported = [*schema.DESCRIPTORS, *([] if within_hybrid else ["hybrid"])]
        raise ConfigError(
            f"{where}.type is {kind!r}, which can't be trained{nearest(kind, supported)}; supported are "
            f"{', '.join(supported)}"
        )
    found = complete({**given, "type": kind}, schema.DESCRIPTORS[kind], where)
    if kind == "dpa3" and found["repflow"]["skip_stat"]:
        found["repflow"]["fix_stat_std"] = 0.3  # the older spelling, which wins in deepmd-kit, too
    lists = ("sel",) if kind == "se_e2_a" else ()
    _check_types(found, where, n_types, indices=("exclude_types",), lists=lists)
    return found


def _hybrid(given: Mapping[str, Any], where: str, n_types: int) -> dict[str, Any]:
    found = complete(given, schema.HYBRID, where)
    members = found["list"]
    if not isinstance(members, list) or not members:
        raise ConfigError(f"{where}.list is {members!r}; expected a list of descriptors")
    found["list"] = [
        _descriptor(member, f"{where}.list[{index}]", n_types, within_hybrid=True)
        for index, member in enumerate(members)
    ]
    return found


def _check_type_maps(models: Mapping[str, dict[str, Any]], links: Iterable[Link]) -> None:
    """Refuse to share between different type maps: weights go by the index of an element."""
    for link in links:
        base, *others = (head for head, _ in link.heads)
        for head in others:
            maps = [models[name]["type_map"] for name in (base, head)]
            if maps[0] != maps[1]:
                raise ConfigError(
                    f"heads {base!r} and {head!r} share the {link.part} {link.name!r} but have different "
                    f"type maps, {maps[0]!r} and {maps[1]!r}; give both the same, in the same order"
                )


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
        NOT_NEGATIVE.check(value, f"training.{key}.{name}")
    if not sum(entries.values()):
        raise ConfigError(f"training.{key}: all entries are 0; at least one must be positive")
    return {name: float(value) for name, value in entries.items()}


def _data(given: Any, section: schema.Section, where: str) -> DataConfig:
    found = complete(given, section, where)
    systems, size, probabilities = found["systems"], found["batch_size"], found["sys_probs"]
    return DataConfig(
        systems=(systems,) if isinstance(systems, str) else tuple(systems),
        batch_size=tuple(size) if isinstance(size, list) else size,
        auto_prob=found["auto_prob"],
        sys_probs=None if probabilities is None else tuple(map(float, probabilities)),
        n_batches=found.get("numb_btch", 1),
        where=where,
    )


# ---- run ---------------------------------------------------------------------------------------------


def _learning_rate(top: Mapping[str, Any]) -> dict[str, Any]:
    return complete(top["learning_rate"], schema.LEARNING_RATE, "learning_rate")


def _optimizer(given: Mapping[str, Any]) -> OptimizerConfig:
    name = given.get("type", "Adam")
    if not isinstance(name, str) or name not in schema.OPTIMIZERS:
        raise ConfigError(
            f"optimizer.type is {name!r}, which is not supported; supported: {', '.join(schema.OPTIMIZERS)}"
        )
    found = complete(given, schema.OPTIMIZERS[name], "optimizer")
    betas = float(found["adam_beta1"]), float(found["adam_beta2"])
    return OptimizerConfig(name, betas, float(found["weight_decay"]))


def _run(training: Mapping[str, Any]) -> RunOptions:
    given = [key for key in ("numb_steps", "numb_epoch", "num_epoch_dict") if training[key]]
    if len(given) != 1:
        raise ConfigError(
            f"training gives {' and '.join(given) or 'no number of steps'}; give one of numb_steps, "
            "numb_epoch, num_epoch_dict"
        )
    return RunOptions(
        n_steps=training["numb_steps"],
        n_epochs=None if training["numb_epoch"] is None else float(training["numb_epoch"]),
        seed=training["seed"] or 0,
        disp_freq=training["disp_freq"],
        save_freq=training["save_freq"],
        save_ckpt=_save_ckpt(training["save_ckpt"]),
        max_ckpt_keep=training["max_ckpt_keep"],
        ema_ckpt_keep=training["ema_ckpt_keep"] or training["max_ckpt_keep"],
        gradient_max_norm=float(training["gradient_max_norm"]),
        ema_decay=float(training["ema_decay"]) if training["enable_ema"] else None,
    )


def _save_ckpt(given: object) -> Path:
    if not isinstance(given, str) or not Path(given).name:
        raise ConfigError(f"training.save_ckpt is {given!r}; expected a name, as in 'model.ckpt'")
    return Path(given)
