"""What a head owns, as data, and how it is made from the record of a file."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint.container import of_file
from .checkpoint.load import check_weights
from .checkpoint.records import Checkpoint, HeadRecord
from .errors import PredictionWarning, UnsupportedModelError, user_level
from .graph import Compilation, CompileMode, SharedGraph, signed
from .models import EnergyModel
from .models.tabulated import TabulatedDPA1, TabulatedSeE2A, tabulated
from .options import unknown_options
from .stage_graphs import StageGraphs

__all__ = ["HeadState", "checked", "head_states"]


@dataclass(frozen=True)
class HeadState:
    """Everything that a head owns, as data: swapping heads is passing another one of these."""

    name: str
    aliases: tuple[str, ...]
    model: EnergyModel
    weight_names: tuple[str, ...]
    #: per weight group, in the order of the names, in which the graph takes them
    weights: tuple[tuple[Tensor, ...], ...]
    #: (n_types,) float64, eV, added to the energies that the graph returns
    bias: Tensor
    #: (numb_fparam,), or None where the model has no default
    default_fparam: Tensor | None
    #: elements of the training data; None where the file does not say
    observed_types: frozenset[str] | None
    #: graphs of the architecture: whole, and stage by stage for what is too large for one call
    stages: StageGraphs
    #: the head as its file has it, where `model` is tabulated: for structures that the series do not cover
    exact: HeadState | None = None

    @property
    def graph(self) -> SharedGraph:
        """Graph of the whole model."""
        return self.stages.whole

    @property
    def precision(self) -> torch.dtype:
        """Lowest precision that takes part in its networks: float64 or float32."""
        dtypes = {weight.dtype for group in self.weights for weight in group}
        return torch.float32 if torch.float32 in dtypes else torch.float64

    def named(self, group: int) -> dict[str, Tensor]:
        """Weights of a group by name."""
        return dict(zip(self.weight_names, self.weights[group], strict=True))


class Refused(NamedTuple):
    """A head of a file that can't be evaluated."""

    reason: str
    aliases: tuple[str, ...]


def head_states(
    checkpoint: Checkpoint, device: torch.device, mode: CompileMode, *, tabulate: bool
) -> tuple[dict[str, HeadState], dict[str, Refused]]:
    """Make all heads of a file; those of one architecture share their graphs.

    Parameters
    ----------
    tabulate
        as in `mtinfer.load`.

    Returns
    -------
    name -> head, in the order of the file, and the others

    Raises
    ------
    CheckpointError
        The weights of a head do not fit its configuration.
    """
    models: dict[str, EnergyModel] = {}
    reasons: dict[str, str] = {}
    for name, record in checkpoint.heads.items():
        if record.refused is not None:
            reasons[name] = record.refused
            continue
        try:
            models[name] = _model(record, checkpoint)
        except UnsupportedModelError as err:
            reasons[name] = str(err)
    faster = _tabulated(checkpoint, models, reasons) if tabulate else {}
    graphs: dict[str, StageGraphs] = {}
    compilation, shared = Compilation(mode), _Shared(device)
    heads: dict[str, HeadState] = {}
    for name in [name for name in models if name not in reasons]:
        state = _head_state(checkpoint.heads[name], models[name], shared, compilation, graphs)
        if name in faster:
            series = _head_state(checkpoint.heads[name], faster[name], shared, compilation, graphs)
            state = replace(series, exact=state)
        heads[name] = state
    return heads, {name: Refused(reason, checkpoint.heads[name].aliases) for name, reason in reasons.items()}


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in which every head that can't be evaluated is refused.

    Raises
    ------
    CheckpointError
        The weights of a head do not fit its configuration.
    """
    heads = dict(checkpoint.heads)
    for name, record in heads.items():
        if record.refused is None:
            try:
                _model(record, checkpoint)
            except UnsupportedModelError as err:
                heads[name] = replace(record, refused=str(err))
    return replace(checkpoint, heads=heads)


def _model(record: HeadRecord, checkpoint: Checkpoint) -> EnergyModel:
    try:
        model = EnergyModel.from_config(
            record.config, checkpoint.dialect, graph_lower_disabled=record.graph_lower_disabled
        )
    except UnsupportedModelError as err:
        raise UnsupportedModelError(f"head {record.name!r}: {err}") from err
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        raise UnsupportedModelError(
            f"head {record.name!r}: its configuration can't be read ({type(err).__name__}: {err})"
        ) from err
    if unknown := list(unknown_options(record.config)):
        warnings.warn(
            f"head {record.name!r} has options that mtinfer does not know and passes over: "
            f"{', '.join(unknown)}; if they change the numbers, those here are wrong",
            PredictionWarning,
            stacklevel=user_level(),
        )
    with of_file(checkpoint.path):
        check_weights(record.name, record.weights, model.parameters(), dialect=checkpoint.spelling)
    return model


class _Shared:
    """What heads with common weights have once: the weights on a device, and what descriptors make of them.

    Of one checkpoint, in which a weight that heads share is one tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        #: identity of a tensor of the checkpoint -> its copy
        self._moved: dict[int, Tensor] = {}
        self._prepared: dict[Hashable, list[dict[str, Tensor]]] = {}

    def weights(self, record: HeadRecord) -> dict[str, Tensor]:
        """Weights of a head on the device."""
        for weight in record.weights.values():
            if id(weight) not in self._moved:
                self._moved[id(weight)] = weight.to(self._device)
        return {name: self._moved[id(weight)] for name, weight in record.weights.items()}

    def groups(self, model: EnergyModel, weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Weights of a head as the graph reads them, by weight group."""
        descriptor = model.descriptor
        own = tuple((name, id(weights[name])) for name in sorted(descriptor.parameters()))
        key = (model.type_map, descriptor, own)
        if key not in self._prepared:
            groups = descriptor.prepare(weights)
            self._prepared[key] = [{k: w.contiguous() for k, w in group.items()} for group in groups]
        return model.prepare(weights, self._prepared[key])


def _head_state(
    record: HeadRecord,
    model: EnergyModel,
    shared: _Shared,
    compilation: Compilation,
    graphs: dict[str, StageGraphs],
) -> HeadState:
    weights = shared.weights(record)
    groups = shared.groups(model, weights)
    names = tuple(sorted(groups[0]))
    default_fparam = weights.get("fitting_net.default_fparam_tensor")
    stages = _graphs(model, names, groups[0], compilation, graphs)
    return HeadState(
        name=record.name,
        aliases=record.aliases,
        model=model,
        weight_names=names,
        weights=tuple(tuple(group[name].contiguous() for name in names) for group in groups),
        bias=model.bias(weights),
        default_fparam=None if default_fparam is None else default_fparam.cpu().to(torch.float64),
        observed_types=_observed(record),
        stages=stages,
    )


def _graphs(
    model: EnergyModel,
    names: Sequence[str],
    group: Mapping[str, Tensor],
    compilation: Compilation,
    graphs: dict[str, StageGraphs],
) -> StageGraphs:
    """Return the graphs of an architecture, made at its first head."""
    weights = {name: group[name] for name in names}
    signature = signed(repr(model), weights)
    if signature not in graphs:
        displacements, tensors = model.arguments()
        n = len(displacements)
        graphs[signature] = StageGraphs(
            SharedGraph.of_named(
                lambda data, named: model.energies_and_gradients(data[:n], data[n:], named),
                signature,
                [*displacements, *tensors],
                weights,
                compilation,
            )
        )
    return graphs[signature]


def _tabulated(
    checkpoint: Checkpoint, models: Mapping[str, EnergyModel], refused: dict[str, str]
) -> dict[str, EnergyModel]:
    """Models with series in place of radial nets, all of as many terms, so that they share their graph."""
    found: dict[str, TabulatedDPA1 | TabulatedSeE2A] = {}
    for name, model in models.items():
        record = checkpoint.heads[name]
        observed = _observed(record)
        types = [t for t, symbol in enumerate(model.type_map) if observed is None or symbol in observed]
        try:
            found[name] = tabulated(model.descriptor, record.weights, types)
        except UnsupportedModelError as err:
            refused[name] = f"head {name!r}: {err}"
    n_terms = max((descriptor.n_terms for descriptor in found.values()), default=0)
    return {
        name: replace(models[name], descriptor=replace(descriptor, n_terms=n_terms))
        for name, descriptor in found.items()
    }


def _observed(record: HeadRecord) -> frozenset[str] | None:
    observed = (record.config.get("info") or {}).get("observed_type")
    return None if observed is None else frozenset(observed)
