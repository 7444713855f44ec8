"""What compiled code has of its own: products and sums, right for all shapes and strides; functions."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from devices import ON_GPU
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.codegen.cpp import CppVecOverrides
from torch._inductor.codegen.cpp_utils import CppCSEVariable
from torch.utils._sympy.value_ranges import ValueRanges

from mtinfer import cpu_code
from mtinfer.graph import Compilation, SharedGraph
from mtinfer.models.gather import Index, moment, segment_sum, settled
from mtinfer.models.layout import Argument

#: columns: part of a vector, whole vectors, panels of one, two and three vectors, several panels
WIDTHS = (2, 7, 12, 16, 27, 50, 100)
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 23, 35, 50, 700)


@pytest.fixture(autouse=True)
def written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products are written out on any processor, and the graph is not one of the store."""
    if not cpu_code._mkl_is_slow():
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            pytest.skip("this processor has no vectors that products are made for")
        monkeypatch.setattr(cpu_code, "_mkl_is_slow", lambda: True)
    monkeypatch.setenv("MTINFER_CACHE", str(tmp_path))
    counters.clear()


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


Normal = Callable[..., Tensor]


@pytest.fixture
def normal(dtype: torch.dtype) -> Normal:
    def of_shape(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, dtype=dtype, generator=generator)

    return of_shape


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def require_equal(graph: SharedGraph, data: tuple[Tensor, ...], weights: list[Tensor]) -> None:
    for got, expected in zip(graph(data, weights), graph.function(*data, *weights), strict=True):
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got, expected, rtol=500 * eps, atol=5000 * eps)


def code_of(store: Path, file: str) -> str:
    """Source of the only graph in a store."""
    (stored,) = store.glob("*.graph")
    with zipfile.ZipFile(stored) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(file))
        return archive.read(name).decode()


def require_thread_independent(graph: SharedGraph, data: tuple[Tensor, ...], weights: list[Tensor]) -> None:
    results, before = graph(data, weights), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        others = graph(data, weights)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results, others))


def test_products_of_matrices(dtype: torch.dtype, normal: Normal) -> None:
    def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        w = weights[-1]
        left_to_library = (x.repeat(1, 40) @ w.repeat(40, 1),)
        plain = [x @ w for w in weights]
        transposed = [y @ w.T for y, w in zip(plain, weights, strict=True)]
        with_bias = [torch.addmm(w[0], x, w) for w in weights]
        of_columns = [x.T.contiguous().T[:, 3:] @ w[3:] for w in weights]
        return (*plain, *transposed, *with_bias, *of_columns, *left_to_library)

    weights = [normal(30, width) for width in WIDTHS]
    graph = SharedGraph(products, "products", (Argument(("rows", 30), dtype),), weights, Compilation("wait"))
    for n_rows in (8, *ROWS):  # the first call is the self-check
        require_equal(graph, (normal(n_rows, 30),), weights)
    assert graph.is_compiled
    n_own = 4 * len(WIDTHS)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == n_own

    # a row is the same numbers among any number of others
    x = normal(4000, 30)
    few, many = (graph((rows,), weights)[:n_own] for rows in (x[37:40], x))
    assert all(torch.equal(rows, all_rows[37:40]) for rows, all_rows in zip(few, many, strict=True))
    require_thread_independent(graph, (x,), weights)


def test_products_with_a_long_inner_axis(dtype: torch.dtype, normal: Normal) -> None:
    def products(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        wide = x.repeat(1, 8)
        left_to_library = wide.T @ x.repeat(1, 10)
        return x.T @ x, x.T @ (x @ w), x[:, 3:].T @ x.T.contiguous().T, wide.T @ wide, left_to_library

    w = normal(30, 20)
    graph = SharedGraph(products, "long", (Argument(("rows", 30), dtype),), [w], Compilation("wait"))
    # as one part, as five, as many as there are at most: fewer of them for large results
    for n_rows in (8, 0, 1, 2, 1024, 1025, 3000, 20_001):
        require_equal(graph, (normal(n_rows, 30),), [w])
    assert graph.is_compiled
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 5
    require_thread_independent(graph, (normal(20_001, 30),), [w])


def test_products_of_batches(dtype: torch.dtype, normal: Normal) -> None:
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

    arguments = (Argument(("batch", "rows", 5), dtype), Argument(("batch", "rows", "columns"), dtype))
    w = normal(5, 9)
    graph = SharedGraph(products, "batches", arguments, [w], Compilation("wait"))
    for n_batch, n_rows, n_columns in [(3, 8, 5), (0, 4, 4), (1, 2, 3), (2, 3, 1), (5, 17, 30), (40, 31, 27)]:
        require_equal(graph, (normal(n_batch, n_rows, 5), normal(n_batch, n_rows, n_columns)), [w])
    assert graph.is_compiled
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 8


def test_sums(dtype: torch.dtype, normal: Normal, device: torch.device, tmp_path: Path) -> None:
    def sums(x: Tensor, table: Tensor, w: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        *indices, scale = indices
        of_entries, of_table = Index(*indices[:3]), Index(*indices[3:])
        y = x * scale
        return (
            *(segment_sum(y[:, :width], of_entries) for width in WIDTHS),
            *(
                moment(w[:, :depth], y[:, 100 - width :], of_entries)
                for width in WIDTHS
                for depth in (1, 2, 3)
            ),
            moment(w, table, of_entries, of_table),
            moment(w[:, :2], y[:, ::3], of_entries),
            moment(y, w, of_entries),  # more weights than a kernel has
            segment_sum(settled(y.T).T.exp(), of_entries),
        )

    entries, n, m = ("entries",), Argument(("groups",), torch.int64), Argument(("rows",), torch.int64)
    k = Argument(entries, torch.int64)
    arguments = [
        Argument((*entries, 100), dtype),
        Argument(("rows", 40), dtype),
        Argument((*entries, 3), dtype),
    ]
    scale = normal(1).to(device)
    graph = SharedGraph(sums, "sums", [*arguments, k, k, n, k, k, m], [scale], Compilation("wait"))
    generator = torch.Generator().manual_seed(0)
    for n_entries, n_groups, n_rows in [
        (9, 4, 3),
        (0, 5, 2),
        (1, 1, 1),
        (0, 0, 0),
        (50, 3, 7),
        (3000, 400, 90),
    ]:
        groups, rows = (
            torch.randint(0, max(1, limit), (n_entries,), generator=generator) for limit in (n_groups, n_rows)
        )
        of_entries = Index.of(torch.sort(groups).values, n_groups, ascending=True)
        data = (normal(n_entries, 100), normal(n_rows, 40), normal(n_entries, 3))
        data = tuple(array.to(device) for array in (*data, *of_entries, *Index.of(rows, n_rows)))
        require_equal(graph, data, [scale])
    assert graph.is_compiled
    code = code_of(tmp_path, "wrapper.cpp")
    assert "proxy_executor_call_function" not in code  # which calls Python
    assert ("sum_rows" in code) == (device.type == "cuda")
    assert all(map(torch.equal, graph(data, [scale]), graph(data, [scale])))
    if device.type == "cpu":
        assert counters["inductor"]["cpp_templated_kernel_counter"] == 4 * len(WIDTHS) + 3 + 34
        require_thread_independent(graph, data, [scale])


def test_rows_by_index(dtype: torch.dtype, normal: Normal, device: torch.device) -> None:
    def rows(x: Tensor, first: Tensor, second: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        table = torch.exp(x * w)
        return table[first] + table.index_select(0, second), w[second % 2], x[:, first % 5]

    index, scale = Argument(("entries",), torch.int64), normal(5).to(device)
    arguments = (Argument(("rows", 5), dtype), index, index)
    graph = SharedGraph(rows, "rows", arguments, [scale], Compilation("wait"))
    for n_entries, n_rows in [(50, 7), (0, 3), (1, 1), (3, 700)]:
        first = torch.arange(n_entries) * (n_rows - 1) // max(1, n_entries - 1)  # to the last row
        data = tuple(array.to(device) for array in (normal(n_rows, 5), first, first.flip(0)))
        require_equal(graph, data, [scale])
    assert graph.is_compiled


def test_rows_of_any_width(dtype: torch.dtype, normal: Normal, tmp_path: Path) -> None:
    """Vectors are as long as rows need: 24 doubles are three vectors of AVX-512, not two pairs of them."""
    widths = (4, 8, 12, 20, 24, 40)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        index, scale, arrays = values[0], values[-1], values[1:-1]
        found: list[Tensor] = []
        for x in arrays:
            y = torch.tanh(x * scale) + torch.where(x > 0, x, 0.5)
            found += [y, y.sum(1), y[index] * x.clamp(max=0.3), y.sum(0)]
        return tuple(found)

    arguments = [Argument(("picked",), torch.int64), *(Argument(("picked", w), dtype) for w in widths)]
    weights = [torch.tensor([0.7], dtype=dtype)]
    graph = SharedGraph(function, f"rows {dtype}", arguments, weights, Compilation("wait"))
    for n in (1, 7, 300):
        require_equal(graph, (torch.arange(n).flip(0), *(normal(n, w) for w in widths)), weights)
    assert graph.is_compiled
    code = code_of(tmp_path, "kernel.cpp")
    if cpu_code._has_avx():
        assert ("at::vec::Vectorized<double>::loadu" in code) == (dtype == torch.float64)


def test_other_threads_compile_as_ever() -> None:
    x = CppCSEVariable("x", ValueRanges.unknown(), torch.float64)

    def tanh() -> str:
        return str(CppVecOverrides.tanh(x))

    usual = tanh()
    with cpu_code.cpu_code(), ThreadPoolExecutor() as pool:
        assert pool.submit(tanh).result() == usual
        assert tanh() != usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions(dtype: torch.dtype) -> None:
    def functions(x: Tensor, one: Tensor) -> tuple[Tensor, ...]:
        return torch.exp(one * x), torch.sigmoid(one * x), torch.tanh(one * x)

    one = torch.ones(1, dtype=dtype)
    graph = SharedGraph(
        functions, f"functions {dtype}", (Argument(("n",), dtype),), [one], Compilation("wait")
    )
    graph((torch.linspace(-1.0, 1.0, 50, dtype=dtype),), [one])
    x = torch.linspace(-1000.0, 1000.0, 100_001, dtype=dtype)
    x = torch.cat([x, 1e-2 * x, 1e-5 * x, torch.tensor([0.0, math.inf, -math.inf], dtype=dtype)])
    exp, sigmoid, tanh = graph((x,), [one])
    assert graph.is_compiled
    form = torch.finfo(dtype)
    ulp, least = form.eps, 2.1 * form.tiny
    close = torch.testing.assert_close
    near_overflow = (x > math.log(form.max) - 0.4) & (x < math.log(form.max))  # infinite a little too early
    expected = torch.where(near_overflow, math.inf, torch.exp(x))
    close(torch.where(near_overflow, math.inf, exp), expected, rtol=2 * ulp, atol=least)
    close(sigmoid, torch.sigmoid(x), rtol=3 * ulp, atol=least)
    close(tanh, torch.tanh(x), rtol=4 * ulp, atol=0.0)
    not_a_number = torch.full((50,), math.nan, dtype=dtype)
    assert all(value.isnan().all() for value in graph((not_a_number,), [one]))
