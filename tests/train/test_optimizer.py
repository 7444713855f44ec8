"""Adam and AdamW against torch's classes, and their stored state."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from devices import GPU, on_gpu

from mtinfer.train.optimizer import Optimizer

OPTIONS: dict[str, Any] = {"start": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.02}


def named(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "never": (2,)}
    return {k: torch.randn(shape, dtype=torch.float64, generator=generator) for k, shape in shapes.items()}


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_same_numbers_and_state_as_torch(decoupled: bool) -> None:
    weights, twins = named(0), named(0)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind(list(twins.values()), lr=0.01, betas=(0.9, 0.99), weight_decay=0.02, fused=True)
    ours = Optimizer(weights, decoupled=decoupled, **OPTIONS)
    for step in range(6):
        drawn = ["a", "b"] if step % 2 else ["b"]
        gradients = {name: named(step + 1)[name] for name in drawn}
        for name, twin in twins.items():
            twin.grad = gradients.get(name)
        theirs.param_groups[0]["lr"] = lr = 0.01 / (step + 1)
        theirs.step()
        ours.update(gradients, lr)
    for name, twin in twins.items():
        assert torch.equal(weights[name], twin)
    state = ours.state_dict()
    expected = theirs.state_dict()
    assert state["state"].keys() == expected["state"].keys() == {0, 1}
    for k, moments in expected["state"].items():
        assert all(torch.equal(state["state"][k][kind], tensor) for kind, tensor in moments.items())
    theirs.load_state_dict(state)
    assert theirs.param_groups[0]["lr"] == lr


def test_a_stored_state_goes_on() -> None:
    weights, whole_weights = named(0), named(0)
    gradients = [{name: named(k)[name] for name in ("a", "b")} for k in range(4)]
    whole = Optimizer(whole_weights, decoupled=False, **OPTIONS)
    for k in range(4):
        whole.update(gradients[k], 0.01)
    first = Optimizer(weights, decoupled=False, **OPTIONS)
    for k in range(2):
        first.update(gradients[k], 0.01)
    second_weights = {name: tensor.clone() for name, tensor in weights.items()}
    second = Optimizer(second_weights, decoupled=False, **OPTIONS)
    second.load_state_dict(first.state_dict())
    first.update(gradients[0], 0.5)  # is nothing to the second
    for k in range(2, 4):
        second.update(gradients[k], 0.01)
    assert all(torch.equal(tensor, whole_weights[name]) for name, tensor in second_weights.items())
    for k, moments in whole.state_dict()["state"].items():
        assert all(torch.equal(second.state_dict()["state"][k][kind], t) for kind, t in moments.items())


@pytest.mark.parametrize("weights", [{}, named(0)])
def test_tasks_without_free_weights_change_nothing(weights: dict[str, torch.Tensor]) -> None:
    optimizer = Optimizer(weights, decoupled=False, **OPTIONS)
    optimizer.update({}, 0.5)
    assert optimizer.state_dict()["state"] == {}
    assert all(torch.equal(tensor, named(0)[name]) for name, tensor in weights.items())


def test_an_update_does_not_import_the_compiler() -> None:
    script = (
        "import sys, torch; from mtinfer.train.optimizer import Optimizer\n"
        "w = {'w': torch.ones(3)}\n"
        "o = Optimizer(w, start=0.1, betas=(0.9, 0.999), weight_decay=0.0, decoupled=False)\n"
        "o.update({'w': torch.ones(3)}, 0.1); o.load_state_dict(o.state_dict())\n"
        "torch.nn.utils.get_total_norm([w['w']])\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_each_precision_is_updated_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's function refuses tensors of two."""
    weights = named(0)
    weights["b"] = weights["b"].to(torch.float32)
    single = {"b": weights["b"].clone()}
    called, step = [], torch._fused_adam_

    def recorded(lists: list[torch.Tensor], *others: Any, **options: Any) -> None:
        called.append({tensor.dtype for tensor in lists})
        step(lists, *others, **options)

    monkeypatch.setattr(torch, "_fused_adam_", recorded)
    optimizer = Optimizer(weights, decoupled=False, **OPTIONS)
    alone = Optimizer(single, decoupled=False, **OPTIONS)
    for k in range(3):
        gradients = {**named(k + 1), "b": named(k + 1)["b"].to(torch.float32)}
        optimizer.update(gradients, 0.01)
        alone.update({"b": gradients["b"]}, 0.01)
    assert {len(dtypes) for dtypes in called} == {1}
    assert torch.equal(weights["b"], single["b"])


def test_gradients_of_any_strides() -> None:
    weights, twins = named(0), named(0)
    ours, theirs = (Optimizer(own, decoupled=False, **OPTIONS) for own in (weights, twins))
    for k in range(3):
        gradient = named(k + 1)["a"]
        ours.update({"a": gradient.t().contiguous().t()}, 0.01)
        theirs.update({"a": gradient}, 0.01)
    assert torch.equal(weights["a"], twins["a"])


@on_gpu
def test_two_precisions_on_a_gpu() -> None:
    numbers = named(0) | {"b": named(0)["b"].to(torch.float32)}
    weights = {name: weight.to(GPU) for name, weight in numbers.items()}
    there, here = (Optimizer(own, decoupled=False, **OPTIONS) for own in (weights, numbers))
    for k in range(3):
        gradients = {name: gradient.to(numbers[name].dtype) for name, gradient in named(k + 1).items()}
        there.update({name: gradient.to(GPU) for name, gradient in gradients.items()}, 0.01)
        here.update(gradients, 0.01)
    for name, weight in numbers.items():
        torch.testing.assert_close(weights[name].cpu(), weight)
