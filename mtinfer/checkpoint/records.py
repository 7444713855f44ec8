"""What reading a file gives: heads with named weights and their configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .heads import find_head

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "HeadRecord", "Source"]


@dataclass(frozen=True)
class Source:
    """The training checkpoint that the weights come from."""

    #: file name without folders
    name: str
    #: bytes
    size: int
    #: None until a checkpoint is converted: reading does not touch the optimizer's part of the file
    sha256: str | None


@dataclass(frozen=True)
class HeadRecord:
    """One head, complete in itself."""

    name: str
    aliases: tuple[str, ...]
    #: as the trainer stored it, plain data
    config: dict[str, Any]
    #: canonical name -> tensor on the CPU, shape and dtype of the file; heads that share a weight hold the
    #: same tensor. Empty where the head is refused
    weights: dict[str, torch.Tensor]
    #: whether training ruled out the neighbour graph for a descriptor (`pt_expt` only)
    graph_lower_disabled: bool
    #: one line that says why the head can't be evaluated; None where it can
    refused: str | None


@dataclass(frozen=True)
class Checkpoint:
    """All heads of a file."""

    path: Path
    #: ``"pt"`` or ``"pt_expt"``
    dialect: str
    #: training steps completed; None where the file does not say
    step: int | None
    #: heads in the order of the file
    heads: dict[str, HeadRecord]
    source: Source
    #: whether keys of compiled graphs were in the file (they are left out)
    has_debris: bool

    @property
    def spelling(self) -> str | None:
        """Dialect in which the file has the keys of its weights; None where they are canonical names."""
        return self.dialect if self.source.sha256 is None else None

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Aliases by head, as `find_head` takes them."""
        return {name: record.aliases for name, record in self.heads.items()}

    def head(self, name: str | None = None) -> HeadRecord:
        """Pick a head to work with.

        Parameters
        ----------
        name
            Name or alias; None for the only or the default head.

        Raises
        ------
        UnknownHeadError
            No such head, or none named where several exist.
        UnsupportedModelError
            The head uses a feature that is not evaluated.
        """
        record = self.heads[find_head(name, self.aliases)]
        if record.refused is not None:
            raise UnsupportedModelError(record.refused)
        return record

    def chosen(self, names: Sequence[str] | None) -> list[HeadRecord]:
        """Heads of these names or aliases, each once; None for all that can be evaluated.

        Raises
        ------
        UnknownHeadError
            No such head.
        UnsupportedModelError
            A head, or all where none is named, uses a feature that is not evaluated.
        """
        if names is not None:
            return list({record.name: record for record in map(self.head, names)}.values())
        records = [record for record in self.heads.values() if record.refused is None]
        if not records:
            raise UnsupportedModelError("; ".join(str(record.refused) for record in self.heads.values()))
        return records
