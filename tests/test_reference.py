"""Agreement with deepmd-kit: every file, head and structure, from either container, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from reference_files import WITH_NUMBERS, cases, heads, require_agreement, slow_unless_compiled

import mtinfer
from mtinfer import Potential, Prediction
from mtinfer.checkpoint import archive
from mtinfer.checkpoint.load import read
from mtinfer.errors import PredictionWarning

# the structures have elements that some heads never saw, and more neighbours than some models keep
pytestmark = pytest.mark.filterwarnings(f"ignore::{PredictionWarning.__module__}.PredictionWarning")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Convert a checkpoint; each once."""
    folder = tmp_path_factory.mktemp("converted")

    @cache
    def convert(path: Path) -> Path:
        # names of files repeat in different folders
        target = folder / f"{len(list(folder.iterdir()))}-{path.stem}.safetensors"
        archive.write(read(path), target)
        return target

    return convert


def require_identical(got: Sequence[Prediction], wanted: Sequence[Prediction]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.energy == other.energy
        for name in ("atom_energy", "forces", "virial"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize(("path", "head"), cases(WITH_NUMBERS))
def test_eager_agrees_from_either_container(
    path: Path,
    head: str,
    eager: Callable[..., Potential],
    converted: Callable[[Path], Path],
) -> None:
    from_checkpoint = require_agreement(eager(path), head, path)
    from_converted = require_agreement(eager(converted(path)), head, path)
    require_identical(from_converted, from_checkpoint)


@pytest.mark.parametrize("path", slow_unless_compiled(WITH_NUMBERS))
def test_compiled_agrees_from_either_container(path: Path, converted: Callable[[Path], Path]) -> None:
    potentials = [mtinfer.load(file, compile="wait") for file in (path, converted(path))]
    for head in heads(path):
        for potential in potentials:
            require_agreement(potential, head, path)  # the first call of a graph checks it
        from_checkpoint, from_converted = (
            require_agreement(potential, head, path) for potential in potentials
        )
        require_identical(from_converted, from_checkpoint)
    for potential in potentials:
        assert all(graph.is_compiled for graph in potential.graphs)


def test_every_checkpoint_has_numbers() -> None:
    """A file of numbers without a checkpoint, or the reverse, would be passed over silently."""
    for folder in {path.parents[1] for path in WITH_NUMBERS}:
        names = {path.stem for path in (folder / "checkpoints").glob("*.pt")}
        assert names == {path.stem for path in (folder / "expected").glob("*.npz")}
