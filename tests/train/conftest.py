"""Fixtures of the training tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning curves are not drawn, which takes longer than all steps of a test."""
    monkeypatch.setattr("mtinfer.train.trainer.plot_curve", lambda *_: None)
