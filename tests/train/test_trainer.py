"""The loop: resuming bit for bit, keeping checkpoints, stopping well."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_inputs import plan_of, shared_input

import mtinfer
from mtinfer.checkpoint.load import read
from mtinfer.errors import CheckpointError, TrainingError
from mtinfer.train.trainer import Start, Trainer


def trained(
    folder: Path, n_steps: int, *, start: Start | None = None, stop: int | None = None, **training: Any
) -> Trainer:
    """Run an eager training of `n_steps`, or the first `stop` of them."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        plan_of(shared_input("dpa1strip", numb_steps=n_steps, **training)), folder, start=start, mode="off"
    )

    def tick(step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    assert trainer.run(tick=tick) == (stop is None)
    return trainer


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


def test_averaged_weights_are_written_as_a_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, 4, enable_ema=True, ema_decay=0.9, save_freq=1)
    name = "fitting_net.nets.0.layers.0.w"
    steps = [read(tmp_path / f"model.ckpt-{k}.pt").head("copper").weights[name] for k in range(1, 5)]
    averages = [read(tmp_path / f"model.ckpt_ema-{k}.pt").head("copper").weights[name] for k in range(1, 5)]
    for k in range(1, 4):
        torch.testing.assert_close(averages[k], 0.9 * averages[k - 1] + 0.1 * steps[k], rtol=0, atol=1e-14)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, 6, save_freq=1, max_ckpt_keep=2)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "model.ckpt-5.pt",
        "model.ckpt-6.pt",
        "model.ckpt.pt",
    ]
    assert read(tmp_path / "model.ckpt.pt").step == 6


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


def test_a_frozen_descriptor_stays(tmp_path: Path) -> None:
    given = shared_input("dpa1strip")
    given["model"]["shared_dict"]["desc"]["trainable"] = False
    trainer = Trainer(plan_of(given), tmp_path, mode="off")
    assert not any("/descriptor." in label for label in trainer.parameters)
    before = trainer.weights["copper"]["descriptor.se_atten.embeddings.0.layers.0.w"].clone()
    trainer.run()
    assert torch.equal(trainer.weights["copper"]["descriptor.se_atten.embeddings.0.layers.0.w"], before)


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


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    plan = plan_of(shared_input("dpa1strip", numb_steps=50))
    trainer = Trainer(plan, tmp_path, mode="off")

    def tick(step: int) -> None:
        if step == 5:
            trainer.weights["copper"]["fitting_net.nets.0.layers.0.b"][0] = float("nan")

    with pytest.raises(
        TrainingError, match=r"the loss of task 'copper' is nan at step .*model.ckpt-4.pt|NaN or"
    ):
        trainer.run(tick=tick)
    assert read(tmp_path / "model.ckpt.pt").step == 4
    mtinfer.load(tmp_path / "model.ckpt.pt", compile=False)


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
    other = shared_input("dpa1strip")
    other["model"]["shared_dict"]["desc"]["sel"] = 40
    wider = Trainer(plan_of(other), tmp_path, start=start, mode="off").weights["clusters"]
    for leaf in ("mean", "stddev"):
        name = f"descriptor.se_atten.{leaf}"
        assert torch.equal(wider[name], source.weights["copper"][name][:, :1].expand(-1, 40, -1))
    other["model"]["shared_dict"]["desc"]["axis_neuron"] = 3
    other["model"]["shared_dict"]["desc"]["neuron"] = [4, 6]
    with pytest.raises(CheckpointError, match="their descriptors differ in"):
        Trainer(plan_of(other), tmp_path, start=start, mode="off")


def test_another_checkpoint_can_not_be_resumed(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    path = tmp_path / "model.ckpt.pt"
    stripped = content(path)
    del stripped["mtinfer"]
    torch.save(stripped, tmp_path / "foreign.pt")
    plan = plan_of(shared_input("dpa1strip"))
    with pytest.raises(CheckpointError, match="holds no state of a training of mtinfer; use --finetune"):
        Trainer(plan, tmp_path, start=Start(resume=tmp_path / "foreign.pt"), mode="off")
    with pytest.raises(CheckpointError, match=r"lacks the weight|has the weight|asks for"):
        Trainer(plan_of(shared_input("se_e2_a")), tmp_path, start=Start(resume=path), mode="off")


def test_no_checkpoint_holds_keys_of_a_compiled_graph(tmp_path: Path) -> None:
    trained(tmp_path, 2, enable_ema=True)
    for path in tmp_path.glob("*.pt"):
        for key in content(path)["model"]:
            assert not any(word in key for word in ("compiled", "original_model", "_orig_mod", "_task_")), key
