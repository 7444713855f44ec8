"""Checkpoints with random weights, for tests and measurements."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from .checkpoint.records import HeadRecord
from .checkpoint.writer import training_content, write_content
from .inputs import ParameterSpec
from .models import EnergyModel

__all__ = ["write_random_checkpoint"]

#: last part of a canonical name -> how its numbers are drawn; a digit stands for a residual coefficient
_DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], ArrayLike]] = {
    # a vector is the scale of a layer norm
    "w": lambda rng, shape: rng.normal(0.0, 1.0 / sum(shape) ** 0.5, shape) if len(shape) > 1 else 1.0,
    "b": lambda rng, shape: rng.normal(0.0, 0.3, shape),
    "idt": lambda rng, shape: rng.normal(0.1, 0.01, shape),
    "residual": lambda rng, shape: rng.normal(0.1, 0.02, shape),
    "mean": lambda rng, shape: 0.0,
    "stddev": lambda rng, shape: 0.3,
    "out_bias": lambda rng, shape: rng.normal(0.0, 3.0, shape),
    "out_std": lambda rng, shape: 1.0,
    "bias_atom_e": lambda rng, shape: rng.normal(0.0, 1.0, shape),
    "min_nbor_dist": lambda rng, shape: 0.8,
    "fparam_avg": lambda rng, shape: rng.normal(0.0, 0.5, shape),
    "aparam_avg": lambda rng, shape: rng.normal(0.0, 0.5, shape),
    "fparam_inv_std": lambda rng, shape: rng.uniform(0.5, 2.0, shape),
    "aparam_inv_std": lambda rng, shape: rng.uniform(0.5, 2.0, shape),
}


def write_random_checkpoint(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    heads: Sequence[str] = ("water",),
    dialect: str = "pt",
    seed: int = 0,
) -> None:
    """Write a multitask checkpoint with random weights, laid out as its trainer does.

    Parameters
    ----------
    path
        file to write, ``.pt``.
    config
        configuration of every head, an entry of ``model_dict``: ``type_map``, ``descriptor``,
        ``fitting_net``. It goes into the file as it is, so what is left out means the trainer's default.
    heads
        names; all share one descriptor, and each has a fitting net and energy biases of its own.
    dialect
        "pt" or "pt_expt".
    seed
        the same seed gives the same weights, in either dialect.

    Raises
    ------
    UnsupportedModelError
        If mtinfer does not evaluate such a head.
    """
    specs = EnergyModel.from_config(config, dialect).parameters()
    shared = {
        name: _draw(name, spec, config, 0, seed)
        for name, spec in specs.items()
        if name.startswith("descriptor.")
    }
    records = {}
    for index, head in enumerate(heads):
        own = {
            name: _draw(name, spec, config, index, seed) for name, spec in specs.items() if name not in shared
        }
        records[head] = HeadRecord(head, (), dict(config), shared | own, False, None)
    content = training_content(records, dialect, step=1, learning_rate=0.0, shared_dict={})
    write_content(Path(path), {"model": content})


def _draw(name: str, spec: ParameterSpec, config: Mapping[str, Any], head: int, seed: int) -> torch.Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "case_embd":
        values: ArrayLike = np.arange(spec.shape[0]) == head % spec.shape[0]
    elif leaf == "default_fparam_tensor":
        values = config["fitting_net"]["default_fparam"]
    else:
        random = np.random.default_rng([seed, head, zlib.crc32(name.encode())])
        values = _DRAWS["residual" if leaf.isdigit() else leaf](random, spec.shape)
    filled = np.broadcast_to(np.asarray(values, dtype=np.float64), spec.shape)
    return torch.from_numpy(filled.copy()).to(spec.dtype)
