"""Sections of a training input as tables: key -> default. What is not in a table is unknown.

The tables are those of deepmd-kit 3.2.0, so that a completed configuration is what that program stores.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..checkpoint.refusals import descriptors
from ..descriptor_kinds import kind_of
from ..errors import ConfigError, nearest
from ..models.dpa2 import REPINIT_DEFAULTS
from ..models.repflow import RepflowOptions
from ..models.repformer import RepformerOptions
from .values import BOOL, VALIDATING_WITHOUT_EFFECT, VALUES, WITHOUT_EFFECT

__all__ = ["DESCRIPTORS", "NEIGHBOR_COUNTS", "Section", "complete", "unknown_options"]

#: default of a key that must be given
REQUIRED: Any = object()
#: default of a key that stays absent where it is not given
ABSENT: Any = object()


@dataclass(frozen=True)
class Section:
    """Keys of one section, with their defaults."""

    defaults: Mapping[str, Any]
    #: other spelling -> key
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: key -> the only values that are supported
    only: Mapping[str, Collection[Any]] = field(default_factory=dict)
    #: sections in this one
    inner: Mapping[str, Section] = field(default_factory=dict)
    #: key that deepmd-kit knows -> where that setting belongs, or why it is not taken
    refused: Mapping[str, str] = field(default_factory=dict)
    #: key, how it must compare, and to which key; of a list the last entry counts
    order: Collection[tuple[str, str, str]] = ()


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


def unknown_options(head: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is set in the configuration of a head that deepmd-kit 3.2.0 does not have.

    Options that are off (false, zero, empty) are passed over.
    """
    yield from _unknown(head, HEAD, "")
    yield from _unknown(head["fitting_net"], FITTING, "fitting_net.")
    sections = {**DESCRIPTORS, "hybrid": HYBRID}
    for descriptor in descriptors(head):
        yield from _unknown(descriptor, sections[kind_of(descriptor)], "descriptor.")


def _unknown(given: Mapping[str, Any], section: Section, path: str) -> Iterator[str]:
    for key, value in given.items():
        name = section.aliases.get(key, key)
        if name in section.inner and isinstance(value, Mapping):
            yield from _unknown(value, section.inner[name], f"{path}{key}.")
        elif value and name not in section.defaults and name not in section.refused:
            yield f"{path}{key}"


# ---- sections ----------------------------------------------------------------------------------------

_UNSUPPORTED = "is not supported; leave it out"


def _unsupported(keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), _UNSUPPORTED)


_CUTOFF, _AXIS_OF_NET = ("rcut_smth", "<", "rcut"), ("axis_neuron", "<=", "neuron")

_SHAPE = {"rcut": 6.0, "rcut_smth": 0.5, "neuron": [10, 20, 40], "axis_neuron": 4}
_COMMON: dict[str, Any] = {"trainable": True, "seed": ABSENT, "exclude_types": [], "env_protection": 0.0}
_PAIR = {"sel": REQUIRED, **_SHAPE, "activation_function": "tanh", "resnet_dt": False}
_TEBD = {"use_econf_tebd": False, "use_tebd_bias": False}
_AXIS = {"n_axis_neuron": "axis_neuron"}

_ATTENTION = {
    **_PAIR,
    "type_one_side": False,
    "precision": "default",
    **_COMMON,
    "lmax": ABSENT,
    "attn": 128,
    "attn_layer": 2,
    "attn_dotr": True,
    "attn_mask": False,
    "trainable_ln": True,
    "ln_eps": None,
    "tebd_dim": 8,
    **_TEBD,
    "scaling_factor": 1.0,
    "normalize": True,
    "temperature": ABSENT,
    "concat_output_tebd": True,
}
_ONLY_ATTENTION = {"attn_mask": (False,), "lmax": (1,)}


def _of_options(options: type, required: str = "") -> dict[str, Any]:
    """Defaults of a model's options; those without one must be given, and so must `required`."""
    defaults = {f.name: REQUIRED if f.default is MISSING else f.default for f in fields(options)}
    return defaults | dict.fromkeys(required.split(), REQUIRED)


_REPINIT = {
    **dict.fromkeys(("rcut", "rcut_smth", "nsel"), REQUIRED),
    **{key: list(v) if isinstance(v, tuple) else v for key, v in REPINIT_DEFAULTS.items()},
    "set_davg_zero": True,
}
_REPFORMER = {
    **_of_options(RepformerOptions),
    "update_residual": 0.001,
    "update_residual_init": "norm",
    "set_davg_zero": True,
    "trainable_ln": True,
}
_REPFLOW = {
    **_of_options(RepflowOptions, "e_rcut e_rcut_smth e_sel a_rcut a_rcut_smth a_sel"),
    "fix_stat_std": 0.3,
    "skip_stat": False,
    "update_residual": 0.1,
    "update_residual_init": "const",
    "optim_update": True,
}
_INIT = {"update_residual_init": ("norm", "const")}
_STYLES = {"update_style": ("res_avg", "res_incr", "res_residual")}
_MODES = {"tebd_input_mode": ("concat", "strip")}

#: descriptor `type` -> its keys
DESCRIPTORS: dict[str, Section] = {
    "se_e2_a": Section(
        {
            "type": REQUIRED,
            **_PAIR,
            "type_one_side": False,
            "precision": "default",
            **_COMMON,
            "set_davg_zero": False,
        },
        _AXIS,
        order=(_CUTOFF, _AXIS_OF_NET),
        refused=_unsupported("spin"),
    ),
    "se_atten": Section(
        {
            "type": REQUIRED,
            **_ATTENTION,
            "stripped_type_embedding": None,
            "smooth_type_embedding": False,
            "set_davg_zero": True,
            "tebd_input_mode": "concat",
        },
        {**_AXIS, "smooth_type_embdding": "smooth_type_embedding"},
        {**_ONLY_ATTENTION, **_MODES},
        order=(_CUTOFF, _AXIS_OF_NET),
    ),
    "se_atten_v2": Section(
        {"type": REQUIRED, **_ATTENTION, "set_davg_zero": False},
        _AXIS,
        _ONLY_ATTENTION,
        order=(_CUTOFF, _AXIS_OF_NET),
    ),
    "dpa2": Section(
        {
            "type": REQUIRED,
            "repinit": REQUIRED,
            "repformer": REQUIRED,
            "concat_output_tebd": True,
            "precision": "default",
            "smooth": True,
            **_COMMON,
            "add_tebd_to_repinit_out": False,
            **_TEBD,
        },
        {"repformer_add_type_ebd_to_seq": "add_tebd_to_repinit_out"},
        inner={
            "repinit": Section(
                _REPINIT,
                only=_MODES,
                order=(
                    _CUTOFF,
                    _AXIS_OF_NET,
                    ("three_body_rcut_smth", "<", "three_body_rcut"),
                ),
            ),
            "repformer": Section(
                _REPFORMER,
                only={**_INIT, **_STYLES},
                order=(_CUTOFF, ("axis_neuron", "<=", "g1_dim"), ("axis_neuron", "<=", "g2_dim")),
            ),
        },
    ),
    "dpa3": Section(
        {
            "type": REQUIRED,
            "repflow": REQUIRED,
            "concat_output_tebd": False,
            "add_chg_spin_ebd": False,
            "default_chg_spin": None,
            "activation_function": "silu",
            "precision": "default",
            **_COMMON,
            **_TEBD,
            "use_loc_mapping": True,
        },
        inner={
            "repflow": Section(
                _REPFLOW,
                {"edge_use_dist": "edge_init_use_dist", "use_env_envelope": "use_exp_switch"},
                {**_INIT, **_STYLES},
                order=(
                    ("e_rcut_smth", "<", "e_rcut"),
                    ("a_rcut_smth", "<", "a_rcut"),
                    ("a_rcut", "<=", "e_rcut"),
                    ("a_sel", "<=", "e_sel"),
                    ("axis_neuron", "<=", "n_dim"),
                    ("axis_neuron", "<=", "e_dim"),
                ),
            )
        },
    ),
}
#: descriptor `type` -> its neighbour counts: section (None: the descriptor itself), key, key of the cutoff
NEIGHBOR_COUNTS: dict[str, tuple[tuple[str | None, str, str], ...]] = {
    **dict.fromkeys(("se_e2_a", "se_atten", "se_atten_v2"), ((None, "sel", "rcut"),)),
    "dpa2": (
        ("repinit", "nsel", "rcut"),
        ("repinit", "three_body_sel", "three_body_rcut"),
        ("repformer", "nsel", "rcut"),
    ),
    "dpa3": (("repflow", "e_sel", "e_rcut"), ("repflow", "a_sel", "a_rcut")),
}
HYBRID = Section({"type": REQUIRED, "list": REQUIRED})

FITTING = Section(
    {
        "type": "ener",
        "numb_fparam": 0,
        "numb_aparam": 0,
        "default_fparam": None,
        "dim_case_embd": 0,
        "neuron": [120, 120, 120],
        "activation_function": "tanh",
        "precision": "default",
        "resnet_dt": True,
        "trainable": True,
        "rcond": None,
        "seed": ABSENT,
        "atom_ener": [],
        "use_aparam_as_mask": False,
    },
    {"n_neuron": "neuron"},
    {"type": ("ener",), "rcond": (None,)},
    refused=_unsupported("layer_name case_film_embd exclude_types"),
)
HEAD = Section(
    {
        "type_map": REQUIRED,
        "descriptor": REQUIRED,
        "fitting_net": REQUIRED,
        "data_stat_nbatch": 10,
        "data_stat_protect": 0.01,
        "data_bias_nsample": 10,
        "pair_exclude_types": [],
        "atom_exclude_types": [],
        "preset_out_bias": None,
        "srtab_add_bias": True,
        "type": "standard",
        "model_branch_alias": [],
        "info": {},
        "bridging_method": "None",
        "bridging_r_inner": 0.5,
        "bridging_r_outer": 0.8,
    },
    only={"type": ("standard",), "bridging_method": ("None",), "data_stat_protect": (0.01,)},
    refused={
        **_unsupported("modifier spin hessian_mode compress use_srtab smin_alpha sw_rmin sw_rmax"),
        "type_embedding": "is not supported; a descriptor has its own embedding of types (tebd_dim)",
        "finetune_head": "is not supported; give --finetune CHECKPOINT --head HEAD to mtinfer train",
    },
)
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
OPTIMIZERS = {
    name: Section(
        {"type": name, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": decay},
        {"beta1": "adam_beta1", "beta2": "adam_beta2"},
    )
    for name, decay in (("Adam", 0.0), ("AdamW", 0.001))
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
    refused=_unsupported("nvnmd"),
)
