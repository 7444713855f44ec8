"""Output files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_output(
    path: str | Path, *, suffixes: Sequence[str] = (), source: Path | None = None, force: bool = True
) -> None:
    """Raise an OutputError if `path` can't be written; to be called before long work.

    Parameters
    ----------
    path
        File to be written.
    suffixes
        Endings that the name may have, in lower case; none means any.
    source
        File that is read for it, which is never replaced.
    force
        Whether an existing file may be replaced.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputError(f"{path}: the name ends in {path.suffix!r}, allowed are {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: folder {path.parent} does not exist; make it or choose another path")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: exists and is not a regular file; choose another path")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: folder {path.parent} is not writable; choose another path")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise OutputError(f"{path}: is the file to convert and is not replaced; choose another path")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists and is kept; choose another path or pass --force")


def check_distinct(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise an OutputError if an output is one of the inputs, or another output."""
    taken = {path.resolve(): "is an input and is not replaced" for path in inputs}
    for path in outputs:
        if reason := taken.get(path.resolve()):
            raise OutputError(f"{path}: {reason}; choose another path")
        taken[path.resolve()] = "stands for two outputs"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file in a folder beside `path`; it takes its place when the block ends without error.

    Raises
    ------
    OutputError
        The file can't be written; `path` is as it was before.
    """
    path = Path(path).resolve()  # a link stays one
    check_output(path)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            partial = Path(folder) / path.name
            partial.touch()
            mode = partial.stat().st_mode  # as the user wants files to be; some writers make theirs private
            yield partial
            partial.chmod(mode)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as err:
        raise OutputError(f"{path}: can't be written: {err.strerror or err}; choose another path") from err


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes out of a block; where the file system has no locks, nobody is kept out.

    Parameters
    ----------
    path
        file that is there meanwhile, of a name that nothing else has; its lock ends with the process.
    wait
        whether to wait for a process that is in the block.

    Raises
    ------
    BlockingIOError
        Another process is in the block, and this one does not wait.
    """
    file = None
    if fcntl is not None:
        try:
            file = _locked(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if isinstance(err, BlockingIOError):
                raise
    try:
        yield
    finally:
        if file is not None:
            with file, suppress(OSError):
                path.unlink(missing_ok=True)
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may hold the file open


def _locked(path: Path, how: int) -> IO[str]:
    """Open and lock a file; once more where the process before removed it while this one waited."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, how)
        except OSError:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()
