"""The kinds of descriptors that mtinfer evaluates: how they are spelled, and what sets them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DESCRIPTOR_TYPES", "KINDS", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """What is known of a descriptor by its kind alone."""

    #: it embeds the types of atoms, and heads may share that embedding alone (share level 1)
    type_embedding: bool = False
    #: `pt_expt` evaluates it on all neighbours instead of a truncated list
    graph_native: bool = False
    #: a `pt_expt` file can say that it keeps the truncated list all the same
    graph_flag: bool = False


#: name that mtinfer uses -> kind
KINDS: dict[str, Kind] = {
    "se_e2_a": Kind(),
    "se_atten": Kind(type_embedding=True, graph_native=True, graph_flag=True),
    "se_atten_v2": Kind(type_embedding=True, graph_native=True),
    "dpa2": Kind(type_embedding=True, graph_native=True, graph_flag=True),
    "dpa3": Kind(type_embedding=True),
    "hybrid": Kind(),
}
#: descriptor `type` as spelled in a configuration -> the name that mtinfer uses
DESCRIPTOR_TYPES: dict[str, str] = {**{name: name for name in KINDS}, "se_a": "se_e2_a", "dpa1": "se_atten"}


def kind_of(descriptor: Mapping[str, Any]) -> str:
    """Name of the kind of a descriptor configuration; its `type` as it is where that is unknown."""
    given = str(descriptor.get("type", "se_e2_a"))
    return DESCRIPTOR_TYPES.get(given, given)
