"""Commands as a user types them: what they print, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from reference_files import DATA, SE_E2_A, STRIP
from rich.table import Table

from mtinfer.cli import main
from mtinfer.console import print_table

FRAMES = DATA / "frames"


@pytest.fixture(autouse=True)
def keep_warning_filters(recwarn: pytest.WarningsRecorder) -> None:
    """The commands print warnings, which are no errors here."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails_with(text: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("mtinfer: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert text in result.stderr


def changed(tmp_path: Path, change: Any) -> Path:
    """Write a copy of a checkpoint after `change(content)`."""
    content = torch.load(SE_E2_A, weights_only=True)
    change(content)
    path = tmp_path / "changed.pt"
    torch.save(content, path)
    return path


def test_info_prints_heads_and_json() -> None:
    text = run("info", SE_E2_A).stdout
    assert "water" in text
    assert "also called H2O, liquid" in text
    found = json.loads(run("info", SE_E2_A, "--json").stdout)
    assert [head["name"] for head in found["heads"]] == ["water", "clusters", "copper"]


@pytest.mark.parametrize("arguments", [["info", str(SE_E2_A)], ["--help"], ["eval", "--help"]])
def test_light_commands_are_quick_and_leave_torch_alone(arguments: list[str]) -> None:
    code = f"import sys; from mtinfer.cli import main; main({arguments!r}, standalone_mode=False); "
    code += "print('torch' in sys.modules, file=sys.stderr)"
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
    assert done.stderr == "False\n"
    # a third of this on a quiet machine
    assert min(seconds) < 0.9


def test_convert_then_evaluate(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    result = run("convert", STRIP, "-o", target)
    assert result.exit_code == 0, result.output
    assert "heads: water, clusters, copper" in result.stdout
    files = {name: tmp_path / name for name in ("s.json", "s.csv", "p.png", "p.extxyz")}
    result = run(
        *("eval", "--head", "copper", target, FRAMES / "copper", FRAMES / "copper.extxyz"),
        *("--json", files["s.json"], "--csv", files["s.csv"]),
        *("--plot", files["p.png"], "--output", files["p.extxyz"]),
    )
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_size for path in files.values())
    scores = json.loads(files["s.json"].read_text())
    assert "forces" in json.dumps(scores)
    n_frames = len(ase.io.read(files["p.extxyz"], ":"))
    assert n_frames == 2 * len(ase.io.read(FRAMES / "copper.extxyz", ":"))


def test_convert_keeps_an_existing_file(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_text("precious")
    fails_with("exists and is kept", "convert", STRIP, "-o", target)
    assert target.read_text() == "precious"
    assert run("convert", STRIP, "-o", target, "--force", "--head", "water").exit_code == 0
    assert [head["name"] for head in json.loads(run("info", target, "--json").stdout)["heads"]] == ["water"]
    assert list(tmp_path.iterdir()) == [target]


def test_heads_that_can_not_be_evaluated_are_named(tmp_path: Path) -> None:
    def strange(content: Any) -> None:
        params = content["model"]["_extra_state"]["model_params"]["model_dict"]
        params["copper"]["fitting_net"]["activation_function"] = "sawtooth"

    path, target = changed(tmp_path, strange), tmp_path / "model.safetensors"
    result = run("convert", path, "-o", target)
    assert result.exit_code == 0, result.output
    assert "left out: head 'copper'" in result.stderr
    assert [head["name"] for head in json.loads(run("info", target, "--json").stdout)["heads"]] == [
        "water",
        "clusters",
    ]
    for arguments in (
        ["eval", "--head", "all", path, FRAMES / "water.extxyz"],
        ["verify", path, "--compile", "off"],
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("left out: head 'copper'") == 1
    assert run("convert", path, "-o", target, "--force", "--head", "water").exit_code == 0
    fails_with("head 'copper'", "convert", path, "-o", target, "--force", "--head", "copper")


def test_convert_to_float32(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    assert run("convert", STRIP, "-o", target, "--dtype", "float32").exit_code == 0
    assert "float32" in run("info", target).stdout


def test_all_heads_are_evaluated(tmp_path: Path) -> None:
    result = run("eval", "--head", "all", STRIP, FRAMES / "clusters.extxyz", "--csv", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    assert all(f"\n{head}," in (tmp_path / "s.csv").read_text() for head in ("water", "clusters", "copper"))


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(SE_E2_A.read_bytes()[:100_000])
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    for command in ("info", "convert"):
        fails_with("truncated.pt", command, truncated)
        fails_with("text.pt", command, text)
        fails_with("absent.pt", command, tmp_path / "absent.pt")
    assert sorted(tmp_path.iterdir()) == [text, truncated]


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("command", ["info", "convert", "eval"])
def test_code_in_a_pickle_is_not_run(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"model": _Payload()}, path)
    extra = [FRAMES / "water.extxyz"] if command == "eval" else []
    fails_with("evil.pt", command, path, *extra)
    assert "never be printed" not in capfd.readouterr().out


def test_bad_weights_are_named(tmp_path: Path) -> None:
    key = "model.water.atomic_model.out_bias"

    def check(text: str, change: Any) -> None:
        fails_with(text, "convert", changed(tmp_path, change), "-o", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    check("changed.pt': head 'water' lacks", lambda content: content["model"].pop(key))
    bias = f"{key.removesuffix('out_bias')}fitting_net.bias_atom_e"
    check("'atomic_model.fitting_net.bias_atom_e'", lambda content: content["model"].pop(bias))
    check("nonsense", lambda content: content["model"].update({"model.water.nonsense": torch.zeros(1)}))
    check("out_bias", lambda content: content["model"].update({key: torch.zeros(1, 4, 1)}))
    check("out_bias", lambda content: content["model"].update({key: torch.full((1, 3, 1), float("nan"))}))

    def clash(content: Any) -> None:
        heads = content["model"]["_extra_state"]["model_params"]["model_dict"]
        heads["copper"]["model_branch_alias"] = ["liquid"]

    check("liquid", clash)


def test_options_that_are_unknown_are_warned_of(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        head = content["model"]["_extra_state"]["model_params"]["model_dict"]["copper"]
        head["descriptor"] |= {"twist": 2, "fold": False}
        head["fitting_net"]["bend"] = True

    converted = run("convert", changed(tmp_path, change), "-o", tmp_path / "out.safetensors")
    assert converted.exit_code == 0
    unknown = "fitting_net.bend, descriptor.twist"
    warned = f"head 'copper' has options that mtinfer does not know and passes over: {unknown};"
    assert converted.stderr.count("warning") == converted.stderr.count(warned) == 1
    usual = run("convert", SE_E2_A, "-o", tmp_path / "usual.safetensors")
    assert not usual.stderr


def test_bad_heads_and_structures_are_named(tmp_path: Path) -> None:
    frames = FRAMES / "water.extxyz"
    fails_with("no head 'watr' (did you mean 'water'?)", "eval", "--head", "watr", STRIP, frames)
    fails_with("choose one of: water, clusters, copper", "eval", STRIP, frames)

    def write(atoms: ase.Atoms) -> Path:
        atoms.info["energy"] = 0.0
        path = tmp_path / "frame.extxyz"
        ase.io.write(path, atoms)
        return path

    fails_with(
        "atom 1 is Fe", "eval", "--head", "water", STRIP, write(ase.Atoms("HFe", [[0, 0, 0], [1, 0, 0]]))
    )
    lost = ase.Atoms("H2", [[0, 0, 0], [np.nan, 0, 0]])
    fails_with("positions holds NaN", "eval", "--head", "water", STRIP, write(lost))
    flat = ase.Atoms("H", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=True)
    fails_with("no volume along", "eval", "--head", "water", STRIP, write(flat))


def test_bad_data_and_outputs_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fails_with("empty", "eval", "--head", "water", STRIP, empty)
    system = tmp_path / "system"
    shutil.copytree(next((FRAMES / "water").iterdir()), system)
    forces = next(system.glob("set.*/force.npy"))
    np.save(forces, np.load(forces)[:, :-3])
    fails_with("force.npy", "eval", "--head", "water", STRIP, system)
    frames = FRAMES / "water.extxyz"
    unlabelled = ase.io.read(frames, index=0)
    unlabelled.calc = None
    unlabelled.info = {"REF_energy": 1.0}
    ase.io.write(tmp_path / "other.extxyz", unlabelled)
    text = (
        "no frame carries a label (energy, forces, virial or stress; the first frame has REF_energy instead)"
    )
    fails_with(text, "eval", "--head", "water", STRIP, tmp_path / "other.extxyz")
    absent = tmp_path / "absent" / "s.json"
    fails_with("does not exist", "eval", "--head", "water", STRIP, frames, "--json", absent)
    fails_with("does not exist", "convert", STRIP, "-o", absent)


def test_unseen_element_is_warned_of_once() -> None:
    result = run("eval", "--head", "copper", STRIP, FRAMES / "water.extxyz", FRAMES / "clusters.extxyz")
    assert result.exit_code == 0
    assert result.stderr.count("never saw O in training") == 1


def test_debug_shows_the_traceback() -> None:
    for arguments in (("--debug", "info", "absent.pt"), ("info", "absent.pt", "--debug")):
        result = run(*arguments)
        assert type(result.exception).__name__ == "CheckpointError"


@pytest.mark.parametrize("device", ["meta", "mps", "nonsense"])
def test_devices_that_can_not_be_used(device: str) -> None:
    result = run("eval", "--head", "water", STRIP, FRAMES / "water.extxyz", "--device", device)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"mtinfer: device '{device}' can't be used (")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 320


def test_a_narrow_terminal_loses_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    made = Table("a" * 30, "b" * 30)
    made.add_row("1", "2")
    with redirect_stdout(_Terminal()) as terminal:
        print_table(made)
    assert "a" * 30 in terminal.getvalue()
    assert "b" * 30 in terminal.getvalue()


class _Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("option", "name"), [("--json", "s.json"), ("--csv", "s.csv"), ("--plot", "p.png"), ("--output", "p.xyz")]
)
def test_evaluation_that_fails_writes_nothing(option: str, name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    frames = [
        ase.Atoms("OH", [[0, 0, 0], [0, 0, 1.0]], info={"energy": 1.0}),
        ase.Atoms("Fe", info={"energy": 0.0}),
    ]
    ase.io.write(tmp_path / "frames.extxyz", frames)
    fails_with(
        "frame 1: atom 0 is Fe", "eval", "--head", "water", STRIP, tmp_path / "frames.extxyz", option, target
    )
    assert [path.name for path in tmp_path.iterdir()] == ["frames.extxyz"]


def test_outputs_that_can_not_be_are_refused_before_the_work(tmp_path: Path) -> None:
    frames = tmp_path / "frames.extxyz"
    ase.io.write(frames, ase.Atoms("OH", [[0, 0, 0], [0, 0, 1.0]]))
    fails_with("there is nothing to score", "eval", "--head", "water", STRIP, frames)
    plotted = ("--plot", tmp_path / "p.png", "--output", tmp_path / "p.xyz")
    fails_with("there is nothing to plot", "eval", "--head", "water", STRIP, frames, *plotted)
    fails_with("'.traj', allowed are", "eval", "--head", "water", STRIP, frames, "--output", "p.traj")
    for name, target in (("m.pt", "safetensors"), ("m.safetensors", "pt")):
        refused = run("convert", STRIP, "--to", target, "-o", tmp_path / name)
        assert refused.exit_code == 2
        assert f"would hold a {target} file" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["frames.extxyz"]
    predicted = run("eval", "--head", "water", STRIP, frames, "--output", tmp_path / "p.xyz")
    assert predicted.exit_code == 0
    assert predicted.stdout == f"wrote {tmp_path / 'p.xyz'}\n"
    assert "no frame carries a label" in predicted.stderr
    assert predicted.stderr.endswith(": nothing to score\n")


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_in_a_real_process(debug: bool) -> None:
    command = [sys.executable, "-m", "mtinfer", *["--debug"] * debug, "convert", "absent.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert ("Traceback" in done.stderr) == debug
    assert "no such file: 'absent.pt'" in done.stderr.splitlines()[-1]
    assert debug or len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_can_not_be_written() -> None:
    command = [sys.executable, "-m", "mtinfer", "info", str(STRIP)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "mtinfer: [Errno 28] No space left on device"


def test_a_terminal_without_the_letters() -> None:
    frames = FRAMES / "water.extxyz"
    command = [sys.executable, "-m", "mtinfer", "eval", "--head", "water", "--compile", "off", STRIP, frames]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "eV/?" in done.stdout


@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
def test_convert_to_a_checkpoint(tmp_path: Path, dialect: str) -> None:
    source = tmp_path / "model.pt"
    source.write_bytes(STRIP.read_bytes())
    result = run("convert", source, "--to", dialect, "--head", "water")
    assert result.exit_code == 0, result.output
    target = tmp_path / f"model-{dialect}.pt"
    found = json.loads(run("info", target, "--json").stdout)
    assert (found["dialect"], [head["name"] for head in found["heads"]]) == (dialect, ["water"])
    assert run("convert", source, "--to", dialect).exit_code == 1  # the file is kept
    refused = run("convert", source, "--to", dialect, "--dtype", "float32", "--force")
    assert refused.exit_code == 2
    assert "--to safetensors" in refused.stderr
