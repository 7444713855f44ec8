"""Several processes under torchrun, as a user starts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_inputs import SYSTEMS, shared_input

from mtinfer.train.curves import CURVE, read_curve

#: one system of two frames per task, so that two processes see in a step what one sees in a batch of two
TWO_FRAMES = {"clusters": SYSTEMS["clusters"][1:2], "copper": SYSTEMS["copper"][1:2]}


def input_file(folder: Path, batch_size: int, **training: Any) -> Path:
    content = shared_input("dpa1strip", **training)
    for task, systems in TWO_FRAMES.items():
        content["training"]["data_dict"][task]["training_data"] = {
            "systems": systems,
            "batch_size": batch_size,
        }
    path = folder / "input.json"
    path.write_text(json.dumps(content))
    return path


def run(folder: Path, n_processes: int, batch_size: int, **training: Any) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = ["-m", "mtinfer", "train", str(input_file(folder, batch_size, **training))]
    command += ["--output", str(folder), "--compile", "off"]
    if n_processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}", *command]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, and means of gradients: Adam steps alike whatever the scale of a gradient is."""
    content = torch.load(folder / "model.ckpt.pt", weights_only=True)
    found = {name: value for name, value in content["model"].items() if torch.is_tensor(value)}
    moments = content["optimizer"]["state"]
    return found | {f"gradient {k}": moments[k]["exp_avg"] for k in moments}


def errors(curve: Path) -> list[dict[str, float]]:
    """Numbers of a learning curve but the time."""
    return [
        {name: float(row[name] or -1.0) for name in row if name not in ("task", "seconds")}
        for row in read_curve(curve)
    ]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    for name, n_processes, batch_size in (("one", 1, 2), ("two", 2, 1)):
        done = run(tmp_path / name, n_processes, batch_size, numb_steps=6)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1  # the first process alone speaks
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-11, msg=name)
    rows, expected = (errors(tmp_path / name / CURVE) for name in ("two", "one"))
    assert len(rows) == len(expected) > 0
    for row, alone in zip(rows, expected, strict=True):
        assert row == pytest.approx(alone, rel=1e-6)
    untouched = run(tmp_path / "other", 1, 1, numb_steps=6)
    assert untouched.returncode == 0
    other = numbers(tmp_path / "other")
    assert any(float((other[n] - t).abs().max()) > 1e-6 for n, t in one.items() if t.numel())


def run_script(folder: Path, change: str, **training: Any) -> subprocess.CompletedProcess[str]:
    """Train with two processes after `change`, code that alters the package."""
    folder.mkdir()
    script = folder / "changed.py"
    script.write_text(f"import os\nfrom mtinfer.cli import main\n{change}main()\n")
    inputs = str(input_file(folder, 1, **training))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["train", inputs, "--output", str(folder), "--compile", "off"]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    change = (
        "from mtinfer.train import trainer\n"
        "advance = trainer.Trainer._advance\n"
        "def mortal(self, *arguments):\n"
        "    if self.ranks.rank == 1 and self.step == 3:\n"
        "        os._exit(7)\n"
        "    return advance(self, *arguments)\n"
        "trainer.Trainer._advance = mortal\n"
    )
    done = run_script(tmp_path / "dies", change, numb_steps=50)
    assert done.returncode != 0
    assert re.search(r"exitcode *: 7 ", done.stderr), done.stderr
    assert not (tmp_path / "dies/model.ckpt-50.pt").exists()


def test_a_curve_that_fails_in_one_process_leaves_a_checkpoint(tmp_path: Path) -> None:
    change = (
        "from mtinfer.errors import OutputError\n"
        "from mtinfer.train.curves import LearningCurve\n"
        "def full(*_):\n"
        "    raise OutputError('no space')\n"
        "LearningCurve.add = full\n"
    )
    done = run_script(tmp_path / "full", change, numb_steps=50, disp_freq=3, save_freq=50)
    assert done.returncode != 0
    assert "mtinfer: no space" in done.stderr
    assert (tmp_path / "full/model.ckpt-3.pt").exists()


def test_an_error_of_the_first_process_is_that_of_all(tmp_path: Path) -> None:
    """A folder that an earlier training filled, which the first process alone looks at."""
    run(tmp_path / "a", 1, 1, numb_steps=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mtinfer", "train", str(tmp_path / "a" / "input.json"), "--output", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("of an earlier training") == 2
    assert not [line for line in done.stderr.splitlines() if "mtinfer/" in line and "File " in line]
