"""The two kinds of file, told by content, and what their containers hold; without torch."""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import CheckpointError

__all__ = [
    "StoredTensor",
    "check_records",
    "file_kind",
    "of_file",
    "read_pickle_bytes",
    "read_safetensors_header",
]

#: a longer header is no sensible file; the limit of the safetensors library
MAX_HEADER = 100_000_000
#: first bytes of a pickle, with which files of torch before 1.6 begin, too
_LEGACY = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
CREATED = "expected a training checkpoint (.pt) or a file written by 'mtinfer convert' (.safetensors)"


#: what `zipfile` raises of archives that are damaged
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,  # names and lengths that are none
)


class StoredTensor(NamedTuple):
    """Entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def file_kind(path: Path) -> Literal["torch", "safetensors"]:
    """Tell by its first bytes what a file is.

    Parameters
    ----------
    path
        File to look into.

    Returns
    -------
    str
        ``"torch"`` for a zip archive, ``"safetensors"`` for a safetensors header.

    Raises
    ------
    CheckpointError
        The file can't be opened, or is neither.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {str(path)!r}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{str(path)!r} is a directory; {CREATED}") from None
    except OSError as err:
        raise CheckpointError(f"{str(path)!r} can't be read: {err.strerror}") from err
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if start.startswith(_LEGACY):
        raise CheckpointError(
            f"{str(path)!r} is a pickle or in the format of torch before 1.6, which are not read; where you "
            "trust it, save it anew: torch.save(torch.load(file), file)"
        )
    what = f"begins with {start!r}" if start else "is empty"
    raise CheckpointError(f"{str(path)!r} is not a checkpoint: it {what}; {CREATED}")


@contextlib.contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Have errors about the content of a file name the file."""
    try:
        yield
    except CheckpointError as err:
        if str(path) in str(err):
            raise
        raise CheckpointError(f"{str(path)!r}: {err}") from err


def read_pickle_bytes(path: Path) -> bytes:
    """Read the pickled structure of a file that ``torch.save`` wrote; its tensors are not read.

    Raises
    ------
    CheckpointError
        The archive is damaged, or is another kind of model file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2]: name for name in names}
            if "data.pkl" not in inner or "constants.pkl" in inner:
                raise CheckpointError(
                    f"{str(path)!r} is a zip file but no training checkpoint (a frozen or exported model?); "
                    f"{CREATED}"
                )
            return archive.read(inner["data.pkl"])
    except _DAMAGE as err:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: {err}") from err


def check_records(path: Path) -> bool:
    """Compare the records of a file that ``torch.save`` wrote with their checksums, which torch passes over.

    Returns
    -------
    bool
        Whether all lie in the file as they are, so that it can be mapped into memory: ``torch.save`` never
        compresses, but a file may have been packed anew, and torch reads a mapped one without a look at that.

    Raises
    ------
    CheckpointError
        A record is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            mappable = all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except _DAMAGE as err:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: {err}") from err
    if damaged is not None:
        raise CheckpointError(
            f"{str(path)!r} is damaged: the checksum of {damaged!r} is wrong; copy it again"
        )
    return mappable


def read_safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Read metadata and tensor list of a safetensors file; its tensors are not read.

    Returns
    -------
    metadata : dict
        The strings that the writer attached.
    tensors : dict
        Dtype (``"F64"``, ``"F32"``) and shape by name.

    Raises
    ------
    CheckpointError
        The file is truncated, or its header is not valid.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            size = path.stat().st_size
        metadata = header.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in header.values()]
        tensors = {key: StoredTensor(entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
        complete = 8 + length + max(ends, default=0) == size
    except OSError as err:
        raise CheckpointError(f"{str(path)!r} can't be read: {err.strerror}") from err
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as err:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: its header is not valid") from err
    if not complete:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: its size differs from its header")
    return _strings(metadata), tensors


def _strings(metadata: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
