"""Functions of rows that are evaluated a few rows at a time, inside a graph as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .gather import settled

#: slots of a piece: its arrays, of some 100 doubles a slot, stay in the caches of the cores
SLOTS_PER_PIECE = 2048


def in_pieces(
    function: Callable[[Sequence[Tensor], Mapping[str, Tensor]], tuple[Tensor, ...]],
    arrays: Sequence[Tensor],
    weights: Mapping[str, Tensor],
) -> tuple[Tensor, ...]:
    """Evaluate ``function(arrays, weights)``, on a CPU by a loop over pieces of the rows.

    Parameters
    ----------
    function
        reads for row k of its results nothing but row k of the arrays.
    arrays
        shapes (n, m, ...), m slots in each of n rows, without derivatives; all but the first may lack the
        axis m.
    weights
        all else that `function` reads. The loop is left out where one of them requires a gradient.

    Returns
    -------
    tensors, shapes (n, ...)
    """
    n, m = arrays[0].shape[:2]
    if not arrays[0].is_cpu:
        return function(arrays, weights)
    if any(w.requires_grad for w in weights.values()):
        return function([settled(x) for x in arrays], weights)
    # at the sizes to trace with there are several pieces of several rows, and some of the rows are empty:
    # the compiler may take one piece, one row, or nothing to cut off, for a rule
    n_pieces = n * m // SLOTS_PER_PIECE + 1
    n_rows = n // n_pieces + 1
    if not isinstance(n, torch.SymInt):
        own = zip(*(x.split(n_rows) for x in arrays), strict=True)
        results = [function(piece, weights) for piece in own]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    from torch._higher_order_ops.scan import scan_op

    n_missing = n_pieces * n_rows - n
    pieces = [
        torch.cat([x, x.new_zeros(n_missing, *x.shape[1:])]).unflatten(0, (n_pieces, n_rows)) for x in arrays
    ]
    # a loop is traced below autograd, which the function may use for derivatives of its own
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def of_piece(*values: Tensor) -> tuple[Tensor, ...]:
        own, others = values[: len(arrays)], values[len(arrays) :]
        with torch._C._ForceDispatchKeyGuard(*keys):
            results = function(own, dict(zip(weights, others, strict=False)))
        # the compiler takes the only result of a loop for the tuple of them (torch 2.13)
        return *results, results[0].new_zeros(1)

    # the sizes that results are made of are arguments of the loop, too
    *outputs, _ = scan_op(of_piece, [], pieces, (*weights.values(), n, m, n_rows))
    return tuple(y.flatten(0, 1)[:n] for y in outputs)
