"""Functions of the distance, and their sums over neighbours, differentiated by way of slopes (`Sloped`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import Sloped, Weights, row_sum
from .pieces import in_pieces


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return row_sum(gradient * ctx.saved_tensors[0]), gradient, None


def along(x: Tensor, y: Sloped) -> Tensor:
    """Functions of `x` (..., 1), shape (..., c), that are differentiated by it by way of their slopes."""
    return _Along.apply(x, *y)  # type: ignore[no-any-return, no-untyped-call]


def _gradients_of_moment(
    rows: Tensor, value: Tensor, slope: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by rows and by the variable of the functions, shapes (n, m, d) and (n, m, 1)."""
    back = gradient.transpose(1, 2)
    return value @ back, (rows * (slope @ back)).sum(-1, keepdim=True)


class _RadialMoment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, x: Tensor, value: Tensor, slope: Tensor, moment: Tensor) -> Tensor:
        ctx.save_for_backward(rows, value, slope)
        return moment.view_as(moment)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        rows, value, slope = ctx.saved_tensors
        of_value = rows @ gradient if ctx.needs_input_grad[2] else None
        return *_gradients_of_moment(rows, value, slope, gradient), of_value, None, None


class _MomentAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, x: Tensor, moment: Tensor, derivative: Callable[..., Any]) -> Tensor:
        ctx.derivative = derivative
        return moment.view_as(moment)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.derivative(gradient), None, None


def radial_moment(
    function: Callable[..., Sloped],
    rows: Tensor,
    x: Tensor,
    arrays: Sequence[Tensor],
    weights: Weights,
    *,
    again: bool = False,
) -> Tensor:
    """Sum over slots of rows ⊗ functions of one number per slot, evaluated `in_pieces`.

    The derivative by that number is one more moment, that of the slopes; nothing of the size of the functions
    is made on the way back.

    Parameters
    ----------
    function
        ``function(*arrays, weights)``, functions of `x` and their slopes by it, shape (n, m, k, c / k).
    rows
        shape (n, m, d).
    x
        shape (n, m, 1), what the moment is differentiated by.
    arrays
        shapes (n, m, ...), made of ``x.detach()``.
    again
        evaluate the functions anew for the derivative, in place of keeping them, unless a weight requires a
        gradient.

    Returns
    -------
    shape (n, d, c)
    """

    def with_moment(arrays: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
        rows, *own = arrays
        y = function(*own, weights)
        return rows.transpose(1, 2) @ y.value.detach().flatten(2), *y

    def moment_alone(arrays: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
        return with_moment(arrays, weights)[:1]

    def gradients(arrays: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
        rows, gradient, *own = arrays
        value, slope = (part.flatten(2) for part in function(*own, weights))
        return _gradients_of_moment(rows, value, slope, gradient)

    fixed = rows.detach()

    def derivative(gradient: Tensor) -> tuple[Tensor, ...]:
        return in_pieces(gradients, (fixed, gradient, *arrays), weights)

    varies, of_weights = (any(y.requires_grad for y in ys) for ys in ((rows, x), weights.values()))
    if (again or not varies) and not of_weights:
        (moment,) = in_pieces(moment_alone, (fixed, *arrays), weights)
        return _MomentAgain.apply(rows, x, moment, derivative)  # type: ignore[no-any-return, no-untyped-call]
    moment, value, slope = in_pieces(with_moment, (fixed, *arrays), weights)
    flat = value.flatten(2), slope.flatten(2)
    return _RadialMoment.apply(rows, x, *flat, moment)  # type: ignore[no-any-return, no-untyped-call]
