"""Sections of a training input as tables: key -> default. What is not in a table is unknown.

The tables are those of deepmd-kit 3.2.0, so that a completed configuration is what that program stores. What
values a key takes is in one table for all sections, `KINDS`: a key means the same wherever it stands.
"""

from __future__ import annotations

import copy
import operator
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, nearest
from ..models.activations import activation

__all__ = ["DESCRIPTORS", "KINDS", "NEIGHBOR_COUNTS", "Kind", "Section", "complete"]

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


# ---- values ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Values that a key takes."""

    #: what follows "expected"
    words: str
    accepts: Callable[[Any], bool]

    def check(self, value: object, where: str) -> None:
        """Refuse a value of another kind.

        Raises
        ------
        ConfigError
            Names the place, the value, and what is allowed.
        """
        if not self.accepts(value):
            raise ConfigError(f"{where} is {value!r}; expected {self.words}")


def _real(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # neither NaN nor infinite


def _whole(value: object) -> bool:
    return isinstance(value, int) and _real(value)


def _list(value: object, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


def _index(value: Any) -> bool:
    return _whole(value) and value >= 0


def _pair(value: Any) -> bool:
    return _list(value, _index) and len(value) == 2


def _energy(value: Any) -> bool:
    return value is None or _real(value) or (_list(value, _real) and len(value) == 1)


def _count(value: Any) -> bool:
    if isinstance(value, str):
        automatic = re.fullmatch(r"auto(:(\d+(\.\d*)?))?", value)
        return automatic is not None and float(automatic[2] or 1) > 0
    return _whole(value) and value > 0


def _batch_size(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"auto|(auto|max|filter):[1-9]\d*", value) is not None
    return all(_whole(n) and n > 0 for n in (value or [None] if isinstance(value, list) else [value]))


def _blocks(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    block = r";\d+:\d+:\d+\.?\d*([eE]-?\d+)?"
    return re.fullmatch(rf"prob_uniform|prob_sys_size({block})*", value) is not None


def _activation(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        activation(value)
        return _real(float(value.partition(":")[2] or 0))
    except (UnsupportedModelError, ValueError, OverflowError):  # "silut:x", and a threshold far too low
        return False


ANYTHING = Kind("anything", lambda _: True)
BOOL = Kind("true or false", lambda x: isinstance(x, bool))
NAME = Kind("a name", lambda x: isinstance(x, str) and x != "")
NAMES = Kind("a list of names", lambda x: _list(x, NAME.accepts))
SECTION = Kind("a section {...}", lambda x: isinstance(x, Mapping))
NUMBER = Kind("a number", _real)
POSITIVE = Kind("a positive number", lambda x: _real(x) and x > 0)
NOT_NEGATIVE = Kind("a number that is not negative", lambda x: _real(x) and x >= 0)
SHARE = Kind("a number above 0 and up to 1", lambda x: _real(x) and 0 < x <= 1)
DECAY = Kind("a number from 0 to below 1", lambda x: _real(x) and 0 <= x < 1)
SIZE = Kind("a positive integer", lambda x: _whole(x) and x > 0)
SIZE_OR_ZERO = Kind("an integer that is not negative", _index)
SIZES = Kind("a list of positive integers", lambda x: bool(x) and _list(x, SIZE.accepts))
SEED = Kind("an integer that is not negative, or null", lambda x: x is None or _index(x))
INDICES = Kind("a list of indices into type_map", lambda x: _list(x, _index))
PAIRS = Kind("a list of pairs of indices into type_map, as in [[0, 1]]", lambda x: _list(x, _pair))
ENERGIES = Kind("a list of numbers, one per entry of type_map, or null for none", lambda x: _list(x, _energy))
NUMBERS = Kind("a list of numbers", lambda x: _list(x, _real))
WEIGHTS = Kind("a list of numbers that are not negative", lambda x: _list(x, NOT_NEGATIVE.accepts))
COUNT = Kind("a positive integer, 'auto' or 'auto:FACTOR'", _count)
COUNTS = Kind(
    "a positive integer, a list of one per entry of type_map, 'auto' or 'auto:FACTOR'",
    lambda x: _count(x) or (_list(x, _index) and sum(x) > 0),
)
#: keys of `training` that change no number here: where files go, what is printed, how it is compiled
WITHOUT_EFFECT = (
    "disp_file",
    "save_dir",
    "disp_training",
    "time_training",
    "disp_avg",
    "profiling",
    "profiling_file",
    "enable_profiler",
    "tensorboard",
    "tensorboard_log_dir",
    "tensorboard_freq",
    "neighbor_graph_method",
    "enable_compile",
    "stat_file",
    "stat_file_mode",
)
#: key -> values that it takes, in any section. A key whose default is true or false takes these; one whose
#: default is null takes null, too; and one with a list of supported values (`Section.only`) takes these
KINDS: dict[str, Kind] = {
    key: kind
    for kind, keys in (
        (
            POSITIVE,
            "rcut three_body_rcut e_rcut a_rcut ln_eps scaling_factor temperature sel_reduce_factor start_lr "
            "numb_epoch",
        ),
        (
            NOT_NEGATIVE,
            "rcut_smth three_body_rcut_smth e_rcut_smth a_rcut_smth env_protection fix_stat_std "
            "start_pref_e start_pref_f start_pref_v limit_pref_e limit_pref_f limit_pref_v stop_lr "
            "stop_lr_ratio warmup_start_factor weight_decay gradient_max_norm",
        ),
        (NUMBER, "update_residual bridging_r_inner bridging_r_outer"),
        (SHARE, "decay_rate decay_phase_ratio"),
        (DECAY, "warmup_ratio adam_beta1 adam_beta2 ema_decay"),
        (
            SIZE,
            "axis_neuron attn tebd_dim nlayers g1_dim g2_dim attn1_hidden attn1_nhead attn2_hidden "
            "attn2_nhead n_dim e_dim a_dim a_compress_e_rate n_multi_edge_message data_stat_nbatch "
            "data_bias_nsample decay_steps numb_btch numb_steps disp_freq save_freq max_ckpt_keep "
            "ema_ckpt_keep",
        ),
        (SIZE_OR_ZERO, "attn_layer a_compress_rate numb_fparam numb_aparam dim_case_embd warmup_steps"),
        (BOOL, "stripped_type_embedding"),
        (SIZES, "neuron three_body_neuron"),
        (COUNT, "nsel three_body_sel e_sel a_sel"),
        (COUNTS, "sel"),
        (SEED, "seed"),
        (PAIRS, "exclude_types pair_exclude_types"),
        (INDICES, "atom_exclude_types"),
        (ENERGIES, "atom_ener"),
        (NUMBERS, "default_fparam"),
        (WEIGHTS, "sys_probs"),
        (NAME, "type precision"),
        (NAMES, "type_map model_branch_alias"),
        (SECTION, "loss loss_dict validating optimizer data_dict model_prob num_epoch_dict info"),
        # read elsewhere, which refuses what is wrong
        (
            ANYTHING,
            "model descriptor fitting_net learning_rate training training_data validation_data list repinit "
            "repformer repflow save_ckpt",
        ),
        (ANYTHING, "huber_delta"),  # without effect
    )
    for key in keys.split()
} | {
    **dict.fromkeys(WITHOUT_EFFECT, ANYTHING),
    "activation_function": Kind(
        "an activation function: tanh, relu, relu6, sigmoid, softplus, gelu, gelu_tf, silu, none, linear, "
        "silut[:threshold]",
        _activation,
    ),
    "default_chg_spin": Kind("charge and spin, as in [0, 1]", lambda x: _list(x, _real) and len(x) == 2),
    "preset_out_bias": Kind(
        "{'energy': [...]}, a number or null per entry of type_map",
        lambda x: isinstance(x, Mapping) and x.keys() == {"energy"} and _list(x["energy"], _energy),
    ),
    "systems": Kind("a path or a list of paths", lambda x: bool(x) and (NAME.accepts(x) or NAMES.accepts(x))),
    "batch_size": Kind(
        "a positive integer, a list of one per system, 'auto', 'auto:N', 'max:N' or 'filter:N'", _batch_size
    ),
    "auto_prob": Kind("prob_uniform or prob_sys_size[;start:end:weight]...", _blocks),
}
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
            kind = BOOL if isinstance(default, bool) else KINDS[name]
            kind.check(found[name], f"{path}{name}")
    for name, symbol, other in section.order:
        bound = found[other][-1] if isinstance(found[other], list) else found[other]
        words, holds = _COMPARISONS[symbol]
        if not isinstance(found[name], str) and not isinstance(bound, str) and not holds(found[name], bound):
            raise ConfigError(f"{path}{name} is {found[name]!r}; expected {words} {other}, which is {bound}")
    return found


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

_REPINIT = {
    "rcut": REQUIRED,
    "rcut_smth": REQUIRED,
    "nsel": REQUIRED,
    "neuron": [25, 50, 100],
    "axis_neuron": 16,
    "tebd_dim": 8,
    "tebd_input_mode": "concat",
    "set_davg_zero": True,
    "activation_function": "tanh",
    "type_one_side": False,
    "resnet_dt": False,
    "use_three_body": False,
    "three_body_neuron": [2, 4, 8],
    "three_body_rcut": 4.0,
    "three_body_rcut_smth": 0.5,
    "three_body_sel": 40,
}
_REPFORMER = {
    "rcut": REQUIRED,
    "rcut_smth": REQUIRED,
    "nsel": REQUIRED,
    "nlayers": 3,
    "g1_dim": 128,
    "g2_dim": 16,
    "axis_neuron": 4,
    "direct_dist": False,
    "update_g1_has_conv": True,
    "update_g1_has_drrd": True,
    "update_g1_has_grrg": True,
    "update_g1_has_attn": True,
    "update_g2_has_g1g1": True,
    "update_g2_has_attn": True,
    "use_sqrt_nnei": True,
    "g1_out_conv": True,
    "g1_out_mlp": True,
    "update_h2": False,
    "attn1_hidden": 64,
    "attn1_nhead": 4,
    "attn2_hidden": 16,
    "attn2_nhead": 4,
    "attn2_has_gate": False,
    "activation_function": "tanh",
    "update_style": "res_avg",
    "update_residual": 0.001,
    "update_residual_init": "norm",
    "set_davg_zero": True,
    "trainable_ln": True,
    "ln_eps": None,
}
_REPFLOW = {
    "n_dim": 128,
    "e_dim": 64,
    "a_dim": 64,
    "nlayers": 6,
    "e_rcut": REQUIRED,
    "e_rcut_smth": REQUIRED,
    "e_sel": REQUIRED,
    "a_rcut": REQUIRED,
    "a_rcut_smth": REQUIRED,
    "a_sel": REQUIRED,
    "a_compress_rate": 0,
    "a_compress_e_rate": 1,
    "a_compress_use_split": False,
    "n_multi_edge_message": 1,
    "axis_neuron": 4,
    "fix_stat_std": 0.3,
    "skip_stat": False,
    "update_angle": True,
    "update_style": "res_residual",
    "update_residual": 0.1,
    "update_residual_init": "const",
    "optim_update": True,
    "smooth_edge_update": False,
    "edge_init_use_dist": False,
    "use_exp_switch": False,
    "use_dynamic_sel": False,
    "sel_reduce_factor": 10.0,
    "sequential_update": False,
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
    refused=_unsupported("layer_name case_film_embd"),
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
