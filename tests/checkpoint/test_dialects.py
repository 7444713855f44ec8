"""The key tables."""

from __future__ import annotations

from operator import eq
from pathlib import Path

import pytest
import torch
from checkpoint_files import SAMPLE_FILES, file_id

from mtinfer.checkpoint import dialects
from mtinfer.checkpoint.dialects import CANONICAL, DIALECTS, TABLE, canonical_name, canonical_weights, detect
from mtinfer.checkpoint.heads import split_state
from mtinfer.errors import CheckpointError


@pytest.mark.parametrize(
    ("dialect", "key", "name"),
    [
        ("pt", "min_nbor_dist", "min_nbor_dist"),
        ("pt_expt", "_min_nbor_dist", "min_nbor_dist"),
        ("pt", "atomic_model.out_bias", "out_bias"),
        ("pt", "atomic_model.fitting_net.case_embd", "fitting_net.case_embd"),
        (
            "pt",
            "atomic_model.fitting_net.filter_layers.networks.2.layers.0.matrix",
            "fitting_net.nets.2.layers.0.w",
        ),
        (
            "pt",
            "atomic_model.fitting_net.filter_layers._networks.2.layers.0.idt",
            "fitting_net.nets.2.layers.0.idt",
        ),
        (
            "pt_expt",
            "atomic_model.fitting_net.nets._module_networks.0.layers.3.b",
            "fitting_net.nets.0.layers.3.b",
        ),
        ("pt", "atomic_model.descriptor.sea.mean", "descriptor.mean"),
        ("pt_expt", "atomic_model.descriptor.dstd", "descriptor.stddev"),
        (
            "pt",
            "atomic_model.descriptor.sea.filter_layers.networks.5.layers.1.bias",
            "descriptor.embeddings.5.layers.1.b",
        ),
        (
            "pt",
            "atomic_model.descriptor.type_embedding.embedding.embedding_net.layers.0.matrix",
            "descriptor.type_embedding.layers.0.w",
        ),
        (
            "pt_expt",
            "atomic_model.descriptor.se_atten.embeddings_strip._networks.0.layers.1.w",
            "descriptor.se_atten.embeddings_strip.0.layers.1.w",
        ),
        (
            "pt",
            "atomic_model.descriptor.se_atten.dpa1_attention.attention_layers.1.attention_layer.in_proj.bias",
            "descriptor.se_atten.attention.1.in_proj.b",
        ),
        (
            "pt_expt",
            "atomic_model.descriptor.se_atten.dpa1_attention.attention_layers.0.attn_layer_norm.w",
            "descriptor.se_atten.attention.0.layer_norm.w",
        ),
        (
            "pt",
            "atomic_model.descriptor.repinit_three_body.filter_layers.networks.0.layers.2.matrix",
            "descriptor.repinit_three_body.embeddings.0.layers.2.w",
        ),
        ("pt", "atomic_model.descriptor.g1_shape_tranform.matrix", "descriptor.g1_shape_tranform.w"),
        ("pt", "atomic_model.descriptor.repformers.g2_embd.bias", "descriptor.repformers.g2_embd.b"),
        (
            "pt_expt",
            "atomic_model.descriptor.repformers.layers.1.attn2_mh_apply.head_map.w",
            "descriptor.repformers.layers.1.attn2_mh_apply.head_map.w",
        ),
        (
            "pt",
            "atomic_model.descriptor.repflows.layers.2.e_residual.1",
            "descriptor.repflows.layers.2.e_residual.1",
        ),
        ("pt", "atomic_model.descriptor.mix_cs_mlp.bias", "descriptor.mix_cs_mlp.b"),
        (
            "pt_expt",
            "atomic_model.descriptor.chg_embedding.embedding_net.layers.0.w",
            "descriptor.chg_embedding.layers.0.w",
        ),
        (
            "pt",
            "atomic_model.descriptor.descrpt_list.1.sea.stddev",
            "descriptor.descrpt_list.1.stddev",
        ),
        (
            "pt",
            "atomic_model.descriptor.descrpt_list.0.descrpt_list.10.se_atten.mean",
            "descriptor.descrpt_list.0.descrpt_list.10.se_atten.mean",
        ),
    ],
)
def test_keys_have_their_canonical_name(dialect: str, key: str, name: str) -> None:
    assert canonical_name(dialect, key) == name


@pytest.mark.parametrize(
    ("dialect", "key"),
    [
        ("pt", "atomic_model.descriptor.sea.compress_info.0"),
        ("pt", "atomic_model.descriptor.descrpt_list.0.se_atten.type_embd_data"),
        ("pt_expt", "atomic_model.pair_excl.type_mask"),
        ("pt_expt", "atomic_model.descriptor.emask.type_mask"),
        ("pt_expt", "atomic_model.descriptor.descrpt_list.2.repformers.emask.type_mask"),
        ("pt_expt", "atomic_model.descriptor.type_embedding.econf_tebd"),
        ("pt_expt", "atomic_model.descriptor.nlist_cut_idx.1"),
        ("pt_expt", "atomic_model.descriptor.graph_lower_disabled"),
    ],
)
def test_keys_on_the_drop_list(dialect: str, key: str) -> None:
    assert canonical_name(dialect, key) is None


@pytest.mark.parametrize(
    ("dialect", "key"),
    [
        ("pt", "atomic_model.descriptor.sea.means"),
        ("pt", "atomic_model.descriptor.sea.mean.0"),
        ("pt", "atomic_model.descriptor.davg"),
        ("pt", "atomic_model.fitting_net.filter_layers.networks.0.layers.0.w"),
        ("pt", "atomic_model.fitting_net.filter_layers.networks.00.layers.0.matrix"),
        ("pt", "atomic_model.descriptor.repformers.layers.0.linear3.matrix"),
        ("pt", "xatomic_model.out_bias"),
        ("pt_expt", "atomic_model.descriptor.sea.mean"),
        ("pt_expt", "atomic_model.out_biasx"),
        ("pt_expt", "atomic_modelxout_bias"),
    ],
)
def test_other_keys_are_unknown(dialect: str, key: str) -> None:
    with pytest.raises(KeyError):
        canonical_name(dialect, key)


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=file_id)
def test_the_table_reads_in_both_directions(path: Path) -> None:
    """Every key leads to one name by one row, and that row alone leads back from the name to the key."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = split_state(content, torch.Tensor)
    spelling = DIALECTS[state.dialect]
    forward = [dialects.compile_pattern(row[spelling.column], spelling) for row in TABLE]
    backward = [dialects.compile_pattern(row[CANONICAL.column], CANONICAL) for row in TABLE]
    for key in {key for head in state.heads for key in head.entries}:
        name = canonical_name(state.dialect, key)
        rows = [number for number, row in enumerate(forward) if row.fullmatch(key)]
        if name is None:
            assert rows == []
            continue
        assert rows == [number for number, row in enumerate(backward) if row.fullmatch(name)]
        assert len(rows) == 1
        match = backward[rows[0]].fullmatch(name)
        assert match is not None
        source = dialects.render(TABLE[rows[0]][spelling.column], match.groups(), CANONICAL, spelling)
        assert source == key.replace("._networks.", f".{spelling.collection}.")


def test_unknown_key_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"head 'ice' has the unknown weight 'atomic_model\.extra'"
    ) as info:
        canonical_weights("pt", "ice", {"atomic_model.extra": 1}, same=eq)
    assert "\n" not in str(info.value)


def test_one_copy_of_a_collection_is_enough_and_two_must_agree() -> None:
    key = "atomic_model.fitting_net.filter_layers.{}.0.layers.0.matrix"
    name = "fitting_net.nets.0.layers.0.w"
    for collections in (["networks"], ["_networks"], ["networks", "_networks"]):
        entries = {key.format(collection): 7 for collection in collections}
        assert canonical_weights("pt", "ice", entries, same=eq) == {name: 7}
    differing = {key.format("networks"): 7, key.format("_networks"): 8}
    with pytest.raises(CheckpointError, match=r"networks.*_networks.*must be the same weight"):
        canonical_weights("pt", "ice", differing, same=eq)


def test_dialect_is_told_by_endings() -> None:
    assert detect(["a.matrix", "a.bias"]) == "pt"
    assert detect(["a.w", "a.bias"]) == "pt_expt"
    with pytest.raises(CheckpointError, match=r"ambiguous dialect: both '\.matrix' and '\.w'"):
        detect(["a.matrix", "b.w"])
    with pytest.raises(CheckpointError, match=r"ambiguous dialect: neither"):
        detect(["a.bias", "b.low"])
