"""Evaluates heads on labelled frames, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..data import Frame
from ..errors import StructureError
from ..inputs import Prediction
from .metrics import ErrorAccumulator, Score

if TYPE_CHECKING:
    from ase import Atoms


class Evaluator(Protocol):
    """The part of `mtinfer.potential.Potential` that is used here."""

    def evaluate(self, atoms: list[Atoms], head: str | None = None) -> list[Prediction]:
        """Return a prediction for each structure."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What heads say of labelled frames, and how far off they are."""

    frames: tuple[Frame, ...]
    #: head -> prediction for each of `frames`
    predictions: Mapping[str, tuple[Prediction, ...]]
    scores: tuple[Score, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads in the order in which they were asked for."""
        return tuple(self.predictions)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Paths that the user gave, in that order."""
        return tuple(dict.fromkeys(frame.dataset for frame in self.frames))


def evaluate_frames(
    potential: Evaluator,
    heads: Sequence[str],
    frames: Sequence[Frame],
    *,
    progress: Callable[[int], None] | None = None,
    batch_atoms: int = 1024,
) -> Evaluation:
    """Predict all frames with all heads and score the predictions against the labels.

    Parameters
    ----------
    potential
        Usually a `mtinfer.Potential`.
    heads
        Names of heads; one that stands twice is evaluated once.
    frames
        Frames of any sizes.
    progress
        Called with the number of predictions that were just made; they add up to
        ``len(frames) * len(set(heads))``.
    batch_atoms
        About how many atoms go into one call of the potential; a larger frame goes alone.

    Raises
    ------
    StructureError
        A frame can't be evaluated; the text names the frame.
    UnknownHeadError
        A head does not exist.
    """
    predictions: dict[str, list[Prediction]] = {head: [] for head in heads}
    errors = ErrorAccumulator()
    for batch in batches(frames, batch_atoms):
        for head, done in predictions.items():
            new = _evaluate_batch(potential, head, batch)
            for frame, prediction in zip(batch, new, strict=True):
                errors.add(head, frame, prediction)
            done += new
            if progress is not None:
                progress(len(new))
    return Evaluation(
        frames=tuple(frames),
        predictions={head: tuple(done) for head, done in predictions.items()},
        scores=errors.scores(),
    )


def batches(frames: Sequence[Frame], batch_atoms: int) -> Iterator[list[Frame]]:
    """Yield the frames in order, in lists of at most `batch_atoms` atoms or of one frame."""
    batch: list[Frame] = []
    n_atoms = 0
    for frame in frames:
        if batch and n_atoms + len(frame.atoms) > batch_atoms:
            yield batch
            batch, n_atoms = [], 0
        batch.append(frame)
        n_atoms += len(frame.atoms)
    if batch:
        yield batch


def _evaluate_batch(potential: Evaluator, head: str, batch: list[Frame]) -> list[Prediction]:
    try:
        return potential.evaluate([frame.atoms for frame in batch], head=head)
    except StructureError:
        for frame in batch:  # one at a time, to find out which frame it was
            try:
                potential.evaluate([frame.atoms], head=head)
            except StructureError as err:
                raise StructureError(f"{frame.name}: {err}") from err
        raise
