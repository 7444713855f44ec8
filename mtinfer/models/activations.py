"""Activation functions, each with two derivatives that can be traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError, nearest


def _gelu(x: Tensor, factor: float = math.sqrt(2.0 / math.pi)) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(factor * (x + 0.044715 * x * x * x)))


class _Silu(torch.autograd.Function):
    """x σ(x), with a derivative that is computed from x alone.

    torch's own has no second derivative under make_fx (torch 2.13). Each sigmoid here has one reader, since
    Inductor writes out one that has several instead of computing it where it is needed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradient * (torch.sigmoid(x) * (1.0 + x * (1.0 - torch.sigmoid(x))))


def _silu(x: Tensor) -> Tensor:
    return _Silu.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Silut(torch.autograd.Function):
    """x σ(x) below a threshold, tanh(slope (x - threshold)) + offset above it, in one sigmoid.

    tanh(y) = 2σ(2y) - 1. For the derivative see `_Silu`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: float, slope: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.threshold, ctx.slope = threshold, slope
        low = x < threshold
        z = torch.where(low, x, (x - threshold) * (2.0 * slope))
        return torch.where(low, x, 2.0) * torch.sigmoid(z) + (~low).to(x.dtype) * (offset - 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        low = x < ctx.threshold
        z = torch.where(low, x, (x - ctx.threshold) * (2.0 * ctx.slope))
        falling = torch.where(low, x, 4.0 * ctx.slope) * (1.0 - torch.sigmoid(z))
        return gradient * (torch.sigmoid(z) * (low.to(x.dtype) + falling)), None, None, None


def _exact_softplus(x: Tensor) -> Tensor:
    # overflow-safe, and free of softplus_backward, which has no second derivative under make_fx
    return torch.clamp(x, min=0.0) + torch.log1p(torch.exp(-torch.abs(x)))


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20.0, x, _exact_softplus(x))  # as torch's


def _silut(threshold: float) -> Callable[[Tensor], Tensor]:
    sigma = 1.0 / (1.0 + math.exp(-threshold))
    slope = sigma * (1.0 + threshold * (1.0 - sigma))
    offset = threshold * sigma

    def silut(x: Tensor) -> Tensor:
        return _Silut.apply(x, threshold, slope, offset)  # type: ignore[no-any-return, no-untyped-call]

    return silut


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": lambda x: torch.clamp(x, min=0.0),
    "relu6": lambda x: torch.clamp(x, min=0.0, max=6.0),
    "sigmoid": torch.sigmoid,
    "softplus": _softplus,
    "gelu": _gelu,
    "gelu_tf": _gelu,
    "silu": _silu,
    "none": _identity,
    "linear": _identity,
}
#: what pt_expt has in repformer and repflow layers for the functions of these names
_OF_MESSAGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    # sqrt(2/π) rounded to float32
    **dict.fromkeys(("gelu", "gelu_tf"), ("gelu_rounded", lambda x: _gelu(x, 0.7978845834732056))),
    # torch's is x above 20
    "softplus": ("softplus_exact", _exact_softplus),
}


#: names that `known_activation` takes
NAMES = (*_ACTIVATIONS, "silut[:threshold]")


def known_activation(name: object, *, of_messages: bool = False) -> str:
    """Check the name that a configuration gives, and return it.

    Parameters
    ----------
    of_messages
        of repformer and repflow layers in pt_expt, where some functions differ in the ninth digit from
        those of torch; the name returned then stands for theirs.

    Raises
    ------
    UnsupportedModelError
        For an unknown name.
    """
    name = str(name)
    if name.lower() in dict(_OF_MESSAGES.values()):
        raise _unknown(name)
    activation(name)
    own = _OF_MESSAGES.get(name.lower()) if of_messages else None
    return own[0] if own else name


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a name that `known_activation` gave; `silut:t` carries its threshold.

    Raises
    ------
    UnsupportedModelError
        For an unknown name.
    """
    kind, _, argument = name.lower().partition(":")
    if kind in ("silut", "custom_silu"):
        return _silut(float(argument) if argument else 3.0)
    functions = {**_ACTIVATIONS, **dict(_OF_MESSAGES.values())}
    if kind in functions and not argument:
        return functions[kind]
    raise _unknown(name)


def _unknown(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"activation function {name!r} is unknown{nearest(name, NAMES)}; known are {', '.join(NAMES)}"
    )
