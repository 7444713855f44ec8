"""Weights of all tasks: which are shared, how they start, what the data statistics set."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.sharing import is_trainable
from ..errors import ConfigError
from ..inputs import ParameterSpec
from ..models import EnergyModel
from ..models.descriptor import Descriptor
from ..models.hybrid import MEMBERS, Hybrid, member_name
from ..models.se_e2_a import SeE2A
from .config import TaskConfig
from .model_section import Link
from .statistics import TaskStatistics, environment_weights, merged, parameter_weights, stat_blocks

if TYPE_CHECKING:
    from .plan import Plan

__all__ = [
    "Owners",
    "initial_weights",
    "set_statistics",
    "trained_labels",
    "trained_names",
    "weights_of_centers",
]

#: head -> canonical name -> tensor; heads that share a weight hold the same tensor
AllWeights = dict[str, dict[str, Tensor]]

#: weights of a fitting net that every head keeps to itself
_OWN_OF_FITTING = ("fitting_net.bias_atom_e", "fitting_net.case_embd")


class Owners:
    """Which head's tensor a weight is, told from the links of the input."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = [(link.part, link.heads[0][0], dict(link.heads)) for link in links]

    def __call__(self, head: str, name: str) -> str:
        """Head whose tensor `head` uses for a weight: the base of the link, or itself."""
        for part, base, levels in self._links:
            if head in levels and shares(part, levels[head], name):
                return base
        return head

    def joined(self, weights: AllWeights) -> AllWeights:
        """Weights of which heads that share one hold the owner's tensor."""
        return {
            head: {name: weights[self(head, name)][name] for name in own} for head, own in weights.items()
        }


def shares(part: str, level: int, name: str) -> bool:
    """Whether heads that share a part at some level have a weight in common."""
    if part == "fitting_net":
        return name.startswith("fitting_net.") and name not in _OWN_OF_FITTING
    return name.startswith(f"{part}." if level == 0 else f"{part}.type_embedding.")


def check_shapes(links: Sequence[Link], models: Mapping[str, EnergyModel]) -> None:
    """Raise ConfigError where heads share a weight that has different shapes in them."""
    owners = Owners(links)
    parameters = {head: model.parameters() for head, model in models.items()}
    for head, own in parameters.items():
        for name, spec in own.items():
            owner = owners(head, name)
            if (shared := parameters[owner].get(name)) != spec:
                there = "is not" if shared is None else f"has the shape {shared.shape}"
                raise ConfigError(
                    f"heads {owner!r} and {head!r} share {name!r}, which {there} in the first and has the "
                    f"shape {spec.shape} in the second; heads share what has the same widths in all of them"
                )


def initial_weights(plan: Plan) -> AllWeights:
    """Draw weights for all heads; statistics are those of no data.

    The draw of a weight depends on the seed, the head that owns it, and its name.
    """
    cases = {head: case for case, head in enumerate(sorted(plan.models))}
    weights = {
        task.name: {
            name: _drawn(name, spec, task.config, plan.config.run.seed, cases[task.name])
            for name, spec in task.model.parameters().items()
        }
        for task in plan.tasks
    }
    return plan.owners.joined(weights)


def _drawn(name: str, spec: ParameterSpec, task: TaskConfig, seed: int, case: int) -> Tensor:
    section = _described(name, task.model) if name.startswith("descriptor.") else task.model["fitting_net"]
    own = zlib.crc32(f"{seed}/{section.get('seed')}/{task.name}/{name}".encode())
    return initial_weight(name, spec, task.model, torch.Generator().manual_seed(own), case)


def initial_weight(
    name: str, spec: ParameterSpec, config: Mapping[str, Any], generator: torch.Generator, case: int
) -> Tensor:
    """One weight before training.

    Parameters
    ----------
    config
        completed entry of `model_dict`.
    case
        position of the head among all, sorted by name: its case embedding is that unit vector.
    """
    leaf = name.rpartition(".")[2]
    constant = _constants(name, config, case, spec)
    if constant is not None:
        return constant.to(spec.dtype)
    if "layer_norm." in name or "attn2_lm." in name:
        return torch.full(spec.shape, 1.0 if leaf == "w" else 0.0, dtype=spec.dtype)
    mean, std = 0.0, 1.0
    if "_residual." in name:
        block = _described(name, config)["repflow" if "repflows" in name else "repformer"]
        size = float(block["update_residual"])
        mean, std = (size, 0.0) if block["update_residual_init"] == "const" else (0.0, size)
    elif leaf == "idt":
        mean, std = 0.1, 0.001
    elif leaf == "w":
        std = 1.0 / math.sqrt(sum(spec.shape))
    noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
    return (mean + std * noise).to(spec.dtype)


def _constants(name: str, config: Mapping[str, Any], case: int, spec: ParameterSpec) -> Tensor | None:
    leaf = name.rpartition(".")[2]
    if leaf == "default_fparam_tensor":
        return torch.tensor(config["fitting_net"]["default_fparam"], dtype=torch.float64)
    if leaf == "case_embd":
        return torch.eye(spec.shape[0], dtype=torch.float64)[case]
    if leaf == "min_nbor_dist":
        return torch.tensor(-1.0, dtype=torch.float64)
    fixed = _described(name, config).get("repflow", {}).get("fix_stat_std") or 1.0
    values = {"stddev": float(fixed), "out_std": 1.0, "fparam_inv_std": 1.0, "aparam_inv_std": 1.0}
    if leaf in values:
        return torch.full(spec.shape, values[leaf], dtype=torch.float64)
    if leaf in ("mean", "out_bias", "bias_atom_e", "fparam_avg", "aparam_avg"):
        return torch.zeros(spec.shape, dtype=torch.float64)
    return None


def _described(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Section of the descriptor that a weight belongs to: that of a member, in a hybrid one."""
    section: Mapping[str, Any] = config["descriptor"]
    if name.startswith(MEMBERS):
        section = section["list"][int(name.removeprefix(MEMBERS).partition(".")[0])]
    return section


def trained_names(model: EnergyModel, config: Mapping[str, Any]) -> frozenset[str]:
    """Weights that the optimizer may change, by the configuration of the head."""

    def is_free(name: str) -> bool:
        if name.startswith("fitting_net."):
            return bool(config["fitting_net"]["trainable"])
        section = _described(name, config)
        norms = section.get("trainable_ln", True) and section.get("repformer", {}).get("trainable_ln", True)
        is_norm = "layer_norm." in name or "attn2_lm." in name
        return bool(section["trainable"]) and (bool(norms) or not is_norm)

    return frozenset(name for name in model.parameters() if is_trainable(name) and is_free(name))


def weights_of_centers(model: EnergyModel) -> list[frozenset[str]]:
    """Nets of `se_e2_a` that centres of one type alone read, by type; empty where there are none."""

    def of_center(descriptor: Descriptor, t: int) -> set[str]:
        if isinstance(descriptor, Hybrid):
            members = enumerate(descriptor.members)
            return {member_name(i, name) for i, member in members for name in of_center(member, t)}
        if isinstance(descriptor, SeE2A) and not descriptor.one_sided:
            nets = (descriptor.network(n * descriptor.n_types + t) for n in range(descriptor.n_types))
            return {name for net in nets for name in net.parameters()}
        return set()

    found = [frozenset(of_center(model.descriptor, t)) for t in range(len(model.type_map))]
    return found if any(found) else []


def trained_labels(plan: Plan) -> list[str]:
    """Labels ``<owner>/<name>`` of the weights that the optimizer may change, in its order."""
    labels = {
        f"{plan.owners(task.name, name)}/{name}": None
        for task in plan.tasks
        for name in sorted(trained_names(task.model, task.config.model))
    }
    return list(labels)


def set_statistics(weights: AllWeights, plan: Plan, statistics: Mapping[str, TaskStatistics]) -> None:
    """Put the statistics of the data into the weights, merged over heads that share them.

    Heads count by their probabilities; for descriptors of "pt" alike, as in deepmd-kit.
    """
    links, alike = plan.config.links, plan.dialect == "pt"
    probabilities = dict(zip(plan.models, map(float, plan.probabilities), strict=True))
    for task in plan.tasks:
        own, model, found = weights[task.name], task.model, statistics[task.name]
        own["out_bias"], own["out_std"] = found.out_bias.clone(), found.out_std.clone()
        own["min_nbor_dist"] = torch.tensor(found.min_distance, dtype=torch.float64)
        for block in stat_blocks(model, task.config.model["descriptor"]):
            described = _linked(links, block.prefix, task.name)
            moments = merged(
                [statistics[other].moments[block.prefix] for other in described],
                [1.0 if alike else probabilities[other] for other in described],
            )
            own |= environment_weights(block, moments, own[f"{block.prefix}.mean"].dtype)
        fitted = _linked(links, "fitting_net", task.name)
        shares_of = [probabilities[other] for other in fitted]
        for name in ("fparam", "aparam"):
            sums = merged([getattr(statistics[other], name) for other in fitted], shares_of)
            own |= parameter_weights(name, sums, model.fitting.dtype)
    weights.update(plan.owners.joined(weights))


def _linked(links: Sequence[Link], prefix: str, head: str) -> list[str]:
    """Heads whose statistics make those of `head` for the weights with a prefix, the base first."""
    for link in links:
        levels = dict(link.heads)
        if f"{prefix}.".startswith(f"{link.part}.") and levels.get(head) == 0:
            return [other for other, level in link.heads if level == 0]
    return [head]
