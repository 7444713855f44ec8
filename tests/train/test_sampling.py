"""What a step sees depends on seed and step alone."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import ase
import numpy as np
import pytest
from tiny_inputs import SYSTEMS, plan_of, shared_input

from mtinfer.data.frame import Frame
from mtinfer.errors import ConfigError, DataError
from mtinfer.train.batch import make_batch
from mtinfer.train.config import DataConfig
from mtinfer.train.plan import Plan
from mtinfer.train.sampling import (
    Batches,
    Sampler,
    System,
    _batch_size,
    batches_per_epoch,
    system_probabilities,
)


def sampler_of(plan: Plan, rank: int = 0, n_ranks: int = 1, drawn: list[list[int]] | None = None) -> Sampler:
    tasks = [(task.systems, task.system_probabilities) for task in plan.tasks]
    return Sampler(7, tasks, plan.probabilities, rank, n_ranks, drawn=drawn or [])


def test_a_resumed_sampler_goes_on() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    whole, first = sampler_of(plan), sampler_of(plan)
    expected = [whole.draw(step) for step in range(30)]
    got = [first.draw(step) for step in range(13)]
    second = sampler_of(plan, drawn=[list(row) for row in first.drawn])
    assert got + [second.draw(step) for step in range(13, 30)] == expected


def test_tasks_and_systems_are_those_that_numpy_chooses() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    sampler = sampler_of(plan)
    for step in range(200):
        generator = np.random.default_rng((7, 1, step))
        task = generator.choice(len(plan.tasks), p=plan.probabilities)
        probabilities = plan.tasks[task].system_probabilities
        assert sampler.draw(step)[:2] == (task, generator.choice(len(probabilities), p=probabilities))


def test_every_frame_is_seen_once_per_pass() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    sampler = sampler_of(plan)
    seen = Counter(draw for draw in (sampler.draw(step) for step in range(400)))
    for task, systems in enumerate(sampler.drawn):
        for index, count in enumerate(systems):
            n = [seen[task, index, (k,)] for k in range(len(plan.tasks[task].systems[index].frames))]
            assert sum(n) == count
            assert max(n) - min(n) <= 1


def test_a_system_of_one_batch_is_prepared_once() -> None:
    content = shared_input("dpa1strip")
    for own in content["training"]["data_dict"].values():
        own["training_data"]["batch_size"] = 100
    plan = plan_of(content)
    sampler = sampler_of(plan)
    batches = Batches([task.model for task in plan.tasks])
    for step in range(60):
        task, index, chosen = sampler.draw(step)
        batches(task, index, plan.tasks[task].systems[index], chosen)
    assert len(batches._kept) == sum(len(task.systems) for task in plan.tasks)


def test_prepared_batches_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    task = plan_of(shared_input("dpa1strip")).tasks[0]
    system = task.systems[0]
    sizes = [make_batch([frame], task.model).n_bytes for frame in system.frames[:2]]
    monkeypatch.setattr("mtinfer.train.sampling._CACHE_BYTES", max(sizes))
    batches = Batches([task.model])
    made = [batches(0, 0, system, (k,)) for k in (0, 1, 0, 1)]
    assert len({id(batch) for batch in made}) == len(made)  # each made the one before go
    assert batches(0, 0, system, (1,)) is made[-1]
    assert list(batches._kept) == [(0, 0, (1,))]


def test_ranks_draw_one_system_and_share_its_batches() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    ranks = [sampler_of(plan, rank, 2) for rank in range(2)]
    for step in range(40):
        (task, index, mine), (other_task, other_index, others) = (rank.draw(step) for rank in ranks)
        assert (task, index) == (other_task, other_index)
        if len(plan.tasks[task].systems[index].frames) == 2:
            assert {*mine, *others} == {0, 1}


def test_tasks_are_drawn_by_their_probability() -> None:
    plan = plan_of(shared_input("dpa1strip", model_prob={"clusters": 3.0, "copper": 1.0}))
    sampler = sampler_of(plan)
    share = np.mean([sampler.draw(step)[0] == 0 for step in range(2000)])
    assert share == pytest.approx(0.75, abs=0.03)


def test_systems_are_weighted() -> None:
    systems = plan_of(shared_input("dpa1strip")).tasks[1].systems

    def probabilities(auto_prob: str, sys_probs: tuple[float, ...] | None = None) -> list[float]:
        config = DataConfig(("",), 1, auto_prob, sys_probs, "training_data")
        return system_probabilities(config, systems).tolist()

    n_batches = [system.n_batches for system in systems]
    assert probabilities("prob_sys_size") == pytest.approx([n / sum(n_batches) for n in n_batches])
    assert probabilities("prob_uniform") == [0.5, 0.5]
    assert probabilities("prob_sys_size;0:1:0.2;1:2:0.8") == pytest.approx([0.2, 0.8])
    assert probabilities("prob_sys_size; 0:1: .2; 1 : 2:8e-1") == pytest.approx([0.2, 0.8])
    assert probabilities("prob_uniform", (3.0, 1.0)) == [0.75, 0.25]


def systems_of(*n_frames: int) -> list[System]:
    """Systems of as many atoms, with one frame in a batch."""
    return [
        System(tuple(Frame(ase.Atoms("H"), None, None, None, "data", "data", k) for k in range(n)), 1)
        for n in n_frames
    ]


def test_systems_of_a_block_share_its_weight_by_their_batches() -> None:
    config = DataConfig(("",), 1, "prob_sys_size;0:2:0.5;2:4:0.3", None, "training_data")
    found = system_probabilities(config, systems_of(1, 3, 6, 4))
    assert found == pytest.approx(np.array([0.5 / 4, 1.5 / 4, 0.18, 0.12]) / 0.8)


@pytest.mark.parametrize(
    ("sys_probs", "n_steps"), [((0.5, 0.5, 0.0), 10), ((0.9, 0.1, 0.0), 20), ((1.0, 1.0, 1.0), 27)]
)
def test_an_epoch_is_as_long_as_the_system_that_takes_longest(
    sys_probs: tuple[float, ...], n_steps: int
) -> None:
    systems = systems_of(5, 2, 9)
    config = DataConfig(("",), 1, "prob_sys_size", sys_probs, "training_data")
    assert batches_per_epoch(systems, system_probabilities(config, systems)) == n_steps


def test_every_pass_over_a_system_has_an_order_of_its_own() -> None:
    sampler = Sampler(7, [(systems_of(8), np.ones(1))], np.ones(1))
    draws = [sampler.draw(step)[2] for step in range(32)]
    passes = [tuple(draws[start : start + 8]) for start in range(0, 32, 8)]
    assert [sorted(order) for order in passes] == [[(k,) for k in range(8)]] * 4
    assert len(set(passes)) == 4


def test_a_folder_of_systems_has_a_batch_size_for_each() -> None:
    content = shared_input("dpa1strip")
    data = content["training"]["data_dict"]["clusters"]["training_data"]
    data |= {"systems": str(Path(data["systems"][0]).parent), "batch_size": [1, 2, 3]}
    systems = plan_of(content).tasks[0].systems
    assert [(system.batch_size, len(system.frames[0].atoms)) for system in systems] == [
        (1, 3),
        (2, 6),
        (3, 9),
    ]


@pytest.mark.parametrize(
    ("given", "sizes"),
    # systems of 3, 6 and 9 atoms
    [("auto:10", [4, 2, 2]), ("max:10", [3, 1, 1]), ("max:6", [2, 1, 1]), ("filter:6", [2, 1])],
)
def test_batch_sizes_by_number_of_atoms(given: str, sizes: list[int]) -> None:
    content = shared_input("dpa1strip")
    content["training"]["data_dict"]["clusters"]["training_data"]["batch_size"] = given
    assert [system.batch_size for system in plan_of(content).tasks[0].systems] == sizes


def test_a_frame_without_volume_is_named_before_the_training(tmp_path: Path) -> None:
    shutil.copytree(SYSTEMS["copper"][0], tmp_path / "copper")
    cells = np.load(tmp_path / "copper" / "set.000" / "box.npy")
    cells[-1, 3:6] = 0.0
    np.save(tmp_path / "copper" / "set.000" / "box.npy", cells)
    content = shared_input("dpa1strip")
    content["training"]["data_dict"]["copper"]["training_data"]["systems"] = [str(tmp_path / "copper")]
    with pytest.raises(DataError, match=rf"copper.*{len(cells) - 1}.*has no volume along its periodic axes"):
        plan_of(content)


def test_a_filter_that_leaves_nothing_is_refused() -> None:
    content = shared_input("dpa1strip")
    content["training"]["data_dict"]["clusters"]["training_data"]["batch_size"] = "filter:2"
    with pytest.raises(ConfigError, match=r"'filter:2' leaves no frame of .*; give a larger number"):
        plan_of(content)


@pytest.mark.parametrize(("given", "n_frames"), [("auto:16", 2), ("max:20", 2)])
def test_frames_of_a_batch_count_as_large_as_the_largest(given: str, n_frames: int) -> None:
    """As in padded deepmd/npy systems (mixed_type)."""
    frames = [
        Frame(ase.Atoms("H" * n_atoms), None, None, None, "data", "data", k)
        for k, n_atoms in enumerate((6, 6, 9, 9))
    ]
    assert _batch_size(given, frames) == n_frames
