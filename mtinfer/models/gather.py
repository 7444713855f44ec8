"""Rows of a table by index, and sums of rows by index: each the derivative of the other.

The sum is one opaque operator: Inductor's CPU code for scatter-adds with dynamic shapes uses vectorised
atomics that corrupt memory with several threads (torch 2.13). It runs over the entries in the order that the
index lists them under each row, so forces are reproducible bit for bit on every device. The gather stays
visible to the compiler, which reads the rows where they are needed instead of copying them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Index(NamedTuple):
    """For each of m entries a row of a table of n, and the same list grouped by row."""

    #: (m,) int64, row of each entry
    rows: Tensor
    #: (m,) int64, entries sorted by row
    order: Tensor
    #: (n,) int64, where each row's entries begin in `order`
    starts: Tensor

    @classmethod
    def of(cls, rows: Tensor, n: int, *, ascending: bool = False) -> Index:
        """Build from the row of each entry; `ascending` promises that they are sorted."""
        counts = torch.bincount(rows, minlength=n)
        m = rows.shape[0]
        order = torch.arange(m, device=rows.device) if ascending else torch.argsort(rows, stable=True)
        return cls(rows, order, torch.cumsum(counts, 0) - counts)


_OPERATORS = torch.library.Library("mtinfer", "FRAGMENT")
_OPERATORS.define("segment_sum(Tensor x, Tensor order, Tensor starts) -> Tensor")
_OPERATORS.define("moment(Tensor weights, Tensor x, Tensor rows, Tensor starts) -> Tensor")


def _bags(x: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    if rows.shape[0] == 0:
        return x.new_zeros((starts.shape[0], x.shape[1]))
    return torch.embedding_bag(x, rows, starts, mode=0, per_sample_weights=weights)[0]


def _moment_kernel(weights: Tensor, x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([_bags(x, rows, starts, w) for w in weights.t().contiguous()], dim=1)


_OPERATORS.impl("segment_sum", _bags, "CompositeExplicitAutograd")
_OPERATORS.impl("moment", _moment_kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("mtinfer::segment_sum")
def _(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0], x.shape[1]))


@torch.library.register_fake("mtinfer::moment")
def _(weights: Tensor, x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0], weights.shape[1], x.shape[1]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return segment_sum(gradient, Index(*ctx.saved_tensors)), None, None, None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        return torch.ops.mtinfer.segment_sum(x, order, starts)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gather(gradient, Index(*ctx.saved_tensors)), None, None, None


class _Moment(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor, x: Tensor, *indices: Tensor) -> Tensor:
        rows = indices[3] if len(indices) > 3 else indices[1]
        return torch.ops.mtinfer.moment(weights, x, rows, indices[2])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, x, *indices = ctx.saved_tensors
        here = gather(gradient.flatten(1), Index(*indices[:3])).unflatten(1, gradient.shape[1:])
        of_x = (weights.unsqueeze(2) * here).sum(1)
        if len(indices) > 3:
            source = Index(*indices[3:])
            x = gather(x, source)
            of_x = segment_sum(of_x, source)
        of_weights = (here * x.unsqueeze(1)).sum(2)
        return of_weights, of_x, *(None for _ in indices)


def moment(weights: Tensor, x: Tensor, index: Index, source: Index | None = None) -> Tensor:
    """Sum over the entries of each row of weights ⊗ x, (m, d) and (m, c) -> (n, d, c), for an ascending `index`.

    With a `source`, x has shape (n_source, c), and entry k reads row ``source.rows[k]`` of it.
    """
    indices = (*index, *(source or ()))
    return _Moment.apply(weights, x, *indices)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: Tensor, index: Index | Tensor) -> Tensor:
    """Row ``index.rows[k]`` of `x` for every entry k: shape (n, c) -> (m, c)."""
    if isinstance(index, Tensor):
        index = Index.of(index, x.shape[0])
    return _Gather.apply(x, *index)  # type: ignore[no-any-return, no-untyped-call]


def segment_sum(x: Tensor, index: Index) -> Tensor:
    """Sum over the entries of each row, in the order of `index`: shape (m, c) -> (n, c)."""
    return _SegmentSum.apply(x, *index)  # type: ignore[no-any-return, no-untyped-call]
