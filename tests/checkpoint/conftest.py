"""Changed copies of real checkpoints."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SEPARATE, Change, Content


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Write a copy of a checkpoint, changed by a function of its content."""

    def write(source: Path, change: Change, name: str = "changed.pt") -> Path:
        content = torch.load(source, map_location="cpu", weights_only=True)
        content["model"]["_extra_state"] = copy.deepcopy(content["model"]["_extra_state"])
        result = change(content)
        torch.save(content if result is None else result, tmp_path / name)
        return tmp_path / name

    return write


class Payload:
    """An object whose pickle would run code on loading."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def malicious(changed: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with code in it, and the file that this code would make."""
    marker = tmp_path / "code-was-run"

    def change(content: Content) -> None:
        content["optimizer"] = Payload(marker)

    path = changed(SEPARATE, change)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    return path, marker
