"""Adam and AdamW on named weights, in torch's arithmetic and torch's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Optimizer"]


class _Lists(NamedTuple):
    """What an update of some weights of one precision reads and changes."""

    names: list[str]
    #: (n,) int64
    numbers: Tensor
    weights: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    #: 0-dimensional, parts of one tensor
    updates: list[Tensor]


class Optimizer:
    """Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101), by torch's fused operators.

    Torch's classes around them import the compiler (75 MiB and a second), and count the updates of every
    weight on its own, which takes as long as the update of small ones.

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
        self._numbers = {name: k for k, name in enumerate(weights)}
        devices = [weight.device for weight in weights.values()]
        #: (n_weights,) number of updates of every weight
        self._updates = torch.zeros(len(weights), dtype=torch.float32, device=devices[0] if devices else None)
        #: name -> both moments, of the weights that were ever updated
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        #: names -> for each precision, for torch's function takes one, what it changes
        self._lists: dict[tuple[str, ...], list[_Lists]] = {}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Change the weights that have a gradient, by learning rate `lr`; leave the others as they are."""
        self._options["lr"] = lr
        if not gradients:  # of a task whose weights are all fixed
            return
        names = tuple(gradients)
        if names not in self._lists:
            self._lists[names] = self._listed(names)
        options = self._options
        step = torch._fused_adamw_ if options["decoupled_weight_decay"] else torch._fused_adam_
        for lists in self._lists[names]:
            self._updates.index_add_(0, lists.numbers, torch.ones_like(lists.numbers, dtype=torch.float32))
            step(
                lists.weights,
                [gradients[name].contiguous() for name in lists.names],  # read as they lie in memory
                lists.averages,
                lists.squares,
                [],
                lists.updates,
                lr=lr,
                beta1=options["betas"][0],
                beta2=options["betas"][1],
                weight_decay=options["weight_decay"],
                eps=options["eps"],
                amsgrad=options["amsgrad"],
                maximize=options["maximize"],
            )

    def _listed(self, names: Sequence[str]) -> list[_Lists]:
        by_precision: dict[torch.dtype, list[str]] = {}
        for name in names:
            by_precision.setdefault(self._weights[name].dtype, []).append(name)
        return [self._of_one_precision(same) for same in by_precision.values()]

    def _of_one_precision(self, names: list[str]) -> _Lists:
        for name in names:
            if name not in self._moments:
                weight = self._weights[name]
                self._moments[name] = torch.zeros_like(weight), torch.zeros_like(weight)
        numbers = [self._numbers[name] for name in names]
        averages, squares = zip(*(self._moments[name] for name in names), strict=True)
        return _Lists(
            names,
            torch.tensor(numbers, device=self._updates.device),
            [self._weights[name] for name in names],
            list(averages),
            list(squares),
            [self._updates[k] for k in numbers],
        )

    def state_dict(self) -> dict[str, Any]:
        """State on the CPU, in the format of torch's optimizers, which number the weights in their order."""
        state = {
            self._numbers[name]: {
                "step": self._updates[self._numbers[name]].clone().cpu(),
                "exp_avg": average.cpu(),
                "exp_avg_sq": square.cpu(),
            }
            for name, (average, square) in self._moments.items()
        }
        return {
            "state": state,
            "param_groups": [{**self._options, "params": list(self._numbers.values())}],
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; options stay those of this optimizer."""
        names = list(self._weights)
        self._updates.zero_()
        self._moments, self._lists = {}, {}
        for k, state in stored["state"].items():
            self._updates[k] = state["step"]
            average, square = (
                state[kind].to(self._weights[names[k]].device, copy=True)
                for kind in ("exp_avg", "exp_avg_sq")
            )
            self._moments[names[k]] = average, square
