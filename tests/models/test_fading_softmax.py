"""Softmax over neighbours that fade into empty slots, against one over as many slots as the model has."""

from __future__ import annotations

import pytest
import torch

from mtinfer.models.fading_softmax import SHIFT, fading_softmax, saturated_slots, slot_occupancy

SEL = 5
#: largest logits of all neighbours: an exponential of the last ones is zero in doubles, or overflows
LEVELS = (0.0, -60.0, -1e3, -1e5, 1e3)


def all_slots(logits: torch.Tensor) -> torch.Tensor:
    """Softmax with the empty slots beyond the array written out."""
    outside = logits.new_zeros((len(logits), max(0, SEL - logits.shape[1])))
    return torch.softmax(torch.cat([logits, outside], dim=1), dim=1)[:, : logits.shape[1]]


def faded(
    n_neighbors: int, n_slots: int, level: float, far: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Switches of one centre, the least of them `far`, and its logits, shifted and faded."""
    w = torch.zeros(1, n_slots, dtype=torch.float64)
    w[0, :n_neighbors] = torch.linspace(1.0, far, n_neighbors, dtype=torch.float64)
    return w, (torch.linspace(0.3, -0.4, n_slots, dtype=torch.float64) + level + SHIFT) * w


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_neighbors", [0, 1, SEL - 1, SEL])
@pytest.mark.parametrize("n_slots", [SEL - 1, SEL])
def test_slots_of_the_array_and_beyond(n_neighbors: int, n_slots: int, level: float) -> None:
    _, logits = faded(n_neighbors, max(n_neighbors, n_slots), level)
    torch.testing.assert_close(fading_softmax(logits, SEL, None), all_slots(logits), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_neighbors", [0, 1, SEL - 1, SEL])
@pytest.mark.parametrize("n_spare", [1, 3])
def test_occupancy_changes_nothing_up_to_sel_neighbours(n_neighbors: int, n_spare: int, level: float) -> None:
    w, logits = faded(n_neighbors, n_neighbors + n_spare, level)
    occupancy = slot_occupancy(w, saturated_slots(w, SEL), SEL)
    expected = torch.zeros_like(logits)
    expected[:, :n_neighbors] = all_slots(logits[:, :n_neighbors])
    got = fading_softmax(logits, SEL, occupancy) * (w > 0)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n_neighbors", "n_slots"), [(SEL, SEL + 2), (SEL + 2, SEL + 2), (SEL + 2, SEL + 4)])
def test_derivatives_are_finite(n_neighbors: int, n_slots: int, level: float) -> None:
    w, logits = faded(n_neighbors, n_slots, level)
    saturated = saturated_slots(w, SEL)
    w.requires_grad_(True)
    logits.requires_grad_(True)
    share = fading_softmax(logits, SEL, slot_occupancy(w, saturated, SEL))
    weighted = (share * torch.arange(n_slots, dtype=torch.float64)).sum()
    (first,) = torch.autograd.grad(weighted, [w], create_graph=True, materialize_grads=True)
    assert torch.isfinite(share).all()
    assert torch.isfinite(first).all()
    (weighted + first.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("level", [0.0, 1e3])
def test_a_neighbour_enters_smoothly_where_all_slots_are_taken(level: float) -> None:
    w, logits = faded(SEL + 1, SEL + 1, level, far=1e-12)
    got = fading_softmax(logits, SEL, slot_occupancy(w, saturated_slots(w, SEL), SEL))
    torch.testing.assert_close(got[:, :SEL], all_slots(logits[:, :SEL]), rtol=1e-8, atol=0.0)
