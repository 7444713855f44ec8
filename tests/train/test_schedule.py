"""Learning rates by step, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mtinfer.errors import ConfigError
from mtinfer.train.schedule import Schedule
from mtinfer.train.schema import LEARNING_RATE, complete


def _schedule(n_steps: int, **given: Any) -> Schedule:
    config = complete({"start_lr": 1e-3, "stop_lr": 1e-5, **given}, LEARNING_RATE, "learning_rate")
    return Schedule.from_config(config, n_steps)


def test_exponential_schedule() -> None:
    schedule = _schedule(1000, decay_steps=100)
    assert schedule(0) == schedule(99) == 1e-3
    assert schedule(100) == pytest.approx(1e-3 * 0.01**0.1, rel=1e-14)
    assert schedule(999) == pytest.approx(1e-3 * 0.01**0.9, rel=1e-14)
    # a period longer than the training is replaced
    assert _schedule(400).decay_steps == 5
    assert _schedule(2000).decay_steps == 100
    assert _schedule(1000, decay_steps=1000).decay_steps == 11
    assert _schedule(1000, decay_steps=999).decay_steps == 999
    assert _schedule(1000, decay_steps=10, decay_rate=0.1)(500) == 1e-5
    assert _schedule(1000, decay_steps=100, smooth=True)(50) == pytest.approx(1e-3 * 0.01**0.05, rel=1e-14)


def test_warm_up_is_linear() -> None:
    schedule = _schedule(1010, warmup_steps=10, warmup_start_factor=0.5, decay_steps=100)
    assert schedule(0) == 5e-4
    assert schedule(5) == pytest.approx(7.5e-4)
    assert schedule(10) == 1e-3
    assert schedule(110) == pytest.approx(1e-3 * 0.01**0.1, rel=1e-14)
    assert _schedule(100, warmup_ratio=0.1).n_warmup == 10


def test_cosine_schedule() -> None:
    schedule = _schedule(100, type="cosine")
    assert schedule(0) == 1e-3
    assert schedule(50) == pytest.approx(0.5 * (1e-3 + 1e-5))
    assert schedule(25) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("decay_type", "halfway"),
    [("inverse_linear", 1 / (0.5 / 1e-5 + 0.5 / 1e-3)), ("linear", 5.05e-4), ("cosine", 5.05e-4)],
)
def test_stable_and_decay_schedule(decay_type: str, halfway: float) -> None:
    schedule = _schedule(1000, type="wsd", decay_phase_ratio=0.2, decay_type=decay_type)
    assert schedule(0) == schedule(800) == 1e-3
    assert schedule(900) == pytest.approx(halfway)
    assert schedule(1000) == pytest.approx(1e-5)


@pytest.mark.parametrize(("ratio", "decay_from"), [(0.2, 800), (0.8, 500)])
def test_the_last_phase_is_a_share_of_all_steps_and_ends_with_them(ratio: float, decay_from: int) -> None:
    schedule = _schedule(1000, type="wsd", warmup_steps=500, decay_phase_ratio=ratio, decay_type="linear")
    assert schedule(250) == 5e-4
    assert schedule(500) == schedule(decay_from) == 1e-3
    assert schedule((decay_from + 1000) // 2) == pytest.approx(5.05e-4)
    assert schedule(1000) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"stop_lr_ratio": 0.1}, "'stop_lr' and 'stop_lr_ratio'; give one of them"),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "give one of them"),
        ({"warmup_steps": 1000}, "warm-up of 1000 steps in a training of 1000"),
        ({"stop_lr": 0.1}, "learning_rate ends at 0.1, above start_lr, which is 0.001; give a stop_lr of at"),
        ({"type": "cosine", "stop_lr": None, "stop_lr_ratio": 2}, "ends at 0.002, above start_lr"),
        ({"type": "wsd", "stop_lr": None, "start_lr": 1e-9}, "ends at 5e-08, above start_lr"),
        ({"type": "wsd", "stop_lr": 0.0, "decay_type": "linear"}, "type .wsd. needs a stop_lr above 0"),
        ({"decay_steps": 0}, "learning_rate.decay_steps is 0; expected a positive integer"),
        ({"decay_rate": 2}, "learning_rate.decay_rate is 2; expected a number above 0 and up to 1"),
        ({"start_lr": "abc"}, "learning_rate.start_lr is 'abc'; expected a positive number"),
    ],
)
def test_contradicting_learning_rates_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _schedule(1000, **given)


@pytest.mark.parametrize("n_steps", [0, -5])
def test_a_training_without_steps_has_no_schedule(n_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"warm-up of 0 steps in a training of {n_steps}"):
        _schedule(n_steps)


@pytest.mark.parametrize("kind", ["exp", "cosine", "wsd"])
def test_the_last_learning_rate_has_a_default(kind: str) -> None:
    schedule = _schedule(1000, type=kind, stop_lr=None)
    assert schedule == _schedule(1000, type=kind, stop_lr=5e-8)
    assert _schedule(1000, type=kind, stop_lr=None, stop_lr_ratio=0.1).stop == pytest.approx(1e-4)
