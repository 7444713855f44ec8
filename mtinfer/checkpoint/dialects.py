"""How each dialect spells the name of a weight: one literal table, readable in both directions.

A dialect is the spelling of the training backend that wrote the file: ``pt`` or ``pt_expt``. Everything
after the loader sees only the canonical names of the first column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from ..errors import CheckpointError

__all__ = [
    "ALWAYS_FLOAT64",
    "DIALECTS",
    "DROPPED",
    "TABLE",
    "canonical_name",
    "canonical_weights",
    "detect",
    "file_key",
]

T = TypeVar("T")

# The pattern language of the tables. Placeholders stand in the same order in every column of a row.
#   #       index, copied
#   (a|b)   one of these names, copied
#   ~       nothing, or the path of a member of a hybrid descriptor (.descrpt_list.#), copied
#   @       tensor of a layer, translated by `Spelling.leaves`
BLOCK = "(se_atten|repinit|repinit_three_body)"
STATS_BLOCK = "(se_atten|repinit|repinit_three_body|repformers|repflows)"
EMBEDDING = "(type_embedding|chg_embedding|spin_embedding)"
LINEAR = (
    "(g1_shape_tranform|tebd_transform|mix_cs_mlp|repformers.g2_embd|repflows.edge_embd|repflows.angle_embd)"
)
REPFORMER = (
    "(linear1|linear2|g1_self_mlp|proj_g1g2|proj_g1g1g2|attn2g_map.mapqk|attn2_mh_apply.mapv"
    "|attn2_mh_apply.head_map|attn2_lm|attn2_ev_apply.head_map|loc_attn.mapq|loc_attn.mapkv|loc_attn.head_map)"
)
REPFLOW = (
    "(node_self_mlp|node_sym_linear|node_edge_linear|edge_self_linear|edge_angle_linear1|edge_angle_linear2"
    "|angle_self_linear|a_compress_n_linear|a_compress_e_linear)"
)
FITTING = "(bias_atom_e|case_embd|default_fparam_tensor|fparam_avg|fparam_inv_std|aparam_avg|aparam_inv_std)"
ATTENTION = "se_atten.dpa1_attention.attention_layers.#"
D = "atomic_model.descriptor~"
F = "atomic_model.fitting_net"

#: canonical name | key in a `pt` file | key in a `pt_expt` file; file keys are relative to the head
TABLE: tuple[tuple[str, str, str], ...] = (
    ("min_nbor_dist", "min_nbor_dist", "_min_nbor_dist"),
    ("(out_bias|out_std)", "atomic_model.(out_bias|out_std)", "atomic_model.(out_bias|out_std)"),
    (f"fitting_net.{FITTING}", f"{F}.{FITTING}", f"{F}.{FITTING}"),
    (
        "fitting_net.nets.#.layers.#.@",
        f"{F}.filter_layers.networks.#.layers.#.@",
        f"{F}.nets._module_networks.#.layers.#.@",
    ),
    (
        f"descriptor~.{EMBEDDING}.layers.#.@",
        f"{D}.{EMBEDDING}.embedding.embedding_net.layers.#.@",
        f"{D}.{EMBEDDING}.embedding_net.layers.#.@",
    ),
    ("descriptor~.mean", f"{D}.sea.mean", f"{D}.davg"),
    ("descriptor~.stddev", f"{D}.sea.stddev", f"{D}.dstd"),
    (
        "descriptor~.embeddings.#.layers.#.@",
        f"{D}.sea.filter_layers.networks.#.layers.#.@",
        f"{D}.embeddings._module_networks.#.layers.#.@",
    ),
    (
        f"descriptor~.{STATS_BLOCK}.(mean|stddev)",
        f"{D}.{STATS_BLOCK}.(mean|stddev)",
        f"{D}.{STATS_BLOCK}.(mean|stddev)",
    ),
    (
        f"descriptor~.{BLOCK}.embeddings.#.layers.#.@",
        f"{D}.{BLOCK}.filter_layers.networks.#.layers.#.@",
        f"{D}.{BLOCK}.embeddings._module_networks.#.layers.#.@",
    ),
    (
        f"descriptor~.{BLOCK}.embeddings_strip.#.layers.#.@",
        f"{D}.{BLOCK}.filter_layers_strip.networks.#.layers.#.@",
        f"{D}.{BLOCK}.embeddings_strip._module_networks.#.layers.#.@",
    ),
    (
        "descriptor~.se_atten.attention.#.(in_proj|out_proj).@",
        f"{D}.{ATTENTION}.attention_layer.(in_proj|out_proj).@",
        f"{D}.{ATTENTION}.attention_layer.(in_proj|out_proj).@",
    ),
    (
        "descriptor~.se_atten.attention.#.layer_norm.@",
        f"{D}.{ATTENTION}.attn_layer_norm.@",
        f"{D}.{ATTENTION}.attn_layer_norm.@",
    ),
    (f"descriptor~.{LINEAR}.@", f"{D}.{LINEAR}.@", f"{D}.{LINEAR}.@"),
    (
        f"descriptor~.repformers.layers.#.{REPFORMER}.@",
        f"{D}.repformers.layers.#.{REPFORMER}.@",
        f"{D}.repformers.layers.#.{REPFORMER}.@",
    ),
    (
        "descriptor~.repformers.layers.#.(g1|g2|h2)_residual.#",
        f"{D}.repformers.layers.#.(g1|g2|h2)_residual.#",
        f"{D}.repformers.layers.#.(g1|g2|h2)_residual.#",
    ),
    (
        f"descriptor~.repflows.layers.#.{REPFLOW}.@",
        f"{D}.repflows.layers.#.{REPFLOW}.@",
        f"{D}.repflows.layers.#.{REPFLOW}.@",
    ),
    (
        "descriptor~.repflows.layers.#.(n|e|a)_residual.#",
        f"{D}.repflows.layers.#.(n|e|a)_residual.#",
        f"{D}.repflows.layers.#.(n|e|a)_residual.#",
    ),
)

#: keys that carry nothing a model needs: zero-length in an uncompressed model, or given by its configuration
DROPPED: dict[str, tuple[str, ...]] = {
    "pt": (
        f"{D}.(sea|se_atten|repinit|repinit_three_body).(compress_info|compress_data).#",
        f"{D}.{BLOCK}.type_embd_data",
    ),
    "pt_expt": (
        "atomic_model.(atom_excl|pair_excl).type_mask",
        f"{F}.emask.type_mask",
        f"{D}.emask.type_mask",
        f"{D}.{STATS_BLOCK}.emask.type_mask",
        f"{D}.type_embedding.econf_tebd",
        f"{D}.nlist_cut_idx.#",
        f"{D}.graph_lower_disabled",  # not a weight; the loader keeps its value in the record of the head
    ),
}

#: canonical names that stay float64 whatever the precision of the networks
ALWAYS_FLOAT64 = frozenset({"out_bias", "out_std", "min_nbor_dist", "fitting_net.bias_atom_e"})


@dataclass(frozen=True)
class Spelling:
    """What a column of `TABLE` means beyond its literal text."""

    column: int
    #: endings of weight, bias and timestep of a layer
    leaves: tuple[str, str, str]
    #: collection of networks; a file lists each of its tensors once more below `_networks`
    collection: str | None


CANONICAL = Spelling(0, ("w", "b", "idt"), None)
DIALECTS: dict[str, Spelling] = {
    "pt": Spelling(1, ("matrix", "bias", "idt"), "networks"),
    "pt_expt": Spelling(2, ("w", "b", "idt"), "_module_networks"),
}

_TOKEN = re.compile(r"#|@|~|\([^)]*\)|[^#@~(]+")


def compile_pattern(pattern: str, spelling: Spelling) -> re.Pattern[str]:
    """Turn a pattern of the tables into a regular expression with one group per placeholder."""
    parts = []
    for token in _TOKEN.findall(pattern):
        if token == "#":
            parts.append(r"(0|[1-9]\d*)")
        elif token == "~":
            parts.append(r"((?:\.descrpt_list\.(?:0|[1-9]\d*))*)")
        elif token == "@":
            parts.append(f"({'|'.join(spelling.leaves)})")
        elif token.startswith("("):
            parts.append(token.replace(".", r"\."))
        else:
            parts.append(_either_collection(re.escape(token), spelling.collection))
    return re.compile("".join(parts))


def _either_collection(text: str, collection: str | None) -> str:
    return text if collection is None else re.sub(rf"\b{collection}\b", f"(?:{collection}|_networks)", text)


def render(pattern: str, values: Iterable[str], source: Spelling, target: Spelling) -> str:
    """Fill the placeholders of `pattern` (spelled as `target`) with what `source`'s pattern captured."""
    remaining: Iterator[str] = iter(values)
    parts = []
    for token in _TOKEN.findall(pattern):
        if token == "@":
            parts.append(target.leaves[source.leaves.index(next(remaining))])
        elif token[0] in "#~(":
            parts.append(next(remaining))
        else:
            parts.append(token)
    return "".join(parts)


@cache
def _rules(dialect: str) -> tuple[tuple[re.Pattern[str], str | None], ...]:
    spelling = DIALECTS[dialect]
    mapped = [(compile_pattern(row[spelling.column], spelling), row[CANONICAL.column]) for row in TABLE]
    return (*mapped, *((compile_pattern(pattern, spelling), None) for pattern in DROPPED[dialect]))


@cache
def canonical_name(dialect: str, key: str) -> str | None:
    """Name of a weight in the namespace of the models.

    Parameters
    ----------
    dialect
        ``"pt"`` or ``"pt_expt"``.
    key
        Key in the file, relative to its head.

    Returns
    -------
    str or None
        Canonical name; None for a key on the drop list.

    Raises
    ------
    KeyError
        Neither the table nor the drop list of the dialect knows the key.
    """
    spelling = DIALECTS[dialect]
    for expression, canonical in _rules(dialect):
        if match := expression.fullmatch(key):
            return canonical and render(canonical, match.groups(), spelling, CANONICAL)
    raise KeyError(key)


@cache
def _canonical_rules(dialect: str) -> list[tuple[re.Pattern[str], str]]:
    column = DIALECTS[dialect].column
    return [(compile_pattern(row[0], CANONICAL), row[column]) for row in TABLE]


def file_key(dialect: str, name: str) -> str:
    """Key of a weight in a file, relative to its head; the opposite of `canonical_name`.

    Raises
    ------
    KeyError
        No row of the table has a weight of that name.
    """
    for expression, pattern in _canonical_rules(dialect):
        if match := expression.fullmatch(name):
            return render(pattern, match.groups(), CANONICAL, DIALECTS[dialect])
    raise KeyError(name)


def canonical_weights(
    dialect: str, head: str, entries: Mapping[str, T], *, same: Callable[[T, T], bool]
) -> dict[str, T]:
    """Rename all weights of a head; every key is used once, or stands on the drop list.

    Parameters
    ----------
    dialect
        ``"pt"`` or ``"pt_expt"``.
    head
        Name for error messages.
    entries
        Weights by their key in the file, relative to the head.
    same
        Whether two tensors hold the same numbers: a weight may be listed under two keys, but only then.

    Returns
    -------
    dict
        Weights by canonical name, sorted by it.

    Raises
    ------
    CheckpointError
        A key is unknown, or two keys of one weight differ.
    """
    weights: dict[str, T] = {}
    origin: dict[str, str] = {}
    for key, value in entries.items():
        try:
            name = canonical_name(dialect, key)
        except KeyError:
            raise CheckpointError(
                f"head {head!r} has the unknown weight {key!r} ({dialect} dialect); the file comes from a "
                "newer or modified version and is not read, because the weight may change the numbers"
            ) from None
        if name is None:
            continue
        if name in weights and not same(weights[name], value):
            raise CheckpointError(
                f"head {head!r}: {origin[name]!r} and {key!r} must be the same weight but hold different "
                "numbers; the file is damaged"
            )
        weights.setdefault(name, value)
        origin.setdefault(name, key)
    return dict(sorted(weights.items()))


def detect(keys: Iterable[str]) -> str:
    """Tell the dialect from the endings of the keys.

    Raises
    ------
    CheckpointError
        The keys have endings of both dialects, or of neither.
    """
    endings = {key.rpartition(".")[2] for key in keys}
    found = [name for name, ending in (("pt", "matrix"), ("pt_expt", "w")) if ending in endings]
    if len(found) != 1:
        what = "both '.matrix' and '.w'" if found else "neither '.matrix' nor '.w'"
        raise CheckpointError(
            f"ambiguous dialect: {what} among the weights; expected '.matrix' (pt) or '.w' (pt_expt)"
        )
    return found[0]
