"""Softmax of DPA-2's smooth attentions: neighbours fade into empty slots as they approach the cutoff.

A logit l becomes (l + 20)·w - 20, where the weight w is zero at the cutoff and in an empty slot, and a model
made for `sel` slots always divides by the sum over `sel` slots. The arrays here may hold more or fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import row_peak, row_sum

#: a logit fades to minus this
SHIFT = 20.0


def fading_softmax(logits: Tensor, sel: int, occupancy: Tensor | None) -> Tensor:
    """Softmax over the last axis.

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
    peak = torch.clamp(row_peak(logits), min=0.0)
    share, empty = torch.exp(logits - peak), torch.exp(-peak)
    if occupancy is None:
        return share * (1.0 / (row_sum(share) + (sel - logits.shape[-1]) * empty))
    fade = torch.exp(torch.clamp(logits, max=0.0) / torch.clamp(occupancy, min=1e-30))
    kept = occupancy * share + (1.0 - occupancy) * (share - empty) * fade
    return share * (1.0 / (row_sum(kept) + (sel - row_sum(occupancy)) * empty))


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
