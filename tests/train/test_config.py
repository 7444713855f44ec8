"""Training inputs: defaults, references, and one line for everything that is wrong."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase
import ase.io
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_inputs import (
    DESCRIPTORS,
    FITTING,
    SYSTEMS,
    TYPE_MAP,
    config_of,
    plan_of,
    shared_input,
    training_input,
)

from mtinfer import options
from mtinfer.errors import ConfigError, DataError
from mtinfer.models.activations import activation
from mtinfer.options import ABSENT, REQUIRED, Section
from mtinfer.train import schema
from mtinfer.train.config import read_config
from mtinfer.train.model_section import Link
from mtinfer.train.plan import describe_plan
from mtinfer.train.values import VALUES
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
    weights = initial_weights(plan)
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


def _single_task_input() -> dict[str, Any]:
    content = training_input(dict.fromkeys(SYSTEMS, DESCRIPTORS["se_e2_a"]), dict.fromkeys(SYSTEMS, FITTING))
    own = content["training"].pop("data_dict")["copper"]
    del content["training"]["model_prob"]
    content["training"] |= own
    content["loss"] = content.pop("loss_dict")["copper"]
    content["model"] = content["model"]["model_dict"]["copper"] | {"type_map": ["Cu"]}
    content["model"]["descriptor"]["sel"] = [20]
    return content


def test_single_task_input_is_read() -> None:
    config = config_of(_single_task_input())
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
    (
        _set("model/shared_dict/desc/type", "se_e2a"),
        r"^model_dict.clusters.descriptor.type is 'se_e2a', which can't be trained "
        r"\(did you mean 'se_e2_a'\?\); supported are se_e2_a, se_atten, se_atten_v2, dpa2, dpa3, hybrid$",
    ),
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
    (_set("training/save_freq", 0), r"training.save_freq is 0; expected a positive integer"),
    (_set("training/ema_ckpt_keep", 0), r"training.ema_ckpt_keep is 0; expected a positive integer"),
    (_set("training/save_ckpt", "."), r"training.save_ckpt is '.'; expected a name, as in 'model.ckpt'"),
    (_set("training/data_dict/copper/training_data/batch_size", "mixed:4"), r"batch_size is 'mixed:4'; exp"),
    (_set("optimizer", {"type": "LKF"}), r"optimizer.type is 'LKF'.*supported: Adam, AdamW"),
    (_set("learning_rate/type", "linear"), r"learning_rate.type is 'linear', which is not supported"),
    (_set("validating", {"full_validation": True}), r"validating.full_validation is True"),
    (_set("validating", {"full_validaton": True}), r"'full_validaton' in validating .*'full_validation'"),
]


_DESC, _FIT, _DATA = (
    "model/shared_dict/desc/",
    "model/model_dict/copper/fitting_net/",
    "training/data_dict/copper/",
)
_HEAD, _RATE, _LOSS = "model/model_dict/copper/", "learning_rate/", "loss_dict/copper/"
#: paths of keys, a value that they do not take, and what is said
_VALUES: list[tuple[str, Any, str]] = [
    (_DESC + "sel", -5, "is -5; expected a positive integer, a list of one per entry of type_map, 'auto' or"),
    (_DESC + "sel", None, "is None; expected a positive integer"),
    (_DESC + "sel", "auto:0", "is 'auto:0'; expected a positive integer"),
    (_DESC + "rcut", 0, "is 0; expected a positive number"),
    (_DESC + "rcut_smth", 3.5, "is 3.5; expected less than rcut, which is 3.5"),
    (_DESC + "axis_neuron", 100, "is 100; expected at most neuron, which is 8"),
    (_DESC + "neuron", [4, -8], "is [4, -8]; expected a list of positive integers"),
    (_DESC + "neuron", 5, "is 5; expected a list of positive integers"),
    (_DESC + "exclude_types", [[7, 8]], "is [[7, 8]]; expected indices into type_map, 0 to 2"),
    (_DESC + "exclude_types", [0, 1], "is [0, 1]; expected a list of pairs of indices"),
    (_DESC + "seed", -1, "is -1; expected an integer that is not negative"),
    (_DESC + "seed", [1, 2], "is [1, 2]; expected an integer that is not negative"),
    (_DESC + "activation_function", "foo", "is 'foo'; expected an activation function: tanh, relu"),
    (_DESC + "activation_function", "silut:x", "is 'silut:x'; expected an activation function"),
    (_DESC + "activation_function", "silut:nan", "is 'silut:nan'; expected an activation function"),
    (_DESC + "rcut_smth", -0.1, "is -0.1; expected a number that is not negative"),
    (_DESC + "tebd_input_mode", "sum", "is 'sum', which is not supported; supported: 'concat', 'strip'"),
    (_DESC + "lmax", "a", "is 'a', which is not supported; supported: 1"),
    (_HEAD + "atom_exclude_types", [9], "is [9]; expected indices into type_map, 0 to 2"),
    (_HEAD + "pair_exclude_types", [[0, 3]], "is [[0, 3]]; expected indices into type_map, 0 to 2"),
    (_HEAD + "preset_out_bias", {"energy": [1.0]}, ".energy is [1.0]; expected a list of 3, one per entry"),
    (_HEAD + "preset_out_bias", {"dipole": [1.0]}, "expected {'energy': [...]}"),
    (_HEAD + "info", 5, "is 5; expected a section {...}"),
    (_HEAD + "data_stat_nbatch", 0, "is 0; expected a positive integer"),
    (_HEAD + "data_stat_nbatch", "a", "is 'a'; expected a positive integer"),
    (_HEAD + "type_map", [["H"]], "is [['H']]; expected a list of names"),
    (_HEAD + "type_map", ["H", "H"], "is ['H', 'H']; expected a list of different elements"),
    (_HEAD + "model_branch_alias", 5, "is 5; expected a list of names"),
    (_FIT + "atom_ener", [1.0], "is [1.0]; expected a list of 3, one per entry of type_map"),
    (_FIT + "default_fparam", [1.0], "is [1.0]; expected 0 numbers, as numb_fparam says"),
    (_FIT + "resnet_dt", "x", "is 'x'; expected true or false"),
    (_LOSS + "start_pref_e", "a", "is 'a'; expected a number that is not negative"),
    (_LOSS + "start_pref_f", -1, "is -1; expected a number that is not negative"),
    (_LOSS + "limit_pref_f", None, "is None; expected a number that is not negative"),
    (_LOSS + "intensive_ener_virial", "a", "is 'a'; expected true or false"),
    (_RATE + "start_lr", "abc", "is 'abc'; expected a positive number"),
    (_RATE + "stop_lr", "abc", "is 'abc'; expected a number that is not negative"),
    (_RATE + "decay_rate", "abc", "is 'abc'; expected a number above 0 and up to 1"),
    (_RATE + "decay_rate", 0, "is 0; expected a number above 0 and up to 1"),
    (_RATE + "decay_rate", 2, "is 2; expected a number above 0 and up to 1"),
    ("training/enable_ema", "x", "is 'x'; expected true or false"),
    ("training/ema_decay", 1, "is 1; expected a number from 0 to below 1"),
    ("training/gradient_max_norm", None, "is None; expected a number that is not negative"),
    ("training/numb_steps", 10.5, "is 10.5; expected a positive integer"),
    ("training/numb_steps", -5, "is -5; expected a positive integer"),
    ("training/seed", -1, "is -1; expected an integer that is not negative"),
    ("training/save_ckpt", 5, "is 5; expected a name"),
    ("training/model_prob", 3, "is 3; expected a section {...}"),
    (_DATA + "training_data/sys_probs", 3, "is 3; expected a list of numbers that are not negative"),
    (
        _DATA + "training_data/sys_probs",
        [float("nan"), 1],
        "expected a list of numbers that are not negative",
    ),
    (
        _DATA + "training_data/auto_prob",
        "prob_sys_size;0:1",
        "is 'prob_sys_size;0:1'; expected prob_uniform or",
    ),
    (_DATA + "training_data/auto_prob", "prob_x", "is 'prob_x'; expected prob_uniform or prob_sys_size"),
    (_DATA + "training_data/systems", [], "is []; expected a path or a list of paths"),
    (_DATA + "validation_data/numb_btch", -1, "is -1; expected a positive integer"),
    (_DATA + "validation_data/numb_btch", "10%", "is '10%'; expected a positive integer"),
    ("optimizer", {"adam_beta1": 1.5}, "adam_beta1 is 1.5; expected a number from 0 to below 1"),
    ("optimizer", {"adam_beta1": "a"}, "adam_beta1 is 'a'; expected a number from 0 to below 1"),
    ("optimizer", {"type": ["Adam"]}, "optimizer.type is ['Adam'], which is not supported; supported: Adam,"),
    ("model/model_dict/copper", 5, "model_dict.copper is 5; expected a section {...}"),
    ("model/model_dict/a.b", {}, "model_dict has the head 'a.b'; expected a name without '.'"),
    ("model/shared_dict", 5, "model.shared_dict is 5; expected a section {...}"),
    (_DESC + "trainable", 1, "is 1; expected true or false"),
]
WRONG += [(_set(path, value), re.escape(text)) for path, value, text in _VALUES]
#: settings of deepmd-kit that are not taken
WRONG += [
    (_set(path + key, value), f"'{key}' in .*{text}")
    for path, key, value, text in (
        (_HEAD, "modifier", {}, "is not supported; leave it out"),
        (_HEAD, "hessian_mode", True, "is not supported; leave it out"),
        (_HEAD, "compress", {}, "is not supported; leave it out"),
        ("training/", "opt_type", "Adam", "belongs in the section optimizer, as 'type'"),
        ("training/", "adam_beta1", 0.9, "belongs in the section optimizer"),
        ("training/", "weight_decay", 0.9, "belongs in the section optimizer"),
        ("training/", "warmup_steps", 9, "belongs in the section learning_rate"),
        ("training/", "set_prefix", "set", "has no effect.*leave it out"),
        (_DATA + "training_data/", "set_prefix", "set", "has no effect.*leave it out"),
        (_DATA + "training_data/", "numb_test", 9, "is no longer a setting; give validation_data"),
        ("", "nvnmd", {}, "is not supported; leave it out"),
    )
]
_DPA3 = DESCRIPTORS["dpa3"]
WRONG += [
    (
        _set("training/stop_batch", 5),
        r"training has 'numb_steps' under two names, of which one is 'stop_batch'",
    ),
    (_set("validating", 5), r"^validating is 5; expected a section"),
    (
        _set("model/shared_dict/desc", {**_DPA3, "repflow": {**_DPA3["repflow"], "a_compress_rate": 3}}),
        r"a_dim times a_compress_e_rate is 4; with a_compress_rate 3 it must be a multiple of 6",
    ),
    (_set("training/tensorboard", True), r"training.tensorboard is True, which is not supported"),
    (_set("training/change_bias_after_training", True), r"change_bias_after_training is True, which is not"),
    (_set("training/num_epoch_dict", {"copper": 1}), r"training gives model_prob and num_epoch_dict"),
    (
        _set("loss", {"type": "ener"}),
        r"loss is given, but the input is for several tasks.*which has loss_dict",
    ),
    (_set("training/training_data", {"systems": "a"}), r"training.training_data is given, but .* several"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_a_wrong_input_is_refused_in_one_line(change: Change, text: str) -> None:
    content = shared_input("dpa1strip")
    change(content)
    with pytest.raises(ConfigError, match=text) as caught:
        config_of(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loss_dict", {"copper": {}}),
        ("training/data_dict", {"copper": {}}),
        ("training/model_prob", {"Default": 1}),
    ],
)
def test_an_input_for_one_task_has_nothing_for_several(path: str, value: Any) -> None:
    content = _single_task_input()
    _set(path, value)(content)
    text = f"{path.replace('/', '.')} is given, but the input is for one task (no model.model_dict)"
    with pytest.raises(ConfigError, match=re.escape(text)):
        config_of(content)


@pytest.mark.parametrize("part", ["descriptor", "fitting_net"])
def test_what_is_shared_has_one_type_map(part: str) -> None:
    descriptors = {"clusters": DESCRIPTORS["dpa1strip"], "copper": DESCRIPTORS["dpa1strip"]}
    fittings = dict.fromkeys(SYSTEMS, FITTING)
    if part == "descriptor":
        descriptors |= {"clusters": "desc", "copper": "desc:1"}
    else:
        fittings = dict.fromkeys(SYSTEMS, "fit")
    content = training_input(descriptors, fittings)
    content["model"]["model_dict"]["copper"]["type_map"] = ["O", "H", "Cu"]
    text = (
        rf"heads 'clusters' and 'copper' share the {part} '\w+' but have different type maps, .* same order"
    )
    with pytest.raises(ConfigError, match=text):
        config_of(content)


def test_entries_of_type_se_e2_a_have_a_count_each() -> None:
    for sel in ([10, 6], 30):
        content = shared_input("se_e2_a")
        content["model"]["shared_dict"]["desc"]["sel"] = sel
        with pytest.raises(
            ConfigError, match=re.escape(f"sel is {sel}; expected a list of 3, one per entry")
        ):
            config_of(content)


def test_a_head_that_begins_with_an_underscore_is_a_comment() -> None:
    content = shared_input("dpa1strip")
    content["model"]["model_dict"]["_old"] = {"anything": 1}
    assert [task.name for task in config_of(content).tasks] == list(SYSTEMS)
    content["model"]["model_dict"] = {"_old": {}}
    with pytest.raises(ConfigError, match="model_dict names no head; give at least one"):
        config_of(content)


def _sections(found: object) -> Iterator[Section]:
    if isinstance(found, Section):
        yield found
        yield from _sections(dict(found.inner))
    elif isinstance(found, dict):
        for entry in found.values():
            yield from _sections(entry)


def test_every_key_has_a_kind_and_every_default_is_of_it() -> None:
    used = set()
    for section in _sections(vars(options) | vars(schema)):
        for key, default in section.defaults.items():
            used.add(key)
            if key in section.only:
                assert default in section.only[key] or default is ABSENT, key
            elif not isinstance(default, bool):
                assert key in VALUES, key
                if default is not None and default is not ABSENT and default is not REQUIRED:
                    VALUES[key].check(default, key)
        assert set(section.refused).isdisjoint(section.defaults)
        assert {key for first, _, other in section.order for key in (first, other)} <= set(section.defaults)
    assert set(VALUES) <= used


def test_all_activation_functions_that_are_named_are_known() -> None:
    _, _, names = VALUES["activation_function"].words.partition(": ")
    for name in names.replace("[:threshold]", ":2.0").split(", "):
        activation(name)


_JUNK: list[Any] = [None, -1, 1.5, float("nan"), 10**400, True, "a", [], [["a"]], {"a": 1}]


def _places(section: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(section) if isinstance(section, dict) else range(len(section)):
        yield section, key
        if isinstance(section[key], dict | list):
            yield from _places(section[key])


def _said(content: dict[str, Any]) -> str:
    try:
        config_of(content)
    except ConfigError as err:
        return str(err)
    return ""


@pytest.mark.parametrize("kind", ["se_e2_a", "dpa1", "dpa2", "dpa3"])
def test_no_value_ends_in_a_traceback(kind: str) -> None:
    content = _single_task_input()
    content["model"] |= {"descriptor": copy.deepcopy(DESCRIPTORS[kind]), "type_map": TYPE_MAP}
    config = config_of(content)
    content["model"] = copy.deepcopy(config.tasks[0].model)
    content["learning_rate"] = copy.deepcopy(config.learning_rate)
    refused = 0
    for section, key in _places(content):
        kept = section[key]
        for value in _JUNK:
            section[key] = value
            said = _said(content)
            refused += bool(said)
            assert "\n" not in said
        section[key] = kept
    assert refused > 500


def test_case_embedding_needs_a_place_for_every_head() -> None:
    content = shared_input("dpa1strip", fitting=True)
    content["model"]["shared_dict"]["fit"]["dim_case_embd"] = 1
    with pytest.raises(ConfigError, match=r"dim_case_embd is 1; with 2 heads it must be at least 2"):
        config_of(content)


def test_the_older_spelling_fixes_standard_deviations_at_their_default() -> None:
    content = shared_input("dpa3")
    repflow = content["model"]["shared_dict"]["desc"]["repflow"]
    repflow["fix_stat_std"] = 0.0
    for skip_stat, expected in ((False, 1.0), (True, 0.3)):
        repflow["skip_stat"] = skip_stat
        plan = plan_of(content)
        weights = initial_weights(plan)["copper"]
        assert set(weights["descriptor.repflows.stddev"].flatten().tolist()) == {expected}


def test_as_many_averaged_checkpoints_are_kept_as_others() -> None:
    given = {"max_ckpt_keep": 3}
    assert config_of(shared_input("dpa1strip", **given)).run.ema_ckpt_keep == 3
    assert config_of(shared_input("dpa1strip", **given, ema_ckpt_keep=1)).run.ema_ckpt_keep == 1


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_config(path)
    path.write_text('{"training": {"_comment": 1, "_comment": 2, "seed": 1, "seed": 2}}')
    with pytest.raises(ConfigError, match="has the key 'seed' twice in one section; give it once"):
        read_config(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_config(tmp_path / "other.json")


def test_missing_data_are_named() -> None:
    content = shared_input("dpa1strip")
    content["training"]["data_dict"]["copper"]["training_data"]["systems"] = ["nowhere"]
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        plan_of(content)


def test_data_without_labels_are_refused(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "frames.extxyz", ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]]))
    content = shared_input("dpa1strip")
    data = content["training"]["data_dict"]["copper"]["training_data"]
    data["systems"] = [str(tmp_path / "frames.extxyz")]
    text = (
        r"copper\.training_data: no frame has a label that the loss of task 'copper' counts \(labels: none; "
        r"counted: energy, forces, virial\)"
    )
    with pytest.raises(ConfigError, match=text):
        plan_of(content)


def test_a_loss_that_counts_nothing_is_refused() -> None:
    content = shared_input("dpa1strip")
    for label in "efv":
        content["loss_dict"]["copper"] |= {f"start_pref_{label}": 0, f"limit_pref_{label}": int(label == "v")}
    plan_of(content)
    with pytest.raises(ConfigError, match=r"\(labels: energy, forces, virial; counted: none\)"):
        plan_of(content, dialect="pt")


def test_the_plan_names_labels_and_terms_without_effect(tmp_path: Path) -> None:
    content = shared_input("dpa1strip")
    ase.io.write(tmp_path / "frames.extxyz", ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]]))
    content["training"]["data_dict"]["copper"]["validation_data"]["systems"] = [
        str(tmp_path / "frames.extxyz")
    ]
    content["loss_dict"]["copper"]["limit_pref_v"] = 0
    lines = {dialect: list(describe_plan(plan_of(content, dialect=dialect))) for dialect in ("pt", "pt_expt")}
    notes = {dialect: [line for line in own if line.startswith("note")] for dialect, own in lines.items()}
    of_pt = "note on task copper: the dialect pt leaves out virial: prefactor 0 at the start or at the limit"
    assert notes["pt_expt"] == [
        "note on task clusters: no frame has virial, which the loss counts",
        "note on task copper: no frame for validation has a label",
    ]
    assert notes["pt"] == [notes["pt_expt"][0], of_pt, notes["pt_expt"][1]]


@pytest.mark.parametrize("kind", ["training_data", "validation_data"])
def test_elements_that_are_not_in_the_type_map_are_found_at_once(kind: str, tmp_path: Path) -> None:
    content = shared_input("dpa1strip")
    frames = [ase.Atoms(symbols, [[0, 0, 0], [0, 0, 2.5]]) for symbols in ("Cu2", "CuFe")]
    ase.io.write(tmp_path / "frames.extxyz", frames)
    content["training"]["data_dict"]["copper"][kind]["systems"] = [str(tmp_path / "frames.extxyz")]
    with pytest.raises(DataError, match="frame 1: has the element Fe, which is not in the type map H, O, Cu"):
        plan_of(content)


@pytest.mark.parametrize("kind", ["training_data", "validation_data"])
def test_parameters_that_frames_lack_are_found_at_once(kind: str, tmp_path: Path) -> None:
    content = shared_input("dpa1strip")
    content["model"]["model_dict"]["copper"]["fitting_net"]["numb_fparam"] = 1
    data = content["training"]["data_dict"]["copper"]
    for section in ("training_data", "validation_data"):
        frames = [ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]]) for _ in range(2)]
        for k, atoms in enumerate(frames):
            atoms.calc = SinglePointCalculator(atoms, energy=1.0)
            if section != kind or k == 0:
                atoms.info["fparam"] = [1.0]
        ase.io.write(tmp_path / f"{section}.extxyz", frames)
        data[section]["systems"] = [str(tmp_path / f"{section}.extxyz")]
    with pytest.raises(DataError, match=f"{kind}.extxyz, frame 1: the model needs 1 frame parameter and"):
        plan_of(content)


def test_charges_that_no_model_knows_are_found_at_once(tmp_path: Path) -> None:
    content = shared_input("dpa3")
    content["model"]["shared_dict"]["desc"] |= {"add_chg_spin_ebd": True, "default_chg_spin": [0, 1]}
    frames = [ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]], info={"charge": charge}) for charge in (1, 100)]
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    ase.io.write(tmp_path / "frames.extxyz", frames)
    data = content["training"]["data_dict"]["copper"]["training_data"]
    data["systems"] = [str(tmp_path / "frames.extxyz")]
    with pytest.raises(DataError, match=r"frame 1: charge and spin are \[100\.0, 1\.0\]"):
        plan_of(content)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("batch_size", [1, 2, 3], "is [1, 2, 3]; expected a number, or a list of 2, one per system that"),
        ("batch_size", "filter:2", "'filter:2' leaves no frame of "),
        ("sys_probs", [1], "is [1.0]; expected a list of 2, one per system, not all 0"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named(key: str, value: Any, text: str) -> None:
    content = shared_input("dpa1strip")
    content["training"]["data_dict"]["copper"]["training_data"][key] = value
    where = f"training.data_dict.copper.training_data.{key} "
    with pytest.raises(ConfigError, match=f"^{re.escape(where + text)}"):
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
    content = shared_input("dpa1strip", fitting=True, disp_file="x")
    content["validating"] = {"_comment": "", "full_validation": False, "save_best": True}
    content["model"]["model_dict"]["copper"]["data_bias_nsample"] = 5
    content["loss_dict"]["copper"]["huber_delta"] = 0.1
    content["training"]["data_dict"]["copper"]["stat_file"] = "x"
    content["training"]["data_dict"]["copper"]["validation_data"]["auto_prob_style"] = "prob_uniform"
    content["learning_rate"] = {"type": "cosine", "start_lr": 0.001, "decay_rate": 0.9}
    lines = list(describe_plan(plan_of(content)))
    assert lines[0].startswith("task clusters: se_atten, 6 frames in 3 systems, batch size 1, 6 frames for")
    assert "shared: fitting_net 'fit' by clusters, copper" in lines
    assert "graphs to compile: 1 for 2 tasks" in lines
    assert lines[-1] == (
        "without effect: training.disp_file, validating.save_best, model_dict.copper.data_bias_nsample, "
        "loss_dict.copper.huber_delta, training.data_dict.copper.stat_file, learning_rate.decay_rate, "
        "training.data_dict.copper.validation_data.auto_prob_style"
    )


def test_the_type_of_a_learning_rate_may_be_left_out() -> None:
    content = shared_input("dpa1strip")
    content["learning_rate"] = {"start_lr": 0.001, "decay_type": "linear", "decay_steps": 10}
    config = config_of(content)
    assert config.learning_rate["type"] == "exp"
    assert config.without_effect == ("shared_dict.fit", "learning_rate.decay_type")


def test_options_of_one_task_without_effect_are_named() -> None:
    content = _single_task_input()
    content["model"]["data_bias_nsample"] = 5
    content["loss"]["huber_delta"] = 0.1
    content["training"]["stat_file"] = "x"
    content["training"]["validation_data"] = {"systems": SYSTEMS["copper"], "sys_probs": [0.5, 0.5]}
    names = (
        *("training.stat_file", "loss.huber_delta", "model.data_bias_nsample"),
        "training.validation_data.sys_probs",
    )
    assert config_of(content).without_effect == names


def test_epochs_set_probabilities_and_steps() -> None:
    content = shared_input("dpa1strip", num_epoch_dict={"clusters": 1.0, "copper": 6.0})
    del content["training"]["numb_steps"], content["training"]["model_prob"]
    plan = plan_of(content)
    # 6 and 3 batches, drawn in proportion to the number of batches of each system
    assert plan.schedule.n_steps == 6 + 18
    assert plan.probabilities == pytest.approx([1 / 4, 3 / 4])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_weights_do_not_decay_unless_the_input_says_so(name: str) -> None:
    content = shared_input("dpa1strip")
    content["optimizer"] = {"type": name}
    assert config_of(content).optimizer.weight_decay == 0.0
