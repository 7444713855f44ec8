"""Statistics of the training data: environment rows, energy bias, frame and atomic parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Frame
from ..inputs import GraphInputs
from ..models import EnergyModel
from ..models.dpa1 import DPA1
from ..models.dpa2 import DPA2
from ..models.dpa3 import DPA3
from ..models.environment import Environment
from ..models.hybrid import Hybrid, member_name
from ..models.layers import switch
from ..models.layout import Selection
from ..models.se_e2_a import SeE2A
from .batch import frame_inputs, type_indices
from .sampling import System

__all__ = [
    "Block",
    "TaskStatistics",
    "collect",
    "energy_bias",
    "environment_weights",
    "merged",
    "stat_blocks",
    "times_drawn",
]

#: smallest standard deviation, and that of a type without samples
_FLOOR, _UNSEEN = 1e-2, 1e-1
#: frames evaluated at once
_CHUNK = 8


@dataclass(frozen=True)
class Block:
    """A part of a descriptor that standardises environment rows."""

    #: prefix of its weights
    prefix: str
    selection: Selection
    environment: Environment
    #: the mean is zero, whatever the data
    zero_mean: bool

    @property
    def n_slots(self) -> int:
        return sum(self.selection.sel or ())


@dataclass(frozen=True)
class TaskStatistics:
    """What one task's data say."""

    #: block prefix -> (n_types, 2, 3): for the radial component and for the other three pooled, how many
    #: numbers, their sum and the sum of their squares; empty slots count as zeros
    moments: dict[str, Tensor]
    #: (1, n_types, 1) each, eV
    out_bias: Tensor
    out_std: Tensor
    #: (numb_fparam, 3) and (numb_aparam, 3): number, sum, sum of squares
    fparam: Tensor
    aparam: Tensor
    #: Å, smallest distance of two atoms; -1 where no two are within the cutoff
    min_distance: float


def stat_blocks(model: EnergyModel, config: Mapping[str, Any]) -> list[Block]:
    """Blocks of a model whose statistics come from data, not those with a fixed standard deviation.

    Parameters
    ----------
    config
        completed section `descriptor`.
    """
    return _blocks(model.descriptor, config)


def _blocks(descriptor: Any, config: Mapping[str, Any]) -> list[Block]:
    if isinstance(descriptor, Hybrid):
        return [
            replace(block, prefix=member_name(index, block.prefix))
            for index, (member, own) in enumerate(zip(descriptor.members, config["list"], strict=True))
            for block in _blocks(member, own)
        ]
    if isinstance(descriptor, SeE2A):
        return [_block("descriptor", descriptor, descriptor.selection, config)]
    if isinstance(descriptor, DPA1):
        selection = replace(descriptor.selection, sel=(descriptor.sel,), inner=())
        return [_block(descriptor.block, descriptor, selection, config)]
    if isinstance(descriptor, DPA2):
        return _dpa2_blocks(descriptor, config)
    if isinstance(descriptor, DPA3) and not config["repflow"]["fix_stat_std"]:
        options = descriptor.repflow.options
        selection = replace(descriptor.selection, inner=())
        environment = Environment(options.e_rcut, options.e_rcut_smth, descriptor.repflow.protection)
        return [Block("descriptor.repflows", selection, environment, zero_mean=True)]
    return []


def _block(prefix: str, part: Any, selection: Selection, config: Mapping[str, Any]) -> Block:
    selection = replace(selection, rcut=part.environment.rcut)
    return Block(prefix, selection, part.environment, bool(config["set_davg_zero"]))


def _dpa2_blocks(descriptor: DPA2, config: Mapping[str, Any]) -> list[Block]:
    plain = replace(descriptor.selection, sel=(descriptor.repinit.sel,), inner=())
    repinit, repformer = config["repinit"], config["repformer"]
    parts: list[tuple[str, Any, int, Mapping[str, Any]]] = [
        ("descriptor.repinit", descriptor.repinit, descriptor.repinit.sel, repinit),
        ("descriptor.repformers", descriptor.repformer, repformer["nsel"], repformer),
    ]
    if descriptor.three_body is not None:
        sel = descriptor.three_body.sel
        parts.append(("descriptor.repinit_three_body", descriptor.three_body, sel, repinit))
    return [_block(prefix, part, replace(plain, sel=(sel,)), own) for prefix, part, sel, own in parts]


def times_drawn(system: System, n_batches: int, dialect: str) -> list[int]:
    """How often each frame of a system counts in statistics of `n_batches` batches.

    As in deepmd-kit, "pt" stops at the end of the data and "pt_expt" starts over. Where batches are no whole
    number of rounds, the first frames count once more; deepmd-kit takes random ones.
    """
    n_frames = len(system.frames)
    n_drawn = n_batches * min(system.batch_size, n_frames)
    if dialect == "pt":
        n_drawn = min(n_drawn, n_frames)
    rounds, rest = divmod(n_drawn, n_frames)
    return [rounds + 1] * rest + [rounds] * (n_frames - rest)


def collect(
    systems: Sequence[System], model: EnergyModel, config: Mapping[str, Any], *, dialect: str = "pt_expt"
) -> TaskStatistics:
    """Evaluate the data of one task.

    Parameters
    ----------
    systems
        of which `data_stat_nbatch` batches are used each; see `times_drawn`.
    config
        completed entry of `model_dict`.
    """
    counted: dict[int, list[Frame]] = defaultdict(list)
    for system in systems:
        times_of = times_drawn(system, int(config["data_stat_nbatch"]), dialect)
        for frame, times in zip(system.frames, times_of, strict=True):
            counted[times].append(frame)
    counted.pop(0, None)
    blocks = stat_blocks(model, config["descriptor"])
    n_types = len(model.type_map)
    moments = {block.prefix: torch.zeros(n_types, 2, 3, dtype=torch.float64) for block in blocks}
    nearest_square = torch.tensor(float("inf"), dtype=torch.float64)
    fparam, aparam = [], []
    for times, chunk in _chunks(counted):
        inputs = frame_inputs(chunk, model)
        for block in blocks:
            moments[block.prefix] += times * _moments(block, inputs, n_types)
        if inputs.displacements.shape[0]:
            nearest_square = torch.minimum(nearest_square, (inputs.displacements**2).sum(1).min())
        fparam += [inputs.fparam] * times
        aparam += [inputs.aparam] * times
    frames = [frame for times, own in counted.items() for frame in own * times]
    out_bias, out_std = energy_bias(
        frames, model.type_map, config["preset_out_bias"], excluded=model.atom_exclude_types
    )
    return TaskStatistics(
        moments=moments,
        out_bias=out_bias,
        out_std=out_std,
        fparam=_sums(torch.cat(fparam)),
        aparam=_sums(torch.cat(aparam)),
        min_distance=float(nearest_square.sqrt()) if nearest_square.isfinite() else -1.0,
    )


def _chunks(counted: Mapping[int, list[Frame]]) -> Iterator[tuple[int, list[Frame]]]:
    """Yield frames that count equally often, a few at once."""
    for times, frames in counted.items():
        for start in range(0, len(frames), _CHUNK):
            yield times, frames[start : start + _CHUNK]


def _sums(values: Tensor) -> Tensor:
    count = torch.full((values.shape[1],), float(values.shape[0]), dtype=torch.float64)
    return torch.stack([count, values.sum(0), (values * values).sum(0)], dim=1)


def _moments(block: Block, inputs: GraphInputs, n_types: int) -> Tensor:
    pairs = block.selection(inputs)
    d = inputs.displacements[pairs.edges]
    r = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
    of = block.environment
    w = switch(r, of.rcut_smth, of.rcut)  # also for models with an exponential switch, as upstream
    radial, angular = w / (r + of.protection), w * d / (r + of.protection) ** 2
    sums = [radial, radial**2, angular.sum(1, keepdim=True), (angular**2).sum(1, keepdim=True)]
    summed = torch.zeros(n_types, 4, dtype=torch.float64)
    summed.index_add_(0, inputs.types[pairs.centers], torch.cat(sums, dim=1))
    n_slots = torch.bincount(inputs.types, minlength=n_types).to(torch.float64) * block.n_slots
    of_radial = torch.stack([n_slots, summed[:, 0], summed[:, 1]], dim=1)
    of_angular = torch.stack([3.0 * n_slots, summed[:, 2], summed[:, 3]], dim=1)
    return torch.stack([of_radial, of_angular], dim=1)


def merged(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add the sums of heads that share a descriptor or a fitting net.

    Parameters
    ----------
    parts
        one per head, the base first.
    weights
        probabilities of the heads; each part counts relative to the base, or to all where the base is never
        drawn. Where no head is drawn, all count alike.
    """
    weights = weights if any(weights) else [1.0] * len(parts)
    base = weights[0] or sum(weights)
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += part * (weight / base)
    return total


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from (..., 3) sums; the latter is floored."""
    count, total, square = moments.unbind(-1)
    seen = count > 0
    count = torch.where(seen, count, 1.0)
    mean = total / count
    std = torch.sqrt(torch.clamp(square / count - mean * mean, min=0.0)).clamp(min=_FLOOR)
    return torch.where(seen, mean, 0.0), torch.where(seen, std, _UNSEEN)


def environment_weights(block: Block, moments: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights `mean` and `stddev` of a block, (n_types, n_slots, 4), from its sums (n_types, 2, 3)."""
    mean, std = mean_and_std(moments)
    row_mean = torch.zeros(moments.shape[0], 4, dtype=torch.float64)
    if not block.zero_mean:
        row_mean[:, 0] = mean[:, 0]
    row_std = std[:, [0, 1, 1, 1]]
    return {
        f"{block.prefix}.{name}": row.to(dtype).unsqueeze(1).repeat(1, block.n_slots, 1)
        for name, row in (("mean", row_mean), ("stddev", row_std))
    }


def parameter_weights(name: str, sums: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights `fitting_net.<name>_avg` and `_inv_std` from (size, 3) sums; nothing where size is 0."""
    if not sums.shape[0]:
        return {}
    mean, std = mean_and_std(sums)
    return {f"fitting_net.{name}_avg": mean.to(dtype), f"fitting_net.{name}_inv_std": (1.0 / std).to(dtype)}


def energy_bias(
    frames: Sequence[Frame],
    type_map: Sequence[str],
    preset: Mapping[str, Any] | None = None,
    *,
    excluded: Sequence[int] = (),
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energy per type by least squares over frames, and the standard deviation of what is left.

    Parameters
    ----------
    preset
        ``{"energy": [...]}``, one number or null per type; a type with a number keeps it.
    excluded
        types whose atoms have no energy (`atom_exclude_types`): the others account for all of it.
    present
        shape (1, n_types, 1), eV; bias already contained in predictions, where `frame.energy` is label minus
        prediction. What is returned is to be added to it; default: zeros.

    Returns
    -------
    out_bias, out_std
        shape (1, n_types, 1), eV; zeros and ones where no frame has an energy
    """
    n_types = len(type_map)
    labelled = [frame for frame in frames if frame.energy is not None]
    given = (preset or {}).get("energy") or [None] * n_types
    free = np.array([value is None for value in given])
    fixed = np.array([0.0 if value is None else float(np.ravel(value)[0]) for value in given])
    if present is not None:
        fixed[~free] -= present.flatten().numpy()[~free]
    bias, std = fixed.copy(), 1.0
    if labelled:
        counts = np.array(
            [np.bincount(type_indices(frame, type_map), minlength=n_types) for frame in labelled], dtype=float
        )
        counts[:, list(excluded)] = 0.0
        energies = np.array([frame.energy for frame in labelled], dtype=float)
        solution = np.linalg.lstsq(counts[:, free], energies - counts @ fixed, rcond=None)[0]
        bias[free] = solution
        std = float(np.std(energies - counts @ bias))
    column = torch.from_numpy(bias).reshape(1, n_types, 1)
    return column, torch.full_like(column, std)
