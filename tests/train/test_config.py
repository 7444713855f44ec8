"""Training inputs: defaults, references, and one line for everything that is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_inputs import DESCRIPTORS, FITTING, SYSTEMS, config_of, plan_of, shared_input, training_input

from mtinfer.errors import ConfigError, DataError
from mtinfer.train.config import Link, read_config
from mtinfer.train.plan import describe_plan
from mtinfer.train.schedule import Schedule
from mtinfer.train.schema import LEARNING_RATE, complete
from mtinfer.train.weights import initial_weights


def test_references_are_resolved_and_defaults_filled_in() -> None:
    config = config_of(shared_input("dpa1strip", fitting=True))
    model = config.tasks[0].model
    assert model["type_map"] == ["H", "O", "Cu"]
    assert model["descriptor"]["type"] == "se_atten"
    assert model["descriptor"]["tebd_dim"] == 8
    assert model["fitting_net"]["activation_function"] == "tanh"
    assert model["data_stat_nbatch"] == 10
    assert config.links == (
        Link("descriptor", "desc", (("clusters", 0), ("copper", 0))),
        Link("fitting_net", "fit", (("clusters", 0), ("copper", 0))),
    )


def test_the_head_with_the_lowest_level_is_the_base() -> None:
    content = training_input({"clusters": "desc:1", "copper": "desc"}, dict.fromkeys(SYSTEMS, FITTING))
    assert config_of(content).links[0].heads == (("copper", 0), ("clusters", 1))


def _hybrids(clusters: list[Any], copper: list[Any]) -> dict[str, Any]:
    descriptors = {"clusters": clusters, "copper": copper}
    return training_input(
        {task: {"type": "hybrid", "list": members} for task, members in descriptors.items()},
        dict.fromkeys(SYSTEMS, FITTING),
    )


def test_members_of_hybrid_descriptors_are_shared_by_name() -> None:
    other = {**DESCRIPTORS["dpa1strip"], "rcut": 2.5}
    plan = plan_of(_hybrids([other, "desc"], [other, "desc"]))
    part = "descriptor.descrpt_list.1"
    assert plan.config.links == (Link(part, "desc", (("clusters", 0), ("copper", 0))),)
    weights = initial_weights(plan.config, plan.models)
    for name, tensor in weights["clusters"].items():
        if name.startswith("descriptor."):
            assert (weights["copper"][name] is tensor) == name.startswith(f"{part}."), name


def test_a_member_shared_across_places_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shared_dict\.desc is used as descriptor\.descrpt_list\.1 and as"):
        config_of(_hybrids([DESCRIPTORS["se_e2_a"], "desc"], ["desc", DESCRIPTORS["se_e2_a"]]))


@pytest.mark.parametrize(
    ("members", "text"),
    [([], "expected a list of descriptors"), ([{"type": "hybrid", "list": []}], "list[0].type is 'hybrid'")],
)
def test_hybrids_without_members_and_within_hybrids_are_refused(members: list[Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        config_of(_hybrids(members, members))


def test_single_task_input_is_read() -> None:
    content = training_input(dict.fromkeys(SYSTEMS, DESCRIPTORS["se_e2_a"]), dict.fromkeys(SYSTEMS, FITTING))
    own = content["training"].pop("data_dict")["copper"]
    del content["training"]["model_prob"]
    content["training"] |= own
    content["loss"] = content.pop("loss_dict")["copper"]
    content["model"] = content["model"]["model_dict"]["copper"] | {"type_map": ["Cu"]}
    content["model"]["descriptor"]["sel"] = [20]
    config = config_of(content)
    assert not config.multitask
    assert [task.name for task in config.tasks] == ["Default"]


Change = Callable[[dict[str, Any]], object]


def _set(path: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            content = content[key]
        content[last] = value

    return change


WRONG: list[tuple[Change, str]] = [
    (_set("trainig", {}), r"unknown key 'trainig' in the input \(did you mean 'training'\?\)"),
    (_set("training/numb_stepz", 1), r"unknown key 'numb_stepz' in training \(did you mean 'numb_steps'\?\)"),
    (_set("model/shared_dict/desc/rcutt", 1.0), r"unknown key 'rcutt' in model_dict.clusters.descriptor"),
    (_set("model/model_dict/copper/descriptor", "dess"), r"names 'dess'.*did you mean 'desc'"),
    (_set("model/model_dict/copper/descriptor", "desc:2"), r"shares 'desc' at level 2; allowed .* 0 to 1"),
    (_set("model/model_dict/copper/descriptor", "desc:x"), r"a share level is a number"),
    (_set("model/shared_dict/desc/type", "dpa4"), r"head 'clusters' uses the descriptor 'dpa4'"),
    (_set("model/shared_dict/desc/sel", "automatic"), r"descriptor.sel is 'automatic'.*'auto:FACTOR'"),
    (_set("model/model_dict/copper/fitting_net", {"type": "dipole"}), r"fitting net of type 'dipole'"),
    (_set("loss_dict/copper/type", "dos"), r"loss_dict.copper.type is 'dos', which is not supported"),
    (_set("loss_dict/copper/use_huber", True), r"loss_dict.copper.use_huber is True, which is not supported"),
    (_set("loss_dict/copper/start_pref_h", 1.0), r"loss_dict.copper.start_pref_h is 1.0"),
    (_set("loss_dict", {"copper": {}}), r"loss_dict lacks an entry for the head 'clusters'"),
    (
        _set("training/model_prob", {"coper": 1}),
        r"entry 'coper', which is no head \(did you mean 'copper'\?\)",
    ),
    (_set("training/model_prob", {"copper": 0, "clusters": 0}), r"all entries are 0"),
    (_set("training/acc_freq", 2), r"training.acc_freq is 2, which is not supported; supported: 1"),
    (_set("training/numb_epoch", 2), r"training gives numb_steps and numb_epoch; give one of"),
    (_set("training/save_freq", 0), r"training.save_freq is 0; expected a positive number"),
    (_set("training/data_dict/copper/training_data/batch_size", "mixed:4"), r"batch_size is 'mixed:4'; supp"),
    (_set("optimizer", {"type": "LKF"}), r"optimizer.type is 'LKF'.*supported: Adam, AdamW"),
    (_set("learning_rate/type", "linear"), r"learning_rate.type is 'linear', which is not supported"),
    (_set("validating", {"full_validation": True}), r"validating.full_validation is true"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_a_wrong_input_is_refused_in_one_line(change: Change, text: str) -> None:
    content = shared_input("dpa1strip")
    change(content)
    with pytest.raises(ConfigError, match=text) as caught:
        config_of(content)
    assert "\n" not in str(caught.value)


def test_case_embedding_needs_a_place_for_every_head() -> None:
    content = shared_input("dpa1strip", fitting=True)
    content["model"]["shared_dict"]["fit"]["dim_case_embd"] = 1
    with pytest.raises(ConfigError, match=r"dim_case_embd is 1; with 2 heads it must be at least 2"):
        config_of(content)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_config(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_config(tmp_path / "other.json")


def test_missing_data_are_named() -> None:
    content = shared_input("dpa1strip")
    content["training"]["data_dict"]["copper"]["training_data"]["systems"] = ["nowhere"]
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        plan_of(content)


def test_data_are_found_beside_the_input(tmp_path: Path) -> None:
    content = shared_input("dpa1strip")
    (tmp_path / "data").symlink_to(Path(SYSTEMS["copper"][0]))
    content["training"]["data_dict"]["copper"]["training_data"]["systems"] = ["data"]
    (tmp_path / "input.json").write_text(json.dumps(content))
    from mtinfer.train.plan import make_plan

    plan = make_plan(read_config(tmp_path / "input.json"))
    assert len(plan.tasks[1].systems) == 1


def test_the_plan_says_what_will_be_done() -> None:
    lines = list(describe_plan(plan_of(shared_input("dpa1strip", fitting=True, disp_file="x"))))
    assert lines[0].startswith("task clusters: se_atten, 6 frames in 3 systems, batch size 1, 6 frames for")
    assert "shared: fitting_net 'fit' by clusters, copper" in lines
    assert "graphs to compile: 1 for 2 tasks" in lines
    assert "without effect: training.disp_file" in lines


def test_epochs_set_probabilities_and_steps() -> None:
    content = shared_input("dpa1strip", num_epoch_dict={"clusters": 1.0, "copper": 6.0})
    del content["training"]["numb_steps"], content["training"]["model_prob"]
    plan = plan_of(content)
    # 6 and 3 batches, drawn in proportion to the number of batches of each system
    assert plan.schedule.n_steps == 6 + 18
    assert plan.probabilities == pytest.approx([1 / 4, 3 / 4])


def _schedule(n_steps: int, **given: Any) -> Schedule:
    config = complete({"start_lr": 1e-3, "stop_lr": 1e-5, **given}, LEARNING_RATE, "learning_rate")
    return Schedule.from_config(config, n_steps)


def test_exponential_schedule() -> None:
    schedule = _schedule(1000, decay_steps=100)
    assert schedule(0) == schedule(99) == 1e-3
    assert schedule(100) == pytest.approx(1e-3 * 0.01**0.1, rel=1e-14)
    assert schedule(999) == pytest.approx(1e-3 * 0.01**0.9, rel=1e-14)
    # a period longer than the training is replaced
    assert _schedule(400).decay_steps == 5
    assert _schedule(2000).decay_steps == 100
    assert _schedule(1000, decay_steps=10, decay_rate=0.1)(500) == 1e-5
    assert _schedule(1000, decay_steps=100, smooth=True)(50) == pytest.approx(1e-3 * 0.01**0.05, rel=1e-14)


def test_warm_up_is_linear() -> None:
    schedule = _schedule(1010, warmup_steps=10, warmup_start_factor=0.5, decay_steps=100)
    assert schedule(0) == 5e-4
    assert schedule(5) == pytest.approx(7.5e-4)
    assert schedule(10) == 1e-3
    assert schedule(110) == pytest.approx(1e-3 * 0.01**0.1, rel=1e-14)
    assert _schedule(100, warmup_ratio=0.1).n_warmup == 10


def test_cosine_schedule() -> None:
    schedule = _schedule(100, type="cosine")
    assert schedule(0) == 1e-3
    assert schedule(50) == pytest.approx(0.5 * (1e-3 + 1e-5))
    assert schedule(25) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("decay_type", "halfway"),
    [("inverse_linear", 1 / (0.5 / 1e-5 + 0.5 / 1e-3)), ("linear", 5.05e-4), ("cosine", 5.05e-4)],
)
def test_stable_and_decay_schedule(decay_type: str, halfway: float) -> None:
    schedule = _schedule(1000, type="wsd", decay_phase_ratio=0.2, decay_type=decay_type)
    assert schedule(0) == schedule(800) == 1e-3
    assert schedule(900) == pytest.approx(halfway)
    assert schedule(1000) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"stop_lr_ratio": 0.1}, "one of 'stop_lr' and 'stop_lr_ratio'"),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "give one of them"),
        ({"warmup_steps": 1000}, "warm-up of 1000 steps in a training of 1000"),
        ({"decay_steps": 0}, "decay_steps is 0; it must be positive"),
    ],
)
def test_contradicting_learning_rates_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _schedule(1000, **given)
