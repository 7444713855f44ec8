"""What all tests share: a cache of their own, one thread, and files that are loaded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import mtinfer


def pytest_configure(config: pytest.Config) -> None:
    # torch 2.13 uses its own deprecated functions when its compiler is imported
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")


@pytest.fixture(scope="session", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory of compiled graphs of this run: each is compiled once, and nothing of the user's is used.

    Processes of one run (pytest-xdist) share it. `MTINFER_TEST_CACHE` names a directory to keep between runs.
    """
    base = tmp_path_factory.getbasetemp()
    own = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
    directory = Path(os.environ.get("MTINFER_TEST_CACHE", own))
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTINFER_CACHE", str(directory))
        patch.setenv("OMP_NUM_THREADS", "1")  # of subprocesses
        yield directory


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def eager() -> Callable[..., mtinfer.Potential]:
    """Load a file for eager evaluation; each file and dtype once per run."""

    @cache
    def load(path: Path, dtype: str | None = None) -> mtinfer.Potential:
        return mtinfer.load(path, device="cpu", dtype=dtype, compile=False)

    return load
