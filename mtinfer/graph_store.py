"""Compiled graphs on disk, in a directory that belongs to the user alone: they are native code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import __version__
from .files import alone

__all__ = ["GraphStore", "cache_directory", "graph_key"]

#: s: graphs that no process used for so long are removed when another one is stored
_KEPT = 90 * 24 * 3600


def cache_directory() -> Path:
    """Directory of compiled graphs: `MTINFER_CACHE`, else `mtinfer` below the user's cache directory."""
    if configured := os.environ.get("MTINFER_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtinfer"


def graph_key(signature: str, device: torch.device) -> str:
    """Key of a stored graph: what it computes, and what it was compiled by and for."""
    parts = [signature, __version__, _sources(), torch.__version__, _machine(), device.type]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _sources() -> str:
    """Digest of the files whose text determines a graph."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    modules = ["graph", "heads", "stage_graphs", "value_graphs", "checkpoint/sharing"]
    modules += ["lowerings", "cpu_code", "powers", "gpu_code", "train/batch", "train/step"]
    traced = [here / f"{module}.py" for module in modules]
    for path in sorted([*(here / "models").glob("*.py"), *traced, *here.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _machine() -> str:
    """Processor and its instructions: a stored CPU graph is native code, made for all of them."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else [platform.processor()]
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0])
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {flags}"


class NotPrivateError(Exception):
    """Others could have put a graph where graphs are read from."""


@dataclass(frozen=True)
class GraphStore:
    """One stored graph in a directory that belongs to the user alone."""

    directory: Path
    key: str

    @property
    def _binary(self) -> Path:
        return self.directory / f"{self.key}.graph"

    @property
    def _record(self) -> Path:
        return self.directory / f"{self.key}.json"

    @property
    def of_compiler(self) -> Path:
        """Directory for files of the compiler, which loads code from there."""
        return self.directory / "inductor"

    def make(self) -> bool:
        """Create what is the user's alone, and refuse another's; False where nothing can be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return False
        self._require_private(self.directory)
        if not os.access(self.directory, os.W_OK):
            return False
        self.of_compiler.mkdir(exist_ok=True, mode=0o700)
        self._require_private(self.of_compiler)
        return True

    def _require_private(self, *paths: Path) -> None:
        for path in paths:
            status = path.stat()
            if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
                raise NotPrivateError(
                    f"{path} must belong to you and be writable by you alone, since graphs are native code "
                    f"(empty {self.directory} and chmod 700 it, or set MTINFER_CACHE to another directory)"
                )

    def find(self) -> Path | None:
        """Return the file of the graph, or None where there is none or its checksum is wrong.

        Raises
        ------
        NotPrivateError
            Others could have written it.
        """
        if not (self._record.exists() and self._binary.exists()):
            return None
        self._require_private(self.directory, self._record, self._binary)
        try:
            record = json.loads(self._record.read_text())
            content = self._binary.read_bytes()
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("sha256") != hashlib.sha256(content).hexdigest():
            return None
        with contextlib.suppress(OSError):
            os.utime(self._record)  # it is in use
        return self._binary

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process compiles this graph, and let others wait meanwhile."""
        with alone(self.directory / f"{self.key}.lock") if self.make() else contextlib.nullcontext():
            yield

    def save(self, package: Path, signature: str) -> None:
        """Store a graph, the binary first, then the record that vouches for it; remove what nobody uses."""
        content = package.read_bytes()
        fields = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "torch": torch.__version__,
            "signature": signature,
        }
        for path, value in ((self._binary, content), (self._record, json.dumps(fields).encode())):
            with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".tmp", delete=False) as file:
                try:
                    file.write(value)
                    file.flush()
                except OSError:
                    Path(file.name).unlink()
                    raise
            Path(file.name).replace(path)
        self._remove_unused()

    def _remove_unused(self) -> None:
        """Remove graphs without a recent use, and what processes that were killed left behind."""
        for path in (*self.directory.glob("*.graph"), *self.directory.glob("*.tmp")):
            record = path.with_suffix(".json")
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                used = record if record.exists() else path
                if time.time() - used.stat().st_mtime > _KEPT:
                    record.unlink(missing_ok=True)
                    path.unlink()
