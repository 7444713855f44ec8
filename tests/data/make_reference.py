"""Make the checkpoints and numbers in ``variants/`` with deepmd-kit 3.2.0, which must be installed.

Usage: ``OMP_NUM_THREADS=1 python tests/data/make_reference.py [NAME ...]`` (no name: every variant).

Each entry of `reference_variants.VARIANTS` becomes a small multitask checkpoint in each dialect.
deepmd-kit builds the model from the normalised configuration, shares what the configuration shares, and its
wrapper's state is saved; only the numbers in it are ours, drawn at random so that every option shows in the
energies. A tensor's numbers depend on the variant and the tensor's name, not on the dialect: both files hold
one model.

``expected/NAME-DIALECT.npz`` holds, for every head and structure, what ``deepmd.infer.DeepPot`` computes
from the saved file:

* ``HEAD/STRUCTURE/energy`` (), eV; ``forces`` (n_atoms, 3), eV/Å; ``virial`` (3, 3), eV, -dE/dε;
  ``atom_energy`` (n_atoms,), eV
* ``HEAD/STRUCTURE/noise`` (3,): change of energy per atom, largest change of a force and of a virial
  component when every coordinate moves by about 1e-12 Å
* ``HEAD/STRUCTURE/fparam`` (numb_fparam,), ``aparam`` (n_atoms, numb_aparam), ``charge_spin`` (2,): the
  inputs, where any were given; without them the model used its defaults
"""

import argparse
import math
import re
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import ase
import ase.io
import numpy as np
import torch
from deepmd.infer import DeepPot
from deepmd.pt.model.descriptor import DescrptHybrid as PtHybrid
from deepmd.pt.model.model import get_model as get_pt_model
from deepmd.pt.train.wrapper import ModelWrapper as PtWrapper
from deepmd.pt.utils.multi_task import preprocess_shared_params
from deepmd.pt_expt.model import get_model as get_ptexpt_model
from deepmd.pt_expt.train.wrapper import ModelWrapper as PtExptWrapper
from deepmd.utils.argcheck import normalize
from reference_variants import BOTH, TYPE_MAP, VARIANTS, Config, Dialect, Variant

FOLDER = Path(__file__).parent / "variants"
FPARAM = [0.1, 0.7]
CHARGE_SPIN = [-2.0, 3.0]

# In the pt dialect deepmd-kit 3.2.0 cannot share a member of a hybrid: its wrapper asks for this attribute.
PtHybrid.descriptor_list = property(lambda hybrid: hybrid.descrpt_list)


def trainer_config(variant: Variant) -> tuple[Config, Config]:
    """Return the model section as the trainer stores it, and the links between its shared parts."""
    shared_dict = {"type_map": TYPE_MAP, **variant.named}
    shared_dict |= {part: getattr(variant, part) for part in variant.shared}
    model_dict = {}
    for head, section in variant.heads.items():
        model_dict[head] = section | {"type_map": "type_map"}
        for part in BOTH:
            own = part if part in variant.shared else section.get(part, {})
            if not isinstance(own, str):  # copied, as names of members in it are replaced in place
                own = deepcopy(getattr(variant, part) | own)
            model_dict[head][part] = own
    model, links = preprocess_shared_params({"shared_dict": deepcopy(shared_dict), "model_dict": model_dict})
    config = {
        "model": model,
        "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-5},
        "loss_dict": {head: {"type": "ener"} for head in model_dict},
        "training": {
            "numb_steps": 1,
            "data_dict": {head: {"training_data": {"systems": ["unused"]}} for head in model_dict},
        },
    }
    return normalize(config, multi_task=True)["model"], links


def build(variant: Variant, dialect: Dialect) -> torch.nn.Module:
    """Return deepmd-kit's training wrapper around the heads of `variant`, parts shared."""
    params, links = trainer_config(variant)
    get_model = get_pt_model if dialect == "pt" else get_ptexpt_model
    models = {head: get_model(deepcopy(section)) for head, section in params["model_dict"].items()}
    for index, head in enumerate(sorted(models)):
        if params["model_dict"][head]["fitting_net"]["dim_case_embd"]:
            models[head].set_case_embd(index)
    wrapper = (PtWrapper if dialect == "pt" else PtExptWrapper)(models, model_params=params)
    # Sharing as on a restart: no data, hence no statistics to merge.
    wrapper.share_params(links, dict.fromkeys(models, 1.0), resume=True)
    return wrapper


#: levels of a tensor's name that only one dialect has, and levels that the two spell differently
ONE_DIALECT = {"sea", "embedding", "networks", "_networks", "_module_networks"}
ONE_DIALECT |= {"filter_layers", "embeddings", "nets"}
SPELLING = {"filter_layers_strip": "strip", "embeddings_strip": "strip", "davg": "mean", "dstd": "stddev"}
SPELLING |= {"matrix": "w", "bias": "b"}
#: fixed by the configuration, or unused in inference
FIXED = {"case_embd", "default_fparam_tensor", "econf_tebd", "min_nbor_dist", "_min_nbor_dist"}

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DRAWS: dict[str, Draw] = {
    "w": lambda rng, shape: rng.normal(0, 1.5 / math.sqrt(sum(shape)) if len(shape) > 1 else 0.7, shape),
    "b": lambda rng, shape: rng.normal(0, 0.5, shape),
    "idt": lambda rng, shape: rng.uniform(0.2, 0.6, shape),
    "residual": lambda rng, shape: rng.normal(0, 0.4, shape),
    "out_bias": lambda rng, shape: rng.normal(0, 10, shape),
    "out_std": lambda rng, shape: rng.uniform(0.5, 1.5, shape),
    "bias_atom_e": lambda rng, shape: rng.normal(0, 1, shape),
    "param_avg": lambda rng, shape: rng.normal(0, 1, shape),
    "param_inv_std": lambda rng, shape: rng.uniform(0.5, 2, shape),
    # (n_types, sel, 4): one row for all slots; the three components of the direction have one deviation
    "mean": lambda rng, shape: rng.normal(0, 0.2, (shape[0], 1, 1)) * (np.arange(4) == 0) + np.zeros(shape),
    "stddev": lambda rng, shape: (
        rng.uniform(0.1, 0.3, (shape[0], 1, 2))[:, :, [0, 1, 1, 1]] + np.zeros(shape)
    ),
}


def random_tensors(module: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield name, kind (key of `DRAWS`) and value of each tensor to randomise, shared ones once."""
    seen = set()
    for path, owner in module.named_modules():
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or tensor.numel() == 0 or tensor.data_ptr() in seen:
                continue
            if leaf in FIXED or not tensor.is_floating_point():  # integers are masks and indices
                continue
            seen.add(tensor.data_ptr())
            levels = [SPELLING.get(level, level) for level in f"{path}.{leaf}".split(".")]
            kind = re.sub(r"^[fa](?=param_)", "", levels[-1])
            if kind.isdigit():
                kind = "residual" if levels[-2].endswith("residual") else kind
            if kind == "mean" and owner.set_davg_zero:
                continue
            if kind in ("mean", "stddev") and getattr(owner, "set_stddev_constant", False):
                continue
            yield ".".join(level for level in levels if level not in ONE_DIALECT), kind, tensor


def randomise(wrapper: torch.nn.Module, variant: str, spread: float) -> None:
    """Fill every weight and statistic of `wrapper` in place, seeded by variant and tensor name."""
    for name, kind, tensor in random_tensors(wrapper):
        rng = np.random.default_rng(zlib.crc32(f"{variant}/{name}".encode()))
        values = DRAWS[kind](rng, tuple(tensor.shape)) * (spread if kind in ("w", "b") else 1.0)
        tensor.detach().copy_(torch.from_numpy(values))


def inputs(potential: DeepPot, atoms: ase.Atoms) -> dict[str, np.ndarray]:
    """Return the parameters of the frame and of its atoms that the model is given with this structure."""
    given = {}
    use_defaults = atoms.info["name"] == "open"
    # In the pt_expt dialect of deepmd-kit 3.2.0 `has_default_fparam` is always false, its metadata are right.
    has_default = potential.has_default_fparam() or getattr(potential.deep_eval, "metadata", {}).get(
        "has_default_fparam", False
    )
    if potential.get_dim_fparam() and not (use_defaults and has_default):
        given["fparam"] = np.array(FPARAM[: potential.get_dim_fparam()])
    if potential.has_chg_spin_ebd() and not (use_defaults and potential.has_default_chg_spin()):
        given["charge_spin"] = np.array(CHARGE_SPIN)
    if potential.get_dim_aparam():
        given["aparam"] = atoms.arrays["aparam"].reshape(len(atoms), potential.get_dim_aparam())
    return given


def evaluate(potential: DeepPot, atoms: ase.Atoms, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return energy, forces, virial and atom_energy of one structure."""
    types = [potential.get_type_map().index(symbol) for symbol in atoms.get_chemical_symbols()]
    cell = atoms.cell.array.reshape(1, 9) if atoms.pbc.any() else None
    result = potential.eval(
        atoms.positions[None], cell, types, atomic=True, **{key: value[None] for key, value in given.items()}
    )
    energy, forces, virial, atom_energy = (np.asarray(value, dtype=np.float64) for value in result[:4])
    return {
        "energy": energy.reshape(()),
        "forces": forces.reshape(-1, 3),
        "virial": virial.reshape(3, 3),
        "atom_energy": atom_energy.ravel(),
    }


def expected(path: Path, heads: list[str]) -> dict[str, np.ndarray]:
    """Return the content of the ``.npz`` for the checkpoint at `path`."""
    numbers = {}
    for head in heads:
        # Scripted models of the pt dialect fail at the second evaluation where ``atom_ener`` is set.
        potential = DeepPot(str(path), head=head, no_jit=True)
        for atoms in ase.io.read(FOLDER / "structures.extxyz", ":"):
            given = inputs(potential, atoms)
            result = evaluate(potential, atoms, given)
            moved = atoms.copy()
            moved.positions += np.random.default_rng(0).normal(0, 1e-12, moved.positions.shape)
            change = {
                key: np.abs(value - result[key]) for key, value in evaluate(potential, moved, given).items()
            }
            noise = [change["energy"] / len(atoms), change["forces"].max(), change["virial"].max()]
            for key, value in {**result, "noise": np.array(noise), **given}.items():
                numbers[f"{head}/{atoms.info['name']}/{key}"] = value
    return numbers


def main() -> None:
    """Write the files of the variants named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    for name in parser.parse_args().names or VARIANTS:
        for dialect in VARIANTS[name].dialects:
            wrapper = build(VARIANTS[name], dialect)
            randomise(wrapper, name, VARIANTS[name].spread)
            path = FOLDER / "checkpoints" / f"{name}-{dialect}.pt"
            torch.save({"model": wrapper.state_dict()}, path)
            numbers = expected(path, list(VARIANTS[name].heads))
            np.savez_compressed(FOLDER / "expected" / f"{name}-{dialect}.npz", **numbers)
            noise = np.max([value for key, value in numbers.items() if key.endswith("/noise")], axis=0)
            print(f"{path.name:20} {path.stat().st_size:8} bytes, noise {noise}")


if __name__ == "__main__":
    main()
