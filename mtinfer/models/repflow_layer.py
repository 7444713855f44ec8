"""One repflow layer of DPA-3: message passing over nodes, edges and angles, all kept as flat lists.

Zhang et al., arXiv:2506.01686 (DPA-3).

A linear map of [node_i, node_j, edge_ij], or of [angle, node_i, edge_ik, edge_ij], is the sum of maps of its
terms. Each term is multiplied out on its own list, before it is gathered to the longer one.

Edges and angles of a centre meet other centres only through the features of the neighbouring nodes. A layer
can therefore be evaluated for some centres at a time: `Lists` and everything on them are those of the
centres, and `Surroundings` are those of the atoms that are near them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .activations import activation
from .gather import Index, gather, moment, segment_sum
from .layers import Weights, updated
from .layout import Argument
from .stage import Keep, Tensors

if TYPE_CHECKING:
    from .repflow import RepflowOptions


class Lists(NamedTuple):
    """Topology: who is next to whom. The last four are empty in models without angles."""

    #: edge -> its centre, among the centres, and its neighbour, among the atoms near them
    centers: Index
    neighbors: Index
    #: edge that is part of angles ("near") -> its place among the edges, and its centre
    near: Index
    near_centers: Index
    #: angle (j, k) -> near edges ij, which it updates, and ik
    first: Index
    second: Index

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Lists:
        """From the members of the indices, one after the other."""
        return cls(*(Index(*tensors[3 * k : 3 * k + 3]) for k in range(len(cls._fields))))

    @property
    def tensors(self) -> Tensors:
        """The members of the indices, one after the other."""
        return tuple(tensor for index in self for tensor in index)

    @staticmethod
    def arguments(nearby: str = "nearby") -> list[Argument]:
        """Declare `tensors`; `nearby` names the axis of the atoms that are neighbours."""
        entries_and_rows = (
            ("edges", "atoms"),
            ("edges", nearby),
            ("near edges", "edges"),
            ("near edges", "atoms"),
            ("angles", "near edges"),
            ("angles", "near edges"),
        )
        return [
            Argument((axis,), torch.int64)
            for entries, rows in entries_and_rows
            for axis in (entries, entries, rows)
        ]


class Geometry(NamedTuple):
    """What the layers need to know of distances and directions."""

    #: (n_edges, 1), switch of the edges over the number of neighbours
    w: Tensor
    #: (n_edges, 3), vector part of the environment rows, times the switch over sqrt(number of neighbours)
    vectors: Tensor
    #: (n_near, 1), switch of the angles over sqrt(number of neighbours)
    v: Tensor
    #: (n_angles, 1), switch of the second edge
    v_second: Tensor


class Surroundings(NamedTuple):
    """What edges read of their neighbours."""

    #: (n_nearby, n_dim)
    node: Tensor
    #: linear maps of it, shape (n_nearby, out); the second is None where no edge is updated
    node_edge_linear: Tensor
    edge_self_linear: Tensor | None = None

    @classmethod
    def of(cls, node: Tensor, weights: Weights) -> Surroundings:
        """From the features of all atoms and the weights of a layer."""
        of_edge = weights.get("edge_self_linear.neighbor")
        return cls(
            node,
            node @ weights["node_edge_linear.neighbor"],
            None if of_edge is None else node @ of_edge,
        )

    @property
    def tensors(self) -> Tensors:
        """Those that are there."""
        return tuple(tensor for tensor in self if tensor is not None)


@dataclass(frozen=True)
class RepflowLayer:
    """One layer for some centres, on weights as `Repflow.prepare` makes them (names without the prefix)."""

    options: RepflowOptions
    activation: str
    dtype: torch.dtype
    updates_edges: bool
    updates_angles: bool
    #: layer 0, whose angle features are multiples of one vector
    from_cosine: bool

    @property
    def reads_angles(self) -> bool:
        """Whether angles enter; else `v`, `v_second` and the angle features are not among the arguments."""
        return self.options.update_angle and self.updates_edges

    def arguments(self) -> tuple[list[Argument], list[Argument]]:
        """Node, edge, `w`, `vectors`; angle, `v`, `v_second` if read; `Surroundings`. Then `Lists`."""
        o = self.options
        shapes: list[tuple[str | int, ...]] = [("atoms", o.n_dim), ("edges", o.e_dim)]
        shapes += [("edges", 1), ("edges", 3)]
        if self.reads_angles:
            width = 1 if self.from_cosine else o.a_dim
            shapes += [("angles", width), ("near edges", 1), ("angles", 1)]
        shapes += [("nearby", o.n_dim), ("nearby", o.n_multi_edge_message * o.n_dim)]
        if self.updates_edges:
            shapes.append(("nearby", o.e_dim))
        return [Argument(shape, self.dtype) for shape in shapes], Lists.arguments()

    def outputs(self) -> list[Argument]:
        """Node features, and what is updated of edge and angle features."""
        o = self.options
        declared = [Argument(("atoms", o.n_dim), self.dtype)]
        if self.updates_edges:
            declared.append(Argument(("edges", o.e_dim), self.dtype))
        if self.updates_angles:
            declared.append(Argument(("angles", o.a_dim), self.dtype))
        return declared

    def kept(self) -> list[Argument]:
        """Sums over long lists, and arguments of activations of nodes."""
        o = self.options
        node: tuple[str | int, ...] = ("atoms", o.n_dim)
        of_nodes = [node, ("atoms", 3, o.e_dim), ("atoms", 3, o.n_dim), node]
        of_edges = [("near edges", 1, o.e_dim)] if self.reads_angles else []
        in_order = (of_edges, of_nodes) if o.sequential_update else (of_nodes, of_edges)
        return [Argument(axes, self.dtype) for axes in chain(*in_order)]

    def __call__(self, varied: Tensors, fixed: Tensors, weights: Weights, keep: Keep) -> Tensors:
        """New node, edge and angle features, all from the old ones unless `sequential_update`."""
        node, edge, w, vectors, *rest = varied
        nothing = w[:0]
        angle, v, v_second = (rest.pop(0) for _ in range(3)) if self.reads_angles else (nothing,) * 3
        geometry, around = Geometry(w, vectors, v, v_second), Surroundings(*rest)
        act, update = activation(self.activation), partial(updated, self.options.update_style)
        read = _Messages(self.options, act, Lists.of(fixed), geometry, around, weights, keep)
        old_angle = angle * weights["angle_embd"] if self.from_cosine and self.updates_angles else angle
        if self.options.sequential_update:
            edge = update("e", edge, [read.of_pair("edge_self_linear", node, edge)], weights)
            message = read.of_triple("angle_self_linear", node, edge, angle)
            angle = update("a", old_angle, [message], weights)
            edge = update("e", edge, [read.of_angles(node, edge, angle)], weights, first=1)
            return update("n", node, read.of_neighbors(node, edge), weights), edge, angle
        new = [update("n", node, read.of_neighbors(node, edge), weights)]
        if self.updates_edges:
            terms = [read.of_pair("edge_self_linear", node, edge)]
            if self.reads_angles:
                terms.append(read.of_angles(node, edge, angle))
            new.append(update("e", edge, terms, weights))
        if self.updates_angles:
            term = read.of_triple("angle_self_linear", node, edge, angle)
            new.append(update("a", old_angle, [term], weights))
        return tuple(new)


@dataclass(frozen=True)
class _Messages:
    """What nodes, edges and angles receive in one layer."""

    options: RepflowOptions
    act: Callable[[Tensor], Tensor]
    lists: Lists
    geometry: Geometry
    around: Surroundings
    weights: Weights
    keep: Keep

    def of_neighbors(self, node: Tensor, edge: Tensor) -> list[Tensor]:
        """Terms of the node update, shape (n_centers, n_dim) each."""
        messages = self.of_pair("node_edge_linear", node, edge)
        messages = moment(self.geometry.w, messages, self.lists.centers).squeeze(1)
        return [
            self.act(self.keep(self._affine("node_self_mlp", node))),
            self.act(self.keep(self._affine("node_sym_linear", self._symmetrised(edge)))),
            *torch.split(messages, self.options.n_dim, dim=1),
        ]

    def _symmetrised(self, edge: Tensor) -> Tensor:
        """Rotation-invariant moments of the edges and of the neighbours' nodes, edges first."""
        features = []
        for q, source in ((edge, None), (self.around.node, self.lists.neighbors)):
            sums = self.keep(moment(self.geometry.vectors, q, self.lists.centers, source))
            leading = sums[:, :, : self.options.axis_neuron] / 3.0
            features.append((leading.transpose(1, 2) @ sums).flatten(1))
        return torch.cat(features, dim=1)

    def of_angles(self, node: Tensor, edge: Tensor, angle: Tensor) -> Tensor:
        """Sum over the angles of each edge, through a second linear map, shape (n_edges, e_dim)."""
        near, v = self.lists.near, self.geometry.v
        message = self.of_triple("edge_angle_linear1", node, edge, angle)
        message = self.keep(moment(self.geometry.v_second, message, self.lists.first)).squeeze(1) * v
        if self.options.smooth_edge_update:
            message = segment_sum(message @ self.weights["edge_angle_linear2.w"], near)
            return self.act(message + self.weights["edge_angle_linear2.b"])
        # edges without angles stand in for their own message
        outside = 1.0 - segment_sum(torch.ones_like(v), near)
        return self.act(self._affine("edge_angle_linear2", segment_sum(message, near) + edge * outside))

    def _affine(self, name: str, x: Tensor) -> Tensor:
        return torch.addmm(self.weights[f"{name}.b"], x, self.weights[f"{name}.w"])

    def of_pair(self, name: str, node: Tensor, edge: Tensor) -> Tensor:
        """Activated linear map of [node_i, node_j, edge_ij], shape (n_edges, out)."""
        of_center = torch.addmm(self.weights[f"{name}.b"], node, self.weights[f"{name}.center"])
        of_neighbor = getattr(self.around, name)
        own = _product(edge, self.weights[f"{name}.edge"])
        return self._activated(own, of_center, of_neighbor, self.lists.centers, self.lists.neighbors)

    def of_triple(self, name: str, node: Tensor, edge: Tensor, angle: Tensor) -> Tensor:
        """Activated linear map of [angle_jk, node_i, edge_ik, edge_ij], shape (n_angles, out)."""
        lists, weights = self.lists, self.weights
        of_node = torch.addmm(weights[f"{name}.b"], node, weights[f"{name}.node"])
        of_node = gather(of_node, lists.near_centers)
        table = torch.addmm(of_node, gather(edge, lists.near), weights[f"{name}.edges"])
        w = weights[f"{name}.angle"]
        own = angle * w if w.shape[0] == 1 else _product(angle, w)
        left, right = torch.chunk(table, 2, dim=1)
        return self._activated(own, left, right, lists.first, lists.second)

    def _activated(self, own: Tensor, left: Tensor, right: Tensor, first: Index, second: Index) -> Tensor:
        """Add to each entry its first row of `left` and its second of `right`."""
        return self.act(own + gather(left, first) + gather(right, second))


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w as a batch of one.

    Inductor merges a plain product and a sum that follows it into `addmm`, for which it writes out the other
    operand of the sum (torch 2.13).
    """
    return torch.bmm(x.unsqueeze(0), w.unsqueeze(0)).squeeze(0)
