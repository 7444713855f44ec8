"""Statistics of the data, compared with those of deepmd-kit 3.2.0 (tests/data/make_statistics.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from tiny_inputs import DESCRIPTORS, FITTING, FRAMES, SYSTEMS, plan_of, shared_input, training_input
from torch import Tensor

from mtinfer.checkpoint.dialects import canonical_name
from mtinfer.data import Frame
from mtinfer.data.frame import make_frame
from mtinfer.train.plan import Plan
from mtinfer.train.sampling import System
from mtinfer.train.statistics import (
    collect,
    energy_bias,
    mean_and_std,
    merged,
    parameter_weights,
    times_drawn,
)
from mtinfer.train.weights import initial_weights, set_statistics

STORED = Path(__file__).parents[1] / "data" / "training" / "statistics.json"
#: relative to the number where that is larger than 1
TOLERANCE = 1e-10


def _stored() -> dict[str, Any]:
    return dict(json.loads(STORED.read_text()))


def _statistics(plan: Plan) -> dict[str, dict[str, Tensor]]:
    """Weights of a plan after its data set the statistics."""
    weights = initial_weights(plan)
    found = {
        task.name: collect(task.systems, task.model, task.config.model, dialect=plan.dialect)
        for task in plan.tasks
    }
    set_statistics(weights, plan, found)
    return weights


@pytest.mark.parametrize("dialect", ["pt", "pt_expt"])
@pytest.mark.parametrize("kind", ["se_e2_a", "dpa1", "dpa2", "dpa3", "hybrid"])
def test_statistics_equal_those_of_deepmd_kit(
    kind: str, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FRAMES.parent))
    import make_statistics

    content = make_statistics.training_input(make_statistics.DESCRIPTORS[kind])
    weights = _statistics(plan_of(content, dialect=dialect))
    stored = _stored()[kind][dialect]
    assert set(stored) == set(weights)
    for head, entries in stored.items():
        for key, expected in entries.items():
            name = str(canonical_name(dialect, key))
            got = weights[head][name]
            rows = got[:, 0] if got.dim() == 3 and got.shape[0] > 1 else got.reshape(-1)
            np.testing.assert_allclose(
                rows, expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{head} {name}"
            )
    assert any(np.abs(entries[key]).max() > 0.1 for entries in stored.values() for key in entries)


def test_a_head_that_is_never_drawn_counts_for_no_other() -> None:
    weights = _statistics(
        plan_of(shared_input("dpa1strip", fitting=True, model_prob={"clusters": 0, "copper": 1}))
    )
    alone = shared_input("dpa1strip")
    alone["model"]["model_dict"] = {"copper": alone["model"]["model_dict"]["copper"]}
    for section in (alone["loss_dict"], alone["training"]["data_dict"], alone["training"]["model_prob"]):
        del section["clusters"]
    expected = _statistics(plan_of(alone))["copper"]
    for head in ("clusters", "copper"):
        for name in ("mean", "stddev"):
            full = f"descriptor.se_atten.{name}"
            torch.testing.assert_close(weights[head][full], expected[full])


def test_heads_that_share_the_type_embedding_alone_have_statistics_of_their_own_data() -> None:
    fittings = dict.fromkeys(SYSTEMS, FITTING)
    linked = _statistics(plan_of(training_input({"clusters": "desc", "copper": "desc:1"}, fittings)))
    alone = _statistics(plan_of(training_input(dict.fromkeys(SYSTEMS, DESCRIPTORS["dpa1strip"]), fittings)))
    name = "descriptor.se_atten.stddev"
    for head in SYSTEMS:
        assert torch.equal(linked[head][name], alone[head][name])
    assert not torch.allclose(linked["clusters"][name], linked["copper"][name])


@pytest.mark.parametrize("zero", [{"repinit"}, {"repformer"}])
def test_each_block_of_dpa2_has_a_mean_of_zero_by_its_own_option(zero: set[str]) -> None:
    content = shared_input("dpa2")
    descriptor = content["model"]["shared_dict"]["desc"]
    descriptor["repinit"] |= {"use_three_body": True, "three_body_sel": 10, "three_body_rcut": 3.0}
    for part in ("repinit", "repformer"):
        descriptor[part]["set_davg_zero"] = part in zero
    weights = _statistics(plan_of(content))["copper"]
    blocks = {"repinit": "repinit", "repinit_three_body": "repinit", "repformers": "repformer"}
    for block, part in blocks.items():
        assert bool(weights[f"descriptor.{block}.mean"].any()) == (part not in zero), block


@pytest.mark.parametrize(
    ("n_frames", "batch_size", "n_batches", "pt", "pt_expt"),
    [
        (3, 1, 2, [1, 1, 0], [1, 1, 0]),
        (3, 1, 6, [1, 1, 1], [2, 2, 2]),
        (3, 1, 7, [1, 1, 1], [3, 2, 2]),
        (3, 2, 2, [1, 1, 1], [2, 1, 1]),
        (2, 8, 3, [1, 1], [3, 3]),
    ],
)
def test_frames_count_as_often_as_they_are_drawn(
    n_frames: int, batch_size: int, n_batches: int, pt: list[int], pt_expt: list[int]
) -> None:
    system = System((_frame("H", None),) * n_frames, batch_size)
    assert times_drawn(system, n_batches, "pt") == pt
    assert times_drawn(system, n_batches, "pt_expt") == pt_expt


def test_parameters_count_as_often_as_their_frames() -> None:
    content = shared_input("dpa1strip")
    task = content["model"]["model_dict"]["copper"]
    task |= {"fitting_net": {**FITTING, "numb_fparam": 1, "default_fparam": [2.0]}, "data_stat_nbatch": 4}
    plan = plan_of(content)
    found = {
        dialect: collect(
            plan.tasks[1].systems, plan.tasks[1].model, plan.tasks[1].config.model, dialect=dialect
        )
        for dialect in ("pt", "pt_expt")
    }
    # systems of one and two frames
    assert found["pt"].fparam.tolist() == [[3.0, 6.0, 12.0]]
    assert found["pt_expt"].fparam.tolist() == [[8.0, 16.0, 32.0]]


def _frame(symbols: str, energy: float | None) -> Frame:
    atoms = Atoms(symbols, positions=np.arange(3.0 * len(Atoms(symbols))).reshape(-1, 3))
    labels = {} if energy is None else {"energy": energy}
    return make_frame(atoms, labels, dataset="", source="", index=0)


def test_energy_bias_is_the_least_squares_solution() -> None:
    frames = [_frame("H2O", -4.0), _frame("H4O", -6.0), _frame("HO", None), _frame("OH2", -4.4)]
    bias, std = energy_bias(frames, ["H", "O", "Cu"])
    np.testing.assert_allclose(bias[0, :, 0], [-0.9, -2.4, 0.0], atol=1e-12)
    assert std[0, 0, 0] == pytest.approx(np.std([0.2, 0.0, -0.2]))


def test_a_preset_energy_bias_is_kept() -> None:
    frames = [_frame("H2O", -4.0), _frame("H4O", -6.5)]
    bias, _ = energy_bias(frames, ["H", "O"], {"energy": [None, -2.0]})
    assert bias[0, 1, 0] == -2.0
    assert bias[0, 0, 0] == pytest.approx((2 * -2.0 + 4 * -4.5) / 20)


def test_a_preset_energy_bias_is_that_of_the_new_model() -> None:
    content = shared_input("dpa1strip")
    free = _statistics(plan_of(content))
    content["model"]["model_dict"]["clusters"]["preset_out_bias"] = {"energy": [None, -10.0, None]}
    weights = _statistics(plan_of(content))
    bias, of_data = (own["clusters"]["out_bias"].flatten() for own in (weights, free))
    assert float(bias[1]) == -10.0
    assert [abs(float(change)) > 0.1 for change in bias - of_data] == [True, True, False]
    assert torch.equal(weights["copper"]["out_bias"], free["copper"]["out_bias"])


def test_atoms_of_excluded_types_take_no_energy() -> None:
    frames = [_frame("H2O", -4.0), _frame("H4O", -6.0), _frame("H2O2", -9.0)]
    bias, std = energy_bias(frames, ["H", "O"], excluded=[0])
    np.testing.assert_allclose(bias[0, :, 0], [0.0, (-4.0 - 6.0 - 2 * 9.0) / 6], atol=1e-12)
    assert std[0, 0, 0] == pytest.approx(np.std([-4.0 + 28 / 6, -6.0 + 28 / 6, -9.0 + 2 * 28 / 6]))
    preset, _ = energy_bias(frames, ["H", "O"], {"energy": [-1.0, None]}, excluded=[0])
    np.testing.assert_allclose(preset[0, :, 0], [-1.0, bias[0, 1, 0]])  # kept, without effect


def test_merged_sums_are_weighted_by_probability() -> None:
    base, link = torch.tensor([2.0, 6.0, 20.0]), torch.tensor([4.0, 4.0, 8.0])
    torch.testing.assert_close(merged([base, link], [0.25, 0.5]), base + 2.0 * link)
    torch.testing.assert_close(base, torch.tensor([2.0, 6.0, 20.0]))  # untouched
    torch.testing.assert_close(merged([base, link], [0.0, 0.5]), link)
    torch.testing.assert_close(merged([base, link, link], [0.0, 0.25, 0.75]), link)
    torch.testing.assert_close(mean_and_std(merged([base, link], [0.0, 0.0])), mean_and_std(base + link))


def test_standard_deviations_have_a_floor() -> None:
    sums = torch.tensor([[4.0, 4.0, 4.0], [0.0, 0.0, 0.0], [2.0, 4.0, 10.0]], dtype=torch.float64)
    mean, std = mean_and_std(sums)
    torch.testing.assert_close(mean, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(std, torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64))


def test_frame_parameters_are_standardised() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    sums = torch.stack([torch.full((2,), 2.0), values.sum(0), (values**2).sum(0)], dim=1).to(torch.float64)
    weights = parameter_weights("fparam", sums, torch.float64)
    torch.testing.assert_close(weights["fitting_net.fparam_avg"], torch.tensor([2.0, 5.0]).double())
    torch.testing.assert_close(weights["fitting_net.fparam_inv_std"], torch.tensor([1.0, 100.0]).double())


def test_the_smallest_distance_of_the_data_is_found() -> None:
    plan = plan_of(shared_input("dpa1strip"))
    found = collect(plan.tasks[0].systems, plan.tasks[0].model, plan.tasks[0].config.model)
    frames = [frame for system in plan.tasks[0].systems for frame in system.frames]
    distances = [frame.atoms.get_all_distances() + 9.0 * np.eye(len(frame.atoms)) for frame in frames]
    assert found.min_distance == pytest.approx(min(d.min() for d in distances))
    assert list(SYSTEMS) == [task.name for task in plan.tasks]
