"""Write training checkpoints in either dialect, as deepmd-kit 3.2.0 reads them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..descriptor_kinds import FITTING_DEFAULTS, KINDS, kind_of, with_dialect_defaults
from ..errors import OutputError, UnsupportedModelError
from ..files import check_output, replacing
from ..models import EnergyModel
from .dialects import DIALECTS, file_key
from .heads import DEFAULT_HEAD
from .records import Checkpoint, HeadRecord

__all__ = ["convert", "training_content", "write_content"]

#: `se_atten` blocks, whose files carry a few tensors that no model reads
_PAIR_BLOCKS = ("se_atten", "repinit", "repinit_three_body")


def head_entries(record: HeadRecord, dialect: str) -> dict[str, torch.Tensor]:
    """Every key that a file of a dialect holds for a head; networks are listed under both their names."""
    entries: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    collection = str(DIALECTS[dialect].collection)
    for name, tensor in record.weights.items():
        key = file_key(dialect, name)
        entries[key] = tensor
        if f".{collection}." in key:
            copies[key.replace(f".{collection}.", "._networks.", 1)] = tensor
    return entries | copies | (_masks(record) if dialect == "pt_expt" else _empty_tensors(record))


def parts(
    descriptor: Mapping[str, Any], weights: Mapping[str, torch.Tensor], prefix: str = "descriptor."
) -> Iterator[tuple[str, Mapping[str, Any], dict[str, torch.Tensor]]]:
    """Yield prefix, configuration and weights of a descriptor and of the members of a hybrid one."""
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    yield prefix, descriptor, own
    for index, member in enumerate(descriptor.get("list", ())):
        yield from parts(member, weights, f"{prefix}descrpt_list.{index}.")


def _masks(record: HeadRecord) -> dict[str, torch.Tensor]:
    """What a `pt_expt` file holds besides weights: types and pairs that take part, and a flag."""
    config = record.config
    n_types = len(config["type_map"])
    atoms, pairs = config.get("atom_exclude_types") or [], config.get("pair_exclude_types") or []
    prefix = "atomic_model."
    left_out = config["fitting_net"].get("exclude_types", atoms)
    masks = {f"{prefix}fitting_net.emask.type_mask": _type_mask(left_out, n_types)}
    if atoms:
        masks[f"{prefix}atom_excl.type_mask"] = _type_mask(atoms, n_types)
    if pairs:
        masks[f"{prefix}pair_excl.type_mask"] = _pair_mask(pairs, n_types)
    for path, descriptor, weights in parts(config["descriptor"], record.weights):
        for name, tensor in _masks_of_part(descriptor, weights, record).items():
            masks[f"{prefix}{path}{name}"] = tensor
    return masks


def _masks_of_part(
    descriptor: Mapping[str, Any], weights: Mapping[str, torch.Tensor], record: HeadRecord
) -> dict[str, torch.Tensor]:
    type_map = record.config["type_map"]
    kind = kind_of(descriptor)
    if kind == "hybrid":
        slots = _slots_of_members(descriptor["list"], weights, len(type_map))
        return {f"nlist_cut_idx.{index}": own for index, own in enumerate(slots)}
    excluded = _pair_mask(descriptor.get("exclude_types") or [], len(type_map))
    blocks = {name.partition(".")[0] for name in weights}
    masks = {
        f"{block}.emask.type_mask": excluded
        for block in (*_PAIR_BLOCKS, "repformers", "repflows")
        if block in blocks
    }
    if kind == "se_e2_a":
        masks["emask.type_mask"] = excluded
    if KINDS[kind].graph_flag:
        masks["graph_lower_disabled"] = torch.tensor(record.graph_lower_disabled)
    if descriptor.get("use_econf_tebd"):
        from ..models.electron_configuration import electron_configuration

        rows = torch.tensor([electron_configuration(symbol) for symbol in type_map], dtype=torch.float64)
        masks["type_embedding.econf_tebd"] = rows.to(weights["type_embedding.layers.0.w"].dtype)
    return masks


def _slots_of_members(
    members: Sequence[Mapping[str, Any]], weights: Mapping[str, torch.Tensor], n_types: int
) -> list[torch.Tensor]:
    """Slots of the neighbour list of a hybrid descriptor that each member reads.

    Members with a section per type read a list whose sections are as long as the longest of that type, the
    others the beginning of a list without sections.
    """
    by_type = [member["sel"] for member in members if kind_of(member) == "se_e2_a"]
    sections = [max((sel[t] for sel in by_type), default=0) for t in range(n_types)]
    starts = [sum(sections[:t]) for t in range(n_types)]
    found = []
    for index, member in enumerate(members):
        if kind_of(member) == "se_e2_a":
            own = [torch.arange(n) + start for n, start in zip(member["sel"], starts, strict=True)]
            found.append(torch.cat(own))
        else:
            blocks = ("se_atten.", "repinit.", "repflows.")
            names = (f"descrpt_list.{index}.{block}mean" for block in blocks)
            found.append(torch.arange(next(weights[name].shape[1] for name in names if name in weights)))
    return found


def _type_mask(excluded: Sequence[int], n_types: int) -> torch.Tensor:
    mask = torch.ones(n_types, dtype=torch.int32)
    mask[list(excluded)] = 0
    return mask


def _pair_mask(excluded: Sequence[Sequence[int]], n_types: int) -> torch.Tensor:
    mask = torch.ones(n_types + 1, n_types + 1, dtype=torch.int32)
    for a, b in excluded:
        mask[a, b] = mask[b, a] = 0
    return mask.reshape(-1)


def _empty_tensors(record: HeadRecord) -> dict[str, torch.Tensor]:
    """What a `pt` file holds besides weights: tables of a compressed model, empty in this one."""
    empty: dict[str, torch.Tensor] = {}
    for path, _, weights in parts(record.config["descriptor"], record.weights):
        for block in ("", *_PAIR_BLOCKS):
            mean = weights.get(f"{block}.mean" if block else "mean")
            if mean is None:
                continue
            prefix = f"atomic_model.{path}{block or 'sea'}"
            n_nets = len({n.split(".")[1] for n in weights if n.startswith("embeddings.")}) or 1
            for k in range(n_nets):
                empty[f"{prefix}.compress_info.{k}"] = mean.new_empty(0)
                empty[f"{prefix}.compress_data.{k}"] = mean.new_empty(0)
            if block:
                empty[f"{prefix}.type_embd_data"] = mean.new_empty(0)
    return empty


def training_content(
    heads: Mapping[str, HeadRecord],
    dialect: str,
    *,
    step: int,
    learning_rate: float,
    shared_dict: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Entry `model` of a checkpoint.

    Parameters
    ----------
    heads
        heads that share a weight hold the same tensor.
    step
        training steps completed.
    shared_dict
        as in the training input; None for the file of a single task.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    for name, record in heads.items():
        for key, tensor in head_entries(record, dialect).items():
            state[f"model.{name}.{key}"] = tensor.detach()
    configs = {name: copy.deepcopy(record.config) for name, record in heads.items()}
    single = shared_dict is None
    state["_extra_state"] = {
        "model_params": next(iter(configs.values()))
        if single
        else {"shared_dict": copy.deepcopy(dict(shared_dict or {})), "model_dict": configs},
        # pt counts from the last step, pt_expt counts steps and leaves the learning rate out
        "train_infos": {"lr": learning_rate, "step": step - 1}
        if dialect == "pt"
        else {"lr": 0, "step": step},
    }
    return state


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Save a checkpoint; it appears under its name only when it is complete.

    Raises
    ------
    OutputError
        The file can't be written.
    """
    with replacing(path) as partial:
        try:
            with partial.open("wb") as file:  # given a path, torch writes its name into the file
                torch.save(dict(content), file)
        except RuntimeError as err:
            raise OSError(str(err)) from err


def convert(
    checkpoint: Checkpoint,
    path: Path,
    dialect: str,
    *,
    heads: Sequence[str] | None = None,
    force: bool = False,
) -> tuple[tuple[str, ...], list[str]]:
    """Write heads of a loaded file as a training checkpoint of a dialect, without optimizer state.

    Parameters
    ----------
    heads
        names or aliases; None for all that can be evaluated.
    force
        whether to replace an existing file.

    Returns
    -------
    heads written, and one sentence for every head whose numbers change because the dialects select its
    neighbours differently

    Raises
    ------
    OutputError
        The file exists, or can't be written.
    UnsupportedModelError
        A head that was asked for is not supported.
    """
    path = Path(path)
    if dialect not in DIALECTS:
        raise OutputError(f"dialect {dialect!r} is unknown; known are {', '.join(DIALECTS)}")
    check_output(path, source=checkpoint.path, force=force)
    records = {record.name: record for record in checkpoint.chosen(heads)}
    written = {name: _translated(record, checkpoint.dialect, dialect) for name, record in records.items()}
    notes = [_change(record, checkpoint.dialect, written[name], dialect) for name, record in records.items()]
    single = list(checkpoint.heads) == [DEFAULT_HEAD]
    state = training_content(
        written,
        dialect,
        step=checkpoint.step or 0,
        learning_rate=0.0,
        shared_dict=None if single else {},
    )
    write_content(path, {"model": state})
    return tuple(records), [note for note in notes if note is not None]


def _translated(record: HeadRecord, source: str, target: str) -> HeadRecord:
    """Return the head with everything spelled out that the two dialects understand differently."""
    if source == target:
        return record
    config = copy.deepcopy(record.config)
    left_out = config["fitting_net"].get("exclude_types")
    if target == "pt" and left_out is not None:
        raise UnsupportedModelError(
            f"head {record.name!r}: its fitting net leaves out other types ({left_out}) than the head, which "
            "a pt file can't hold; convert to pt_expt or safetensors"
        )
    config["descriptor"] = _completed(config["descriptor"], source)
    config["fitting_net"] = with_dialect_defaults(config["fitting_net"], FITTING_DEFAULTS, source)
    # the neighbour list of pt stays that of the head, where a file can say so
    dense = record.graph_lower_disabled or source == "pt"
    flagged = KINDS[kind_of(config["descriptor"])].graph_flag
    return replace(record, config=config, graph_lower_disabled=dense and flagged)


def _completed(descriptor: Mapping[str, Any], source: str) -> dict[str, Any]:
    kind = kind_of(descriptor)
    completed = {**with_dialect_defaults(descriptor, KINDS[kind].defaults, source), "type": kind}
    if members := descriptor.get("list"):
        completed["list"] = [_completed(member, source) for member in members]
    return completed


def _change(before: HeadRecord, source: str, after: HeadRecord, target: str) -> str | None:
    """Say how the numbers of a head change because its neighbours are selected in another way."""
    was, now = (
        EnergyModel.from_config(
            record.config, dialect, graph_lower_disabled=record.graph_lower_disabled
        ).descriptor.selection
        for record, dialect in ((before, source), (after, target))
    )
    if (was.sel is None) != (now.sel is None):
        return (
            f"head {before.name!r}: pt keeps the nearest 'sel' neighbours and counts empty slots, pt_expt "
            "does neither; energies differ where that matters"
        )
    # a list by type has pairs of an excluded kind in a section of their own
    shorter = any(not inner.by_type for inner in was.inner)
    if was.pair_exclude and shorter and was.closes_gaps != now.closes_gaps:
        return (
            f"head {before.name!r}: excluded pairs ('pair_exclude_types') take up slots of the shorter "
            "neighbour lists in pt, not in pt_expt; energies differ where such a list is full"
        )
    return None
