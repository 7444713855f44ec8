"""Names, aliases, and which head is meant."""

from __future__ import annotations

import pytest

from mtinfer.checkpoint.heads import check_aliases, find_head
from mtinfer.errors import CheckpointError, UnknownHeadError

HEADS = {"water": ("H2O", "liquid"), "Copper": (), "copper_2": ("surface",)}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("water", "water"),
        ("H2O", "water"),
        ("h2o", "water"),
        ("WATER", "water"),
        ("copper", "Copper"),
        ("Surface", "copper_2"),
    ],
)
def test_names_and_aliases_with_any_case(name: str, head: str) -> None:
    assert find_head(name, HEADS) == head


def test_exact_spelling_wins() -> None:
    heads = {"Ice": (), "ice": (), "snow": ("ICE",)}
    assert [find_head(name, heads) for name in ("Ice", "ice", "ICE")] == ["Ice", "ice", "snow"]
    with pytest.raises(UnknownHeadError, match="'iCe' may mean Ice or ice or snow"):
        find_head("iCe", heads)


def test_a_name_is_not_a_part_of_a_name() -> None:
    with pytest.raises(UnknownHeadError, match="no head 'copper_'"):
        find_head("copper_", HEADS)


def test_no_name() -> None:
    assert find_head(None, {"water": ()}) == "water"
    assert find_head(None, {"water": (), "Default": ()}) == "Default"
    assert find_head(None, {"water": (), "ice": ("Default",)}) == "ice"
    with pytest.raises(UnknownHeadError) as info:
        find_head(None, HEADS)
    assert str(info.value) == (
        "no head was named and the file has several; choose one of: "
        "water (H2O, liquid), Copper, copper_2 (surface)"
    )


def test_unknown_name_lists_heads_and_suggests_the_nearest() -> None:
    with pytest.raises(UnknownHeadError) as info:
        find_head("watre", HEADS)
    assert str(info.value) == (
        "no head 'watre' (did you mean 'water'?); heads: water (H2O, liquid), Copper, copper_2 (surface)"
    )


def test_aliases_that_clash() -> None:
    check_aliases({"water": ("H2O", "water"), "ice": ("h2o",)})
    with pytest.raises(CheckpointError, match="alias 'H2O' of head 'ice' clashes with head 'water'"):
        check_aliases({"water": ("H2O",), "ice": ("H2O",)})
    with pytest.raises(CheckpointError, match="alias 'ice' of head 'water' clashes with head 'ice'"):
        check_aliases({"water": ("ice",), "ice": ()})
