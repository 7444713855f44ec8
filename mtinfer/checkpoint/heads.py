"""The heads of a checkpoint: whose weights are whose, what each is called, which one is meant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import CheckpointError, UnknownHeadError, nearest
from .dialects import detect
from .refusals import Shaped, refusal

__all__ = ["HeadEntries", "TrainingState", "check_aliases", "find_head", "list_heads", "split_state"]

T = TypeVar("T", bound=Shaped)

#: head of a file without `model_dict`, and the head that is meant where none is named
DEFAULT_HEAD = "Default"
#: levels that a wrapper puts in front of the real weights
WRAPPERS = ("original_model.", "_orig_mod.")
#: first segments of a compiled graph's copies of the weights
COMPILED = "compiled_forward_lower"
TASK_COPY = "_task_"


@dataclass(frozen=True)
class HeadEntries(Generic[T]):
    """What a file holds for one head, still in the spelling of its dialect."""

    name: str
    aliases: tuple[str, ...]
    config: dict[str, Any]
    #: key relative to the head -> tensor; copies made by compiled graphs are gone
    entries: dict[str, T]
    #: why the head can't be evaluated; None where it can
    refused: str | None


@dataclass(frozen=True)
class TrainingState(Generic[T]):
    """What a training checkpoint holds besides the optimizer."""

    dialect: str
    #: training steps completed
    step: int | None
    #: whether keys of compiled graphs were found (and left out)
    has_debris: bool
    heads: tuple[HeadEntries[T], ...]


def split_state(content: object, tensor_type: type[T]) -> TrainingState[T]:
    """Divide the content of a checkpoint among its heads.

    Parameters
    ----------
    content
        What the file unpickles to: a dict with the key ``model``, or the bare state dict.
    tensor_type
        Class of the tensors in it.

    Returns
    -------
    TrainingState
        Heads in the order of the configuration.

    Raises
    ------
    CheckpointError
        Not a checkpoint, ambiguous dialect, clashing aliases, or weights that belong to no head.
    """
    model = content.get("model", content) if isinstance(content, Mapping) else None
    extra = model.get("_extra_state") if isinstance(model, Mapping) else None
    params = extra.get("model_params") if isinstance(extra, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(extra, Mapping) or not isinstance(params, Mapping):
        raise CheckpointError(
            "the file is no training checkpoint: it lacks the model with its configuration "
            "(model / _extra_state / model_params)"
        )
    tensors = {str(key): value for key, value in model.items() if key != "_extra_state"}
    for key, value in tensors.items():
        if not isinstance(value, tensor_type):
            raise CheckpointError(f"the weight {key!r} is a {type(value).__name__}, expected a tensor")
    configs = _configurations(params)
    entries, has_debris = _clean(_by_head(tensors, configs, multitask="model_dict" in params))
    heads = tuple(_head(name, config, entries[name]) for name, config in configs.items())
    check_aliases({head.name: head.aliases for head in heads})
    usable = [head for head in heads if head.refused is None] or heads
    dialect = detect(key for head in usable for key in head.entries)
    return TrainingState(dialect, _completed_steps(extra, dialect), has_debris, heads)


def _configurations(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    configs = params.get("model_dict", {DEFAULT_HEAD: params})
    if not isinstance(configs, Mapping) or not configs:
        raise CheckpointError("the configuration lists no heads (model_dict is empty)")
    return {str(name): _plain(str(name), config) for name, config in configs.items()}


def _plain(head: str, config: object) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError) as err:
        raise CheckpointError(f"the configuration of head {head!r} is not plain data: {err}") from err
    if not isinstance(plain, dict):
        raise CheckpointError(
            f"the configuration of head {head!r} is a {type(config).__name__}, expected a dict"
        )
    return plain


def _by_head(
    tensors: Mapping[str, T], configs: Mapping[str, Any], *, multitask: bool
) -> dict[str, dict[str, T]]:
    """Divide by the anchored prefix ``model.<head>.``; a bare single-task file has no head level."""
    bare = not multitask and not any(key.startswith(f"model.{DEFAULT_HEAD}.") for key in tensors)
    entries: dict[str, dict[str, T]] = {name: {} for name in configs}
    for key, tensor in tensors.items():
        model, _, rest = key.partition(".")
        head, _, inner = (DEFAULT_HEAD, "", rest) if bare else rest.partition(".")
        if model != "model" or head not in entries or not inner:
            raise CheckpointError(
                f"the weight {key!r} belongs to no head of the configuration; heads: {', '.join(configs)}"
            )
        entries[head][inner] = tensor
    return entries


def _clean(entries: Mapping[str, Mapping[str, T]]) -> tuple[dict[str, dict[str, T]], bool]:
    """Take off wrapper levels and drop the copies that compiled graphs left behind, inside each head."""
    cleaned: dict[str, dict[str, T]] = {name: {} for name in entries}
    has_debris = False
    for name, tensors in entries.items():
        for key, tensor in tensors.items():
            inner = key
            while wrapper := next((level for level in WRAPPERS if inner.startswith(level)), ""):
                inner = inner.removeprefix(wrapper)
            segments = inner.split(".")
            dropped = segments[0] == COMPILED or any(part.startswith(TASK_COPY) for part in segments)
            has_debris = has_debris or dropped or inner != key
            if dropped:
                continue
            if inner in cleaned[name]:
                raise CheckpointError(
                    f"head {name!r} has the weight {inner!r} with and without a wrapper level"
                )
            cleaned[name][inner] = tensor
        if not cleaned[name]:
            raise CheckpointError(f"head {name!r} is in the configuration but has no weights in the file")
    return cleaned, has_debris


def _head(name: str, config: dict[str, Any], entries: dict[str, T]) -> HeadEntries[T]:
    aliases = config.get("model_branch_alias") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise CheckpointError(
            f"the aliases of head {name!r} (model_branch_alias) are {aliases!r}, expected names"
        )
    refused = refusal(name, config, entries)
    for part, kind in (("type_map", list), ("descriptor", dict), ("fitting_net", dict)):
        if refused is None and not isinstance(config.get(part), kind):
            raise CheckpointError(f"the configuration of head {name!r} has no valid {part!r}")
    unique = tuple(dict.fromkeys(alias for alias in aliases if alias != name))
    return HeadEntries(name, unique, config, entries, refused)


def _completed_steps(extra: Mapping[str, Any], dialect: str) -> int | None:
    infos = extra.get("train_infos")
    step = infos.get("step") if isinstance(infos, Mapping) else None
    if not isinstance(step, int):
        return None
    # pt stores the 0-based index of the last step, pt_expt the number of steps
    return step + 1 if dialect == "pt" else step


def check_aliases(heads: Mapping[str, Sequence[str]]) -> None:
    """Refuse an alias that two heads claim, or that is the name of another head.

    Raises
    ------
    CheckpointError
        Names the alias and both heads.
    """
    owner = {name: name for name in heads}
    for name, aliases in heads.items():
        for alias in aliases:
            if owner.setdefault(alias, name) != name:
                raise CheckpointError(
                    f"the alias {alias!r} of head {name!r} clashes with head {owner[alias]!r}; "
                    "an alias must stand for one head"
                )


def list_heads(heads: Mapping[str, Sequence[str]]) -> str:
    """Names for an error message: ``water (H2O, liquid), copper``."""
    return ", ".join(
        name + (f" ({', '.join(aliases)})" if aliases else "") for name, aliases in heads.items()
    )


def find_head(name: str | None, heads: Mapping[str, Sequence[str]]) -> str:
    """Find the head that is meant.

    Parameters
    ----------
    name
        Name or alias; exact spelling wins, else case does not matter. None means the only head, or the one
        called ``Default``.
    heads
        Aliases by head.

    Returns
    -------
    str
        Name of the head.

    Raises
    ------
    UnknownHeadError
        No head or several heads are meant; lists all, and the nearest where a name is misspelled.
    """
    if name is None:
        if len(heads) == 1:
            return next(iter(heads))
        found = [head for head, aliases in heads.items() if DEFAULT_HEAD in (head, *aliases)]
        if found:
            return found[0]
        raise UnknownHeadError(
            f"no head was named and the file has several; choose one of: {list_heads(heads)}"
        )
    if name in heads:
        return name
    found = [head for head, aliases in heads.items() if name in aliases]
    found = found or [
        head
        for head, aliases in heads.items()
        if name.casefold() in {spelling.casefold() for spelling in (head, *aliases)}
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownHeadError(
            f"{name!r} may mean {' or '.join(found)}; spell upper and lower case as in: {list_heads(heads)}"
        )
    spellings = [spelling for head, aliases in heads.items() for spelling in (head, *aliases)]
    raise UnknownHeadError(f"no head {name!r}{nearest(name, spellings)}; heads: {list_heads(heads)}")
