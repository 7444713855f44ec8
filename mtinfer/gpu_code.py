"""What `mtinfer.graph` changes in the code that Inductor writes for GPUs (torch 2.13).

The operators of `mtinfer.models.gather` are calls of Python otherwise, and the sums among them torch's
embedding_bag, which reads one entry of a row after the other; indices are not checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import ir
from torch._inductor.lowering import lowerings

from .lowerings import contiguous, own_lowerings, own_operators

__all__ = ["gpu_code", "sum_rows"]

#: numbers that a program of `sum_rows` reads at once, and most of them from one entry
_AT_ONCE = 512
_MOST_COLUMNS = 32


@contextlib.contextmanager
def gpu_code() -> Iterator[None]:
    """Have Inductor's code for GPUs as described above while this lasts."""
    with own_lowerings(own_operators(_sums)):
        yield


@triton.jit  # type: ignore[untyped-decorator]
def sum_rows(  # type: ignore[no-untyped-def]
    result,
    x,
    weights,
    rows,
    starts,
    n_rows,
    n_entries,
    width: tl.constexpr,
    n_weights: tl.constexpr,
    entries_at_once: tl.constexpr,
    columns_at_once: tl.constexpr,
):
    """Sum rows of `x` over the entries of each row of `result`, in the same order at every call.

    A program has one row, some columns, and one of the weights of an entry if there are any: its axes. Many
    entries are on their way from memory at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * columns_at_once + tl.arange(0, columns_at_once)
    weight = tl.program_id(2)
    first = tl.load(starts + row)
    last = tl.load(starts + row + 1, mask=row + 1 < n_rows, other=0)
    last = tl.where(row + 1 < n_rows, last, n_entries)
    totals = tl.zeros((entries_at_once, columns_at_once), dtype=result.dtype.element_ty)
    for start in range(first, last, entries_at_once):
        entries = start + tl.arange(0, entries_at_once)
        is_entry = entries < last
        sources = tl.load(rows + entries, mask=is_entry, other=0)
        places = sources[:, None] * width + columns[None, :]
        is_number = is_entry[:, None] & (columns < width)[None, :]
        values = tl.load(x + places, mask=is_number, other=0.0)
        if n_weights > 0:
            factors = tl.load(weights + entries * n_weights + weight, mask=is_entry, other=0.0)
            values *= factors[:, None]
        totals += values
    if n_weights > 0:
        row = row * n_weights + weight
    tl.store(result + row * width + columns, tl.sum(totals, axis=0), mask=columns < width)


def _sums(weights: Any, x: Any, rows: Any, starts: Any) -> Any:
    """Node of Inductor's graph for sums of rows by `sum_rows`."""
    n_rows, width = starts.get_size()[0], int(x.get_size()[1])
    n_weights = 0 if weights is None else int(weights.get_size()[1])
    size = [n_rows, *([n_weights] if n_weights else []), width]
    empty = lowerings[torch.ops.aten.empty.memory_format]
    result = empty(size, dtype=x.get_dtype(), device=x.get_device())
    columns_at_once = min(triton.next_power_of_2(width), _MOST_COLUMNS)
    arguments = {
        "result": result,
        **{name: contiguous(node) for name, node in {"x": x, "rows": rows, "starts": starts}.items()},
        "n_rows": n_rows,
        "n_entries": rows.get_size()[0],
        "width": width,
        "n_weights": n_weights,
        "entries_at_once": _AT_ONCE // columns_at_once,
        "columns_at_once": columns_at_once,
    }
    arguments["weights"] = arguments["x"] if weights is None else contiguous(weights)  # if none, not read
    ir.UserDefinedTritonKernel(
        kernel_idx=kernel_side_table.add_kernel(sum_rows),
        grid=[(n_rows, triton.cdiv(width, columns_at_once), max(n_weights, 1))],
        tma_descriptor_metadata={},
        kernel_args=arguments,
    )
    return result
