"""Adam and AdamW on named weights, in torch's arithmetic and torch's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

__all__ = ["Optimizer"]


class Optimizer:
    """Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101), by torch's fused functions.

    Torch's classes around them import the compiler: 75 MiB and a second.

    Parameters
    ----------
    weights
        name -> tensor, which is changed in place.
    decoupled
        AdamW's decay, which shrinks the weights; else that of Adam, which is part of the gradient.
    start
        learning rate at the first step, a part of the stored state.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        start: float,
        betas: tuple[float, float],
        weight_decay: float,
        decoupled: bool,
    ) -> None:
        self._weights = dict(weights)
        self._options: dict[str, Any] = {
            "lr": start,
            "initial_lr": start,
            "betas": betas,
            "eps": 1e-8,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled,
            "amsgrad": False,
            "maximize": False,
        }
        #: name -> number of updates and both moments, of the weights that were ever updated
        self._state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Change the weights that have a gradient, by learning rate `lr`; leave the others as they are."""
        self._options["lr"] = lr
        for name in gradients:
            if name not in self._state:
                weight = self._weights[name]
                self._state[name] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self._state[name] for name in gradients]
        beta1, beta2 = self._options["betas"]
        adam(
            [self._weights[name] for name in gradients],
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            beta1=beta1,
            beta2=beta2,
            **{key: value for key, value in self._options.items() if key not in ("betas", "initial_lr")},
        )

    def state_dict(self) -> dict[str, Any]:
        """State in the format of torch's optimizers, which number the weights in their order."""
        numbers = {name: k for k, name in enumerate(self._weights)}
        return {
            "state": {numbers[name]: dict(state) for name, state in self._state.items()},
            "param_groups": [{**self._options, "params": list(numbers.values())}],
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; options stay those of this optimizer."""
        names = list(self._weights)
        self._state = {
            names[k]: {
                kind: tensor.to(self._weights[names[k]].device, copy=True) for kind, tensor in state.items()
            }
            for k, state in stored["state"].items()
        }
