"""`mtinfer bench`: what it measures of a file, and how it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from reference_files import STRIP

import mtinfer
from mtinfer.bench import Task, measure, row, water
from mtinfer.cli import main
from mtinfer.errors import MtinferError


def test_figures_of_a_file() -> None:
    task = Task(str(STRIP), "water", n_atoms=6, steps=2, threads=1, device="cpu")
    figures = measure(task)
    assert figures.task == task
    assert figures.graphs_compiled <= 1
    assert 0.0 < figures.median_ms < 1e3 * figures.first_call_s
    # the fitting net of each atom, there and back
    weights = mtinfer.load(STRIP, compile=False).head("water").model.parameters()
    of_net = sum(
        math.prod(s.shape)
        for n, s in weights.items()
        if n.startswith("fitting_net.nets.0.") and n.endswith(".w")
    )
    assert figures.gflop > 6 * 2 * 2e-9 * of_net
    assert figures.roofline_ms < figures.median_ms
    assert 100.0 < figures.peak_mib < 5000.0
    theirs = {
        "pt": {"median_ms": 4.0 * figures.median_ms, "peak_mib": 2.0 * figures.peak_mib},
        "pth": {"median_ms": 3.0 * figures.median_ms, "peak_mib": 4.0 * figures.peak_mib},
        "pt2": {"error": "broken"},
    }
    cells = row(figures, theirs).split("|")
    assert cells[1].strip() == STRIP.name
    assert [cell.strip() for cell in cells[-3:-1]] == ["3.0x", "0.25x"]
    assert row(figures, {"pt": {"error": "broken"}}).endswith("| failed |  |  |")


def test_bad_requests_are_named() -> None:
    with pytest.raises(MtinferError, match="multiple of 3"):
        water(4)
    with pytest.raises(MtinferError, match=r"at 3 atoms failed: no head was named"):
        measure(Task(str(STRIP), None, n_atoms=3, steps=1, threads=1, device="cpu"))
    for arguments, text in (
        (["no-such-model"], "neither a file nor an architecture; those are se_e2_a"),
        ([str(STRIP), "--deepmd-python", __file__, "--deepmd-script", "no.py"], "no such script"),
    ):
        result = CliRunner().invoke(main, ["bench", *arguments])
        assert result.exit_code == 2
        assert text in result.output


def test_forms_of_deepmd_kit_that_failed_are_named_with_the_reason(tmp_path: Path) -> None:
    forms = {"pt": {"median_ms": 1e6, "peak_mib": 1e6}, "pth": {"error": "OSError: no operator\nand more"}}
    script = tmp_path / "deepmd.py"
    script.write_text(f"print({json.dumps(json.dumps({'forms': forms}))})")
    arguments = f"bench {STRIP} --head water --atoms 3 --steps 1 --threads 1 --deepmd-python {sys.executable}"
    result = CliRunner().invoke(main, [*arguments.split(), "--deepmd-script", str(script)])
    assert result.exit_code == 0, result.output
    assert "1000000.0 (pt)" in result.stdout
    assert "deepmd-kit's pth was not measured: OSError: no operator\n" in result.stderr
