"""From a flat list of pairs to the padded arrays that a graph reads: truncation, exclusion, padding.

The two truncation semantics of the family live here and reach the graph as data only. *dense* keeps the
nearest ``sel`` neighbours and counts the slots that stay empty, because empty slots take part in the sums;
*graph* keeps every neighbour and has no empty slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from ..inputs import GraphInputs


@dataclass(frozen=True)
class Argument:
    """Declared shape of one argument of a graph.

    Axes of one name have one size, which changes from call to call; a number is part of the architecture.
    """

    axes: tuple[str | int, ...]
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Layout:
    """Arguments of one call of the graph, as its descriptor declares them, and where the results belong."""

    #: index into the weight groups of a head
    group: int
    #: displacement arrays, (..., 3) each, Å; the graph returns dE/d(displacement) for every one of them
    displacements: tuple[Tensor, ...]
    #: further arguments
    tensors: tuple[Tensor, ...]
    #: one per displacement array, int64 of its leading axes: pair of `GraphInputs` on each slot, or the
    #: number of all pairs where the slot is empty; no pair is on two slots of one array
    blocks: tuple[Tensor, ...]
    #: (n_centers,) int64, atom of each row of the atomic energies
    atoms: Tensor


@dataclass(frozen=True)
class Pairs:
    """Pairs that survive truncation and exclusion, with the counts that the empty slots need."""

    #: (n_pairs,) int64 each; `edges` indexes `GraphInputs`, sorted by centre
    centers: Tensor
    neighbors: Tensor
    edges: Tensor
    #: (n_atoms,) int64, pairs of every centre
    counts: Tensor
    #: (n_atoms, n_sections) int64, slots that no neighbour fills (they take part in the sums)
    n_empty: Tensor
    #: (n_atoms,) int64, slots without a valid neighbour: empty or excluded by the descriptor
    n_phantom: Tensor
    #: (n_atoms,) bool, atoms that lost neighbours to truncation, here or in `inner`; None: no atom did
    truncated: Tensor | None
    #: the shorter lists of further blocks
    inner: tuple[Pairs, ...] = ()

    @property
    def n_truncated(self) -> int:
        """Number of atoms that lost neighbours to truncation."""
        return 0 if self.truncated is None else int(self.truncated.sum())


@dataclass(frozen=True)
class Selection:
    """Which pairs a model sees: cutoff, slots per section, exclusions.

    `sel` has one entry per neighbour type (`by_type`) or a single one; None keeps all neighbours (*graph*).
    `exclude` drops pairs inside the descriptor, `pair_exclude` drops them from the neighbour list.
    """

    n_types: int
    sel: tuple[int, ...] | None
    by_type: bool = False
    exclude: tuple[tuple[int, int], ...] = ()
    pair_exclude: tuple[tuple[int, int], ...] = ()
    #: slots of the whole list; None: the sum of `sel`
    total: int | None = None
    #: Å, shorter than that of the inputs
    rcut: float | None = None
    #: pairs beyond `rcut` stay in the list where it has room; their switch is zero
    keeps_beyond: bool = False
    #: shorter lists that further blocks of the model see, cut from this one
    inner: tuple[Selection, ...] = ()
    #: whether pairs dropped by `pair_exclude` leave no gap in the list that `inner` is cut from
    closes_gaps: bool = False

    def __call__(self, inputs: GraphInputs) -> Pairs:
        """Apply to all pairs of `inputs`, which are sorted by centre."""
        return self._apply(inputs, _Working.start(inputs))

    def _apply(self, inputs: GraphInputs, pairs: _Working) -> Pairs:
        if self.rcut is not None and not self.keeps_beyond:
            pairs = pairs.within(self.rcut, inputs.displacements)
        truncated: list[Tensor] = []
        if self.sel is not None:
            limit = sum(self.sel) if self.total is None else self.total
            if (pairs.counts > limit).any():
                ordered = pairs.nearest_first(inputs.displacements)
                pairs, before = ordered.keep_ranks(limit), pairs
                truncated.append(self._has_lost(before, pairs, inputs))
        with_gaps = pairs
        pairs = pairs.without(self._excluded(self.pair_exclude, inputs, pairs))
        inner = tuple(
            shorter._apply(inputs, pairs if self.closes_gaps else with_gaps) for shorter in self.inner
        )
        if self.by_type:
            section = inputs.types[pairs.neighbors]
            if self.sel is not None:
                before = pairs
                pairs, section = pairs.keep_sections(inputs, section, self.sel)
                if pairs is not before:
                    truncated.append(self._has_lost(before, pairs, inputs))
            key, n_keys = pairs.centers * self.n_types + section, inputs.n_atoms * self.n_types
            n_real = torch.bincount(key, minlength=n_keys).reshape(-1, self.n_types)
        else:
            n_real = pairs.counts.unsqueeze(1)
        pairs = pairs.without(self._excluded(self.exclude, inputs, pairs))
        if self.sel is None:
            n_empty, n_phantom = torch.zeros_like(n_real), torch.zeros_like(pairs.counts)
        else:
            n_empty = torch.tensor(self.sel, device=n_real.device) - n_real
            n_phantom = sum(self.sel) - pairs.counts
        truncated += [cut_list.truncated for cut_list in inner if cut_list.truncated is not None]
        return Pairs(
            pairs.centers,
            pairs.neighbors,
            pairs.edges,
            pairs.counts,
            n_empty,
            n_phantom,
            reduce(torch.logical_or, truncated) if truncated else None,
            inner,
        )

    def _has_lost(self, before: _Working, after: _Working, inputs: GraphInputs) -> Tensor:
        """Atoms that have fewer pairs within the cutoff than before, shape (n_atoms,), bool."""
        if self.rcut is not None:
            before, after = (pairs.within(self.rcut, inputs.displacements) for pairs in (before, after))
        return after.counts < before.counts

    def _excluded(
        self, excluded: Sequence[tuple[int, int]], inputs: GraphInputs, pairs: _Working
    ) -> Tensor | None:
        if not excluded:
            return None
        table, types = torch.zeros(self.n_types, self.n_types, dtype=torch.bool), range(self.n_types)
        for a, b in excluded:
            if a in types and b in types:  # others are passed over, as upstream does
                table[a, b] = table[b, a] = True
        table = table.to(pairs.centers.device)
        return table[inputs.types[pairs.centers], inputs.types[pairs.neighbors]]


@dataclass(frozen=True)
class _Working:
    centers: Tensor
    neighbors: Tensor
    edges: Tensor
    n_atoms: int

    @classmethod
    def start(cls, inputs: GraphInputs) -> _Working:
        edges = torch.arange(inputs.centers.shape[0], device=inputs.centers.device)
        return cls(inputs.centers, inputs.neighbors, edges, inputs.n_atoms)

    def take(self, index: Tensor) -> _Working:
        columns = (self.centers, self.neighbors, self.edges)
        centers, neighbors, edges = (column.index_select(0, index) for column in columns)
        return _Working(centers, neighbors, edges, self.n_atoms)

    def keep(self, kept: Tensor) -> _Working:
        return self.take(kept.nonzero().squeeze(1))

    @cached_property
    def counts(self) -> Tensor:
        return torch.bincount(self.centers, minlength=self.n_atoms)

    def without(self, dropped: Tensor | None) -> _Working:
        return self if dropped is None else self.keep(~dropped)

    def within(self, rcut: float, displacements: Tensor) -> _Working:
        return self.keep(torch.linalg.vector_norm(displacements[self.edges], dim=-1) <= rcut)

    def nearest_first(self, displacements: Tensor) -> _Working:
        distance = torch.linalg.vector_norm(displacements[self.edges], dim=-1)
        by_distance = torch.argsort(distance, stable=True)
        return self.take(by_distance[torch.argsort(self.centers[by_distance], stable=True)])

    def keep_ranks(self, sel: int) -> _Working:
        return self.keep(ranks(self.centers, self.n_atoms) < sel)

    def keep_sections(
        self, inputs: GraphInputs, section: Tensor, sel: Sequence[int]
    ) -> tuple[_Working, Tensor]:
        """Keep the nearest ``sel[t]`` neighbours of each type t; also return the types of those kept."""
        limits = torch.tensor(sel, device=section.device)
        key = self.centers * len(sel) + section
        counts = torch.bincount(key, minlength=inputs.n_atoms * len(sel)).reshape(-1, len(sel))
        if not (counts > limits).any():
            return self, section
        ordered = self.nearest_first(inputs.displacements)
        section = inputs.types[ordered.neighbors]
        key = ordered.centers * len(sel) + section
        by_key = torch.argsort(key, stable=True)
        kept = torch.empty_like(key, dtype=torch.bool)
        kept[by_key] = ranks(key[by_key], inputs.n_atoms * len(sel)) < limits[section[by_key]]
        return ordered.keep(kept), section[kept]


def ranks(rows: Tensor, n_rows: int) -> Tensor:
    """Position of each element within its row; `rows` is ascending, shape (n,)."""
    counts = torch.bincount(rows, minlength=n_rows)
    starts = torch.cumsum(counts, 0) - counts
    return torch.arange(rows.shape[0], device=rows.device) - starts[rows]


def padded_rows(counts: Tensor, rows: Tensor) -> Tensor:
    """Elements of the given rows as a matrix, where row r owns ``counts[r]`` consecutive elements.

    Parameters
    ----------
    counts
        shape (n_rows,).
    rows
        shape (n,).

    Returns
    -------
    shape (n, m), m >= 1, index of each element; empty slots, the last ones of each row, hold the number of
    all elements
    """
    starts = torch.cumsum(counts, 0) - counts
    taken = counts[rows].unsqueeze(1)
    width = max(1, int(taken.max())) if rows.shape[0] else 1
    slot = torch.arange(width, device=counts.device)
    return torch.where(slot < taken, starts[rows].unsqueeze(1) + slot, counts.sum())


def with_empty(values: Tensor, empty: float | Tensor) -> Tensor:
    """Append the element that empty slots hold: shape (n, ...) -> (n + 1, ...)."""
    extended = values.new_empty((values.shape[0] + 1, *values.shape[1:]))
    extended[:-1] = values
    extended[-1] = empty
    return extended


def on_slots(extended: Tensor, slots: Tensor) -> Tensor:
    """Elements of an array made by `with_empty` on slots (...), as `padded_rows` makes them: (..., ...)."""
    taken = extended.index_select(0, slots.flatten())
    return taken.reshape(*slots.shape, *extended.shape[1:])


class VectorsOnSlots:
    """Lays the displacements of a list of pairs out on slots.

    Parameters
    ----------
    displacements
        shape (n_edges, 3), of all pairs of `GraphInputs`, Å.
    edges
        shape (n_pairs,), which of them are in the list.
    rcut
        cutoff of the model, Å; empty slots are far beyond it.
    """

    def __init__(self, displacements: Tensor, edges: Tensor, rcut: float) -> None:
        self._vectors = with_empty(displacements, far_away(displacements, rcut))
        self._edges = with_empty(edges, displacements.shape[0])

    def __call__(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Displacements (..., 3) and pairs (...), as in `Layout`, for slots (...) of the list."""
        edges = on_slots(self._edges, slots)
        return on_slots(self._vectors, edges), edges


def row_chunks(
    counts: Tensor, *, split: bool = True, limit: int | None = None, n_bytes: int | None = None
) -> list[Tensor]:
    """Divide rows into calls of the graph, rows of similar count together.

    Long calls make large matrix products of the work per row. Short ones reuse memory that the allocator
    still holds, and waste few slots where counts differ. On an accelerator calls are long, as its memory
    allows.

    Parameters
    ----------
    counts
        shape (n_rows,), slots that each row fills.
    split
        False puts all rows, even none, into one call.
    limit
        filled slots of a call on a CPU, as for `at_once`; default: `SLOTS_PER_CALL`.
    n_bytes
        memory of a GPU that a call takes for each of them; default: `BYTES_OF_SLOT`.

    Returns
    -------
    row numbers, one tensor per call
    """
    if not split:
        return [torch.arange(counts.shape[0], device=counts.device)]
    if not counts.shape[0]:
        return []
    limit = at_once(limit or SLOTS_PER_CALL, counts.device)
    if counts.device.type == "cuda":
        limit = min(limit, int(memory_of_call(counts.device) / (n_bytes or BYTES_OF_SLOT)))
    shortest = min(limit, at_once(SHORTEST_CALL, counts.device))
    if counts.shape[0] * max(1, int(counts.max())) <= shortest:
        return [torch.arange(counts.shape[0], device=counts.device)]
    order = torch.argsort(counts, stable=True)
    ordered = torch.clamp(counts[order], min=1)
    chunks: list[Tensor] = []
    n_left = counts.shape[0]
    while n_left:  # the longest rows that are left, and those that are not much shorter
        longest, n_short = int(ordered[n_left - 1]), 0
        if n_left * longest > shortest:
            n_short = int(torch.searchsorted(ordered[:n_left], longest / MOST_PADDING))
        filled = torch.cumsum(ordered[n_short:n_left], 0)
        n_calls = -(-int(filled[-1]) // limit)
        sizes = torch.bincount((filled - 1) * n_calls // filled[-1], minlength=n_calls)
        chunks = [*order[n_short:n_left].split(sizes.tolist()), *chunks]
        n_left = n_short
    return [rows for rows in chunks if rows.shape[0]]


def at_once(n: int, device: torch.device) -> int:
    """How many rows are evaluated at once where a CPU's caches hold `n`: an accelerator is busy with more."""
    return n if device.type == "cpu" else ACCELERATOR_OVER_CPU * n


def is_too_much(kept: int, on_cpu: float, n_bytes: float, device: torch.device) -> bool:
    """Whether one call of a graph may not keep so many numbers for the derivative.

    Parameters
    ----------
    on_cpu
        most that it may keep on a CPU.
    n_bytes
        memory that a call takes for each; on a GPU, up to `SHARE_OF_GPU` of all that there is.
    """
    return kept * n_bytes > memory_of_call(device) if device.type == "cuda" else kept > on_cpu


def memory_of_call(device: torch.device) -> float:
    """Bytes of a GPU that one call of a graph may take."""
    return SHARE_OF_GPU * torch.cuda.get_device_properties(device).total_memory


#: neighbour slots in one call of a graph whose atoms are independent of each other
SLOTS_PER_CALL = 20480
#: bytes that evaluating a slot eagerly takes, as counted for published sizes of DPA-1 without attention
BYTES_OF_SLOT = 7_000
#: rows of an accelerator's call over those of a CPU's
ACCELERATOR_OVER_CPU = 100
#: memory of a GPU that a call of a graph may take
SHARE_OF_GPU = 0.25
#: longest row of a call over its shortest
MOST_PADDING = 1.5
#: slots, empty ones included, that go into one call whatever their rows are
SHORTEST_CALL = 8192


#: a slot is empty if its distance is more than this many cutoffs
EMPTY_BEYOND = 100.0


def far_away(displacements: Tensor, rcut: float) -> Tensor:
    """Displacement for empty slots, beyond what any list of a model with a cutoff `rcut` may hold.

    The switch is zero there and everything is smooth.
    """
    return displacements.new_tensor([2.0 * EMPTY_BEYOND * rcut, 0.0, 0.0])
