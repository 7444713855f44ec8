"""Neighbour counts (`sel` and its kin) that a training input leaves to the data: "auto" and "auto:FACTOR"."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.refusals import descriptors
from ..data import Frame
from ..errors import ConfigError
from ..models.hybrid import member_name
from ..neighbors import find_candidates
from ..options import NEIGHBOR_COUNTS
from .batch import type_indices
from .config import TrainConfig

__all__ = ["settle_counts"]

#: factor on the largest count in the data where the input gives none
_FACTOR = 1.1


@dataclass(frozen=True)
class _Place:
    """Where a descriptor says "auto"."""

    #: as in "descriptor.repinit.nsel"
    name: str
    #: section that holds the count
    section: dict[str, Any]
    key: str
    #: Å
    rcut: float
    #: one count per type instead of one for all
    by_type: bool

    @property
    def factor(self) -> float:
        """On the largest count in the data."""
        return float(self.section[self.key].partition(":")[2] or _FACTOR)


def settle_counts(
    config: TrainConfig, frames: Mapping[str, Sequence[Frame]]
) -> tuple[TrainConfig, dict[str, dict[str, int | list[int]]]]:
    """Replace "auto" by the largest number of neighbours in the data, times a factor, up to a multiple of 4.

    As deepmd-kit does for one task. Beyond that, what heads share has the count that the neediest of them
    needs, and repinit of DPA-2 has more slots than the repformer.

    Parameters
    ----------
    frames
        training data by task.

    Returns
    -------
    the input with numbers alone; and the counts that were found: task -> key -> count

    Raises
    ------
    ConfigError
        No atom has a neighbour, heads share a descriptor and have different elements, or deepmd-kit would not
        read a descriptor with these counts.
    """
    models = {task.name: copy.deepcopy(task.model) for task in config.tasks}
    places = {name: list(_places(model["descriptor"], "descriptor")) for name, model in models.items()}
    counts = {
        name: _largest_counts(frames[name], models[name]["type_map"], own) for name, own in places.items()
    }
    for link in config.links:
        _join(link.part, [head for head, _ in link.heads], places, counts)
    found: dict[str, dict[str, int | list[int]]] = {}
    for name, own in places.items():
        for place, largest in zip(own, counts[name], strict=True):
            if not largest.any():
                raise ConfigError(
                    f"head {name!r} leaves {place.name} to the data, where no atom has a neighbour within "
                    f"{place.rcut} Å; give a number"
                )
            settled = [_rounded(int(count * place.factor)) for count in largest.tolist()]
            place.section[place.key] = settled if place.by_type else settled[0]
        for descriptor in descriptors(models[name]):
            if descriptor["type"] == "dpa2":
                _widen_repinit(name, descriptor, {id(place.section) for place in own if place.key == "nsel"})
            _check_order(name, descriptor)
        if own:
            found[name] = {place.name: place.section[place.key] for place in own}
    tasks = tuple(replace(task, model=models[task.name]) for task in config.tasks)
    return replace(config, tasks=tasks), found


def _rounded(count: int) -> int:
    return 4 * ((count + 3) // 4)


def _widen_repinit(head: str, descriptor: Mapping[str, Any], automatic: Collection[int]) -> None:
    """See to it that repinit of DPA-2 sees more than the repformer, as deepmd-kit demands."""
    outer, inner = descriptor["repinit"], descriptor["repformer"]
    if id(outer) in automatic:
        outer["nsel"] = max(outer["nsel"], _rounded(inner["nsel"] + 1))
    for key in ("rcut", "nsel"):
        if outer[key] <= inner[key]:
            raise ConfigError(
                f"head {head!r}: {key} of repinit is {outer[key]}, and of repformer {inner[key]}; deepmd-kit "
                "reads a DPA-2 only where that of repinit is larger"
            )


def _check_order(head: str, descriptor: Mapping[str, Any]) -> None:
    """See to it that among the lists of a descriptor a wider one is no shorter, as deepmd-kit demands."""
    lists = []
    for section, key, rcut in NEIGHBOR_COUNTS.get(descriptor["type"], ()):
        holder = descriptor if section is None else descriptor[section]
        if not key.startswith("three_body") or holder["use_three_body"]:
            lists.append((holder[rcut], holder[key], key if section is None else f"{section}.{key}"))
    if len(lists) < 2:
        return
    # equal cutoffs in the order of the counts, but for DPA-3, whose edges see at least what its angles see
    lists = lists[::-1] if descriptor["type"] == "dpa3" else sorted(lists)
    for (near, sel, name), (far, fewer, other) in itertools.pairwise(lists):
        if sel > fewer:
            raise ConfigError(
                f"head {head!r}: {name} is {sel} within {near} Å, and {other} {fewer} within {far} Å; "
                "deepmd-kit reads a model only where a wider list has no fewer neighbours"
            )


def _places(descriptor: dict[str, Any], part: str) -> Iterator[_Place]:
    kind = descriptor["type"]
    if kind == "hybrid":
        for index, member in enumerate(descriptor["list"]):
            yield from _places(member, member_name(index, part))
        return
    for section, key, rcut in NEIGHBOR_COUNTS[kind]:
        holder, path = (descriptor, part) if section is None else (descriptor[section], f"{part}.{section}")
        if isinstance(holder[key], str):
            yield _Place(f"{path}.{key}", holder, key, float(holder[rcut]), by_type=kind == "se_e2_a")


def _largest_counts(
    frames: Sequence[Frame], type_map: Sequence[str], places: Sequence[_Place]
) -> list[Tensor]:
    """Largest number of neighbours of an atom, shape (n_types,) or (1,), for each place."""
    n_types = len(type_map)
    largest = [torch.zeros(n_types if place.by_type else 1, dtype=torch.int64) for place in places]
    if not places:
        return largest
    for frame in frames:
        pairs = find_candidates(frame.atoms, max(place.rcut for place in places))
        distance = torch.linalg.vector_norm(pairs.displacements(frame.atoms), dim=1)
        types = torch.from_numpy(type_indices(frame, type_map))
        slot = pairs.centers * n_types + types[pairs.neighbors]
        for k, place in enumerate(places):
            near = slot[distance <= place.rcut]
            counts = torch.bincount(near, minlength=pairs.n_atoms * n_types).reshape(-1, n_types)
            counts = counts if place.by_type else counts.sum(1, keepdim=True)
            largest[k] = torch.maximum(largest[k], counts.amax(0))
    return largest


def _join(
    part: str,
    heads: Sequence[str],
    places: Mapping[str, Sequence[_Place]],
    counts: Mapping[str, list[Tensor]],
) -> None:
    """Give all heads that share a part of the descriptor the largest count among them."""
    shared = {
        head: [k for k, place in enumerate(places[head]) if place.name.startswith(f"{part}.")]
        for head in heads
    }
    for rows in zip(*shared.values(), strict=True):
        own = [counts[head][k] for head, k in zip(heads, rows, strict=True)]
        if len({len(count) for count in own}) > 1:
            raise ConfigError(
                f"heads {', '.join(heads)} share {part} and have type maps of different lengths"
            )
        largest = torch.stack(own).amax(0)
        for head, k in zip(heads, rows, strict=True):
            counts[head][k] = largest
