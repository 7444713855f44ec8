"""Commands `train` and `verify`; like all commands they parse, call the package and print."""

from __future__ import annotations

import math
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import if_shown
from ..errors import ConfigError, OutputError, TrainingError
from ..files import alone

if TYPE_CHECKING:
    from .plan import Plan
    from .ranks import Ranks
    from .trainer import Shown, Trainer

_FILE = click.Path(path_type=Path)
#: file in the folder of a training that is there while it runs
LOCK = ".mtinfer-train.lock"


@click.command()
@click.argument("input_file", metavar="INPUT", type=_FILE)
@click.option("--check", is_flag=True, help="Check the input, print the plan, and train nothing.")
@click.option("--output", type=_FILE, default=Path(), help="Folder for checkpoints and curves  [default: .].")
@click.option("--resume", type=_FILE, help="Go on from this checkpoint of the same input.")
@click.option("--finetune", type=_FILE, help="Start from heads of this checkpoint.")
@click.option(
    "--head",
    "--model-branch",
    help="Head that all tasks start from  [default: finetune_head of each task, or its name].",
)
@click.option("--force", is_flag=True, help="Replace the files of an earlier training in the output folder.")
@click.option("--steps", type=click.IntRange(min=1), help="Number of steps  [default: that of the input].")
@click.option("--device", help="Torch device  [default: cuda where there is one, else cpu].")
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="Compile one step per architecture.",
)
@click.option(
    "--dialect",
    type=click.Choice(["pt_expt", "pt"]),
    default="pt_expt",
    show_default=True,
    help="Backend whose neighbour lists are used, and that reads the checkpoints.",
)
def train(
    input_file: Path,
    check: bool,
    output: Path,
    resume: Path | None,
    finetune: Path | None,
    head: str | None,
    force: bool,
    steps: int | None,
    device: str | None,
    compile_: str,
    dialect: str,
) -> None:
    """Train all tasks of INPUT together.

    INPUT is a deepmd-kit training input (JSON). Tasks of one architecture run through one compiled step.
    Writes checkpoints that deepmd-kit reads, lcurve.csv and a picture per task. Ctrl-C writes a checkpoint
    and ends; --resume goes on from it. Under torchrun, several processes train together.
    """
    from .config import read_config
    from .plan import describe_plan, make_plan
    from .ranks import Ranks
    from .starting import Start
    from .trainer import Trainer

    if resume is not None and finetune is not None:
        raise click.UsageError("--resume and --finetune exclude each other")
    if head is not None and finetune is None:
        raise click.UsageError("--head goes with --finetune")
    if check and (resume is not None or finetune is not None or force):
        raise click.UsageError("--check looks at the input alone; leave out --resume, --finetune and --force")
    start = Start(resume, finetune, head, force)
    plan = make_plan(read_config(input_file), dialect=dialect, n_steps=steps)
    if check:
        click.echo("\n".join(describe_plan(plan)))
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"{str(output)!r} can't be a folder: {err.strerror}") from err
    with ExitStack() as stack:
        ranks = Ranks.join(device)
        ranks.from_first(lambda: _hold(output, stack))
        if ranks.is_first:
            if_shown(click.echo, "\n".join(describe_plan(plan)))
        mode: Any = "wait" if compile_ == "on" else "off"
        trainer = Trainer(plan, output, start=start, mode=mode, ranks=ranks)
        for name, origin in trainer.origins.items():
            if_shown(click.echo, f"task {name} {origin}")
        finished = _run(trainer, plan, ranks, compiles=mode == "wait")
        ranks.leave()
    if ranks.is_first:
        newest = trainer.keeper.newest
        if_shown(
            click.echo,
            f"wrote {newest}"
            if finished
            else f"stopped at step {trainer.step}; resume with --resume {newest}",
        )
    if not finished:
        raise SystemExit(130)


def _hold(folder: Path, stack: ExitStack) -> None:
    """Hold a folder until the stack ends."""
    try:
        stack.enter_context(alone(folder / LOCK, wait=False))
    except BlockingIOError as err:
        raise OutputError(
            f"{str(folder)!r} is the folder of another training, which is running; choose another --output "
            "(several processes of one training are started with torchrun)"
        ) from err


def _run(trainer: Trainer, plan: Plan, ranks: Ranks, *, compiles: bool) -> bool:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{task.speed:.1f} steps/s" if task.speed else ""

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, disable=not (console.is_terminal and ranks.is_first))
    total = plan.schedule.n_steps
    bar = progress.add_task("compiling", total=total, completed=trainer.step)

    def tick(step: int) -> None:
        if_shown(progress.update, bar, completed=step, description="training")

    def say(line: str) -> None:
        if console.is_terminal:
            if_shown(progress.console.print, line, highlight=False)
        else:
            if_shown(click.echo, line)

    def shown(report: Shown) -> None:
        for line in report_lines(report, total):
            say(line)

    if ranks.is_first and not console.is_terminal and compiles:
        say("compiling, the first time up to a minute or two a graph …")
    if ranks.is_first:
        say("errors: root mean squares of energy per atom E (eV), force F (eV/Å), virial per atom V (eV)")
    progress.start()
    try:
        return trainer.run(shown=shown, tick=tick)
    finally:
        if_shown(progress.stop)


def report_lines(report: Shown, n_steps: int) -> list[str]:
    """One line per task: step, learning rate, speed, time left, errors of training and validation."""
    left = timedelta(seconds=round((n_steps - report.step) / report.steps_per_second))
    lines = []
    for task, pair in report.errors.items():
        parts = [
            f"step {report.step:>8}  lr {report.lr:.2e}  {report.steps_per_second:.3g} steps/s  "
            f"{left} left  {task:<12}"
        ]
        for name, errors in zip(("train", "valid"), pair, strict=True):
            if errors is not None:
                units = zip("EFV", errors.rmse, strict=True)
                numbers = "  ".join(f"{symbol} {value:.3e}" for symbol, value in units if value is not None)
                parts.append(f"{name} {numbers}")
        lines.append("  ".join(parts))
    return lines


@click.command()
@click.argument("checkpoint", type=_FILE)
@click.option(
    "--data", type=_FILE, multiple=True, help="Structures (repeat for several)  [default: made up]."
)
@click.option(
    "--head", "--model-branch", "heads", multiple=True, help="Head (repeat for several)  [default: all]."
)
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="Compile, too.",
)
def verify(checkpoint: Path, data: tuple[Path, ...], heads: tuple[str, ...], compile_: str) -> None:
    """Evaluate CHECKPOINT in several ways and compare.

    The function that training differentiates, eager evaluation, the compiled graph, and deepmd-kit where it
    can be imported. Exits with 1 where they differ beyond the precision of the model.
    """
    from ..console import print_table
    from ..data import read_frames
    from .verify import table
    from .verify import verify as compare

    frames = read_frames(data) if data else None
    found = list(compare(checkpoint, frames, heads=heads or None, compiled=compile_ == "on"))
    print_table(table(found))
    differ, failed = (
        sorted({one.head for one in found if not one.accepted and math.isnan(one.energy) == is_nan})
        for is_nan in (False, True)
    )
    if differ:
        raise TrainingError(f"the ways of evaluation differ for {', '.join(differ)}; please report this")
    if failed:
        raise TrainingError(
            f"not every way evaluates {', '.join(failed)}, as the warnings say; --compile off leaves out the "
            "compiled one"
        )
