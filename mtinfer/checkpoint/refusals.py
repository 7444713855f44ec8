"""Features of a head that mtinfer does not evaluate, told from its configuration and keys alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from ..descriptor_kinds import KINDS, kind_of

__all__ = ["Shaped", "descriptors", "refusal"]

Config = Mapping[str, Any]


class Shaped(Protocol):
    """A tensor, or what stands for one while only metadata are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Entries = Mapping[str, Shaped]

PRECISIONS = ("default", "float64", "double", "float32", "single")


def descriptors(config: Config) -> Iterator[Config]:
    """Yield the descriptor configuration of a head and, depth first, the members of hybrid ones."""
    pending = [config.get("descriptor")]
    while pending:
        descriptor = pending.pop()
        if isinstance(descriptor, Mapping):
            yield descriptor
            members = descriptor.get("list")
            pending.extend(reversed(members) if isinstance(members, list) else [])


def _fitting(config: Config) -> Config:
    fitting = config.get("fitting_net")
    return fitting if isinstance(fitting, Mapping) else {}


def _composition(config: Config, entries: Entries) -> Any:
    if (kind := config.get("type") or "standard") != "standard":
        return kind
    composed = any(key.startswith("atomic_model.models.") for key in entries)
    return "linear" if composed else ("use_srtab" if config.get("use_srtab") else None)


def _spin(config: Config, entries: Entries) -> bool:
    return (
        bool(config.get("spin"))
        or any(descriptor.get("spin") for descriptor in descriptors(config))
        or any(key.startswith("backbone_model.") for key in entries)
    )


def _bridging(config: Config, _: Entries) -> Any:
    method = config.get("bridging_method")
    return None if method is None or str(method).lower() == "none" else method


def _descriptor_type(config: Config, _: Entries) -> Any:
    return next((kind for kind in map(kind_of, descriptors(config)) if kind not in KINDS), None)


def _twice(config: Config, _: Entries) -> Any:
    names = config.get("type_map")
    names = [str(name) for name in names] if isinstance(names, list) else []
    return next((name for k, name in enumerate(names) if name in names[:k]), None)


def _precision(config: Config, _: Entries) -> Any:
    given = (part.get("precision") for part in (*descriptors(config), _fitting(config)))
    return next((name for name in given if name is not None and name not in PRECISIONS), None)


def _compressed(_: Config, entries: Entries) -> bool:
    def packed(key: str) -> bool:
        parts = key.split(".")
        return parts[-1] == "type_embd_data" or bool({"compress_info", "compress_data"} & set(parts[-2:]))

    return any(packed(key) and math.prod(tensor.shape) > 0 for key, tensor in entries.items())


def _lmax(config: Config, entries: Entries) -> bool:
    return any((descriptor.get("lmax") or 1) > 1 for descriptor in descriptors(config)) or any(
        key.endswith("adam_degree_gain_raw") for key in entries
    )


def _unsettled_sel(config: Config, _: Entries) -> Any:
    blocks = [
        block
        for descriptor in descriptors(config)
        for block in (descriptor, *(value for value in descriptor.values() if isinstance(value, Mapping)))
    ]
    names = ("sel", "nsel", "three_body_sel", "e_sel", "a_sel")
    return next((block[name] for block in blocks for name in names if isinstance(block.get(name), str)), None)


#: (what the feature is called, test that returns something true where a head uses it)
FEATURES: tuple[tuple[str, Callable[[Config, Entries], Any]], ...] = (
    ("a spin model", _spin),
    ("a composed model (type {!r})", _composition),
    ("a data modifier", lambda config, _: config.get("modifier")),
    ("a LoRA adapter", lambda config, _: config.get("lora")),
    ("bridging to a short-range potential (bridging_method {!r})", _bridging),
    ("the descriptor {!r}", _descriptor_type),
    ("compressed (tabulated) weights", _compressed),
    ("angular channels in DPA-1 (lmax > 1)", _lmax),
    ("masked attention (attn_mask)", lambda config, _: any(d.get("attn_mask") for d in descriptors(config))),
    ("the neighbour count {!r}, that training never settled", _unsettled_sel),
    (
        "a fitting net of type {!r} (not an energy)",
        lambda config, _: kind if (kind := _fitting(config).get("type") or "ener") != "ener" else None,
    ),
    ("case FiLM (case_film_embd)", lambda config, _: _fitting(config).get("case_film_embd")),
    ("the precision {!r}", _precision),
    ("a type map that lists {!r} twice", _twice),
)


def refusal(head: str, config: Config, entries: Entries, *, trains: bool = False) -> str | None:
    """Say why a head can't be evaluated.

    Parameters
    ----------
    head
        Its name, for the text.
    config
        Configuration of the head.
    entries
        Weights by their key in the file, relative to the head; empty where these are not known.
    trains
        The head is to be trained, which settles what the configuration leaves to the data, and says itself
        which descriptors and type maps it takes.

    Returns
    -------
    str or None
        One line that names head and feature; None where nothing stands against the head.
    """
    for text, test in FEATURES:
        if trains and test in (_unsettled_sel, _descriptor_type, _twice):
            continue
        if value := test(config, entries):
            return f"head {head!r} uses {text.format(value)}, which mtinfer does not evaluate"
    return None
