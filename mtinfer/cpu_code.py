"""What `mtinfer.graph` changes in the code that Inductor writes for processors (torch 2.13).

No option of Inductor does any of this: its transposed tiles are switched off, since they give wrong numbers;
tanh of doubles is shorter; products of doubles are written out, since MKL is slow in small ones (by up to a
factor of three on processors that are not Intel's).
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
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

__all__ = ["cpu_code"]


@contextlib.contextmanager
def cpu_code() -> Iterator[None]:
    """Have Inductor's CPU code as described above while this lasts."""
    with _without_transposed_tiles(), _with_short_tanh(), _with_own_products():
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


@contextlib.contextmanager
def _with_short_tanh() -> Iterator[None]:
    """Have Inductor's CPU code evaluate tanh of doubles by `_TANH`; no option of torch 2.13 does."""
    usual = CppVecOverrides.tanh

    def tanh(x: Any) -> str:
        return _TANH.format(x) if x.dtype == torch.float64 else str(usual(x))  # type: ignore[no-untyped-call]

    with patch.object(CppVecOverrides, "tanh", staticmethod(tanh)):
        yield


#: longest inner axis of products that are written out; beyond it the right factor doesn't fit a cache
_MAX_INNER = 1024
_HEADER = Path(__file__).with_name("product.h")
_KERNEL = """#include "{header}"
extern "C"
{definition}
{{
    const mtinfer::Product product{{{sizes}}};
    product({arguments});
}}
"""


@contextlib.contextmanager
def _with_own_products() -> Iterator[None]:
    """Have Inductor write products of doubles by `product.h` instead of calling MKL, where that is slow."""
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
    with_vectors = isinstance(cpu_vec_isa.pick_vec_isa(), (cpu_vec_isa.VecAVX2, cpu_vec_isa.VecAVX512))
    return with_vectors and information.exists() and "GenuineIntel" not in information.read_text()


def _is_written_out(left: Any, right: Any) -> bool:
    """Whether a product is one for `product.h`: of doubles, no vector in it, and the inner axis short.

    Where it has no fixed size it may be long, except in batches (gradients of weights have all rows there).
    """
    *batch, n_rows, n_inner = left.get_size()
    n_columns = right.get_size()[-1]
    known = V.graph.sizevars.statically_known_equals
    if left.get_device().type != "cpu" or left.get_dtype() != torch.float64:
        return False
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
        return _KERNEL.format(
            header=_HEADER, definition=definition, sizes=", ".join(sizes), arguments=", ".join(arguments)
        )


def _product(left: Any, right: Any) -> Any:
    """Node of Inductor's graph for a product."""
    factors = [ir.ExternKernel.realize_input(factor) for factor in (left, right)]
    for factor in factors:
        factor.freeze_layout()
    size = [*left.get_size()[:-1], right.get_size()[-1]]
    layout = ir.FixedLayout(left.get_device(), left.get_dtype(), size)
    nodes = ir.InputsKernel.unwrap_storage(factors)
    template = _Product("product", nodes, layout, num_threads=1)
    node = template.generate().output_node()  # type: ignore[no-untyped-call]
    node.data.data.allow_epilogue_fusion = False
    return node
