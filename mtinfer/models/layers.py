"""Building blocks shared by all descriptors: affine layers with their slopes, functions of rows, switch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..inputs import ParameterSpec
from .activations import activation
from .gather import settled

#: name -> tensor; the names are the canonical ones of `mtinfer.checkpoint.dialects`
Weights = Mapping[str, Tensor]

_PRECISIONS = {
    "default": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "single": torch.float32,
}


def precision(name: str) -> torch.dtype:
    """Return the dtype that a configuration's `precision` names.

    Raises
    ------
    UnsupportedModelError
        For half precisions.
    """
    try:
        return _PRECISIONS[name]
    except KeyError:
        raise UnsupportedModelError(
            f"precision {name!r} is not supported; supported are float64 and float32"
        ) from None


class Sloped(NamedTuple):
    """Values of a function of one variable and, in the same shape, its derivatives there."""

    value: Tensor
    slope: Tensor

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], x: Tensor) -> Sloped:
        """Evaluate an elementwise function at `x`, any shape; both parts are differentiable where `x` is."""
        further = x.requires_grad
        with torch.enable_grad():
            x = x if further else x.detach().requires_grad_(True)
            value = function(x)
            # of the sum: gradients of arrays make torch import its symbolic shapes, half a second
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=further)
        return cls(value, slope) if further else cls(value.detach(), slope)

    def each(self, function: Callable[[Tensor], Tensor]) -> Sloped:
        """Apply a linear map, or one of shapes, to both parts."""
        return Sloped(function(self.value), function(self.slope))


@dataclass(frozen=True)
class Network:
    """Fully connected network whose hidden layers carry a shortcut where the widths allow it.

    Hidden layer: y = f(x W + b) [⊙ idt] + shortcut, where the shortcut is x (out = in), [x, x]
    (out = 2 in) or absent. Zhang et al., NeurIPS 2018 (arXiv:1805.09003), SI eq. 5.
    """

    prefix: str
    #: n_0 (input) … n_L
    widths: tuple[int, ...]
    activation: str
    resnet_dt: bool
    dtype: torch.dtype
    #: the last layer is affine: no activation, no shortcut
    linear_output: bool = False

    @property
    def n_layers(self) -> int:
        return len(self.widths) - 1

    def _is_hidden(self, k: int) -> bool:
        return not (self.linear_output and k == self.n_layers - 1)

    def repeats(self, k: int) -> int:
        """How many copies of its input the shortcut of layer `k` adds: 0, 1 or 2."""
        n_in, n_out = self.widths[k], self.widths[k + 1]
        return {n_in: 1, 2 * n_in: 2}.get(n_out, 0) if self._is_hidden(k) else 0

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        specs = {}
        for k, (n_in, n_out) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            layer = f"{self.prefix}.layers.{k}"
            specs[f"{layer}.w"] = ParameterSpec((n_in, n_out), self.dtype)
            specs[f"{layer}.b"] = ParameterSpec((n_out,), self.dtype)
            if self.resnet_dt and self.repeats(k):
                specs[f"{layer}.idt"] = ParameterSpec((n_out,), self.dtype)
        return specs

    def layer(self, k: int, x: Tensor, weights: Weights) -> Tensor:
        """Layer `k`: shape (..., n_k) -> (..., n_{k+1})."""
        layer = f"{self.prefix}.layers.{k}"
        return self.finish(k, x @ weights[f"{layer}.w"] + weights[f"{layer}.b"], x, weights)

    def columns(self, k: int, x: Tensor, weights: Weights) -> Tensor:
        """Layer `k` with the features on axis 1: shape (n, n_k, p) -> (n, n_{k+1}, p).

        Where p is much larger than the widths, the compiler can vectorise over p only in this order.
        """
        layer = f"{self.prefix}.layers.{k}"
        affine = weights[f"{layer}.w"].T @ x + weights[f"{layer}.b"].unsqueeze(1)
        return self.finish(k, affine, x, weights, axis=1)

    def finish(self, k: int, affine: Tensor, x: Tensor, weights: Weights, *, axis: int = -1) -> Tensor:
        """All of layer `k` that follows the affine map; `x` is the input, features are on `axis`."""
        if not self._is_hidden(k):
            return affine
        return self._close(k, activation(self.activation)(affine), x, weights, axis)

    def _close(self, k: int, y: Tensor, x: Tensor, weights: Weights, axis: int) -> Tensor:
        """What hidden layer `k` does to the activation `y` of its input `x`; linear in both."""
        idt = weights.get(f"{self.prefix}.layers.{k}.idt")
        if idt is not None:
            y = y * (idt if axis == -1 else idt.unsqueeze(1))
        repeats = self.repeats(k)
        if repeats == 2:
            # [x, x] as a broadcast: a concatenation would keep the compiler from vectorising the sum
            pair: Tensor = y.unflatten(axis, (2, x.shape[axis])) + x.unsqueeze(axis - 1 if axis < 0 else axis)
            return pair.flatten(-2) if axis == -1 else pair.flatten(axis, axis + 1)
        return y + x if repeats else y

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        """Shape (..., n_0) -> (..., n_L)."""
        for k in range(self.n_layers):
            x = self.layer(k, x, weights)
        return x

    def on_scalar(self, s: Sloped, rest: Tensor | None, shift: Tensor, weights: Weights) -> Sloped:
        """Evaluate a net without linear output on the input [s, rest], of which only s varies.

        Parameters
        ----------
        s
            shape (..., 1), the first input.
        rest
            shape (..., n_0 - 1), the other inputs, None where there are none; read only where layer 0 has a
            shortcut.
        shift
            shape (..., n_1), ``rest @ w[1:] + b`` of layer 0.

        Returns
        -------
        shape of `folded`, with slopes by what those of `s` are by
        """
        x = s
        if rest is not None and self.repeats(0):
            x = Sloped(
                torch.cat([s.value, rest], dim=-1), torch.cat([s.slope, torch.zeros_like(rest)], dim=-1)
            )
        for k in range(self.n_layers):
            layer = f"{self.prefix}.layers.{k}"
            w = weights[f"{layer}.w"]
            if k == 0:
                affine = Sloped(s.value * w[0] + shift, s.slope * w[0])
            else:
                affine = Sloped(x.value @ w + weights[f"{layer}.b"], x.slope @ w)
            y = Sloped.of(activation(self.activation), affine.value)
            x = Sloped(
                self._close(k, y.value, x.value, weights, -1),
                self._close(k, y.slope * affine.slope, x.slope, weights, -1),
            )
        return x.each(self.folded)

    def folded(self, y: Tensor) -> Tensor:
        """Shape (..., n_L) -> (..., k, n_L / k), k = 2 where the last shortcut doubles its input, else 1.

        What follows elementwise is fast in this shape alone: on flat rows the compiler's code finds the entry
        of the shortcut by a division for each element (torch 2.13).
        """
        folded: Tensor = y.unflatten(-1, (max(1, self.repeats(self.n_layers - 1)), -1))
        return folded


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis, with the biased variance (arXiv:1607.06450)."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred * settled(torch.rsqrt(variance + eps)) * scale + shift


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.new_ones(x.shape[-1], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradient.expand_as(x)


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, kept as an axis of one.

    Evaluated as a product with ones: the compiler's code for sums along short rows of doubles is slow
    (torch 2.13).
    """
    return _RowSum.apply(x)  # type: ignore[no-any-return, no-untyped-call]


#: logit of what takes no part in a softmax; finite, since a difference of infinities is no number, and the
#: same in float32, in which peaks are found
NO_LOGIT = -(2.0**100)


def row_peak(logits: Tensor) -> Tensor:
    """Largest entry of the last axis to float32 precision, kept as an axis of one: what a softmax subtracts.

    Its value cancels, so there is no derivative. The compiler's code for extrema of short rows is twice as
    fast for floats as for doubles (torch 2.13). What is left of a logit of 1e10 would overflow in `exp`; by
    then doubles have no digits left for the softmax either.
    """
    peak: Tensor = logits.detach().to(torch.float32).amax(-1, keepdim=True).to(logits.dtype)
    return peak


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis, kept as an axis of one, with gradient zero at the origin."""
    square = (x * x).sum(-1, keepdim=True)
    positive = square > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, square, 1.0)), 0.0)


def switch(r: Tensor, rcut_smth: float, rcut: float) -> Tensor:
    """Smooth cutoff w(r): 1 below `rcut_smth`, 0 from `rcut` on, two continuous derivatives.

    w = u³(-6u² + 15u - 10) + 1 with u = (r - rcut_smth)/(rcut - rcut_smth); Zhang et al., NeurIPS 2018
    (arXiv:1805.09003), eq. 8.
    """
    u = (torch.clamp(r, rcut_smth, rcut) - rcut_smth) / (rcut - rcut_smth)
    return u * u * u * (-6.0 * u * u + 15.0 * u - 10.0) + 1.0


#: values of option `update_style`
UPDATE_STYLES = ("res_avg", "res_incr", "res_residual")


def check_update_style(style: str, where: str) -> None:
    """Raise UnsupportedModelError for a style that `updated` does not know."""
    if style not in UPDATE_STYLES:
        raise UnsupportedModelError(
            f"{where} update_style {style!r} is unknown; known are {', '.join(UPDATE_STYLES)}"
        )


def check_axis_neuron(axis_neuron: int, width: int, where: str) -> None:
    """Raise UnsupportedModelError where more features are to be leading ones than there are."""
    if axis_neuron > width:
        raise UnsupportedModelError(f"{where} axis_neuron={axis_neuron} is more than its {width} features")


def updated(
    style: str, kind: str, old: Tensor, terms: Sequence[Tensor], weights: Weights, *, first: int = 0
) -> Tensor:
    """Features of message passing and what they receive; "res_residual" has a weight for every term.

    Parameters
    ----------
    style
        option `update_style`.
    kind, first
        the weight of term k is ``<kind>_residual.<first + k>``.
    """
    new = old
    for k, term in enumerate(terms, first):
        if style == "res_residual":
            term = term * weights[f"{kind}_residual.{k}"]
        elif style == "res_incr":
            term = term / math.sqrt(len(terms))
        new = new + term
    return new / math.sqrt(len(terms) + 1) if style == "res_avg" else new


def required(config: Mapping[str, Any], key: str, where: str) -> Any:
    """Return ``config[key]``; a missing key has no default in any version of the format."""
    try:
        return config[key]
    except KeyError:
        raise UnsupportedModelError(f"{where} lacks the required key {key!r}") from None


def without_prefix(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Weights whose names begin with `prefix`, named without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
