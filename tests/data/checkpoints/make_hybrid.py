"""Make the two hybrid checkpoints of this folder; needs the `reference` extra. Run it in this folder.

They show how the trainer spells the keys of hybrid members. Their weights are as initialised.
"""

from copy import deepcopy

import torch
from deepmd.pt.model.model import get_model
from deepmd.pt.train.wrapper import ModelWrapper
from deepmd.pt_expt.model.get_model import get_model as get_model_expt
from deepmd.pt_expt.train.wrapper import ModelWrapper as ModelWrapperExpt

RADIAL = {"rcut": 4.0, "rcut_smth": 0.5, "neuron": [2, 4], "axis_neuron": 2}
DPA1 = {"type": "se_atten", "sel": 20, **RADIAL, "attn": 4, "attn_layer": 1, "tebd_dim": 4, "seed": 1}
DPA1 |= {"tebd_input_mode": "strip", "use_econf_tebd": True, "precision": "float64"}
SE_E2_A = {"type": "se_e2_a", "sel": [10, 10, 10], **RADIAL, "type_one_side": True, "precision": "float32"}
REPINIT = {"nsel": 20, **RADIAL, "tebd_dim": 4, "tebd_input_mode": "strip", "use_three_body": True}
REPINIT |= {"three_body_neuron": [2, 4], "three_body_sel": 8, "three_body_rcut": 3.0}
REPFORMER = {"rcut": 3.0, "rcut_smth": 0.5, "nsel": 10, "nlayers": 2, "g1_dim": 4, "g2_dim": 2}
REPFORMER |= {"attn1_hidden": 4, "attn1_nhead": 2, "attn2_hidden": 4, "attn2_nhead": 2}
REPFORMER |= {"axis_neuron": 2, "update_h2": True, "update_style": "res_residual"}
DPA2 = {"type": "dpa2", "repinit": REPINIT, "repformer": REPFORMER, "precision": "float64"}
DPA2 |= {"add_tebd_to_repinit_out": True}
FITTING = {"type": "ener", "neuron": [4, 4], "numb_fparam": 2, "numb_aparam": 1, "default_fparam": [0.1, 0.2]}
HEAD = {
    "type_map": ["O", "H", "C"],
    "descriptor": {"type": "hybrid", "list": [DPA1, SE_E2_A, DPA2]},
    "fitting_net": {**FITTING, "precision": "float64", "seed": 1},
    "pair_exclude_types": [[0, 1]],
    "atom_exclude_types": [2],
}

for dialect, build, wrapper in (
    ("pt", get_model, ModelWrapper),
    ("ptexpt", get_model_expt, ModelWrapperExpt),
):
    params = {"shared_dict": {}, "model_dict": {"water": deepcopy(HEAD), "ice": deepcopy(HEAD)}}
    models = {name: build(deepcopy(config)) for name, config in params["model_dict"].items()}
    torch.save({"model": wrapper(models, model_params=params).state_dict()}, f"hybrid-{dialect}.pt")
