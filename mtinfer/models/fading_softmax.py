"""Softmax of DPA-2's smooth attentions: neighbours fade into empty slots as they approach the cutoff.

A logit l becomes (l + 20)·w - 20, where the weight w is zero at the cutoff and in an empty slot, and a model
made for `sel` slots always divides by the sum over `sel` slots. The arrays here may hold more or fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import NO_LOGIT, row_peak, row_sum

#: a logit fades to minus this
SHIFT = 20.0


def fading_softmax(logits: Tensor, sel: int, occupancy: Tensor | None) -> Tensor:
    """Softmax over the last axis: exp(l) over a sum D to which all slots of the model contribute.

    Without occupancy, D = Σ exp(l) over the neighbours, and 1 for each empty slot. Where a neighbour has a
    share c < 1 of a slot (`slot_occupancy`), it contributes c exp(l) + (1 - c) exp(f) (exp(l) - 1) with
    f = min(l, 0)/c: all of exp(l) for c = 1, and nothing where c and l vanish together at the cutoff. All is
    divided by exp(peak) against overflow.

    Parameters
    ----------
    logits
        shape (..., m), faded and shifted by 20: (l + 20)·w, zero in an empty slot.
    sel
        number of slots of the model.
    occupancy
        as `slot_occupancy` makes it, broadcastable to `logits`; None where no centre has more than `sel`
        neighbours.
    """
    if occupancy is None:
        n_outside = sel - logits.shape[-1]
        floor = (1.0 - torch.clamp(logits.new_ones(()) * n_outside, max=1.0)) * NO_LOGIT
        peak = torch.maximum(row_peak(logits), floor)
        share = torch.exp(logits - peak)
        return share * (1.0 / (row_sum(share) + n_outside * _of_empty(peak)))
    present = logits != 0  # what fades to zero counts as an empty slot does
    n_present = row_sum(present.to(logits.dtype))
    full = n_present >= sel
    reached = torch.where(present, logits, NO_LOGIT)
    peak = row_peak(reached)
    peak = torch.where(full, peak, torch.clamp(peak, min=0.0))
    share = torch.exp(reached - peak)
    faded = torch.clamp(logits, max=0.0) / torch.clamp(occupancy, min=1e-30)
    of_slot = torch.exp(torch.where(present, faded - peak, 0.0))  # of an empty one, times the fading
    kept = occupancy * share + (1.0 - occupancy) * (share * torch.exp(faded) - of_slot)
    n_empty = torch.where(full, 0.0, sel - n_present)
    return share * (1.0 / (row_sum(torch.where(present, kept, 0.0)) + n_empty * _of_empty(peak)))


def _of_empty(peak: Tensor) -> Tensor:
    """Share of an empty slot; where the peak is below its logit none is empty, and this does not overflow."""
    return torch.exp(-torch.clamp(peak, min=0.0))


def slot_occupancy(w: Tensor, saturated: Tensor, sel: int) -> Tensor:
    """Share of a slot that each neighbour takes where a centre has more neighbours than slots.

    The share is h(u w) with h(t) = t (2 - t) below t = 1 and 1 above; u is such that the shares add up to
    `sel`. All shares are 1 where there are slots enough.

    Parameters
    ----------
    w
        shape (n, m), switch.
    saturated
        shape (n, m), as `saturated_slots` makes it.

    Returns
    -------
    shape (n, m)
    """
    partial = torch.where(saturated, 0.0, w)
    room = sel - saturated.to(w.dtype).sum(1, keepdim=True)
    t = _level(partial.sum(1, keepdim=True), (partial * partial).sum(1, keepdim=True), room) * w
    return torch.where(saturated, 1.0, t * (2.0 - t))


def saturated_slots(w: Tensor, sel: int) -> Tensor:
    """Slots whose neighbour takes all of it: all of a centre with at most `sel` neighbours, else the nearest.

    Parameters
    ----------
    w
        shape (n, m), switch, zero in empty slots.

    Returns
    -------
    shape (n, m), bool
    """
    ordered, order = w.sort(dim=1, descending=True)
    rank = torch.arange(1, w.shape[1] + 1, device=w.device)
    beyond = ordered.flip(1).cumsum(1).flip(1) - ordered
    squares = (ordered * ordered).flip(1).cumsum(1).flip(1) - ordered * ordered
    level = _level(beyond, squares, (sel - rank).to(w.dtype))
    holds = (rank < sel) & (beyond * beyond >= squares * (sel - rank)) & (ordered * level >= 1.0)
    n_saturated = torch.where(holds, rank, 0).amax(1, keepdim=True)
    saturated = torch.zeros_like(w, dtype=torch.bool).scatter(1, order, rank <= n_saturated)
    return saturated | ((w > 0).sum(1, keepdim=True) <= sel)


def _level(linear: Tensor, square: Tensor, room: Tensor) -> Tensor:
    """Smaller root u of 2 u Σw - u² Σw² = room."""
    discriminant = linear * linear - square * room
    real = discriminant > 0
    root = torch.where(real, torch.sqrt(torch.where(real, discriminant, 1.0)), 0.0)
    below = linear + root
    return torch.where(below > 0, room / torch.where(below > 0, below, 1.0), 0.0)
