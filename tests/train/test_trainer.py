"""The loop: resuming bit for bit, keeping checkpoints, stopping well."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_inputs import DESCRIPTORS, SYSTEMS, plan_of, shared_input, trained

import mtinfer
from mtinfer.checkpoint.archive import write
from mtinfer.checkpoint.load import read
from mtinfer.errors import CheckpointError, OutputError, PredictionWarning, TrainingError
from mtinfer.train.batch import Batch, Labels
from mtinfer.train.curves import COLUMNS, CURVE, LearningCurve, read_curve
from mtinfer.train.loss import Errors
from mtinfer.train.sampling import Batches
from mtinfer.train.saving import RunState
from mtinfer.train.starting import Start
from mtinfer.train.step import TrainingStep
from mtinfer.train.trainer import Trainer


def content(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Compare two checkpoints bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{k}")
    else:
        assert a == b, where


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "lcurve.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("ema", [False, True])
def test_a_resumed_run_equals_one_in_one_go(tmp_path: Path, ema: bool) -> None:
    options = {"enable_ema": ema, "disp_freq": 3}
    trained(tmp_path / "whole", 8, **options)
    # interrupted between two displays
    trained(tmp_path / "parts", 8, stop=5, **options)
    halfway = tmp_path / "parts" / "model.ckpt-5.pt"
    trained(tmp_path / "parts", 8, start=Start(resume=halfway), **options)
    assert_same(*(content(tmp_path / part / "model.ckpt-8.pt") for part in ("whole", "parts")))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert ("ema" in content(halfway)) == ema


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_compiled_run_has_the_same_bits_when_it_is_resumed(tmp_path: Path) -> None:
    given = shared_input("dpa1strip", numb_steps=8, save_freq=4)
    given["learning_rate"]["decay_steps"] = 3
    for loss in given["loss_dict"].values():  # some gradients are zero at first, when the graph is checked
        loss |= {"start_pref_e": 0, "limit_pref_e": 1}
    Trainer(plan_of(given), tmp_path / "whole", mode="wait").run()
    start = Start(resume=tmp_path / "whole" / "model.ckpt-4.pt")
    resumed = Trainer(plan_of(given), tmp_path / "parts", start=start, mode="wait")
    resumed.run()
    assert all(step.graph.is_compiled for step in resumed.steps.values())
    assert_same(*(content(tmp_path / part / "model.ckpt-8.pt") for part in ("whole", "parts")))


@pytest.mark.usefixtures("no_pictures")
def test_weights_without_effect_do_not_decay(tmp_path: Path) -> None:
    """As in deepmd-kit, where they have no gradient."""
    given = shared_input("dpa3", fitting=True)
    given["optimizer"] = {"type": "AdamW", "weight_decay": 0.5}
    trainer = Trainer(plan_of(given), tmp_path, mode="off")
    before = {name: weight.clone() for name, weight in trainer.parameters.items()}
    trainer.run()
    still = {name for name, weight in trainer.parameters.items() if torch.equal(weight, before[name])}
    last = DESCRIPTORS["dpa3"]["repflow"]["nlayers"] - 1
    assert f"clusters/descriptor.repflows.layers.{last}.edge_self_linear.w" in still
    assert {name.split("/")[1] for name in still} == trainer._unused["copper"]
    updates = trainer.optimizer.state_dict()["state"]
    assert len(updates) == len(before) - len(still)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["se_e2_a", "hybrid"])
@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
def test_nets_of_centers_that_are_not_drawn(tmp_path: Path, dialect: str, kind: str) -> None:
    """In pt_expt deepmd-kit passes them over, and in pt they move on by their momentum."""
    given = shared_input("se_e2_a", fitting=True, numb_steps=12)
    descriptor = {**DESCRIPTORS["se_e2_a"], "type_one_side": False}
    members = {"type": "hybrid", "list": [DESCRIPTORS["dpa1strip"], descriptor]}
    given["model"]["shared_dict"]["desc"] = members if kind == "hybrid" else descriptor
    trainer = Trainer(plan_of(given, dialect=dialect), tmp_path, mode="off")
    prefix = "descriptor.descrpt_list.1" if kind == "hybrid" else "descriptor"
    # of the pair of types n and c, by 3 n + c
    oxygen, copper = (trainer.parameters[f"clusters/{prefix}.embeddings.{k}.layers.0.w"] for k in (1, 8))
    moved: list[tuple[bool, bool]] = []
    last = [oxygen.clone(), copper.clone()]

    def tick(step: int) -> None:
        moved.append((not torch.equal(oxygen, last[0]), not torch.equal(copper, last[1])))
        last[:] = [oxygen.clone(), copper.clone()]

    trainer.run(tick=tick)
    if dialect == "pt_expt":
        assert set(moved) == {(True, False), (False, True)}
    else:
        assert moved[-1] == (True, True)


@pytest.mark.usefixtures("no_pictures")
def test_averaged_weights_are_written_as_a_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, 4, enable_ema=True, ema_decay=0.9, save_freq=1)
    name = "fitting_net.nets.0.layers.0.w"
    steps = [read(tmp_path / f"model.ckpt-{k}.pt").head("copper").weights[name] for k in range(1, 5)]
    averages = [read(tmp_path / f"model.ckpt_ema-{k}.pt").head("copper").weights[name] for k in range(1, 5)]
    for k in range(1, 4):
        torch.testing.assert_close(averages[k], 0.9 * averages[k - 1] + 0.1 * steps[k], rtol=0, atol=1e-14)


@pytest.mark.usefixtures("no_pictures")
def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, 6, save_freq=1, max_ckpt_keep=2)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "model.ckpt-5.pt",
        "model.ckpt-6.pt",
        "model.ckpt.pt",
    ]
    assert read(tmp_path / "model.ckpt.pt").step == 6


def files(folder: Path) -> dict[str, bytes | str]:
    """Content of every file, and where every link leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


@pytest.mark.usefixtures("no_pictures")
def test_an_earlier_training_is_not_touched(tmp_path: Path) -> None:
    trained(tmp_path, 6)
    before = files(tmp_path)
    message = (
        f"'{tmp_path}' holds model.ckpt-6.pt of an earlier training; go on from it with --resume, choose "
        "another --output, or replace it with --force"
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        trained(tmp_path, 3)
    assert files(tmp_path) == before
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    with pytest.raises(OutputError, match=r"holds lcurve\.csv of an earlier training"):
        trained(tmp_path, 3)
    # the file of a run that never came to a row is in nobody's way
    (tmp_path / "lcurve.csv").write_text((tmp_path / "lcurve.csv").read_text().splitlines()[0] + "\n")
    trained(tmp_path, 3)


def test_an_earlier_training_is_replaced_by_force(tmp_path: Path) -> None:
    trained(tmp_path / "run", 6, enable_ema=True)
    (tmp_path / "run" / "model.ckpt-best.pt").touch()
    options = {"save_freq": 1, "max_ckpt_keep": 2}
    again = trained(tmp_path / "run", 3, start=Start(force=True), **options)
    trained(tmp_path / "new", 3, **options)
    (tmp_path / "new" / "model.ckpt-best.pt").touch()
    assert files(tmp_path / "run").keys() == files(tmp_path / "new").keys()
    assert os.readlink(tmp_path / "run" / "model.ckpt.pt") == "model.ckpt-3.pt"
    assert again.keeper.newest == tmp_path / "run" / "model.ckpt-3.pt"
    source = Start(finetune=tmp_path / "run" / "model.ckpt.pt", head="copper", force=True)
    with pytest.raises(OutputError, match="would be removed by --force; choose another --output"):
        trained(tmp_path / "run", 3, start=source)
    assert again.keeper.newest.exists()


@pytest.mark.usefixtures("no_pictures")
def test_no_row_of_a_replaced_training_stays_where_another_one_is_resumed(tmp_path: Path) -> None:
    trained(tmp_path / "old", 3, disp_freq=1)
    trained(tmp_path / "source", 4, disp_freq=4)
    source = Start(resume=tmp_path / "source" / "model.ckpt-4.pt", force=True)
    trained(tmp_path / "old", 5, start=source, disp_freq=1)
    assert {row["step"] for row in read_curve(tmp_path / "old" / "lcurve.csv")} == {"5"}


@pytest.mark.usefixtures("no_pictures")
def test_an_earlier_training_is_replaced_when_the_new_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, 2)
    before = files(tmp_path)

    def fail(self: Trainer) -> None:
        raise TrainingError("the loss is not a number")

    monkeypatch.setattr(Trainer, "_compile", fail)
    with pytest.raises(TrainingError):
        trained(tmp_path, 2, start=Start(force=True))
    assert files(tmp_path) == before


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_removes_only_its_own_checkpoints(tmp_path: Path) -> None:
    options = {"save_freq": 1, "max_ckpt_keep": 2, "enable_ema": True, "ema_ckpt_keep": 1}
    trained(tmp_path, 6, **options)
    kept = {f"model.ckpt{name}.pt" for name in ("", "-5", "-6", "_ema", "_ema-6")}
    assert {path.name for path in tmp_path.glob("*.pt")} == kept
    # from the last but one: the last belongs to no past of this run until it is written again
    trained(tmp_path, 9, start=Start(resume=tmp_path / "model.ckpt-5.pt"), stop=6, **options)
    assert {path.name for path in tmp_path.glob("*.pt")} == kept
    trained(tmp_path, 9, start=Start(resume=tmp_path / "model.ckpt.pt"), **options)
    kept = {f"model.ckpt{name}.pt" for name in ("", "-8", "-9", "_ema", "_ema-9")}
    assert {path.name for path in tmp_path.glob("*.pt")} == kept
    # elsewhere, the folder of the source is left alone
    before = files(tmp_path)
    elsewhere = trained(tmp_path / "a", 12, start=Start(resume=tmp_path / "model.ckpt-9.pt"), **options)
    assert before == {name: found for name, found in files(tmp_path).items() if not name.startswith("a/")}
    assert elsewhere.keeper.newest == tmp_path / "a" / "model.ckpt-12.pt"
    with pytest.raises(OutputError, match=r"holds model\.ckpt-12\.pt of an earlier training"):
        trained(tmp_path / "a", 12, start=Start(resume=tmp_path / "model.ckpt-9.pt"), **options)


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_replaces_the_later_rows_of_the_curve(tmp_path: Path) -> None:
    options = {"disp_freq": 1, "save_freq": 1}
    trained(tmp_path, 4, **options)
    trained(tmp_path, 5, start=Start(resume=tmp_path / "model.ckpt-2.pt"), **options)
    steps = [row["step"] for row in rows(tmp_path) if row["task"] == "copper"]
    assert steps == ["1", "2", "3", "4", "5"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("content", ["a,b\n1,2\n", "\x00", ",".join(COLUMNS) + "\nfirst,copper\n"])
def test_a_curve_that_is_none_is_kept(tmp_path: Path, content: str) -> None:
    trained(tmp_path, 4, save_freq=2)
    (tmp_path / CURVE).write_text(content)
    with pytest.raises(OutputError, match=r"lcurve\.csv"):
        trained(tmp_path, 5, start=Start(resume=tmp_path / "model.ckpt-2.pt"))
    assert (tmp_path / CURVE).read_text() == content
    assert (tmp_path / "model.ckpt-4.pt").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_whose_curve_fails_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(LearningCurve, "add", full)
    with pytest.raises(OutputError, match="no space"):
        trained(tmp_path, 8, disp_freq=3, save_freq=100)
    assert read(tmp_path / "model.ckpt-3.pt").step == 3


@pytest.mark.parametrize(("scale", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_learning_rates_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, factor: float
) -> None:
    given = shared_input("dpa1strip", numb_steps=2)
    given["learning_rate"]["scale_by_worker"] = scale
    trainer = Trainer(plan_of(given), tmp_path, mode="off")
    seen: list[float] = []
    monkeypatch.setattr(trainer.optimizer, "update", lambda _, lr: seen.append(lr))
    trainer._update({}, 1e-3)
    monkeypatch.setattr(trainer, "ranks", replace(trainer.ranks, size=4))
    trainer._update({}, 1e-3)
    assert seen == pytest.approx([1e-3, factor * 1e-3])


def test_pictures_that_can_not_be_drawn_end_nothing(tmp_path: Path) -> None:
    (tmp_path / "lcurve-copper.png").mkdir()
    with pytest.warns(UserWarning, match=r"lcurve-copper\.png: exists .*; the training goes on without"):
        trained(tmp_path, 2, save_freq=1)
    assert read(tmp_path / "model.ckpt-2.pt").step == 2


def test_pictures_are_drawn_at_once_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("mtinfer.train.trainer.plot_curve", lambda rows, *_: drawn.append(rows[-1]["step"]))
    trained(tmp_path, 5, save_freq=1, disp_freq=1)
    assert drawn == ["1"] * len(SYSTEMS) + ["5"] * len(SYSTEMS)


def test_a_row_that_was_cut_off_is_none(tmp_path: Path) -> None:
    curve = LearningCurve(tmp_path / CURVE)
    curve.add(1, "copper", 1e-3, 0.1, (None, None))
    with curve.path.open("a") as file:
        file.write("20")
    assert [row["step"] for row in read_curve(curve.path)] == ["1"]


@pytest.mark.usefixtures("no_pictures")
def test_systems_may_be_added(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    more = shared_input("dpa1strip", numb_steps=100)
    more["training"]["data_dict"]["copper"]["training_data"]["systems"] += SYSTEMS["clusters"]
    trainer = Trainer(plan_of(more), tmp_path, start=Start(resume=tmp_path / "model.ckpt-4.pt"), mode="off")
    assert trainer.run()
    drawn = dict(zip(SYSTEMS, trainer.sampler.drawn, strict=True))["copper"]
    assert len(drawn) == 5
    assert sum(drawn[2:]) > 0
    heads = read(tmp_path / "model.ckpt-100.pt").heads
    observed = {head: record.config["info"]["observed_type"] for head, record in heads.items()}
    assert observed == {"clusters": ["H", "O"], "copper": ["Cu", "H", "O"]}


@pytest.mark.usefixtures("no_pictures")
def test_a_signal_that_is_sent_again_at_once_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(name: str, **options: Any) -> Trainer:
        trainer = Trainer(
            plan_of(shared_input("dpa1strip", numb_steps=5, **options)), tmp_path / name, mode="off"
        )
        save = trainer.keeper.save

        def interrupted(state: RunState) -> None:
            os.kill(os.getpid(), signal.SIGINT)  # as launchers do, while the checkpoint is written
            save(state)

        monkeypatch.setattr(trainer.keeper, "save", interrupted)
        trainer.run(tick=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
        return trainer

    assert train("at once").keeper.newest == tmp_path / "at once/model.ckpt-2.pt"
    monkeypatch.setattr("mtinfer.train.trainer._REPEATED", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train("later")


@pytest.mark.usefixtures("no_pictures")
def test_a_curve_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    curve = LearningCurve(tmp_path / CURVE)
    curve.path.unlink()
    curve.path.mkdir()
    with pytest.raises(OutputError, match=r"lcurve\.csv' can't be written: Is a directory"):
        curve.add(1, "copper", 1e-3, 0.1, (None, None))


@pytest.mark.usefixtures("no_pictures")
def test_checkpoints_may_have_a_folder_of_their_own(tmp_path: Path) -> None:
    options = {"save_ckpt": "kept/best", "disp_freq": 3}
    trained(tmp_path, 4, stop=2, **options)
    trained(tmp_path, 4, start=Start(resume=tmp_path / "kept" / "best.pt"), **options)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"best-2.pt", "best-4.pt", "best.pt"}
    assert {row["step"] for row in rows(tmp_path)} == {"3", "4"}
    assert not list(tmp_path.glob("*.pt"))


def test_checkpoints_that_can_not_be_written_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "kept.pt").mkdir()
    for name, text in (("taken/best", "taken' can't be a folder"), ("kept", "kept.pt: exists and is not a")):
        with pytest.raises(OutputError, match=text):
            Trainer(plan_of(shared_input("dpa1strip", save_ckpt=name)), tmp_path, mode="off")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "locked")
    with pytest.raises(OutputError, match="locked is not writable; choose another path"):
        Trainer(plan_of(shared_input("dpa1strip", save_ckpt="locked/best")), tmp_path, mode="off")


@pytest.mark.usefixtures("no_pictures")
def test_there_is_always_a_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def watched(path: Path, **options: Any) -> None:
        assert path.name != "model.ckpt.pt"
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    trained(tmp_path, 3, save_freq=1)
    assert read(tmp_path / "model.ckpt.pt").step == 3
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


def test_learning_curve_has_a_row_and_a_picture_for_every_task(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    found = rows(tmp_path)
    assert [(row["step"], row["task"]) for row in found] == [
        ("2", "clusters"),
        ("2", "copper"),
        ("4", "clusters"),
        ("4", "copper"),
    ]
    assert all(float(row["rmse_force_valid"]) > 0 for row in found)
    assert not any(row["rmse_virial_valid"] for row in found if row["task"] == "clusters")
    assert (tmp_path / "lcurve-copper.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_pictures")
def test_neighbours_beyond_the_counts_are_warned_of_once_a_task(tmp_path: Path) -> None:
    given = shared_input("dpa1strip")
    given["model"]["shared_dict"]["desc"]["sel"] = 12
    trainer = Trainer(plan_of(given, dialect="pt"), tmp_path, mode="off")
    with pytest.warns(PredictionWarning) as caught:
        trainer.run()
    text = "atoms have more neighbours than head 'copper' keeps (12 within 3.5 Å); the nearest are used"
    assert [text in str(warning.message) for warning in caught] == [True]


def test_names_of_heads_are_no_paths(tmp_path: Path) -> None:
    given = json.loads(json.dumps(shared_input("dpa1strip")).replace('"copper":', '"cu/pbe%":'))
    for path in (None, tmp_path / "model.ckpt-2.pt"):
        Trainer(plan_of(given), tmp_path, start=Start(resume=path), mode="off").run()
    assert (tmp_path / "lcurve-cu%2Fpbe%25.png").is_file()
    assert "cu/pbe%" in mtinfer.load(tmp_path / "model.ckpt.pt", compile=False).heads


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("n_steps", "disp_freq", "systems"), [(4, 1, [0, 1, 2, 0]), (5, 2, [0, 1, 2])])
def test_displays_take_turns_with_the_validation_batches(
    tmp_path: Path, n_steps: int, disp_freq: int, systems: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = shared_input("dpa1strip", numb_steps=n_steps, disp_freq=disp_freq)
    content["training"]["data_dict"]["clusters"]["validation_data"] |= {"numb_btch": 1, "batch_size": 1}
    plan = plan_of(content)
    seen: list[int] = []
    made = Batches.__call__

    def noted(self: Batches, task: int, system: int, *rest: Any) -> Any:
        if task == 0 and system >= len(plan.tasks[0].systems):
            seen.append(system - len(plan.tasks[0].systems))
        return made(self, task, system, *rest)

    monkeypatch.setattr(Batches, "__call__", noted)
    Trainer(plan, tmp_path, mode="off").run()
    assert seen == systems


@pytest.mark.usefixtures("no_pictures")
def test_steps_have_prefactors_of_their_rate_and_displays_the_errors_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shared_input("dpa1strip", numb_steps=12, disp_freq=6, seed=1)
    for data in given["training"]["data_dict"].values():
        del data["validation_data"]
    trainer = Trainer(plan_of(given), tmp_path, mode="off")
    names = {id(own): name for name, own in trainer.weights.items()}
    calls: list[tuple[str, Batch, Labels, Errors]] = []
    called = TrainingStep.__call__

    def noted(self: TrainingStep, batch: Batch, labels: Labels, weights: dict[str, torch.Tensor]) -> Any:
        result = called(self, batch, labels, weights)
        errors = Errors.of(batch, result.energy, result.forces, result.virial)
        calls.append((names[id(weights)], batch, labels, errors))
        return result

    monkeypatch.setattr(TrainingStep, "__call__", noted)
    trainer.run()
    calls = calls[-12:]  # those before make graphs ready
    schedule = trainer.plan.schedule
    assert schedule(11) < 0.1 * schedule.start
    for step, (name, batch, labels, _) in enumerate(calls):
        loss = next(task.config.loss for task in trainer.plan.tasks if task.name == name)
        for found, expected in zip(labels, loss.labels(batch, schedule(step) / schedule.start), strict=True):
            assert torch.equal(found, expected)
    for row in rows(tmp_path):
        last = int(row["step"])
        own = [errors for name, *_, errors in calls[last - 6 : last] if name == row["task"]]
        total = sum(own, start=Errors.none()).rmse
        assert total[1] is not None
        for quantity, value in zip(("energy", "force", "virial"), total, strict=True):
            assert row[f"rmse_{quantity}_train"] == ("" if value is None else f"{value:.6g}")


@pytest.mark.parametrize(("name", "shrinks"), [("Adam", False), ("AdamW", True)])
def test_only_adamw_shrinks_weights_by_their_decay(tmp_path: Path, name: str, shrinks: bool) -> None:
    given = shared_input("dpa1strip")
    given["optimizer"] = {"type": name, "weight_decay": 0.5}
    trainer = Trainer(plan_of(given), tmp_path, mode="off")
    before = {label: weight.clone() for label, weight in trainer.parameters.items()}
    trainer.optimizer.update({label: torch.zeros_like(weight) for label, weight in before.items()}, 0.1)
    shrunk = [torch.allclose(w, 0.95 * before[label], rtol=1e-12) for label, w in trainer.parameters.items()]
    assert all(shrunk) == shrinks


@pytest.mark.usefixtures("no_pictures")
def test_training_lowers_the_error(tmp_path: Path) -> None:
    trained(tmp_path, 60, disp_freq=30, save_freq=1000)
    first, last = (
        [float(row["rmse_force_valid"]) for row in rows(tmp_path) if row["step"] == step]
        for step in ("30", "60")
    )
    trainer = trained(tmp_path / "none", 1, disp_freq=1)
    start = [float(row["rmse_force_valid"]) for row in rows(tmp_path / "none")]
    assert sum(last) < sum(start)
    assert sum(first) < sum(start)
    assert trainer.step == 1


@pytest.mark.usefixtures("no_pictures")
def test_parameters_of_tasks_not_drawn_are_not_stepped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model_prob": {"clusters": 1.0, "copper": 0.0}, "save_freq": 100}
    plan = plan_of(shared_input("dpa1strip", **options))
    trainer = Trainer(plan, tmp_path, mode="off")
    before = {label: tensor.clone() for label, tensor in trainer.parameters.items()}
    trainer.run()
    changed = {
        label for label, tensor in trainer.parameters.items() if not torch.equal(tensor, before[label])
    }
    assert any(label.startswith("clusters/descriptor.") for label in changed)
    assert not any(label.startswith("copper/") for label in changed)
    names = list(trainer.parameters)
    assert {names[k] for k in trainer.optimizer.state_dict()["state"]} == changed


@pytest.mark.usefixtures("no_pictures")
def test_frozen_parts_stay(tmp_path: Path) -> None:
    given = shared_input("dpa1strip", numb_steps=8)
    given["model"]["shared_dict"]["desc"]["trainable"] = False
    given["model"]["model_dict"]["copper"]["fitting_net"]["trainable"] = False
    trainer = Trainer(plan_of(given), tmp_path, mode="off")
    assert {label.partition(".")[0] for label in trainer.parameters} == {"clusters/fitting_net"}
    before = {
        (head, name): tensor.clone() for head, own in trainer.weights.items() for name, tensor in own.items()
    }
    trainer.run()
    changed = {
        f"{head}/{name}"
        for (head, name), tensor in before.items()
        if not torch.equal(tensor, trainer.weights[head][name])
    }
    assert changed == {*trainer.parameters}


@pytest.mark.parametrize("longest", [1e-3, 1e9])
def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: float) -> None:
    trainer = Trainer(plan_of(shared_input("dpa1strip", gradient_max_norm=longest)), tmp_path, mode="off")
    norms: list[float] = []

    def update(gradients: dict[str, torch.Tensor], lr: float) -> None:
        norms.append(sum(float((gradient**2).sum()) for gradient in gradients.values()) ** 0.5)

    monkeypatch.setattr(trainer.optimizer, "update", update)
    trainer.run()
    assert len(norms) > 1
    if longest == 1e-3:
        assert norms == pytest.approx([longest] * len(norms), rel=1e-3)
    else:
        assert min(norms) > 1e-3


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ("copper", "the loss of task 'copper' is nan at step 6 "),
        # the broken head is not drawn again, so that its weight is what stops the run
        (
            "clusters",
            "the weight 'fitting_net.nets.0.layers.0.b' of head 'copper' is NaN or infinite after step 6",
        ),
    ],
)
def test_what_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, drawn: str, message: str
) -> None:
    chances = {task: float(task == drawn) for task in SYSTEMS}
    trainer = Trainer(
        plan_of(shared_input("dpa1strip", numb_steps=50, model_prob=chances)), tmp_path, mode="off"
    )

    def tick(step: int) -> None:
        if step == 5:
            trainer.weights["copper"]["fitting_net.nets.0.layers.0.b"][0] = float("nan")

    with pytest.raises(TrainingError) as caught:
        trainer.run(tick=tick)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"the last good checkpoint is {tmp_path / 'model.ckpt-4.pt'}")
    assert read(tmp_path / "model.ckpt.pt").step == 4
    mtinfer.load(tmp_path / "model.ckpt.pt", compile=False)


@pytest.mark.usefixtures("no_pictures")
def test_weights_of_a_good_checkpoint_gave_a_finite_loss(tmp_path: Path) -> None:
    once = {"save_freq": 1, "max_ckpt_keep": 1, "enable_ema": True}
    plan = plan_of(shared_input("dpa1strip", numb_steps=50, **once))
    trainer = Trainer(plan, tmp_path, mode="off")

    def tick(step: int) -> None:
        if step == 5:
            for task in SYSTEMS:
                own = trainer.weights[task]
                own[max(name for name in own if ".nets.0." in name and name.endswith(".w"))].fill_(1e300)

    with pytest.raises(TrainingError, match=f"; the last good checkpoint is {tmp_path}/model.ckpt-4.pt$"):
        trainer.run(tick=tick)
    kept = sorted(path.name for path in tmp_path.glob("*-?.pt"))
    assert kept == [f"model.ckpt{averaged}-{step}.pt" for averaged in ("", "_ema") for step in (4, 5)]
    again = Trainer(plan, tmp_path, start=Start(resume=tmp_path / "model.ckpt-5.pt"), mode="off")
    with pytest.raises(TrainingError, match=r"the checkpoint .*model.ckpt-5.pt gave no finite loss$"):
        again.run()


def test_seeds_of_the_model_count(tmp_path: Path) -> None:
    def weights(seeds: dict[str, int]) -> dict[str, torch.Tensor]:
        given = shared_input("dpa1strip")
        given["model"]["shared_dict"]["desc"]["seed"] = seeds["descriptor"]
        given["model"]["model_dict"]["copper"]["fitting_net"]["seed"] = seeds["fitting_net"]
        trainer = Trainer(plan_of(given), tmp_path, start=Start(force=True), mode="off")
        return trainer.weights["copper"]

    names = {
        "descriptor": "descriptor.se_atten.embeddings.0.layers.0.w",
        "fitting_net": "fitting_net.nets.0.layers.0.w",
    }
    first, again = (weights({"descriptor": 1, "fitting_net": 1}) for _ in range(2))
    for part, name in names.items():
        other = weights({"descriptor": 1, "fitting_net": 1} | {part: 2})
        for each, tensor in names.items():
            assert torch.equal(first[tensor], again[tensor])
            assert torch.equal(first[tensor], other[tensor]) == (each != part), name


def test_another_checkpoint_can_not_be_resumed(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    path = tmp_path / "model.ckpt.pt"
    stripped = content(path)
    del stripped["mtinfer"]
    torch.save(stripped, tmp_path / "foreign.pt")
    plan = plan_of(shared_input("dpa1strip"))
    write(read(path), tmp_path / "converted.safetensors")
    for name in ("foreign.pt", "converted.safetensors"):
        with pytest.raises(CheckpointError, match="holds no state of a training of mtinfer; use --finetune"):
            Trainer(plan, tmp_path, start=Start(resume=tmp_path / name), mode="off")
    with pytest.raises(
        CheckpointError, match="is at step 2 of 2, and no step is left; give more with --steps"
    ):
        trained(tmp_path, 2, start=Start(resume=path))


def reversed_heads(given: dict[str, Any]) -> None:
    heads = given["model"]["model_dict"]
    given["model"]["model_dict"] = dict(reversed(heads.items()))


def frozen_descriptor(given: dict[str, Any]) -> None:
    given["model"]["shared_dict"]["desc"]["trainable"] = False


def another_activation(given: dict[str, Any]) -> None:
    given["model"]["model_dict"]["copper"]["fitting_net"]["activation_function"] = "gelu"


def another_descriptor(given: dict[str, Any]) -> None:
    given["model"]["shared_dict"]["desc"] = DESCRIPTORS["se_e2_a"]


def preset_bias(given: dict[str, Any]) -> None:
    given["model"]["model_dict"]["copper"]["preset_out_bias"] = {"energy": [1.0, 2.0, 3.0]}


def excluded_atoms(given: dict[str, Any]) -> None:
    given["model"]["model_dict"]["copper"]["atom_exclude_types"] = [0]


def fewer_systems(given: dict[str, Any]) -> None:
    given["training"]["data_dict"]["clusters"]["training_data"]["systems"].pop()


def separate_descriptors(given: dict[str, Any]) -> None:
    given["model"]["model_dict"]["copper"]["descriptor"] = given["model"]["shared_dict"]["desc"]


def shared_fitting(given: dict[str, Any]) -> None:
    given["model"]["shared_dict"]["fit"] = given["model"]["model_dict"]["copper"]["fitting_net"]
    for head in given["model"]["model_dict"].values():
        head["fitting_net"] = "fit"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reversed_heads, "it has the heads clusters, copper, and the input copper, clusters"),
        (frozen_descriptor, "clusters.descriptor.trainable was True, and is False in the input"),
        (another_activation, "copper.fitting_net.activation_function was 'tanh', and is 'gelu' in the input"),
        (
            another_descriptor,
            "clusters.descriptor.type was 'se_atten', and is 'se_e2_a' in the input",
        ),
        (preset_bias, "copper.preset_out_bias was None, and is {'energy': [1.0, 2.0, 3.0]} in the input"),
        (excluded_atoms, "copper.atom_exclude_types was [], and is [0] in the input"),
        (fewer_systems, "task 'clusters' had 3 systems, and has 2 in the input"),
        (separate_descriptors, "it trained 23 weights, and the input trains 32"),
        (
            shared_fitting,
            "heads 'clusters' and 'copper' share 'fitting_net.nets.0.layers.0.w' in the input only",
        ),
    ],
)
def test_only_the_input_that_was_trained_is_resumed(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    trained(tmp_path, 2)
    path = tmp_path / "model.ckpt-2.pt"
    given = shared_input("dpa1strip", numb_steps=4)
    change(given)
    with pytest.raises(CheckpointError) as caught:
        Trainer(plan_of(given), tmp_path, start=Start(resume=path), mode="off")
    assert f"{str(path)!r} can't be resumed: {message}" in str(caught.value)
    assert str(caught.value).endswith("; use the input that it was trained with, or --finetune")


@pytest.mark.usefixtures("no_pictures")
def test_counts_that_the_data_settle_otherwise_are_to_be_written(tmp_path: Path) -> None:
    given = shared_input("dpa1strip", numb_steps=1)
    given["model"]["shared_dict"]["desc"]["sel"] = "auto"
    Trainer(plan_of(given), tmp_path, mode="off").run()
    given["training"]["numb_steps"] = 2
    for change, hint in (("auto:3.0", True), ("auto", False)):
        given["model"]["shared_dict"]["desc"]["sel"] = change
        if not hint:
            reversed_heads(given)
        with pytest.raises(CheckpointError) as caught:
            Trainer(plan_of(given), tmp_path, start=Start(resume=tmp_path / "model.ckpt-1.pt"), mode="off")
        assert ("numbers in place of auto" in str(caught.value)) == hint


def test_a_checkpoint_of_an_older_deepmd_kit_is_none_to_resume(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    path = tmp_path / "model.ckpt-2.pt"
    stored = content(path)
    del stored["mtinfer"]
    stored["model"]["_extra_state"]["train_infos"]["lr"] = np.float64(0.25)  # as it was written before 2025
    torch.save(stored, path)
    with pytest.raises(CheckpointError, match=r"holds no state of a training of mtinfer; use --finetune"):
        trained(tmp_path / "other", 4, start=Start(resume=path))


@pytest.mark.usefixtures("no_pictures")
def test_an_old_checkpoint_that_stays_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OutputError(f"{str(path)!r} can't be removed: Stale file handle")

    monkeypatch.setattr("mtinfer.train.saving._remove", fail)
    with pytest.warns(UserWarning, match=r"model.ckpt-1.pt' can't be removed: Stale file handle"):
        trained(tmp_path, 3, save_freq=1, max_ckpt_keep=2)
    assert (tmp_path / "model.ckpt-3.pt").exists()


@pytest.mark.usefixtures("no_pictures")
def test_what_the_future_looks_like_may_change_on_resume(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    given = shared_input("dpa1strip", numb_steps=5, seed=3, disp_freq=1, save_ckpt="other", enable_ema=True)
    given["learning_rate"]["start_lr"] = 1e-4
    given["loss_dict"]["copper"]["start_pref_e"] = 7.0
    given["optimizer"] = {"type": "AdamW"}
    given["model"]["shared_dict"]["desc"]["seed"] = 3
    given["training"]["data_dict"]["copper"]["training_data"]["batch_size"] = 2
    start = Start(resume=tmp_path / "model.ckpt-2.pt")
    assert Trainer(plan_of(given), tmp_path, start=start, mode="off").run()
    assert read(tmp_path / "other.pt").step == 5
    assert read(tmp_path / "model.ckpt.pt").step == 2


def test_no_checkpoint_holds_keys_of_a_compiled_graph(tmp_path: Path) -> None:
    trained(tmp_path, 2, enable_ema=True)
    for path in tmp_path.glob("*.pt"):
        for key in content(path)["model"]:
            assert not any(word in key for word in ("compiled", "original_model", "_orig_mod", "_task_")), key
