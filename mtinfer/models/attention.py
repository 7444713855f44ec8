"""Gated self-attention among the neighbours of an atom (DPA-1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import ParameterSpec
from .layers import NO_LOGIT, Weights, layer_norm, row_peak, safe_norm


@dataclass(frozen=True)
class Attention:
    """Gated self-attention among the neighbours of one centre (arXiv:2208.08236, eqs. 10-15)."""

    prefix: str
    n_layers: int
    width: int
    hidden: int
    dtype: torch.dtype
    smooth: bool
    angular: bool
    normalize: bool
    scale: float
    ln_eps: float

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        shapes = {
            "in_proj.w": (self.width, 3 * self.hidden),
            "in_proj.b": (3 * self.hidden,),
            "out_proj.w": (self.hidden, self.width),
            "out_proj.b": (self.width,),
            "layer_norm.w": (self.width,),
            "layer_norm.b": (self.width,),
        }
        return {
            f"{self.prefix}.attention.{k}.{name}": ParameterSpec(shape, self.dtype)
            for k in range(self.n_layers)
            for name, shape in shapes.items()
        }

    def close(self, k: int, g: Tensor, update: Tensor | float, weights: Weights) -> Tensor:
        """Output projection's bias, shortcut and layer norm of layer `k`; `update` is already projected."""
        layer = f"{self.prefix}.attention.{k}"
        scale, shift = weights[f"{layer}.layer_norm.w"], weights[f"{layer}.layer_norm.b"]
        return layer_norm(g + update + weights[f"{layer}.out_proj.b"], scale, shift, self.ln_eps)

    def __call__(
        self, g: Tensor, directions: Tensor, w: Tensor, mask: Tensor, n_phantom: Tensor, weights: Weights
    ) -> Tensor:
        """All layers.

        Parameters
        ----------
        g
            shape (n, m, width), pair features.
        directions
            shape (n, m, 3), `environment.directions`.
        w, mask
            shape (n, m, 1), switch, and 1 where a slot holds a neighbour.
        n_phantom
            shape (n, 1, 1), slots outside the arrays that still count in the smooth softmax.

        Returns
        -------
        shape (n, m, width)
        """
        mask_j = mask.transpose(1, 2)
        gate = mask.expand(-1, -1, mask.shape[1])
        switches = w * w.transpose(1, 2)
        if self.smooth:
            gate = gate * switches
        if self.angular:
            gate = gate * (directions @ directions.transpose(1, 2))
        for k in range(self.n_layers):
            layer = f"{self.prefix}.attention.{k}"
            projected = g @ weights[f"{layer}.in_proj.w"] + weights[f"{layer}.in_proj.b"]
            query, key, value = projected.split(self.hidden, dim=-1)
            if self.normalize:
                query, key, value = (
                    x * (1.0 / torch.clamp(safe_norm(x), min=1e-12)) for x in (query, key, value)
                )
            logits = (query @ key.transpose(1, 2)) * self.scale
            if self.smooth:
                logits = (logits + 20.0) * switches - 20.0
            update = (self._softmax(logits, mask_j, n_phantom) * gate) @ value
            g = self.close(k, g, update @ weights[f"{layer}.out_proj.w"], weights)
        return g

    def _softmax(self, logits: Tensor, mask_j: Tensor, n_phantom: Tensor) -> Tensor:
        logits = torch.where(mask_j > 0, logits, NO_LOGIT)
        peak = row_peak(logits)
        if self.smooth:
            peak = torch.where(n_phantom > 0, torch.clamp(peak, min=-20.0), peak)
        weight = torch.exp(logits - peak) * mask_j
        total = weight.sum(-1, keepdim=True)
        if self.smooth:
            total = total + n_phantom * torch.exp(-20.0 - torch.clamp(peak, min=-20.0))
        return weight * (1.0 / torch.where(total > 0, total, 1.0))
