"""Statistics of tests/data/frames as deepmd-kit 3.2.0 computes them: makes training/statistics.json.

Runs in an environment that holds deepmd-kit. Every model is trained for one step; what is kept of the file
that this writes is the mean and the standard deviation of the environment rows, and the energy bias::

    python tests/data/make_statistics.py [NAME ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
FRAMES = HERE / "frames"
TASKS = {"water": 0.5, "copper": 0.3, "vacancy": 0.2}
SYSTEMS = {
    "water": ["water/H64O32_96"],
    "copper": ["copper/Cu32_32", "copper/Cu31_31"],
    "vacancy": ["copper/Cu31_31"],
}
#: of one frame; systems have 4, 2 or 1, so that those which start over do so after whole rounds
N_BATCHES = 4
#: types whose atoms have no energy
EXCLUDED = {"water": [0], "copper": [], "vacancy": []}
DESCRIPTORS = {
    "se_e2_a": {
        "type": "se_e2_a",
        "sel": [10, 6, 20],
        "rcut": 4.0,
        "rcut_smth": 0.5,
        "neuron": [2, 4],
        "axis_neuron": 2,
        "exclude_types": [[0, 0]],
    },
    "dpa1": {
        "type": "dpa1",
        "sel": 40,
        "rcut": 4.0,
        "rcut_smth": 1.0,
        "neuron": [2, 4],
        "axis_neuron": 2,
        "attn_layer": 0,
        "set_davg_zero": False,
        "env_protection": 0.1,
    },
    "dpa2": {
        "type": "dpa2",
        "repinit": {
            "rcut": 4.0,
            "rcut_smth": 0.5,
            "nsel": 40,
            "neuron": [2, 4],
            "axis_neuron": 2,
            "use_three_body": True,
            "three_body_sel": 10,
            "three_body_rcut": 3.5,
            "three_body_rcut_smth": 0.5,
        },
        "repformer": {"rcut": 3.0, "rcut_smth": 0.5, "nsel": 9, "nlayers": 1, "g1_dim": 8, "g2_dim": 4},
    },
    "dpa3": {
        "type": "dpa3",
        "repflow": {
            "n_dim": 4,
            "e_dim": 4,
            "a_dim": 4,
            "nlayers": 1,
            "e_rcut": 4.0,
            "e_rcut_smth": 2.0,
            "e_sel": 40,
            "a_rcut": 2.5,
            "a_rcut_smth": 1.5,
            "a_sel": 10,
            "fix_stat_std": 0.0,
            "use_exp_switch": True,
        },
        "precision": "float64",
    },
}
DESCRIPTORS["hybrid"] = {
    "type": "hybrid",
    "list": [DESCRIPTORS[kind] for kind in ("se_e2_a", "dpa1", "dpa2")],
}


def training_input(descriptor, frames=FRAMES):
    """Input whose statistics see all frames, some repeatedly; heads share the descriptor unequally."""
    fitting = {"neuron": [4], "resnet_dt": False}
    loss = {"type": "ener", "start_pref_v": 0.1, "limit_pref_v": 0.1}
    return {
        "model": {
            "shared_dict": {"types": ["H", "O", "Cu"], "desc": descriptor},
            "model_dict": {
                name: {
                    "type_map": "types",
                    "descriptor": "desc",
                    "fitting_net": fitting,
                    "data_stat_nbatch": N_BATCHES,
                    "atom_exclude_types": EXCLUDED[name],
                }
                for name in TASKS
            },
        },
        "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-5},
        "loss_dict": dict.fromkeys(TASKS, loss),
        "training": {
            "numb_steps": 1,
            "seed": 1,
            "save_freq": 1,
            "model_prob": TASKS,
            "data_dict": {
                name: {
                    "training_data": {
                        "systems": [str(frames / system) for system in SYSTEMS[name]],
                        "batch_size": 1,
                    }
                }
                for name in TASKS
            },
        },
    }


def statistics(kind, dialect):
    """Statistics of one descriptor: key in the file, relative to the head -> rows, by head."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "input.json").write_text(json.dumps(training_input(DESCRIPTORS[kind])))
        command = [
            str(Path(sys.executable).with_name("dp")),
            f"--{dialect.replace('_', '-')}",
            "train",
            "input.json",
            "--skip-neighbor-stat",
        ]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        model = torch.load(Path(folder, "model.ckpt.pt"), weights_only=True)["model"]
    wanted = ("mean", "stddev", "davg", "dstd", "out_bias", "out_std")
    found = {}
    for key, value in model.items():
        if key.rpartition(".")[2] in wanted:
            head, _, rest = key.removeprefix("model.").partition(".")
            rows = value[:, 0] if value.dim() == 3 and value.shape[0] > 1 else value.reshape(-1)
            found.setdefault(head, {})[rest] = rows.tolist()
    return found


if __name__ == "__main__":
    path = HERE / "training" / "statistics.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    for kind in sys.argv[1:] or DESCRIPTORS:
        made[kind] = {dialect: statistics(kind, dialect) for dialect in ("pt", "pt_expt")}
        path.write_text(json.dumps(made, indent=1) + "\n")
