from __future__ import annotations

import shutil
from pathlib import Path

import pytest

FRAMES = Path(__file__).parents[1] / "data" / "frames"


@pytest.fixture
def frames_dir() -> Path:
    return FRAMES


@pytest.fixture
def copper(tmp_path: Path) -> Path:
    """Return a copy, to be damaged, of a periodic system: 2 frames of 32 atoms."""
    return shutil.copytree(FRAMES / "copper" / "Cu32_32", tmp_path / "copper")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Return a copy, to be damaged, of a system without periodicity: 2 frames of O and 2 H."""
    return shutil.copytree(FRAMES / "clusters" / "H2O_3", tmp_path / "cluster")
