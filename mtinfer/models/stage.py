"""Stages: the steps of a descriptor whose layers pass messages, each evaluated for some centres at a time.

A descriptor of this kind can't divide its atoms into calls of one graph, as each layer reads what the layer
before made of the neighbours. It can divide every layer. Kept for the derivative is then what stands between
the stages; the rest is computed a second time, part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .layers import Weights
from .layout import Argument

Tensors = tuple[Tensor, ...]


class Stage(Protocol):
    """One step for some centres, a plain function of tensors. Its repr is the signature of its graphs."""

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Tensors that the energy is differentiated by, and further ones."""

    def outputs(self) -> list[Argument]:
        """What it returns."""

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors: ...


#: how a stage is called: ``call(stage, varied, fixed, weights)``
Call = Callable[[Stage, Tensors, Tensors, Weights], Tensors]


def directly(stage: Stage, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors:
    """Call a stage as what it is, a function."""
    return stage(varied, fixed, weights)


def derivative(
    stage: Stage, varied: Tensors, fixed: Tensors, cotangents: Tensors, weights: Weights
) -> Tensors:
    """Gradients by `varied` of the sum of outputs times `cotangents`; computes the stage once more."""
    pull_back = torch.func.vjp(lambda *values: stage(values, fixed, weights), *varied)[1]
    gradients: Tensors = pull_back(cotangents)
    return gradients


def pieces(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Rows of `x` in parts of these sizes."""
    return [x] if len(sizes) == 1 else x.split(list(sizes))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
