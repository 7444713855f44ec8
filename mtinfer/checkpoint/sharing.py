"""Which heads have which weights in common, told from where the weights are stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

__all__ = ["Share", "StoredWeight", "is_trainable", "parameter_count", "shares"]

#: what heads may share of a descriptor, the most first
DESCRIPTOR_LEVELS = ("descriptor", "part of the descriptor", "type embedding")
DESCRIPTOR = "descriptor."
TYPE_EMBEDDING = "descriptor.type_embedding."
NETWORKS = "fitting_net.nets."


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight is stored, without its numbers."""

    #: equal for weights that are one tensor in the file
    identity: object
    dtype: str
    shape: tuple[int, ...]


#: weights of one head by canonical name
Weights = Mapping[str, StoredWeight]


@dataclass(frozen=True)
class Share:
    """Heads that have a part in common, as one copy in the file."""

    #: ``descriptor``, ``part of the descriptor``, ``type embedding`` or ``fitting net``
    part: str
    heads: tuple[str, ...]


def is_trainable(name: str) -> bool:
    """Whether a weight belongs to a network: not statistics, energy biases or conditioning vectors."""
    if name.startswith(DESCRIPTOR):
        return name.rpartition(".")[2] not in ("mean", "stddev")
    return name.startswith(NETWORKS)


def parameter_count(heads: Iterable[Weights]) -> int:
    """Trainable numbers of some heads, each stored number counted once."""
    sizes = {
        weight.identity: math.prod(weight.shape)
        for weights in heads
        for name, weight in weights.items()
        if is_trainable(name)
    }
    return sum(sizes.values())


def shares(heads: Mapping[str, Weights]) -> Iterator[Share]:
    """Yield the groups of heads that have something in common.

    Parameters
    ----------
    heads
        Weights by head.

    Yields
    ------
    Share
        Descriptor first, each group once, under the most that it shares.
    """
    levels = {pair: _descriptor_level(heads[pair[0]], heads[pair[1]]) for pair in combinations(heads, 2)}
    named: list[set[str]] = []
    for level, part in enumerate(DESCRIPTOR_LEVELS):
        linked = [pair for pair, reached in levels.items() if reached is not None and reached <= level]
        for group in _groups(linked):
            if not any(group <= larger for larger in named):
                named.append(group)
                yield Share(part, tuple(head for head in heads if head in group))
    networks = {head: _identities(weights, NETWORKS) for head, weights in heads.items()}
    linked = [(a, b) for a, b in combinations(heads, 2) if networks[a] and networks[a] == networks[b]]
    for group in _groups(linked):
        yield Share("fitting net", tuple(head for head in heads if head in group))


def _descriptor_level(a: Weights, b: Weights) -> int | None:
    if (whole := _identities(a, DESCRIPTOR)) and whole == _identities(b, DESCRIPTOR):
        return 0
    trained = {weight.identity for name, weight in b.items() if is_trainable(name)}
    common = [
        name
        for name, weight in a.items()
        if name.startswith(DESCRIPTOR) and is_trainable(name) and weight.identity in trained
    ]
    if not common:
        return None
    return 2 if all(name.startswith(TYPE_EMBEDDING) for name in common) else 1


def _identities(weights: Weights, prefix: str) -> set[object]:
    return {weight.identity for name, weight in weights.items() if name.startswith(prefix)}


def _groups(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Connected sets of heads."""
    groups: list[set[str]] = []
    for pair in pairs:
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & set(pair)] + [joined]
    return groups
