"""Descriptors whose radial embedding nets are replaced by Chebyshev series.

The features G_m of a pair depend on one number, s. With G_m(s) = Σ_k c_km T_k(x(s)) the moment
Σ_j R_j G_m(s_j) of a centre is Σ_k c_km Σ_j R_j T_k(x_j): a pair only pays for the T_k, and the map to
features is applied once per centre. Unlike a table of pieces, the series is smooth to all orders, and its
forces are exact derivatives of its energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..inputs import GraphInputs, ParameterSpec
from .dpa1 import DPA1
from .gather import lookup
from .layers import Sloped, Weights
from .layout import Argument, Layout, Pairs, Selection
from .se_e2_a import SeE2A

#: Å: series hold for pairs no closer than this
CLOSEST = 0.5
#: largest accepted sum of the coefficients left out; of nets whose values exceed 1, relative to these
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-7}
#: factors T_0 … T_15 of the product basis; the number of terms is a multiple of it
_LOW = 16
_MOST_TERMS = 256
_NODES = 2 * _MOST_TERMS


@dataclass(frozen=True)
class ChebyshevSeries:
    """Coefficients of several functions of one number, in the basis T_a(x) T_b(T_16(x)).

    T_16b = T_b ∘ T_16 and 2 T_a T_16b = T_{16b+a} + T_{16b-a}, so that the basis spans the same polynomials
    as T_0 … T_{n-1}, and a pair evaluates 16 + n/16 numbers instead of n.
    """

    name: str
    n_terms: int

    def fit(self, net: Callable[[Tensor], Tensor], lowest: Tensor, highest: Tensor) -> dict[str, Tensor]:
        """Weights of the series of `net`, (n, 1) -> (n, width), on an interval."""
        coefficients = chebyshev_coefficients(net, lowest, highest)[: self.n_terms]
        high = torch.arange(self.n_terms // _LOW, device="cpu")
        low = torch.arange(_LOW, device="cpu")
        sums = (high[:, None] * _LOW + low).flatten()
        differences = (high[:, None] * _LOW - low).abs().flatten()
        identity = torch.eye(self.n_terms, dtype=torch.float64, device="cpu")
        products = 0.5 * (identity[sums] + identity[differences])
        basis = torch.linalg.solve(products.T, coefficients.cpu()).to(coefficients)
        scale = 2.0 / (highest - lowest)
        return {
            f"{self.name}.coefficients": basis.to(lowest.dtype),
            f"{self.name}.map": torch.stack([scale, -1.0 - scale * lowest]),
        }

    def moment(self, rows: Tensor, s: Tensor, weights: Weights) -> Tensor:
        """Sum over slots of rows ⊗ functions of s.

        Parameters
        ----------
        rows
            shape (n, c, m).
        s
            shape (n, m), inside the interval of the fit.

        Returns
        -------
        shape (n, c, width)
        """
        scale, offset = weights[f"{self.name}.map"].unbind()
        low, above = _chebyshev(s * scale + offset, _LOW)
        high, _ = _chebyshev(above, self.n_terms // _LOW)
        left = (rows.unsqueeze(2) * high.unsqueeze(1)).flatten(1, 2)
        sums = left @ low.transpose(1, 2)
        return sums.reshape(rows.shape[0], rows.shape[1], self.n_terms) @ weights[f"{self.name}.coefficients"]


def _chebyshev(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """T_0 … T_{n-1}, shape (n, m) -> (n, n_values, m), and T_p, p the power of two not below n.

    By doubling, T_{h+j} = 2 T_h T_j - T_{h-j}: few operations on many values, which compile in little time.
    """
    values, top = torch.stack([torch.ones_like(x), x], 1), 2.0 * x * x - 1.0
    while values.shape[1] < n:
        mirrored = torch.cat([values[:, 1:], top.unsqueeze(1)], 1).flip(1)
        values = torch.cat([values, 2.0 * top.unsqueeze(1) * values - mirrored], 1)
        top = 2.0 * top * top - 1.0
    return values[:, :n], top


def chebyshev_coefficients(net: Callable[[Tensor], Tensor], lowest: Tensor, highest: Tensor) -> Tensor:
    """Coefficients c_k of `net` on an interval, shape (512, width), float64, by interpolation at its nodes.

    Trefethen, Approximation Theory and Approximation Practice (SIAM 2019), chapters 3 and 4.
    """
    k = torch.arange(_NODES, dtype=torch.float64, device=lowest.device)
    angles = torch.pi * (k + 0.5) / _NODES
    s = lowest + (highest - lowest) * 0.5 * (torch.cos(angles).unsqueeze(1) + 1.0)
    coefficients = 2.0 / _NODES * torch.cos(k.unsqueeze(1) * angles) @ net(s)
    coefficients[0] *= 0.5
    return coefficients


def _terms(net: Callable[[Tensor], Tensor], lowest: Tensor, highest: Tensor, tolerance: float) -> int:
    """Fewest terms that a series of `net` needs, a multiple of 16."""
    coefficients = chebyshev_coefficients(net, lowest, highest)
    left_out = coefficients.abs().flip(0).cumsum(0).flip(0).amax(1)
    scale = max(1.0, float(net(torch.stack([lowest, highest]).unsqueeze(1)).abs().max()))
    needed = int((left_out > tolerance * scale).sum())
    n_terms = max(2, -(-needed // _LOW)) * _LOW
    if n_terms > _MOST_TERMS:
        raise UnsupportedModelError(
            f"its embedding net is too steep for a series (more than {_MOST_TERMS} terms); "
            "evaluate it without tabulate"
        )
    return n_terms


def _in_float64(weights: Weights) -> dict[str, Tensor]:
    return {name: w.to(torch.float64) if w.is_floating_point() else w for name, w in weights.items()}


def _interval(mean: Tensor, stddev: Tensor, protection: float) -> tuple[Tensor, Tensor]:
    """Values that the first component of the rows takes, for centres of these statistics, (n, 4) each.

    Zero is one of them: that of slots without a neighbour.
    """
    far, near = ((s - mean[:, 0]) / stddev[:, 0] for s in (0.0, 1.0 / (CLOSEST + protection)))
    zero = far.new_zeros(())
    return torch.minimum(far.min(), zero), torch.maximum(near.max(), zero)


_Exact = TypeVar("_Exact", DPA1, SeE2A)

_REFUSED = (
    "only se_e2_a, and se_atten in strip mode without attention, can be tabulated, for elements that the "
    "head saw in training; evaluate it without tabulate"
)


@dataclass(frozen=True)
class _Tabulated(Generic[_Exact]):
    """What a tabulated descriptor has of the one that it stands for."""

    exact: _Exact
    n_terms: int
    #: types that the series cover
    types: tuple[int, ...] = field(repr=False)

    reads_charge_spin: ClassVar[bool] = False
    default_chg_spin: ClassVar[None] = None

    @property
    def selection(self) -> Selection:
        return self.exact.selection

    @property
    def rcut(self) -> float:
        return self.exact.rcut

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""
        return self.exact.width

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        return self.exact.parameters()


@dataclass(frozen=True)
class TabulatedDPA1(_Tabulated[DPA1]):
    """`DPA1` in strip mode without attention, by series. Types outside of `types` are not covered."""

    mixed_types: ClassVar[bool] = True

    @classmethod
    def of(cls, exact: DPA1, weights: Weights, types: tuple[int, ...]) -> TabulatedDPA1:
        """Find the number of terms; raise UnsupportedModelError where a series does not fit."""
        if not exact.pair_network.strip or exact.attention.n_layers:
            raise UnsupportedModelError(_REFUSED)
        (group,) = exact.prepare(weights)
        draft = cls(exact, _MOST_TERMS, types)
        lowest, highest, net = draft._radial(_in_float64(group))
        return replace(draft, n_terms=_terms(net, lowest, highest, _TOLERANCE[exact.dtype]))

    @property
    def _series(self) -> ChebyshevSeries:
        return ChebyshevSeries(f"{self.exact.block}.series", self.n_terms)

    def _radial(self, group: Weights) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        block, network = self.exact.block, self.exact.pair_network
        mean, stddev = (group[f"{block}.{name}"][list(self.types)] for name in ("mean", "stddev"))
        lowest, highest = _interval(mean, stddev, self.exact.environment.protection)
        shift = group[f"{block}.pair_shift"]

        def net(s: Tensor) -> Tensor:
            features = network.radial.on_scalar(Sloped(s, torch.ones_like(s)), None, shift, group)
            return features.value.flatten(1)

        return lowest, highest, net

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph, in the single group of this descriptor."""
        (group,) = self.exact.prepare(weights)
        lowest, highest, net = self._radial(_in_float64(group))
        fitted = self._series.fit(net, lowest, highest)
        replaced = {*self.exact.pair_network.radial.parameters(), f"{self.exact.block}.pair_shift"}
        kept = {name: w for name, w in group.items() if name not in replaced}
        return [kept | {name: w.to(self.exact.dtype) for name, w in fitted.items()}]

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph; see `__call__`."""
        index = torch.int64
        return [Argument(("atoms", "slots", 3))], [
            Argument(("atoms",), index),
            Argument(("atoms", "slots"), index),
            Argument(("atoms",), index),
            Argument(("atoms",)),
            Argument(("species",), index),
        ]

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """Padded neighbour matrices, a few centres each."""
        species = torch.unique(inputs.types)
        layouts = []
        for layout in self.exact.layouts(inputs, pairs, split=split):
            types, pair, empty_pair, n_empty, _ = layout.tensors
            neighbors = pair.remainder(self.exact.n_types)
            layouts.append(replace(layout, tensors=(types, neighbors, empty_pair, n_empty, species)))
        return layouts

    def __call__(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre.

        Parameters
        ----------
        displacements
            one array, shape (n, m, 3), Å.
        tensors
            types (n,), types of the neighbours (n, m), row of the empty-slot table (n,), number of empty
            slots (n,), types that neighbours may have (p,).

        Returns
        -------
        descriptor, shape (n, width), and types, shape (n,)
        """
        types, neighbors, empty_pair, n_empty, species = tensors
        exact = self.exact
        vectors, normalization = displacements[0].to(exact.dtype), exact.normalization(types, weights)
        rows, w, _ = exact.environment.rows(vectors, *normalization)
        planes = rows.transpose(1, 2)
        chosen = (neighbors.unsqueeze(1) == species.unsqueeze(1)).to(exact.dtype)
        if exact.pair_network.smooth:
            chosen = chosen * w.transpose(1, 2)
        typed = (chosen.unsqueeze(2) * planes.unsqueeze(1)).flatten(1, 2)
        sums = self._series.moment(torch.cat([planes, typed], 1), rows[..., 0], weights)
        pair = types.unsqueeze(1) * exact.n_types + species
        factor = lookup(weights[f"{exact.block}.pair_factor"], pair)
        of_types = sums[:, 4:].unflatten(1, (species.shape[0], 4))
        moment = sums[:, :4] + (of_types * factor.unsqueeze(2)).sum(1)
        return exact.features(moment, types, empty_pair, n_empty, weights), types


@dataclass(frozen=True)
class TabulatedSeE2A(_Tabulated[SeE2A]):
    """`SeE2A` by series, one per neighbour type and weight group. Types outside `types` are not covered."""

    mixed_types: ClassVar[bool] = False

    @classmethod
    def of(cls, exact: SeE2A, weights: Weights, types: tuple[int, ...]) -> TabulatedSeE2A:
        """Find the number of terms; raise UnsupportedModelError where a series does not fit."""
        draft = cls(exact, _MOST_TERMS, types)
        groups = exact.prepare(weights)
        tolerance = _TOLERANCE[exact.dtype]
        radial = [draft._radial(_in_float64(groups[c]), t) for c in types for t in types]
        needed = [_terms(net, lowest, highest, tolerance) for lowest, highest, net in radial]
        return replace(draft, n_terms=max(needed))

    def _series(self, t: int) -> ChebyshevSeries:
        return ChebyshevSeries(f"descriptor.series.{t}", self.n_terms)

    def _radial(self, group: Weights, t: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        mean, stddev = (group[f"descriptor.{name}"].unsqueeze(0) for name in ("mean", "stddev"))
        lowest, highest = _interval(mean, stddev, self.exact.environment.protection)
        network = self.exact.network(t)
        return lowest, highest, lambda s: network(s, group)

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights for the graph, one group per centre type."""
        return [self._group(group) for group in self.exact.prepare(weights)]

    def _group(self, group: Weights) -> dict[str, Tensor]:
        kept, precise = dict(group), _in_float64(group)
        for t in range(self.exact.n_types):
            lowest, highest, net = self._radial(precise, t)
            fitted = self._series(t).fit(net, lowest, highest)
            for name in self.exact.network(t).parameters():
                del kept[name]
            kept |= {name: w.to(self.exact.dtype) for name, w in fitted.items()}
        return kept

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Displacement arrays and further arguments of the graph, those of `SeE2A`."""
        return self.exact.arguments()

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """Those of `SeE2A`."""
        return self.exact.layouts(inputs, pairs, split=split)

    def __call__(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of every centre; see `SeE2A`."""

        def moment(t: int, rows: Tensor) -> Tensor:
            return self._series(t).moment(rows.transpose(1, 2), rows[..., 0], weights)

        return self.exact.describe(displacements, tensors, weights, moment)


def tabulated(descriptor: Any, weights: Weights, types: Iterable[int]) -> TabulatedDPA1 | TabulatedSeE2A:
    """Replace the radial embedding nets of a descriptor.

    Parameters
    ----------
    weights
        canonical name -> tensor.
    types
        those that the model was trained on: the statistics of others say nothing of their distances.

    Raises
    ------
    UnsupportedModelError
        If the descriptor has no radial nets that stand alone, or one that needs too many terms.
    """
    kinds: dict[type, Any] = {DPA1: TabulatedDPA1, SeE2A: TabulatedSeE2A}
    covered = tuple(types)
    if type(descriptor) not in kinds or not covered:
        raise UnsupportedModelError(_REFUSED)
    found: TabulatedDPA1 | TabulatedSeE2A = kinds[type(descriptor)].of(descriptor, weights, covered)
    return found


def covers(descriptor: Any, inputs: GraphInputs) -> bool:
    """Whether a tabulated descriptor holds for all atoms and pairs of `inputs`."""
    # a product with ones is several times as fast as a sum over three columns
    squares = (inputs.displacements * inputs.displacements) @ inputs.displacements.new_ones(3)
    if squares.numel() and float(squares.min()) < CLOSEST**2:
        return False
    return set(torch.unique(inputs.types).tolist()) <= set(descriptor.types)
