"""Activations, affine layers with shortcuts, and the switch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from random_models import network, random_weights

from mtinfer.errors import UnsupportedModelError
from mtinfer.graph import trace
from mtinfer.models.activations import activation, known_activation
from mtinfer.models.layers import (
    Network,
    Sloped,
    layer_norm,
    precision,
    required,
    safe_norm,
    switch,
)
from mtinfer.models.layout import Argument
from mtinfer.models.radial import along, radial_moment

X = torch.linspace(-12.0, 12.0, 97, dtype=torch.float64)
#: torch's softplus is x above 20
BEYOND = torch.cat([X, torch.linspace(19.0, 45.0, 27, dtype=torch.float64)])


def slope(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tanh", torch.tanh),
        ("relu", torch.relu),
        ("relu6", torch.nn.functional.relu6),
        ("sigmoid", torch.sigmoid),
        ("softplus", torch.nn.functional.softplus),
        ("softplus_exact", lambda x: torch.nn.functional.softplus(x, threshold=100)),
        ("gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("gelu_tf", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("silu", torch.nn.functional.silu),
        ("none", lambda x: x),
        ("Linear", lambda x: x),
        ("TANH", torch.tanh),
    ],
)
def test_activations_known_to_torch(name: str, expected: object) -> None:
    torch.testing.assert_close(activation(name)(BEYOND), expected(BEYOND), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("silut", 3.0), ("silut:1.5", 1.5), ("custom_silu", 3.0), ("custom_silu:0.5", 0.5)],
)
def test_silut_is_silu_below_its_threshold_and_bounded_growth_above(name: str, threshold: float) -> None:
    f = activation(name)
    below = X[X.lt(threshold)]
    torch.testing.assert_close(f(below), torch.nn.functional.silu(below))
    sigma = 1.0 / (1.0 + math.exp(-threshold))
    assert f(torch.tensor(1e6, dtype=torch.float64)).item() == pytest.approx(threshold * sigma + 1.0)
    # value and slope are continuous
    at = torch.tensor([threshold - 1e-7, threshold + 1e-7], dtype=torch.float64)
    values, slopes = f(at), slope(f, at)
    assert abs(values[1] - values[0]) < 1e-6
    assert abs(slopes[1] - slopes[0]) < 1e-6


@pytest.mark.parametrize(
    ("name", "threshold"), [("silut", 3.0), ("silut:1.3", 1.3), ("custom_silu:10", 10.0)]
)
def test_silut_and_two_derivatives_on_both_sides_of_its_threshold(name: str, threshold: float) -> None:
    sigma = 1.0 / (1.0 + math.exp(-threshold))
    gain = sigma * (1.0 + threshold * (1.0 - sigma))

    def by_definition(x: torch.Tensor) -> torch.Tensor:
        above = torch.tanh(gain * (x - threshold)) + threshold * sigma
        return torch.where(x < threshold, x * torch.sigmoid(x), above)

    x, got, expected = torch.linspace(-8.0, 14.0, 111, dtype=torch.float64), activation(name), by_definition
    for _ in range(3):
        torch.testing.assert_close(got(x), expected(x), rtol=1e-12, atol=1e-13)
        got, expected = partial(slope, got), partial(slope, expected)


@pytest.mark.parametrize("name", ["tanh", "softplus", "gelu", "silu", "silut", "sigmoid"])
def test_two_derivatives_of_activations(name: str) -> None:
    x = torch.linspace(-2.0, 2.9, 23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(activation(name), x)


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "silu", "gelu", "tanh", "silut"])
def test_activations_do_not_overflow(name: str) -> None:
    far = torch.tensor([-800.0, 800.0], dtype=torch.float64)
    assert torch.isfinite(activation(name)(far)).all()
    assert torch.isfinite(slope(activation(name), far)).all()


def test_functions_that_messages_of_pt_expt_have_instead() -> None:
    others = {"GELU": "gelu_rounded", "gelu_tf": "gelu_rounded", "softplus": "softplus_exact"}
    for name, own in {**others, "silu": "silu", "silut:2": "silut:2"}.items():
        assert known_activation(name, of_messages=True) == own
        assert known_activation(name) == name


@pytest.mark.parametrize("name", ["gelu_rounded", "Softplus_exact"])
def test_names_of_our_own_are_no_activations_of_a_configuration(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"activation function '{name}' is unknown"):
        known_activation(name)


@pytest.mark.parametrize("name", ["tahn", "relu:2", "swish"])
def test_unknown_activation(name: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"activation function '{name}' is unknown.*known are tanh, "
    ):
        activation(name)


def test_misspelled_activation_is_recognised() -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean 'tanh'"):
        activation("tahn")


def test_precision() -> None:
    names = ("default", "float64", "double", "float32", "single")
    assert [precision(name) for name in names] == [torch.float64] * 3 + [torch.float32] * 2
    with pytest.raises(UnsupportedModelError, match="precision 'float16' is not supported"):
        precision("float16")


@pytest.mark.parametrize("resnet_dt", [False, True])
def test_network_with_every_kind_of_shortcut(resnet_dt: bool) -> None:
    net = Network("net", (3, 3, 6, 5), "tanh", resnet_dt, torch.float64)
    assert [net.repeats(k) for k in range(3)] == [1, 2, 0]
    names = {f"net.layers.{k}.{leaf}" for k in range(3) for leaf in "wb"}
    names |= {"net.layers.0.idt", "net.layers.1.idt"} if resnet_dt else set()
    assert net.parameters().keys() == names
    weights = random_weights(net.parameters())
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [network(row, weights, "net", 3) for row in x.numpy()]
    np.testing.assert_allclose(net(x, weights).numpy(), expected, rtol=1e-13, atol=1e-15)
    columns = x.reshape(1, 7, 3).transpose(1, 2)
    for k in range(3):
        columns = net.columns(k, columns, weights)
    np.testing.assert_allclose(columns[0].T.numpy(), expected, rtol=1e-13, atol=1e-15)


def test_output_layer_is_affine() -> None:
    net = Network("net", (4, 1), "tanh", True, torch.float64, linear_output=True)
    weights = random_weights(net.parameters())
    x = torch.ones(2, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x, weights), x @ weights["net.layers.0.w"] + weights["net.layers.0.b"])


@pytest.mark.parametrize("widths", [(3, 4), (3, 3), (3, 6), (1, 1, 2), (1, 2), (1, 5)])
def test_network_on_a_scalar_with_the_rest_multiplied_out(widths: tuple[int, ...]) -> None:
    net = Network("net", widths, "tanh", True, torch.float64)
    weights = random_weights(net.parameters())
    x = torch.randn(5, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_(True)
    expected = net(x, weights)
    shift = x[:, 1:] @ weights["net.layers.0.w"][1:] + weights["net.layers.0.b"]
    first = Sloped(x[:, :1].detach(), torch.full((5, 1), 3.0, dtype=torch.float64))
    got = net.on_scalar(first, x[:, 1:] if widths[0] > 1 else None, shift, weights)
    torch.testing.assert_close(got.value.flatten(1), expected)
    assert got.value.shape[1] == max(1, net.repeats(net.n_layers - 1))
    slopes = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0][:, 0] for column in expected.T]
    torch.testing.assert_close(got.slope.flatten(1), 3.0 * torch.stack(slopes, 1))


@pytest.mark.parametrize(
    "name", ["tanh", "relu", "relu6", "sigmoid", "softplus", "gelu", "silu", "silut:2.1", "none"]
)
def test_slopes_are_derivatives_that_can_be_differentiated(name: str) -> None:
    x = X.clone().requires_grad_(True)
    function = activation(name)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    value, slope = Sloped.of(function, X)
    assert not value.requires_grad
    assert not slope.requires_grad
    torch.testing.assert_close(value, function(X))
    torch.testing.assert_close(slope, expected)
    step = 1e-5
    (second,) = torch.autograd.grad(Sloped.of(function, x).slope.sum() + x.sum(), x)
    difference = Sloped.of(function, X + step).slope - Sloped.of(function, X - step).slope
    smooth = (X.abs() > 2.0 * step) & ((X - 6.0).abs() > 2.0 * step)  # relu and relu6 have kinks
    torch.testing.assert_close(
        (second - 1.0)[smooth], (difference / (2.0 * step))[smooth], rtol=1e-6, atol=1e-6
    )


def _radial_features(x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> Sloped:
    w = weights["w"]
    return Sloped(torch.sin(x * w), w * torch.cos(x * w)).each(lambda y: y.unsqueeze(2))


def _moment_along(
    function: Callable[..., Sloped],
    rows: torch.Tensor,
    x: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    return rows.transpose(1, 2) @ along(x, function(*arrays, weights).each(lambda y: y.flatten(2)))


@pytest.mark.parametrize("moment", [radial_moment, _moment_along])
def test_radial_features_are_differentiated_by_their_slopes(moment: Callable[..., torch.Tensor]) -> None:
    """The same derivatives by rows, distances and weights, and of those by weights, as by autograd alone."""
    generator = torch.Generator().manual_seed(3)
    rows, x, w = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 5, 4), (2, 5, 1), (3,))
    )

    def derivatives(m: torch.Tensor) -> list[torch.Tensor]:
        energy = (m * m * m).sum()
        of_rows, of_x = torch.autograd.grad(energy, (rows, x), create_graph=True)
        loss = energy + (of_rows * of_rows).sum() + (of_x * of_x).sum()
        return [of_rows, of_x, *torch.autograd.grad(loss, w)]

    expected = derivatives(rows.transpose(1, 2) @ _radial_features(x, {"w": w}).value.flatten(2))
    got = moment(_radial_features, rows, x, (x.detach(),), {"w": w})
    torch.testing.assert_close(derivatives(got), expected)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("sizes", [(61, 97), (53, 59), (53, 599), (135, 75)])
def test_a_traced_moment_is_a_loop_over_pieces(sizes: tuple[int, int], again: bool) -> None:
    """Traced with any sizes, it is right for all: none of what is true of them is part of the trace."""
    w = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)

    def function(rows: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            rows, x = rows.detach().requires_grad_(True), x.detach().requires_grad_(True)
            moment = radial_moment(_radial_features, rows, x, (x.detach(),), {"w": w}, again=again)
            return (moment.detach(), *torch.autograd.grad((moment**2).sum(), (rows, x)))

    arguments = [Argument(("rows", "slots", 4)), Argument(("rows", "slots", 1))]
    traced, _ = trace(function, arguments, [w], sizes=sizes)
    assert [node.target for node in traced.graph.nodes].count(torch.ops.higher_order.scan) == 1 + again
    generator = torch.Generator().manual_seed(1)
    for n, m in ((0, 3), (1, 1), (7, 3), (64, 32), (101, 50), (3, 5000), (135, 75)):
        data = [torch.randn(n, m, k, dtype=torch.float64, generator=generator) for k in (4, 1)]
        torch.testing.assert_close(traced(*data, w), function(*data, w))


@pytest.mark.parametrize("again", [False, True])
def test_a_moment_that_is_evaluated_again(again: bool) -> None:
    """The same derivatives, from functions that are evaluated anew for them."""
    generator = torch.Generator().manual_seed(3)
    rows, x = (
        torch.randn(2, 5, k, dtype=torch.float64, generator=generator, requires_grad=True) for k in (4, 1)
    )
    weights = {"w": torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)}
    calls: list[torch.Tensor] = []

    def function(x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> Sloped:
        calls.append(x)
        return _radial_features(x, weights)

    def gradients(moment: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((moment**3).sum(), (rows, x))

    moment = radial_moment(function, rows, x, (x.detach(),), weights, again=again)
    assert len(calls) == 1
    wanted = rows.transpose(1, 2) @ _radial_features(x, weights).value.flatten(2)
    torch.testing.assert_close(moment, wanted)
    torch.testing.assert_close(gradients(moment), gradients(wanted))
    assert len(calls) == 1 + again


def test_weights_are_differentiated_by_though_again_is_asked_for() -> None:
    rows, x = (torch.randn(2, 5, k, dtype=torch.float64, requires_grad=True) for k in (4, 1))
    w = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    moments = [
        radial_moment(_radial_features, rows, x, (x.detach(),), {"w": w}, again=again)
        for again in (False, True)
    ]
    plain, again = (torch.autograd.grad((moment**2).sum(), w) for moment in moments)
    assert plain[0].any()
    torch.testing.assert_close(again, plain)


def test_layer_norm() -> None:
    x, scale, shift = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 1, 1))
    expected = torch.nn.functional.layer_norm(x, (6,), scale[0], shift[0], 1e-3)
    torch.testing.assert_close(layer_norm(x, scale[0], shift[0], 1e-3), expected)


def test_safe_norm_has_no_gradient_at_the_origin() -> None:
    x = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert safe_norm(x).tolist() == [[5.0], [0.0]]
    gradient = torch.func.grad(lambda v: safe_norm(v).sum())(x)
    torch.testing.assert_close(
        gradient, torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 0.0]], dtype=torch.float64)
    )


def test_switch_falls_smoothly_from_one_to_zero() -> None:
    r = torch.tensor([0.1, 2.0, 3.0, 4.0, 9.0], dtype=torch.float64)
    assert switch(r, 2.0, 4.0).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]

    def w(r: torch.Tensor) -> torch.Tensor:
        return switch(r, 2.0, 4.0)

    inside = torch.tensor([2.0 + 1e-7, 4.0 - 1e-7], dtype=torch.float64)
    assert slope(w, inside).abs().max() < 1e-9
    assert slope(lambda r: slope(w, r), inside).abs().max() < 1e-5
    assert slope(w, torch.tensor([3.0], dtype=torch.float64)).item() == pytest.approx(-15 / 16)


def test_required_key() -> None:
    assert required({"rcut": 6.0}, "rcut", "se_e2_a") == 6.0
    with pytest.raises(UnsupportedModelError, match="se_e2_a lacks the required key 'sel'"):
        required({}, "sel", "se_e2_a")
