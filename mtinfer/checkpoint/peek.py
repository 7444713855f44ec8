"""What is in a file, without torch and without reading a single weight."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..descriptor_kinds import kind_of
from . import schema
from .container import file_kind, of_file, read_pickle_bytes, read_safetensors_header
from .dialects import canonical_weights
from .heads import split_state
from .refusals import refusal
from .sharing import Share, StoredWeight, Weights, is_trainable, parameter_count, shares
from .unpickle import TensorStub, load_structure

__all__ = ["CheckpointInfo", "HeadInfo", "peek"]

#: descriptor type -> the numbers that matter, as paths in its configuration
MAIN_NUMBERS: dict[str, tuple[str, ...]] = {
    "se_e2_a": ("rcut", "rcut_smth", "sel", "neuron", "axis_neuron"),
    "se_atten": (
        *("rcut", "rcut_smth", "sel", "neuron", "axis_neuron"),
        *("attn_layer", "attn", "tebd_dim", "tebd_input_mode"),
    ),
    "se_atten_v2": ("rcut", "rcut_smth", "sel", "neuron", "axis_neuron", "attn_layer", "attn", "tebd_dim"),
    "dpa2": (
        *("repinit.rcut", "repinit.nsel", "repinit.neuron", "repinit.use_three_body"),
        *("repformer.rcut", "repformer.nsel", "repformer.nlayers", "repformer.g1_dim", "repformer.g2_dim"),
    ),
    "dpa3": (
        *("repflow.e_rcut", "repflow.e_sel", "repflow.a_rcut", "repflow.a_sel", "repflow.nlayers"),
        *("repflow.n_dim", "repflow.e_dim", "repflow.a_dim", "repflow.use_dynamic_sel"),
    ),
}
FITTING_NUMBERS = ("neuron", "activation_function", "dim_case_embd", "numb_fparam", "numb_aparam")
PARTS = ("descriptor", "fitting_net")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32"}


@dataclass(frozen=True)
class HeadInfo:
    """A head as a user wants to know it."""

    name: str
    aliases: tuple[str, ...]
    type_map: tuple[str, ...]
    #: elements in the training data; None where the file does not say
    observed_types: tuple[str, ...] | None
    #: ``type`` and the main numbers of the configuration; ``members`` for a hybrid
    descriptor: dict[str, Any]
    #: the main numbers of the configuration
    fitting_net: dict[str, Any]
    #: precision of ``descriptor`` and ``fitting_net``, as their weights are stored; None where refused
    precision: dict[str, str] | None
    #: trainable numbers that the head uses, shared ones included; None where refused
    parameters: int | None
    #: why the head can't be evaluated; None where it can
    refused: str | None


@dataclass(frozen=True)
class CheckpointInfo:
    """What `mtinfer info` prints."""

    path: str
    #: ``training`` for what a trainer wrote, ``converted`` for what `archive.write` did
    format: Literal["training", "converted"]
    dialect: str
    #: training steps completed; None where the file does not say
    step: int | None
    #: bytes
    size: int
    #: whether keys of compiled graphs are in the file
    has_debris: bool
    #: trainable numbers of all heads, each stored number counted once
    parameters: int
    heads: tuple[HeadInfo, ...]
    shared: tuple[Share, ...]
    #: name, size and sha256 of the checkpoint that a converted file was made from
    source: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Head:
    name: str
    aliases: tuple[str, ...]
    config: Mapping[str, Any]
    weights: Weights
    refused: str | None


def peek(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Read the metadata of a file.

    Parameters
    ----------
    path
        Training checkpoint of either dialect, or converted file.

    Returns
    -------
    CheckpointInfo
        What is in it.

    Raises
    ------
    CheckpointError
        As for `load.read`, except that no number of a weight is looked at.
    """
    path = Path(path)
    with of_file(path):
        return _peek_converted(path) if file_kind(path) == "safetensors" else _peek_training(path)


def _peek_training(path: Path) -> CheckpointInfo:
    state = split_state(load_structure(read_pickle_bytes(path), str(path)), TensorStub)
    heads = []
    for head in state.heads:
        stubs: dict[str, TensorStub] = {}
        if head.refused is None:
            stubs = canonical_weights(state.dialect, head.name, head.entries, same=_may_be_same)
        weights = {
            name: StoredWeight((stub.storage, stub.shape), stub.dtype, stub.shape)
            for name, stub in stubs.items()
        }
        heads.append(_Head(head.name, head.aliases, head.config, weights, head.refused))
    return _info(path, "training", heads, dialect=state.dialect, step=state.step, has_debris=state.has_debris)


def _may_be_same(a: TensorStub, b: TensorStub) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _peek_converted(path: Path) -> CheckpointInfo:
    metadata, stored = read_safetensors_header(path)
    description = schema.parse(str(path), metadata, stored)
    weights = {
        head: {
            name: StoredWeight(
                identity, SAFETENSORS_DTYPES.get(stored[key].dtype, stored[key].dtype), stored[key].shape
            )
            for name, (identity, key) in found.items()
        }
        for head, found in description.weights(stored).items()
    }
    heads = [
        _Head(head.name, head.aliases, head.config, weights[head.name], refusal(head.name, head.config, {}))
        for head in description.heads
    ]
    return _info(
        path,
        "converted",
        heads,
        dialect=description.dialect,
        step=description.step,
        source=description.source,
    )


def _info(
    path: Path,
    format: Literal["training", "converted"],
    heads: Sequence[_Head],
    *,
    dialect: str,
    step: int | None,
    has_debris: bool = False,
    source: dict[str, Any] | None = None,
) -> CheckpointInfo:
    return CheckpointInfo(
        path=str(path),
        format=format,
        dialect=dialect,
        step=step,
        size=path.stat().st_size,
        has_debris=has_debris,
        parameters=parameter_count(head.weights for head in heads),
        heads=tuple(map(_head_info, heads)),
        shared=tuple(shares({head.name: head.weights for head in heads})),
        source=source,
    )


def _head_info(head: _Head) -> HeadInfo:
    config = head.config
    info = config.get("info")
    observed = info.get("observed_type") if isinstance(info, Mapping) else None
    usable = head.refused is None
    return HeadInfo(
        name=head.name,
        aliases=head.aliases,
        type_map=tuple(map(str, config.get("type_map") or ())),
        observed_types=tuple(map(str, observed)) if isinstance(observed, list) else None,
        descriptor=_descriptor_info(config.get("descriptor")),
        fitting_net=_pick(config.get("fitting_net"), FITTING_NUMBERS),
        precision={part: _precision(head, part) for part in PARTS} if usable else None,
        parameters=parameter_count([head.weights]) if usable else None,
        refused=head.refused,
    )


def _descriptor_info(config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {}
    kind = kind_of(config)
    members = config.get("list")
    if kind == "hybrid" and isinstance(members, list):
        return {"type": kind, "members": [_descriptor_info(member) for member in members]}
    return {"type": kind, **_pick(config, MAIN_NUMBERS.get(kind, ()))}


def _pick(config: Any, paths: Sequence[str]) -> dict[str, Any]:
    picked = {}
    for path in paths:
        value = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            picked[path] = value
    return picked


def _precision(head: _Head, part: str) -> str:
    dtypes = {
        weight.dtype
        for name, weight in head.weights.items()
        if name.startswith(f"{part}.") and is_trainable(name)
    }
    return " and ".join(sorted(dtypes))
