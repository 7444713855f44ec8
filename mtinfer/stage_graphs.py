"""Compiled stages: what is too large for one graph is evaluated through these, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .graph import SharedGraph, signed
from .models.layers import Weights
from .models.layout import Argument
from .models.stage import Stage, Tensors, derivative, value

__all__ = ["StageGraphs"]


@dataclass(frozen=True)
class _Pair:
    """Graphs of one kind of stage, and the names of the weights that they take."""

    value: SharedGraph
    derivative: SharedGraph
    names: tuple[str, ...]
    #: what the value returns, before what is kept for the derivative
    n_outputs: int


@dataclass
class StageGraphs:
    """Graphs of the stages of one architecture: one of the value and one of the derivative for each kind.

    Layers that differ in their weights alone share them, and so do heads, structures of any size, and parts.

    Parameters
    ----------
    whole
        graph of the same architecture for what is not too large; decides when these are compiled.
    """

    whole: SharedGraph
    _pairs: dict[str, _Pair] = field(default_factory=dict)

    @property
    def graphs(self) -> list[SharedGraph]:
        """Those that were needed so far."""
        return [graph for pair in self._pairs.values() for graph in (pair.value, pair.derivative)]

    def __call__(self, stage: Stage, varied: Tensors, fixed: Tensors, weights: Weights) -> Tensors:
        """Evaluate a stage for torch's autograd, which keeps its arguments and `stage.kept()`."""
        pair = self._pair(stage, weights)
        ordered = tuple(weights[name] for name in pair.names)
        outputs: Tensors = _Stage.apply(pair, fixed, ordered, *varied)  # type: ignore[no-untyped-call]
        return outputs

    def _pair(self, stage: Stage, weights: Weights) -> _Pair:
        weights = dict(sorted(weights.items()))
        signature = signed(repr(stage), weights)
        if signature not in self._pairs:
            varied, fixed = stage.arguments()
            kept, outputs = stage.kept(), stage.outputs()
            n_varied, n_data = len(varied), len(varied) + len(fixed)
            n_known = n_data + len(kept)

            def of_data(data: Tensors, named: Weights) -> Tensors:
                return value(stage, data[:n_varied], data[n_varied:], named)

            def of_cotangents(data: Tensors, named: Weights) -> Tensors:
                of_stage = data[:n_varied], data[n_varied:n_data]
                return derivative(stage, *of_stage, data[n_data:n_known], data[n_known:], named)

            def graph(
                kind: str, function: Callable[..., Tensors], arguments: list[Argument], n_sums: int = 0
            ) -> SharedGraph:
                compilation = self.whole.compilation
                return SharedGraph.of_named(
                    function, f"{kind} {signature}", arguments, weights, compilation, n_sums
                )

            data = [*varied, *fixed]
            self._pairs[signature] = _Pair(
                graph("value", of_data, data, len(kept)),
                graph("derivative", of_cotangents, [*data, *kept, *outputs]),
                tuple(weights),
                len(outputs),
            )
        return self._pairs[signature]


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: _Pair, fixed: Tensors, weights: Tensors, *varied: Tensor) -> Tensors:
        ctx.pair, ctx.weights = pair, weights
        varied, fixed = (tuple(array.contiguous() for array in data) for data in (varied, fixed))
        made = pair.value((*varied, *fixed), weights)
        outputs, kept = made[: pair.n_outputs], made[pair.n_outputs :]
        ctx.save_for_backward(*varied, *fixed, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        data = (*ctx.saved_tensors, *(cotangent.contiguous() for cotangent in cotangents))
        return (None, None, None, *ctx.pair.derivative(data, ctx.weights))
