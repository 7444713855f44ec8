"""The training loop: draw, step, show, save."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.frame import Frame
from ..errors import OutputError, PredictionWarning, TrainingError, user_level
from ..graph import CompileMode
from ..potential import truncation
from .batch import Batch
from .curves import CURVE, LearningCurve, picture_name, plot_curve, read_curve
from .fine_tuning import Origin, finetuned, refuse_heads, shifted_bias
from .loss import Errors
from .optimizer import Optimizer
from .plan import Plan, Task
from .ranks import Ranks
from .sampling import Batches, Sampler, System, elements
from .saving import Keeper, RunState
from .starting import Start, resumed
from .statistics import collect, times_drawn
from .step import TrainingStep, predicted_energies, signature
from .weights import (
    AllWeights,
    initial_weights,
    set_statistics,
    trained_labels,
    trained_names,
    weights_of_centers,
)

__all__ = ["Shown", "Trainer"]


@dataclass(frozen=True)
class Shown:
    """What is reported at every display."""

    step: int
    lr: float
    #: since the last display, displays and checkpoints included
    steps_per_second: float
    #: task -> training errors since the last display, validation errors; None where there are none
    errors: dict[str, tuple[Errors | None, Errors | None]]


#: signals within this many seconds of the first count as the same one: launchers send several
_REPEATED = 2.0
#: seconds between pictures of learning curves, whose drawing all processes wait for
_BETWEEN_PICTURES = 60.0


class Trainer:
    """Trains all tasks of a plan.

    Parameters
    ----------
    folder
        where checkpoints and learning curves go.
    mode
        "wait" compiles a graph for every architecture before the first step; "off" stays eager.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        start: Start | None = None,
        mode: CompileMode = "wait",
        ranks: Ranks | None = None,
    ) -> None:
        self.plan, self.folder = plan, folder
        self.ranks = ranks or Ranks()
        self.device = self.ranks.device
        self.keeper = Keeper(folder, plan)
        #: task -> what it started from, on the first process of a fine-tuning
        self.origins: dict[str, Origin] = {}
        self._batches = Batches([task.model for task in plan.tasks], self.device)
        state = self._start(start or Start())
        self.step = state.step
        self.weights = _on_device(state.weights, self.device)
        self.steps = _graphs(plan, self.weights, mode)
        self.sampler = Sampler(
            plan.config.run.seed,
            [(task.systems, task.system_probabilities) for task in plan.tasks],
            plan.probabilities,
            self.ranks.rank,
            self.ranks.size,
            drawn=state.drawn,
        )
        #: task -> name of each weight that it trains -> "owner/name"
        self._trained = {
            task.name: {
                name: f"{plan.owners(task.name, name)}/{name}"
                for name in sorted(trained_names(task.model, task.config.model))
            }
            for task in plan.tasks
        }
        #: task -> per type, weights that deepmd-kit leaves as they are where no atom of this type is drawn
        self._of_centers = {
            task.name: weights_of_centers(task.model) if plan.dialect == "pt_expt" else []
            for task in plan.tasks
        }
        #: "owner/name" -> tensor that the optimizer changes
        self.parameters = self._parameters()
        self.optimizer = self._optimizer()
        if state.optimizer:
            self.optimizer.load_state_dict(state.optimizer)
        self.ema = self._ema(state.ema)
        self._observed = state.observed
        #: false and true, which processes average; made once
        self._flags = torch.tensor([0.0, 1.0], device=self.device).unbind()
        self._no_centers = torch.zeros(0, device=self.device)
        #: task -> weights that its loss does not depend on
        self._unused: dict[str, frozenset[str]] = {}
        self._last_pictures = -math.inf
        #: tasks whose neighbours were found to be too many
        self._warned: set[str] = set()
        self._errors = [Errors(*found) for found in state.errors]

    # ---- start ---------------------------------------------------------------------------------------

    def _start(self, start: Start) -> RunState:
        self.ranks.from_first(
            lambda: self.keeper.claim(resume=start.resume, finetune=start.finetune, force=start.force)
        )
        if start.resume is not None:
            state = resumed(start.resume, self.plan)
            self.keeper.go_on(start.resume, state.step)
            return state
        if start.finetune is None:
            refuse_heads(self.plan)
        weights = self.plan.owners.joined(self.ranks.from_first(lambda: self._first_weights(start)))
        n_tasks = len(self.plan.tasks)
        errors = torch.zeros(n_tasks, 2, 3, dtype=torch.float64)
        observed = {task.name: sorted(elements(task.systems)) for task in self.plan.tasks}
        return RunState(0, weights, {}, [], errors, None, observed)

    def _first_weights(self, start: Start) -> AllWeights:
        plan = self.plan
        weights = initial_weights(plan)
        found = {
            task.name: collect(task.systems, task.model, task.config.model, dialect=plan.dialect)
            for task in plan.tasks
        }
        set_statistics(weights, plan, found)
        if start.finetune is not None:
            self.origins = finetuned(start.finetune, start.head, plan, weights)
            for k, task in enumerate(plan.tasks):
                if self.origins[task.name].taken == "networks":
                    own = weights[task.name]
                    bias = shifted_bias(task, own["out_bias"], self._residuals(k, own))
                    own["out_bias"], own["out_std"] = bias
        return weights

    def _residuals(self, k: int, weights: dict[str, Tensor]) -> list[tuple[Frame, float]]:
        """Energy labels minus predictions of a task, of the frames that statistics are made of."""
        task = self.plan.tasks[k]
        weights = {name: weight.to(self.device) for name, weight in weights.items()}
        found: list[tuple[Frame, float]] = []
        for index, system in enumerate(task.systems):
            times = times_drawn(system, int(task.config.model["data_stat_nbatch"]), self.plan.dialect)
            for chosen in _in_order(system, system.n_batches):
                if not any(times[i] for i in chosen):
                    break
                batch = self._batches(k, index, system, chosen)
                energy = predicted_energies(task.model, batch.structures, weights)
                for i, residual in zip(chosen, (batch.energy - energy).tolist(), strict=True):
                    if system.frames[i].energy is not None:
                        found += times[i] * [(system.frames[i], residual)]
        return found

    def _parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for label in trained_labels(self.plan):
            head, _, name = label.rpartition("/")
            found[label] = self.weights[head][name]
        return found

    def _optimizer(self) -> Optimizer:
        options = self.plan.config.optimizer
        return Optimizer(
            self.parameters,
            start=self.plan.schedule.start,
            betas=options.betas,
            weight_decay=options.weight_decay,
            decoupled=options.name == "AdamW",
        )

    def _ema(self, stored: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        if self.plan.config.run.ema_decay is None:
            return None
        stored = stored or {}
        return {
            label: stored.get(label, tensor).detach().to(self.device).clone()
            for label, tensor in self.parameters.items()
        }

    # ---- loop ----------------------------------------------------------------------------------------

    def run(
        self, *, shown: Callable[[Shown], None] = lambda _: None, tick: Callable[[int], None] = lambda _: None
    ) -> bool:
        """Train to the last step.

        Parameters
        ----------
        shown
            called at every display.
        tick
            called after every step with the number of steps completed.

        Returns
        -------
        bool
            False where the run was interrupted; a checkpoint was written then.

        Raises
        ------
        TrainingError
            The loss is not a number.
        """
        run, n_steps = self.plan.config.run, self.plan.schedule.n_steps
        curve: LearningCurve | None = None
        kept = self._kept_rows()
        self._compile()
        began = time.monotonic()
        self._last_display = began, self.step
        with _interruptible() as asked:
            while self.step < n_steps:
                lr, stop = self._advance(asked)
                tick(self.step)
                stop = stop or (self.ranks.size == 1 and asked())
                if curve is None and self.ranks.is_first:  # an earlier training goes when this one works
                    self.keeper.clear()
                    curve = LearningCurve(self.folder / CURVE, kept)
                last = self.step == n_steps
                shows = self.step % run.disp_freq == 0 or last
                saves = self.step % run.save_freq == 0 or last or stop
                if shows or saves:
                    self._pool_errors()
                if shows:
                    try:
                        self._display(curve, lr, time.monotonic() - began, shown)
                    except OutputError:  # of the learning curve: the training itself is not lost with it
                        self._save()
                        raise
                if saves:
                    self._save()
                    self._draw(wait=not (last or stop))
                if stop:
                    break
        self._thin_out()
        return self.step == n_steps

    def _kept_rows(self) -> list[dict[str, Any]]:
        """Rows of the learning curve up to the step that a resumed run goes on from."""
        path = self.folder / CURVE
        is_own = self.ranks.is_first and path.exists() and not self.keeper.replaces(path)
        rows = read_curve(path) if self.step and is_own else []
        return [row for row in rows if int(row["step"]) <= self.step]

    def _compile(self) -> None:
        """Make every graph ready, and let it pass its self-check, on the first process before the others."""
        for first in (True, False):
            if self.ranks.is_first == first:
                for step in {id(step): step for step in self.steps.values()}.values():
                    k, task = next(
                        (k, task) for k, task in enumerate(self.plan.tasks) if self.steps[task.name] is step
                    )
                    system = task.systems[0]
                    batch = self._batch(k, 0, system, next(_in_order(system, 1))[:1])
                    values = batch, task.config.loss.labels(batch, 1.0), self.weights[task.name]
                    step(*values)
                    found = step.unused_weights(*values)
                    self._unused |= {name: found for name, own in self.steps.items() if own is step}
            self.ranks.wait()

    def _advance(self, asked: Callable[[], bool]) -> tuple[float, bool]:
        """One step; returns its learning rate, and whether any process was asked to stop."""
        lr = self.plan.schedule(self.step)
        k, index, chosen = self.sampler.draw(self.step)
        task = self.plan.tasks[k]
        batch = self._batch(k, index, task.systems[index], chosen)
        labels = task.config.loss.labels(batch, lr / self.plan.schedule.start)
        result = self.steps[task.name](batch, labels, self.weights[task.name])
        trained = self._trained[task.name]
        stop = self._flags[asked()]
        own = [result.gradients[name] for name in trained]
        mean = self.ranks.mean([result.loss, stop, self._n_centers(task, batch), *own])
        (loss, stopping), n_centers, gradients = map(float, mean[:2]), mean[2], mean[3:]
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of task {task.name!r} is {loss} at step {self.step + 1} (learning rate "
                f"{lr:.3g}); lower start_lr or look at the data; {self.keeper.last_good()}"
            )
        self.keeper.accept()
        self._thin_out()
        self._errors[k] = self._errors[k] + Errors.of(batch, result.energy, result.forces, result.virial)
        still = self._unused[task.name].union(
            *(self._of_centers[task.name][t] for t in (n_centers == 0.0).nonzero().squeeze(1).tolist())
        )
        found = zip(trained.items(), gradients, strict=True)
        self._update({label: gradient for (name, label), gradient in found if name not in still}, lr)
        self.step += 1
        return lr, bool(stopping)

    def _n_centers(self, task: Task, batch: Batch) -> Tensor:
        """Atoms of every type that has weights of its own, shape (n_types,) or (0,)."""
        if not self._of_centers[task.name]:
            return self._no_centers
        return torch.bincount(batch.structures.types, minlength=len(task.model.type_map)).to(torch.float64)

    def _batch(self, k: int, index: int, system: System, chosen: tuple[int, ...]) -> Batch:
        """Batch on the device of the run; warns once per task of neighbours that are left out."""
        task, batch = self.plan.tasks[k], self._batches(k, index, system, chosen)
        if batch.n_truncated and self.ranks.is_first and task.name not in self._warned:
            self._warned.add(task.name)
            text = truncation(batch.n_truncated, len(batch.forces), task.name, task.model)
            warnings.warn(
                f"{text}; the nearest are used, and the energy is not smooth there; raise the counts",
                PredictionWarning,
                stacklevel=2,
            )
        return batch

    def _update(self, gradients: dict[str, Tensor], lr: float) -> None:
        run = self.plan.config.run
        if run.gradient_max_norm > 0.0:
            norm = torch.nn.utils.get_total_norm(list(gradients.values()))
            shrink = torch.clamp(run.gradient_max_norm / (norm + 1e-6), max=1.0)
            gradients = {label: gradient * shrink for label, gradient in gradients.items()}
        scale = {"linear": float(self.ranks.size), "sqrt": math.sqrt(self.ranks.size), "none": 1.0}
        self.optimizer.update(gradients, lr * scale[self.plan.config.learning_rate["scale_by_worker"]])
        if self.ema is not None and run.ema_decay is not None:
            for label, average in self.ema.items():
                average.lerp_(self.parameters[label].detach(), 1.0 - run.ema_decay)

    # ---- reports -------------------------------------------------------------------------------------

    def _display(
        self, curve: LearningCurve | None, lr: float, seconds: float, shown: Callable[[Shown], None]
    ) -> None:
        found: dict[str, tuple[Errors | None, Errors | None]] = {}
        for k, task in enumerate(self.plan.tasks):
            training = self._errors[k] if bool(self._errors[k].counts.any()) else None
            self._errors[k] = Errors.none()
            if curve is not None:
                found[task.name] = training, self._validate(k, task)
                curve.add(self.step, task.name, lr, seconds, found[task.name])
        if curve is not None:
            now, (then, step) = time.monotonic(), self._last_display
            self._last_display = now, self.step
            rate = (self.step - step) / max(now - then, 1e-9)
            shown(Shown(self.step, lr, rate, found))

    def _pool_errors(self) -> None:
        """Give every process the mean of the errors of all, whose ratios are what is shown."""
        own = [torch.stack([found.squares, found.counts]).to(self.device) for found in self._errors]
        self._errors = [Errors(*of_task.cpu()) for of_task in self.ranks.mean(own)]

    def _validate(self, k: int, task: Task) -> Errors | None:
        if task.config.validation is None or not task.validation:
            return None
        total = Errors.none()
        batches = _rounds(task.validation)
        n_batches = min(task.config.validation.n_batches, len(batches))
        # each display goes on where the one before ended, so that few batches see all systems in time
        display = (self.step - 1) // self.plan.config.run.disp_freq  # the last may come early
        first = n_batches * display
        for n in range(first, first + n_batches):
            index, system, chosen = batches[n % len(batches)]
            # validation systems are numbered on from the training systems
            batch = self._batch(k, len(task.systems) + index, system, chosen)
            result = self.steps[task.name](
                batch, task.config.loss.labels(batch, 1.0), self.weights[task.name]
            )
            total = total + Errors.of(batch, result.energy, result.forces, result.virial)
        return total

    def state(self) -> RunState:
        """Everything that a resumed run needs."""
        return RunState(
            step=self.step,
            weights=self.weights,
            optimizer=self.optimizer.state_dict(),
            drawn=[list(row) for row in self.sampler.drawn],
            errors=torch.stack([torch.stack([found.squares, found.counts]) for found in self._errors]),
            ema=self.ema,
            observed=self._observed,
        )

    def _thin_out(self) -> None:
        if self.ranks.is_first:
            self.keeper.thin_out()

    def _save(self) -> None:
        if not self.ranks.is_first:
            self.keeper.saved_elsewhere(self.step)
            return
        self.keeper.save(self.state())

    def _draw(self, *, wait: bool) -> None:
        """Draw the learning curves; while other processes `wait`, at most once a minute."""
        now = time.monotonic()
        if not self.ranks.is_first or (wait and now - self._last_pictures < _BETWEEN_PICTURES):
            return
        self._last_pictures = now
        try:
            rows = read_curve(self.folder / CURVE)
            for task in self.plan.tasks:
                plot_curve(rows, task.name, self.folder / picture_name(task.name))
        except OutputError as err:
            warnings.warn(f"{err}; the training goes on without pictures", stacklevel=user_level())


def _graphs(plan: Plan, weights: AllWeights, mode: CompileMode) -> dict[str, TrainingStep]:
    """Return the step of every task; tasks of one architecture have one."""
    made: dict[str, TrainingStep] = {}
    for task in plan.tasks:
        key = signature(task.model)
        if key not in made:
            made[key] = TrainingStep(task.model, weights[task.name], mode)
    return {task.name: made[signature(task.model)] for task in plan.tasks}


def _on_device(weights: AllWeights, device: torch.device) -> AllWeights:
    """Copy to `device`, each tensor once."""
    copies: dict[int, Tensor] = {}
    for own in weights.values():
        for tensor in own.values():
            copies.setdefault(id(tensor), tensor.detach().to(device).clone())
    return {head: {name: copies[id(tensor)] for name, tensor in own.items()} for head, own in weights.items()}


def _in_order(system: System, n_batches: int) -> Iterator[tuple[int, ...]]:
    size = system.batch_size
    for start in range(0, min(len(system.frames), n_batches * size), size):
        yield tuple(range(start, min(start + size, len(system.frames))))


def _rounds(systems: list[System]) -> list[tuple[int, System, tuple[int, ...]]]:
    """Batches of all systems in file order: the first of each, then the second, ..."""
    own = [
        [(index, system, chosen) for chosen in _in_order(system, system.n_batches)]
        for index, system in enumerate(systems)
    ]
    return [batch for of_round in itertools.zip_longest(*own) for batch in of_round if batch is not None]


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and a closed terminal ask for an end after the step; a later one ends at once."""
    asked: list[float] = []

    def note(*_: Any) -> None:
        now = time.monotonic()
        if asked and now - asked[0] > _REPEATED:
            raise KeyboardInterrupt
        asked.append(now)

    before: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue  # under `nohup`
            with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
                before[number] = signal.signal(number, note)
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
