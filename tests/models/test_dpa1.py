"""DPA-1 and se_atten_v2 against their equations, written out slot by slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from random_models import (
    Weights,
    cluster,
    environment_row,
    features,
    inputs_of,
    invariants,
    neighbors_of,
    network,
    random_weights,
    switch,
)

import mtinfer
from mtinfer.errors import UnsupportedModelError
from mtinfer.inputs import GraphInputs
from mtinfer.models import dpa1, layout
from mtinfer.models.descriptor import Setting
from mtinfer.models.dpa1 import DPA1
from mtinfer.random_checkpoint import write_random_checkpoint

CONFIG = {
    **{"type": "se_atten", "rcut": 4.0, "rcut_smth": 1.0, "sel": 12, "neuron": [3, 6], "axis_neuron": 2},
    **{"tebd_dim": 4, "attn": 5, "attn_layer": 0},
}
CUT = (1.0, 4.0)


def model(*, dialect: str = "pt", graph: bool = False, **config: Any) -> DPA1:
    return DPA1.from_config(CONFIG | config, Setting(tuple("ABC"), dialect, graph=graph))


def slot_by_slot(inputs: GraphInputs, weights: Weights, descriptor: DPA1, *, sel: int) -> np.ndarray:
    """All slots of the dense list, empty ones included, which carry the type of the frame's first atom."""
    types = inputs.types.tolist()
    table = type_table(weights)
    net = descriptor.pair_network
    result = []
    for i, center in enumerate(types):
        mean, stddev = (
            weights[f"descriptor.se_atten.{name}"][center, 0].numpy() for name in ("mean", "stddev")
        )
        slots: list[tuple[int, np.ndarray | None]] = [*neighbors_of(inputs, i)[:sel]]
        slots += [(types[0], None)] * (sel - len(slots))
        rows, g, w = [], [], []
        for kind, vector in slots:
            row = environment_row(vector, mean, stddev, CUT)
            rows.append(row)
            w.append(0.0 if vector is None else switch(float(np.linalg.norm(vector)), CUT))
            pair = table[kind] if net.one_sided else np.concatenate([table[kind], table[center]])
            g.append(pair_features(row[0], pair, w[-1], weights, strip=net.strip, smooth=net.smooth))
        features = np.array(g)
        valid = np.array([vector is not None for _, vector in slots])
        for k in range(descriptor.attention.n_layers):
            features = attend(features, np.array(rows), np.array(w), valid, weights, descriptor, k)
        own = invariants(np.array(rows), features, sel, 2)
        result.append(np.concatenate([own, table[center]]) if descriptor.concat_output_tebd else own)
    return np.array(result)


def type_table(weights: Weights) -> np.ndarray:
    rows = weights["descriptor.type_embedding.layers.0.w"].numpy()
    bias = weights.get("descriptor.type_embedding.layers.0.b")
    rows = rows if bias is None else rows + bias.numpy()
    n_types, width = rows.shape
    return rows + np.tile(np.eye(n_types), width // n_types) if width in (n_types, 2 * n_types) else rows


def pair_features(
    s: float, pair: np.ndarray, w: float, weights: Weights, *, strip: bool, smooth: bool
) -> np.ndarray:
    prefix = "descriptor.se_atten.embeddings"
    if not strip:
        return network(np.array([s, *pair]), weights, f"{prefix}.0", 2)
    radial = network(np.array([s]), weights, f"{prefix}.0", 2)
    return radial * (1.0 + network(pair, weights, f"{prefix}_strip.0", 2) * (w if smooth else 1.0))


def attend(
    g: np.ndarray,
    rows: np.ndarray,
    w: np.ndarray,
    valid: np.ndarray,
    weights: Weights,
    descriptor: DPA1,
    k: int,
) -> np.ndarray:
    """One layer of gated attention over all slots; queries of empty slots see nothing."""
    options = descriptor.attention
    layer = {
        name: weights[f"descriptor.se_atten.attention.{k}.{name}"].numpy()
        for name in ("in_proj.w", "in_proj.b", "out_proj.w", "out_proj.b", "layer_norm.w", "layer_norm.b")
    }
    query, key, value = np.split(g @ layer["in_proj.w"] + layer["in_proj.b"], 3, axis=1)
    if options.normalize:
        query, key, value = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, key, value))
    logits = query @ key.T * options.scale
    both = np.outer(w, w)
    if options.smooth:
        logits = (logits + 20.0) * both - 20.0
        logits[:, ~valid] = -20.0
        weight = np.exp(logits)
    else:
        weight = np.exp(logits) * valid
    weight = weight / weight.sum(1, keepdims=True)
    weight = weight * np.outer(valid, valid)
    if options.smooth:
        weight = weight * both
    if options.angular:
        length = np.linalg.norm(rows[:, 1:], axis=1, keepdims=True)
        direction = rows[:, 1:] / np.where(length > 0, length, 1.0)
        weight = weight * (direction @ direction.T)
    x = g + weight @ value @ layer["out_proj.w"] + layer["out_proj.b"]
    x = x - x.mean(1, keepdims=True)
    return (
        x / np.sqrt((x**2).mean(1, keepdims=True) + options.ln_eps) * layer["layer_norm.w"]
        + layer["layer_norm.b"]
    )


@pytest.mark.parametrize("mode", ["concat", "strip"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sel": 5},
        {"type_one_side": True},
        {"tebd_dim": 3, "use_tebd_bias": True, "neuron": [7, 7]},
        {"tebd_dim": 6, "concat_output_tebd": False},
        {"smooth_type_embedding": False, "resnet_dt": True},
        {"attn_layer": 2},
        {"attn_layer": 2, "sel": 5},
        {"attn_layer": 1, "smooth_type_embedding": False, "attn_dotr": False},
        {"attn_layer": 1, "normalize": False, "temperature": 0.7, "ln_eps": 1e-2},
        {"attn_layer": 1, "scaling_factor": 3.0, "sel": 30},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_equations(mode: str, options: dict[str, Any]) -> None:
    descriptor = model(tebd_input_mode=mode, **options)
    weights = random_weights(descriptor.parameters())
    inputs = inputs_of(*cluster(), 4.0)
    expected = slot_by_slot(inputs, weights, descriptor, sel=options.get("sel", 12))
    np.testing.assert_allclose(features(descriptor, inputs, weights), expected, rtol=1e-10, atol=1e-12)


def test_graph_has_neither_truncation_nor_empty_slots() -> None:
    weights = random_weights(model().parameters())
    inputs = inputs_of(*cluster(), 4.0)
    short = model(sel=3, graph=True)
    assert short.selection(inputs).n_truncated == 0
    # as a dense list that is exactly filled, but for the constant in front
    counts = torch.bincount(inputs.centers)
    got = features(short, inputs, cut_statistics(weights, 3))
    for i, count in enumerate(counts.tolist()):
        dense = model(sel=count)
        expected = slot_by_slot(inputs, cut_statistics(weights, count), dense, sel=count)[i]
        expected[: 6 * 2] *= (count / 3) ** 2
        np.testing.assert_allclose(got[i], expected, rtol=1e-11, atol=1e-13)


def cut_statistics(weights: Weights, sel: int) -> Weights:
    own = {name: weights[f"descriptor.se_atten.{name}"][:, :1] for name in ("mean", "stddev")}
    return weights | {f"descriptor.se_atten.{name}": rows.expand(-1, sel, -1) for name, rows in own.items()}


@pytest.mark.parametrize("attn_layer", [0, 1])
def test_calls_of_any_length_give_the_same(attn_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = model(attn_layer=attn_layer, sel=40)
    weights = random_weights(descriptor.parameters())
    inputs = inputs_of(*cluster(27), 4.0)
    whole = features(descriptor, inputs, weights)
    monkeypatch.setattr(layout, "SLOTS_PER_CALL", 50)
    monkeypatch.setattr(dpa1, "_WITH_ATTENTION", (50, None))
    assert len(descriptor.layouts(inputs, descriptor.selection(inputs))) > 5
    np.testing.assert_allclose(features(descriptor, inputs, weights), whole, rtol=1e-12)


def test_v2_is_strip_and_smooth_whatever_the_file_says() -> None:
    descriptor = model(type="se_atten_v2", tebd_input_mode="concat", smooth_type_embedding=False)
    assert descriptor.pair_network.strip
    assert descriptor.pair_network.smooth
    assert descriptor.attention.smooth


@pytest.mark.parametrize(
    ("option", "strip"),
    [({"stripped_type_embedding": True}, True), ({"stripped_type_embedding": None}, False), ({}, False)],
)
def test_older_spelling_of_strip(option: dict[str, Any], strip: bool) -> None:
    assert model(**option).pair_network.strip is strip


@pytest.mark.parametrize("spelling", ["smooth_type_embedding", "smooth_type_embdding"])
def test_both_spellings_of_smooth(spelling: str) -> None:
    assert not model(**{spelling: False}).pair_network.smooth
    assert model().pair_network.smooth


def test_list_of_sel_counts_as_its_sum() -> None:
    assert model(sel=[5, 7]).sel == 12


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"lmax": 2}, "lmax=2 is not supported; supported is 1"),
        ({"attn_mask": True}, "attn_mask=true is not supported"),
        ({"axis_neuron": 99}, r"se_atten axis_neuron=99 is more than its \d+ features"),
        ({"tebd_input_mode": "stack"}, "tebd_input_mode 'stack' is unknown; known are concat and strip"),
    ],
)
def test_unsupported_options(option: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        model(**option)


@pytest.mark.parametrize("key", ["rcut", "rcut_smth"])
def test_missing_key(key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(UnsupportedModelError, match=f"se_atten lacks the required key '{key}'"):
        DPA1.from_config(config, Setting(tuple("ABC"), "pt"))


@pytest.mark.parametrize("level", [0.0, -60.0, -1e3, -1e5, 1e3])
@pytest.mark.parametrize("n_phantom", [0, 2])
def test_attention_whatever_its_logits_are(n_phantom: int, level: float) -> None:
    attention = model(attn_layer=1, smooth_type_embedding=True).attention
    logits = torch.linspace(0.4, -0.3, 5, dtype=torch.float64) + level
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    phantoms = torch.full((n_phantom,), -20.0, dtype=torch.float64)
    expected = torch.softmax(torch.cat([logits[:4], phantoms]), 0)
    count = torch.tensor(float(n_phantom), dtype=torch.float64)
    got = attention._softmax(logits, mask, count)
    torch.testing.assert_close(got, torch.nn.functional.pad(expected[:4], (0, 1)), rtol=1e-13, atol=0.0)
    assert torch.equal(attention._softmax(logits, torch.zeros_like(mask), count), torch.zeros_like(logits))


def test_forces_of_single_precision_close_to_the_cutoff(tmp_path: Path) -> None:
    """In floats the switch is rounding noise there, which attention by angles would scale to one."""
    single = {"type": "se_atten", "attn_layer": 2, "smooth_type_embedding": False, "precision": "float32"}
    config = {"type_map": ["O", "H"], "descriptor": CONFIG | single, "fitting_net": {"neuron": [8, 8]}}
    write_random_checkpoint(tmp_path / "single.pt", config)
    potentials = [mtinfer.load(tmp_path / "single.pt", compile=False, dtype=d) for d in (None, "float64")]
    for gap in (1e-1, 1e-2, 4e-3, 1e-3):
        atoms = ase.Atoms("OHH", [[0, 0, 0], [1.2, 0.3, 0], [0, 4.0 - gap, 0]])
        forces, expected = (potential.evaluate(atoms).forces for potential in potentials)
        assert abs(forces - expected).max() < 1e-5 * abs(expected).max()
