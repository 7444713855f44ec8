"""Gathers and sums by index: values, derivatives of both orders, empty lists, and no scatter in a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mtinfer.models.gather import _MAX_ONE_HOT, Index, gather, lookup, moment, segment_sum, settled

N, M = 5, 11


@pytest.fixture
def index() -> Index:
    """Rows in no order, one of which has no entries."""
    return Index.of(torch.tensor([3, 0, 0, 4, 3, 1, 3, 4, 0, 1, 1]), N)


@pytest.fixture
def ascending() -> Index:
    return Index.of(torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 4]), N, ascending=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def slow_moment(weights: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    products = weights.unsqueeze(2) * x.unsqueeze(1)
    return torch.zeros(N, *products.shape[1:], dtype=x.dtype).index_add(0, rows, products)


def test_an_index_lists_the_entries_of_each_row_in_their_order(index: Index) -> None:
    assert index.starts.tolist() == [0, 3, 6, 6, 9]
    assert index.order.tolist() == [1, 2, 8, 5, 9, 10, 0, 4, 6, 3, 7]


def test_ascending_rows_need_no_sorting(ascending: Index) -> None:
    for built, sorted_ in zip(ascending, Index.of(ascending.rows, N), strict=True):
        assert torch.equal(built, sorted_)


def test_gather_takes_rows(index: Index) -> None:
    x = random(N, 3)
    assert torch.equal(gather(x, index), x[index.rows])


def test_segment_sum_adds_rows(index: Index) -> None:
    x = random(M, 3)
    expected = torch.zeros(N, 3, dtype=x.dtype).index_add(0, index.rows, x)
    torch.testing.assert_close(segment_sum(x, index), expected, rtol=1e-14, atol=0)
    assert not segment_sum(x, index)[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_run_in_the_order_of_the_entries(dtype: torch.dtype) -> None:
    """Any other order of these summands gives another sum."""
    x = torch.tensor([[1.0], [2.0**60], [-(2.0**60)], [3.0]], dtype=dtype)
    everything = Index.of(torch.zeros(4, dtype=torch.int64), 1)
    assert segment_sum(x, everything).item() == 3.0
    assert moment(torch.ones(4, 1, dtype=dtype), x, everything).item() == 3.0


def test_moment_sums_products(ascending: Index) -> None:
    weights, x = random(M, 2), random(M, 3, seed=1)
    expected = slow_moment(weights, x, ascending.rows)
    torch.testing.assert_close(moment(weights, x, ascending), expected, rtol=1e-14, atol=1e-15)


def test_moment_reads_rows_of_a_source(ascending: Index) -> None:
    source = Index.of(torch.tensor([2, 0, 1, 3, 3, 0, 2, 1, 1, 0, 0]), 4)
    weights, x = random(M, 2), random(4, 3, seed=1)
    expected = slow_moment(weights, x[source.rows], ascending.rows)
    torch.testing.assert_close(moment(weights, x, ascending, source), expected, rtol=1e-14, atol=1e-15)


def test_lookup_takes_an_index_of_any_shape() -> None:
    table, where = random(4, 3), torch.tensor([[0, 3], [3, 1], [0, 0]])
    assert torch.equal(lookup(table, where), table[where])


def test_settled_copies() -> None:
    x = random(4, 6)
    copy = settled(x[:, ::2])
    assert torch.equal(copy, x[:, ::2])
    assert copy.is_contiguous()
    assert copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_of_both_orders(check: Callable[..., bool], index: Index, ascending: Index) -> None:
    source = Index.of(torch.tensor([2, 0, 1, 3, 3, 0, 2, 1, 1, 0, 0]), 4)
    where = torch.tensor([[0, 3], [3, 1]])
    assert check(lambda x: gather(x, index), random(N, 2))
    assert check(lambda x: segment_sum(x, index), random(M, 2))
    assert check(lambda w, x: moment(w, x, ascending), (random(M, 2), random(M, 3, seed=1)))
    assert check(lambda w, x: moment(w, x, ascending, source), (random(M, 2), random(4, 3, seed=1)))
    assert check(lambda x: lookup(x, where), random(4, 2))
    assert check(lambda x: lookup(x, where), random(_MAX_ONE_HOT + 1, 1))  # which sorts
    assert check(settled, random(4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_empty_lists(n: int, dtype: torch.dtype) -> None:
    nothing = Index.of(torch.zeros(0, dtype=torch.int64), n)
    x = torch.zeros(0, 2, dtype=dtype)
    assert torch.equal(segment_sum(x, nothing), torch.zeros(n, 2, dtype=dtype))
    assert torch.equal(moment(x, x, nothing), torch.zeros(n, 2, 2, dtype=dtype))
    assert gather(torch.ones(n, 2, dtype=dtype), nothing).shape == (0, 2)


def test_a_trace_of_derivatives_has_no_scatter(index: Index, ascending: Index) -> None:
    def total(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        y = gather(x, index) * lookup(table, index.rows)
        return (moment(w, y, ascending).flatten(1) ** 2).sum() + (segment_sum(y, index) ** 2).sum()

    def twice(x: Tensor, w: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        values = [array.detach().requires_grad_() for array in (x, w, table)]
        (force,) = torch.autograd.grad(total(*values), values[0], create_graph=True)
        return torch.autograd.grad((force**2).sum(), values)

    arguments = [random(*shape).detach() for shape in ((N, 3), (M, 2), (N, 3))]
    names = {str(node.target) for node in make_fx(twice)(*arguments).graph.nodes}
    assert "mtinfer.segment_sum.default" in names
    scatters = {name for name in names if any(word in name for word in ("scatter", "index_add", "index_put"))}
    assert not scatters
