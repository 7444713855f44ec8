"""Command line. Commands are thin: they parse, call the package and print; heavy imports happen inside."""

from __future__ import annotations

import errno
import io
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .console import if_shown
from .errors import DataError, MtinferError
from .train.commands import train, verify

if TYPE_CHECKING:
    from .data import Frame
    from .evaluate import Evaluation
    from .graph import CompileMode
    from .potential import Potential

#: atoms, summed over frames and heads, from which compiling pays; a graph costs about as much as evaluating
#: this many atoms eagerly
_COMPILE_PAYS_ATOMS = 60_000

_FILE = click.Path(path_type=Path)
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt")
_COUNT = click.IntRange(min=1)


class _Group(click.Group):
    """Prints errors of the package and of the system, and Ctrl-C, as a line on stderr.

    `--debug`, anywhere, shows tracebacks.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--debug" in args:
            args = ["--debug", *(word for word in args if word != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # Å where there is none
        try:
            return super().invoke(ctx)
        except (MtinferError, OSError) as err:
            broken_pipe = isinstance(err, OSError) and err.errno == errno.EPIPE  # of click, as after `| head`
            if broken_pipe or ctx.params.get("debug"):
                raise
            click.echo(f"mtinfer: {err}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("mtinfer: interrupted", err=True)
            ctx.exit(130)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if_shown(click.echo, f"mtinfer: warning: {message}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mtinfer")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Run any head of a multitask deep-potential checkpoint."""


@main.command()
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(file: Path, as_json: bool) -> None:
    """Show what is in FILE.

    Heads, elements, descriptor, sizes, what is shared. FILE is a training checkpoint (.pt, either dialect) or
    a converted file. Only metadata is read; whether weights and options fit each other is found when the file
    is loaded.
    """
    from .checkpoint.describe import describe
    from .checkpoint.peek import peek

    found = peek(file)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(describe(found)))


@main.command()
@click.argument("checkpoint", type=_FILE)
@click.option(
    "-o",
    "--output",
    type=_FILE,
    help="Output file  [default: beside CHECKPOINT: NAME.safetensors, NAME-pt.pt, NAME-pt_expt.pt].",
)
@click.option("--head", "heads", multiple=True, help="Head to keep (repeat for several)  [default: all].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    help="Store networks in this precision (safetensors).",
)
@click.option(
    "--to",
    "target_format",
    type=click.Choice(["safetensors", "pt", "pt_expt"]),
    default="safetensors",
    show_default=True,
    help="Format; pt and pt_expt are checkpoints that deepmd-kit reads.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
def convert(
    checkpoint: Path,
    output: Path | None,
    heads: tuple[str, ...],
    dtype: Any,
    target_format: str,
    force: bool,
) -> None:
    """Convert CHECKPOINT to one clean file.

    Shared weights are stored once; optimizer state and remains of compiled graphs are left out. CHECKPOINT is
    a training checkpoint of either dialect or a converted file.
    """
    from .checkpoint.archive import write
    from .checkpoint.describe import file_size
    from .checkpoint.load import read
    from .heads import checked

    if dtype is not None and target_format != "safetensors":
        raise click.UsageError("--dtype goes with --to safetensors; a checkpoint keeps its precision")
    misleading = _CHECKPOINT_SUFFIXES if target_format == "safetensors" else (".safetensors",)
    if output is not None and output.suffix in misleading:
        raise click.UsageError(
            f"{output} would hold a {target_format} file; choose another ending, or another format with --to"
        )
    source = checked(read(checkpoint))
    if target_format == "safetensors":
        target = output or checkpoint.with_suffix(".safetensors")
        written = write(source, target, heads=heads or None, dtype=dtype, force=force)
    else:
        from .checkpoint.writer import convert as write_checkpoint

        target = output or checkpoint.with_name(f"{checkpoint.stem}-{target_format}.pt")
        written, changes = write_checkpoint(source, target, target_format, heads=heads or None, force=force)
        for change in changes:
            _show_warning(change)
    before, after = checkpoint.stat().st_size, target.stat().st_size
    click.echo(f"{checkpoint}  {file_size(before)}")
    click.echo(f"{target}  {file_size(after)} ({after / before:.0%})  heads: {', '.join(written)}")
    for name in () if heads else [name for name in source.heads if name not in written]:
        click.echo(f"left out: {source.heads[name].refused}", err=True)


@main.command("eval")
@click.argument("model", type=_FILE)
@click.argument("data", type=_FILE, nargs=-1, required=True)
@click.option("--head", "--model-branch", "heads", multiple=True, help="Head (repeat for several), or 'all'.")
@click.option("--json", "json_file", type=_FILE, help="Write the scores as JSON.")
@click.option("--csv", "csv_file", type=_FILE, help="Write the scores as CSV.")
@click.option("--plot", type=_FILE, help="Write a parity plot (PNG).")
@click.option("--output", type=_FILE, help="Write predictions as extxyz.")
@click.option("--device", help="Torch device  [default: cuda where there is one, else cpu].")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Evaluate in this precision.")
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Compile the graph; auto: where the amount of work pays for it, or a stored one is at hand.",
)
@click.option("--tabulate", is_flag=True, help="Evaluate radial embedding nets by series (mtinfer.load).")
def evaluate(
    model: Path,
    data: tuple[Path, ...],
    heads: tuple[str, ...],
    json_file: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    output: Path | None,
    device: str | None,
    dtype: str | None,
    compile_: str,
    tabulate: bool,
) -> None:
    """Score heads of MODEL on labelled DATA.

    MODEL is a checkpoint or a converted file. DATA are extxyz files (or anything that ASE reads) and
    deepmd/npy folders.
    """
    from .data import read_frames
    from .evaluate import PLOT_SUFFIXES, PREDICTION_SUFFIXES
    from .files import check_distinct, check_output
    from .loading import load

    outputs = [path for path in (json_file, csv_file, output, plot) if path is not None]
    suffixes = {plot: PLOT_SUFFIXES, output: PREDICTION_SUFFIXES}
    for path in outputs:
        check_output(path, suffixes=suffixes.get(path, ()))
    check_distinct(outputs, [model, *data])
    modes: dict[str, CompileMode] = {"on": "wait", "off": "off", "auto": "stored"}
    mode = modes[compile_]
    potential = load(model, device=device, dtype=dtype, compile=mode, tabulate=tabulate)
    chosen = _chosen_heads(potential, heads)
    type_maps = {potential.head(name).model.type_map for name in chosen}
    frames = read_frames(data, type_map=type_maps.pop() if len(type_maps) == 1 else None)
    if not any(frame.has_labels for frame in frames):
        if output is None:
            raise DataError(
                f"no frame carries a label{_unread(frames)}, so there is nothing to score; "
                "--output writes predictions"
            )
        if plot is not None:
            raise DataError(
                f"no frame carries a label{_unread(frames)}, so there is nothing to plot; leave --plot out"
            )
    n_atoms = sum(len(frame.atoms) for frame in frames) * len(chosen)
    if compile_ == "auto" and n_atoms >= _COMPILE_PAYS_ATOMS:
        potential.compile("wait")
    evaluation = _with_progress(potential, chosen, frames)
    _report(evaluation, model, json_file=json_file, csv_file=csv_file, plot=plot, output=output)


#: arrays of ASE that no label could be
_ARRAYS = {"numbers", "positions", "momenta", "masses", "tags", "initial_magmoms", "initial_charges"}


def _unread(frames: Sequence[Frame]) -> str:
    """Where labels are looked for, and what else the first frame has, for messages."""
    atoms = frames[0].atoms
    others = sorted({*atoms.info, *atoms.arrays} - _ARRAYS)
    found = f"; the first frame has {', '.join(others)} instead" if others else ""
    return f" (energy, forces, virial or stress{found})"


def _chosen_heads(potential: Potential, heads: tuple[str, ...]) -> list[str]:
    if "all" in heads and "all" not in potential.heads:
        for reason in potential.refused.values():
            click.echo(f"left out: {reason}", err=True)
        return list(potential.heads)
    return list(dict.fromkeys(potential.head(name).name for name in heads or (None,)))


def _with_progress(potential: Potential, heads: list[str], frames: list[Frame]) -> Evaluation:
    from rich.console import Console
    from rich.progress import Progress

    from .evaluate import evaluate_frames

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("evaluating", total=len(frames) * len(heads))
        return evaluate_frames(
            potential, heads, frames, progress=lambda n: progress.advance(task, n), batch_atoms=4096
        )


def _report(
    evaluation: Evaluation,
    model: Path,
    *,
    json_file: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    output: Path | None,
) -> None:
    from .console import print_table
    from .evaluate import parity_plot, score_table, write_csv, write_json, write_predictions

    if json_file is not None:
        write_json(json_file, evaluation, model)
    if csv_file is not None:
        write_csv(csv_file, evaluation.scores)
    if plot is not None:
        parity_plot(plot, evaluation)
    if output is not None:  # last, since ASE can't write everything that frames hold
        write_predictions(output, evaluation)
    if evaluation.scores:
        print_table(score_table(evaluation.scores))
    else:
        click.echo(f"no frame carries a label{_unread(evaluation.frames)}: nothing to score", err=True)
    for path in (output, json_file, csv_file, plot):
        if path is not None:
            click.echo(f"wrote {path}")


@main.command()
@click.argument("models", nargs=-1)
@click.option("--head", help="Head of the files among MODELS; not needed where they have only one.")
@click.option(
    "--atoms", type=_COUNT, multiple=True, default=(192, 1536), show_default=True, help="Atoms of water."
)
@click.option("--steps", type=_COUNT, default=10, show_default=True, help="Steps that count.")
@click.option("--threads", type=_COUNT, default=2, show_default=True, help="CPU threads.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--tabulate", is_flag=True, help="Evaluate radial embedding nets by series.")
@click.option(
    "--deepmd-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Python that has deepmd-kit: measure it in the same run.",
)
@click.option(
    "--deepmd-script",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("benchmarks/deepmd_baseline.py"),
    show_default=True,
    help="Script that measures deepmd-kit.",
)
def bench(
    models: tuple[str, ...],
    head: str | None,
    atoms: tuple[int, ...],
    steps: int,
    threads: int,
    device: str,
    tabulate: bool,
    deepmd_python: Path | None,
    deepmd_script: Path,
) -> None:
    """Measure speed and memory on water.

    MODELS are checkpoints or converted files that know O and H, or names of architectures, which get random
    weights at published sizes (default: all of these). Prints a Markdown table of medians: time per step,
    atoms·step/s, time over the roofline of its matrix products (operations and bytes), peak memory, time of
    the first call and number of graphs compiled.
    """
    from .architectures import ARCHITECTURES
    from .bench import HEADER, Task, measure, measure_deepmd, row

    for name in models:
        if name not in ARCHITECTURES and not Path(name).is_file():
            known = ", ".join(ARCHITECTURES)
            raise click.UsageError(f"{name!r} is neither a file nor an architecture; those are {known}")
    if deepmd_python is not None and not deepmd_script.is_file():
        raise click.UsageError(
            f"no such script: {str(deepmd_script)!r}; run from the root of the repository, or name it with "
            "--deepmd-script"
        )
    click.echo(HEADER)
    for name in models or ARCHITECTURES:
        own = head if name not in ARCHITECTURES else "water"
        for n_atoms in atoms:
            click.echo(f"{name}, {n_atoms} atoms …", err=True)
            task = Task(name, own, n_atoms, steps, threads, device, tabulate)
            figures = measure(task)
            theirs = {}
            if deepmd_python is not None:
                theirs = measure_deepmd(deepmd_python, deepmd_script, task)
            click.echo(row(figures, theirs))
            for form, of_form in theirs.items():
                if "error" in of_form:
                    reason = of_form["error"].partition("\n")[0]
                    click.echo(f"deepmd-kit's {form} was not measured: {reason}", err=True)


main.add_command(train)
main.add_command(verify)
