"""The training step: gradients, sharing, and one graph for all tasks of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase.data import chemical_symbols
from tiny_inputs import DESCRIPTORS, FITTING, SYSTEMS, plan_of, shared_input, training_input
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mtinfer.models import EnergyModel
from mtinfer.train.batch import Batch, Labels, make_batch
from mtinfer.train.loss import Errors
from mtinfer.train.plan import Plan
from mtinfer.train.step import TrainingStep, predict, predicted_energies, signature, total_loss
from mtinfer.train.weights import initial_weights

#: relative to the largest entry of a gradient
GRADIENT_TOLERANCE = 1e-10


def weights_of(plan: Plan, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Initial weights with statistics that are not trivial."""
    weights = initial_weights(plan)
    generator = torch.Generator().manual_seed(seed)
    for tensor in {id(t): t for own in weights.values() for t in own.values()}.values():
        tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.1)
    return weights


def batch_and_labels(plan: Plan, task: int, frames: int = 2) -> tuple[Batch, Labels]:
    """Frames of different sizes: one of each system."""
    chosen = [system.frames[0] for system in plan.tasks[task].systems[:frames]]
    batch = make_batch(chosen, plan.tasks[task].model)
    return batch, plan.tasks[task].config.loss.labels(batch, 0.7)


def double_backward(
    model: EnergyModel, batch: Batch, labels: Labels, weights: Mapping[str, Tensor], names: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by torch.autograd, forces with a graph of their own."""

    class Autograd:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def energies_and_gradients(self, arrays: Any, tensors: Any, group: Any) -> tuple[Tensor, ...]:
            arrays = tuple(array.clone().requires_grad_(True) for array in arrays)
            energies = model.atom_energies(arrays, tensors, group)
            return energies, *torch.autograd.grad(energies.sum(), arrays, create_graph=True)

    varied = {n: t.detach().clone().requires_grad_(n in names) for n, t in weights.items()}
    loss = total_loss(predict(Autograd(), batch.structures, varied), labels)  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, [varied[name] for name in names], allow_unused=True)
    zeros = (torch.zeros_like(varied[name]) for name in names)
    return loss.detach(), {
        name: zero if gradient is None else gradient
        for name, gradient, zero in zip(names, found, zeros, strict=True)
    }


def assert_gradients_equal(plan: Plan, step: TrainingStep, task: int) -> None:
    weights = weights_of(plan)[plan.tasks[task].name]
    batch, labels = batch_and_labels(plan, task)
    step(batch, labels, weights)  # a compiled graph compares its first call with eager
    got = step(batch, labels, weights)
    loss, expected = double_backward(plan.tasks[task].model, batch, labels, weights, step.trained)
    assert float(got.loss) == pytest.approx(float(loss), rel=1e-12)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert float((got.gradients[name] - gradient).abs().max()) <= GRADIENT_TOLERANCE * scale, name
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in expected.values())


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_gradients_equal_double_backward(kind: str) -> None:
    plan = plan_of(shared_input(kind, fitting=True))
    step = TrainingStep(plan.tasks[0].model, weights_of(plan)["clusters"], "off")
    for task in range(2):
        assert_gradients_equal(plan, step, task)


def test_gradients_with_atomic_energies_in_vacuum() -> None:
    content = shared_input("se_e2_a")
    for task, given in (("clusters", [None, -1.0, None]), ("copper", [None, None, -2.0])):
        content["model"]["model_dict"][task]["fitting_net"]["atom_ener"] = given
    plan = plan_of(content)
    for k, task in enumerate(plan.tasks):
        step = TrainingStep(task.model, weights_of(plan)[task.name], "off")
        assert_gradients_equal(plan, step, k)
    assert signature(plan.tasks[0].model) != signature(plan.tasks[1].model)


def test_gradients_of_a_hybrid_that_calls_a_member_once_per_type() -> None:
    content = shared_input("se_e2_a", fitting=True)
    members = [DESCRIPTORS["dpa3"], DESCRIPTORS["se_e2_a"]]
    content["model"]["shared_dict"]["desc"] = {"type": "hybrid", "list": members}
    plan = plan_of(content)
    step = TrainingStep(plan.tasks[0].model, weights_of(plan)["clusters"], "off")
    for task in range(2):
        assert_gradients_equal(plan, step, task)


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["dpa1strip", *(pytest.param(k, marks=_SLOW) for k in DESCRIPTORS if k != "dpa1strip")]
)
def test_one_compiled_graph_has_the_gradients_of_all_tasks(kind: str) -> None:
    plan = plan_of(shared_input(kind))
    step = TrainingStep(plan.tasks[0].model, weights_of(plan)["clusters"], "wait")
    for task in range(2):
        assert_gradients_equal(plan, step, task)
    assert step.graph.is_compiled
    assert step.graph.n_compiled <= 1


def test_gradients_equal_finite_differences() -> None:
    plan = plan_of(shared_input("se_e2_a"))
    step = TrainingStep(plan.tasks[0].model, weights_of(plan)["clusters"], "off")
    weights = weights_of(plan)["clusters"]
    batch, labels = batch_and_labels(plan, 0)
    result = step(batch, labels, weights)
    for name in ("descriptor.embeddings.0.layers.1.w", "fitting_net.nets.1.layers.0.w"):
        losses = []
        for shift in (1e-5, -1e-5):
            changed = weights | {name: weights[name].clone()}
            changed[name][0, 0] += shift
            losses.append(float(step(batch, labels, changed).loss))
        numeric = (losses[0] - losses[1]) / 2e-5
        assert numeric == pytest.approx(float(result.gradients[name][0, 0]), rel=1e-5)


def test_a_batch_is_the_mean_of_its_frames() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    task = plan.tasks[0]
    weights = weights_of(plan)["clusters"]
    step = TrainingStep(task.model, weights, "off")
    frames = [system.frames[0] for system in task.systems]
    together = make_batch(frames, task.model)
    result = step(together, task.config.loss.labels(together, 1.0), weights)
    for k, frame in enumerate(frames):
        single = make_batch([frame], task.model)
        alone = step(single, task.config.loss.labels(single, 1.0), weights)
        assert float(alone.energy[0]) == pytest.approx(float(result.energy[k]), abs=1e-12)
        own = result.forces[together.structures.frames == k]
        torch.testing.assert_close(own, alone.forces, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_energies_alone_are_those_of_the_step(kind: str) -> None:
    plan = plan_of(shared_input(kind))
    weights = weights_of(plan)["clusters"]
    batch, _ = batch_and_labels(plan, 0, 3)
    expected, _, _ = predict(plan.tasks[0].model, batch.structures, weights)
    alone = predicted_energies(plan.tasks[0].model, batch.structures, weights)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("intensive", [True, False])
def test_loss_and_errors_by_their_definition(intensive: bool) -> None:
    task = plan_of(shared_input("dpa1strip")).tasks[1]
    frames = [system.frames[0] for system in task.systems]
    frames = [replace(frames[0], forces=None), replace(frames[1], energy=None), *frames, frames[0]]
    frames[2] = replace(frames[2], virial=None)
    batch = make_batch(frames, task.model)
    counted = torch.ones_like(batch.counted)
    counted[::3] = 0.0  # as those of excluded types
    sizes = torch.zeros_like(batch.n_atoms).index_add_(0, batch.structures.frames, counted)
    assert len(set(sizes.tolist())) > 1
    batch = replace(batch, counted=counted, n_atoms=sizes)
    generator = torch.Generator().manual_seed(0)
    predicted = tuple(
        label + torch.randn(label.shape, dtype=label.dtype, generator=generator)
        for label in (batch.energy, batch.forces, batch.virial)
    )
    energies, forces, virials, n_terms = [], [], [], 0
    for k, frame in enumerate(frames):
        energy, virial = float(predicted[0][k]), predicted[2][k].numpy()
        own = batch.structures.frames == k
        if frame.energy is not None:
            energies.append((energy - frame.energy, sizes[k]))
        if frame.forces is not None:
            difference = (predicted[1][own].numpy() - frame.forces)[counted[own].numpy() > 0]
            forces.append((difference**2).sum())
            n_terms += difference.size
        if frame.virial is not None:
            virials.append((virial - frame.virial.reshape(9), sizes[k]))
    q = 2 if intensive else 1
    terms = [
        float(np.mean([e**2 / n**q for e, n in energies])),
        sum(forces) / n_terms,
        float(np.mean([np.mean(w**2) / n**q for w, n in virials])),
    ]
    config = replace(task.config.loss, start=(2.0, 3.0, 4.0), limit=(1.0, 0.0, 2.0), intensive=intensive)
    loss = float(total_loss(predicted, config.labels(batch, 0.25)))
    assert loss == pytest.approx(1.25 * terms[0] + 0.75 * terms[1] + 2.5 * terms[2], rel=1e-12)
    rmse = Errors.of(batch, *predicted).rmse
    expected = [
        np.mean([(e / n) ** 2 for e, n in energies]),
        terms[1],
        np.mean([(w / n) ** 2 for w, n in virials]),
    ]
    assert rmse == pytest.approx(np.sqrt(expected), rel=1e-12)


def test_atoms_of_excluded_types_do_not_count() -> None:
    content = shared_input("dpa1strip")
    content["model"]["model_dict"]["clusters"]["atom_exclude_types"] = [0]
    task = plan_of(content).tasks[0]
    frames = [system.frames[0] for system in task.systems]
    batch = make_batch(frames, task.model)
    oxygen = torch.tensor([symbol == "O" for frame in frames for symbol in frame.atoms.symbols])
    assert torch.equal(batch.counted, oxygen.to(torch.float64))
    assert batch.n_atoms.tolist() == [frame.atoms.symbols.count("O") for frame in frames] == [1, 2, 3]
    labels = task.config.loss.labels(batch, 1.0)
    assert torch.equal(labels.force_weight > 0.0, oxygen)
    errors = Errors.of(batch, batch.energy + batch.n_atoms, batch.forces + ~oxygen[:, None], batch.virial)
    assert errors.rmse == (pytest.approx(1.0), 0.0, None)


def test_missing_labels_have_no_weight() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    labels = batch_and_labels(plan, 0)[1]
    assert not labels.virial_weight.any()  # clusters have no virial
    assert labels.energy_weight.all()
    labels = batch_and_labels(plan, 1)[1]
    assert labels.virial_weight.all()


def test_virials_of_open_structures_are_no_labels() -> None:
    task = plan_of(shared_input("dpa1strip")).tasks[0]
    frame = replace(task.systems[0].frames[0], virial=np.eye(3))
    boxed = frame.atoms.copy()
    boxed.set_cell([9.0, 9.0, 9.0])
    boxed.pbc = True
    batch = make_batch([frame, replace(frame, atoms=boxed)], task.model)
    assert batch.has[:, 2].tolist() == [0.0, 1.0]
    assert batch.virial[0].abs().max() == 0.0


def test_terms_are_means_over_the_frames_that_have_the_label() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    task = plan.tasks[1]
    frames = [system.frames[0] for system in task.systems]
    unlabelled = [replace(frame, energy=None, forces=None, virial=None) for frame in frames]
    alone, more, none = (
        make_batch(chosen, task.model) for chosen in (frames, frames + unlabelled, unlabelled)
    )
    own, padded = (task.config.loss.labels(batch, 0.7) for batch in (alone, more))
    for name in ("energy_weight", "force_weight", "virial_weight"):
        weight = getattr(own, name)
        assert torch.equal(getattr(padded, name)[: len(weight)], weight)
        assert not getattr(padded, name)[len(weight) :].any()
        assert not getattr(task.config.loss.labels(none, 0.7), name).any()


@pytest.mark.parametrize(("dialect", "counts"), [("pt", False), ("pt_expt", True)])
@pytest.mark.parametrize("end", ["start", "limit"])
def test_pt_leaves_out_terms_with_a_prefactor_of_0_at_one_end(dialect: str, counts: bool, end: str) -> None:
    content = shared_input("dpa1strip")
    content["loss_dict"]["copper"][f"{end}_pref_v"] = 0
    labels = batch_and_labels(plan_of(content, dialect=dialect), 1)[1]
    assert bool(labels.virial_weight.any()) == counts
    assert labels.energy_weight.all()


def test_the_loss_is_that_of_the_formula() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    task = plan.tasks[1]
    batch, labels = batch_and_labels(plan, 1)
    weights = weights_of(plan)["copper"]
    result = TrainingStep(task.model, weights, "off")(batch, labels, weights)
    loss = task.config.loss
    e, f, v = (limit + (start - limit) * 0.7 for start, limit in zip(loss.start, loss.limit, strict=True))
    n = torch.tensor([31.0, 32.0], dtype=torch.float64)
    expected = e * ((result.energy - batch.energy) ** 2 / n).mean()
    expected += f * ((result.forces - batch.forces) ** 2).sum() / (3 * n.sum())
    expected += v * (((result.virial - batch.virial) ** 2).mean(1) / n).mean()
    assert float(result.loss) == pytest.approx(float(expected), rel=1e-12)


# ---- sharing -----------------------------------------------------------------------------------------


def _owned(weights: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
    """Names that both tasks have in common."""
    a, b = (weights[task] for task in SYSTEMS)
    return {name for name in a if name in b and a[name] is b[name]}


def test_shared_fitting_net_with_different_descriptors() -> None:
    other = {**DESCRIPTORS["dpa1strip"], "rcut": 4.0}
    content = training_input(
        {"clusters": DESCRIPTORS["dpa1strip"], "copper": other}, dict.fromkeys(SYSTEMS, "fit")
    )
    plan = plan_of(content)
    common = _owned(initial_weights(plan))
    assert all(name.startswith("fitting_net.") for name in common)
    assert "fitting_net.nets.0.layers.0.w" in common
    assert "fitting_net.case_embd" not in common
    assert signature(plan.tasks[0].model) != signature(plan.tasks[1].model)


def test_level_one_shares_the_type_embedding_alone() -> None:
    content = training_input({"clusters": "desc", "copper": "desc:1"}, dict.fromkeys(SYSTEMS, FITTING))
    plan = plan_of(content)
    assert _owned(initial_weights(plan)) == {"descriptor.type_embedding.layers.0.w"}
    assert signature(plan.tasks[0].model) == signature(plan.tasks[1].model)


def test_equal_architectures_that_share_nothing_have_one_graph() -> None:
    content = training_input(
        dict.fromkeys(SYSTEMS, DESCRIPTORS["dpa1strip"]), dict.fromkeys(SYSTEMS, FITTING)
    )
    plan = plan_of(content)
    weights = initial_weights(plan)
    assert not _owned(weights)
    name = "fitting_net.nets.0.layers.0.w"
    assert not torch.equal(weights["clusters"][name], weights["copper"][name])
    assert signature(plan.tasks[0].model) == signature(plan.tasks[1].model)


@pytest.mark.parametrize(
    "change",
    [{"rcut": 4.0}, {"axis_neuron": 3}, {"activation_function": "gelu"}, {"smooth_type_embedding": False}],
)
def test_different_architectures_never_have_one_graph(change: dict[str, Any]) -> None:
    descriptors = {"clusters": DESCRIPTORS["dpa1strip"], "copper": {**DESCRIPTORS["dpa1strip"], **change}}
    plan = plan_of(training_input(descriptors, dict.fromkeys(SYSTEMS, FITTING)))
    assert signature(plan.tasks[0].model) != signature(plan.tasks[1].model)


def test_excluded_types_have_a_graph_of_their_own() -> None:
    content = training_input(
        dict.fromkeys(SYSTEMS, DESCRIPTORS["dpa1strip"]), dict.fromkeys(SYSTEMS, FITTING)
    )
    content["model"]["model_dict"]["clusters"]["atom_exclude_types"] = [0]
    plan = plan_of(content)
    assert signature(plan.tasks[0].model) != signature(plan.tasks[1].model)


@pytest.mark.parametrize("mode", ["off", pytest.param("wait", marks=_SLOW)])
def test_gradients_with_all_elements_need_no_memory_for_pairs_of_them(mode: Any) -> None:
    content = shared_input("dpa1strip")
    content["model"]["shared_dict"]["types"] = chemical_symbols[1:119]
    plan = plan_of(content)
    step = TrainingStep(plan.tasks[0].model, weights_of(plan)["clusters"], mode)
    assert_gradients_equal(plan, step, 0)
    assert mode == "off" or step.graph.is_compiled
    task = plan.tasks[0]
    batch, labels = batch_and_labels(plan, 0)
    ordered = [weight for _, weight in sorted(weights_of(plan)[task.name].items())]
    one_hot = batch.data[2].numel() * 118**2
    with _Sizes() as sizes:
        step.graph.function(*batch.data, *labels, *ordered)
    assert max(sizes.found) < one_hot / 2


class _Sizes(TorchDispatchMode):
    """Number of entries of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found += [x.numel() for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        return result


def test_electron_configurations_have_a_graph_of_their_own() -> None:
    elements = chemical_symbols[1:119]  # as many as there are configurations: the shapes agree
    descriptors = {
        task: {**DESCRIPTORS["dpa1strip"], "use_econf_tebd": econf}
        for task, econf in zip(SYSTEMS, (False, True), strict=False)
    }
    content = training_input(descriptors, dict.fromkeys(descriptors, FITTING))
    content["model"]["shared_dict"]["types"] = elements
    plan = plan_of(content)
    assert signature(plan.tasks[0].model) != signature(plan.tasks[1].model)


@pytest.mark.parametrize("mode", ["off", "wait"])
def test_a_changed_energy_bias_counts_at_the_next_call(mode: Any) -> None:
    plan = plan_of(shared_input("dpa1strip"))
    weights = weights_of(plan)["clusters"]
    step = TrainingStep(plan.tasks[0].model, weights, mode)
    batch, labels = batch_and_labels(plan, 0)
    step(batch, labels, weights)
    before = step(batch, labels, weights)
    shifted = weights | {"out_bias": weights["out_bias"] + 0.5}
    after = step(batch, labels, shifted)
    torch.testing.assert_close(after.energy, before.energy + 0.5 * batch.n_atoms, rtol=0, atol=1e-12)
