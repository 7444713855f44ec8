"""The command `train` as a user types it: what it says where it can't go on."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_inputs import DESCRIPTORS, FITTING, SYSTEMS, shared_input, training_input

from mtinfer.cli import main
from mtinfer.files import alone
from mtinfer.train.commands import LOCK


@pytest.fixture(autouse=True)
def keep_warning_filters(recwarn: pytest.WarningsRecorder) -> None:
    """The commands print warnings, which are no errors here."""


def train(folder: Path, *options: object, content: dict[str, Any] | None = None) -> Result:
    path = folder / "input.json"
    path.write_text(json.dumps(content or shared_input("dpa1strip", numb_steps=2)))
    arguments = ["train", path, "--output", folder / "run", "--compile", "off", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails_with(text: str, result: Result) -> None:
    """One line on stderr, and nothing trained."""
    assert result.exit_code == 1, result.output
    assert re.search(f"^mtinfer: .*{text}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_named(tmp_path: Path, device: str) -> None:
    fails_with(f"device '{device}' can't be used", train(tmp_path, "--device", device))


def test_processes_that_torchrun_did_not_start_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "2")
    text = "WORLD_SIZE is 2, and RANK, LOCAL_RANK, MASTER_ADDR are not set; start .* with torchrun, or unset"
    fails_with(text, train(tmp_path))


def test_a_folder_is_that_of_one_training(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run" / LOCK):  # as another process would
        fails_with("'.*run' is the folder of another training, which is running; choose", train(tmp_path))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("n_read", [0, 2])
def test_output_that_nobody_reads_ends_no_training(tmp_path: Path, n_read: int) -> None:
    path = tmp_path / "input.json"
    path.write_text(json.dumps(shared_input("dpa1strip", numb_steps=20, disp_freq=1)))
    command = [sys.executable, "-m", "mtinfer", "train", path, "--output", tmp_path, "--compile", "off"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(n_read):
            process.stdout.readline()
        process.stdout.close()
    assert (tmp_path / "model.ckpt-20.pt").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals")
def test_a_closed_terminal_ends_a_training_with_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_text(json.dumps(shared_input("dpa1strip", numb_steps=5000, disp_freq=1)))
    options = f"train {path} --output {tmp_path} --compile off"
    command = [sys.executable, "-m", "mtinfer", *options.split()]
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup
        os.execv(command[0], command)
    while not (tmp_path / "lcurve.csv").exists() or (tmp_path / "lcurve.csv").read_text().count("\n") < 5:
        os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert list(tmp_path.glob("model.ckpt-*.pt"))


def test_a_head_goes_with_fine_tuning(tmp_path: Path) -> None:
    result = train(tmp_path, "--head", "copper")
    assert result.exit_code == 2
    assert "--head goes with --finetune" in result.stderr


def test_a_check_is_of_the_input_alone(tmp_path: Path) -> None:
    assert train(tmp_path, "--check").exit_code == 0
    for option in (("--finetune", "some.pt"), ("--resume", "some.pt"), ("--force",)):
        result = train(tmp_path, "--check", *option)
        assert result.exit_code == 2
        assert "--check looks at the input alone" in result.stderr


def test_heads_that_share_what_does_not_fit_are_refused_by_a_check(tmp_path: Path) -> None:
    other = {**DESCRIPTORS["dpa1strip"], "axis_neuron": 4}
    descriptors = {"clusters": DESCRIPTORS["dpa1strip"], "copper": other}
    content = training_input(descriptors, dict.fromkeys(SYSTEMS, "fit"))
    content["model"]["shared_dict"]["fit"] = FITTING
    text = r"heads 'clusters' and 'copper' share 'fitting_net\..*has the shape .* in the first"
    fails_with(text, train(tmp_path, "--check", content=content))


@pytest.mark.parametrize("option", ["--resume", "--finetune"])
def test_a_folder_is_no_checkpoint(tmp_path: Path, option: str) -> None:
    text = f"'{tmp_path}' is a folder; name a checkpoint in it"
    fails_with(f"{text}$", train(tmp_path, option, tmp_path))
    (tmp_path / "model.ckpt-2.pt").touch()
    (tmp_path / "model.ckpt.pt").symlink_to("model.ckpt-2.pt")
    fails_with(f"{text}, as in '{tmp_path}/model.ckpt.pt'$", train(tmp_path, option, tmp_path))


@pytest.mark.parametrize("option", ["--resume", "--finetune"])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, option: str) -> None:
    fails_with("no such file: '.*nothere.pt'$", train(tmp_path, option, tmp_path / "nothere.pt"))
    assert not (tmp_path / "run").exists()


def test_an_entry_that_no_head_names_is_said_to_have_no_effect(tmp_path: Path) -> None:
    content = shared_input("dpa1strip")
    content["model"]["shared_dict"]["spare"] = {"type": "dpa1"}
    result = train(tmp_path, "--check", content=content)
    assert re.search(r"without effect: .*shared_dict\.spare$", result.stdout, re.MULTILINE)


def test_an_interrupted_command_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtinfer.train.trainer.Trainer._compile", interrupted)
    result = train(tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "mtinfer: interrupted\n"


def test_what_is_shown_of_a_training(tmp_path: Path) -> None:
    result = train(tmp_path, content=shared_input("dpa1strip", numb_steps=2, disp_freq=1))
    assert result.exit_code == 0, result.output
    shown = re.findall(
        r"step +(\d)  lr \S+  \S+ steps/s  (\d:\d\d:\d\d) left  (\w+) +.*valid E \S+", result.stdout
    )
    tasks = list(SYSTEMS)
    assert [(step, task) for step, _, task in shown] == [(step, task) for step in "12" for task in tasks]
    assert [left for step, left, _ in shown if step == "2"] == ["0:00:00"] * len(tasks)
