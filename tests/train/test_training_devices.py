"""Training on the device it was given: without a GPU on torch's `meta` device, and on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import GPU, OneDevice, on_gpu, on_meta
from tiny_inputs import DESCRIPTORS, plan_of, shared_input
from torch import Tensor

from mtinfer.train.batch import make_batch
from mtinfer.train.plan import Plan
from mtinfer.train.ranks import Ranks
from mtinfer.train.starting import Start
from mtinfer.train.step import TrainingStep, step_function
from mtinfer.train.trainer import Trainer
from mtinfer.train.weights import initial_weights


def weights_of(plan: Plan) -> dict[str, Tensor]:
    return initial_weights(plan)[plan.tasks[0].name]


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_the_step_has_no_tensors_of_its_own_elsewhere(kind: str) -> None:
    plan = plan_of(shared_input(kind, fitting=True))
    task, weights = plan.tasks[0], weights_of(plan)
    batch = make_batch([system.frames[0] for system in task.systems], task.model)
    labels = task.config.loss.labels(batch, 0.7)
    with OneDevice():
        data = tuple(on_meta((*batch.data, *labels)))
        outputs = step_function(task.model)(
            data, dict(zip(weights, on_meta(list(weights.values())), strict=True))
        )
    assert {output.device.type for output in outputs} == {"meta"}


@on_gpu
@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_gradients_are_those_of_the_cpu(kind: str) -> None:
    plan = plan_of(shared_input(kind, fitting=True))
    task, weights = plan.tasks[0], weights_of(plan)
    batch = make_batch([system.frames[0] for system in task.systems], task.model)
    found = []
    for device in (GPU, torch.device("cpu")):
        own = {name: tensor.to(device) for name, tensor in weights.items()}
        moved = batch.to(device)
        step = TrainingStep(task.model, own, "off")
        found.append(step(moved, task.config.loss.labels(moved, 0.7), own).gradients)
    for name, expected in found[1].items():
        scale = max(float(expected.abs().max()), 1e-8)
        assert float((found[0][name].cpu() - expected).abs().max()) <= 1e-9 * scale, name


@on_gpu
def test_what_was_trained_compiled_is_what_is_evaluated(tmp_path: Path) -> None:
    plan = plan_of(shared_input("dpa1strip", numb_steps=8, save_freq=4))
    trainers = []
    for folder in ("whole", "again"):
        trainers.append(Trainer(plan, tmp_path / folder, ranks=Ranks(device=GPU)))
        assert trainers[-1].run()
    assert all(step.graph.is_compiled for step in trainers[0].steps.values())
    half, checkpoint = (next((tmp_path / "whole").glob(f"*-{step}.pt")) for step in (4, 8))
    trainers.append(Trainer(plan, tmp_path / "resumed", start=Start(resume=half), ranks=Ranks(device=GPU)))
    assert trainers[-1].run()
    for trainer in trainers[1:]:
        for label, weight in trainer.parameters.items():
            assert torch.equal(weight, trainers[0].parameters[label]), label
    command = [sys.executable, "-m", "mtinfer", "verify", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
