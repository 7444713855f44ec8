"""Section `model` of a training input: the configuration of every head, and what the heads share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import options
from ..checkpoint.heads import DEFAULT_HEAD, check_aliases
from ..checkpoint.refusals import refusal
from ..descriptor_kinds import KINDS, kind_of
from ..errors import CheckpointError, ConfigError, nearest
from ..models.hybrid import member_name
from .schema import complete
from .values import SECTION

__all__ = ["Link", "ModelSection", "read_model"]


#: parts of a head that may name an entry of `shared_dict`
_PARTS = ("type_map", "descriptor", "fitting_net")


@dataclass(frozen=True)
class Link:
    """Heads that share one entry of `shared_dict`."""

    #: "descriptor", "descriptor.descrpt_list.<i>" for a member of a hybrid one, or "fitting_net"
    part: str
    #: key in `shared_dict`
    name: str
    #: (head, level), the base first; level 0 shares everything, level 1 the type embedding
    heads: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ModelSection:
    """All heads of an input."""

    #: as given
    shared_dict: dict[str, Any]
    #: its entries that no head names
    unused: tuple[str, ...]
    #: head -> its configuration as given, references resolved
    given: dict[str, Any]
    #: head -> the same, checked and with defaults filled in
    heads: dict[str, dict[str, Any]]
    links: tuple[Link, ...]


def read_model(model: Any, *, multitask: bool) -> ModelSection:
    """Resolve and check the section.

    Raises
    ------
    ConfigError
        It has an unknown key, lacks one, or asks for what is not supported.
    """
    shared, unused, given, links = _heads(model) if multitask else ({}, (), {DEFAULT_HEAD: model}, ())
    heads = {name: _head(name, config, multitask) for name, config in given.items()}
    try:
        check_aliases({name: tuple(head["model_branch_alias"]) for name, head in heads.items()})
    except CheckpointError as err:
        raise ConfigError(str(err)) from err
    _check_type_maps(heads, links)
    _check_case_embedding(heads)
    return ModelSection(shared, unused, given, heads, links)


def _heads(
    model: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[str, ...], dict[str, dict[str, Any]], tuple[Link, ...]]:
    """Resolve the references of all heads to `shared_dict`: it, its unused entries, heads, links."""
    shared, entries = model.get("shared_dict", {}), model["model_dict"]
    for key, section in (("shared_dict", shared), ("model_dict", entries)):
        SECTION.check(section, f"model.{key}")
    entries = {head: entry for head, entry in entries.items() if head[:1] != "_"}  # without comments
    if not entries:
        raise ConfigError("model.model_dict names no head; give at least one entry")
    common = {k: v for k, v in model.items() if k not in ("shared_dict", "model_dict") and k[:1] != "_"}
    used: dict[tuple[str, str], list[tuple[str, int]]] = {}
    heads: dict[str, dict[str, Any]] = {}
    for head, entry in entries.items():
        SECTION.check(entry, f"model_dict.{head}")
        if not head or "." in head:
            raise ConfigError(f"model_dict has the head {head!r}; expected a name without '.'")
        heads[head] = copy.deepcopy(dict(common) | dict(entry))
        for part, place, key in _references(heads[head]):
            name, level = _reference(place[key], shared, f"model_dict.{head}.{part}")
            place[key] = copy.deepcopy(shared[name])
            used.setdefault((part, name), []).append((head, level))
    _check_places(used)
    links = []
    for (part, name), members in used.items():
        if part != "type_map" and len(members) > 1:
            members = sorted(members, key=lambda member: member[1])
            _check_levels(part, name, members, shared[name])
            links.append(Link(part, name, tuple(members)))
    named = {name for _, name in used}
    unused = tuple(name for name in shared if name not in named and name[:1] != "_")
    return dict(shared), unused, heads, tuple(links)


def _references(entry: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Parts of a head that are named instead of given: part, and the container and key that hold the name.

    The members of a hybrid descriptor come after the descriptor, which may itself have been named.
    """
    for part in _PARTS:
        if isinstance(entry.get(part), str):
            yield part, entry, part
    descriptor = entry.get("descriptor")
    members = descriptor.get("list") if isinstance(descriptor, Mapping) else None
    for index, member in enumerate(members if isinstance(members, list) else ()):
        if isinstance(member, str):
            yield member_name(index, "descriptor"), members, index


def _check_places(used: Mapping[tuple[str, str], Any]) -> None:
    """Refuse an entry that descriptors use at different places: their weights have different names."""
    places: dict[str, str] = {}
    for part, name in used:
        if part.startswith("descriptor") and places.setdefault(name, part) != part:
            raise ConfigError(
                f"shared_dict.{name} is used as {places[name]} and as {part}; sharing a descriptor across "
                "places is not supported: use it at the same place, or give it twice under two names"
            )


def _reference(reference: str, shared: Mapping[str, Any], where: str) -> tuple[str, int]:
    name, _, level = reference.partition(":")
    if name not in shared:
        hint = nearest(name, shared) or f"; it has {', '.join(shared) or 'no entries'}"
        raise ConfigError(f"{where} names {name!r}, which is not in shared_dict{hint}")
    if level and not level.isdecimal():
        raise ConfigError(f"{where} is {reference!r}; a share level is a number, as in {name}:1")
    return name, int(level or 0)


def _check_levels(part: str, name: str, members: list[tuple[str, int]], entry: Any) -> None:
    kind = KINDS.get(kind_of(entry)) if isinstance(entry, Mapping) else None
    highest = 0 if part == "fitting_net" or (kind and not kind.type_embedding) else 1
    for head, level in members:
        if level > highest:
            raise ConfigError(
                f"head {head!r} shares {name!r} at level {level}; allowed for this {part} are 0 to {highest}"
            )


def _head(name: str, given: Any, multitask: bool) -> dict[str, Any]:
    where = f"model_dict.{name}" if multitask else "model"
    if reason := _refusal(name, given):
        raise ConfigError(reason)
    head = complete(given, options.HEAD, where)
    type_map = head["type_map"]
    if len(set(type_map)) != len(type_map) or not type_map:
        raise ConfigError(f"{where}.type_map is {type_map!r}; expected a list of different elements")
    n_types = len(type_map)
    _check_types(head, where, n_types, indices=("pair_exclude_types", "atom_exclude_types"))
    _check_types(head["preset_out_bias"] or {}, f"{where}.preset_out_bias", n_types, lists=("energy",))
    head["descriptor"] = _descriptor(head["descriptor"], f"{where}.descriptor", n_types)
    head["fitting_net"] = _fitting(head["fitting_net"], f"{where}.fitting_net", n_types)
    return head


def _refusal(name: str, given: Any) -> str | None:
    try:
        return refusal(name, given, {}, trains=True) if isinstance(given, Mapping) else None
    except TypeError:  # a value of the wrong type, which `complete` names
        return None


def _check_types(
    section: Mapping[str, Any],
    where: str,
    n_types: int,
    *,
    indices: Iterable[str] = (),
    lists: Iterable[str] = (),
) -> None:
    """Check keys that hold indices into the type map, and lists with an entry for each of it."""
    for key in indices:
        found = [index for entry in section[key] for index in (entry if isinstance(entry, list) else [entry])]
        if any(index >= n_types for index in found):
            raise ConfigError(
                f"{where}.{key} is {section[key]!r}; expected indices into type_map, 0 to {n_types - 1}"
            )
    for key in lists:
        value = section.get(key)
        if value and not isinstance(value, str) and not (isinstance(value, list) and len(value) == n_types):
            raise ConfigError(
                f"{where}.{key} is {value!r}; expected a list of {n_types}, one per entry of type_map"
            )


def _fitting(given: Any, where: str, n_types: int) -> dict[str, Any]:
    found = complete(given, options.FITTING, where)
    _check_types(found, where, n_types, lists=("atom_ener",))
    default, size = found["default_fparam"], found["numb_fparam"]
    if default is not None and len(default) != size:
        raise ConfigError(
            f"{where}.default_fparam is {default!r}; expected {size} numbers, as numb_fparam says"
        )
    return found


def _descriptor(given: Any, where: str, n_types: int, *, within_hybrid: bool = False) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected a section {{...}} or the name of a shared one")
    kind = kind_of(given)
    if kind == "hybrid" and not within_hybrid:
        return _hybrid(given, where, n_types)
    if kind not in options.DESCRIPTORS:
        supported = [*options.DESCRIPTORS, *([] if within_hybrid else ["hybrid"])]
        raise ConfigError(
            f"{where}.type is {kind!r}, which can't be trained{nearest(kind, supported)}; supported are "
            f"{', '.join(supported)}"
        )
    found = complete({**given, "type": kind}, options.DESCRIPTORS[kind], where)
    if kind == "dpa3" and found["repflow"]["skip_stat"]:
        found["repflow"]["fix_stat_std"] = 0.3  # the older spelling, which wins in deepmd-kit, too
    if kind == "dpa3":
        _check_compression(found["repflow"], f"{where}.repflow")
    lists = ("sel",) if kind == "se_e2_a" else ()
    _check_types(found, where, n_types, indices=("exclude_types",), lists=lists)
    return found


def _check_compression(repflow: Mapping[str, Any], where: str) -> None:
    """Refuse widths of compressed angle messages that are no whole numbers."""
    rate, width = repflow["a_compress_rate"], repflow["a_dim"] * repflow["a_compress_e_rate"]
    if rate and width % (2 * rate):
        raise ConfigError(
            f"{where}: a_dim times a_compress_e_rate is {width}; with a_compress_rate {rate} it must be a "
            f"multiple of {2 * rate}"
        )


def _hybrid(given: Mapping[str, Any], where: str, n_types: int) -> dict[str, Any]:
    found = complete(given, options.HYBRID, where)
    members = found["list"]
    if not isinstance(members, list) or not members:
        raise ConfigError(f"{where}.list is {members!r}; expected a list of descriptors")
    found["list"] = [
        _descriptor(member, f"{where}.list[{index}]", n_types, within_hybrid=True)
        for index, member in enumerate(members)
    ]
    return found


def _check_type_maps(models: Mapping[str, dict[str, Any]], links: Iterable[Link]) -> None:
    """Refuse to share between different type maps: weights go by the index of an element."""
    for link in links:
        base, *others = (head for head, _ in link.heads)
        for head in others:
            maps = [models[name]["type_map"] for name in (base, head)]
            if maps[0] != maps[1]:
                raise ConfigError(
                    f"heads {base!r} and {head!r} share the {link.part} {link.name!r} but have different "
                    f"type maps, {maps[0]!r} and {maps[1]!r}; give both the same, in the same order"
                )


def _check_case_embedding(models: Mapping[str, dict[str, Any]]) -> None:
    for name, model in models.items():
        width = model["fitting_net"]["dim_case_embd"]
        if width and width < len(models):
            raise ConfigError(
                f"model_dict.{name}.fitting_net.dim_case_embd is {width}; with {len(models)} heads it must "
                f"be at least {len(models)}"
            )
