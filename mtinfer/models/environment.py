"""Environment rows, type embedding and moment matrix: what se_e2_a, DPA-1 and DPA-2 have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..inputs import ParameterSpec
from .electron_configuration import electron_configuration
from .gather import settled
from .layers import Sloped, Weights, safe_norm, switch
from .layout import EMPTY_BEYOND


@dataclass(frozen=True)
class Environment:
    """Rows (1/(r+p), d/(r+p)²)·w(r), shifted and scaled per centre type.

    Zhang et al., NeurIPS 2018 (arXiv:1805.09003), eq. 7; the protection p is zero in most models.
    """

    rcut: float
    rcut_smth: float
    protection: float

    def rows(self, displacements: Tensor, mean: Tensor, stddev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised rows of every slot, zero in empty ones.

        Parameters
        ----------
        displacements
            shape (n, m, 3), Å; empty slots as `layout.far_away` makes them.
        mean, stddev
            broadcastable to (n, m, 4).

        Returns
        -------
        rows (n, m, 4), switch (n, m, 1), mask (n, m, 1; 1 where a slot holds a neighbour)
        """
        r = settled(distances(displacements))
        w, mask = self.switch(r), self._mask(r)
        inverse = 1.0 / (r + self.protection)
        raw = torch.cat([settled(inverse * w), displacements * settled(inverse * inverse * w)], dim=-1)
        return (raw - mean) / stddev * mask, w, mask

    def switch(self, r: Tensor) -> Tensor:
        """Smooth cutoff at distances of any shape, Å."""
        return switch(r, self.rcut_smth, self.rcut)

    def radial(self, r: Tensor, mean: Tensor, stddev: Tensor) -> tuple[Sloped, Sloped]:
        """First component of the standardised rows, and switch, as functions of the distance.

        Parameters
        ----------
        r
            shape (n, m, 1), Å.
        mean, stddev
            as in `rows`.
        """

        def first(r: Tensor) -> Tensor:
            raw = 1.0 / (r + self.protection) * self.switch(r)
            return (raw - mean[..., :1]) / stddev[..., :1] * self._mask(r)

        return Sloped.of(first, r), Sloped.of(self.switch, r)

    def _mask(self, r: Tensor) -> Tensor:
        return (r < EMPTY_BEYOND * self.rcut).to(r.dtype)


def distances(displacements: Tensor) -> Tensor:
    """Lengths of displacements, shape (..., 3) -> (..., 1), Å."""
    return torch.sqrt((displacements * displacements).sum(-1, keepdim=True))


def directions(rows: Tensor) -> Tensor:
    """Last three components of rows (n, m, 4) as unit vectors, shorter where those are below 1e-12.

    Pass float64 rows: close to the cutoff a float32 switch is rounding noise, which normalising blows up.
    """
    rows = rows[..., 1:]
    return rows / torch.clamp(safe_norm(rows), min=1e-12)


def statistics(weights: Weights, prefix: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the rows, (n_types, 4) each; the file repeats them for every slot."""
    return weights[f"{prefix}.mean"][:, 0], weights[f"{prefix}.stddev"][:, 0]


def statistics_parameters(
    prefix: str, n_types: int, sel: int, dtype: torch.dtype
) -> dict[str, ParameterSpec]:
    """Names and shapes of the stored statistics."""
    return {f"{prefix}.{name}": ParameterSpec((n_types, sel, 4), dtype) for name in ("mean", "stddev")}


def invariants(moment: Tensor, axis_neuron: int) -> Tensor:
    """Rotation-invariant features MᵀM[:, :axis], shape (n, 4, g) -> (n, g·axis), g slow.

    Zhang et al., NeurIPS 2018 (arXiv:1805.09003), eq. 12.
    """
    return (moment.transpose(1, 2) @ moment[:, :, :axis_neuron]).flatten(1)


def add_to_first_row(moment: Tensor, row: Tensor) -> Tensor:
    """Add `row` (n, g) to component 0 of `moment` (n, 4, g)."""
    return torch.cat([moment[:, :1] + row.unsqueeze(1), moment[:, 1:]], dim=1)


@dataclass(frozen=True)
class TypeEmbedding:
    """One affine layer with shortcut on one-hot rows, or on electron configurations of the elements."""

    prefix: str
    n_rows: int
    width: int
    bias: bool
    dtype: torch.dtype
    #: whether electron configurations replace one-hot rows
    use_econf: bool = False
    #: symbols, read for their electron configurations
    elements: tuple[str, ...] = field(default=(), repr=False)

    @property
    def _n_in(self) -> int:
        return 118 if self.use_econf else self.n_rows

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        specs = {f"{self.prefix}.layers.0.w": ParameterSpec((self._n_in, self.width), self.dtype)}
        if self.bias:
            specs[f"{self.prefix}.layers.0.b"] = ParameterSpec((self.width,), self.dtype)
        return specs

    def rows(self, weights: Weights) -> Tensor:
        """Embedding of every type, shape (n_rows, width)."""
        w = weights[f"{self.prefix}.layers.0.w"]
        if self.use_econf:
            one_hot = _configurations(self.elements).to(w)
        else:
            one_hot = torch.eye(self.n_rows, dtype=w.dtype, device=w.device)
        rows = one_hot @ w
        if self.bias:
            rows = rows + weights[f"{self.prefix}.layers.0.b"]
        return with_shortcut(rows, one_hot)


def with_shortcut(rows: Tensor, one_hot: Tensor) -> Tensor:
    """Rows (n, width) of a type embedding plus their inputs (n, k), once or twice where they are as wide."""
    n_in = one_hot.shape[1]
    if rows.shape[1] == n_in:
        return rows + one_hot
    return rows + torch.cat([one_hot, one_hot], dim=1) if rows.shape[1] == 2 * n_in else rows


def _configurations(elements: Sequence[str]) -> Tensor:
    return torch.tensor([electron_configuration(symbol) for symbol in elements], dtype=torch.float64)
