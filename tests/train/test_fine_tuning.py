"""Fine-tuning: what tasks take from the heads of a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_inputs import plan_of, shared_input, trained

import mtinfer
from mtinfer.checkpoint.load import read
from mtinfer.errors import CheckpointError, ConfigError, UnknownHeadError
from mtinfer.train.batch import make_batch
from mtinfer.train.starting import Start
from mtinfer.train.statistics import times_drawn
from mtinfer.train.step import predicted_energies
from mtinfer.train.trainer import Trainer


def test_fine_tuning_starts_from_a_head(tmp_path: Path) -> None:
    source = trained(tmp_path / "source", 6)
    plan = plan_of(shared_input("dpa1strip", seed=5))
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    trainer = Trainer(plan, tmp_path, start=start, mode="off")
    for task in plan.models:
        for name, tensor in trainer.weights[task].items():
            if name.startswith("descriptor.") or ".nets." in name:
                assert torch.equal(tensor, source.weights["copper"][name])
    assert not torch.equal(trainer.weights["clusters"]["out_bias"], source.weights["copper"]["out_bias"])
    clusters, copper = trainer.weights["clusters"], trainer.weights["copper"]
    for name, tensor in clusters.items():
        shared = plan.owners("clusters", name) == plan.owners("copper", name)
        assert (tensor is copper[name]) == shared == name.startswith("descriptor."), name
    other = shared_input("dpa1strip")
    other["model"]["shared_dict"]["desc"]["sel"] = 40
    wider = Trainer(plan_of(other), tmp_path, start=start, mode="off").weights["clusters"]
    for leaf in ("mean", "stddev"):
        name = f"descriptor.se_atten.{leaf}"
        assert torch.equal(wider[name], source.weights["copper"][name][:, :1].expand(-1, 40, -1))
    other["model"]["shared_dict"]["desc"]["axis_neuron"] = 3
    other["model"]["shared_dict"]["desc"]["neuron"] = [4, 6]
    with pytest.raises(
        CheckpointError, match=r"clusters.descriptor.axis_neuron was 2, and is 3 in the input"
    ):
        Trainer(plan_of(other), tmp_path, start=start, mode="off")


@pytest.mark.usefixtures("no_pictures")
def test_statistics_that_differ_by_slot_go_on_with_as_many_slots_alone(tmp_path: Path) -> None:
    given = shared_input("dpa1strip", numb_steps=1)
    source = Trainer(plan_of(given), tmp_path / "source", mode="off")
    name = "descriptor.se_atten.mean"
    mean = source.weights["copper"][name]
    mean[:, -1] += 0.5
    source.run()
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt")
    same = Trainer(plan_of(given), tmp_path / "same", start=start, mode="off")
    assert torch.equal(same.weights["copper"][name], mean)
    given["model"]["shared_dict"]["desc"]["sel"] = 40
    with pytest.raises(CheckpointError, match=f"'clusters' can't .*: their descriptors differ in '{name}'"):
        Trainer(plan_of(given), tmp_path / "wider", start=start, mode="off")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("excluded", [[], [0], [1]])
@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
def test_the_bias_of_new_data_leaves_no_error_that_a_bias_could_explain(
    tmp_path: Path, dialect: str, excluded: list[int]
) -> None:
    source = plan_of(shared_input("dpa1strip", numb_steps=1), dialect=dialect)
    Trainer(source, tmp_path / "source", mode="off").run()
    given = shared_input("dpa1strip")
    given["model"]["model_dict"]["clusters"]["atom_exclude_types"] = excluded
    plan = plan_of(given, dialect=dialect)
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    weights = Trainer(plan, tmp_path / "more", start=start, mode="off").weights
    for task in plan.tasks:
        n_batches = int(task.config.model["data_stat_nbatch"])
        frames = [
            frame
            for system in task.systems
            for frame, times in zip(system.frames, times_drawn(system, n_batches, dialect), strict=True)
            for _ in range(times)
        ]
        batch = make_batch(frames, task.model)
        own = weights[task.name]
        residuals = batch.energy - predicted_energies(task.model, batch.structures, own)
        counts = torch.zeros(len(frames), 3, dtype=torch.float64)
        counts.index_put_((batch.structures.frames, batch.structures.types), batch.counted, accumulate=True)
        assert counts.any()
        assert (counts.T @ residuals).abs().max() < 1e-6  # what solves a least-squares problem
        deviation = residuals.std(correction=0).expand_as(own["out_std"])
        torch.testing.assert_close(own["out_std"], deviation, atol=1e-8, rtol=0)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
def test_fine_tuning_counts_frames_as_statistics_do(tmp_path: Path, dialect: str) -> None:
    given = shared_input("dpa1strip", numb_steps=2)
    Trainer(plan_of(given, dialect=dialect), tmp_path / "source", mode="off").run()
    for head in given["model"]["model_dict"].values():
        head["data_stat_nbatch"] = 3
    plan = plan_of(given, dialect=dialect)
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    trainer = Trainer(plan, tmp_path, start=start, mode="off")
    for k, task in enumerate(plan.tasks):
        frames = [id(frame) for frame, _ in trainer._residuals(k, trainer.weights[task.name])]
        for system in task.systems:
            times = times_drawn(system, 3, dialect)
            assert [frames.count(id(frame)) for frame in system.frames] == times
    assert any(times != [1] * len(times) for times in [times_drawn(s, 3, "pt_expt") for s in task.systems])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("kind", "key", "value", "text"),
    [
        ("dpa1strip", "rcut", 3.0, "rcut was 3.5, and is 3.0"),
        ("dpa1strip", "rcut_smth", 0.6, "rcut_smth was 0.5, and is 0.6"),
        ("dpa1strip", "activation_function", "gelu", "activation_function was 'tanh', and is 'gelu'"),
        ("dpa1strip", "exclude_types", [[0, 1]], "exclude_types was [], and is [[0, 1]]"),
        ("dpa3", "repflow/a_rcut", 2.4, "repflow.a_rcut was 2.5, and is 2.4"),
        ("hybrid", "list/1/rcut", 2.6, "list[1].rcut was 2.5, and is 2.6"),
        ("dpa1strip", "sel", 40, None),
        ("dpa1strip", "trainable", False, None),
        ("dpa1strip", "precision", "float32", None),
        ("dpa3", "repflow/e_sel", 40, None),
        ("hybrid", "list/1/sel", 40, None),
    ],
)
def test_fine_tuning_keeps_the_formula_of_the_descriptor(
    tmp_path: Path, kind: str, key: str, value: Any, text: str | None
) -> None:
    given = shared_input(kind, numb_steps=1)
    Trainer(plan_of(given), tmp_path / "a", mode="off").run()
    start = Start(finetune=tmp_path / "a" / "model.ckpt.pt", head="copper")
    *parents, last = key.split("/")
    section = given["model"]["shared_dict"]["desc"]
    for parent in parents:
        section = section[int(parent) if parent.isdecimal() else parent]
    section[last] = value
    if text is None:
        Trainer(plan_of(given), tmp_path / "b", start=start, mode="off")
        return
    with pytest.raises(CheckpointError) as caught:
        Trainer(plan_of(given), tmp_path / "b", start=start, mode="off")
    said = f"task 'clusters' can't start from head 'copper': clusters.descriptor.{text} in the input; give it"
    assert str(caught.value).startswith(said)


@pytest.mark.usefixtures("no_pictures")
def test_fine_tuning_takes_a_fitting_net_of_the_same_formula(tmp_path: Path) -> None:
    def started(folder: str, start: Start | None, **fitting: Any) -> Trainer:
        given = shared_input("dpa1strip", numb_steps=1)
        for head in given["model"]["model_dict"].values():
            head["fitting_net"] = head["fitting_net"] | {"numb_fparam": 1} | fitting
        return Trainer(plan_of(given), tmp_path / folder, start=start, mode="off")

    source = started("a", None, default_fparam=[0.25])
    source.run()
    start = Start(finetune=tmp_path / "a" / "model.ckpt.pt", head="copper")
    same = started("b", start, default_fparam=[1.5])
    name = "fitting_net.nets.0.layers.0.w"
    for own in same.weights.values():
        assert torch.equal(own[name], source.weights["copper"][name])
        assert own["fitting_net.default_fparam_tensor"].tolist() == [1.5]
    with pytest.warns(UserWarning, match="of task '.*' has another form .* 'copper', and starts anew"):
        other = started("c", start, default_fparam=[0.25], activation_function="gelu")
    assert not torch.equal(other.weights["copper"][name], source.weights["copper"][name])


def test_fine_tuning_as_another_dialect_is_warned_of(tmp_path: Path) -> None:
    given = shared_input("dpa1", numb_steps=1)
    Trainer(plan_of(given, dialect="pt"), tmp_path / "a", mode="off").run()
    start = Start(finetune=tmp_path / "a" / "model.ckpt.pt", head="copper")
    with pytest.warns(UserWarning, match="selects neighbours as the dialect pt does, .*; --dialect pt"):
        Trainer(plan_of(given), tmp_path / "b", start=start, mode="off")
    Trainer(plan_of(given, dialect="pt"), tmp_path / "c", start=start, mode="off")


@pytest.mark.usefixtures("no_pictures")
def test_fine_tuning_keeps_a_preset_bias(tmp_path: Path) -> None:
    trained(tmp_path / "source", 2)
    content = shared_input("dpa1strip")
    heads = content["model"]["model_dict"]
    heads["clusters"]["preset_out_bias"] = {"energy": [None, -10.0, None]}
    heads["copper"]["preset_out_bias"] = {"energy": [None, None, -7.0]}  # where the source has a bias
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    weights = Trainer(plan_of(content), tmp_path / "preset", start=start, mode="off").weights
    free = Trainer(plan_of(shared_input("dpa1strip")), tmp_path / "free", start=start, mode="off").weights
    bias, expected = (own["clusters"]["out_bias"].flatten() for own in (weights, free))
    assert float(bias[1]) == pytest.approx(-10.0, rel=1e-12)
    assert float(bias[0] - expected[0]) != pytest.approx(0.0, abs=1e-3)  # takes what the preset one lacks
    assert float(weights["copper"]["out_bias"][0, 2, 0]) == pytest.approx(-7.0, rel=1e-12)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore:head 'c.* never saw")
@pytest.mark.parametrize(
    ("kind", "width"),
    # type embeddings without a shortcut, with one, and with a double one
    [("dpa1strip", 4), ("dpa1strip", 3), ("dpa1strip", 6), ("dpa2", 0), ("dpa3", 0), ("hybrid", 0)],
)
def test_fine_tuning_with_another_type_map(tmp_path: Path, kind: str, width: int) -> None:
    content = shared_input(kind, numb_steps=2)
    shared = content["model"]["shared_dict"]
    if width:
        shared["desc"]["tebd_dim"] = width
    Trainer(plan_of(content), tmp_path / "source", mode="off").run()
    shared["types"] = ["Cu", "H", "O"]
    content["learning_rate"] |= {"start_lr": 1e-30, "stop_lr": 1e-30}
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    trainer = Trainer(plan_of(content), tmp_path / "other", start=start, mode="off")
    trainer.run()
    before, after = (mtinfer.load(tmp_path / k / "model.ckpt.pt", compile=False) for k in ("source", "other"))
    for task in trainer.plan.tasks:
        atoms = task.systems[0].frames[0].atoms
        forces = after.evaluate(atoms, task.name).forces
        assert abs(forces - before.evaluate(atoms, "copper").forces).max() < 1e-12


@pytest.mark.usefixtures("no_pictures")
def test_fine_tuning_takes_elements_that_the_head_knows(tmp_path: Path) -> None:
    Trainer(plan_of(shared_input("dpa1strip", numb_steps=2)), tmp_path / "source", mode="off").run()
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    content = shared_input("dpa1strip")
    types = content["model"]["shared_dict"]["types"]
    types.append("Au")
    with pytest.raises(CheckpointError, match=r"the type map H, O, Cu; task 'clusters' has Au, too"):
        Trainer(plan_of(content), tmp_path / "more", start=start, mode="off")
    types[2:] = []
    del content["model"]["model_dict"]["copper"], content["training"]["data_dict"]["copper"]
    del content["training"]["model_prob"]["copper"], content["loss_dict"]["copper"]
    fewer = Trainer(plan_of(content), tmp_path / "fewer", start=start, mode="off")
    assert fewer.weights["clusters"]["out_bias"].shape == (1, 2, 1)
    table = fewer.weights["clusters"]["descriptor.type_embedding.layers.0.w"]
    whole = read(tmp_path / "source" / "model.ckpt.pt").heads["copper"].weights
    assert torch.equal(table, whole["descriptor.type_embedding.layers.0.w"][:2])


@pytest.mark.usefixtures("no_pictures")
def test_fine_tuning_of_se_e2_a_needs_the_same_types(tmp_path: Path) -> None:
    content = shared_input("se_e2_a", numb_steps=2)
    Trainer(plan_of(content), tmp_path / "source", mode="off").run()
    content["model"]["shared_dict"]["types"].reverse()
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    with pytest.raises(CheckpointError, match="networks of se_e2_a belong to types"):
        Trainer(plan_of(content), tmp_path / "turned", start=start, mode="off")


def with_task(given: dict[str, Any], name: str, **head: Any) -> dict[str, Any]:
    """Input with one more task, on the structures of `copper`."""
    given = copy.deepcopy(given)
    training = given["training"]
    for tasks in (
        given["model"]["model_dict"],
        given["loss_dict"],
        training["data_dict"],
        training["model_prob"],
    ):
        tasks[name] = copy.deepcopy(tasks["copper"])
    given["model"]["model_dict"][name] |= head
    return given


#: a weight of the fitting net, and one of the descriptor
FITTING_WEIGHT = "fitting_net.nets.0.layers.0.w"
RADIAL_WEIGHT = "descriptor.se_atten.embeddings.0.layers.0.w"


@pytest.mark.usefixtures("no_pictures")
def test_tasks_go_on_from_heads_of_their_names_and_new_ones_join_them(tmp_path: Path) -> None:
    trained(tmp_path / "source", 4)
    heads = read(tmp_path / "source" / "model.ckpt.pt").heads
    given = with_task(shared_input("dpa1strip", seed=5), "bulk")
    fresh = Trainer(plan_of(given), tmp_path / "fresh", mode="off")
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt")
    trainer = Trainer(plan_of(given), tmp_path / "more", start=start, mode="off")
    assert {name: str(origin) for name, origin in trainer.origins.items()} == {
        "clusters": "goes on from head 'clusters'",
        "copper": "goes on from head 'copper'",
        "bulk": "starts from the descriptor of head 'clusters', with a new fitting net",
    }
    for task in ("clusters", "copper"):
        for name, tensor in trainer.weights[task].items():
            assert torch.equal(tensor, heads[task].weights[name]), name
    for name, tensor in trainer.weights["bulk"].items():
        in_descriptor = name.startswith("descriptor.")
        assert torch.equal(
            tensor, heads["copper"].weights[name] if in_descriptor else fresh.weights["bulk"][name]
        )
    trainer.run()
    assert list(read(tmp_path / "more" / "model.ckpt.pt").heads) == ["clusters", "copper", "bulk"]


def test_tasks_start_from_the_heads_that_they_name(tmp_path: Path) -> None:
    source = trained(tmp_path / "source", 4)
    path = tmp_path / "source" / "model.ckpt.pt"
    given = with_task(shared_input("dpa1strip", seed=5), "bulk", finetune_head="copper")
    given["model"]["model_dict"]["clusters"]["finetune_head"] = "RANDOM"
    fresh = Trainer(plan_of(shared_input("dpa1strip", seed=5)), tmp_path / "fresh", mode="off")
    trainer = Trainer(plan_of(given), tmp_path / "more", start=Start(finetune=path), mode="off")
    assert {name: origin.taken for name, origin in trainer.origins.items()} == {
        "clusters": "descriptor",
        "copper": "head",
        "bulk": "networks",
    }
    of_copper, of_clusters = source.weights["copper"], fresh.weights["clusters"]
    weights = trainer.weights
    assert torch.equal(weights["bulk"][FITTING_WEIGHT], of_copper[FITTING_WEIGHT])
    assert not torch.equal(weights["bulk"]["out_bias"], of_copper["out_bias"])  # follows the data
    assert torch.equal(weights["copper"]["out_bias"], of_copper["out_bias"])
    for name in (FITTING_WEIGHT, "out_bias", "out_std"):
        assert torch.equal(weights["clusters"][name], of_clusters[name])
    assert torch.equal(weights["clusters"][RADIAL_WEIGHT], of_copper[RADIAL_WEIGHT])


def test_a_new_task_starts_from_the_descriptor_that_it_shares(tmp_path: Path) -> None:
    given = shared_input("dpa1strip", numb_steps=1)
    given["model"]["shared_dict"]["other"] = given["model"]["shared_dict"]["desc"]
    given["model"]["model_dict"]["copper"]["descriptor"] = "other"
    source = Trainer(plan_of(given), tmp_path / "source", mode="off")
    source.run()
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt")
    trainer = Trainer(plan_of(with_task(given, "bulk")), tmp_path / "more", start=start, mode="off")
    assert str(trainer.origins["bulk"]).startswith("starts from the descriptor of head 'copper'")
    apart, shared = (source.weights[task][RADIAL_WEIGHT] for task in ("clusters", "copper"))
    assert not torch.equal(apart, shared)
    assert torch.equal(trainer.weights["bulk"][RADIAL_WEIGHT], shared)


def test_heads_to_start_from_are_checked(tmp_path: Path) -> None:
    trained(tmp_path / "source", 1)
    path = tmp_path / "source" / "model.ckpt.pt"

    def refused(given: dict[str, Any], start: Start, text: str, error: type[Exception]) -> None:
        with pytest.raises(error, match=text):
            Trainer(plan_of(given), tmp_path / "more", start=start, mode="off")

    given = with_task(shared_input("dpa1strip"), "bulk", finetune_head="coper")
    refused(
        given,
        Start(finetune=path),
        r"no head 'coper' \(did you mean 'copper'\?\); heads: clusters, copper",
        UnknownHeadError,
    )
    refused(
        given,
        Start(finetune=path, head="copper"),
        "'coper' in the input, and --head is 'copper'",
        ConfigError,
    )
    refused(
        given,
        Start(),
        "task 'bulk' has finetune_head 'coper', .* --finetune, which is not given",
        ConfigError,
    )
    two = shared_input("dpa1strip")
    two["model"]["shared_dict"]["other"] = two["model"]["shared_dict"]["desc"]
    two["model"]["model_dict"]["copper"]["descriptor"] = "other"
    Trainer(plan_of(two), tmp_path / "two", mode="off").run()
    refused(
        shared_input("dpa1strip"),
        Start(finetune=tmp_path / "two" / "model.ckpt.pt"),
        "tasks 'clusters' and 'copper' share 'descriptor.*', which would start with two values: clusters "
        "goes on from head 'clusters', copper goes on from head 'copper'; let both start from one head",
        CheckpointError,
    )


@pytest.mark.usefixtures("no_pictures")
def test_case_embeddings_of_heads_that_go_on_stay(tmp_path: Path) -> None:
    given = shared_input("dpa1strip", fitting=True, numb_steps=1)
    given["model"]["shared_dict"]["fit"]["dim_case_embd"] = 4
    source = Trainer(plan_of(given), tmp_path / "source", mode="off")
    source.run()
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt")
    new = with_task(given, "bulk")  # first of the names, so that the input alone would give it the first case
    with pytest.raises(CheckpointError, match=r"'bulk' share 'fitting_net.*bulk starts from the descriptor"):
        Trainer(plan_of(new), tmp_path / "more", start=start, mode="off")
    new = with_task(given, "bulk", finetune_head="copper")
    first = copy.deepcopy(new)
    first["model"]["model_dict"] = dict(sorted(new["model"]["model_dict"].items()))
    assert list(first["model"]["model_dict"]) == ["bulk", "clusters", "copper"]
    for content in (new, first):
        trainer = Trainer(plan_of(content), tmp_path / "more", start=start, mode="off")
        cases = {task: own["fitting_net.case_embd"].tolist() for task, own in trainer.weights.items()}
        for task, own in source.weights.items():
            assert cases[task] == own["fitting_net.case_embd"].tolist()
        assert len(set(map(tuple, cases.values()))) == 3
        assert all(sorted(case) == [0.0, 0.0, 0.0, 1.0] for case in cases.values())


def test_a_fitting_net_that_starts_anew_has_the_bias_of_its_data(tmp_path: Path) -> None:
    trained(tmp_path / "source", 4)
    given = shared_input("dpa1strip")
    for head in given["model"]["model_dict"].values():
        head["fitting_net"]["neuron"] = [5]
    fresh = Trainer(plan_of(given), tmp_path / "fresh", mode="off")
    start = Start(finetune=tmp_path / "source" / "model.ckpt.pt", head="copper")
    with pytest.warns(UserWarning, match="has another form .*, and starts anew"):
        trainer = Trainer(plan_of(given), tmp_path / "more", start=start, mode="off")
    for task, own in trainer.weights.items():
        assert torch.equal(own["out_bias"], fresh.weights[task]["out_bias"])
        assert trainer.origins[task].taken == "descriptor"
