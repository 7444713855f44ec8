"""Several processes that train one model: who am I, and how gradients become one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..errors import MtinferError, TrainingError
from ..loading import usable_device

__all__ = ["Ranks"]

T = TypeVar("T")

#: what ``torchrun`` sets beside WORLD_SIZE, by which processes meet
_MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: how long processes wait for one that compiles, takes statistics or draws; torchrun ends all when one dies
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """Processes that ``torchrun`` started; a single one where it did not."""

    rank: int = 0
    size: int = 1
    #: where this process computes; each process has a GPU of its own
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls, device: str | None = None) -> Ranks:
        """Meet the other processes; the environment of ``torchrun`` says how many there are.

        Raises
        ------
        MtinferError
            The device can't be used, or the environment names other processes, but not how to meet them.
        """
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls(device=usable_device(device))
        if missing := [name for name in _MEETING if name not in os.environ]:
            raise TrainingError(
                f"WORLD_SIZE is {size}, and {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not "
                "set; start several processes with torchrun, or unset WORLD_SIZE for one"
            )
        if (device is None and torch.cuda.is_available()) or str(device).startswith("cuda"):
            # where each process sees a GPU of its own alone, that is the first
            device = f"cuda:{os.environ['LOCAL_RANK'] if torch.cuda.device_count() != 1 else 0}"
        where = usable_device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        on_gpu = where.type == "cuda"
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=_PATIENCE, device_id=where if on_gpu else None
        )
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), where)

    def leave(self) -> None:
        """End the connection; not after an error, where nccl would wait for the others."""
        if self.size > 1:
            torch.distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process computes the statistics and writes the files."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` gives in the first process, which alone calls it.

        Raises
        ------
        MtinferError
            What `make` raised, in every process.
        """
        if self.size == 1:
            return make()
        box: list[T | MtinferError | None] = [None]
        if self.is_first:
            try:
                box = [make()]
            except MtinferError as err:
                box = [err]
        torch.distributed.broadcast_object_list(box, src=0)
        if isinstance(box[0], MtinferError):
            raise box[0]
        return cast(T, box[0])

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Average tensors, of any shapes and precisions, over all processes."""
        if self.size == 1:
            return list(values)
        flat = torch.cat([value.reshape(-1).to(torch.float64) for value in values])
        torch.distributed.all_reduce(flat)
        parts = (flat / self.size).split([value.numel() for value in values])
        return [p.reshape(v.shape).to(v.dtype) for p, v in zip(parts, values, strict=True)]
