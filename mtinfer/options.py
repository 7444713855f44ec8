"""Options of models as tables: key -> default. What is not in a table is unknown.

The tables are those of deepmd-kit 3.2.0, so that a completed configuration is what that program stores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .checkpoint.refusals import descriptors
from .descriptor_kinds import kind_of
from .models.dpa2 import REPINIT_DEFAULTS
from .models.layers import UPDATE_STYLES
from .models.repflow import ALIASES, RepflowOptions
from .models.repformer import RepformerOptions

__all__ = [
    "ABSENT",
    "DESCRIPTORS",
    "FITTING",
    "HEAD",
    "HYBRID",
    "NEIGHBOR_COUNTS",
    "REQUIRED",
    "Section",
    "unknown_options",
    "unsupported",
]

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
    #: (key, comparison, other key); of a list, the last entry is compared
    order: Collection[tuple[str, str, str]] = ()


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


_UNSUPPORTED = "is not supported; leave it out"


def unsupported(keys: str) -> dict[str, str]:
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
_STYLES = {"update_style": UPDATE_STYLES}
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
        refused=unsupported("spin"),
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
                ALIASES,
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
#: their names
COUNT_KEYS = frozenset(key for counts in NEIGHBOR_COUNTS.values() for _, key, _ in counts)
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
    refused=unsupported("layer_name case_film_embd exclude_types"),
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
        "finetune_head": ABSENT,
        "info": {},
        "bridging_method": "None",
        "bridging_r_inner": 0.5,
        "bridging_r_outer": 0.8,
    },
    only={"type": ("standard",), "bridging_method": ("None",), "data_stat_protect": (0.01,)},
    refused={
        **unsupported("modifier spin hessian_mode compress use_srtab smin_alpha sw_rmin sw_rmax"),
        "type_embedding": "is not supported; a descriptor has its own embedding of types (tebd_dim)",
    },
)
