"""A training input of deepmd-kit, checked and settled: tasks, what they share, loss, data, run options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.heads import DEFAULT_HEAD
from ..errors import ConfigError, nearest
from ..options import Section
from . import schema
from .loss import LossConfig
from .model_section import Link, read_model
from .schema import complete
from .values import NOT_NEGATIVE, VALIDATING_WITHOUT_EFFECT, WITHOUT_EFFECT

__all__ = ["DataConfig", "OptimizerConfig", "RunOptions", "TaskConfig", "TrainConfig", "read_config"]


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
        yaml = "; YAML is not read, write it as JSON" if path.suffix.lower() in (".yaml", ".yml") else ""
        raise ConfigError(f"{str(path)!r} is not valid JSON: {err}{yaml}") from err
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
    if top["validating"] is not None:
        complete(top["validating"], schema.VALIDATING, "validating")
    training = complete(top["training"], schema.TRAINING, "training")
    multitask = isinstance(top["model"], Mapping) and "model_dict" in top["model"]
    _check_kind_of_input(top, training, multitask)
    model = read_model(top["model"], multitask=multitask)
    tasks = _tasks(model.heads, top, training, multitask)
    return TrainConfig(
        path=path,
        multitask=multitask,
        shared_dict=model.shared_dict,
        tasks=tasks,
        links=model.links,
        learning_rate=_learning_rate(top),
        optimizer=_optimizer(top["optimizer"]),
        run=_run(training),
        without_effect=(
            *(f"shared_dict.{name}" for name in model.unused),
            *_without_effect(top, training, model.given, multitask),
        ),
    )


def _without_effect(
    top: Mapping[str, Any], training: Mapping[str, Any], heads: Mapping[str, Any], multitask: bool
) -> Iterator[str]:
    """Yield keys that are given and change no number here."""
    sections = {"training": training, "loss": top["loss"] or {}, "validating": top["validating"] or {}}
    sections |= {f"model_dict.{name}" if multitask else "model": head for name, head in heads.items()}
    for path in ("loss_dict", "training.data_dict"):
        entries = _at(path, top, training) or {}
        sections |= {f"{path}.{name}": entry for name, entry in entries.items() if name in heads}
    for where, section in sections.items():
        for key in section:
            if key in (*WITHOUT_EFFECT, *VALIDATING_WITHOUT_EFFECT, "data_bias_nsample", "huber_delta"):
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


def _data(given: Any, section: Section, where: str) -> DataConfig:
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
