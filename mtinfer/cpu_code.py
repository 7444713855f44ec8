"""What `mtinfer.graph` changes in the code that Inductor writes for processors (torch 2.13).

No option of Inductor does any of this: its transposed tiles are switched off, since they give wrong numbers;
vectors are as long as rows need; exp, sigmoid and tanh are shorter; products are written out, since MKL is
slow in small ones (up to three times the time on processors that are not Intel's); so are the operators of
`mtinfer.models.gather`, which are calls of Python otherwise; indices are not checked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.lowering  # first: what follows imports each other in a circle
from torch._inductor import cpu_vec_isa, ir
from torch._inductor.codegen.cpp import CppVecOverrides, TilingSelect
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import (
    DTYPE_TO_CPP,
    _get_dtype_from_loopbodies,
    _get_loop_body,
)
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from .lowerings import contiguous, in_this_thread, own_lowerings, own_operators
from .powers import FORMATS, Format, exp, sigmoid, tanh

__all__ = ["cpu_code"]


@contextlib.contextmanager
def cpu_code() -> Iterator[None]:
    """Have Inductor's CPU code as described above while this lasts, in this thread alone."""
    with (
        _with_own_tiles(),
        _with_short_functions(),
        _with_own_products(),
        own_lowerings(own_operators(_sums)),
    ):
        yield


@contextlib.contextmanager
def _with_own_tiles() -> Iterator[None]:
    """Keep Inductor's CPU code from vectorising over two axes at once, and rows from half empty vectors.

    Its transposed tiles (`CppTile2DKernel`, torch 2.13) give wrong numbers with dynamic sizes: seen in the
    forces of DPA-3 and in the second derivative of a softmax. No option switches them off. Its vectors of
    doubles are two of the processor's; where rows leave one of them empty (24 doubles of AVX-512), one is
    faster.
    """
    select = TilingSelect.select_tiling

    def along_the_last_axis(self: Any, functions: Any, sizes: Any) -> Any:
        factors, axes, *rest = select(self, functions, sizes)
        factors, axes = factors[-1:], axes[-1:]
        types = _get_dtype_from_loopbodies(_get_loop_body(functions))
        group, reduced = max(sizes, key=lambda own: len(own[1]))
        lengths = [*group, *reduced]  # none in a loop over nothing, for a number
        if factors and lengths and types <= {torch.float64, torch.int64} and _has_avx():
            half = factors[0] // 2
            if V.graph.sizevars.statically_known_equals(lengths[axes[0]] % factors[0], half):
                factors = [half]
        return (factors, axes, *rest)

    with patch.object(TilingSelect, "select_tiling", in_this_thread(along_the_last_axis, select)):
        yield


@contextlib.contextmanager
def _with_short_functions() -> Iterator[None]:
    """Have Inductor's CPU code evaluate exp, sigmoid and tanh by `powers`, on x86, where it was tried."""
    if not _has_avx():
        yield
        return

    def own(name: str, code: Callable[[Any, Format], str]) -> Any:
        usual = getattr(CppVecOverrides, name)

        def function(x: Any) -> Any:
            return code(x, FORMATS[x.dtype]) if x.dtype in FORMATS else usual(x)

        return staticmethod(in_this_thread(function, usual))

    functions = {"exp": exp, "sigmoid": sigmoid, "tanh": tanh}
    with patch.multiple(CppVecOverrides, **{name: own(name, code) for name, code in functions.items()}):
        yield


#: longest inner axis of products that are written out; beyond it the right factor doesn't fit a cache
_MAX_INNER = 1024
#: most entries of a product whose inner axis has no fixed length
_MAX_RESULT = 2**16
_HEADERS = Path(__file__).parent
_PRODUCT = """#include "{headers}/product.h"
extern "C"
{definition}
{{
    const mtinfer::Product<{scalar}> product{{{sizes}}};
    product({arguments});
}}
"""


@contextlib.contextmanager
def _with_own_products() -> Iterator[None]:
    """Have Inductor write products by `product.h` instead of calling MKL, where that is slow."""
    if not _mkl_is_slow():
        yield
        return
    aten = torch.ops.aten
    usual = {op: lowerings[op] for op in (aten.mm.default, aten.bmm.default, aten.addmm.default)}

    def product(left: Any, right: Any, *, op: Any) -> Any:
        return _product(left, right) if _is_written_out(left, right) else usual[op](left, right)

    def sum_of_product(bias: Any, left: Any, right: Any, **factors: Any) -> Any:
        if factors or not _is_written_out(left, right):
            return usual[aten.addmm.default](bias, left, right, **factors)
        return lowerings[aten.add.Tensor](_product(left, right), bias)

    own: dict[Any, Callable[..., Any]] = {
        aten.mm.default: functools.partial(product, op=aten.mm.default),
        aten.bmm.default: functools.partial(product, op=aten.bmm.default),
        aten.addmm.default: sum_of_product,
    }
    with own_lowerings(own):
        yield


def _mkl_is_slow() -> bool:
    """Whether the processor has vectors that `product.h` is made for, and is not one of Intel's."""
    information = Path("/proc/cpuinfo")
    return _has_avx() and information.exists() and "GenuineIntel" not in information.read_text()


def _has_avx() -> bool:
    return isinstance(cpu_vec_isa.pick_vec_isa(), (cpu_vec_isa.VecAVX2, cpu_vec_isa.VecAVX512))


def _is_written_out(left: Any, right: Any) -> bool:
    """Whether a product is one for `product.h`: no vector in it, and one matrix of it small.

    That is the right factor, or the result where the inner axis is as long as the data, as in gradients of
    weights.
    """
    *batch, n_rows, n_inner = left.get_size()
    n_columns = right.get_size()[-1]
    if left.get_dtype() not in (torch.float64, torch.float32):
        return False
    known, at_most = V.graph.sizevars.statically_known_equals, V.graph.sizevars.statically_known_leq
    if known(n_rows, 1) or known(n_columns, 1) or known(n_inner, 1):
        return False
    return bool(batch) or at_most(n_inner, _MAX_INNER) or at_most(n_rows * n_columns, _MAX_RESULT)


class _Product(CppTemplate):
    """Kernel for the product of two matrices, or of two batches of matrices, of any strides."""

    def render(self, **kwargs: Any) -> str:
        kernel, (left, right) = kwargs["kernel"], self.input_nodes
        result = kwargs.get("template_buffer_node") or self.output_node
        *batch, row, inner = range(len(left.get_size()))
        inputs = {"left": left}
        if right.get_name() != left.get_name():  # else two views of one buffer: one argument
            inputs["right"] = right
        definition = kernel.def_kernel(inputs=inputs, outputs={"result": result})
        sizes = [kernel.size(left, row), kernel.size(right, inner), kernel.size(left, inner)]
        sizes += [kernel.stride(node, axis) for node in (left, right) for axis in (row, inner)]
        origin = [0] * len(left.get_size())
        arguments = [f"&{kernel.index(node, origin)}" for node in (left, right)] + ["result"]
        if batch:
            arguments += [kernel.size(left, 0), kernel.stride(left, 0), kernel.stride(right, 0)]
        return _PRODUCT.format(
            headers=_HEADERS,
            definition=definition,
            scalar=DTYPE_TO_CPP[left.get_dtype()],
            sizes=", ".join(sizes),
            arguments=", ".join(arguments),
        )


def _product(left: Any, right: Any) -> Any:
    """Node of Inductor's graph for a product."""
    factors = [ir.ExternKernel.realize_input(factor) for factor in (left, right)]
    for factor in factors:
        factor.freeze_layout()
    size = [*left.get_size()[:-1], right.get_size()[-1]]
    layout = ir.FixedLayout(left.get_device(), left.get_dtype(), size)
    return _generated(_Product, factors, layout)


def _generated(template: type[CppTemplate], inputs: list[Any], layout: Any) -> Any:
    """Node of Inductor's graph for a kernel of its own, of realized inputs."""
    nodes = ir.InputsKernel.unwrap_storage(inputs)
    node = template(template.__name__, nodes, layout, num_threads=1).generate().output_node()
    node.data.data.allow_epilogue_fusion = False
    return node


_SUMS = """#include "{headers}/sums.h"
extern "C"
{definition}
{{
    const mtinfer::Sums<{scalar}, {n_weights}> sums{{{sizes}}};
    sums({arguments}, result);
}}
"""
#: most weights of an entry for which sums are written out: their sums fit the registers
_MAX_WEIGHTS = 3


class _Sums(CppTemplate):
    """Kernel for sums of rows. Inputs: weights if there are any, table, rows of the entries, starts."""

    def render(self, **kwargs: Any) -> str:
        kernel = kwargs["kernel"]
        result = kwargs.get("template_buffer_node") or self.output_node
        *weights, x, rows, starts = self.input_nodes
        inputs = {node.get_name(): node for node in self.input_nodes}  # two views of a buffer: one argument
        definition = kernel.def_kernel(inputs=inputs, outputs={"result": result})
        arguments = [f"&{kernel.index(node, [0] * len(node.get_size()))}" for node in self.input_nodes]
        sizes = [kernel.size(starts, 0), kernel.size(rows, 0), kernel.size(x, 1)]
        return _SUMS.format(
            headers=_HEADERS,
            definition=definition,
            scalar=DTYPE_TO_CPP[x.get_dtype()],
            n_weights=kernel.size(weights[0], 1) if weights else 0,
            sizes=", ".join(sizes),
            arguments=", ".join(arguments if weights else ["nullptr", *arguments]),
        )


def _sums(weights: Any, x: Any, rows: Any, starts: Any) -> Any:
    """Node of Inductor's graph for sums of rows by `sums.h`; torch's are serial for doubles."""
    n_weights = 0 if weights is None else int(weights.get_size()[1])
    if n_weights > _MAX_WEIGHTS:
        some, cat = lowerings[torch.ops.aten.slice.Tensor], lowerings[torch.ops.aten.cat.default]
        starts_of_some = range(0, n_weights, _MAX_WEIGHTS)
        return cat([_sums(some(weights, 1, k, k + _MAX_WEIGHTS), x, rows, starts) for k in starts_of_some], 1)
    inputs = [contiguous(node) for node in (weights, x, rows, starts) if node is not None]
    for node in inputs:
        node.freeze_layout()
    size = [starts.get_size()[0], *([n_weights] if n_weights else []), x.get_size()[1]]
    return _generated(_Sums, inputs, ir.FixedLayout(x.get_device(), x.get_dtype(), size))
