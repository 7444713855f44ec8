"""Compiled graphs that are loaded: neither the compiler nor mtinfer is imported for that.

Run as a program, ``python loaded_graph.py PACKAGE DEVICE`` loads a graph and ends.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["LoadedGraph", "require_loadable"]


class LoadedGraph:
    """A compiled graph as a function of tensors.

    It takes the strides of its arguments for granted, hence the copies of what is not contiguous.

    Parameters
    ----------
    package
        file that Inductor packed.
    device
        device of its arguments.
    """

    def __init__(self, package: Path, device: torch.device) -> None:
        aoti: Any = torch._C._aoti
        self._device = device
        _share_cpp_library(package)
        if device.type != "cpu":
            # unpacks into a folder of its own below TMPDIR, and reads the kernels there when they first run
            index = -1 if device.index is None else device.index
            with _current(device):  # it makes its device the current one
                self._graph = aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index)
            return
        # a library that is loaded needs no file: a process that is killed leaves none
        with (
            tempfile.TemporaryDirectory(prefix="mtinfer-", ignore_cleanup_errors=True) as folder,
            zipfile.ZipFile(package) as archive,
        ):
            archive.extractall(folder)
            (library,) = Path(folder).rglob("*.so")
            self._graph = aoti.AOTIModelContainerRunnerCpu(str(library), 1)

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        arrays = [argument.contiguous() for argument in arguments]
        if self._device.type != "cpu":
            arrays = [_aligned(array) for array in arrays]
        with _current(self._device):
            return tuple(self._graph.run(arrays))


def _share_cpp_library(package: Path) -> None:
    """Have a graph use the C++ library that torch uses, where the compiler put another one into it.

    `g++` does where it finds `libstdc++.a` alone. Identities of locales would then be those of torch's
    library, all else the graph's own, and `std::regex`, in torch's part of the graph, fails or ends the
    process. What is global is taken first.
    """
    if sys.platform != "linux":
        return
    with zipfile.ZipFile(package) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    if any(b"libstdc++.so" not in library and b"libc++.so" not in library for library in libraries):
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _aligned(array: Tensor) -> Tensor:
    """Copy what begins within 16 bytes: kernels would copy it as well, and say so at every call."""
    return array.clone() if array.data_ptr() % 16 else array


def require_loadable(package: Path, device: torch.device) -> None:
    """Raise RuntimeError for a graph whose loading would kill this process, by loading it in another one.

    It is code of a compiler and a linker that were not tried with torch.
    """
    if not sys.executable:  # Python is embedded in another program
        return
    # -P: the folder of this file is no place to import from. Errors of Python don't count, only its end
    command = [sys.executable, "-P", __file__, str(package), str(device)]
    status = subprocess.run(command, capture_output=True).returncode
    if status < 0:
        raise RuntimeError(
            f"loading it ended a process by {signal.Signals(-status).name}: the C++ compiler does not fit "
            "torch; another one, named by CXX, may"
        )


if __name__ == "__main__":
    LoadedGraph(Path(sys.argv[1]), torch.device(sys.argv[2]))
