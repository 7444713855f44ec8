"""Learning rate by step: exponential, cosine and warm-up-stable-decay, each after a linear warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

__all__ = ["Schedule"]

#: last learning rate of an input that says nothing of it, as in deepmd-kit
_STOP = 5e-8


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every step; all fields are settled numbers."""

    kind: str
    start: float
    stop: float
    n_steps: int
    n_warmup: int
    #: learning rate at step 0 of the warm-up
    warmup_start: float
    #: exp: steps between two decays, factor of one decay, whether to interpolate
    decay_steps: int
    decay_rate: float
    smooth: bool
    #: wsd: steps of the last phase, and its form
    n_decay: int
    decay_type: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], n_steps: int) -> Schedule:
        """Settle a completed section `learning_rate`.

        Raises
        ------
        ConfigError
            For contradicting or missing entries.
        """
        start = float(config["start_lr"])
        stop, ratio = config["stop_lr"], config["stop_lr_ratio"]
        if stop is not None and ratio is not None:
            raise ConfigError("learning_rate has 'stop_lr' and 'stop_lr_ratio'; give one of them")
        if stop is None:
            stop = _STOP if ratio is None else start * ratio
        stop = float(stop)
        if stop > start:
            raise ConfigError(
                f"learning_rate ends at {stop:g}, above start_lr, which is {start:g}; give a stop_lr of at "
                "most start_lr"
            )
        if config["warmup_ratio"] is not None and config["warmup_steps"]:
            raise ConfigError("learning_rate has 'warmup_steps' and 'warmup_ratio'; give one of them")
        ratio = config["warmup_ratio"]
        n_warmup = int(config["warmup_steps"]) if ratio is None else int(float(ratio) * n_steps)
        if not 0 <= n_warmup < n_steps:
            raise ConfigError(f"learning_rate: warm-up of {n_warmup} steps in a training of {n_steps}")
        total = n_steps - n_warmup
        decay_steps, decay_rate = _decay(config, start, stop, total)
        n_decay = max(1, min(int(float(config["decay_phase_ratio"]) * n_steps), total))
        if config["type"] == "wsd" and stop <= 0.0:
            raise ConfigError("learning_rate: type 'wsd' needs a stop_lr above 0")
        return cls(
            kind=config["type"],
            start=start,
            stop=stop,
            n_steps=n_steps,
            n_warmup=n_warmup,
            warmup_start=float(config["warmup_start_factor"]) * start,
            decay_steps=decay_steps,
            decay_rate=decay_rate,
            smooth=bool(config["smooth"]),
            n_decay=n_decay,
            decay_type=config["decay_type"],
        )

    def __call__(self, step: int) -> float:
        """Learning rate of the step with this 0-based index."""
        if step < self.n_warmup:
            return self.warmup_start + (self.start - self.warmup_start) * (step / self.n_warmup)
        step -= self.n_warmup
        return {"exp": self._exp, "cosine": self._cosine, "wsd": self._wsd}[self.kind](step)

    @property
    def _total(self) -> int:
        return self.n_steps - self.n_warmup

    def _exp(self, step: int) -> float:
        exponent = step / self.decay_steps if self.smooth else step // self.decay_steps
        return max(self.start * self.decay_rate**exponent, self.stop)

    def _cosine(self, step: int) -> float:
        if step >= self._total:
            return self.stop
        return self.stop + (self.start - self.stop) * 0.5 * (1.0 + math.cos(math.pi * step / self._total))

    def _wsd(self, step: int) -> float:
        progress = min(max((step - (self._total - self.n_decay)) / self.n_decay, 0.0), 1.0)
        if self.decay_type == "inverse_linear":
            return 1.0 / (progress / self.stop + (1.0 - progress) / self.start)
        left = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.decay_type == "cosine" else 1.0 - progress
        return self.stop + (self.start - self.stop) * left


def _decay(config: Mapping[str, Any], start: float, stop: float, total: int) -> tuple[int, float]:
    """Settle period and factor of the exponential decay."""
    period = int(config["decay_steps"])
    if config["decay_rate"] is not None:
        return period, float(config["decay_rate"])
    if period >= total:
        period = 100 if total // 10 > 100 else total // 100 + 1
    return period, math.exp(math.log(max(stop, 1e-10) / start) / (total / period))
