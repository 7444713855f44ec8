"""A hybrid descriptor is its members side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from random_models import Weights, cluster, features, inputs_of, random_weights

from mtinfer.errors import UnsupportedModelError
from mtinfer.models.descriptor import InParts, Setting
from mtinfer.models.hybrid import SINGLE, Hybrid

TYPES = ("H", "O", "C")
SE_E2_A = {
    "type": "se_e2_a",
    "rcut": 3.0,
    "rcut_smth": 1.0,
    "sel": [9, 9, 9],
    "neuron": [3, 6],
    "axis_neuron": 2,
}
DPA1 = {
    "type": "se_atten",
    "rcut": 4.0,
    "rcut_smth": 1.0,
    "sel": 27,
    "neuron": [4, 8],
    "attn_layer": 0,
    "axis_neuron": 3,
}
DPA3 = {
    "type": "dpa3",
    "repflow": {
        "n_dim": 6,
        "e_dim": 4,
        "a_dim": 4,
        "nlayers": 2,
        "e_rcut": 3.5,
        "e_rcut_smth": 1.0,
        "e_sel": 27,
    }
    | {"a_rcut": 2.5, "a_rcut_smth": 1.0, "a_sel": 27},
}
SETTING = Setting(tuple(TYPES), "pt")
#: members; the first two keep one fitting net per centre type, the others have one for all
COMBINATIONS = {
    "by centre type": [SE_E2_A, SE_E2_A | {"rcut": 4.0, "type_one_side": True}],
    "mixed": [DPA1, SE_E2_A],
    "message passing": [SE_E2_A, DPA3, DPA1],
}


def build(members: list[dict[str, Any]]) -> Hybrid:
    return Hybrid.from_config({"list": members}, SETTING)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_members_side_by_side(name: str) -> None:
    hybrid = build(COMBINATIONS[name])
    weights = random_weights(hybrid.parameters())
    inputs = inputs_of(*cluster(11), hybrid.rcut)
    together = features(hybrid, inputs, weights)
    assert together.shape == (11, hybrid.width)
    alone = []
    for k, config in enumerate(COMBINATIONS[name]):
        member = SINGLE[config["type"]].from_config(config, SETTING)
        prefix = f"descriptor.descrpt_list.{k}."
        own: Weights = {
            n.replace(prefix, "descriptor."): w for n, w in weights.items() if n.startswith(prefix)
        }
        alone.append(features(member, inputs_of(*cluster(11), member.rcut), own))
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_all_local_members_count_as_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtinfer.models.dpa2._LARGE", 1e9)
    hybrid = build(COMBINATIONS[name])
    inputs = inputs_of(*cluster(11), hybrid.rcut)
    for layout in hybrid.layouts(inputs, hybrid.selection(inputs)):
        local = [
            array.shape[0] * array.shape[1]
            for calls in hybrid._divided(layout.displacements, layout.tensors)
            for call in calls
            for array in call.displacements
            if not isinstance(call.member, InParts)
        ]
        assert len(local) > 1
        for limit, is_large in ((sum(local), False), (sum(local) - 1, True)):
            monkeypatch.setattr("mtinfer.models.hybrid._LARGE", limit)
            assert hybrid.is_large(layout) == is_large


def test_one_fitting_net_as_soon_as_one_member_has_one() -> None:
    assert [build(members).mixed_types for members in COMBINATIONS.values()] == [False, True, True]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([], "without members"),
        ([{"type": "se_e3"}], "'se_e3'"),
        ([{"type": "hybrid", "list": [DPA1]}], "'hybrid'"),
    ],
)
def test_what_can_not_be_a_member(members: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        build(members)
