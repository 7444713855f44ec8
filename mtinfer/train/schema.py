"""Sections of a training input as tables, as `options` has those of the model."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, nearest
from ..options import ABSENT, REQUIRED, Section, unsupported
from .values import BOOL, VALIDATING_WITHOUT_EFFECT, VALUES, WITHOUT_EFFECT

__all__ = ["complete"]

#: how two keys must compare, in symbols -> in words, and the comparison
_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "<": ("less than", operator.lt),
    "<=": ("at most", operator.le),
}


def complete(given: object, section: Section, where: str) -> dict[str, Any]:
    """Return a section with aliases resolved and defaults filled in.

    Parameters
    ----------
    given
        section as read; keys that begin with an underscore are comments.
    where
        path of the section in the input, for error messages.

    Raises
    ------
    ConfigError
        For an unknown key, a missing one, or a value that is wrong or not supported.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected a section {{...}}")
    path = "" if section is TOP else f"{where}."
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = section.aliases.get(key, key)
        if key.startswith("_"):
            continue
        if name in section.refused:
            raise ConfigError(f"{key!r} in {where} {section.refused[name]}")
        if name not in section.defaults:
            hint = (
                nearest(key, section.defaults)
                or nearest(key, section.aliases)
                or f"; known are {', '.join(sorted(section.defaults))}"
            )
            raise ConfigError(f"unknown key {key!r} in {where}{hint}")
        if name in found:
            raise ConfigError(f"{where} has {name!r} under two names, of which one is {key!r}; give it once")
        if name in section.inner:
            value = complete(value, section.inner[name], f"{path}{name}")
        found[name] = copy.deepcopy(value)
    for name, default in section.defaults.items():
        if name not in found and default is REQUIRED:
            raise ConfigError(f"{where} lacks the key {name!r}, which has no default")
        if default is not ABSENT:
            found.setdefault(name, copy.deepcopy(default))
    for name, allowed in section.only.items():
        if name in found and found[name] not in allowed:
            raise ConfigError(
                f"{path}{name} is {found[name]!r}, which is not supported; supported: "
                f"{', '.join(map(repr, allowed))}"
            )
    for name, default in section.defaults.items():
        if name in found and name not in section.only and not (found[name] is None and default is None):
            kind = BOOL if isinstance(default, bool) else VALUES[name]
            kind.check(found[name], f"{path}{name}")
    for name, symbol, other in section.order:
        bound = found[other][-1] if isinstance(found[other], list) else found[other]
        words, holds = _COMPARISONS[symbol]
        if not isinstance(found[name], str) and not isinstance(bound, str) and not holds(found[name], bound):
            raise ConfigError(f"{path}{name} is {found[name]!r}; expected {words} {other}, which is {bound}")
    return found


LOSS = Section(
    {
        "type": "ener",
        "start_pref_e": 0.02,
        "limit_pref_e": 1.0,
        "start_pref_f": 1000.0,
        "limit_pref_f": 1.0,
        "start_pref_v": 0.0,
        "limit_pref_v": 0.0,
        "intensive_ener_virial": False,
        "loss_func": "mse",
        "use_huber": False,
        "huber_delta": 0.01,
        "relative_f": None,
        "enable_atom_ener_coeff": False,
        "f_use_norm": False,
        "numb_generalized_coord": 0,
        "use_default_pf": False,
        **{f"{edge}_pref_{label}": 0.0 for edge in ("start", "limit") for label in ("h", "ae", "pf", "gf")},
    },
    only={
        "type": ("ener",),
        "loss_func": ("mse",),
        "use_huber": (False,),
        "relative_f": (None,),
        "enable_atom_ener_coeff": (False,),
        "f_use_norm": (False,),
        "numb_generalized_coord": (0,),
        "use_default_pf": (False,),
        **{f"{edge}_pref_{label}": (0,) for edge in ("start", "limit") for label in ("h", "ae", "pf", "gf")},
    },
)
LEARNING_RATE = Section(
    {
        "type": "exp",
        "start_lr": REQUIRED,
        "stop_lr": None,
        "stop_lr_ratio": None,
        "warmup_steps": 0,
        "warmup_ratio": None,
        "warmup_start_factor": 0.0,
        "scale_by_worker": "none",
        "decay_steps": 5000,
        "decay_rate": None,
        "smooth": False,
        "decay_phase_ratio": 0.1,
        "decay_type": "inverse_linear",
    },
    only={
        "type": ("exp", "cosine", "wsd"),
        "decay_type": ("inverse_linear", "cosine", "linear"),
        "scale_by_worker": ("linear", "sqrt", "none"),
    },
)
#: keys that one type of schedule alone reads
KEYS_OF_SCHEDULES = {
    "exp": ("decay_steps", "decay_rate", "smooth"),
    "wsd": ("decay_phase_ratio", "decay_type"),
}
#: deepmd-kit documents a weight decay of 0.001 for AdamW, and fills in 0 before that counts
OPTIMIZERS = {
    name: Section(
        {"type": name, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0},
        {"beta1": "adam_beta1", "beta2": "adam_beta2"},
    )
    for name in ("Adam", "AdamW")
}
_DATA: dict[str, Any] = {
    "systems": REQUIRED,
    "rglob_patterns": None,
    "batch_size": "auto",
    "auto_prob": "prob_sys_size",
    "sys_probs": None,
}
_DATA_ALIASES = {"auto_prob_style": "auto_prob", "sys_weights": "sys_probs"}
#: keys of data that say how often each system is drawn
PROBABILITIES = ("auto_prob", "sys_probs", *_DATA_ALIASES)
#: of older versions
_DATA_REFUSED = {
    "set_prefix": "has no effect: folders of frames are called set.*; leave it out",
    "numb_test": "is no longer a setting; give validation_data, with numb_btch batches",
}
TRAINING_DATA = Section(
    {**_DATA, "min_pair_dist": 0.0},
    _DATA_ALIASES,
    {"rglob_patterns": (None,), "min_pair_dist": (0,)},
    refused=_DATA_REFUSED,
)
VALIDATION_DATA = Section(
    {**_DATA, "numb_btch": 1},
    {**_DATA_ALIASES, "numb_batch": "numb_btch"},
    {"rglob_patterns": (None,)},
    refused=_DATA_REFUSED,
)
TASK_DATA = Section(
    {"training_data": REQUIRED, "validation_data": None, "stat_file": None, "stat_file_mode": None}
)
TRAINING = Section(
    {
        "training_data": None,
        "validation_data": None,
        "data_dict": None,
        "model_prob": {},
        "num_epoch_dict": {},
        "numb_steps": None,
        "numb_epoch": None,
        "seed": 0,
        "disp_freq": 1000,
        "save_freq": 1000,
        "save_ckpt": "model.ckpt",
        "max_ckpt_keep": 5,
        "ckpt_keep_ratio": None,
        "enable_ema": False,
        "ema_decay": 0.999,
        "ema_ckpt_keep": None,
        "change_bias_after_training": False,
        "gradient_max_norm": 0.0,
        "acc_freq": 1,
        "zero_stage": 0,
        "enable_tf32": False,
        "mixed_precision": None,
        **dict.fromkeys(WITHOUT_EFFECT, ABSENT),
    },
    {
        **dict.fromkeys(("stop_batch", "num_step", "num_steps", "numb_step"), "numb_steps"),
        **dict.fromkeys(("num_epochs", "num_epoch", "numb_epochs"), "numb_epoch"),
    },
    {
        "ckpt_keep_ratio": (None,),
        "change_bias_after_training": (False,),
        "acc_freq": (1,),
        "zero_stage": (0,),
        "enable_tf32": (False,),
        "mixed_precision": (None,),
        "enable_profiler": (False,),
        "tensorboard": (False,),
    },
    refused={
        **_DATA_REFUSED,
        "opt_type": "belongs in the section optimizer, as 'type'",
        **dict.fromkeys(("adam_beta1", "adam_beta2", "weight_decay"), "belongs in the section optimizer"),
        **dict.fromkeys(
            ("warmup_steps", "warmup_ratio", "warmup_start_factor"), "belongs in the section learning_rate"
        ),
        **dict.fromkeys(
            ("systems", "batch_size", "auto_prob", "sys_probs"), "belongs in the section training_data"
        ),
    },
)
VALIDATING = Section(
    {
        "full_validation": False,
        "ema_full_validation": False,
        **dict.fromkeys(VALIDATING_WITHOUT_EFFECT, ABSENT),
    },
    only={"full_validation": (False,), "ema_full_validation": (False,)},
)
TOP = Section(
    {
        "model": REQUIRED,
        "learning_rate": REQUIRED,
        "loss": None,
        "loss_dict": None,
        "training": REQUIRED,
        "optimizer": {},
        "validating": None,
    },
    refused=unsupported("nvnmd"),
)
