"""Training inputs with tiny models, on the frames of tests/data."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtinfer.train.config import TrainConfig, parse_config
from mtinfer.train.plan import Plan, make_plan
from mtinfer.train.starting import Start
from mtinfer.train.trainer import Trainer

FRAMES = Path(__file__).parents[1] / "data" / "frames"
SYSTEMS = {
    "clusters": [str(FRAMES / "clusters" / name) for name in ("H2O_3", "H4O2_6", "H6O3_9")],
    "copper": [str(FRAMES / "copper" / name) for name in ("Cu31_31", "Cu32_32")],
}
TYPE_MAP = ["H", "O", "Cu"]
_NETS = {"rcut": 3.5, "rcut_smth": 0.5, "neuron": [4, 8], "axis_neuron": 2}
DESCRIPTORS: dict[str, dict[str, Any]] = {
    "se_e2_a": {"type": "se_e2_a", "sel": [10, 6, 20], **_NETS, "type_one_side": True},
    "dpa1": {"type": "dpa1", "sel": 30, **_NETS, "attn": 4, "attn_layer": 1, "smooth_type_embedding": True},
    "dpa1strip": {
        "type": "dpa1",
        "sel": 30,
        **_NETS,
        "attn_layer": 0,
        "smooth_type_embedding": True,
        "tebd_input_mode": "strip",
    },
    "dpa2": {
        "type": "dpa2",
        "repinit": {**_NETS, "nsel": 30, "tebd_dim": 4},
        "repformer": {
            "rcut": 3.0,
            "rcut_smth": 0.5,
            "nsel": 15,
            "nlayers": 2,
            "g1_dim": 6,
            "g2_dim": 4,
            "attn1_hidden": 4,
            "attn1_nhead": 2,
            "attn2_hidden": 4,
            "attn2_nhead": 2,
            "axis_neuron": 2,
        },
    },
    "dpa3": {
        "type": "dpa3",
        "repflow": {
            "n_dim": 6,
            "e_dim": 4,
            "a_dim": 4,
            "nlayers": 2,
            "e_rcut": 3.5,
            "e_rcut_smth": 2.5,
            "e_sel": 30,
            "a_rcut": 2.5,
            "a_rcut_smth": 2.0,
            "a_sel": 10,
            "axis_neuron": 2,
        },
        "activation_function": "silut:3.0",
        "precision": "float64",
    },
}
DESCRIPTORS["hybrid"] = {
    "type": "hybrid",
    "list": [DESCRIPTORS["dpa1strip"], {**DESCRIPTORS["dpa1strip"], "rcut": 2.5, "sel": 20}],
}
FITTING: dict[str, Any] = {"neuron": [6, 6], "resnet_dt": True}


def training_input(
    descriptors: Mapping[str, Any], fittings: Mapping[str, Any], **training: Any
) -> dict[str, Any]:
    """Input with tasks `clusters` and `copper`; a part given as the name of a shared entry is shared.

    Parameters
    ----------
    descriptors, fittings
        task -> section, or the name of one of `shared_dict`: "desc", "fit", with a level.
    """
    shared: dict[str, Any] = {"types": TYPE_MAP, "desc": DESCRIPTORS["dpa1strip"]}
    shared["fit"] = {**FITTING, "dim_case_embd": 2}
    loss = {"type": "ener", "start_pref_f": 100, "start_pref_v": 0.1, "limit_pref_v": 0.1}
    return _separate(
        {
            "model": {
                "shared_dict": shared,
                "model_dict": {
                    task: {
                        "type_map": "types",
                        "descriptor": descriptors[task],
                        "fitting_net": fittings[task],
                    }
                    for task in SYSTEMS
                },
            },
            "learning_rate": {"type": "exp", "start_lr": 0.002, "stop_lr": 1e-5, "decay_steps": 10},
            "loss_dict": dict.fromkeys(SYSTEMS, loss),
            "training": {
                "numb_steps": 4,
                "disp_freq": 2,
                "save_freq": 2,
                "model_prob": dict.fromkeys(SYSTEMS, 0.5),
                "data_dict": {
                    task: {
                        "training_data": {"systems": systems, "batch_size": 1},
                        "validation_data": {"systems": systems, "batch_size": 2, "numb_btch": 9},
                    }
                    for task, systems in SYSTEMS.items()
                },
                **training,
            },
        }
    )


def _separate(content: dict[str, Any]) -> dict[str, Any]:
    """Copy in which no two sections are one object, as if read from a file."""
    copied: dict[str, Any] = json.loads(json.dumps(content))
    return copied


def shared_input(kind: str, *, fitting: bool = False, **training: Any) -> dict[str, Any]:
    """Input whose tasks share a descriptor, and the fitting net where asked."""
    fittings = dict.fromkeys(SYSTEMS, "fit" if fitting else FITTING)
    content = training_input(dict.fromkeys(SYSTEMS, "desc"), fittings, **training)
    content["model"]["shared_dict"]["desc"] = copy.deepcopy(DESCRIPTORS[kind])
    return content


def config_of(content: dict[str, Any]) -> TrainConfig:
    """Checked configuration."""
    return parse_config(content, Path("input.json"))


def plan_of(content: dict[str, Any], **options: Any) -> Plan:
    """Plan of an input."""
    return make_plan(config_of(content), **options)


def trained(
    folder: Path, n_steps: int, *, start: Start | None = None, stop: int | None = None, **training: Any
) -> Trainer:
    """Run an eager training of `n_steps`, or the first `stop` of them."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        plan_of(shared_input("dpa1strip", numb_steps=n_steps, **training)), folder, start=start, mode="off"
    )

    def tick(step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    assert trainer.run(tick=tick) == (stop is None)
    return trainer
