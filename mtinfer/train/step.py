"""One compiled step: the loss of a batch and its gradient by every trained weight, a function of tensors.

The function depends on the architecture alone. Weights, structures, labels and prefactors are its arguments,
so that one graph serves all tasks of one architecture, whatever weights they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.sharing import is_trainable
from ..graph import Compilation, CompileMode, SharedGraph, signed
from ..models import EnergyModel
from ..models.gather import Index, lookup, segment_sum
from ..models.layers import Weights
from ..models.stage import Tensors
from .batch import DECLARED_LABELS, Batch, Labels, Structures, declared, leaves, like, slots_and_ends

__all__ = ["StepResult", "TrainingStep", "signature", "step_function"]


@dataclass(frozen=True)
class StepResult:
    """What one evaluation of a batch gives."""

    #: ()
    loss: Tensor
    #: (n_frames,), eV
    energy: Tensor
    #: (n_atoms, 3), eV/Å
    forces: Tensor
    #: (n_frames, 9), eV
    virial: Tensor
    #: canonical name -> dloss/dweight, of every weight that training may change
    gradients: dict[str, Tensor]


def signature(model: EnergyModel) -> str:
    """Text that determines the compiled step of a model."""
    # what depends on weights alone is inside the step, and so are the constants that it is made from
    constants = (model.type_map, model.atom_exclude_types, model.fitting_exclude_types)
    architecture = "\n".join(["training step", repr(model), repr(constants)])
    return signed(architecture, dict(sorted(model.parameters().items())))


class TrainingStep:
    """The compiled step of one architecture.

    Parameters
    ----------
    model
        any model of the architecture.
    weights
        weights of one task, for their shapes and device.
    mode
        "wait" or "off".
    """

    def __init__(self, model: EnergyModel, weights: Weights, mode: CompileMode) -> None:
        self.model = model
        self._names = sorted(model.parameters())
        self.trained = [name for name in self._names if is_trainable(name)]
        self.graph = SharedGraph.of_named(
            step_function(model),
            signature(model),
            list(leaves((declared(model), DECLARED_LABELS))),
            self._named(weights),
            Compilation(mode),
        )

    def __call__(self, batch: Batch, labels: Labels[Tensor], weights: Weights) -> StepResult:
        """Evaluate the loss of `batch` and its gradients."""
        named = self._named(weights)
        loss, energy, forces, virial, *gradients = self.graph((*batch.data, *labels), tuple(named.values()))
        return StepResult(loss, energy, forces, virial, dict(zip(self.trained, gradients, strict=True)))

    def unused_weights(self, batch: Batch, labels: Labels[Tensor], weights: Weights) -> frozenset[str]:
        """Weights that the loss does not depend on, whatever the batch; their gradients are zero.

        Like edge and angle updates in the last layer of DPA-3. Evaluates eagerly.
        """
        with torch.enable_grad():
            loss, _, varied = _loss(self.model, (*batch.data, *labels), self._named(weights))
            gradients = torch.autograd.grad(loss, list(varied.values()), allow_unused=True)
        return frozenset(name for name, gradient in zip(varied, gradients, strict=True) if gradient is None)

    def _named(self, weights: Weights) -> dict[str, Tensor]:
        return {name: weights[name].detach() for name in self._names}


def step_function(model: EnergyModel) -> Callable[[Tensors, Weights], Tensors]:
    """Return ``function(data, weights) -> (loss, E, F, W, *gradients)``; data: batch and labels."""

    def function(data: Tensors, named: Weights) -> Tensors:
        with torch.enable_grad():
            loss, predicted, varied = _loss(model, data, named)
            gradients = torch.autograd.grad(loss, list(varied.values()), materialize_grads=True)
        return (loss.detach(), *(array.detach() for array in predicted), *gradients)

    return function


def _loss(
    model: EnergyModel, data: Tensors, named: Weights
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Loss, predictions, and the trained weights that both can be differentiated by."""
    structures, labels = like((declared(model), DECLARED_LABELS), iter(data))
    varied = {name: w.detach().requires_grad_(True) for name, w in named.items() if is_trainable(name)}
    predicted = predict(model, structures, {**named, **varied})
    return total_loss(predicted, labels), predicted, varied


def total_loss(predicted: tuple[Tensor, ...], labels: Labels[Tensor]) -> Tensor:
    """Weighted sum of all squared errors."""
    energy, forces, virial = predicted
    return (
        (labels.energy_weight * (energy - labels.energy) ** 2).sum()
        + (labels.force_weight.unsqueeze(1) * (forces - labels.forces) ** 2).sum()
        + (labels.virial_weight.unsqueeze(1) * (virial - labels.virial) ** 2).sum()
    )


def predicted_energies(model: EnergyModel, structures: Structures[Tensor], weights: Weights) -> Tensor:
    """Energies of a batch alone, without derivatives, shape (n_frames,), eV."""
    with torch.no_grad():
        calls = zip(model.prepare(weights), structures.calls, strict=True)
        energies = [model.atom_energies(call.displacements, call.tensors, group) for group, call in calls]
        return _of_frames(model, structures, weights, energies)


def predict(
    model: EnergyModel, structures: Structures[Tensor], weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies (n_frames,), forces (n_atoms, 3) and virials (n_frames, 9) of a batch, differentiable.

    Parameters
    ----------
    weights
        canonical name -> tensor.
    """
    energies, gradients, vectors = [], [], []
    for group, call in zip(model.prepare(weights), structures.calls, strict=True):
        energy, *gradient = model.energies_and_gradients(call.displacements, call.tensors, group)
        energies.append(energy)
        gradients += [array.reshape(-1, 3) for array in gradient]
        vectors += [array.reshape(-1, 3) for array in call.displacements]
    slots, ends = slots_and_ends(structures.calls)
    to_ends, to_centers = Index(ends, *structures.ends), Index(slots, *structures.slots)
    to_frames = Index(structures.frames, *structures.atoms)
    # F_k = Σ_(k,j) g - Σ_(i,k) g and W = -Σ g ⊗ d, with g = dE/dd and d = r_j - r_i
    g = torch.cat(gradients)
    forces = segment_sum(torch.cat([g, -g]), to_ends)
    outer = (g.unsqueeze(2) * torch.cat(vectors).unsqueeze(1)).reshape(-1, 9)
    # by way of the centres: a GPU sums a row by one thread, and frames are long rows
    virial = -segment_sum(segment_sum(outer, to_centers), to_frames)
    return _of_frames(model, structures, weights, energies), forces, virial


def _of_frames(
    model: EnergyModel, structures: Structures[Tensor], weights: Weights, energies: list[Tensor]
) -> Tensor:
    """Energies (n_frames,) from the atomic energies of every call, without bias."""
    rows = torch.cat([call.atoms for call in structures.calls])
    bias = lookup(model.bias(weights).unsqueeze(1), structures.types.index_select(0, rows))
    to_frames = Index(structures.frames.index_select(0, rows), *structures.rows)
    return segment_sum(torch.cat(energies).unsqueeze(1) + bias, to_frames).squeeze(1)
