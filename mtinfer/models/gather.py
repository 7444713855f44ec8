"""Rows of a table by index, and sums of rows by index: each the derivative of the other.

The sums are opaque operators: Inductor's CPU code for scatter-adds with dynamic shapes uses vectorised
atomics that corrupt memory with several threads (torch 2.13). They run over the entries in the order that the
index lists them under each row, so results are reproducible bit for bit on every device. The gather stays
visible to the compiler, which reads the rows where they are needed instead of copying them.

Functions of autograd, here and elsewhere, take their context in `forward`: `setup_context`, which transforms
of torch.func need, has the arguments of every call bound by name (70 µs).
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
        if ascending:
            in_order, order = rows, torch.arange(rows.shape[0], device=rows.device)
        else:
            in_order, order = torch.sort(rows, stable=True)
        starts = torch.searchsorted(in_order, torch.arange(n, device=rows.device))
        return cls(rows, order, starts)


_OPERATORS = torch.library.Library("mtinfer", "FRAGMENT")
_OPERATORS.define("settled(Tensor x) -> Tensor")
_OPERATORS.define("segment_sum(Tensor x, Tensor order, Tensor starts) -> Tensor")
_OPERATORS.define("moment(Tensor weights, Tensor x, Tensor rows, Tensor starts) -> Tensor")


def _settled_kernel(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _segment_sum_kernel(x: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    if rows.shape[0] == 0:
        return x.new_zeros((starts.shape[0], x.shape[1]))
    return torch.embedding_bag(x, rows, starts, mode=0, per_sample_weights=weights)[0]


def _moment_kernel(weights: Tensor, x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    columns = weights.t().contiguous()
    return torch.stack([_segment_sum_kernel(x, rows, starts, column) for column in columns], dim=1)


_OPERATORS.impl("settled", _settled_kernel, "CompositeExplicitAutograd")
_OPERATORS.impl("segment_sum", _segment_sum_kernel, "CompositeExplicitAutograd")
_OPERATORS.impl("moment", _moment_kernel, "CompositeExplicitAutograd")


def _settled_shape(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _segment_sum_shape(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0], x.shape[1]))


def _moment_shape(weights: Tensor, x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0], weights.shape[1], x.shape[1]))


torch.library.register_fake("mtinfer::settled", _settled_shape)
torch.library.register_fake("mtinfer::segment_sum", _segment_sum_shape)
torch.library.register_fake("mtinfer::moment", _moment_shape)


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.mtinfer.settled(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return settled(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *index: Tensor) -> Tensor:
        ctx.save_for_backward(*index)
        return x.index_select(0, index[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return segment_sum(gradient, Index(*ctx.saved_tensors)), None, None, None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *index: Tensor) -> Tensor:
        ctx.save_for_backward(*index)
        return torch.ops.mtinfer.segment_sum(x, *index[1:])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gather(settled(gradient), Index(*ctx.saved_tensors)), None, None, None


class _Moment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, *indices: Tensor) -> Tensor:
        ctx.save_for_backward(weights, x, *indices)
        rows = indices[3] if len(indices) > 3 else indices[1]
        return torch.ops.mtinfer.moment(weights, x, rows, indices[2])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, x, *indices = ctx.saved_tensors
        here = gather(settled(gradient).flatten(1), Index(*indices[:3]))
        here = here.unflatten(1, gradient.shape[1:])
        of_x = (weights.unsqueeze(2) * here).sum(1)
        if len(indices) > 3:
            source = Index(*indices[3:])
            x = gather(x, source)
            of_x = segment_sum(of_x, source)
        return (here * x.unsqueeze(1)).sum(2), of_x, *(None for _ in indices)


#: most rows of a table whose gradient is a product with one-hot rows; beyond it (pairs of nine types) that
#: takes longer than to sort the entries, and its factor more memory than they
_MAX_ONE_HOT = 64


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = table.shape[0]
        return table[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        index, gradient = ctx.saved_tensors[0].reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if ctx.n_rows > _MAX_ONE_HOT:
            return segment_sum(gradient, Index.of(index, ctx.n_rows)), None
        rows = torch.arange(ctx.n_rows, device=index.device)
        return (rows.unsqueeze(1) == index).to(gradient.dtype) @ gradient, None


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table of types, or of pairs of types: (n, c) and any shape (...) -> (..., c).

    For an index that is not grouped by row: the derivative with respect to the table is a product with
    one-hot rows, or sorts the entries where the table is long.
    """
    return _Lookup.apply(table, index)  # type: ignore[no-any-return, no-untyped-call]


def settled(x: Tensor) -> Tensor:
    """`x` in memory, and so is its gradient: the compiler can't look through it.

    For few numbers that many are made from, as a small table that a long list is gathered from, or a function
    of the distance that multiplies a row of features. The compiler would otherwise evaluate what they are
    made of anew for every entry of the list, or every vector of the row.
    """
    return _Settled.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: Tensor, index: Index) -> Tensor:
    """Row ``index.rows[k]`` of `x` for every entry k: shape (n, c) -> (m, c)."""
    return _Gather.apply(x, *index)  # type: ignore[no-any-return, no-untyped-call]


def segment_sum(x: Tensor, index: Index) -> Tensor:
    """Sum over the entries of each row, in the order of `index`: shape (m, c) -> (n, c)."""
    return _SegmentSum.apply(x, *index)  # type: ignore[no-any-return, no-untyped-call]


def moment(weights: Tensor, x: Tensor, index: Index, source: Index | None = None) -> Tensor:
    """Sum over the entries of each row of weights ⊗ x, without writing the products out.

    Parameters
    ----------
    weights
        shape (m, d).
    x
        shape (m, c), or (n_source, c) with a `source`.
    index
        row of each entry; must be ascending.
    source
        row of `x` of each entry; without it, entry k has row k.

    Returns
    -------
    shape (n, d, c)
    """
    return _Moment.apply(weights, x, *index, *(source or ()))  # type: ignore[no-any-return, no-untyped-call]
