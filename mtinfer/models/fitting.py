"""Energy fitting net: descriptor -> atomic energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..descriptor_kinds import FITTING_DEFAULTS, with_dialect_defaults
from ..errors import UnsupportedModelError
from ..inputs import ParameterSpec
from .activations import known_activation
from .layers import Network, Weights, precision

_NAME = "fitting_net"


@dataclass(frozen=True)
class EnergyFitting:
    """Fitting net `ener`: one net for all types, or one per type.

    Inputs in order: descriptor, fparam, aparam (both standardised), case embedding.
    Zhang et al., npj Comput. Mater. 10, 293 (2024), for the case embedding of multitask models.
    """

    n_types: int
    descriptor_width: int
    neuron: tuple[int, ...]
    activation: str
    resnet_dt: bool
    dtype: torch.dtype
    numb_fparam: int
    numb_aparam: int
    dim_case_embd: int
    default_fparam: tuple[float, ...] | None = field(repr=False)
    #: one per fitting net (types, or a single one): subtract the energy of an empty descriptor
    vacuum: tuple[bool, ...]
    #: `aparam` only masks atoms and is no input of the net
    aparam_is_mask: bool

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        n_types: int,
        descriptor_width: int,
        mixed_types: bool,
        dialect: str,
    ) -> EnergyFitting:
        """Read a `fitting_net` configuration; missing keys get the defaults of the writing code."""
        if (kind := config.get("type", "ener")) != "ener":
            raise UnsupportedModelError(f"fitting net of type {kind!r} is not supported; supported is 'ener'")
        if config.get("case_film_embd"):
            raise UnsupportedModelError("fitting net option 'case_film_embd' is not supported")
        config = with_dialect_defaults(config, FITTING_DEFAULTS, dialect)
        given = config.get("atom_ener") or []
        atom_ener = [t < len(given) and given[t] is not None for t in range(n_types)]
        vacuum = (any(atom_ener),) if mixed_types else tuple(atom_ener)
        default_fparam = config.get("default_fparam")
        return cls(
            n_types=n_types,
            descriptor_width=descriptor_width,
            neuron=tuple(config["neuron"]),
            activation=known_activation(config.get("activation_function", "tanh")),
            resnet_dt=bool(config.get("resnet_dt", True)),
            dtype=precision(config.get("precision", "default")),
            numb_fparam=int(config.get("numb_fparam", 0)),
            numb_aparam=int(config.get("numb_aparam", 0)),
            dim_case_embd=int(config.get("dim_case_embd", 0)),
            default_fparam=None if default_fparam is None else tuple(map(float, default_fparam)),
            vacuum=vacuum,
            aparam_is_mask=bool(config.get("use_aparam_as_mask", False)),
        )

    @property
    def _n_aparam_inputs(self) -> int:
        return 0 if self.aparam_is_mask else self.numb_aparam

    def _net(self, index: int) -> Network:
        n_in = self.descriptor_width + self.numb_fparam + self._n_aparam_inputs + self.dim_case_embd
        return Network(
            f"{_NAME}.nets.{index}",
            (n_in, *self.neuron, 1),
            self.activation,
            self.resnet_dt,
            self.dtype,
            linear_output=True,
        )

    def parameters(self) -> dict[str, ParameterSpec]:
        """Return name -> shape and dtype of every weight."""
        specs = {f"{_NAME}.bias_atom_e": ParameterSpec((self.n_types, 1), torch.float64)}
        for name, size in (("fparam", self.numb_fparam), ("aparam", self.numb_aparam)):
            if size:
                specs[f"{_NAME}.{name}_avg"] = ParameterSpec((size,), self.dtype)
                specs[f"{_NAME}.{name}_inv_std"] = ParameterSpec((size,), self.dtype)
        if self.default_fparam is not None:
            specs[f"{_NAME}.default_fparam_tensor"] = ParameterSpec((self.numb_fparam,), self.dtype)
        if self.dim_case_embd:
            specs[f"{_NAME}.case_embd"] = ParameterSpec((self.dim_case_embd,), self.dtype)
        for index in range(len(self.vacuum)):
            specs |= self._net(index).parameters()
        return specs

    def group(self, weights: Weights, index: int) -> dict[str, Tensor]:
        """Weights that net `index` reads, named as if it were net 0."""
        own = f"{_NAME}.nets.{index}."
        shared = {
            name: tensor
            for name, tensor in weights.items()
            if name.startswith(f"{_NAME}.") and not name.startswith(f"{_NAME}.nets.")
        }
        shared.pop(f"{_NAME}.default_fparam_tensor", None)
        if self.aparam_is_mask:
            shared = {name: tensor for name, tensor in shared.items() if ".aparam_" not in name}
        nets = {
            f"{_NAME}.nets.0.{name.removeprefix(own)}": tensor
            for name, tensor in weights.items()
            if name.startswith(own)
        }
        vacuum = torch.tensor([float(self.vacuum[index])], dtype=self.dtype) if any(self.vacuum) else None
        if vacuum is not None:
            shared[f"{_NAME}.vacuum"] = vacuum.to(shared[f"{_NAME}.bias_atom_e"].device)
        return shared | nets

    def __call__(
        self, descriptor: Tensor, types: Tensor, fparam: Tensor, aparam: Tensor, weights: Weights
    ) -> Tensor:
        """Atomic energies without `out_bias`.

        Parameters
        ----------
        descriptor
            shape (n, descriptor_width).
        types
            shape (n,), index into the type map.
        fparam, aparam
            shape (n, numb_fparam) and (n, numb_aparam), of the atom's frame and of the atom.

        Returns
        -------
        shape (n,), eV, in the precision of the net
        """
        rest = []
        if self.numb_fparam:
            rest.append(self._standardised("fparam", fparam, weights))
        if self._n_aparam_inputs:
            rest.append(self._standardised("aparam", aparam, weights))
        if self.dim_case_embd:
            rest.append(weights[f"{_NAME}.case_embd"].expand(descriptor.shape[0], -1))
        net = self._net(0)
        descriptor = descriptor.to(self.dtype)
        energy = net(torch.cat([descriptor, *rest], dim=1), weights)
        if any(self.vacuum):
            empty = net(torch.cat([torch.zeros_like(descriptor), *rest], dim=1), weights)
            energy = energy - weights[f"{_NAME}.vacuum"] * empty
        return (energy + weights[f"{_NAME}.bias_atom_e"][types].to(self.dtype)).squeeze(1)

    def _standardised(self, name: str, values: Tensor, weights: Weights) -> Tensor:
        centred = values.to(self.dtype) - weights[f"{_NAME}.{name}_avg"]
        return centred * weights[f"{_NAME}.{name}_inv_std"]
