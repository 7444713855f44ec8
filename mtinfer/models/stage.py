"""Stages: the steps of a descriptor whose layers pass messages, each evaluated for some centres at a time.

A descriptor of this kind can't divide its atoms into calls of one graph, as each layer reads what the layer
before made of the neighbours. It can divide every layer. Kept for the derivative is then what stands between
the stages, and of what is made within one what is worth its memory (`Keep`); the rest is computed a second
time, part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .gather import Index, gather
from .layers import Weights
from .layout import Argument

Tensors = tuple[Tensor, ...]
#: returns its argument, whose value the derivative need not compute again
Keep = Callable[[Tensor], Tensor]


class Stage(Protocol):
    """One step for some centres, a plain function of tensors. Its repr is the signature of its graphs."""

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Tensors that the energy is differentiated by, and further ones."""

    def outputs(self) -> list[Argument]:
        """What it returns."""

    def kept(self) -> list[Argument]:
        """What it hands to `keep`, in this order."""

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors: ...


#: how a stage is called: ``call(stage, varied, fixed, weights)``
Call = Callable[[Stage, Tensors, Tensors, Weights], Tensors]


def directly(stage: Stage, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors:
    """Call a stage as what it is, a function."""
    return stage(varied, fixed, weights, lambda x: x)


def value(stage: Stage, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors:
    """Outputs of a stage, then what it keeps."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.contiguous())
        return x

    return (*stage(varied, fixed, weights, keep), *kept)


def derivative(
    stage: Stage, varied: Tensors, fixed: Tensors, kept: Tensors, cotangents: Tensors, weights: Weights
) -> Tensors:
    """Gradients by `varied` of the sum of outputs times `cotangents`; computes anew what was not kept."""
    values = iter(kept)

    def keep(x: Tensor) -> Tensor:
        return _Known.apply(x, next(values))  # type: ignore[no-any-return, no-untyped-call]

    with torch.enable_grad():
        varied = tuple(array.detach().requires_grad_(True) for array in varied)
        pairs = zip(stage(varied, fixed, weights, keep), cotangents, strict=True)
        outputs, along = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        return torch.autograd.grad(outputs, varied, along, materialize_grads=True)


class _Known(torch.autograd.Function):
    """`x`, whose value is at hand: nothing reads the one computed anew, and compiled code leaves it out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Tensor) -> Tensor:
        return known

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def pieces(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Rows of `x` in parts of these sizes."""
    return [x] if len(sizes) == 1 else x.split(list(sizes))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class Nearby:
    """Atoms that are near the centres of each part, part after part."""

    index: Index
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, neighbors: Sequence[Tensor], n_atoms: int) -> tuple[Nearby, list[Index]]:
        """From the neighbours of each part; also return their places among the atoms near that part."""
        atoms, places = zip(*(torch.unique(rows, return_inverse=True) for rows in neighbors), strict=True)
        sizes = tuple(rows.shape[0] for rows in atoms)
        nearby = cls(Index.of(torch.cat(atoms), n_atoms), sizes)
        return nearby, [Index.of(rows, size) for rows, size in zip(places, sizes, strict=True)]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Rows of all atoms -> rows of the atoms near each part."""
        return pieces(gather(x, self.index), self.sizes)
