"""Truncation, exclusion and padding of neighbour lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtinfer.inputs import GraphInputs
from mtinfer.models import layout
from mtinfer.models.layout import (
    Pairs,
    Selection,
    far_away,
    on_slots,
    padded_rows,
    ranks,
    row_chunks,
    with_empty,
)

#: types of the atoms, and the distance of each neighbour j of each centre i
TYPES = [0, 1, 0, 1]
DISTANCES = {0: {1: 3.0, 2: 1.0, 3: 2.0}, 1: {0: 3.0, 3: 2.5}, 2: {0: 1.0}, 3: {0: 2.0, 1: 2.5, 2: 4.0}}


def inputs() -> GraphInputs:
    pairs = [(i, j, r) for i, neighbors in DISTANCES.items() for j, r in neighbors.items()]
    centers, neighbors, distances = (list(column) for column in zip(*pairs, strict=True))
    displacements = torch.zeros(len(pairs), 3, dtype=torch.float64)
    displacements[:, 1] = torch.tensor(distances, dtype=torch.float64)
    return GraphInputs(
        types=torch.tensor(TYPES),
        frames=torch.zeros(4, dtype=torch.int64),
        centers=torch.tensor(centers),
        neighbors=torch.tensor(neighbors),
        displacements=displacements,
        fparam=torch.zeros(1, 0),
        aparam=torch.zeros(4, 0),
        charge_spin=torch.zeros(1, 2),
        sizes=[4],
    )


def neighbors(pairs: Pairs) -> dict[int, set[int]]:
    given = inputs()
    assert torch.equal(given.centers[pairs.edges], pairs.centers)
    assert torch.equal(given.neighbors[pairs.edges], pairs.neighbors)
    assert (torch.diff(pairs.centers) >= 0).all()
    found: dict[int, set[int]] = {i: set() for i in range(4)}
    for i, j in zip(pairs.centers.tolist(), pairs.neighbors.tolist(), strict=True):
        assert j not in found[i]
        found[i].add(j)
    return found


def test_room_for_all() -> None:
    pairs = Selection(2, (5,))(inputs())
    assert neighbors(pairs) == {0: {1, 2, 3}, 1: {0, 3}, 2: {0}, 3: {0, 1, 2}}
    assert pairs.counts.tolist() == [3, 2, 1, 3]
    assert pairs.n_empty.tolist() == [[2], [3], [4], [2]]
    assert pairs.n_phantom.tolist() == [2, 3, 4, 2]
    assert pairs.n_truncated == 0


def test_nearest_are_kept() -> None:
    pairs = Selection(2, (2,))(inputs())
    assert neighbors(pairs) == {0: {2, 3}, 1: {0, 3}, 2: {0}, 3: {0, 1}}
    assert pairs.n_empty.tolist() == [[0], [0], [1], [0]]
    assert pairs.n_truncated == 2


def test_graph_keeps_all_and_has_no_empty_slots() -> None:
    pairs = Selection(2, None, exclude=((0, 1),))(inputs())
    assert neighbors(pairs) == {0: {2}, 1: {3}, 2: {0}, 3: {1}}
    assert pairs.n_empty.sum() == 0
    assert pairs.n_phantom.sum() == 0
    assert pairs.n_truncated == 0


def test_sections_by_type_are_cut_after_the_whole_list() -> None:
    # of centre 3: the nearest three of both types together, then one of type 0 and two of type 1
    pairs = Selection(2, (1, 2), by_type=True)(inputs())
    assert neighbors(pairs) == {0: {1, 2, 3}, 1: {0, 3}, 2: {0}, 3: {0, 1}}
    assert pairs.n_empty.tolist() == [[0, 0], [0, 1], [0, 2], [0, 1]]
    assert pairs.n_truncated == 1
    # two slots in all: centre 0 loses atom 1 to the first cut, though its section has room
    assert neighbors(Selection(2, (1, 1), by_type=True)(inputs()))[0] == {2, 3}
    assert neighbors(Selection(2, (0, 2), by_type=True)(inputs()))[0] == {3}


def test_exclusion_in_the_descriptor_leaves_no_empty_slot() -> None:
    pairs = Selection(2, (4,), exclude=((1, 0),))(inputs())
    assert neighbors(pairs) == {0: {2}, 1: {3}, 2: {0}, 3: {1}}
    assert pairs.n_empty.tolist() == [[1], [2], [3], [1]]
    assert pairs.n_phantom.tolist() == [3, 3, 3, 3]


def test_exclusion_from_the_list_leaves_empty_slots_and_no_room() -> None:
    pairs = Selection(2, (2,), pair_exclude=((0, 0),))(inputs())
    assert neighbors(pairs) == {0: {3}, 1: {0, 3}, 2: set(), 3: {0, 1}}
    assert pairs.n_empty.tolist() == [[1], [0], [2], [0]]
    assert pairs.n_phantom.tolist() == [1, 0, 2, 0]


def test_types_that_there_are_not_are_passed_over() -> None:
    nobody = ((0, 7), (0, -1), (-2, 1), (7, 7))
    for names in ({"exclude": nobody}, {"pair_exclude": nobody}):
        assert neighbors(Selection(2, (4,), **names)(inputs())) == neighbors(Selection(2, (4,))(inputs()))


def test_shorter_lists_of_further_blocks() -> None:
    pairs = Selection(2, (3,), inner=(Selection(2, (1,), rcut=2.6),))(inputs())
    (inner,) = pairs.inner
    assert neighbors(inner) == {0: {2}, 1: {3}, 2: {0}, 3: {0}}
    assert inner.n_empty.tolist() == [[0], [0], [0], [0]]
    assert pairs.n_truncated == 2  # centres 0 and 3, in the shorter list
    # centres 0 and 3 in the whole list, and 1 in the shorter one as well
    both = Selection(2, (2,), inner=(Selection(2, (1,), rcut=3.5),))(inputs())
    assert both.truncated.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("closes_gaps", "expected"),
    [
        (False, {0: {3}, 1: {0, 3}, 2: set(), 3: {0, 1}}),
        (True, {0: {1, 3}, 1: {0, 3}, 2: set(), 3: {0, 1}}),
    ],
)
def test_excluded_pairs_in_shorter_lists(closes_gaps: bool, expected: dict[int, set[int]]) -> None:
    shorter = Selection(2, (2,), pair_exclude=((0, 0),))
    selection = Selection(2, (3,), pair_exclude=((0, 0),), inner=(shorter,), closes_gaps=closes_gaps)
    assert neighbors(selection(inputs()).inner[0]) == expected


def test_list_longer_than_its_sections() -> None:
    # three slots in all, then one per type
    pairs = Selection(2, (1, 1), by_type=True, total=3)(inputs())
    assert neighbors(pairs) == {0: {2, 3}, 1: {0, 3}, 2: {0}, 3: {0, 1}}


def test_pairs_beyond_the_cutoff_fill_the_room_that_is_left() -> None:
    pairs = Selection(2, (2,), rcut=2.2, keeps_beyond=True)(inputs())
    assert neighbors(pairs) == {0: {2, 3}, 1: {0, 3}, 2: {0}, 3: {0, 1}}
    assert pairs.n_truncated == 0
    assert Selection(2, (1,), rcut=2.2, keeps_beyond=True)(inputs()).truncated.tolist() == [
        True,
        *[False] * 3,
    ]


def test_ranks() -> None:
    assert ranks(torch.tensor([0, 0, 2, 2, 2, 5]), 6).tolist() == [0, 1, 0, 1, 2, 0]


def test_rows_as_a_matrix() -> None:
    counts = torch.tensor([2, 0, 3, 1])
    assert padded_rows(counts, torch.tensor([3, 2, 1, 0])).tolist() == [
        [5, 6, 6],
        [2, 3, 4],
        [6] * 3,
        [0, 1, 6],
    ]
    assert padded_rows(counts, torch.tensor([2, 2])).tolist() == [[2, 3, 4], [2, 3, 4]]
    assert padded_rows(counts, torch.tensor([1])).tolist() == [[6]]
    assert padded_rows(counts, torch.tensor([], dtype=torch.int64)).shape == (0, 1)


def test_elements_on_slots() -> None:
    slots = padded_rows(torch.tensor([2, 0, 1]), torch.arange(3))
    assert on_slots(with_empty(torch.tensor([5, 6, 7]), -1), slots).tolist() == [[5, 6], [-1, -1], [7, -1]]
    vectors = torch.arange(9.0).reshape(3, 3)
    padded = on_slots(with_empty(vectors, far_away(vectors, 4.0)), slots)
    assert padded.shape == (3, 2, 3)
    assert (padded[1].norm(dim=1) > layout.EMPTY_BEYOND * 4.0).all()
    assert torch.equal(padded[slots < 3], vectors)


@pytest.mark.parametrize("n_rows", [0, 1, 2])
def test_slots_of_nothing(n_rows: int) -> None:
    slots = padded_rows(torch.zeros(n_rows, dtype=torch.int64), torch.arange(n_rows))
    assert on_slots(with_empty(torch.zeros(0), 1.0), slots).tolist() == [[1.0]] * n_rows


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_row_chunks_hold_every_row_once(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SLOTS_PER_CALL", limit)
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 9, 30))
    chunks = row_chunks(counts)
    assert torch.cat(chunks).sort().values.tolist() == list(range(30))
    ordered = [int(counts[row]) for chunk in chunks for row in chunk]
    assert len(chunks) == 1 or ordered == sorted(ordered)
    assert len(chunks) >= int(counts.sum()) // limit or limit == 1
    assert (len(chunks) == 1) == (limit == 10_000)
    assert [chunk.tolist() for chunk in row_chunks(counts, split=False)] == [list(range(30))]


def test_rows_of_very_different_length_go_into_more_calls() -> None:
    alike = torch.full((200,), 90)
    assert len(row_chunks(alike)) == 1
    lengths = torch.cat([alike // 9, alike])
    assert [lengths[rows].unique().tolist() for rows in row_chunks(lengths)] == [[10], [90]]
    assert len(row_chunks(lengths[150:250])) == 2
    assert len(row_chunks(lengths[170:250])) == 1


def test_row_chunks_of_nothing() -> None:
    assert row_chunks(torch.zeros(0, dtype=torch.int64)) == []
    assert [chunk.tolist() for chunk in row_chunks(torch.zeros(0, dtype=torch.int64), split=False)] == [[]]
