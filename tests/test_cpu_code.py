"""Products that compiled code has of its own: right for all shapes and strides, and row by row the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mtinfer import cpu_code
from mtinfer.graph import SharedGraph
from mtinfer.models.layout import Argument

#: columns: part of a vector, whole vectors, panels of one, two and three vectors, several panels
WIDTHS = (2, 7, 12, 16, 27, 50)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 11, 23, 50, 700)


@pytest.fixture(autouse=True)
def written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products are written out on any processor, and the graph is not one of the store."""
    if not cpu_code._mkl_is_slow():
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            pytest.skip("this processor has no vectors that products are made for")
        monkeypatch.setattr(cpu_code, "_mkl_is_slow", lambda: True)
    monkeypatch.setenv("MTINFER_CACHE", str(tmp_path))
    counters.clear()


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def require_equal(graph: SharedGraph, data: tuple[Tensor, ...], weights: list[Tensor]) -> None:
    for got, expected in zip(graph(data, weights), graph.function(*data, *weights), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-12)


def test_products_of_matrices() -> None:
    def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        w = weights[-1]
        left_to_library = (x.float() @ w.float(), x.T @ x, x.repeat(1, 40) @ w.repeat(40, 1))
        plain = [x @ w for w in weights]
        transposed = [y @ w.T for y, w in zip(plain, weights, strict=True)]
        with_bias = [torch.addmm(w[0], x, w) for w in weights]
        of_columns = [x.T.contiguous().T[:, 3:] @ w[3:] for w in weights]
        return (*plain, *transposed, *with_bias, *of_columns, *left_to_library)

    weights = [normal(30, width) for width in WIDTHS]
    graph = SharedGraph(products, "products", (Argument(("rows", 30)),), weights, "wait")
    for n_rows in (8, *ROWS):  # the first call is answered eagerly
        require_equal(graph, (normal(n_rows, 30),), weights)
    assert graph.is_compiled
    n_own = 4 * len(WIDTHS)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == n_own

    # a row is the same numbers among any number of others, and on any number of threads
    x = normal(4000, 30)
    results = graph((x,), weights)[:n_own]
    for few, many in zip(graph((x[37:40],), weights)[:n_own], results, strict=True):
        assert torch.equal(few, many[37:40])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        others = graph((x,), weights)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results, others))


def test_products_of_batches() -> None:
    def products(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        square = torch.bmm(x, x.mT)  # two views of one buffer
        return (
            square,
            torch.bmm(x.mT, x),
            torch.bmm(square, y),
            torch.bmm(square.mT, y),
            torch.bmm(y.mT, x),
            torch.bmm(x[:, :, 1:], x[:, :, :-1].mT),
            torch.bmm(x, w.expand(x.shape[0], -1, -1)),
            torch.bmm(w.T.expand(x.shape[0], -1, -1), x.mT),
        )

    arguments = (Argument(("batch", "rows", 5)), Argument(("batch", "rows", "columns")))
    w = normal(5, 9)
    graph = SharedGraph(products, "batches", arguments, [w], "wait")
    for n_batch, n_rows, n_columns in [(3, 8, 5), (0, 4, 4), (1, 2, 3), (2, 3, 1), (5, 17, 30), (40, 31, 27)]:
        require_equal(graph, (normal(n_batch, n_rows, 5), normal(n_batch, n_rows, n_columns)), [w])
    assert graph.is_compiled
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 8
