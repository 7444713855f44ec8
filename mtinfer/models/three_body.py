"""Three-body block of DPA-2: a small net on the angle between every two neighbours of a centre.

Zhang et al., npj Comput. Mater. 10, 293 (2024), arXiv:2312.15492.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import ParameterSpec
from .environment import Environment, statistics, statistics_parameters
from .gather import lookup
from .layers import Network, Weights

_BLOCK = "descriptor.repinit_three_body"


@dataclass(frozen=True)
class ThreeBody:
    """Σ_mn θ_mn G(θ_mn, t_m, t_n) / sel², with θ_mn = a_m·a_n of the environment rows."""

    n_types: int
    sel: int
    environment: Environment
    neuron: tuple[int, ...]
    activation: str
    resnet_dt: bool
    dtype: torch.dtype
    tebd_dim: int
    strip: bool
    smooth: bool

    def _network(self, name: str, n_in: int) -> Network:
        widths = (n_in, *self.neuron)
        return Network(f"{_BLOCK}.{name}.0", widths, self.activation, self.resnet_dt, self.dtype)

    @property
    def _angular(self) -> Network:
        return self._network("embeddings", 1 if self.strip else 1 + 2 * self.tebd_dim)

    @property
    def _typed(self) -> Network:
        return self._network("embeddings_strip", 2 * self.tebd_dim)

    @property
    def width(self) -> int:
        """Features per atom."""
        return self.neuron[-1]

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        specs = statistics_parameters(_BLOCK, self.n_types, self.sel, self.dtype) | self._angular.parameters()
        return specs | (self._typed.parameters() if self.strip else {})

    def prepare(self, weights: Weights, embedding: Tensor) -> dict[str, Tensor]:
        """Weights for the graph; what depends on types alone is evaluated here."""
        n_types = embedding.shape[0]
        mean, stddev = statistics(weights, _BLOCK)
        prepared = {f"{_BLOCK}.mean": mean, f"{_BLOCK}.stddev": stddev}
        prepared |= {name: weights[name] for name in self._angular.parameters()}
        if self.strip:
            of_m, of_n = embedding.repeat_interleave(n_types, 0), embedding.repeat(n_types, 1)
            prepared[f"{_BLOCK}.pair_factor"] = self._typed(torch.cat([of_m, of_n], dim=1), weights)
        else:
            layer = f"{self._angular.prefix}.layers.0"
            w_m, w_n = weights[f"{layer}.w"][1:].split(self.tebd_dim)
            prepared[f"{_BLOCK}.shift_m"] = embedding @ w_m
            prepared[f"{_BLOCK}.shift_n"] = embedding @ w_n + weights[f"{layer}.b"]
            prepared[f"{_BLOCK}.type_embedding"] = embedding
        return prepared

    def __call__(self, types: Tensor, displacements: Tensor, of_slots: Tensor, weights: Weights) -> Tensor:
        """Features of every centre.

        Parameters
        ----------
        types
            shape (n,).
        displacements
            shape (n, m, 3), Å; empty slots as `layout.far_away` makes them.
        of_slots
            shape (n, m), type of the neighbour in each slot, any type in an empty one.

        Returns
        -------
        shape (n, width)
        """
        mean, stddev = (weights[f"{_BLOCK}.{name}"][types].unsqueeze(1) for name in ("mean", "stddev"))
        rows, w, _ = self.environment.rows(displacements, mean, stddev)
        direction = rows[..., 1:]
        angle = direction @ direction.transpose(1, 2)
        net = self._angular
        x = self._first_layer(angle, of_slots, weights)
        for k in range(1, net.n_layers):
            x = net.columns(k, x, weights)
        if self.strip:
            pair = of_slots.unsqueeze(2) * self.n_types + of_slots.unsqueeze(1)
            factor = lookup(weights[f"{_BLOCK}.pair_factor"], pair.flatten(1)).transpose(1, 2)
            if self.smooth:
                factor = factor * (w * w.transpose(1, 2)).flatten(1).unsqueeze(1)
            x = x * (1.0 + factor)
        return (x @ angle.flatten(1).unsqueeze(2)).squeeze(2) / self.sel**2

    def _first_layer(self, angle: Tensor, of_slots: Tensor, weights: Weights) -> Tensor:
        """Layer 0 of every pair (m, n) of slots: shape (n, m, m) -> (n, neuron[0], m·m)."""
        net = self._angular
        x = angle.flatten(1).unsqueeze(1)
        if self.strip:
            return net.columns(0, x, weights)
        w = weights[f"{net.prefix}.layers.0.w"][0]
        shift_m, shift_n = (lookup(weights[f"{_BLOCK}.{name}"], of_slots) for name in ("shift_m", "shift_n"))
        typed = shift_m.transpose(1, 2).unsqueeze(3) + shift_n.transpose(1, 2).unsqueeze(2)
        affine = (angle.unsqueeze(1) * w[:, None, None] + typed).flatten(2)
        if net.repeats(0):
            embedding = lookup(weights[f"{_BLOCK}.type_embedding"], of_slots).transpose(1, 2)
            shape = (-1, -1, *angle.shape[1:])
            of_m, of_n = embedding.unsqueeze(3).expand(shape), embedding.unsqueeze(2).expand(shape)
            x = torch.cat([x, of_m.flatten(2), of_n.flatten(2)], dim=1)
        return net.finish(0, affine, x, weights, axis=1)
