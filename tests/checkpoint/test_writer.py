"""`convert --to pt|pt_expt`: what a configuration leaves out, or spells in another way, changes no number."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from checkpoint_files import DATA, SEPARATE, SHARED, file_id, rename_heads, single_task

import mtinfer
from mtinfer.checkpoint.load import read
from mtinfer.checkpoint.writer import convert, write_content
from mtinfer.descriptor_kinds import DESCRIPTOR_TYPES, KINDS, kind_of
from mtinfer.errors import OutputError, UnsupportedModelError
from mtinfer.models.energy import _DESCRIPTORS
from mtinfer.random_checkpoint import write_random_checkpoint

Config = dict[str, Any]
OTHER = {"pt": "pt_expt", "pt_expt": "pt"}
TYPE_MAP = ["H", "O", "Cu"]

# Widths are left out wherever they have a default. The lists are too short for `atoms`, so that it matters
# which neighbours are in them.
CUTOFF: Config = {"rcut": 4.0, "rcut_smth": 1.0}
SE_A: Config = {"type": "se_a", **CUTOFF, "sel": [9, 6, 10]}
DPA1: Config = {"type": "dpa1", **CUTOFF, "sel": 14, "attn": 5, "attn_layer": 1}
DPA2: Config = {
    "type": "dpa2",
    "repinit": {**CUTOFF, "nsel": 16, "neuron": [2, 4], "axis_neuron": 3, "tebd_dim": 4},
    "repformer": {
        **{"rcut": 3.0, "rcut_smth": 1.5, "nsel": 8, "nlayers": 2},
        **{"g1_dim": 8, "g2_dim": 5, "axis_neuron": 2},
        **{"attn1_hidden": 3, "attn1_nhead": 2, "attn2_hidden": 4, "attn2_nhead": 3},
    },
}
THREE_BODY: Config = {"use_three_body": True, "three_body_sel": 10}
DPA3: Config = {
    "type": "dpa3",
    "repflow": {
        **{"n_dim": 8, "e_dim": 6, "a_dim": 4, "nlayers": 2, "axis_neuron": 2},
        **{"e_rcut": 4.0, "e_rcut_smth": 2.5, "e_sel": 16, "a_rcut": 3.0, "a_rcut_smth": 2.0, "a_sel": 8},
    },
}


def hybrid(*members: Config) -> Config:
    return {"type": "hybrid", "list": [*members]}


DESCRIPTORS: dict[str, Config] = {
    "untyped": {key: value for key, value in SE_A.items() if key != "type"},
    "se_a": SE_A,
    "n_axis_neuron": SE_A | {"n_axis_neuron": 4},
    "dpa1": DPA1,
    "v2": DPA1 | {"type": "se_atten_v2"},
    "dpa2": DPA2,
    "dpa2-three-body": DPA2 | {"repinit": DPA2["repinit"] | THREE_BODY},
    "dpa3": DPA3,
    "dpa3-no-angles": DPA3 | {"repflow": DPA3["repflow"] | {"update_angle": False}},
    "hybrid-se_a": hybrid(SE_A | {"sel": [4, 4, 4]}, SE_A | {"rcut": 3.0, "sel": [3, 5, 3]}),
    "hybrid-dpa1": hybrid(SE_A, DPA1),
    "hybrid-all": hybrid(DPA2, DPA3, DPA1 | {"type": "se_atten_v2"}, SE_A, SE_A | {"sel": [3, 9, 5]}),
}
VARIANTS = DATA / "variants/checkpoints"
#: each head leaves out types of its own, and `ice` shares the fitting net of `water`
OWN_MASK = VARIANTS / "v2-ptexpt.pt"
#: the neighbour list changes when a file of this dialect is converted
CHANGED = [("v2", "pt"), ("v2", "pt_expt"), ("dpa1", "pt_expt"), ("dpa2", "pt_expt")]
#: the shorter lists change with them where pairs are excluded, in either direction
CUT_AFTER_EXCLUSION = ("dpa2", "dpa2-three-body", "dpa3", "hybrid-dpa1", "hybrid-all")


def converted(
    folder: Path, descriptor: Config, source: str, **head: Any
) -> tuple[tuple[Path, Path], list[str]]:
    """Checkpoint with random weights, what it is converted to, and the notes of the conversion."""
    before, after = folder / "before.pt", folder / "after.pt"
    config = {"type_map": TYPE_MAP, "descriptor": descriptor, "fitting_net": {}, **head}
    write_random_checkpoint(before, config, dialect=source)
    _, notes = convert(read(before), after, OTHER[source], force=True)
    return (before, after), notes


def difference(paths: tuple[Path, Path]) -> float:
    """Largest one between what two files predict, eV or eV/Å."""
    corners = np.array(list(itertools.product(range(3), repeat=3)))[:12] / 3
    positions = 5.6 * corners + np.random.default_rng(3).uniform(-0.3, 0.3, (12, 3))
    atoms = ase.Atoms([TYPE_MAP[i % 3] for i in range(12)], positions, cell=[5.6] * 3, pbc=True)
    one, other = (mtinfer.load(path, compile="off").evaluate(atoms, "water") for path in paths)
    fields = ("energy", "forces", "virial")
    return max(float(np.abs(getattr(one, name) - getattr(other, name)).max()) for name in fields)


def stored(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)["model"]
    return {key: value for key, value in content.items() if key != "_extra_state"}


@pytest.mark.filterwarnings("ignore::mtinfer.errors.PredictionWarning")
@pytest.mark.parametrize("excluded", [[], [[0, 1]]], ids=["all-pairs", "excluded-pairs"])
@pytest.mark.parametrize("source", OTHER)
@pytest.mark.parametrize("name", DESCRIPTORS)
def test_numbers_stay_or_their_change_is_told(
    tmp_path: Path, name: str, source: str, excluded: list[list[int]]
) -> None:
    paths, notes = converted(tmp_path, DESCRIPTORS[name], source, pair_exclude_types=excluded)
    if (name, source) in CHANGED:
        expected = ["pt_expt does neither"]
    else:
        expected = ["excluded pairs"] if excluded and name in CUT_AFTER_EXCLUSION else []
    assert [text in note for text, note in zip(expected, notes, strict=True)] == [True] * len(expected)
    assert difference(paths) > 1e-7 if expected else difference(paths) < 1e-12


@pytest.mark.parametrize("source", OTHER)
@pytest.mark.parametrize(
    "aliased", [SE_A, DPA1, hybrid(SE_A, SE_A | {"sel": [3, 5, 12]}), hybrid(SE_A, DPA1)]
)
def test_an_alias_is_written_as_its_kind(tmp_path: Path, aliased: Config, source: str) -> None:
    plain = {**aliased, "type": kind_of(aliased)}
    if "list" in aliased:
        plain["list"] = [{**member, "type": kind_of(member)} for member in aliased["list"]]
    files = []
    for name, descriptor in (("aliased", aliased), ("plain", plain)):
        (tmp_path / name).mkdir()
        files.append([stored(path) for path in converted(tmp_path / name, descriptor, source)[0]])
    for one, other in zip(*files, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(("name", "flags"), [("dpa1", 1), ("dpa2", 1), ("v2", 0), ("dpa3", 0), ("se_a", 0)])
def test_the_neighbour_list_of_pt_is_kept_where_a_file_can_say_so(
    tmp_path: Path, name: str, flags: int
) -> None:
    (_, after), _ = converted(tmp_path, DESCRIPTORS[name], "pt")
    values = [bool(tensor) for key, tensor in stored(after).items() if key.endswith(".graph_lower_disabled")]
    assert values == [True] * flags


@pytest.mark.parametrize("others", [(), (DPA1,)], ids=["by-type", "with-dpa1"])
def test_members_of_a_hybrid_read_their_slots(tmp_path: Path, others: tuple[Config, ...]) -> None:
    members = (SE_A | {"sel": [1, 3, 2]}, SE_A | {"sel": [2, 1, 2]}, *others)
    (_, after), _ = converted(tmp_path, hybrid(*members), "pt")
    key = "model.water.atomic_model.descriptor.nlist_cut_idx"
    # common list: two slots of H, three of O, two of Cu
    assert stored(after)[f"{key}.0"].tolist() == [0, 2, 3, 4, 5, 6]
    assert stored(after)[f"{key}.1"].tolist() == [0, 1, 2, 5, 6]
    for index in range(len(others)):
        assert stored(after)[f"{key}.{2 + index}"].tolist() == [*range(14)]


def test_every_kind_has_a_model() -> None:
    assert KINDS.keys() == _DESCRIPTORS.keys() == set(DESCRIPTOR_TYPES.values())


def test_the_same_content_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one.pt", "other.pt"):
        write_content(tmp_path / name, {"model": {"w": torch.arange(3.0)}})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


# --- what a file of pt_expt holds besides weights -----------------------------------------------------------


@pytest.mark.parametrize("source", OTHER)
@pytest.mark.parametrize(
    ("head", "atoms", "pairs", "fitting"),
    [
        ({}, None, None, [1, 1, 1]),
        # H-O, either way round, in a table of four by four: three types and what no type is
        (
            {"atom_exclude_types": [1], "pair_exclude_types": [[0, 1]]},
            [1, 0, 1],
            [1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [1, 0, 1],
        ),
    ],
    ids=["nothing-excluded", "excluded"],
)
def test_masks_are_0_where_something_is_excluded(
    tmp_path: Path,
    source: str,
    head: Config,
    atoms: list[int] | None,
    pairs: list[int] | None,
    fitting: list[int],
) -> None:
    paths, _ = converted(tmp_path, DPA1 | {"exclude_types": [[2, 0]]}, source, **head)
    masks = {
        key.removeprefix("model.water.atomic_model."): (tensor.dtype, tensor.tolist())
        for key, tensor in stored(paths[source == "pt"]).items()
        if "mask" in key
    }
    expected = {
        "fitting_net.emask.type_mask": fitting,
        "descriptor.se_atten.emask.type_mask": [1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
    }
    if atoms and pairs:
        expected |= {"atom_excl.type_mask": atoms, "pair_excl.type_mask": pairs}
    assert masks == {key: (torch.int32, mask) for key, mask in expected.items()}


@pytest.mark.parametrize(
    "path", [OWN_MASK, VARIANTS / "dpa2x-ptexpt.pt", DATA / "checkpoints/hybrid-ptexpt.pt"], ids=file_id
)
def test_masks_are_those_of_deepmd_kit(tmp_path: Path, path: Path) -> None:
    convert(read(path), tmp_path / "again.pt", "pt_expt")
    given, again = (
        {key: (tensor.dtype, tensor.tolist()) for key, tensor in stored(file).items() if "mask" in key}
        for file in (path, tmp_path / "again.pt")
    )
    assert again == given
    assert any(0 in mask for _, mask in given.values())


def test_types_that_a_fitting_net_alone_leaves_out_can_not_be_written_for_pt(tmp_path: Path) -> None:
    source, target = read(OWN_MASK), tmp_path / "model.pt"
    for heads in (None, ["ice"]):
        with pytest.raises(UnsupportedModelError, match=r"head 'ice': its fitting net leaves out .*\[1\]"):
            convert(source, target, "pt", heads=heads)
        assert not target.exists()
    written, _ = convert(source, target, "pt", heads=["water"])
    assert written == ("water",)
    convert(source, target, "pt_expt", heads=["ice"], force=True)
    masks = stored(target)
    # trained with the mask of `water`, whose fitting net it shares
    assert masks["model.ice.atomic_model.fitting_net.emask.type_mask"].tolist() == [1, 0, 1]
    assert masks["model.ice.atomic_model.atom_excl.type_mask"].tolist() == [0, 1, 0]


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", OTHER)
def test_the_checkpoint_itself_is_never_replaced(tmp_path: Path, dialect: str) -> None:
    source = Path(shutil.copy(SEPARATE, tmp_path / "model.pt"))
    link, hard_link = tmp_path / "newest.pt", tmp_path / "same.pt"
    link.symlink_to(source)
    hard_link.hardlink_to(source)
    for checkpoint, target in [(source, source), (source, link), (link, source), (source, hard_link)]:
        with pytest.raises(OutputError, match="is the file to convert and is not replaced"):
            convert(read(checkpoint), target, dialect, force=True)
    assert source.read_bytes() == SEPARATE.read_bytes()


def test_a_head_of_several_stays_one_of_several_whatever_its_name(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    source = changed(SHARED, lambda content: rename_heads(content, {"water": "Default"}))
    for heads in (["Default"], None):
        convert(read(source), tmp_path / "model.pt", "pt_expt", heads=heads, force=True)
        written = torch.load(tmp_path / "model.pt", weights_only=True)["model"]["_extra_state"]
        assert list(written["model_params"]["model_dict"]) == (heads or ["Default", "copper"])


@pytest.mark.parametrize("dialect", OTHER)
def test_the_file_of_a_single_task_stays_one(
    changed: Callable[..., Path], tmp_path: Path, dialect: str
) -> None:
    source = changed(SEPARATE, lambda content: single_task(content, "copper", "model.Default."))
    convert(read(source), tmp_path / "model.pt", dialect)
    written = torch.load(tmp_path / "model.pt", weights_only=True)["model"]["_extra_state"]
    assert written["model_params"]["type_map"] == TYPE_MAP
    assert "model_dict" not in written["model_params"]
    assert list(read(tmp_path / "model.pt").heads) == ["Default"]
