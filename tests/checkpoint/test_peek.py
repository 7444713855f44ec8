"""Metadata without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    COMPILED,
    DATA,
    SAMPLE_FILES,
    SEPARATE,
    SHARED,
    TASK_BUFFERS,
    Content,
    file_id,
    head_configs,
)

from mtinfer.checkpoint import archive
from mtinfer.checkpoint.describe import describe, file_size
from mtinfer.checkpoint.load import read
from mtinfer.checkpoint.peek import peek
from mtinfer.checkpoint.sharing import Share
from mtinfer.errors import CheckpointError

Writer = Callable[..., Path]


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=file_id)
def test_says_what_reading_gives(path: Path) -> None:
    info, checkpoint = peek(path), read(path)
    assert (info.dialect, info.step, info.has_debris) == (
        checkpoint.dialect,
        checkpoint.step,
        checkpoint.has_debris,
    )
    assert info.size == path.stat().st_size
    assert [head.name for head in info.heads] == list(checkpoint.heads)
    distinct = {}
    for head in info.heads:
        record = checkpoint.heads[head.name]
        assert head.aliases == record.aliases
        assert list(head.type_map) == record.config["type_map"]
        networks = {
            tensor.data_ptr(): tensor.numel()
            for name, tensor in record.weights.items()
            if name.startswith(("descriptor.", "fitting_net.nets."))
            and not name.endswith((".mean", ".stddev"))
        }
        assert head.parameters == sum(networks.values())
        distinct |= networks
        assert head.precision is not None
        fitting = record.weights["fitting_net.nets.0.layers.0.w"]
        assert f"torch.{head.precision['fitting_net']}" == str(fitting.dtype)
    assert info.parameters == sum(distinct.values())


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=file_id)
def test_says_the_same_of_a_converted_file(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "model.safetensors"
    archive.write(read(path), target)
    before, after = peek(path), peek(target)
    assert after.format == "converted"
    assert after.source is not None
    assert after.source["name"] == path.name
    assert after.size == target.stat().st_size
    for field in ("dialect", "step", "heads", "parameters", "shared"):
        assert getattr(after, field) == getattr(before, field)


def test_numbers_of_a_known_file() -> None:
    info = peek(SEPARATE)
    water = info.heads[0]
    assert (water.name, water.aliases, water.type_map) == ("water", ("H2O", "liquid"), ("H", "O", "Cu"))
    assert [head.observed_types for head in info.heads] == [("H", "O"), ("H", "O"), ("Cu",)]
    assert water.descriptor == {
        "type": "se_e2_a",
        "rcut": 5.0,
        "rcut_smth": 0.5,
        "sel": [60, 40, 80],
        "neuron": [8, 16],
        "axis_neuron": 4,
    }
    assert water.fitting_net["neuron"] == [24, 24, 24]
    assert water.precision == {"descriptor": "float64", "fitting_net": "float64"}
    # 3 embeddings of (1+1)·8 + (8+1)·16, 3 nets of (64+1)·24 + 2·((24+1)·24 + 24) + 24+1
    embeddings, nets = 3 * (2 * 8 + 9 * 16), 3 * (65 * 24 + 2 * (25 * 24 + 24) + 25)
    assert water.parameters == embeddings + nets
    assert info.parameters == embeddings + 3 * nets
    assert info.shared == (Share("descriptor", ("water", "clusters", "copper")),)


def test_shared_fitting_net_and_debris() -> None:
    everything = (Share("descriptor", ("water", "copper")), Share("fitting net", ("water", "copper")))
    assert peek(SHARED).shared == everything
    assert not peek(SHARED).has_debris
    for path in (COMPILED, TASK_BUFFERS):
        assert peek(path).has_debris
        assert peek(path).shared == everything
        assert [head.fitting_net["dim_case_embd"] for head in peek(path).heads] == [2, 2]


def test_hybrid_lists_its_members() -> None:
    for dialect in ("pt", "ptexpt"):
        head = peek(DATA / f"checkpoints/hybrid-{dialect}.pt").heads[0]
        assert [member["type"] for member in head.descriptor["members"]] == ["se_atten", "se_e2_a", "dpa2"]
        assert head.precision == {"descriptor": "float32 and float64", "fitting_net": "float64"}
        assert (head.fitting_net["numb_fparam"], head.fitting_net["numb_aparam"]) == (2, 1)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], ()),
        (["type_embedding"], (Share("type embedding", ("water", "ice")),)),
        (["type_embedding", "se_atten.filter_layers"], (Share("part of the descriptor", ("water", "ice")),)),
        (["type_embedding", "se_atten"], (Share("descriptor", ("water", "ice")),)),
        (["se_atten.mean"], ()),
        (["fitting_net.filter_layers"], (Share("fitting net", ("water", "ice")),)),
    ],
)
def test_levels_of_sharing(
    changed: Writer, tmp_path: Path, parts: list[str], expected: tuple[Share, ...]
) -> None:
    def change(content: Content) -> None:
        model = content["model"]
        for key in [key for key in model if key.startswith("model.ice.")]:
            if any(f".{part}." in f"{key}." for part in parts):
                model[key] = model[key.replace("model.ice.", "model.water.")]

    path = changed(DATA / "reference/variants/checkpoints/dpa1-pt.pt", change)
    assert peek(path).shared == expected
    archive.write(read(path), tmp_path / "model.safetensors")
    assert peek(tmp_path / "model.safetensors").shared == expected


def test_groups_of_sharing(changed: Writer) -> None:
    """Two heads share all of the descriptor, a third only its type embedding."""

    def change(content: Content) -> None:
        for key, tensor in content["model"].items():
            if key.startswith("model.copper.atomic_model.descriptor.se_atten."):
                content["model"][key] = tensor.clone()

    path = changed(DATA / "reference/checkpoints/dpa1-separate-pt.pt", change)
    assert peek(path).shared == (
        Share("descriptor", ("water", "clusters")),
        Share("type embedding", ("water", "clusters", "copper")),
    )


def test_head_that_can_not_be_evaluated(changed: Writer) -> None:
    def change(content: Content) -> None:
        head_configs(content)["copper"]["fitting_net"]["type"] = "polar"

    info = peek(changed(SEPARATE, change))
    copper = info.heads[2]
    assert (
        copper.refused
        == "head 'copper' uses a fitting net of type 'polar' (not an energy), which mtinfer does not evaluate"
    )
    assert (copper.parameters, copper.precision) == (None, None)
    assert [head.refused for head in info.heads[:2]] == [None, None]
    assert f"  copper    can't be evaluated: {copper.refused}" in describe(info)


def test_learning_rate_as_numpy_scalar(changed: Writer) -> None:
    numpy = pytest.importorskip("numpy")

    def change(content: Content) -> None:
        infos = content["model"]["_extra_state"]["train_infos"]
        infos.update(lr=numpy.float64(0.25), other=numpy.float32(0.5), big=numpy.dtype(">i8").type(3))

    assert peek(changed(SEPARATE, change)).step == 400


# --- the text -----------------------------------------------------------------------------------------------


def test_description() -> None:
    assert describe(peek(SEPARATE)) == [
        "se_e2_a-separate-pt.pt: training checkpoint, pt dialect, step 400, 844.7 kB",
        "parameters   25,977 in all",
        "type map     H O Cu",
        "descriptor   se_e2_a, float64:  rcut 5.0  rcut_smth 0.5  sel 60/40/80  neuron 8/16  axis_neuron 4",
        "fitting net  float64: neuron 24/24/24  tanh",
        "shared       descriptor: water, clusters, copper",
        "heads        3",
        "  water     8,979 parameters, trained on H O, also called H2O, liquid",
        "  clusters  8,979 parameters, trained on H O",
        "  copper    8,979 parameters, trained on Cu",
    ]


def test_description_says_what_differs(changed: Writer) -> None:
    def change(content: Content) -> None:
        head_configs(content)["copper"]["type_map"] = ["X"] * 30

    lines = describe(peek(changed(SEPARATE, change)))
    assert "type map     H O Cu (water, clusters)" in lines
    assert f"type map     {'X ' * 23}… X (30 elements) (copper)" in lines


def test_description_of_a_converted_file(tmp_path: Path) -> None:
    archive.write(read(COMPILED), tmp_path / "model.safetensors")
    lines = describe(peek(tmp_path / "model.safetensors"))
    assert lines[0].startswith("model.safetensors: converted checkpoint, pt_expt dialect, step 40, ")
    digest = read(tmp_path / "model.safetensors").source.sha256
    assert digest is not None
    assert lines[1] == f"made from    {COMPILED.name} (359.7 kB, sha256 {digest[:12]}…)"
    assert "with copies left by compiled graphs" in describe(peek(COMPILED))[0]


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=file_id)
def test_every_file_can_be_described(path: Path) -> None:
    info = peek(path)
    assert all(line and "\n" not in line for line in describe(info))
    assert json.loads(json.dumps(info.to_dict()))["heads"][0]["name"] == info.heads[0].name


def test_file_sizes() -> None:
    assert [file_size(size) for size in (0, 999, 1000, 2_619_049, 3_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.6 MB",
        "3.0 GB",
    ]


# --- without torch, at once ---------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from mtinfer.checkpoint.describe import describe
from mtinfer.checkpoint.peek import peek
describe(peek(sys.argv[1]))
assert not {"torch", "numpy", "safetensors"} & set(sys.modules), "a heavy import"
print(time.process_time())
"""


@pytest.mark.parametrize("kind", ["training", "converted"])
def test_is_fast_and_needs_no_torch(tmp_path: Path, kind: str) -> None:
    path = SEPARATE
    if kind == "converted":
        path = tmp_path / "model.safetensors"
        archive.write(read(SEPARATE), path)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    # processor time of the whole process, the best of several: the machine may be busy
    assert min(float(run.stdout) for run in runs) < 0.3


# --- bad input ----------------------------------------------------------------------------------------------


def raises_one_line(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        peek(path)
    assert "\n" not in str(info.value)


def test_code_is_not_run(malicious: tuple[Path, Path]) -> None:
    path, marker = malicious
    raises_one_line(path, r"contains code that would be run on loading \(posix.mkdir\) and was not read")
    assert not marker.exists()


def test_bad_files(tmp_path: Path) -> None:
    raises_one_line(tmp_path / "none.pt", "no such file")
    raises_one_line(tmp_path, "is a directory")
    path = tmp_path / "model.pt"
    path.write_bytes(b"")
    raises_one_line(path, "is empty")
    path.write_text("step 100 done\n")
    raises_one_line(path, "is not a checkpoint: it begins with")
    path.write_bytes(SEPARATE.read_bytes()[:50_000])
    raises_one_line(path, "truncated or damaged")
    torch.save(OrderedDict(a=torch.zeros(2)), path)
    raises_one_line(path, "it lacks the model with its configuration")


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02", b"\x80\x02}q\x00(", b"garbage", b"\x80\x02K\x01\x85R."]
)
def test_damaged_structure(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickled)
    raises_one_line(path, "is damaged: its pickled structure can't be read")


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "os.system",
        "torch.load",
        "torch.serialization.load",
        "numpy.load",
        "collections.Counter",
    ],
)
def test_names_outside_the_list_are_refused(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", f"c{module}\n{function}\n.".encode())
    raises_one_line(path, rf"contains code that would be run on loading \({name}\)")


def test_a_pickle_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:  # changes what stands for a storage, by pickle's BUILD
        file.writestr("model/data.pkl", b"ctorch\nDoubleStorage\n}Vdtype\nVevil\nsb.")
    before = peek(SEPARATE)
    with pytest.raises(CheckpointError):
        peek(path)
    assert peek(SEPARATE) == before


def test_unknown_weight_and_ambiguous_dialect(changed: Writer) -> None:
    def unknown(content: Content) -> None:
        content["model"]["model.copper.atomic_model.surprise"] = torch.zeros(1)

    def ambiguous(content: Content) -> None:
        content["model"]["model.copper.atomic_model.surprise.w"] = torch.zeros(1)

    def text(content: Content) -> None:
        content["model"]["model.copper.atomic_model.note"] = "hello"

    raises_one_line(
        changed(SEPARATE, unknown), "head 'copper' has the unknown weight 'atomic_model.surprise'"
    )
    raises_one_line(changed(SEPARATE, ambiguous), "ambiguous dialect")
    raises_one_line(changed(SEPARATE, text), "'model.copper.atomic_model.note' is a str, expected a tensor")


def test_broken_converted_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    archive.write(read(SEPARATE), path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    raises_one_line(path, "is truncated or damaged: its size differs")
    path.write_bytes(data[:100])
    raises_one_line(path, "is truncated or damaged: its header is not valid")
    os.truncate(path, 0)
    raises_one_line(path, "is empty")
