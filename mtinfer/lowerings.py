"""What the compiler makes of operators (torch 2.13): how to change it, and what changes on every device."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._inductor.lowering  # first: what follows imports each other in a circle
from torch._inductor import ir
from torch._inductor.lowering import index_impl_helper, lowerings

from .models import gather  # noqa: F401  its operators

__all__ = ["contiguous", "in_this_thread", "own_lowerings", "own_operators"]


def in_this_thread(own: Callable[..., Any], usual: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `own` in this thread, and `usual` in all others."""
    thread = threading.get_ident()

    @functools.wraps(usual)
    def chosen(*arguments: Any, **keywords: Any) -> Any:
        return (own if threading.get_ident() == thread else usual)(*arguments, **keywords)

    return chosen


@contextlib.contextmanager
def own_lowerings(own: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Have operators lowered by the functions of `own` while this lasts, torch's in this thread alone."""
    # nobody else has operators of this package
    chosen = {op: in_this_thread(f, lowerings[op]) if op in lowerings else f for op, f in own.items()}
    usual = {op: lowerings.get(op) for op in chosen}
    # one by one: what others register meanwhile stays. The compiler's lock keeps a second thread of ours out
    lowerings.update(chosen)
    try:
        yield
    finally:
        for op, lowering in usual.items():
            if lowering is None:
                del lowerings[op]
            else:
                lowerings[op] = lowering


def contiguous(x: Any) -> Any:
    """Node `x` of Inductor's graph in memory, in the order of its axes."""
    node = ir.ExternKernel.require_contiguous_strides(ir.ExternKernel.realize_input(x))
    return node if isinstance(node, ir.TensorBox) else ir.TensorBox(node)


def own_operators(sums: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    """Lowerings of rows by index and of the operators of `mtinfer.models.gather`: none calls Python.

    Parameters
    ----------
    sums
        ``sums(weights, x, rows, starts)``: node of the sums of rows, `weights` None for those without.
    """
    operators = torch.ops.mtinfer

    def segment_sum(x: Any, order: Any, starts: Any) -> Any:
        return sums(None, x, order, starts)

    return {
        torch.ops.aten.index.Tensor: _index,
        operators.settled.default: _settled,
        operators.segment_sum.default: segment_sum,
        operators.moment.default: sums,
    }


def _settled(x: Any) -> Any:
    """Put what is settled into memory."""
    x.realize()
    return lowerings[torch.ops.aten.clone.default](x)  # read by elementwise code, this copies nothing


def _index(x: Any, indices: Any) -> Any:
    """Read rows by index without a look at it: it is a layout's, never negative, of a row that there is."""
    size, rows, _ = index_impl_helper(x, indices, check=False, wrap_neg=False)
    return ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=rows, ranges=size)
