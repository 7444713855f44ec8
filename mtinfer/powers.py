"""exp, sigmoid and tanh in C++, as functions of a power of two, for vectors of numbers.

A function of 2ᵗ with t = x `rate` is written in line: torch's are calls, around which the vectors of a loop
are stored. 2ᵗ = s (1 + p) with s = 2ⁿ, t = n + f and |f| <= 1/2. A sum with `shift` rounds t to n, and its
last bits are the exponent of s; `rest` is what `rate` lacks. No difference cancels, so that small values of
tanh keep their relative precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FORMATS", "Format", "exp", "sigmoid", "tanh"]

_OF_POWER = """[](const auto& all) C10_ALWAYS_INLINE_ATTRIBUTE {{
    const auto function = [](const auto& x) C10_ALWAYS_INLINE_ATTRIBUTE {{
        using V = std::decay_t<decltype(x)>;
        using I = at::vec::Vectorized<{integer}>;
        const auto y = at::vec::clamp(x, V({least}), V({most}));
        const auto m = at::vec::fmadd(y, V({rate}), V({shift}));
        const auto s = at::vec::cast<{scalar}>(at::vec::cast<{integer}>(m) << I({digits}));
        const auto f = at::vec::fmadd(y, V({rest}), at::vec::fmsub(y, V({rate}), m - V({shift})));
        const auto z = f * f;
        const auto p = at::vec::fmadd(z, {odd}, f * {even});
        return {result};
    }};
    // Inductor's vectors may be several of the processor's
    if constexpr (requires {{ all.unary_op(function); }}) return all.unary_op(function);
    else return function(all);
}}({x})"""


@dataclass(frozen=True)
class Format:
    """A binary format of numbers, and what `_OF_POWER` needs for it."""

    scalar: str
    #: of the same size
    integer: str
    #: stored digits of a number, and what is added to its exponent
    digits: int
    bias: int
    #: 1/ln 2, and what the first lacks
    log2e: tuple[float, float]
    #: of (2ᶠ - 1)/f by powers of f, from its values at Chebyshev's points; relative error 1.2e-8 or 2e-17
    coefficients: tuple[float, ...]

    def code(self, x: Any, result: str, *, factor: float, least: float, most: float) -> str:
        """Code of `result`, a function of p and s, where t = `factor` x/ln 2 and x is cut to a range."""
        rate, rest = (factor * part for part in self.log2e)
        return _OF_POWER.format(
            x=x,
            result=result,
            scalar=self.scalar,
            integer=self.integer,
            digits=self.digits,
            least=least,
            most=most,
            rate=rate,
            rest=rest,
            shift=1.5 * 2.0**self.digits + self.bias,
            even=_polynomial(self.coefficients[0::2]),
            odd=_polynomial(self.coefficients[1::2]),
        )


def _polynomial(coefficients: Sequence[float]) -> str:
    *lower, highest = (f"V({coefficient})" for coefficient in coefficients)
    return functools.reduce(lambda text, c: f"at::vec::fmadd(z, {text}, {c})", reversed(lower), highest)


#: by dtype
FORMATS = {
    torch.float32: Format(
        "float",
        "int32_t",
        digits=23,
        bias=127,
        log2e=(1.4426950216293335, 1.925963033500547e-08),
        coefficients=(0.6931472, 0.2402265, 0.05550357, 0.009618083, 0.0013390863, 0.00015453163),
    ),
    torch.float64: Format(
        "double",
        "int64_t",
        digits=52,
        bias=1023,
        log2e=(1.4426950408889634, 2.0355273740931033e-17),
        coefficients=(
            0.6931471805599453,
            0.24022650695910097,
            0.0555041086648216,
            0.009618129107606888,
            0.0013333558146416936,
            0.0001540353044173605,
            1.525273382983612e-05,
            1.321544258792169e-06,
            1.0178062445844774e-07,
            7.072585949269223e-09,
            4.4549605981865186e-10,
        ),
    ),
}


def exp(x: Any, form: Format) -> str:
    """Code of exp(x) for a vector `x`."""
    # the exponent of s may be the lowest, which makes it zero, or the highest, infinity
    least, most = -form.bias * math.log(2.0), (form.bias + 1) * math.log(2.0)
    return form.code(x, "s * (V(1) + p)", factor=1.0, least=least, most=most)


def sigmoid(x: Any, form: Format) -> str:
    """Code of 1/(1 + exp(-x)) for a vector `x`."""
    most = (form.bias - 2) * math.log(2.0)  # it stays a normal number
    return form.code(x, "V(1) / at::vec::fmadd(s, p, V(1) + s)", factor=-1.0, least=-most, most=most)


def tanh(x: Any, form: Format) -> str:
    """Code of tanh(x) for a vector `x`."""
    most = 0.5 * (form.digits + 4) * math.log(2.0)  # 1 to the last digit
    result = "at::vec::fmadd(s, p, s - V(1)) / at::vec::fmadd(s, p, s + V(1))"
    return form.code(x, result, factor=2.0, least=-most, most=most)
