"""Converted files: the heads that are wanted in one safetensors file, every distinct tensor stored once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files import check_output, replacing
from . import schema
from .container import read_safetensors_header
from .dialects import ALWAYS_FLOAT64
from .precision import DTYPES, Precision, recast
from .records import Checkpoint, HeadRecord, Source
from .refusals import refusal

__all__ = ["read", "write"]


def write(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    heads: Sequence[str] | None = None,
    dtype: Precision | None = None,
    force: bool = False,
) -> tuple[str, ...]:
    """Write heads of a checkpoint to a safetensors file.

    Optimizer state and copies made by compiled graphs are not in it. The same input gives the same bytes. A
    file appears under its name only when it is complete.

    Parameters
    ----------
    checkpoint
        What `load.read` gave.
    path
        File to write.
    heads
        Names or aliases of the heads to write; None for all that can be evaluated.
    dtype
        Precision to store networks in, and to evaluate them in; None keeps that of the checkpoint. Energy
        biases stay float64.
    force
        Whether to replace an existing file.

    Returns
    -------
    tuple of str
        Heads written.

    Raises
    ------
    UnknownHeadError
        A head does not exist.
    UnsupportedModelError
        A head that was asked for, or every head, uses a feature that is not evaluated.
    OutputError
        The file exists, is the checkpoint itself, or can't be written.
    """
    path = Path(path)
    check_output(path, source=checkpoint.path, force=force)
    records = checkpoint.chosen(heads)
    tensors, shared, equal = _pack(records, dtype)
    description = schema.Description(
        dialect=checkpoint.dialect,
        step=checkpoint.step,
        source=_source(checkpoint),
        heads=tuple(
            schema.ArchiveHead(
                record.name,
                record.aliases,
                recast(record.config, dtype) if dtype else record.config,
                record.graph_lower_disabled,
            )
            for record in records
        ),
        shared=shared,
        equal=equal,
    )
    description = replace(description, digest=_digest(description, tensors))
    _save(path, tensors, schema.serialize(description))
    return tuple(record.name for record in records)


def _pack(
    records: Iterable[HeadRecord], dtype: Precision | None
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    """Keep the first of all weights that are the same tensor, and of all that hold the same numbers."""
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    equal: dict[str, str] = {}
    by_memory: dict[tuple[Any, ...], str] = {}
    by_numbers: dict[tuple[Any, ...], str] = {}
    for record in records:
        for name, source in record.weights.items():
            weight = f"{record.name}/{name}"
            memory = (source.data_ptr(), tuple(source.shape), source.dtype)
            if (first := by_memory.setdefault(memory, weight)) != weight:
                shared[weight] = first
                continue
            target = DTYPES[dtype] if dtype and name not in ALWAYS_FLOAT64 else source.dtype
            tensor = source.to(target).contiguous()
            digest = hashlib.sha256(tensor.reshape(-1).numpy().data).digest()
            numbers = (digest, tuple(tensor.shape), tensor.dtype)
            if (first := by_numbers.setdefault(numbers, weight)) != weight:
                equal[weight] = first
            else:
                tensors[weight] = tensor
    return tensors, shared, equal


def _digest(description: schema.Description, tensors: Mapping[str, torch.Tensor]) -> str:
    """Checksum of a description without its own, and of tensors with their names and shapes."""
    (text,) = schema.serialize(replace(description, digest="")).values()
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    source = checkpoint.source
    digest = source.sha256
    if digest is None:
        try:
            with checkpoint.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as err:
            raise CheckpointError(f"{str(checkpoint.path)!r} can't be read: {err.strerror}") from err
    return {"name": source.name, "size": source.size, "sha256": digest}


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as err:
            raise OSError(str(err)) from err


def read(path: Path) -> Checkpoint:
    """Read a converted file.

    Parameters
    ----------
    path
        File that `write` made.

    Returns
    -------
    Checkpoint
        The heads in it, bit for bit as in the checkpoint they come from (unless another dtype was asked for).

    Raises
    ------
    CheckpointError
        The file is damaged, or not a converted file of this schema version.
    """
    metadata, stored = read_safetensors_header(path)
    description = schema.parse(str(path), metadata, stored)
    tensors = _load_tensors(path)
    if description.digest != _digest(description, tensors):
        raise CheckpointError(f"{str(path)!r} is damaged: its contents have another checksum; convert again")
    weights = description.weights(stored)
    owned: dict[str, torch.Tensor] = {}

    def tensor(identity: str, key: str) -> torch.Tensor:
        if identity not in owned:
            # weights that are only equal get memory of their own
            owned[identity] = tensors[key] if identity == key else tensors[key].clone()
        return owned[identity]

    heads = {
        head.name: HeadRecord(
            name=head.name,
            aliases=head.aliases,
            config=head.config,
            weights={name: tensor(*where) for name, where in weights[head.name].items()},
            graph_lower_disabled=head.graph_lower_disabled,
            refused=refusal(head.name, head.config, {}),
        )
        for head in description.heads
    }
    source = Source(**description.source)
    return Checkpoint(path, description.dialect, description.step, heads, source, has_debris=False)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # copies: the mapped file may be replaced while a simulation runs
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as err:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: {err}") from err
