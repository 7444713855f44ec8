"""Examples and README snippets run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, example, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_readme_has_snippets() -> None:
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet_runs(snippet: str) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_example_input_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtinfer", "train", "examples/04_train.json", "--output", str(tmp_path)]
    plan = subprocess.run([*command, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert plan.returncode == 0, plan.stderr
    assert "graphs to compile: 1 for 3 tasks" in plan.stdout
    assert not list(tmp_path.iterdir())
    done = subprocess.run(
        [*command, "--steps", "4", "--compile", "off"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    verify = [sys.executable, "-m", "mtinfer", "verify", str(tmp_path / "model.ckpt.pt"), "--compile", "off"]
    checked = subprocess.run(verify, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("ok") >= 3
