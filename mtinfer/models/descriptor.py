"""What a model asks of its descriptor: the seam behind which every architecture stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..inputs import GraphInputs, ParameterSpec
from .layers import Weights
from .layout import Argument, Layout, Pairs, Selection
from .stage import Call


@dataclass(frozen=True)
class Setting:
    """What a descriptor is told by the head that it belongs to."""

    type_map: tuple[str, ...]
    #: "pt" or "pt_expt", which decides a few defaults
    dialect: str
    #: pairs of types that the neighbour list of the model leaves out
    pair_exclude: tuple[tuple[int, int], ...] = ()
    #: keep all neighbours instead of the nearest `sel`, where a descriptor and its options allow it
    graph: bool = False


class Descriptor(Protocol):
    """An architecture without its weights, as a frozen dataclass.

    Its repr is part of the signature of graphs, so that fields that reach a graph as data are left out of it.
    """

    @property
    def selection(self) -> Selection:
        """Which pairs it sees."""

    @property
    def mixed_types(self) -> bool:
        """Whether one fitting net serves all types; else there is one weight group per centre type."""

    @property
    def reads_charge_spin(self) -> bool:
        """Whether total charge and spin of a structure enter."""

    @property
    def default_chg_spin(self) -> tuple[float, float] | None:
        """Total charge and spin of structures that give none."""

    @property
    def rcut(self) -> float:
        """Cutoff, Å."""

    @property
    def width(self) -> int:
        """Width of the descriptor of one atom."""

    def parameters(self) -> dict[str, ParameterSpec]:
        """Every weight that a file must hold: canonical name -> shape and dtype."""

    def prepare(self, weights: Weights) -> list[dict[str, Tensor]]:
        """Weights as the graph reads them, by weight group, with all that depends on weights alone.

        Differentiable by the weights; names begin with "descriptor.".
        """

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Declare the displacement arrays of a call, and its further tensors.

        Of single descriptors the first of these are the types of the centres.
        """

    def layouts(self, inputs: GraphInputs, pairs: Pairs, *, split: bool = True) -> list[Layout]:
        """Make what `arguments` declares from structures.

        With `split` as many calls as run fastest; without, one per weight group, in their order.
        """

    def __call__(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Descriptor of the centres of a layout, shape (n, width), and their types, shape (n,).

        A plain function of tensors that can be traced, and be differentiated twice.
        """


class DescriptorKind(Protocol):
    """A class of descriptors, by which configurations are read."""

    def from_config(self, config: Mapping[str, Any], setting: Setting) -> Descriptor:
        """Read the section "descriptor"; missing keys get the defaults of the writing code.

        Raises
        ------
        UnsupportedModelError
            An option has a value that is not supported.
        """


@runtime_checkable
class InParts(Protocol):
    """What a descriptor offers whose atoms can't be divided into calls, since its layers pass messages."""

    def is_large(self, layout: Layout) -> bool:
        """Whether one call would take too much memory."""

    def in_parts(
        self, displacements: tuple[Tensor, ...], tensors: tuple[Tensor, ...], weights: Weights, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Do what a call does stage by stage, each by `call`; not to be traced."""
