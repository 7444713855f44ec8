"""Weights before training: their distribution, constants, and the vector that tells a task."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_inputs import DESCRIPTORS, FITTING, plan_of, shared_input

from mtinfer.train.weights import initial_weights

WIDTHS = {
    "dpa2": ("repformer", {"g1_dim": 48, "g2_dim": 32}),
    "dpa3": ("repflow", {"n_dim": 48, "e_dim": 32, "a_dim": 16}),
}


def drawn(kind: str, block: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a head with a wide fitting net and some options of the block of its descriptor."""
    content = shared_input(kind)
    section, widths = WIDTHS[kind]
    descriptor = copy.deepcopy(DESCRIPTORS[kind])
    descriptor[section] |= widths | block
    content["model"]["shared_dict"]["desc"] = descriptor
    for head in content["model"]["model_dict"].values():
        head["fitting_net"] = FITTING | {"neuron": [120, 120]}
    return initial_weights(plan_of(content))["copper"]


def assert_normal(numbers: torch.Tensor, mean: float, std: float) -> None:
    numbers = numbers.flatten().double()
    assert float(numbers.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * len(numbers)))
    assert float(numbers.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(len(numbers)))


@pytest.mark.parametrize("kind", WIDTHS)
def test_weights_are_drawn_from_the_distributions_of_deepmd_kit(kind: str) -> None:
    weights = drawn(kind, {})
    matrices = {name: w for name, w in weights.items() if name.endswith(".w") and w.dim() == 2}
    assert any(name.startswith("descriptor.") and w.numel() > 1000 for name, w in matrices.items())
    assert {tuple(w.shape) for w in matrices.values()} >= {(120, 120), (120, 1)}
    for w in matrices.values():
        assert_normal(w * math.sqrt(w.shape[0] + w.shape[1]), 0.0, 1.0)
    layers = [f"fitting_net.nets.0.layers.{index}" for index in (0, 1)]
    assert_normal(torch.cat([weights[f"{layer}.b"] for layer in layers]), 0.0, 1.0)
    assert_normal(weights[f"{layers[1]}.idt"], 0.1, 0.001)


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("init", ["const", "norm"])
def test_residuals_start_as_the_input_says(kind: str, init: str) -> None:
    options = {"update_style": "res_residual", "update_residual": 0.25, "update_residual_init": init}
    weights = drawn(kind, options)
    numbers = torch.cat([tensor for name, tensor in weights.items() if "_residual." in name])
    assert len(numbers) > 200
    if init == "const":
        assert set(numbers.tolist()) == {0.25}
    else:
        assert_normal(numbers, 0.0, 0.25)


def test_tasks_are_told_apart_by_their_place_in_the_alphabet() -> None:
    content = shared_input("dpa1strip", fitting=True)
    heads = content["model"]["model_dict"]
    content["model"]["model_dict"] = {name: heads[name] for name in ("copper", "clusters")}
    weights = initial_weights(plan_of(content))
    assert {name: own["fitting_net.case_embd"].tolist() for name, own in weights.items()} == {
        "copper": [0.0, 1.0],
        "clusters": [1.0, 0.0],
    }
    assert list(weights) == ["copper", "clusters"]
