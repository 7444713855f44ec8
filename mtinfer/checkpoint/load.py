"""Read every head of a checkpoint into named weights, and check weights against what a model expects."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CheckpointError
from . import archive
from .container import check_records, file_kind, of_file, read_pickle_bytes
from .dialects import canonical_weights, file_key
from .heads import HeadEntries, split_state
from .records import Checkpoint, HeadRecord, Source
from .unpickle import load_structure

if TYPE_CHECKING:
    from ..inputs import ParameterSpec

__all__ = ["Checkpoint", "HeadRecord", "Source", "check_weights", "load_content", "read"]

#: stored for information only, so that its value can't make a head unusable
UNUSED = frozenset({"min_nbor_dist"})


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a training checkpoint or a converted file.

    Nothing that the file says is run: only tensors and plain data are accepted. Of a checkpoint only the
    weights in use are copied to memory; the file may be replaced afterwards.

    Parameters
    ----------
    path
        ``.pt`` of either dialect, with one or several heads, or ``.safetensors`` from a conversion. The
        content decides, not the name.

    Returns
    -------
    Checkpoint
        All heads. A head that can't be evaluated has no weights but a reason in `refused`.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, no checkpoint, contains code, has an unknown or ambiguous layout, or
        weights that can't be assigned.
    """
    path = Path(path)
    with of_file(path):
        return archive.read(path) if file_kind(path) == "safetensors" else _read_training(path)


def _read_training(path: Path) -> Checkpoint:
    state = split_state(load_content(path), torch.Tensor)
    own = _PrivateCopies()
    heads = {head.name: _record(head, state.dialect, own) for head in state.heads}
    source = Source(path.name, path.stat().st_size, None)
    return Checkpoint(path, state.dialect, state.step, heads, source, state.has_debris)


def load_content(path: Path) -> object:
    """Everything that a training checkpoint holds, with tensors that may be mapped from the file.

    Raises
    ------
    CheckpointError
        The file is damaged, no checkpoint, or contains code.
    """
    structure = read_pickle_bytes(path)
    mappable = check_records(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as err:
        load_structure(structure, str(path))  # names the code, where that is the reason
        raise CheckpointError(f"{str(path)!r} holds objects other than tensors and plain data") from err
    except (RuntimeError, OSError, ValueError, EOFError, KeyError) as err:
        reason = str(err).partition("\n")[0]
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: {reason}") from err


def _numpy_scalars() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What rebuilds a numpy scalar: versions before 2025 stored the learning rate as one."""
    scalar: Any = np.float64(0.0).__reduce__()[0]
    return [
        np.dtype,
        type(np.dtype(np.float64)),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


#: most bytes of a tensor that repeats what is stored once
_LARGEST_REPEATED = 2**30


class _PrivateCopies:
    """Copies tensors out of the mapped file, once for all heads that share one."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        _require_plain(tensor)
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self._copies:
            self._copies[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return self._copies[key]


def _require_plain(tensor: torch.Tensor) -> None:
    """Raise CheckpointError for what only looks like an array of the file."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "a meta tensor" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"a tensor of shape {tuple(tensor.shape)} is {kind}; expected one with numbers")
    n_bytes = tensor.numel() * tensor.element_size()
    if n_bytes > max(tensor.untyped_storage().nbytes(), _LARGEST_REPEATED):
        raise CheckpointError(
            f"a tensor of shape {tuple(tensor.shape)} repeats {tensor.untyped_storage().nbytes()} bytes of "
            "the file; expected one that is stored as it is"
        )


def _record(head: HeadEntries[torch.Tensor], dialect: str, own: _PrivateCopies) -> HeadRecord:
    weights = {}
    if head.refused is None:
        weights = canonical_weights(dialect, head.name, head.entries, same=_same_numbers)
        weights.setdefault("min_nbor_dist", torch.tensor(-1.0, dtype=torch.float64))  # -1: not known
    return HeadRecord(
        name=head.name,
        aliases=head.aliases,
        config=_with_fitting_mask(head),
        weights={name: own(tensor) for name, tensor in weights.items()},
        graph_lower_disabled=any(
            bool(tensor.any())
            for key, tensor in head.entries.items()
            if key.endswith(".graph_lower_disabled")
        ),
        refused=head.refused,
    )


def _with_fitting_mask(head: HeadEntries[torch.Tensor]) -> dict[str, Any]:
    """Configuration whose fitting net names the types that it leaves out, where they are not the head's own.

    Heads that share a fitting net share its mask, too, and were trained with it; only the file knows. What
    the configuration says of a mask has no effect upstream.
    """
    if head.refused is not None:
        return head.config
    fitting = {key: value for key, value in head.config["fitting_net"].items() if key != "exclude_types"}
    mask = head.entries.get("atomic_model.fitting_net.emask.type_mask")
    if mask is not None:
        excluded = (mask == 0).nonzero().flatten().tolist()
        if excluded != sorted(head.config.get("atom_exclude_types") or ()):
            fitting["exclude_types"] = excluded
    return head.config | {"fitting_net": fitting}


def _same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # by bits: two copies of one weight are the same even where it is NaN
    return a.data_ptr() == b.data_ptr() or torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def check_weights(
    head: str,
    weights: Mapping[str, torch.Tensor],
    expected: Mapping[str, ParameterSpec],
    *,
    dialect: str | None = None,
) -> None:
    """Compare the weights of a head with what its model expects, strictly.

    Parameters
    ----------
    head
        Name of the head, for error messages.
    weights
        Tensors by canonical name.
    expected
        Shape and dtype by canonical name.
    dialect
        Of the file whose keys error messages name; None for canonical names.

    Raises
    ------
    CheckpointError
        A weight is missing or extra, has another shape or dtype, or holds NaN or infinity.
    """

    def key(name: str) -> str:
        return repr(name if dialect is None else file_key(dialect, name))

    if missing := [name for name in expected if name not in weights]:
        spec = expected[missing[0]]
        raise CheckpointError(
            f"head {head!r} lacks the weight {key(missing[0])}{_and_more(missing)}: its configuration asks "
            f"for shape {tuple(spec.shape)}, {_dtype(spec.dtype)}"
        )
    if extra := [name for name in weights if name not in expected]:
        raise CheckpointError(
            f"head {head!r} has the weight {key(extra[0])}{_and_more(extra)}, shape "
            f"{tuple(weights[extra[0]].shape)}, that its configuration has no place for"
        )
    for name, spec in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype != spec.dtype:
            raise CheckpointError(
                f"the weight {key(name)} of head {head!r} has shape {tuple(tensor.shape)}, "
                f"{_dtype(tensor.dtype)}; its configuration asks for {tuple(spec.shape)}, "
                f"{_dtype(spec.dtype)}"
            )
        if name not in UNUSED and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"the weight {key(name)} of head {head!r} holds NaN or infinity in {count} of "
                f"{tensor.numel()} numbers; the training diverged or the file is damaged"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
