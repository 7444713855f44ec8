"""Features of a pair of atoms from its distance and the types of both ends (DPA-1, DPA-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import ParameterSpec
from .gather import lookup, settled
from .layers import Network, Sloped, Weights


@dataclass(frozen=True)
class PairNetwork:
    """Features G of a pair from its distance and the types of both ends: *concat* or *strip*."""

    prefix: str
    neuron: tuple[int, ...]
    activation: str
    resnet_dt: bool
    dtype: torch.dtype
    tebd_dim: int
    strip: bool
    one_sided: bool
    #: strip only: the type factor fades with the switch
    smooth: bool

    @property
    def _n_types_in(self) -> int:
        return self.tebd_dim * (1 if self.one_sided else 2)

    def _network(self, name: str, n_in: int) -> Network:
        return Network(
            f"{self.prefix}.{name}.0", (n_in, *self.neuron), self.activation, self.resnet_dt, self.dtype
        )

    @property
    def radial(self) -> Network:
        return self._network("embeddings", 1 if self.strip else 1 + self._n_types_in)

    @property
    def _typed(self) -> Network:
        return self._network("embeddings_strip", self._n_types_in)

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        return self.radial.parameters() | (self._typed.parameters() if self.strip else {})

    def prepare(self, weights: Weights, embedding: Tensor) -> dict[str, Tensor]:
        """Weights for the graph: all that depends on types alone is evaluated here, once per pair of types.

        Tables have n_types² rows, row ``t_i · n_types + t_j``.
        """
        n_types = embedding.shape[0]
        of_j = embedding.repeat(n_types, 1)
        of_i = embedding.repeat_interleave(n_types, 0)
        pair_types = of_j if self.one_sided else torch.cat([of_j, of_i], dim=1)
        kept = {name: weights[name] for name in self.radial.parameters()}
        bias = kept.pop(f"{self.prefix}.embeddings.0.layers.0.b")
        if self.strip:
            kept[f"{self.prefix}.pair_factor"] = settled(self._typed(pair_types, weights))
            kept[f"{self.prefix}.pair_shift"] = bias
        else:
            w = weights[f"{self.prefix}.embeddings.0.layers.0.w"]
            kept[f"{self.prefix}.pair_shift"] = pair_types @ w[1:] + bias
            kept[f"{self.prefix}.pair_types"] = pair_types
        return kept

    def __call__(self, s: Sloped, w: Sloped, pair: Tensor, weights: Weights) -> Sloped:
        """Pair features.

        Parameters
        ----------
        s, w
            shape (..., 1), first component of the environment row, and switch, functions of the distance.
        pair
            shape (...), row of the pair tables.

        Returns
        -------
        shape (..., k, neuron[-1] / k), see `Network.folded`
        """
        net, shift = self.radial, weights[f"{self.prefix}.pair_shift"]
        if not self.strip:
            rest = lookup(weights[f"{self.prefix}.pair_types"], pair)
            return net.on_scalar(s, rest, lookup(shift, pair), weights)
        g = net.on_scalar(s, None, shift, weights)
        factor = net.folded(lookup(weights[f"{self.prefix}.pair_factor"], pair))
        if not self.smooth:
            return Sloped(g.value * (1.0 + factor), g.slope * (1.0 + factor))
        w = w.each(lambda part: part.unsqueeze(-1))
        scale = 1.0 + factor * w.value
        return Sloped(g.value * scale, g.slope * scale + g.value * (factor * w.slope))
