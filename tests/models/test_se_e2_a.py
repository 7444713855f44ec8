"""Descriptor se_e2_a against its equations, written out slot by slot."""

from __future__ import annotations

from typing import Any

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
)

from mtinfer.errors import UnsupportedModelError
from mtinfer.inputs import GraphInputs
from mtinfer.models import layout
from mtinfer.models.descriptor import Setting
from mtinfer.models.se_e2_a import SeE2A

CONFIG = {
    "type": "se_e2_a",
    "rcut": 4.0,
    "rcut_smth": 1.0,
    "sel": [3, 4, 5],
    "neuron": [3, 6],
    "axis_neuron": 2,
}
CUT = (1.0, 4.0)


def model(*, pair_exclude: tuple[tuple[int, int], ...] = (), dialect: str = "pt", **config: Any) -> SeE2A:
    return SeE2A.from_config(CONFIG | config, Setting(tuple("ABC"), dialect, pair_exclude))


def slot_by_slot(
    inputs: GraphInputs, weights: Weights, sel: list[int], *, one_sided: bool, excluded: Any = None
) -> np.ndarray:
    """All slots of the list, empty ones included; `excluded` pairs of types count as zero."""
    rows_of_atoms = []
    for i, center in enumerate(inputs.types.tolist()):
        mean, stddev = (weights[f"descriptor.{name}"][center, 0].numpy() for name in ("mean", "stddev"))
        kept = neighbors_of(inputs, i)[: sum(sel)]
        rows, g = [], []
        for t, n_slots in enumerate(sel):
            section = [vector for kind, vector in kept if kind == t][:n_slots]
            for vector in [*section, *[None] * (n_slots - len(section))]:
                row = environment_row(vector, mean, stddev, CUT)
                if vector is not None and excluded is not None and {center, t} == excluded:
                    row = np.zeros(4)
                rows.append(row)
                net = f"descriptor.embeddings.{t if one_sided else t * 3 + center}"
                g.append(network(row[:1], weights, net, 2))
        rows_of_atoms.append(invariants(np.array(rows), np.array(g), sum(sel), 2))
    return np.array(rows_of_atoms)


@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("sel", [[3, 4, 5], [1, 2, 1]], ids=["ample", "binding"])
@pytest.mark.parametrize("resnet_dt", [False, True])
def test_equations(one_sided: bool, sel: list[int], resnet_dt: bool) -> None:
    descriptor = model(type_one_side=one_sided, sel=sel, resnet_dt=resnet_dt)
    weights = random_weights(descriptor.parameters())
    inputs = inputs_of(*cluster(), 4.0)
    assert descriptor.selection(inputs).n_truncated == (9 if sum(sel) == 4 else 0)
    expected = slot_by_slot(inputs, weights, sel, one_sided=one_sided)
    np.testing.assert_allclose(features(descriptor, inputs, weights), expected, rtol=1e-11, atol=1e-13)


def test_too_many_leading_features() -> None:
    with pytest.raises(UnsupportedModelError, match=r"se_e2_a axis_neuron=99 is more than its \d+ features"):
        model(axis_neuron=99)


def test_excluded_pairs_are_zero_but_no_empty_slots() -> None:
    descriptor = model(exclude_types=[[0, 2]])
    weights = random_weights(descriptor.parameters())
    inputs = inputs_of(*cluster(), 4.0)
    expected = slot_by_slot(inputs, weights, [3, 4, 5], one_sided=True, excluded={0, 2})
    np.testing.assert_allclose(features(descriptor, inputs, weights), expected, rtol=1e-11, atol=1e-13)


def test_calls_of_any_length_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = model()
    weights = random_weights(descriptor.parameters())
    inputs = inputs_of(*cluster(27), 4.0)
    whole = features(descriptor, inputs, weights)
    monkeypatch.setattr(layout, "SLOTS_PER_CALL", 20)
    layouts = descriptor.layouts(inputs, descriptor.selection(inputs))
    assert len(layouts) > 6
    np.testing.assert_allclose(features(descriptor, inputs, weights), whole, rtol=1e-12)


def test_absent_types_need_no_call() -> None:
    descriptor = model()
    atoms, _ = cluster(4)
    inputs = inputs_of(atoms, np.array([2, 2, 0, 0]), 4.0)
    assert {call.group for call in descriptor.layouts(inputs, descriptor.selection(inputs))} == {0, 2}


@pytest.mark.parametrize(
    ("dialect", "neuron", "axis"), [("pt", (25, 50, 100), 16), ("pt_expt", (24, 48, 96), 8)]
)
def test_defaults_depend_on_the_dialect(dialect: str, neuron: tuple[int, ...], axis: int) -> None:
    config = {key: CONFIG[key] for key in ("rcut", "rcut_smth", "sel")}
    descriptor = SeE2A.from_config(config, Setting(tuple("ABC"), dialect))
    assert (descriptor.neuron, descriptor.axis_neuron) == (neuron, axis)
    assert descriptor.width == neuron[-1] * axis
    assert descriptor.one_sided
    assert not descriptor.resnet_dt


def test_number_of_nets() -> None:
    def nets(descriptor: SeE2A) -> int:
        return len([name for name in descriptor.parameters() if name.endswith("layers.0.w")])

    assert (nets(model(type_one_side=True)), nets(model(type_one_side=False))) == (3, 9)


def test_data_is_no_part_of_the_signature_of_the_graph() -> None:
    same = {repr(model()), repr(model(type_one_side=False)), repr(model(exclude_types=[[0, 1]]))}
    assert len(same) == 1
    assert repr(model(rcut=5.0)) not in same
    assert repr(model(precision="float32")) not in same


def test_float32_descriptor_computes_in_float32() -> None:
    descriptor = model(precision="float32")
    weights = random_weights(descriptor.parameters())
    inputs = inputs_of(*cluster(), 4.0)
    groups = descriptor.prepare(weights)
    call = descriptor.layouts(inputs, descriptor.selection(inputs))[0]
    rows, _ = descriptor(call.displacements, call.tensors, groups[call.group])
    assert rows.dtype == torch.float32
