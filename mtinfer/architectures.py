"""Heads at the sizes that people publish, for measurements."""

from __future__ import annotations

from typing import Any

__all__ = ["ARCHITECTURES"]


_FITTING = {"type": "ener", "neuron": [240, 240, 240], "resnet_dt": True, "precision": "float64"}
_SE_ATTEN = {
    "type": "se_atten",
    "rcut": 6.0,
    "rcut_smth": 0.5,
    "sel": 140,
    "neuron": [25, 50, 100],
    "axis_neuron": 16,
    "tebd_input_mode": "strip",
    "smooth_type_embedding": True,
    "precision": "float64",
}
#: name -> head configuration at the sizes that people publish; random weights are as fast as trained ones
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "se_e2_a": {
        "descriptor": {
            "type": "se_e2_a",
            "rcut": 6.0,
            "rcut_smth": 0.5,
            "sel": [60, 100],
            "neuron": [25, 50, 100],
            "axis_neuron": 16,
            "type_one_side": True,
            "precision": "float64",
        },
        "fitting_net": _FITTING,
    },
    "dpa1": {"descriptor": {**_SE_ATTEN, "attn_layer": 0}, "fitting_net": _FITTING},
    "dpa1-attention": {
        "descriptor": {**_SE_ATTEN, "attn_layer": 2, "attn": 128, "tebd_input_mode": "concat"},
        "fitting_net": _FITTING,
    },
    "dpa2-medium": {
        "descriptor": {
            "type": "dpa2",
            "repinit": {
                "tebd_dim": 8,
                "rcut": 6.0,
                "rcut_smth": 0.5,
                "nsel": 120,
                "neuron": [25, 50, 100],
                "axis_neuron": 12,
                "activation_function": "tanh",
                "three_body_sel": 48,
                "three_body_rcut": 4.0,
                "three_body_rcut_smth": 3.5,
                "use_three_body": True,
            },
            "repformer": {
                "rcut": 4.0,
                "rcut_smth": 3.5,
                "nsel": 48,
                "nlayers": 6,
                "g1_dim": 128,
                "g2_dim": 32,
                "attn2_hidden": 32,
                "attn2_nhead": 4,
                "attn1_hidden": 128,
                "attn1_nhead": 4,
                "axis_neuron": 4,
                "update_h2": False,
                "update_g1_has_conv": True,
                "update_g1_has_grrg": True,
                "update_g1_has_drrd": True,
                "update_g1_has_attn": False,
                "update_g2_has_g1g1": False,
                "update_g2_has_attn": True,
                "update_style": "res_residual",
                "update_residual": 0.01,
                "update_residual_init": "norm",
                "attn2_has_gate": True,
                "use_sqrt_nnei": True,
                "g1_out_conv": True,
                "g1_out_mlp": True,
            },
            "precision": "float64",
            "add_tebd_to_repinit_out": False,
        },
        "fitting_net": _FITTING,
    },
    "dpa3": {
        "descriptor": {
            "type": "dpa3",
            "repflow": {
                "n_dim": 128,
                "e_dim": 64,
                "a_dim": 32,
                "nlayers": 6,
                "e_rcut": 6.0,
                "e_rcut_smth": 5.3,
                "e_sel": 1200,
                "a_rcut": 4.0,
                "a_rcut_smth": 3.5,
                "a_sel": 300,
                "axis_neuron": 4,
                "fix_stat_std": 0.3,
                "a_compress_rate": 1,
                "a_compress_e_rate": 2,
                "a_compress_use_split": True,
                "update_angle": True,
                "smooth_edge_update": True,
                "edge_init_use_dist": True,
                "use_exp_switch": True,
                "use_dynamic_sel": True,
                "sel_reduce_factor": 10.0,
                "update_style": "res_residual",
                "update_residual": 0.1,
                "update_residual_init": "const",
                "n_multi_edge_message": 1,
                "optim_update": True,
            },
            "activation_function": "silut:10.0",
            "precision": "float32",
            "use_tebd_bias": False,
            "concat_output_tebd": False,
        },
        "fitting_net": {**_FITTING, "activation_function": "silut:10.0", "precision": "float32"},
    },
}
