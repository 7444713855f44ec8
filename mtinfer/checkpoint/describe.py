"""The text that `mtinfer info` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .peek import CheckpointInfo, HeadInfo

__all__ = ["describe", "file_size"]

#: longer type maps are shortened
MAX_ELEMENTS = 24


def describe(info: CheckpointInfo) -> list[str]:
    """Say in lines of text what is in a file.

    Parameters
    ----------
    info
        From `peek.peek`.

    Returns
    -------
    list of str
        Lines without a trailing newline. What all heads have alike is said once.
    """
    step = "step unknown" if info.step is None else f"step {info.step:,}"
    debris = ", with copies left by compiled graphs (ignored)" if info.has_debris else ""
    kind = "training checkpoint" if info.format == "training" else "converted checkpoint"
    name = Path(info.path).name
    lines = [f"{name}: {kind}, {info.dialect} dialect, {step}, {file_size(info.size)}{debris}"]
    if source := info.source:
        size, digest = file_size(source["size"]), source["sha256"][:12]
        lines.append(f"made from    {source['name']} ({size}, sha256 {digest}…)")
    usable = [head for head in info.heads if head.refused is None]
    lines.append(f"parameters   {info.parameters:,} in all")
    lines += _common("type map", info.heads, lambda head: _elements(head.type_map))
    lines += _common("descriptor", usable, lambda head: _descriptor(head.descriptor, _precision(head)))
    lines += _common("fitting net", usable, _fitting)
    lines += [f"shared       {share.part}: {', '.join(share.heads)}" for share in info.shared]
    if len(usable) > 1 and not info.shared:
        lines.append("shared       nothing")
    lines.append(f"heads        {len(info.heads)}")
    width = max(len(head.name) for head in info.heads)
    return [*lines, *(f"  {head.name:<{width}}  {_head(head)}" for head in info.heads)]


def file_size(size: int) -> str:
    """Bytes in a unit that is easy to read: ``2.6 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _common(label: str, heads: Iterable[HeadInfo], text: Callable[[HeadInfo], str]) -> Iterator[str]:
    """Yield a line for each distinct text, with the heads that it holds for where they differ."""
    groups: dict[str, list[str]] = {}
    for head in heads:
        groups.setdefault(text(head), []).append(head.name)
    for line, names in groups.items():
        yield f"{label:<12} {line}" + (f" ({', '.join(names)})" if len(groups) > 1 else "")


def _elements(names: tuple[str, ...]) -> str:
    if len(names) <= MAX_ELEMENTS:
        return " ".join(names)
    return f"{' '.join(names[: MAX_ELEMENTS - 1])} … {names[-1]} ({len(names)} elements)"


def _precision(head: HeadInfo, part: str = "descriptor") -> str:
    return head.precision[part] if head.precision else ""


def _descriptor(descriptor: Mapping[str, Any], precision: str) -> str:
    kind = descriptor["type"] + (f", {precision}:" if precision else "")
    if members := descriptor.get("members"):
        return f"{kind} {' + '.join(_descriptor(member, '') for member in members)}"
    numbers = (f"{key} {_value(value)}" for key, value in descriptor.items() if key != "type")
    return "  ".join((kind, *numbers))


def _fitting(head: HeadInfo) -> str:
    fitting = head.fitting_net
    conditions = ("dim_case_embd", "numb_fparam", "numb_aparam")
    numbers = "".join(f"  {key} {fitting[key]}" for key in conditions if fitting.get(key))
    layers = _value(fitting.get("neuron", "default"))
    activation = fitting.get("activation_function", "tanh")
    return f"{_precision(head, 'fitting_net')}: neuron {layers}  {activation}{numbers}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _head(head: HeadInfo) -> str:
    if head.refused is not None:
        return f"can't be evaluated: {head.refused}"
    parts = [f"{head.parameters:,} parameters"]
    if head.observed_types is not None:
        parts.append(f"trained on {_elements(head.observed_types)}")
    if head.aliases:
        parts.append(f"also called {', '.join(head.aliases)}")
    return ", ".join(parts)
