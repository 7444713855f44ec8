"""Converted files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    DATA,
    SAMPLE_FILES,
    SEPARATE,
    SHARED,
    Content,
    file_id,
    head_configs,
    rename_heads,
)
from safetensors.torch import load_file, save_file

from mtinfer.checkpoint import archive
from mtinfer.checkpoint.load import HeadRecord, read
from mtinfer.errors import CheckpointError, OutputError, UnknownHeadError, UnsupportedModelError

Writer = Callable[..., Path]
HYBRID = DATA / "checkpoints/hybrid-pt.pt"
FLOAT64_NAMES = {"out_bias", "out_std", "min_nbor_dist", "fitting_net.bias_atom_e"}


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    archive.write(read(SEPARATE), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def stored_text(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    text: dict[str, Any] = json.loads(header["__metadata__"]["mtinfer"])
    return text


def rewrite(path: Path, text: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    metadata = {"mtinfer": text if isinstance(text, str) else json.dumps(text)}
    save_file(load_file(path) if tensors is None else tensors, path, metadata)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_weights(a: HeadRecord, b: HeadRecord) -> None:
    assert list(a.weights) == list(b.weights)
    assert all(torch.equal(tensor, b.weights[name]) for name, tensor in a.weights.items())


# --- what comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=file_id)
def test_a_converted_file_gives_the_same_bits(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "model.safetensors"
    source = read(path)
    assert archive.write(source, target) == tuple(source.heads)
    result = read(target)
    assert (result.dialect, result.step, result.has_debris) == (source.dialect, source.step, False)
    assert list(result.heads) == list(source.heads)
    for name, record in source.heads.items():
        got = result.heads[name]
        assert (got.name, got.aliases, got.config) == (record.name, record.aliases, record.config)
        assert (got.graph_lower_disabled, got.refused) == (record.graph_lower_disabled, None)
        assert list(got.weights) == list(record.weights)
        for key, tensor in record.weights.items():
            assert got.weights[key].dtype == tensor.dtype
            assert torch.equal(bits(got.weights[key]), bits(tensor))
    assert result.source.name == path.name
    assert result.source.size == path.stat().st_size
    assert result.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert target.stat().st_size < path.stat().st_size


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=file_id)
def test_memory_is_shared_as_in_the_checkpoint(tmp_path: Path, path: Path) -> None:
    archive.write(read(path), tmp_path / "model.safetensors")
    for checkpoint in (read(path), read(tmp_path / "model.safetensors")):
        groups: dict[int, set[str]] = {}
        for name, record in checkpoint.heads.items():
            for key, tensor in record.weights.items():
                groups.setdefault(tensor.data_ptr(), set()).add(f"{name}/{key}")
        if path == checkpoint.path:
            expected = sorted(map(sorted, groups.values()))
    assert sorted(map(sorted, groups.values())) == expected


def test_distinct_tensors_are_stored_once(converted: Path) -> None:
    stored = load_file(converted)
    assert {key for key in stored if key.startswith("clusters/descriptor.")} == set()
    assert "water/descriptor.mean" in stored
    text = stored_text(converted)
    assert text["shared"]["copper/descriptor.mean"] == "water/descriptor.mean"
    # biases of zeros are equal by accident: stored once, but not the same weight
    assert text["equal"]["copper/fitting_net.bias_atom_e"] == "water/fitting_net.bias_atom_e"
    numbers = [(tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()) for tensor in stored.values()]
    assert len(set(numbers)) == len(numbers)


def test_copies_with_equal_numbers_are_stored_once(changed: Writer, tmp_path: Path) -> None:
    """A file that another program saved again may have lost its sharing."""

    def change(content: Content) -> None:
        model = content["model"]
        content["model"] = {
            key: value if key == "_extra_state" else value.clone() for key, value in model.items()
        }

    archive.write(read(SEPARATE), tmp_path / "a.safetensors")
    archive.write(read(changed(SEPARATE, change)), tmp_path / "b.safetensors")
    a, b = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert a.keys() == b.keys()


def test_weights_that_begin_at_one_address_are_different(tmp_path: Path) -> None:
    source, target = read(SEPARATE), tmp_path / "model.safetensors"
    weights = source.heads["water"].weights
    layer = "fitting_net.nets.0.layers.1"
    row = weights[f"{layer}.w"][0]
    head = replace(source.heads["water"], weights=weights | {f"{layer}.b": row})
    archive.write(replace(source, heads={"water": head}), target, dtype="float32")
    got = read(target).heads["water"].weights
    assert torch.equal(got[f"{layer}.b"], row.float())
    assert torch.equal(got[f"{layer}.w"], weights[f"{layer}.w"].float())


def test_same_input_same_bytes(converted: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    archive.write(read(SEPARATE), again)
    assert again.read_bytes() == converted.read_bytes()
    archive.write(read(converted), again, force=True)
    assert again.read_bytes() == converted.read_bytes()


def test_odd_head_names(changed: Writer, tmp_path: Path) -> None:
    names = {"water": "a/b", "clusters": "__metadata__", "copper": "a"}
    source = read(changed(SEPARATE, lambda content: rename_heads(content, names)))
    archive.write(source, tmp_path / "model.safetensors")
    result = read(tmp_path / "model.safetensors")
    assert list(result.heads) == list(names.values())
    for name, record in source.heads.items():
        assert_same_weights(record, result.heads[name])


# --- choices ------------------------------------------------------------------------------------------------


def test_heads_that_are_asked_for(tmp_path: Path) -> None:
    source = read(SEPARATE)
    target = tmp_path / "model.safetensors"
    assert archive.write(source, target, heads=["copper", "H2O", "water"]) == ("copper", "water")
    result = read(target)
    assert list(result.heads) == ["copper", "water"]
    for name, record in result.heads.items():
        assert_same_weights(record, source.heads[name])
    with pytest.raises(UnknownHeadError, match="no head 'iron'"):
        archive.write(source, tmp_path / "other.safetensors", heads=["iron"])
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("path", [SEPARATE, SHARED, HYBRID], ids=file_id)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_precision(tmp_path: Path, path: Path, dtype: Any) -> None:
    source = read(path)
    archive.write(source, tmp_path / "model.safetensors", dtype=dtype)
    result = read(tmp_path / "model.safetensors")
    for name, record in source.heads.items():
        got = result.heads[name]
        for key, tensor in record.weights.items():
            target = torch.float64 if key in FLOAT64_NAMES else getattr(torch, dtype)
            assert got.weights[key].dtype == target
            assert torch.equal(got.weights[key], tensor.to(target))
        descriptor = got.config["descriptor"]
        for part in (*descriptor.get("list", [descriptor]), got.config["fitting_net"]):
            assert part["precision"] == dtype
        assert record.config == read(path).heads[name].config  # the input is not changed


def test_refused_heads_are_left_out(changed: Writer, tmp_path: Path) -> None:
    def refuse_copper(content: Content) -> None:
        head_configs(content)["copper"]["lora"] = {"rank": 4}

    def refuse_all(content: Content) -> None:
        for config in head_configs(content).values():
            config["lora"] = {"rank": 4}

    source = read(changed(SEPARATE, refuse_copper))
    target = tmp_path / "model.safetensors"
    assert archive.write(source, target) == ("water", "clusters")
    with pytest.raises(UnsupportedModelError, match="head 'copper' uses a LoRA adapter"):
        archive.write(source, target, heads=["copper"], force=True)
    assert list(read(target).heads) == ["water", "clusters"]
    source = read(changed(SEPARATE, refuse_all))
    with pytest.raises(UnsupportedModelError, match=r"head 'water' uses a LoRA adapter.*head 'copper'"):
        archive.write(source, tmp_path / "none.safetensors")


# --- writing ------------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_text("precious")
    with pytest.raises(OutputError, match="exists and is kept; choose another path or pass --force"):
        archive.write(read(SEPARATE), target)
    assert target.read_text() == "precious"
    archive.write(read(SEPARATE), target, force=True)
    assert list(read(target).heads) == ["water", "clusters", "copper"]


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    source = Path(shutil.copy(SEPARATE, tmp_path / "model.pt"))
    link = tmp_path / "newest.pt"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(OutputError, match="is the file to convert and is not replaced"):
            archive.write(read(source), target, force=True)
    assert source.read_bytes() == SEPARATE.read_bytes()


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"folder .*none does not exist"):
        archive.write(read(SEPARATE), tmp_path / "none/model.safetensors")
    with pytest.raises(OutputError, match="exists and is not a regular file"):
        archive.write(read(SEPARATE), tmp_path, force=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    target = tmp_path / "model.safetensors"
    target.write_text("precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"mtinfer.checkpoint.archive.{step}", full)
    with pytest.raises(OutputError, match=r"model.safetensors: can't be written: .*No space left"):
        archive.write(read(SEPARATE), target, force=True)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert target.read_text() == "precious"


def test_source_that_vanished(tmp_path: Path) -> None:
    path = Path(shutil.copy(SEPARATE, tmp_path / "model.pt"))
    checkpoint = read(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        archive.write(checkpoint, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


# --- reading bad files --------------------------------------------------------------------------------------


def raises_one_line(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        read(path)
    assert "\n" not in str(info.value)


def test_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    raises_one_line(path, "is a safetensors file that mtinfer did not write")
    save_file({"weight": torch.zeros(3)}, path)
    raises_one_line(path, "is a safetensors file that mtinfer did not write")


@pytest.mark.parametrize("size", [9, 200, 60_000, -8])
def test_truncated_file(converted: Path, size: int) -> None:
    converted.write_bytes(converted.read_bytes()[:size])
    raises_one_line(converted, "is truncated or damaged")


def test_changed_weight(converted: Path) -> None:
    content = bytearray(converted.read_bytes())
    content[-1] ^= 1
    converted.write_bytes(content)
    raises_one_line(converted, "is damaged: its contents have another checksum; convert again")


def test_changed_configuration(converted: Path) -> None:
    text = stored_text(converted)
    text["heads"][0]["config"]["descriptor"]["rcut_smth"] += 0.1
    rewrite(converted, text)
    raises_one_line(converted, "is damaged: its contents have another checksum; convert again")


def test_changed_shape(converted: Path) -> None:
    tensors = load_file(converted)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and len({*tensor.shape}) == 2)
    tensors[name] = tensors[name].reshape(tensors[name].shape[::-1])
    rewrite(converted, stored_text(converted), tensors)
    raises_one_line(converted, "is damaged: its contents have another checksum; convert again")


def test_newer_schema(converted: Path) -> None:
    rewrite(converted, stored_text(converted) | {"schema": 3})
    raises_one_line(converted, "has schema version 3, this mtinfer reads 2")


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda text: text.update(schema="1"), "'schema' in the description .* is '1', expected int"),
    (lambda text: text.update(step="400"), "'step' in the description .* is '400', expected int"),
    (lambda text: text.update(step=True), "'step' in the description .* is True, expected int"),
    (lambda text: text.update(dialect="tf"), "has the dialect 'tf', expected pt or pt_expt"),
    (lambda text: text.update(heads={}), "'heads' in the description .* expected list"),
    (lambda text: text.update(heads=[]), "lists no heads"),
    (lambda text: text["heads"].append(text["heads"][0]), "lists no heads, or one twice"),
    (lambda text: text["heads"].append("ice"), "the head in .* is a str, expected an object"),
    (lambda text: text["heads"][0].update(aliases="H2O"), "'aliases' in the head"),
    (lambda text: text["heads"][0].update(aliases=[1]), "'aliases' in the head .* expected names"),
    (lambda text: text["heads"][1].update(aliases=["H2O"]), "alias 'H2O' of head 'clusters' clashes"),
    (lambda text: text["heads"][0].update(config=None), "'config' in the head .* is None, expected dict"),
    (lambda text: text["heads"][0].pop("graph_lower_disabled"), "'graph_lower_disabled' in the head"),
    (lambda text: text.pop("digest"), "'digest' in the description .* is None, expected str"),
    (lambda text: text["source"].pop("sha256"), "'sha256' in the source .* is None, expected str"),
    (lambda text: text["heads"].pop(), "has the weight 'copper/.*', that belongs to none of its heads"),
    (
        lambda text: text["shared"].update({"copper/x": "ice/x"}),
        "'copper/x' leads to 'ice/x', which is not stored",
    ),
    (
        lambda text: text["equal"].update({"copper/x": "ice/x"}),
        "'copper/x' leads to 'ice/x', which is not stored",
    ),
    (lambda text: text["equal"].update({"copper/x": 1}), "'equal' in .* leads to 1, expected a weight"),
    (
        lambda text: text["equal"].update({"water/out_bias": "copper/out_bias"}),
        "defines the weight 'water/out_bias' twice",
    ),
    (
        lambda text: text["shared"].update({"water/out_bias": "copper/out_bias"}),
        "defines the weight 'water/out_bias' twice",
    ),
    (
        lambda text: text["equal"].update({"copper/descriptor.mean": "water/descriptor.mean"}),
        "defines the weight 'copper/descriptor.mean' twice",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BROKEN)
def test_broken_description(converted: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    text = stored_text(converted)
    edit(text)
    rewrite(converted, text)
    raises_one_line(converted, message)


def test_description_that_is_no_json(converted: Path) -> None:
    rewrite(converted, "{")
    raises_one_line(converted, "the description in .* is damaged")
    rewrite(converted, "[]")
    raises_one_line(converted, "the description in .* is a list, expected an object")


def test_tensor_that_an_alias_needs_is_missing(converted: Path) -> None:
    tensors = load_file(converted)
    del tensors["water/descriptor.mean"]
    rewrite(converted, stored_text(converted), tensors)
    raises_one_line(converted, "leads to 'water/descriptor.mean', which is not stored")


def test_a_head_that_became_unsupported_is_refused(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = stored_text(converted)
    text["heads"][0]["config"]["descriptor"]["type"] = "future"
    monkeypatch.setattr("mtinfer.checkpoint.archive._digest", lambda *_: text["digest"])
    rewrite(converted, text)
    checkpoint = read(converted)
    with pytest.raises(UnsupportedModelError, match="head 'water' uses the descriptor 'future'"):
        checkpoint.head("water")
    assert checkpoint.head("copper").weights
