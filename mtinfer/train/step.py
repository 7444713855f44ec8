"""One compiled step: the loss of a batch and its gradient by every trained weight, a function of tensors.

The function depends on the architecture alone. Weights, structures, labels and prefactors are its arguments,
so that one graph serves all tasks of one architecture, whatever weights they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.sharing import is_trainable
from ..graph import Compilation, CompileMode, SharedGraph
from ..models import EnergyModel
from ..models.gather import Index, lookup, segment_sum
from ..models.layers import Weights
from ..models.layout import Argument
from .batch import Batch, Labels, arguments, n_calls

__all__ = ["StepResult", "TrainingStep", "signature", "step_function"]

_LABELS = (
    Argument(("frames",)),
    Argument(("frames",)),
    Argument(("all atoms", 3)),
    Argument(("all atoms",)),
    Argument(("frames", 9)),
    Argument(("frames",)),
)


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
    """Text that determines the compiled step of a model, besides the shapes of its weights."""
    # what depends on weights alone is inside the step, and so are the constants that it is made from
    constants = (model.type_map, model.atom_exclude_types, model.fitting_exclude_types)
    shapes = (f"{name} {spec.shape} {spec.dtype}" for name, spec in sorted(model.parameters().items()))
    return "\n".join(["training step", repr(model), repr(constants), *shapes])


def weight_names(model: EnergyModel) -> tuple[list[str], list[str]]:
    """Names of the weights that training may change, and of the others, in the order of the graph."""
    names = sorted(model.parameters())
    return [n for n in names if is_trainable(n)], [n for n in names if not is_trainable(n)]


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
        self.trained, self.fixed = weight_names(model)
        self.graph = SharedGraph(
            step_function(model),
            signature(model),
            [*arguments(model), *_LABELS],
            [weights[name].detach() for name in (*self.trained, *self.fixed)],
            Compilation(mode),
        )

    def __call__(self, batch: Batch, labels: Labels, weights: Mapping[str, Tensor]) -> StepResult:
        """Evaluate the loss of `batch` and its gradients."""
        ordered = self._ordered(weights)
        loss, energy, forces, virial, *gradients = self.graph((*batch.structure, *labels), ordered)
        return StepResult(loss, energy, forces, virial, dict(zip(self.trained, gradients, strict=True)))

    def without_effect(self, batch: Batch, labels: Labels, weights: Mapping[str, Tensor]) -> frozenset[str]:
        """Weights that the loss does not depend on, whatever the batch; their gradients are zero.

        Like edge and angle updates in the last layer of DPA-3. Evaluates eagerly.
        """
        values = (*batch.structure, *labels, *self._ordered(weights))
        with torch.enable_grad():
            loss, _, varied = _loss(self.model, values)
            gradients = torch.autograd.grad(loss, varied, allow_unused=True)
        found = zip(self.trained, gradients, strict=True)
        return frozenset(name for name, gradient in found if gradient is None)

    def _ordered(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [weights[name].detach() for name in (*self.trained, *self.fixed)]


def step_function(model: EnergyModel):  # type: ignore[no-untyped-def]
    """Return ``function(*structure, *labels, *trained, *fixed) -> (loss, E, F, W, *gradients)``."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss, predicted, varied = _loss(model, values)
            gradients = torch.autograd.grad(loss, varied, materialize_grads=True)
        return (loss.detach(), *(array.detach() for array in predicted), *gradients)

    return function


def _loss(model: EnergyModel, values: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """Loss, predictions, and the trained weights that both can be differentiated by."""
    trained, fixed = weight_names(model)
    n_structure = len(arguments(model))
    n_data = n_structure + len(_LABELS)
    structure, labels = values[:n_structure], Labels(*values[n_structure:n_data])
    constant = dict(zip(fixed, values[n_data + len(trained) :], strict=True))
    varied = [weight.detach().requires_grad_(True) for weight in values[n_data:][: len(trained)]]
    predicted = predict(model, structure, dict(zip(trained, varied, strict=True)) | constant)
    return total_loss(predicted, labels), predicted, varied


def total_loss(predicted: tuple[Tensor, ...], labels: Labels) -> Tensor:
    """Weighted sum of all squared errors."""
    energy, forces, virial = predicted
    return (
        (labels.energy_weight * (energy - labels.energy) ** 2).sum()
        + (labels.force_weight.unsqueeze(1) * (forces - labels.forces) ** 2).sum()
        + (labels.virial_weight.unsqueeze(1) * (virial - labels.virial) ** 2).sum()
    )


def predict(
    model: EnergyModel, structure: Sequence[Tensor], weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies (n_frames,), forces (n_atoms, 3) and virials (n_frames, 9) of a batch, differentiable.

    Parameters
    ----------
    structure
        as in `Batch.structure`.
    weights
        canonical name -> tensor.
    """
    groups = model.prepare(weights)
    displaced, tensors = (len(declared) for declared in model.arguments())
    *calls, ends, ends_starts, slots, slots_starts, rows, rows_starts, frames, types = structure
    energies, gradients, vectors, atoms, centers, neighbors = [], [], [], [], [], []
    size = len(calls) // n_calls(model)
    for group, own in zip(groups, (calls[k : k + size] for k in range(0, len(calls), size)), strict=True):
        arrays, own = tuple(own[:displaced]), own[displaced:]
        energy, *gradient = model.energies_and_gradients(arrays, tuple(own[:tensors]), group)
        energies.append(energy.unsqueeze(1))
        atoms.append(own[tensors])
        blocks = own[tensors + 1 :]
        for k in range(displaced):
            gradients.append(gradient[k].reshape(-1, 3))
            vectors.append(arrays[k].reshape(-1, 3))
            centers.append(blocks[k].reshape(-1))
            neighbors.append(blocks[displaced + k].reshape(-1))
    g, of_slots = torch.cat(gradients), torch.cat(centers)
    both = Index(torch.cat([of_slots, *neighbors]), ends, ends_starts)
    by_slot = Index(frames.index_select(0, of_slots), slots, slots_starts)
    of_rows = torch.cat(atoms)
    by_row = Index(frames.index_select(0, of_rows), rows, rows_starts)
    energy = torch.cat(energies) + lookup(model.bias(weights).unsqueeze(1), types.index_select(0, of_rows))
    # F_k = Σ_(k,j) g - Σ_(i,k) g and W = -Σ g ⊗ d, with g = dE/dd and d = r_j - r_i
    forces = segment_sum(torch.cat([g, -g]), both)
    outer = (g.unsqueeze(2) * torch.cat(vectors).unsqueeze(1)).reshape(-1, 9)
    return segment_sum(energy, by_row).squeeze(1), forces, -segment_sum(outer, by_slot)
