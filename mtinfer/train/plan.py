"""What a training input amounts to: models, data, probabilities, number of steps, graphs to compile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, UnsupportedModelError
from ..models import EnergyModel
from .batch import parameters_of
from .config import TaskConfig, TrainConfig
from .loss import LABELS, LossConfig
from .neighbor_counts import settle_counts
from .sampling import System, batches_per_epoch, load_systems, system_probabilities
from .schedule import Schedule
from .step import signature
from .weights import Owners, check_shapes, trained_names

__all__ = ["Plan", "Task", "describe_plan", "make_plan"]


@dataclass(frozen=True)
class Task:
    """One task with its model and data."""

    config: TaskConfig
    model: EnergyModel
    systems: list[System]
    #: (n_systems,)
    system_probabilities: NDArray[np.float64]
    validation: list[System]

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class Plan:
    """A training input with everything that the data decide."""

    config: TrainConfig
    #: "pt" or "pt_expt": how neighbours count, and how checkpoints are spelled
    dialect: str
    tasks: tuple[Task, ...]
    #: (n_tasks,)
    probabilities: NDArray[np.float64]
    schedule: Schedule
    #: task -> key -> neighbour count that the input left to the data
    counts: dict[str, dict[str, int | list[int]]]

    @property
    def models(self) -> dict[str, EnergyModel]:
        """Model by head."""
        return {task.name: task.model for task in self.tasks}

    @cached_property
    def owners(self) -> Owners:
        """Which head's tensor a weight is."""
        return Owners(self.config.links)


def make_plan(config: TrainConfig, *, dialect: str = "pt_expt", n_steps: int | None = None) -> Plan:
    """Build models, read data and settle what depends on them.

    Parameters
    ----------
    n_steps
        replaces the number of steps of the input; the learning rate is spread over it.

    Raises
    ------
    ConfigError
        A model can't be built, or the data and the input disagree.
    DataError
        Data are missing or unreadable.
    """
    folder = config.path.parent
    systems = {
        task.name: load_systems(task.training, task.model["type_map"], folder) for task in config.tasks
    }
    frames = {name: [frame for system in own for frame in system.frames] for name, own in systems.items()}
    config, counts = settle_counts(config, frames)
    tasks = tuple(
        _task(replace(task, loss=task.loss.in_dialect(dialect)), systems[task.name], folder, dialect)
        for task in config.tasks
    )
    check_shapes(config.links, {task.name: task.model for task in tasks})
    if any(task.config.epochs for task in tasks):
        per_task = [_epoch(task) * float(task.config.epochs or 0.0) for task in tasks]
        weights, total = np.array(per_task), math.ceil(sum(per_task))
    else:
        given = [task.config.weight for task in tasks]
        weights = np.array(
            [len(t.systems) if w is None else w for t, w in zip(tasks, given, strict=True)], float
        )
        total = _n_steps(config, tasks)
    schedule = Schedule.from_config(config.learning_rate, n_steps or total)
    return Plan(config, dialect, tasks, weights / weights.sum(), schedule, counts)


def _n_steps(config: TrainConfig, tasks: tuple[Task, ...]) -> int:
    if config.run.n_steps is not None:
        return config.run.n_steps
    if len(tasks) > 1:
        raise ConfigError("training.numb_epoch is for one task; give num_epoch_dict, an entry for each task")
    return math.ceil(float(config.run.n_epochs or 0.0) * _epoch(tasks[0]))


def _epoch(task: Task) -> int:
    return batches_per_epoch(task.systems, task.system_probabilities)


def _task(config: TaskConfig, systems: list[System], folder: Path, dialect: str) -> Task:
    try:
        model = EnergyModel.from_config(config.model, dialect)
    except UnsupportedModelError as err:
        raise ConfigError(f"head {config.name!r}: {err}") from err
    labels, counted = _labels(systems), config.loss.counted
    if not {*labels} & {*counted}:
        raise ConfigError(
            f"{config.training.where}: no frame has a label that the loss of task {config.name!r} counts "
            f"(labels: {', '.join(labels) or 'none'}; counted: {', '.join(counted) or 'none'}), so there is "
            "nothing to learn; give labels and prefactors that go together"
        )
    validation = [] if config.validation is None else load_systems(config.validation, model.type_map, folder)
    for frame in (frame for system in systems + validation for frame in system.frames):
        parameters_of(frame, model)
    return Task(config, model, systems, system_probabilities(config.training, systems), validation)


def _labels(systems: Sequence[System]) -> list[str]:
    """Labels that any frame has."""
    frames = [frame for system in systems for frame in system.frames]
    has = [[label is not None for label in frame.labels] for frame in frames]
    return [name for name, of_frames in zip(LABELS, zip(*has, strict=True), strict=True) if any(of_frames)]


def _notes(task: Task, given: LossConfig) -> Iterator[str]:
    """Yield what of the loss that the input gives a task, and of its data, has no effect."""
    counted, labels = task.config.loss.counted, _labels(task.systems)
    if left_out := [name for name in given.counted if name not in counted]:
        yield f"the dialect pt leaves out {', '.join(left_out)}: prefactor 0 at the start or at the limit"
    if missing := [name for name in counted if name not in labels]:
        yield f"no frame has {', '.join(missing)}, which the loss counts"
    if task.validation and not _labels(task.validation):
        yield "no frame for validation has a label"


def describe_plan(plan: Plan) -> Iterator[str]:
    """Yield the lines of ``mtinfer train --check``."""
    given = {task.name: task.loss for task in plan.config.tasks}
    for task, probability in zip(plan.tasks, plan.probabilities, strict=True):
        n_frames = sum(len(system.frames) for system in task.systems)
        n_validation = sum(len(system.frames) for system in task.validation)
        sizes = sorted({system.batch_size for system in task.systems})
        systems = f"{len(task.systems)} system{'s' * (len(task.systems) > 1)}"
        yield (
            f"task {task.name}: {task.config.model['descriptor']['type']}, {n_frames} frames in {systems}, "
            f"batch size {', '.join(map(str, sizes))}, {n_validation} frames for validation, probability "
            f"{probability:.3g}"
        )
        for note in _notes(task, given[task.name]):
            yield f"note on task {task.name}: {note}"
    for name, own in plan.counts.items():
        yield f"neighbour counts of {name}: {', '.join(f'{key} {count}' for key, count in own.items())}"
    for link in plan.config.links:
        heads = ", ".join(f"{head}" + (f" (level {level})" if level else "") for head, level in link.heads)
        yield f"shared: {link.part} {link.name!r} by {heads}"
    counted: dict[tuple[str, str], int] = {}
    for task in plan.tasks:
        specs = task.model.parameters()
        for name in trained_names(task.model, task.config.model):
            counted[plan.owners(task.name, name), name] = math.prod(specs[name].shape)
    yield f"parameters: {sum(counted.values()):,} trained"
    n_graphs = len({signature(task.model) for task in plan.tasks})
    yield f"graphs to compile: {n_graphs} for {len(plan.tasks)} task{'s' * (len(plan.tasks) > 1)}"
    schedule = plan.schedule
    yield f"steps: {schedule.n_steps:,}, learning rate {schedule(0):.3g} to {schedule(schedule.n_steps):.3g}"
    if plan.config.without_effect:
        yield f"without effect: {', '.join(plan.config.without_effect)}"
