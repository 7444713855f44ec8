"""The description inside a converted file: one JSON text that says what the stored tensors are.

A weight is called ``<head>/<canonical name>``. Each distinct tensor is stored once, under the first weight
that uses it. Two tables lead from the other weights to it:

* ``shared``: the weight *is* that weight (the heads were trained with it in common);
* ``equal``: the weight merely holds the same numbers (a bias of zeros, say).

A target in ``shared`` is stored or stands in ``equal``; a target in ``equal`` is stored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .dialects import DIALECTS
from .heads import check_aliases

__all__ = ["SCHEMA_VERSION", "ArchiveHead", "Description", "parse", "serialize"]

SCHEMA_VERSION = 2
#: the one metadata entry of the file; a single one, because writers do not keep the order of several
METADATA_KEY = "mtinfer"


@dataclass(frozen=True)
class ArchiveHead:
    """A head without its tensors."""

    name: str
    aliases: tuple[str, ...]
    config: dict[str, Any]
    graph_lower_disabled: bool


@dataclass(frozen=True)
class Description:
    """Everything in a converted file but the tensors."""

    dialect: str
    step: int | None
    #: name, size, sha256 of the training checkpoint
    source: dict[str, Any]
    heads: tuple[ArchiveHead, ...]
    shared: dict[str, str]
    equal: dict[str, str]
    #: sha256 of the stored tensors and of all of the above
    digest: str = ""

    def weights(self, stored: Collection[str]) -> dict[str, dict[str, tuple[str, str]]]:
        """Resolve the tables.

        Parameters
        ----------
        stored
            Keys of the tensors in the file.

        Returns
        -------
        dict
            Per head, by canonical name: the weight that it is shared with (itself where it is not), and the
            stored key of its numbers.
        """
        found: dict[str, dict[str, tuple[str, str]]] = {head.name: {} for head in self.heads}
        for weight in (*stored, *self.shared, *self.equal):
            head, _, name = weight.rpartition("/")
            identity = self.shared.get(weight, weight)
            found[head][name] = (identity, self.equal.get(identity, identity))
        return {head: dict(sorted(weights.items())) for head, weights in found.items()}


def serialize(description: Description) -> dict[str, str]:
    """Metadata of a safetensors file; the same description always gives the same text."""
    document = {
        "schema": SCHEMA_VERSION,
        "dialect": description.dialect,
        "step": description.step,
        "source": description.source,
        "heads": [
            {
                "name": head.name,
                "aliases": list(head.aliases),
                "graph_lower_disabled": head.graph_lower_disabled,
                "config": head.config,
            }
            for head in description.heads
        ],
        "shared": description.shared,
        "equal": description.equal,
        "digest": description.digest,
    }
    return {METADATA_KEY: json.dumps(document, ensure_ascii=False, separators=(",", ":"))}


def parse(file: str, metadata: Mapping[str, str], stored: Collection[str]) -> Description:
    """Read and check the description.

    Parameters
    ----------
    file
        Name of the file, for error messages.
    metadata
        Metadata of the safetensors header.
    stored
        Keys of the tensors in the file.

    Returns
    -------
    Description
        Every weight that it names leads to a stored tensor.

    Raises
    ------
    CheckpointError
        Another program wrote the file, a newer version did, or the description is not consistent.
    """
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{file!r} is a safetensors file that mtinfer did not write; expected one from 'mtinfer convert'"
        )
    try:
        document = json.loads(metadata[METADATA_KEY])
    except ValueError as err:
        raise CheckpointError(f"the description in {file!r} is damaged: {err}") from err
    document = _Checked(file, document, "description")
    if (version := document.take("schema", int)) != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file!r} has schema version {version}, this mtinfer reads {SCHEMA_VERSION}; convert the "
            "checkpoint again or upgrade mtinfer"
        )
    description = Description(
        dialect=document.take("dialect", str),
        step=document.take("step", int, optional=True),
        source=_source(file, document.take("source", dict)),
        heads=tuple(_parse_head(file, entry) for entry in document.take("heads", list)),
        shared=document.names("shared"),
        equal=document.names("equal"),
        digest=document.take("digest", str),
    )
    _check_tables(file, description, set(stored))
    return description


class _Checked:
    """A JSON object whose entries are checked as they are taken."""

    def __init__(self, file: str, value: Any, what: str) -> None:
        self._file, self._value, self._what = file, value, what
        if not isinstance(value, dict):
            raise CheckpointError(f"the {what} in {file!r} is a {type(value).__name__}, expected an object")

    def take(self, key: str, kind: type, *, optional: bool = False) -> Any:
        value = self._value.get(key)
        if optional and value is None:
            return None
        if type(value) is not kind:
            raise CheckpointError(
                f"{key!r} in the {self._what} of {self._file!r} is {value!r}, expected {kind.__name__}"
            )
        return value

    def names(self, key: str) -> dict[str, str]:
        table = self.take(key, dict)
        for target in table.values():
            if not isinstance(target, str):
                raise CheckpointError(f"{key!r} in {self._file!r} leads to {target!r}, expected a weight")
        return dict(table)


def _source(file: str, entry: dict[str, Any]) -> dict[str, Any]:
    source = _Checked(file, entry, "source")
    return {key: source.take(key, kind) for key, kind in (("name", str), ("size", int), ("sha256", str))}


def _parse_head(file: str, entry: Any) -> ArchiveHead:
    head = _Checked(file, entry, "head")
    aliases = head.take("aliases", list)
    if not all(isinstance(alias, str) for alias in aliases):
        raise CheckpointError(f"'aliases' in the head of {file!r} is {aliases!r}, expected names")
    return ArchiveHead(
        name=head.take("name", str),
        aliases=tuple(aliases),
        config=head.take("config", dict),
        graph_lower_disabled=head.take("graph_lower_disabled", bool),
    )


def _check_tables(file: str, description: Description, stored: set[str]) -> None:
    if description.dialect not in DIALECTS:
        raise CheckpointError(
            f"{file!r} has the dialect {description.dialect!r}, expected {' or '.join(DIALECTS)}"
        )
    names = {head.name for head in description.heads}
    if len(names) != len(description.heads) or not names:
        raise CheckpointError(f"{file!r} lists no heads, or one twice")
    check_aliases({head.name: head.aliases for head in description.heads})
    equal, shared = set(description.equal), set(description.shared)
    if twice := (stored & equal) | (stored & shared) | (equal & shared):
        raise CheckpointError(f"{file!r} defines the weight {min(twice)!r} twice")
    for table, allowed in ((description.equal, stored), (description.shared, stored | equal)):
        for weight, target in table.items():
            if target not in allowed:
                raise CheckpointError(
                    f"{file!r}: the weight {weight!r} leads to {target!r}, which is not stored"
                )
    for weight in stored | equal | shared:
        if weight.rpartition("/")[0] not in names:
            raise CheckpointError(f"{file!r} has the weight {weight!r}, that belongs to none of its heads")
