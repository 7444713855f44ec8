"""What `mtinfer.graph` changes in the code that Inductor writes for processors (torch 2.13).

No option of Inductor does any of this: its transposed tiles are switched off, since they give wrong numbers;
tanh of doubles and, on x86, sigmoid of floats are shorter; products are written out, since MKL is slow in
small ones (by up to a factor of three on processors that are not Intel's); so are the operators of
`mtinfer.models.gather`, which are calls of Python otherwise; indices are not checked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.lowering  # first: what follows imports each other in a circle
from torch._inductor import cpu_vec_isa, ir
from torch._inductor.codegen.cpp import CppVecOverrides, TilingSelect
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.lowering import fallback_handler, index_impl_helper, lowerings
from torch._inductor.virtualized import V

__all__ = ["cpu_code"]


@contextlib.contextmanager
def cpu_code() -> Iterator[None]:
    """Have Inductor's CPU code as described above while this lasts."""
    with _without_transposed_tiles(), _with_short_functions(), _with_own_products(), _with_own_operators():
        yield


@contextlib.contextmanager
def _without_transposed_tiles() -> Iterator[None]:
    """Keep Inductor's CPU code from vectorising over two axes at once.

    Its transposed tiles (`CppTile2DKernel`, torch 2.13) give wrong numbers with dynamic sizes: seen in the
    forces of DPA-3 and in the second derivative of a softmax. No option switches them off.
    """
    select = TilingSelect.select_tiling

    def along_the_last_axis(self: Any, *arguments: Any) -> Any:
        factors, axes, *rest = select(self, *arguments)
        return (factors[-1:], axes[-1:], *rest)

    with patch.object(TilingSelect, "select_tiling", along_the_last_axis):
        yield


#: tanh of a vector of doubles x, within a few ulp, in less time than by way of exp. It is a ratio p/q, first
#: of y = x/64 by the Padé approximant [7/6] (Abramowitz and Stegun 4.5.70, cut off), then of 2y, 4y, … x:
#: tanh 2y = 2pq/(p² + q²), which does not enlarge relative errors. Beyond 19.1 it is 1 to the last digit.
_TANH = """[](const auto& x) C10_ALWAYS_INLINE_ATTRIBUTE {{
    using V = std::decay_t<decltype(x)>;
    const auto y = at::vec::clamp(x, V(-19.1), V(19.1)) * V(1.0 / 64.0);
    const auto z = y * y;
    auto p = at::vec::fmadd(z, V(1.0 / 135135.0), V(378.0 / 135135.0));
    p = at::vec::fmadd(z, p, V(17325.0 / 135135.0));
    p = y * at::vec::fmadd(z, p, V(1.0));
    auto q = at::vec::fmadd(z, V(28.0 / 135135.0), V(3150.0 / 135135.0));
    q = at::vec::fmadd(z, q, V(62370.0 / 135135.0));
    q = at::vec::fmadd(z, q, V(1.0));
    for (int k = 0; k < 6; ++k) {{
        const auto pq = p * q;
        q = at::vec::fmadd(q, q, p * p);
        p = pq + pq;
    }}
    return p / q;
}}({})"""


#: sigmoid of a vector of floats x, within a few ulp, and in line: torch's is a call, around which the vectors
#: of a loop are stored. It is 1/(1 + 2ⁿ exp r) with -x = n ln 2 + r, |r| <= ln 2 / 2 (Cody and Waite's two
#: constants for ln 2), and Taylor's polynomial of degree 7, whose error is 5e-9. Below -88 it stays at 6e-39.
_SIGMOID = """[](const auto& x) C10_ALWAYS_INLINE_ATTRIBUTE {{
    using V = std::decay_t<decltype(x)>;
    using I = at::vec::Vectorized<int32_t>;
    const auto y = at::vec::clamp(x.neg(), V(-87.0f), V(88.0f));
    const auto n = (y * V(1.44269504f)).round();
    const auto r = at::vec::fmadd(n, V(2.12194440e-4f), at::vec::fmadd(n, V(-0.693359375f), y));
    auto p = at::vec::fmadd(r, V(1.0f / 5040.0f), V(1.0f / 720.0f));
    p = at::vec::fmadd(r, p, V(1.0f / 120.0f));
    p = at::vec::fmadd(r, p, V(1.0f / 24.0f));
    p = at::vec::fmadd(r, p, V(1.0f / 6.0f));
    p = at::vec::fmadd(r, p, V(0.5f));
    p = at::vec::fmadd(r, p, V(1.0f));
    p = at::vec::fmadd(r, p, V(1.0f));
    const auto exponent = at::vec::convert_to_int_of_same_size(n) + I(127);
    return V(1.0f) / at::vec::fmadd(p, at::vec::cast<float>(exponent << I(23)), V(1.0f));
}}({})"""


@contextlib.contextmanager
def _with_short_functions() -> Iterator[None]:
    """Have Inductor's CPU code evaluate tanh of doubles by `_TANH`, sigmoid of floats by `_SIGMOID`.

    The latter on x86 only: it handles the bits of a vector.
    """
    usual_tanh, usual_sigmoid = CppVecOverrides.tanh, CppVecOverrides.sigmoid
    has_avx = _has_avx()

    def tanh(x: Any) -> str:
        return _TANH.format(x) if x.dtype == torch.float64 else str(usual_tanh(x))  # type: ignore[no-untyped-call]

    def sigmoid(x: Any) -> str:
        if has_avx and x.dtype == torch.float32:
            return _SIGMOID.format(x)
        return str(usual_sigmoid(x))  # type: ignore[no-untyped-call]

    with patch.multiple(CppVecOverrides, tanh=staticmethod(tanh), sigmoid=staticmethod(sigmoid)):
        yield


#: longest inner axis of products that are written out; beyond it the right factor doesn't fit a cache
_MAX_INNER = 1024
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

    own = {
        aten.mm.default: functools.partial(product, op=aten.mm.default),
        aten.bmm.default: functools.partial(product, op=aten.bmm.default),
        aten.addmm.default: sum_of_product,
    }
    with patch.dict(lowerings, own):
        yield


def _mkl_is_slow() -> bool:
    """Whether the processor has vectors that `product.h` is made for, and is not one of Intel's."""
    information = Path("/proc/cpuinfo")
    return _has_avx() and information.exists() and "GenuineIntel" not in information.read_text()


def _has_avx() -> bool:
    return isinstance(cpu_vec_isa.pick_vec_isa(), (cpu_vec_isa.VecAVX2, cpu_vec_isa.VecAVX512))


def _is_written_out(left: Any, right: Any) -> bool:
    """Whether a product is one for `product.h`: no vector in it, and the inner axis short.

    Where it has no fixed size it may be long, except in batches (gradients of weights have all rows there).
    """
    *batch, n_rows, n_inner = left.get_size()
    n_columns = right.get_size()[-1]
    if left.get_dtype() not in (torch.float64, torch.float32):
        return False
    known = V.graph.sizevars.statically_known_equals
    if known(n_rows, 1) or known(n_columns, 1) or known(n_inner, 1):
        return False
    return bool(batch) or V.graph.sizevars.statically_known_leq(n_inner, _MAX_INNER)


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


@contextlib.contextmanager
def _with_own_operators() -> Iterator[None]:
    """Have Inductor write the operators of `mtinfer.models.gather`, which are calls of Python otherwise.

    Sums by `sums.h` (those of torch are serial for doubles); what is settled is put into memory. Rows by
    index are read without a look at the index, which is a layout's: never negative, and of a row that there
    is. The look, at every vector of every row, takes a third of the time of such code.
    """
    operators = torch.ops.mtinfer

    def settled(x: Any) -> Any:
        x.realize()
        return lowerings[torch.ops.aten.clone.default](x)  # read by elementwise code, this copies nothing

    def segment_sum(x: Any, order: Any, starts: Any) -> Any:
        return _sums(None, x, order, starts)

    def moment(weights: Any, x: Any, rows: Any, starts: Any) -> Any:
        known, n_weights = V.graph.sizevars.statically_known_equals, weights.get_size()[1]
        if any(known(n_weights, k) for k in range(1, _MAX_WEIGHTS + 1)):
            return _sums(weights, x, rows, starts)
        call = fallback_handler(operators.moment.default, add_to_fallback_set=False)
        return call(*map(_contiguous, (weights, x, rows, starts)))

    def index(x: Any, indices: Any) -> Any:
        size, rows, _ = index_impl_helper(x, indices, check=False, wrap_neg=False)
        return ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=rows, ranges=size)

    own = {
        torch.ops.aten.index.Tensor: index,
        operators.settled.default: settled,
        operators.segment_sum.default: segment_sum,
        operators.moment.default: moment,
    }
    with patch.dict(lowerings, own):
        yield


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
    """Node of Inductor's graph for sums of rows."""
    inputs = [_contiguous(node) for node in (weights, x, rows, starts) if node is not None]
    for node in inputs:
        node.freeze_layout()
    size = [starts.get_size()[0], *([] if weights is None else [weights.get_size()[1]]), x.get_size()[1]]
    return _generated(_Sums, inputs, ir.FixedLayout(x.get_device(), x.get_dtype(), size))


def _contiguous(x: Any) -> Any:
    return ir.ExternKernel.require_contiguous_strides(ir.ExternKernel.realize_input(x))
