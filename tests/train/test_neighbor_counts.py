"""Neighbour counts that an input leaves to the data; the largest counts are those of `dp neighbor-stat`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tiny_inputs import DESCRIPTORS, FITTING, SYSTEMS, plan_of, shared_input, training_input

from mtinfer.errors import ConfigError
from mtinfer.train.plan import Plan, describe_plan


def separate_plan(descriptor: dict[str, Any]) -> Plan:
    return plan_of(training_input(dict.fromkeys(SYSTEMS, descriptor), dict.fromkeys(SYSTEMS, FITTING)))


def test_a_count_for_each_type() -> None:
    plan = separate_plan({**DESCRIPTORS["se_e2_a"], "sel": "auto"})
    # H, O, Cu within 3.5 Å: 5, 3, 0 around some atom of the clusters, 0, 0, 15 in copper
    assert plan.counts == {
        "clusters": {"descriptor.sel": [8, 4, 0]},
        "copper": {"descriptor.sel": [0, 0, 16]},
    }
    assert plan.models["copper"].descriptor.selection.sel == (0, 0, 16)
    assert "neighbour counts of copper: descriptor.sel [0, 0, 16]" in list(describe_plan(plan))


@pytest.mark.parametrize(("given", "clusters", "copper"), [("auto", 8, 16), ("auto:1.5", 12, 24)])
def test_one_count_for_all_types(given: str, clusters: int, copper: int) -> None:
    plan = separate_plan({**DESCRIPTORS["dpa1strip"], "sel": given})
    # 8 and 15 neighbours within 3.5 Å
    assert [task.model.descriptor.sel for task in plan.tasks] == [clusters, copper]
    assert [task.config.model["descriptor"]["sel"] for task in plan.tasks] == [clusters, copper]


def test_the_largest_count_may_be_in_any_frame() -> None:
    content = shared_input("dpa1strip")
    content["model"]["shared_dict"]["desc"]["sel"] = "auto:1"
    expected = plan_of(content).counts
    for sections in content["training"]["data_dict"].values():
        sections["training_data"]["systems"].reverse()
    assert plan_of(content).counts == expected


def test_each_count_has_its_own_cutoff() -> None:
    dpa2, dpa3 = copy.deepcopy(DESCRIPTORS["dpa2"]), copy.deepcopy(DESCRIPTORS["dpa3"])
    dpa2["repinit"] |= {
        "nsel": "auto",
        "use_three_body": True,
        "three_body_sel": "auto",
        "three_body_rcut": 2.5,
    }
    dpa2["repformer"]["nsel"] = "auto"
    dpa3["repflow"] |= {"e_sel": "auto", "a_sel": "auto"}
    # 15, 8 and 12 atoms around one of copper within 3.5, 2.5 and 3 Å
    assert separate_plan(dpa2).counts["copper"] == {
        "descriptor.repinit.nsel": 20,  # more than that of the repformer
        "descriptor.repinit.three_body_sel": 8,
        "descriptor.repformer.nsel": 16,
    }
    assert separate_plan(dpa3).counts["copper"] == {
        "descriptor.repflow.e_sel": 16,
        "descriptor.repflow.a_sel": 8,
    }


def test_heads_that_share_a_descriptor_have_the_count_of_the_neediest() -> None:
    content = shared_input("dpa1strip")
    content["model"]["shared_dict"]["desc"]["sel"] = "auto"
    assert plan_of(content).counts == {task: {"descriptor.sel": 16} for task in SYSTEMS}


def test_a_shared_member_of_hybrids_has_one_count() -> None:
    member = {**DESCRIPTORS["dpa1strip"], "sel": "auto"}
    hybrid = {"type": "hybrid", "list": [member, "desc"]}
    content = training_input(dict.fromkeys(SYSTEMS, hybrid), dict.fromkeys(SYSTEMS, FITTING))
    content["model"]["shared_dict"]["desc"] = {**member, "rcut": 2.5}
    counts = plan_of(content).counts
    # 8 and 15 within 3.5 Å; 5 and 8 within 2.5 Å, where both heads have that of copper
    own, shared = "descriptor.descrpt_list.0.sel", "descriptor.descrpt_list.1.sel"
    assert counts == {"clusters": {own: 8, shared: 8}, "copper": {own: 16, shared: 8}}


def test_data_without_neighbours_settle_nothing() -> None:
    with pytest.raises(ConfigError, match=r"leaves descriptor.sel to the data.*within 0.1 Å; give a number"):
        separate_plan({**DESCRIPTORS["dpa1strip"], "sel": "auto", "rcut": 0.1, "rcut_smth": 0.05})


def test_counts_that_deepmd_kit_does_not_read_are_refused() -> None:
    angles = copy.deepcopy(DESCRIPTORS["dpa3"])
    angles["repflow"] |= {"e_sel": "auto", "a_sel": 60}
    with pytest.raises(ConfigError, match=r"repflow.a_sel is 60 within 2\.5 Å, and repflow.e_sel 8 "):
        separate_plan(angles)
    blocks = copy.deepcopy(DESCRIPTORS["dpa2"])
    blocks["repinit"] |= {"use_three_body": True, "three_body_rcut": 3.2, "three_body_sel": 10}
    blocks["repinit"] |= {"three_body_rcut_smth": 0.5}
    text = r"repformer.nsel is 15 within 3\.0 Å, and repinit.three_body_sel 10 within 3\.2 Å"
    with pytest.raises(ConfigError, match=text):
        separate_plan(blocks)
    blocks["repinit"]["three_body_sel"] = 15
    separate_plan(blocks)


@pytest.mark.parametrize(("key", "value"), [("nsel", 30), ("rcut", 3.5)])
def test_a_repformer_that_sees_as_much_as_repinit_is_refused(key: str, value: float) -> None:
    descriptor = copy.deepcopy(DESCRIPTORS["dpa2"])
    descriptor["repformer"][key] = value
    with pytest.raises(
        ConfigError, match=rf"{key} of repinit is {value}, and of repformer {value}; deepmd-kit"
    ):
        separate_plan(descriptor)
