"""Energy fitting net."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_models import Weights, network, random_weights

from mtinfer.errors import UnsupportedModelError
from mtinfer.models.fitting import EnergyFitting

TYPES = torch.tensor([0, 2, 1, 0])


def fitting(*, mixed_types: bool = True, dialect: str = "pt", **config: Any) -> EnergyFitting:
    config = {"neuron": [5, 5], **config}
    return EnergyFitting.from_config(
        config, n_types=3, descriptor_width=4, mixed_types=mixed_types, dialect=dialect
    )


def evaluate(model: EnergyFitting, weights: Weights, group: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Energies, and the inputs that they were computed from: descriptor, fparam, aparam."""
    generator = torch.Generator().manual_seed(3)
    sizes = (4, model.numb_fparam, model.numb_aparam)
    inputs = [torch.randn(4, n, dtype=torch.float64, generator=generator) for n in sizes]
    energies = model(inputs[0], TYPES, inputs[1], inputs[2], model.group(weights, group))
    return energies.double().numpy(), [x.numpy() for x in inputs]


def net(x: np.ndarray, weights: Weights, index: int = 0) -> float:
    hidden = network(x, weights, f"fitting_net.nets.{index}", 2)
    last = f"fitting_net.nets.{index}.layers.2"
    return float(hidden @ weights[f"{last}.w"].numpy()[:, 0] + weights[f"{last}.b"].numpy()[0])


def standardised(name: str, values: np.ndarray, weights: Weights) -> np.ndarray:
    average, inverse = (weights[f"fitting_net.{name}_{part}"].numpy() for part in ("avg", "inv_std"))
    return (values - average) * inverse


def test_inputs_are_concatenated_in_order() -> None:
    model = fitting(numb_fparam=2, numb_aparam=1, dim_case_embd=3, default_fparam=[0.1, 0.2])
    weights = random_weights(model.parameters())
    energies, (descriptor, fparam, aparam) = evaluate(model, weights)
    for k, energy in enumerate(energies):
        x = np.concatenate(
            [
                descriptor[k],
                standardised("fparam", fparam[k], weights),
                standardised("aparam", aparam[k], weights),
                weights["fitting_net.case_embd"].numpy(),
            ]
        )
        bias = weights["fitting_net.bias_atom_e"][TYPES[k], 0].item()
        assert energy == pytest.approx(net(x, weights) + bias, rel=1e-12)


def test_one_net_per_type() -> None:
    model = fitting(mixed_types=False)
    weights = random_weights(model.parameters())
    for index in range(3):
        energies, (descriptor, *_) = evaluate(model, weights, index)
        expected = [net(row, weights, index) for row in descriptor]
        bias = weights["fitting_net.bias_atom_e"][TYPES, 0].numpy()
        np.testing.assert_allclose(energies, expected + bias, rtol=1e-12)


@pytest.mark.parametrize("mixed_types", [True, False])
def test_atom_ener_subtracts_the_energy_of_an_empty_descriptor(mixed_types: bool) -> None:
    model = fitting(mixed_types=mixed_types, atom_ener=[None, 1.5, None])
    weights = random_weights(model.parameters())
    for index in range(1 if mixed_types else 3):
        energies, (descriptor, *_) = evaluate(model, weights, index)
        subtracted = net(np.zeros(4), weights, index) if mixed_types or index == 1 else 0.0
        expected = np.array([net(row, weights, index) for row in descriptor]) - subtracted
        bias = weights["fitting_net.bias_atom_e"][TYPES, 0].numpy()
        np.testing.assert_allclose(energies, expected + bias, rtol=1e-11)


def test_aparam_as_a_mask_is_no_input() -> None:
    model = fitting(numb_aparam=1, use_aparam_as_mask=True)
    specs = model.parameters()
    assert specs["fitting_net.nets.0.layers.0.w"].shape == (4, 5)
    assert "fitting_net.aparam_avg" in specs
    weights = random_weights(specs)
    energies, (descriptor, *_) = evaluate(model, weights)
    bias = weights["fitting_net.bias_atom_e"][TYPES, 0].numpy()
    np.testing.assert_allclose(energies, [net(row, weights) for row in descriptor] + bias, rtol=1e-12)


def test_float32_net_computes_in_float32() -> None:
    model = fitting(precision="float32")
    weights = random_weights(model.parameters())
    energies = model(
        torch.ones(4, 4, dtype=torch.float64), TYPES, torch.ones(4, 0), torch.ones(4, 0), weights
    )
    assert energies.dtype == torch.float32
    assert model.parameters()["fitting_net.bias_atom_e"].dtype == torch.float64


@pytest.mark.parametrize(("dialect", "width"), [("pt", 128), ("pt_expt", 120)])
def test_default_widths_depend_on_the_dialect(dialect: str, width: int) -> None:
    model = EnergyFitting.from_config({}, n_types=1, descriptor_width=4, mixed_types=True, dialect=dialect)
    assert model.neuron == (width,) * 3


@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
def test_older_spelling_of_widths(dialect: str) -> None:
    model = EnergyFitting.from_config(
        {"n_neuron": [5, 7]}, n_types=1, descriptor_width=4, mixed_types=True, dialect=dialect
    )
    assert model.neuron == (5, 7)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"type": "dipole"}, "fitting net of type 'dipole' is not supported"),
        ({"case_film_embd": True}, "case_film_embd"),
    ],
)
def test_unsupported_fitting_net(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        fitting(**config)


def test_a_short_list_of_atomic_energies_leaves_the_other_types_without() -> None:
    model = fitting(mixed_types=False, atom_ener=[-1.0])
    assert model.vacuum == (True, False, False)
    assert {name.split(".")[2] for name in model.parameters() if ".nets." in name} == {"0", "1", "2"}
    assert fitting(atom_ener=[None, -1.0]).vacuum == (True,)
