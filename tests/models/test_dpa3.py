"""DPA-3 beyond its numbers: lists of edges and angles, refusals, sizes, derivatives.

Numbers of every option are those of the reference files (`test_reference.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ase
import numpy as np
import pytest
import torch
from reference_files import DATA
from reference_files import structures as reference_structures
from torch import Tensor

import mtinfer
from mtinfer.errors import UnsupportedModelError
from mtinfer.graph import trace
from mtinfer.inputs import GraphInputs
from mtinfer.models import EnergyModel
from mtinfer.models.gather import Index
from mtinfer.models.layout import Layout
from mtinfer.models.stage import directly
from mtinfer.neighbors import find_candidates, graph_inputs

TYPE_MAP = ["O", "H", "C"]
REPFLOW = {
    **{"n_dim": 6, "e_dim": 5, "a_dim": 4, "nlayers": 3, "axis_neuron": 2},
    **{"e_rcut": 4.0, "e_rcut_smth": 3.0, "e_sel": 40, "a_rcut": 3.0, "a_rcut_smth": 2.0, "a_sel": 30},
}
DYNAMIC = {
    **{"use_dynamic_sel": True, "smooth_edge_update": True, "use_exp_switch": True},
    **{
        "edge_init_use_dist": True,
        "a_compress_rate": 1,
        "a_compress_e_rate": 2,
        "a_compress_use_split": True,
    },
}
SEQUENTIAL = {"sequential_update": True, "smooth_edge_update": True}
AVERAGED = {"update_style": "res_avg", "n_multi_edge_message": 2, "a_compress_rate": 2}
PLAIN = {"update_angle": False, "update_style": "res_incr"}


def build(
    repflow: dict[str, Any] | None = None,
    dialect: str = "pt",
    pair_exclude_types: Sequence[Sequence[int]] = (),
    **options: Any,
) -> EnergyModel:
    descriptor = {"type": "dpa3", "repflow": REPFLOW | (repflow or {}), **options}
    config = {
        "type_map": TYPE_MAP,
        "descriptor": descriptor,
        "fitting_net": {"neuron": [4, 4]},
        "pair_exclude_types": pair_exclude_types,
    }
    return EnergyModel.from_config(config, dialect)


def draw(model: EnergyModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(spec.shape, dtype=spec.dtype, generator=generator) * 0.5
        for name, spec in model.parameters().items()
    }
    weights["descriptor.repflows.stddev"] = torch.full_like(weights["descriptor.repflows.stddev"], 0.3)
    return weights


def cluster(n_atoms: int, seed: int = 0, box: float = 4.0) -> ase.Atoms:
    """Atoms at random, none too close to another."""
    rng = np.random.default_rng(seed)
    positions: list[np.ndarray] = []
    while len(positions) < n_atoms:
        position = rng.uniform(0.0, box, 3)
        if all(np.linalg.norm(position - other) > 0.9 for other in positions):
            positions.append(position)
    return ase.Atoms(rng.choice(TYPE_MAP, n_atoms), np.reshape(positions, (-1, 3)))


def prepare(
    model: EnergyModel, structures: Sequence[ase.Atoms], charge_spin: Sequence[Sequence[float]] | None = None
) -> GraphInputs:
    n_atoms = sum(map(len, structures))
    return graph_inputs(
        structures,
        [find_candidates(atoms, model.rcut) for atoms in structures],
        [np.array([TYPE_MAP.index(s) for s in atoms.symbols], dtype=np.int64) for atoms in structures],
        model.rcut,
        fparam=torch.zeros(len(structures), 0, dtype=torch.float64),
        aparam=torch.zeros(n_atoms, 0, dtype=torch.float64),
        charge_spin=torch.tensor(charge_spin or [[0.0, 0.0]] * len(structures), dtype=torch.float64),
    )


def only_layout(model: EnergyModel, inputs: GraphInputs) -> Layout:
    (layout,), _ = model.layouts(inputs)
    return layout


def lists(layout: Layout) -> list[Index]:
    """The six members of `Lists`; fparam and aparam follow them."""
    return [Index(*layout.tensors[k : k + 3]) for k in range(1, 19, 3)]


def evaluate(model: EnergyModel, weights: dict[str, Tensor], layout: Layout) -> tuple[Tensor, ...]:
    (group,) = model.prepare(weights)
    return model.energies_and_gradients(layout.displacements, layout.tensors, group)


@pytest.mark.parametrize("name", ["use_loc_mapping", "trainable"])
def test_descriptor_options_without_effect(name: str) -> None:
    assert build(**{name: True}) == build(**{name: False}) == build()


@pytest.mark.parametrize("name", ["optim_update", "skip_stat"])
def test_repflow_options_without_effect(name: str) -> None:
    assert build({name: True}) == build({name: False}) == build()


def test_old_names_of_options() -> None:
    assert build({"edge_use_dist": True, "use_env_envelope": True}) == build(
        {"edge_init_use_dist": True, "use_exp_switch": True}
    )


@pytest.mark.parametrize(
    ("repflow", "message"),
    [
        (
            {"update_style": "res_layer"},
            "repflow update_style 'res_layer' is unknown; known are res_avg, res_incr",
        ),
        ({"use_dynamic_sel": True}, "use_dynamic_sel=true needs smooth_edge_update=true"),
        (
            {"sequential_update": True, "update_angle": False},
            "sequential_update=true needs update_angle=true",
        ),
        ({"sequential_update": True, "update_style": "res_avg"}, "and update_style=res_residual"),
        ({"axis_neuron": 100}, r"repflow axis_neuron=100 is more than its \d+ features"),
        (
            {"a_dim": 100, "a_compress_rate": 1, "a_compress_use_split": True},
            r"a_compress_use_split=true takes 100 of \d+ features",
        ),
    ],
)
def test_combinations_that_the_format_does_not_define(repflow: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        build(repflow)
    assert "\n" not in str(raised.value)


def test_unknown_activation() -> None:
    with pytest.raises(UnsupportedModelError, match="activation function 'swish' is unknown"):
        build(activation_function="swish")


@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
@pytest.mark.parametrize("a_sel", [30, 5])
@pytest.mark.parametrize("excluded", [[], [[0, 1]]])
@pytest.mark.parametrize("pair_excluded", [[], [[2, 2]]])
def test_angles_are_all_pairs_of_the_nearest_edges(
    dialect: str, a_sel: int, excluded: list[list[int]], pair_excluded: list[list[int]]
) -> None:
    model = build({"a_sel": a_sel, "e_sel": 12}, dialect, pair_excluded, exclude_types=excluded)
    atoms = cluster(20)
    layout = only_layout(model, prepare(model, [atoms]))
    centers, neighbors, near, near_centers, first, second = (index.rows.tolist() for index in lists(layout))
    edge = {pair: k for k, pair in enumerate(zip(centers, neighbors, strict=True))}
    assert len(edge) == len(centers)
    expected = []
    for i in range(len(atoms)):
        closed, form = nearest(atoms, i, dialect, a_sel, excluded, pair_excluded)
        assert {j for j in range(len(atoms)) if (i, j) in edge} == closed
        expected += [(edge[i, j], edge[i, k]) for j, k in itertools.product(form, form)]
    assert sorted((near[j], near[k]) for j, k in zip(first, second, strict=True)) == sorted(expected)
    assert [centers[e] for e in near] == near_centers


def nearest(
    atoms: ase.Atoms,
    i: int,
    dialect: str,
    a_sel: int,
    excluded: list[list[int]],
    pair_excluded: list[list[int]],
) -> tuple[set[int], list[int]]:
    """Neighbours of atom `i` in the edge list, and those of them that form angles, by the definition."""
    types = [TYPE_MAP.index(s) for s in atoms.symbols]

    def drops(j: int, pairs: list[list[int]]) -> bool:
        return sorted((types[i], types[j])) in pairs

    distance = atoms.get_distances(i, range(len(atoms)))
    others = [int(j) for j in np.argsort(distance) if j != i and distance[j] <= 4.0][:12]
    edges = {j for j in others if not drops(j, excluded) and not drops(j, pair_excluded)}
    slots = [j for j in others if dialect == "pt" or not drops(j, pair_excluded)]
    return edges, [j for j in slots[:a_sel] if distance[j] < 3.0 and j in edges]


def test_every_list_is_grouped_by_its_rows() -> None:
    model = build()
    layout = only_layout(model, prepare(model, [cluster(9), cluster(1), cluster(6, seed=2)]))
    sizes = [16, 16, len(layout.displacements[0]), 16]
    members = lists(layout)
    n_near = len(members[2].rows)
    assert n_near
    for index, n in zip(members, [*sizes, n_near, n_near], strict=True):
        for got, expected in zip(index, Index.of(index.rows, n), strict=True):
            assert torch.equal(got, expected)
    for index in (members[0], members[2], members[3], members[4]):
        assert torch.equal(index.order, torch.arange(len(index.order)))


@pytest.mark.parametrize(("distance", "n_angles"), [(3.0, 0), (2.999999, 2)])
def test_the_angle_cutoff_itself_is_outside(distance: float, n_angles: int) -> None:
    model = build()
    layout = only_layout(model, prepare(model, [ase.Atoms("OH", [(0, 0, 0), (0, 0, distance)])]))
    assert len(layout.displacements[0]) == 2
    assert len(lists(layout)[4].rows) == n_angles


@pytest.mark.parametrize(
    ("repflow", "n_cut"),
    [({}, 0), ({"a_sel": 1}, 3), ({"e_sel": 1, "a_sel": 1}, 3), (PLAIN | {"a_sel": 1}, 0)],
)
def test_atoms_that_lose_edges_or_angles_are_counted(repflow: dict[str, Any], n_cut: int) -> None:
    model = build(repflow)
    water = ase.Atoms("OH2", [(0, 0, 0), (0.76, 0, 0.59), (-0.76, 0, 0.59)])
    _, counted = model.layouts(prepare(model, [water]))
    assert counted == n_cut


def test_charge_and_spin_belong_to_a_structure() -> None:
    model = build(add_chg_spin_ebd=True, default_chg_spin=[0, 1])
    weights, structures, states = draw(model), [cluster(4), cluster(3, seed=3)], [[-1.0, 2.0], [3.0, 0.0]]
    energies, _ = evaluate(model, weights, only_layout(model, prepare(model, structures, states)))
    singles = [
        evaluate(model, weights, only_layout(model, prepare(model, [atoms], [state])))[0]
        for atoms, state in zip(structures, states, strict=True)
    ]
    torch.testing.assert_close(energies, torch.cat(singles), rtol=1e-13, atol=1e-13)
    swapped, _ = evaluate(model, weights, only_layout(model, prepare(model, structures, states[::-1])))
    assert ((energies - swapped).abs() > 1e-3).all()


def test_weights_that_no_layer_reads_are_left_out() -> None:
    def layers_with(name: str, repflow: dict[str, Any]) -> list[int]:
        model = build(repflow)
        (group,) = model.prepare(draw(model))
        return [k for k in range(3) if any(f".layers.{k}.{name}" in key for key in group)]

    assert layers_with("node_edge_linear", {}) == [0, 1, 2]
    assert layers_with("edge_self_linear", {}) == [0, 1]
    assert layers_with("edge_angle_linear1", {}) == [0, 1]
    assert layers_with("angle_self_linear", {}) == [0]
    assert layers_with("edge_angle_linear1", PLAIN) == []
    assert layers_with("angle_self_linear", SEQUENTIAL) == [0, 1, 2]


SIZES = {
    "no atoms": [],
    "one atom": [cluster(1)],
    "two atoms out of reach": [ase.Atoms("OH", [(0, 0, 0), (0, 0, 9.0)])],
    "two atoms without angles": [ase.Atoms("OH", [(0, 0, 0), (0, 0, 3.5)])],
    "two atoms": [ase.Atoms("OH", [(0, 0, 0), (0, 0, 1.0)])],
    "several structures": [cluster(7), cluster(1), cluster(12, seed=5)],
}


@pytest.mark.parametrize(
    "repflow", [DYNAMIC, SEQUENTIAL, AVERAGED, PLAIN], ids=["dynamic", "sequential", "averaged", "plain"]
)
def test_one_trace_serves_every_size(repflow: dict[str, Any]) -> None:
    model = build(repflow, activation_function="silut:2")
    (group,) = model.prepare(draw(model))
    names = sorted(group)
    displacements, tensors = model.arguments()

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        data, weights = values[: 1 + len(tensors)], dict(zip(names, values[1 + len(tensors) :], strict=True))
        return model.energies_and_gradients(data[:1], data[1:], weights)

    values = [group[name] for name in names]
    module, _ = trace(function, [*displacements, *tensors], values)
    targets = {str(node.target) for node in module.graph.nodes}
    assert not {t for t in targets if any(word in t for word in ("scatter", "index_add", "nonzero"))}
    for size, structures in SIZES.items():
        layout = only_layout(model, prepare(model, structures) if structures else no_atoms())
        data = (*layout.displacements, *layout.tensors)
        for got, expected in zip(module(*data, *values), function(*data, *values), strict=True):
            torch.testing.assert_close(
                got, expected, rtol=1e-12, atol=1e-12, msg=lambda text, s=size: f"{s}: {text}"
            )


@pytest.mark.parametrize("n_entries", [1, 60, 10_000])
@pytest.mark.parametrize(
    "repflow", [DYNAMIC, SEQUENTIAL, AVERAGED, PLAIN], ids=["dynamic", "sequential", "averaged", "plain"]
)
def test_in_parts_equals_at_once(
    repflow: dict[str, Any], n_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtinfer.models.dpa3._ENTRIES_OF_PART", n_entries)
    model = build(repflow, activation_function="silut:2", add_chg_spin_ebd=repflow is DYNAMIC)
    (group,) = model.prepare(draw(model))
    for name in ("one atom", "two atoms out of reach", "two atoms without angles", "several structures"):
        layout = only_layout(model, prepare(model, SIZES[name]))
        arguments = (layout.displacements, layout.tensors, group)
        pairs = zip(
            model.in_parts(*arguments, directly), model.energies_and_gradients(*arguments), strict=True
        )
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_a_large_structure_is_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(DYNAMIC)
    layout = only_layout(model, prepare(model, [cluster(12)]))
    assert not model.is_large(layout)
    monkeypatch.setattr("mtinfer.models.dpa3._LARGE", 1000)
    assert model.is_large(layout)


def test_a_potential_gives_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    potential = mtinfer.load(DATA / "reference/checkpoints/dpa3-shared-pt.pt", device="cpu", compile=False)
    atoms = reference_structures(DATA / "reference")[0]
    expected = potential.evaluate(atoms, "water")
    monkeypatch.setattr("mtinfer.models.dpa3._LARGE", 0)
    monkeypatch.setattr("mtinfer.models.dpa3._ENTRIES_OF_PART", 100)
    monkeypatch.setattr(potential.head("water").graph, "function", None)  # not called
    got = potential.evaluate(atoms, "water")
    assert got.energy == pytest.approx(expected.energy, abs=1e-5)
    np.testing.assert_allclose(got.forces, expected.forces, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.virial, expected.virial, rtol=0, atol=1e-4)


def no_atoms() -> GraphInputs:
    index, vectors = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64)
    nothing = torch.zeros(0, 0, dtype=torch.float64)
    return GraphInputs(index, index, index, index, vectors, nothing, nothing, vectors[:, :2], [])


@pytest.mark.parametrize(
    "repflow", [DYNAMIC, SEQUENTIAL, AVERAGED, PLAIN], ids=["dynamic", "sequential", "averaged", "plain"]
)
def test_gradients_of_the_energy_and_of_a_force_loss(repflow: dict[str, Any]) -> None:
    model = build(repflow)
    weights, layout = draw(model), only_layout(model, prepare(model, [cluster(5, box=2.5)]))
    varied = {name: w for name, w in weights.items() if name.endswith((".w", ".b", "residual.0"))}
    generator = torch.Generator().manual_seed(2)
    along = {name: torch.randn(w.shape, dtype=w.dtype, generator=generator) for name, w in varied.items()}
    vectors = torch.randn(layout.displacements[0].shape, dtype=torch.float64, generator=generator)

    def energy(t: float) -> Tensor:
        moved = replace(layout, displacements=(layout.displacements[0] + t * vectors,))
        return evaluate(model, weights, moved)[0].sum()

    def loss(own: dict[str, Tensor]) -> Tensor:
        return (evaluate(model, weights | own, layout)[1] ** 2).sum()

    step = 1e-5
    (gradient,) = evaluate(model, weights, layout)[1:]
    slope = (energy(step) - energy(-step)) / (2 * step)
    torch.testing.assert_close((gradient * vectors).sum(), slope, rtol=1e-7, atol=1e-8)
    leaves = {name: w.detach().requires_grad_(True) for name, w in varied.items()}
    of_loss = torch.autograd.grad(loss(leaves), tuple(leaves.values()), materialize_grads=True)
    analytic = sum((g * along[name]).sum() for name, g in zip(leaves, of_loss, strict=True))
    up, down = (
        loss({name: w + sign * step * along[name] for name, w in varied.items()}) for sign in (1.0, -1.0)
    )
    torch.testing.assert_close(analytic, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)
