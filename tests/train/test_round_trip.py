"""Train, write, load, evaluate: the numbers that training saw are the numbers that a user gets."""

from __future__ import annotations

import importlib
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_inputs import DESCRIPTORS, SYSTEMS, plan_of, shared_input

import mtinfer
from mtinfer.checkpoint.load import read
from mtinfer.checkpoint.writer import convert
from mtinfer.data import read_frames
from mtinfer.errors import GraphWarning, TrainingError
from mtinfer.train.commands import verify as verify_command
from mtinfer.train.trainer import Trainer
from mtinfer.train.verify import sample_structures, verify


def train(folder: Path, kind: str, fitting: bool, mode: Any, n_steps: int = 30) -> Trainer:
    content = shared_input(kind, fitting=fitting, numb_steps=n_steps, disp_freq=1000, save_freq=1000)
    trainer = Trainer(plan_of(content), folder, mode=mode)
    trainer.run()
    return trainer


CASES = [pytest.param(kind, "off", id=f"{kind}-off") for kind in DESCRIPTORS]
CASES += [pytest.param(kind, "wait", id=f"{kind}-wait", marks=pytest.mark.slow) for kind in DESCRIPTORS]


@pytest.mark.parametrize("fitting", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_what_was_trained_is_what_is_evaluated(tmp_path: Path, kind: str, mode: str, fitting: bool) -> None:
    trainer = train(tmp_path, kind, fitting, mode)
    path = tmp_path / "model.ckpt-30.pt"
    potential = mtinfer.load(path, compile="off" if mode == "off" else "wait")
    for k, task in enumerate(trainer.plan.tasks):
        frames = read_frames(SYSTEMS[task.name])
        system = task.systems[0]
        batch = trainer._batches(k, 0, system, (0,))
        result = trainer.steps[task.name](
            batch, task.config.loss.labels(batch, 1.0), trainer.weights[task.name]
        )
        prediction = potential.evaluate(frames[0].atoms, task.name)
        assert prediction.energy == pytest.approx(float(result.energy[0]), rel=1e-12, abs=1e-10)
        torch.testing.assert_close(torch.tensor(prediction.forces), result.forces, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            torch.tensor(prediction.virial).reshape(1, 9), result.virial, rtol=0, atol=1e-9
        )
    if mode == "wait":
        assert all(step.graph.is_compiled for step in trainer.steps.values())
        assert len({id(step) for step in trainer.steps.values()}) == 1
    found = list(verify(path, compiled=mode == "wait"))
    assert {d.way for d in found} >= {"training", *(["compiled"] if mode == "wait" else [])}
    assert all(d.accepted for d in found), found


def test_verify_sees_through_poison(tmp_path: Path) -> None:
    train(tmp_path, "dpa1strip", True, "off", 4)
    content = torch.load(tmp_path / "model.ckpt-4.pt", weights_only=True)
    wrong = torch.full((3,), 7.0)
    for head in SYSTEMS:
        content["model"][f"model.{head}._task_copper.fitting_net.bias"] = wrong
        content["model"][f"model.{head}.compiled_forward_lower._orig_mod._param_constant0"] = wrong
    torch.save(content, tmp_path / "poisoned.pt")
    result = CliRunner().invoke(verify_command, [str(tmp_path / "poisoned.pt"), "--compile", "off"])
    assert result.exit_code == 0, result.output
    assert "clusters" in result.output
    clean, poisoned = (
        mtinfer.load(tmp_path / name, compile=False) for name in ("model.ckpt-4.pt", "poisoned.pt")
    )
    atoms = read_frames(SYSTEMS["copper"])[0].atoms
    assert clean.evaluate(atoms, "copper").energy == poisoned.evaluate(atoms, "copper").energy


@pytest.mark.parametrize(("noise", "accepted"), [(1e-7, True), (1e-3, False)])
def test_verify_allows_what_the_least_precise_network_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float, accepted: bool
) -> None:
    content = shared_input("dpa1strip", numb_steps=2)
    content["model"]["shared_dict"]["desc"]["precision"] = "float32"
    trainer = Trainer(plan_of(content), tmp_path, mode="off")
    trainer.run()
    assert trainer.plan.tasks[0].model.fitting.dtype == torch.float64
    add_to_forces(monkeypatch, noise)
    found = list(verify(tmp_path / "model.ckpt.pt", compiled=False))
    assert [d.accepted for d in found if d.way == "training"] == [accepted] * len(SYSTEMS)


def add_to_forces(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """Make the training function wrong."""
    import mtinfer.train.verify as module

    right = module.predict

    def wrong(*arguments: Any) -> Any:
        energy, forces, virial = right(*arguments)
        return energy, forces + noise, virial

    monkeypatch.setattr(module, "predict", wrong)


def test_verify_says_what_deepmd_kit_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "dpa1strip", True, "off", 2)

    def deep_pot(*_: Any, **__: Any) -> None:
        raise AssertionError("rcut and sel are not in the same order\nand more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib, "import_module", lambda _: SimpleNamespace(DeepPot=deep_pot))
    with pytest.warns(UserWarning, match=r"does not evaluate head .*: AssertionError: rcut and sel are not"):
        found = list(verify(tmp_path / "model.ckpt.pt", compiled=False))
    assert {d.way: d.accepted for d in found} == {"training": True, "deepmd-kit": False}

    def broken(_: str) -> None:
        raise OSError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(UserWarning, match=r"can't be imported and is left out \(OSError: undefined symbol\)"):
        found = list(verify(tmp_path / "model.ckpt.pt", compiled=False))
    assert {d.way for d in found} == {"training"}


def test_verify_does_not_take_eager_for_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "dpa1strip", True, "off", 2)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("MTINFER_CACHE", str(tmp_path / "cache"))
    with (
        pytest.warns(GraphWarning, match="no C\\+\\+ compiler"),
        pytest.warns(UserWarning, match="compiled does not evaluate head .*: there is no compiled graph"),
    ):
        found = list(verify(tmp_path / "model.ckpt.pt"))
    accepted = {d.way: d.accepted for d in found if d.way != "deepmd-kit"}
    assert accepted == {"training": True, "compiled": False}
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler|there is no compiled graph"):
        result = CliRunner().invoke(verify_command, [str(tmp_path / "model.ckpt.pt")])
    assert isinstance(result.exception, TrainingError)
    assert str(result.exception).endswith("--compile off leaves out the compiled one")


def test_verify_says_how_many_frames_it_compared(tmp_path: Path) -> None:
    train(tmp_path, "dpa1strip", True, "off", 2)
    head, *_ = SYSTEMS
    state = mtinfer.load(tmp_path / "model.ckpt.pt", compile=False).head(head)
    frames = sample_structures(state)
    frames[0].atoms.symbols[0] = "Au"
    found = list(verify(tmp_path / "model.ckpt.pt", frames, heads=[head], compiled=False))
    assert {d.n_frames for d in found if d.way != "deepmd-kit"} == {len(frames) - 1}


def test_verify_fails_where_the_numbers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "dpa1strip", True, "off", 2)
    add_to_forces(monkeypatch, 1e-6)
    result = CliRunner().invoke(verify_command, [str(tmp_path / "model.ckpt.pt"), "--compile", "off"])
    assert result.exit_code != 0
    assert "differs" in result.output


def test_what_is_no_number_is_the_largest_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "dpa1strip", True, "off", 2)
    add_to_forces(monkeypatch, math.nan)
    for found in verify(tmp_path / "model.ckpt.pt", compiled=False):
        assert math.isnan(found.forces) == (found.way == "training")
        assert found.accepted == (found.way != "training")


@pytest.mark.parametrize("kind", DESCRIPTORS)
@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
def test_a_converted_checkpoint_has_the_same_weights(tmp_path: Path, kind: str, dialect: str) -> None:
    train(tmp_path, kind, False, "off", 2)
    source = read(tmp_path / "model.ckpt.pt")
    target = tmp_path / "converted.pt"
    convert(source, target, dialect)
    written = read(target)
    assert written.dialect == dialect
    assert written.step == source.step
    for head, record in source.heads.items():
        other = written.heads[head].weights
        assert record.weights.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in record.weights.items())
    a, b = (written.heads[head].weights for head in SYSTEMS)
    assert a["out_bias"] is not b["out_bias"]
    assert all(a[n].data_ptr() == b[n].data_ptr() for n in a if n.startswith("descriptor."))
