"""From a file to a `Potential`: device, precision, when graphs are compiled."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint.load import read as read_checkpoint
from .checkpoint.precision import Precision, with_precision
from .errors import CheckpointError, MtinferError, UnsupportedModelError, first_line
from .graph import CompileMode, compile_mode
from .heads import head_states
from .potential import Potential

__all__ = ["load", "usable_device"]


_DTYPES: dict[str, Precision] = {
    "float32": "float32",
    "float64": "float64",
    "torch.float32": "float32",
    "torch.float64": "float64",
}


@torch.inference_mode(False)  # slopes of the nets need derivatives, too
def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compile: bool | CompileMode = True,
    tabulate: bool = False,
) -> Potential:
    """Load a training checkpoint or a converted file.

    Parameters
    ----------
    path
        `.pt` of either dialect, or `.safetensors` made by ``mtinfer convert``.
    device
        torch device; default: CUDA where there is one, else the CPU.
    dtype
        "float32" or "float64": evaluate all heads in this precision instead of their own. Energies are
        summed in float64 in either case.
    compile
        True uses a graph that an earlier process stored; without one it answers the first calls eagerly and
        compiles in the background ("background"). "wait" compiles before the first answer; "stored" never
        compiles; False ("off") stays eager.
    tabulate
        evaluate the radial embedding nets of se_e2_a and of se_atten in strip mode without attention by
        Chebyshev series, which differ from them by less than 1e-9 (in float32 1e-5) and are faster.
        Structures with atoms closer than 0.5 Å, or with elements that a head never saw, are evaluated with
        the nets, and so are `Potential.energies`. Heads with other descriptors are refused.

    Raises
    ------
    CheckpointError
        If the file is damaged, or not a checkpoint, or its weights do not fit its configuration.
    UnsupportedModelError
        If no head of the file is supported.
    """
    _survive_forks()
    where = usable_device(device)
    mode = compile_mode(compile)
    path = Path(path)
    if path.exists():
        path = path.resolve()  # a link may lead to another file, later
    loads_again = partial(_load_again, path, _state(path), device=device, dtype=dtype, tabulate=tabulate)
    checkpoint = read_checkpoint(path)
    if dtype is not None:
        checkpoint = with_precision(checkpoint, _dtype(dtype))
    with torch.autocast(where.type, enabled=False):
        heads, refused = head_states(checkpoint, where, mode, tabulate=tabulate)
    if not heads:
        raise UnsupportedModelError("; ".join(head.reason for head in refused.values()))
    return Potential(heads, refused, where, loads_again=loads_again)


def _load_again(path: Path, state: tuple[int, int] | None, **options: Any) -> Potential:
    """Load the file of a pickled potential."""
    if _state(path) not in (None, state):
        raise CheckpointError(f"{str(path)!r} is another file than the one that was pickled; load it anew")
    return load(path, **options)


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, which tell whether it was replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@cache
def _survive_forks() -> None:
    """Let children that the system forks evaluate, on one thread each.

    The threads of OpenMP aren't there in a forked child (`multiprocessing.Pool` on Linux), which would wait
    for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def usable_device(name: str | torch.device | None) -> torch.device:
    """Return the device of a name, for None a GPU and else the CPU; a GPU with its index.

    Raises
    ------
    MtinferError
        There is no such device, or it can't be used here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # doubles come back, which those of "meta" can't, and "mps" has none
        torch.empty(0, dtype=torch.float64, device=name).numpy(force=True)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as err:
        raise MtinferError(
            f"device {str(name)!r} can't be used ({first_line(err)}); try cpu, or cuda on a GPU"
        ) from err
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:  # which is the current one may change
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dtype(dtype: str | torch.dtype) -> Precision:
    try:
        return _DTYPES[str(dtype)]
    except KeyError:
        raise ValueError(f"dtype={dtype!r} is not supported; allowed are float32 and float64") from None
