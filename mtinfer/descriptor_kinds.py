"""The kinds of descriptors that mtinfer evaluates: how they are spelled, and what sets them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DESCRIPTOR_TYPES", "FITTING_DEFAULTS", "KINDS", "Kind", "kind_of", "with_dialect_defaults"]

#: key -> value where a configuration lacks it, in `pt` and in `pt_expt`
DialectDefaults = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Kind:
    """What is known of a descriptor by its kind alone."""

    #: it embeds the types of atoms, and heads may share that embedding alone (share level 1)
    type_embedding: bool = False
    #: `pt_expt` evaluates it on all neighbours instead of a truncated list
    graph_native: bool = False
    #: a `pt_expt` file can say that it keeps the truncated list all the same
    graph_flag: bool = False
    #: keys for which the dialects have different defaults
    defaults: DialectDefaults = field(default_factory=dict)


_SE_ATTEN = {"axis_neuron": (16, 8), "set_davg_zero": (True, False)}
#: name that mtinfer uses -> kind
KINDS: dict[str, Kind] = {
    "se_e2_a": Kind(defaults={"neuron": ([25, 50, 100], [24, 48, 96]), "axis_neuron": (16, 8)}),
    "se_atten": Kind(type_embedding=True, graph_native=True, graph_flag=True, defaults=_SE_ATTEN),
    "se_atten_v2": Kind(type_embedding=True, graph_native=True, defaults=_SE_ATTEN),
    "dpa2": Kind(type_embedding=True, graph_native=True, graph_flag=True),
    "dpa3": Kind(type_embedding=True),
    "hybrid": Kind(),
}
#: the same for `fitting_net`
FITTING_DEFAULTS: DialectDefaults = {"neuron": ([128, 128, 128], [120, 120, 120])}
#: descriptor `type` as spelled in a configuration -> the name that mtinfer uses
DESCRIPTOR_TYPES: dict[str, str] = {**{name: name for name in KINDS}, "se_a": "se_e2_a", "dpa1": "se_atten"}


def kind_of(descriptor: Mapping[str, Any]) -> str:
    """Name of the kind of a descriptor configuration; its `type` as it is where that is unknown."""
    given = str(descriptor.get("type", "se_e2_a"))
    return DESCRIPTOR_TYPES.get(given, given)


def with_dialect_defaults(
    section: Mapping[str, Any], defaults: DialectDefaults, dialect: str
) -> dict[str, Any]:
    """Section of a configuration with every key whose default depends on the dialect.

    A key that is null counts as not given; ``n_<key>`` is the older spelling of some.
    """
    given = {key: value for key, value in section.items() if value is not None}
    of_dialect = {key: both[dialect != "pt"] for key, both in defaults.items()}
    return {**section, **{key: given.get(key, given.get(f"n_{key}", v)) for key, v in of_dialect.items()}}
