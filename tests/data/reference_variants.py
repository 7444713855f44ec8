"""The table of small random-weight checkpoints that ``make_reference.py`` makes, by what they exercise."""

from dataclasses import dataclass, field
from typing import Any, Literal

Config = dict[str, Any]
Dialect = Literal["pt", "ptexpt"]
TYPE_MAP = ["O", "H", "C"]


@dataclass(frozen=True)
class Variant:
    """What one pair of files (one per dialect) exercises."""

    descriptor: Config
    fitting_net: Config
    #: parts that are one set of tensors for all heads; the others differ between the heads
    shared: tuple[str, ...] = ()
    #: head name -> keys of its model section; its descriptor and fitting_net are merged into the common ones
    heads: dict[str, Config] = field(default_factory=lambda: {"water": {}, "ice": {}})
    #: factor on the spread of weights and biases, to reach the saturated part of an activation
    spread: float = 1.0
    #: descriptors that a head or a hybrid descriptor names (``name:1``: only the type embedding is shared)
    named: dict[str, Config] = field(default_factory=dict)
    dialects: tuple[Dialect, ...] = ("pt", "ptexpt")


FIT: Config = {"neuron": [8, 8], "precision": "float64"}
CASE: Config = {**FIT, "dim_case_embd": 2}
CUTOFF: Config = {"rcut": 4.0, "rcut_smth": 1.0, "precision": "float64"}
SE_A: Config = {"type": "se_e2_a", **CUTOFF, "neuron": [3, 6], "axis_neuron": 3}
DPA1: Config = {
    **{"type": "dpa1", **CUTOFF, "sel": 40, "neuron": [3, 6], "axis_neuron": 3, "tebd_dim": 4},
    **{"attn": 5, "attn_layer": 0, "smooth_type_embedding": True},
}
SE_ATTEN_V2: Config = DPA1 | {"type": "se_atten_v2"}
del SE_ATTEN_V2["smooth_type_embedding"]
REPINIT: Config = {
    **{"rcut": 4.0, "rcut_smth": 1.0, "nsel": 32, "neuron": [2, 4], "axis_neuron": 3, "tebd_dim": 4},
    **{
        "three_body_rcut": 3.5,
        "three_body_rcut_smth": 2.0,
        "three_body_sel": 22,
        "three_body_neuron": [2, 4],
    },
}
REPFORMER: Config = {
    **{"rcut": 3.0, "rcut_smth": 1.5, "nsel": 16, "nlayers": 2, "g1_dim": 8, "g2_dim": 5, "axis_neuron": 2},
    **{"attn1_hidden": 3, "attn1_nhead": 2, "attn2_hidden": 4, "attn2_nhead": 3},
}
REPFLOW: Config = {
    **{"n_dim": 8, "e_dim": 6, "a_dim": 4, "nlayers": 2, "axis_neuron": 2},
    **{"e_rcut": 4.0, "e_rcut_smth": 2.5, "e_sel": 30, "a_rcut": 3.0, "a_rcut_smth": 2.0, "a_sel": 14},
}
BOTH = ("descriptor", "fitting_net")


def dpa2(*, repinit: Config | None = None, repformer: Config | None = None, **options: Any) -> Config:
    """Return a small DPA-2 descriptor; what is not given is deepmd-kit's default."""
    blocks = {"repinit": REPINIT | (repinit or {}), "repformer": REPFORMER | (repformer or {})}
    return {"type": "dpa2", "precision": "float64", **blocks, **options}


def dpa2_active(function: str, **repinit: Any) -> Config:
    """Return a small DPA-2 descriptor with this activation function in both of its stages."""
    stages: Config = {"activation_function": function}
    return dpa2(repinit=stages | repinit, repformer=stages | {"nsel": 10, "nlayers": 1})


def dpa3(repflow: Config, **options: Any) -> Config:
    """Return a small DPA-3 descriptor; what is not given is deepmd-kit's default."""
    return {"type": "dpa3", "precision": "float64", "repflow": REPFLOW | repflow, **options}


def hybrid(*members: str | Config) -> Config:
    """Return a hybrid descriptor of these members or names of members."""
    return {"type": "hybrid", "list": [*members]}


def activations(descriptor: str, fitting_net: str) -> Config:
    """Return the section of a head with these two activation functions."""
    return {
        "descriptor": {"activation_function": descriptor},
        "fitting_net": {"activation_function": fitting_net},
    }


# Neighbours within 4 Å: 21 to 28 in "pbc" (type by type up to 11, 7 and 13), 8 to 13 in "open" (4, 3, 7);
# within 3.5 Å: 13 to 18 and 5 to 13; within 3 Å: 9 to 13 and 4 to 11.
VARIANTS = {
    "sea3": Variant(
        SE_A
        | {"sel": [12, 8, 14], "type_one_side": True, "precision": "float32"}
        | {"activation_function": "silut:2.5"},
        FIT | {"precision": "float32", "activation_function": "silut:2.5"},
        shared=("descriptor",),
        heads={
            "water": {"pair_exclude_types": [[0, 2]], "atom_exclude_types": [1]},
            "ice": {"pair_exclude_types": [[1, 1], [0, 1]]},
        },
        spread=2.0,
    ),
    "sea4": Variant(
        SE_A | {"sel": [7, 4, 8], "type_one_side": False, "neuron": [2, 4]},
        CASE | {"neuron": [6, 6], "numb_fparam": 1},
        shared=BOTH,
    ),
    "dpa1s": Variant(
        DPA1 | {"tebd_input_mode": "strip", "use_econf_tebd": True, "attn_layer": 1, "attn_dotr": False},
        CASE,
        shared=BOTH,
    ),
    "dpa1t": Variant(
        DPA1
        | {"tebd_input_mode": "strip", "smooth_type_embedding": False, "type_one_side": True}
        | {"resnet_dt": True, "neuron": [2, 4, 4], "tebd_dim": 2, "sel": 12, "set_davg_zero": False},
        CASE,
        shared=("descriptor",),
    ),
    "dpa1x": Variant(
        DPA1
        | {"attn_layer": 2, "exclude_types": [[0, 1]], "sel": 18, "normalize": False}
        | {"scaling_factor": 0.7, "ln_eps": 1e-3},
        CASE,
    ),
    "dpa1y": Variant(
        DPA1
        | {"attn_layer": 1, "temperature": 0.8, "smooth_type_embedding": False}
        | {"activation_function": "silu", "concat_output_tebd": False},
        CASE,
    ),
    "dpa1c": Variant(
        DPA1 | {"tebd_dim": 6, "neuron": [13, 13], "axis_neuron": 2},
        FIT | {"atom_ener": [None, 1.5, None]},
        shared=("descriptor",),
    ),
    "dpa1p": Variant(DPA1 | {"attn_layer": 1, "precision": "float32"}, CASE | {"numb_aparam": 1}),
    "v2": Variant(
        SE_ATTEN_V2 | {"attn_layer": 1, "sel": 20, "set_davg_zero": False},
        CASE,
        shared=BOTH,
        heads={
            "water": {"pair_exclude_types": [[0, 2]], "atom_exclude_types": [1]},
            "ice": {"pair_exclude_types": [[1, 1]], "atom_exclude_types": [0, 2]},
        },
    ),
    "acts": Variant(
        DPA1 | {"neuron": [2, 4], "tebd_dim": 2, "sel": 28},
        FIT | {"neuron": [4, 4]},
        heads={
            "relu": activations("relu", "none"),
            "softplus": activations("softplus", "relu6"),
            "tanh": activations("Tanh", "GELU"),
            "gelu_tf": activations("gelu_tf", "silu"),
            "silut": activations("silut", "silut:1.5"),
            "custom_silu": activations("custom_silu:0.5", "custom_silu"),
            "linear": activations("linear", "sigmoid"),
        },
        spread=2.0,
    ),
    "dpa2c": Variant(
        dpa2(
            repinit={"nsel": 16, "type_one_side": True, "activation_function": "gelu"},
            repformer={
                **{"nsel": 8, "direct_dist": True, "update_style": "res_incr", "activation_function": "silu"},
                **{"update_g1_has_drrd": False, "g1_out_conv": False},
            },
            concat_output_tebd=False,
        ),
        CASE,
        shared=BOTH,
    ),
    "dpa2d": Variant(
        dpa2(
            repinit={
                **{"tebd_input_mode": "strip", "use_three_body": True, "three_body_sel": 12, "nsel": 20},
                **{"three_body_rcut_smth": 1.0},
            },
            repformer={
                **{"nsel": 10, "update_h2": True, "attn2_has_gate": True, "use_sqrt_nnei": False},
                **{"g1_out_mlp": False, "update_style": "res_avg"},
            },
            smooth=False,
            exclude_types=[[0, 1], [2, 2]],
        ),
        CASE,
        shared=("descriptor",),
        heads={"water": {}, "ice": {"pair_exclude_types": [[0, 2]]}},
    ),
    "dpa2e": Variant(
        dpa2(
            repinit={
                **{"set_davg_zero": False, "use_three_body": True, "resnet_dt": True, "neuron": [2, 4, 4]},
                **{"tebd_dim": 3},
            },
            repformer={
                **{"set_davg_zero": False, "update_style": "res_residual", "update_residual_init": "const"},
                **{"update_g1_has_grrg": False, "update_g2_has_g1g1": False, "ln_eps": 1e-3},
            },
            add_tebd_to_repinit_out=True,
            use_tebd_bias=True,
            env_protection=0.05,
        ),
        CASE,
    ),
    "dpa2x": Variant(
        {},
        CASE,
        heads={
            "water": {"descriptor": "base", "pair_exclude_types": [[0, 2]], "atom_exclude_types": [1]},
            "ice": {"descriptor": "base:1", "pair_exclude_types": [[1, 1]], "atom_exclude_types": [0, 2]},
        },
        named={
            "base": dpa2(
                repinit={"tebd_input_mode": "strip", "type_one_side": True, "resnet_dt": True},
                repformer={
                    **{"update_g2_has_attn": False, "update_g1_has_conv": False},
                    **{"update_style": "res_residual", "update_residual": 0.1},
                },
                exclude_types=[[0, 1]],
            ),
        },
    ),
    "dpa2g": Variant(
        dpa2(repformer={"attn2_has_gate": True}, use_econf_tebd=True),
        CASE | {"numb_fparam": 2, "numb_aparam": 1, "default_fparam": [0.3, -0.2]},
        shared=BOTH,
    ),
    "dpa2f": Variant(
        dpa2(
            repinit={"use_three_body": True},
            repformer={
                **{"update_g1_has_attn": False, "update_g2_has_g1g1": False, "attn2_has_gate": True},
                **{"update_style": "res_residual", "update_residual": 0.01, "use_sqrt_nnei": True},
            },
            precision="float32",
        ),
        FIT | {"precision": "float32", "neuron": [8, 8, 8], "dim_case_embd": 2},
        shared=BOTH,
    ),
    "dpa2n": Variant(
        dpa2(
            repinit={"nsel": 20, "neuron": [2, 4], "axis_neuron": 2},
            repformer={
                **{"nsel": 10, "update_h2": True, "update_g2_has_attn": False, "use_sqrt_nnei": False},
                **{"update_style": "res_residual", "update_residual": 0.1, "g1_out_mlp": False},
            },
            exclude_types=[[1, 2]],
        ),
        CASE,
        shared=("descriptor",),
    ),
    "dpa2m": Variant(
        dpa2(
            repinit={"nsel": 18, "tebd_input_mode": "strip", "tebd_dim": 6},
            repformer={
                **{"nsel": 9, "nlayers": 3, "update_h2": True, "attn2_has_gate": True, "direct_dist": True},
                **{"update_style": "res_incr"},
            },
            smooth=False,
            precision="float32",
        ),
        CASE,
    ),
    "dpa2a": Variant(
        {},
        CASE | {"dim_case_embd": 4},
        shared=("fitting_net",),
        heads={
            "gelu": {"descriptor": dpa2_active("gelu", use_three_body=True)},
            "gelu_tf": {"descriptor": dpa2_active("gelu_tf", tebd_input_mode="strip")},
            "softplus": {"descriptor": dpa2_active("softplus")},
        },
        spread=0.7,
    ),
    "dpa3c": Variant(
        dpa3(
            {
                **{"use_dynamic_sel": True, "sel_reduce_factor": 4.0, "smooth_edge_update": True},
                **{"e_sel": 16, "a_sel": 8, "update_style": "res_avg", "n_multi_edge_message": 2},
            },
            exclude_types=[[0, 1]],
        ),
        CASE,
        shared=BOTH,
    ),
    "dpa3d": Variant(
        dpa3(
            {
                **{"e_sel": 16, "a_sel": 8, "update_style": "res_incr", "use_exp_switch": True},
                **{"a_compress_rate": 2, "a_compress_e_rate": 2, "edge_init_use_dist": True},
            },
            activation_function="tanh",
        ),
        CASE,
        shared=("descriptor",),
    ),
    "dpa3e": Variant(
        dpa3(
            {
                **{"update_angle": False, "smooth_edge_update": True, "n_multi_edge_message": 3},
                **{"update_residual_init": "norm", "use_exp_switch": True, "axis_neuron": 3},
            },
            use_econf_tebd=True,
            concat_output_tebd=True,
        ),
        CASE,
    ),
    "dpa3g": Variant(
        dpa3(
            {
                **{"update_angle": False, "use_dynamic_sel": True, "smooth_edge_update": True},
                **{"edge_init_use_dist": True, "update_style": "res_avg", "e_sel": 20, "a_sel": 12},
                **{"a_compress_rate": 1},
            },
            use_tebd_bias=True,
            exclude_types=[[2, 2]],
        ),
        CASE | {"atom_ener": [None, 1.5, None]},
        shared=("descriptor",),
    ),
    "dpa3q": Variant(
        dpa3(
            {
                **{"sequential_update": True, "use_dynamic_sel": True, "smooth_edge_update": True},
                **{"a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True},
            },
        ),
        CASE,
        shared=BOTH,
    ),
    "dpa3r": Variant(
        dpa3(
            {
                **{"sequential_update": True, "n_multi_edge_message": 2, "use_exp_switch": True},
                **{"a_compress_rate": 1, "e_sel": 20, "a_sel": 9},
            },
            exclude_types=[[0, 0], [1, 2]],
        ),
        CASE,
        shared=("descriptor",),
    ),
    "dpa3p": Variant(
        dpa3(
            {
                **{"a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True},
                **{"n_dim": 12, "e_dim": 8, "a_dim": 4, "axis_neuron": 4, "n_multi_edge_message": 1},
                **{"use_dynamic_sel": True, "sel_reduce_factor": 10.0, "smooth_edge_update": True},
                **{"e_sel": 200, "a_sel": 80, "edge_init_use_dist": True, "use_exp_switch": True},
                **{"e_rcut_smth": 3.3, "a_rcut_smth": 2.5, "update_residual": 0.1},
            },
            activation_function="silut:10.0",
            precision="float32",
        ),
        FIT
        | {"precision": "float32", "activation_function": "silut:10.0", "neuron": [8, 8, 8]}
        | {"dim_case_embd": 2},
        shared=BOTH,
    ),
    "dpa3z": Variant(
        dpa3({"smooth_edge_update": True, "n_dim": 6}, add_chg_spin_ebd=True, concat_output_tebd=True),
        CASE | {"numb_fparam": 1},
        heads={"water": {"descriptor": {"default_chg_spin": [-1, 3]}}, "ice": {}},
    ),
    "dpa3f": Variant(
        dpa3(
            {
                **{"fix_stat_std": 0.0, "smooth_edge_update": True, "e_sel": 20, "a_sel": 8},
                **{"a_compress_rate": 2, "a_compress_e_rate": 2, "a_compress_use_split": True},
            },
            use_tebd_bias=True,
            env_protection=0.05,
        ),
        CASE,
        heads={
            "water": {"pair_exclude_types": [[0, 2]], "atom_exclude_types": [1]},
            "ice": {"pair_exclude_types": [[1, 1]], "atom_exclude_types": [0, 2]},
        },
    ),
    "dpa3a": Variant(
        dpa3({"smooth_edge_update": True, "n_dim": 6, "e_dim": 4, "a_dim": 3}),
        CASE | {"dim_case_embd": 4},
        shared=("fitting_net",),
        heads={
            "gelu": {"descriptor": {"activation_function": "gelu"}},
            "gelu_tf": {"descriptor": {"activation_function": "gelu_tf"}},
            "silut": {"descriptor": {"activation_function": "silut:1.5"}},
            "relu6": {"descriptor": {"activation_function": "relu6"}},
        },
    ),
    "hyb1": Variant(
        hybrid(
            SE_A | {"rcut": 3.5, "sel": [7, 4, 8], "type_one_side": True, "neuron": [2, 4]},
            "far",
        ),
        CASE,
        shared=("fitting_net",),
        heads={"water": {}, "ice": {"pair_exclude_types": [[0, 2]]}},
        named={"far": DPA1 | {"tebd_input_mode": "strip", "sel": 24, "neuron": [2, 4]}},
    ),
    # Neighbours beyond a member's own cutoff stay in its list where there is room (not in that of DPA-2).
    "hyb2": Variant(
        hybrid(
            DPA1
            | {"rcut": 3.0, "sel": 18, "attn_layer": 1, "smooth_type_embedding": False}
            | {"set_davg_zero": False, "neuron": [2, 4]},
            dpa2(repinit={"nsel": 22}, repformer={"nsel": 10}),
            SE_A
            | {"rcut": 4.5, "sel": [14, 9, 18], "type_one_side": True, "neuron": [2, 2], "axis_neuron": 2},
        ),
        CASE,
        shared=BOTH,
        heads={"water": {}, "ice": {"pair_exclude_types": [[0, 2]]}},
    ),
    "hyb3": Variant(
        hybrid("flow", DPA1 | {"neuron": [2, 4], "attn_layer": 1}),
        CASE | {"dim_case_embd": 3, "neuron": [8]},
        heads={
            "water": {},
            "ice": {
                "descriptor": {
                    "list": ["pair", "flow", SE_A | {"sel": [9, 6, 10], "type_one_side": True}],
                }
            },
            "steam": {"descriptor": "pair"},
        },
        named={
            "flow": dpa3(
                {"e_rcut": 3.0, "e_rcut_smth": 2.8, "a_rcut": 2.5, "a_rcut_smth": 2.3, "use_exp_switch": True}
                | {"edge_init_use_dist": True, "smooth_edge_update": True, "a_compress_rate": 1},
            ),
            "pair": DPA1 | {"neuron": [2, 4], "exclude_types": [[0, 1]]},
        },
    ),
    "hyb4": Variant(
        hybrid(
            SE_A | {"sel": [9, 4, 6], "type_one_side": True, "neuron": [2, 4], "exclude_types": [[0, 1]]},
            SE_A | {"rcut": 3.0, "sel": [3, 8, 12], "neuron": [2, 2], "axis_neuron": 2},
        ),
        CASE,
        shared=("descriptor",),
    ),
    # deepmd-kit's pt dialect does not hand charge and spin to the members of a hybrid descriptor.
    "hyb5": Variant(
        hybrid(
            dpa3({"e_rcut": 3.0, "nlayers": 1}, add_chg_spin_ebd=True, default_chg_spin=[1, 2]),
            dpa3({"update_angle": False, "nlayers": 1}),
        ),
        CASE,
        shared=BOTH,
        dialects=("ptexpt",),
    ),
}
