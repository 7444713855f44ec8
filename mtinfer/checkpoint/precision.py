"""Change the precision of a head: weights and configuration together."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import torch

from .dialects import ALWAYS_FLOAT64
from .records import Checkpoint

__all__ = ["DTYPES", "Precision", "recast", "with_precision"]

Precision = Literal["float32", "float64"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


def with_precision(checkpoint: Checkpoint, dtype: Precision) -> Checkpoint:
    """Return the heads with networks in `dtype`; energy biases stay float64, shared weights stay shared."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in ALWAYS_FLOAT64:
            return tensor
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.to(DTYPES[dtype])
        return done[key]

    heads = {}
    for head, record in checkpoint.heads.items():
        weights = {name: cast(name, tensor) for name, tensor in record.weights.items()}
        config = record.config if record.refused else recast(record.config, dtype)
        heads[head] = replace(record, config=config, weights=weights)
    return replace(checkpoint, heads=heads)


def recast(config: dict[str, Any], dtype: Precision) -> dict[str, Any]:
    """Return a head's configuration with the precision of descriptor, members and fitting net set."""
    config = copy.deepcopy(config)
    pending = [config["descriptor"], config["fitting_net"]]
    while pending:
        part = pending.pop()
        if part.get("type") == "hybrid":
            pending.extend(part["list"])
        else:
            part["precision"] = dtype
    return config
