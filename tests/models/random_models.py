"""Random weights and structures for tests of single parts of a model."""

from __future__ import annotations

from collections.abc import Mapping

import ase
import numpy as np
import torch

from mtinfer.inputs import GraphInputs, ParameterSpec
from mtinfer.models.energy import Descriptor
from mtinfer.neighbors import find_candidates, graph_inputs

Weights = dict[str, torch.Tensor]


def random_weights(specs: Mapping[str, ParameterSpec], seed: int = 0) -> Weights:
    """Normal numbers; the rows of statistics are alike in all slots, and deviations positive."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in sorted(specs.items()):
        values = 0.5 * torch.randn(spec.shape, dtype=torch.float64, generator=generator)
        if name.endswith(".mean"):
            values = values[:, :1] * torch.tensor([1.0, 0, 0, 0]) + torch.zeros(spec.shape)
        if name.endswith(".stddev"):
            values = (0.3 + values[:, :1].abs())[..., [0, 1, 1, 1]] + torch.zeros(spec.shape)
        weights[name] = values.to(spec.dtype)
    return weights


def cluster(n_atoms: int = 9, n_types: int = 3, seed: int = 0) -> tuple[ase.Atoms, np.ndarray]:
    """Atoms in a ball of 4 Å, and their types."""
    random = np.random.default_rng(seed)
    positions = random.permutation(np.stack(np.meshgrid(*[[0.0, 1.6, 3.2]] * 3), -1).reshape(-1, 3))[:n_atoms]
    atoms = ase.Atoms(f"H{n_atoms}", positions + random.uniform(-0.3, 0.3, (n_atoms, 3)))
    return atoms, np.arange(n_atoms) % n_types


def inputs_of(atoms: ase.Atoms, types: np.ndarray, rcut: float) -> GraphInputs:
    """One structure as a model takes it, without parameters."""
    return graph_inputs(
        [atoms],
        [find_candidates(atoms, rcut)],
        [types],
        rcut,
        fparam=torch.zeros(1, 0, dtype=torch.float64),
        aparam=torch.zeros(len(atoms), 0, dtype=torch.float64),
        charge_spin=torch.zeros(1, 2, dtype=torch.float64),
    )


def features(descriptor: Descriptor, inputs: GraphInputs, weights: Weights) -> np.ndarray:
    """Descriptor of every atom, shape (n_atoms, width), through the layouts that the graph gets."""
    groups = descriptor.prepare(weights)
    result = torch.full((inputs.n_atoms, descriptor.width), torch.nan, dtype=torch.float64)
    for layout in descriptor.layouts(inputs, descriptor.selection(inputs)):
        rows, types = descriptor(layout.displacements, layout.tensors, groups[layout.group])
        assert torch.equal(types, inputs.types[layout.atoms])
        result[layout.atoms] = rows.to(torch.float64)
    return result.numpy()


def neighbors_of(inputs: GraphInputs, center: int) -> list[tuple[int, np.ndarray]]:
    """(type, displacement) of every neighbour of an atom, the nearest first."""
    own = inputs.centers == center
    vectors, types = inputs.displacements[own].numpy(), inputs.types[inputs.neighbors[own]].tolist()
    order = np.argsort(np.linalg.norm(vectors, axis=1), kind="stable")
    return [(types[k], vectors[k]) for k in order]


def environment_row(
    vector: np.ndarray | None, mean: np.ndarray, stddev: np.ndarray, cut: tuple[float, float]
) -> np.ndarray:
    """Standardised row of one neighbour, or of an empty slot."""
    raw = np.zeros(4)
    if vector is not None:
        r = np.linalg.norm(vector)
        raw = np.array([1.0 / r, *(vector / r**2)]) * switch(r, cut)
    return (raw - mean) / stddev


def switch(r: float, cut: tuple[float, float]) -> float:
    u = (np.clip(r, *cut) - cut[0]) / (cut[1] - cut[0])
    return 1.0 - 10.0 * u**3 + 15.0 * u**4 - 6.0 * u**5


def network(x: np.ndarray, weights: Weights, prefix: str, n_layers: int) -> np.ndarray:
    """Fully connected tanh network with shortcuts, for one input vector."""
    for k in range(n_layers):
        w, b = (weights[f"{prefix}.layers.{k}.{leaf}"].double().numpy() for leaf in "wb")
        y = np.tanh(x @ w + b)
        idt = weights.get(f"{prefix}.layers.{k}.idt")
        y = y if idt is None else y * idt.double().numpy()
        x = y + np.tile(x, len(y) // len(x)) if len(y) in (len(x), 2 * len(x)) else y
    return x


def invariants(rows: np.ndarray, g: np.ndarray, n_slots: int, axis_neuron: int) -> np.ndarray:
    """MᵀM[:, :axis] / S² from environment rows (n, 4) and features (n, width)."""
    moment = rows.T @ g / n_slots
    return (moment.T @ moment[:, :axis_neuron]).reshape(-1)
