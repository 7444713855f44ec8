"""Reading training checkpoints."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    ALL_FILES,
    COMPILED,
    DATA,
    SEPARATE,
    SHARED,
    TASK_BUFFERS,
    Content,
    file_id,
    head_configs,
    rename_heads,
    single_task,
)

from mtinfer.checkpoint import archive
from mtinfer.checkpoint.load import Checkpoint, HeadRecord, check_weights, read
from mtinfer.errors import CheckpointError, UnknownHeadError, UnsupportedModelError
from mtinfer.inputs import ParameterSpec

Writer = Callable[..., Path]


def assert_same_head(a: HeadRecord, b: HeadRecord) -> None:
    assert list(a.weights) == list(b.weights)
    for name, tensor in a.weights.items():
        assert tensor.dtype == b.weights[name].dtype, name
        assert torch.equal(tensor, b.weights[name]), name


def raises_one_line(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        read(path)
    assert "\n" not in str(info.value)


# --- what a good file gives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL_FILES, ids=file_id)
def test_every_file_is_read_completely(path: Path) -> None:
    checkpoint = read(path)
    assert checkpoint.dialect == ("pt_expt" if "ptexpt" in path.stem else "pt")
    assert checkpoint.source.name == path.name
    assert checkpoint.source.size == path.stat().st_size
    raw = torch.load(path, weights_only=True)["model"]
    for name, record in checkpoint.heads.items():
        assert record.refused is None
        types = len(record.config["type_map"])
        assert record.weights["out_bias"].shape == (1, types, 1)
        assert record.weights["fitting_net.bias_atom_e"].dtype == torch.float64
        depth = len(record.config["fitting_net"]["neuron"])
        assert f"fitting_net.nets.0.layers.{depth}.w" in record.weights
        # nothing is lost: each distinct tensor that is not empty, a mask, a table or debris is a weight
        gone = ("compiled_forward_lower", "_task_", "mask", "econf_tebd", "nlist_cut_idx", "graph_lower")
        kept = {
            tensor.data_ptr(): tensor
            for key, tensor in raw.items()
            if key.startswith(f"model.{name}.") and tensor.numel() and not any(part in key for part in gone)
        }
        assert len(kept) == len(record.weights)
        assert sum(map(checksum, kept.values())) == pytest.approx(sum(map(checksum, record.weights.values())))


def checksum(tensor: torch.Tensor) -> float:
    return float(tensor.double().abs().sum())


def test_values_come_from_the_right_keys() -> None:
    raw = torch.load(SEPARATE, weights_only=True)["model"]
    weights = read(SEPARATE).heads["copper"].weights
    model = "model.copper.atomic_model"
    embeddings = f"{model}.descriptor.sea.filter_layers.networks"
    fitting = f"{model}.fitting_net.filter_layers.networks"
    for name, key in {
        "out_bias": f"{model}.out_bias",
        "descriptor.mean": f"{model}.descriptor.sea.mean",
        "descriptor.embeddings.2.layers.1.w": f"{embeddings}.2.layers.1.matrix",
        "fitting_net.nets.1.layers.2.idt": f"{fitting}.1.layers.2.idt",
    }.items():
        assert torch.equal(weights[name], raw[key])


def test_steps_are_completed_steps() -> None:
    assert [read(path).step for path in (SEPARATE, SHARED, COMPILED)] == [400, 20, 40]


def test_aliases() -> None:
    checkpoint = read(SEPARATE)
    assert checkpoint.aliases == {"water": ("H2O", "liquid"), "clusters": (), "copper": ()}
    assert checkpoint.head("h2o") is checkpoint.heads["water"]
    with pytest.raises(UnknownHeadError, match="no head was named"):
        checkpoint.head()


def test_shared_tensors_share_memory_and_others_do_not() -> None:
    water, clusters = (read(SEPARATE).heads[name].weights for name in ("water", "clusters"))
    assert water["descriptor.mean"] is not clusters["descriptor.mean"]  # two reads
    checkpoint = read(SEPARATE)
    water, clusters = (checkpoint.heads[name].weights for name in ("water", "clusters"))
    for name in water:
        assert (water[name].data_ptr() == clusters[name].data_ptr()) == name.startswith("descriptor."), name


def test_views_of_one_memory_are_different_weights(changed: Writer, tmp_path: Path) -> None:
    key = "model.{}.atomic_model.fitting_net.filter_layers.{}.0.layers.{}"

    def change(content: Content) -> None:
        model = content["model"]
        square = model[key.format("water", "networks", "1.matrix")]
        for copies in ("networks", "_networks"):
            model[key.format("copper", copies, "1.matrix")] = square.T
            model[key.format("copper", copies, "1.bias")] = square[0]
            model[key.format("copper", copies, "3.bias")] = square[0, :1]
            model[key.format("copper", copies, "2.matrix")] = square.view(24, 24)

    path, converted = changed(SEPARATE, change), tmp_path / "model.safetensors"
    archive.write(read(path), converted)
    square = torch.load(path, weights_only=True)["model"][key.format("water", "networks", "1.matrix")]
    assert not torch.equal(square, square.T)
    for file in (path, converted):
        heads = read(file).heads
        water, copper = heads["water"].weights, heads["copper"].weights
        layers = "fitting_net.nets.0.layers"
        assert torch.equal(water[f"{layers}.1.w"], square)
        assert torch.equal(copper[f"{layers}.1.w"], square.T)
        assert torch.equal(copper[f"{layers}.1.b"], square[0])
        assert torch.equal(copper[f"{layers}.3.b"], square[0, :1])
        assert copper[f"{layers}.2.w"].data_ptr() == water[f"{layers}.1.w"].data_ptr()


def test_the_file_may_be_overwritten_after_reading(tmp_path: Path) -> None:
    path = shutil.copy(SEPARATE, tmp_path / "model.pt")
    checkpoint = read(path)
    with path.open("r+b") as file:
        file.truncate(0)
    assert_same_head(checkpoint.heads["water"], read(SEPARATE).heads["water"])


def test_copies_of_compiled_graphs_are_left_out() -> None:
    clean, with_tasks = read(COMPILED), read(TASK_BUFFERS)
    assert clean.has_debris
    assert with_tasks.has_debris
    assert not read(SHARED).has_debris
    for name in ("water", "copper"):
        assert_same_head(clean.heads[name], with_tasks.heads[name])


def test_wrapper_levels_are_taken_off(changed: Writer) -> None:
    def change(content: Content) -> None:
        model = content["model"]
        for key in [key for key in model if key.startswith("model.copper.original_model.")]:
            model[key.replace(".original_model.", ".original_model._orig_mod.")] = model.pop(key)

    assert_same_head(read(changed(COMPILED, change)).heads["copper"], read(COMPILED).heads["copper"])


def test_weight_with_and_without_a_wrapper_level(changed: Writer) -> None:
    def change(content: Content) -> None:
        content["model"]["model.copper.atomic_model.out_bias"] = torch.zeros(1, 3, 1)

    raises_one_line(
        changed(COMPILED, change), "head 'copper' has the weight 'atomic_model.out_bias' with and without"
    )


def test_graph_flag_goes_to_the_head(changed: Writer) -> None:
    def change(content: Content) -> None:
        content["model"]["model.copper.atomic_model.descriptor.graph_lower_disabled"] = torch.tensor(True)

    heads = read(changed(SHARED, change)).heads
    assert [heads[name].graph_lower_disabled for name in ("water", "copper")] == [False, True]


# --- names of heads -----------------------------------------------------------------------------------------

NASTY = ["_task_water", "original_model", "descriptor", "fitting_net", "compiled_forward_lower", "_orig_mod"]


@pytest.mark.parametrize("source", [SEPARATE, TASK_BUFFERS], ids=file_id)
@pytest.mark.parametrize("name", [*NASTY, "atomic_model", "model", "two words", "water/ice", "Wässer", "0"])
def test_any_head_name_works(changed: Writer, source: Path, name: str) -> None:
    path = changed(source, lambda content: rename_heads(content, {"water": name}))
    expected, got = read(source), read(path)
    assert list(got.heads) == [name if head == "water" else head for head in expected.heads]
    assert_same_head(got.heads[name], expected.heads["water"])
    assert_same_head(got.heads["copper"], expected.heads["copper"])


@pytest.mark.parametrize("order", [("water", "copper"), ("copper", "water")])
def test_names_that_begin_alike(changed: Writer, order: tuple[str, str]) -> None:
    names = dict(zip(order, ("water", "water_1"), strict=True))
    expected = read(SEPARATE)
    got = read(changed(SEPARATE, lambda content: rename_heads(content, names)))
    for old, new in names.items():
        assert_same_head(got.heads[new], expected.heads[old])


# --- other layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.Default.", "model."])
@pytest.mark.parametrize("source", [SEPARATE, SHARED, COMPILED], ids=file_id)
def test_single_task_files(changed: Writer, source: Path, prefix: str) -> None:
    checkpoint = read(changed(source, lambda content: single_task(content, "copper", prefix)))
    assert list(checkpoint.heads) == ["Default"]
    assert_same_head(checkpoint.head(), read(source).heads["copper"])


def test_bare_state_dict(changed: Writer) -> None:
    checkpoint = read(changed(SEPARATE, lambda content: content["model"]))
    assert_same_head(checkpoint.heads["water"], read(SEPARATE).heads["water"])


@pytest.mark.parametrize("packed", [None, "data/0", "data.pkl"])
def test_a_file_that_was_packed_anew(tmp_path: Path, packed: str | None) -> None:
    """torch reads compressed records of a mapped file as if they were numbers."""
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(SEPARATE) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            compressed = packed is None or record.filename.endswith(f"/{packed}")
            kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            target.writestr(record.filename, source.read(record), kind)
    before, after = read(SEPARATE), read(path)
    for name, record in before.heads.items():
        assert_same_head(record, after.heads[name])


def test_learning_rate_as_numpy_scalar(changed: Writer) -> None:
    def change(content: Content) -> None:
        content["model"]["_extra_state"]["train_infos"]["lr"] = np.float64(0.25)

    path = changed(SEPARATE, change)
    assert read(path).step == 400
    # the spelling of numpy 1, which writes a name one byte shorter
    old = path.with_name("old.pt")
    replace_in_pickle(path, old, b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    assert_same_head(read(old).heads["water"], read(SEPARATE).heads["water"])


def replace_in_pickle(source: Path, target: Path, text: bytes, new: bytes) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as out:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("/data.pkl"):
                assert text in data
                data = data.replace(text, new)
            out.writestr(name, data)


# --- heads that can't be evaluated --------------------------------------------------------------------------

CONFIG_FEATURES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda config: config.update(spin={"use_spin": [True]}), "a spin model"),
    (lambda config: config.update(type="linear_ener"), r"a composed model \(type 'linear_ener'\)"),
    (lambda config: config.update(use_srtab="zbl.tab"), "a composed model"),
    (lambda config: config.update(modifier={"type": "dipole_charge"}), "a data modifier"),
    (lambda config: config.update(lora={"rank": 4}), "a LoRA adapter"),
    (lambda config: config.update(bridging_method="zbl"), "bridging to a short-range potential"),
    (lambda config: config["descriptor"].update(type="dpa4"), "the descriptor 'dpa4'"),
    (lambda config: config["descriptor"].update(type="se_e2_r"), "the descriptor 'se_e2_r'"),
    (
        lambda config: config.update(descriptor={"type": "hybrid", "list": [{"type": "se_e3"}]}),
        "the descriptor 'se_e3'",
    ),
    (lambda config: config.update(type_map=["O", "H", "O"]), "a type map that lists 'O' twice"),
    (lambda config: config["descriptor"].update(lmax=2), "angular channels"),
    (lambda config: config["descriptor"].update(attn_mask=True), "masked attention"),
    (lambda config: config["descriptor"].update(sel="auto:1.1"), "the neighbour count 'auto:1.1'"),
    (lambda config: config["descriptor"].update(precision="bfloat16"), "the precision 'bfloat16'"),
    (lambda config: config["fitting_net"].update(type="dipole"), "a fitting net of type 'dipole'"),
    (lambda config: config["fitting_net"].update(case_film_embd=True), "case FiLM"),
    (lambda config: config["fitting_net"].update(precision="float16"), "the precision 'float16'"),
]


@pytest.mark.parametrize(("edit", "feature"), CONFIG_FEATURES)
def test_a_rare_feature_refuses_its_head_only(
    changed: Writer, edit: Callable[[dict[str, Any]], Any], feature: str
) -> None:
    checkpoint = read(changed(SEPARATE, lambda content: edit(head_configs(content)["copper"])))
    assert_only_copper_is_refused(checkpoint, feature)


@pytest.mark.parametrize(
    ("key", "shape", "feature"),
    [
        ("atomic_model.descriptor.sea.compress_data.0", (3, 4), "compressed"),
        ("atomic_model.descriptor.sea.compress_info.0", (6,), "compressed"),
        ("atomic_model.descriptor.se_atten.type_embd_data", (9, 8), "compressed"),
        ("atomic_model.descriptor.se_atten.adam_degree_gain_raw", (1,), "angular channels"),
        ("atomic_model.models.0.descriptor.sea.mean", (1,), "a composed model"),
        ("backbone_model.atomic_model.out_bias", (1, 3, 1), "a spin model"),
    ],
)
def test_a_rare_feature_told_by_a_key(
    changed: Writer, key: str, shape: tuple[int, ...], feature: str
) -> None:
    def change(content: Content) -> None:
        content["model"][f"model.copper.{key}"] = torch.zeros(shape)

    assert_only_copper_is_refused(read(changed(SEPARATE, change)), feature)


def assert_only_copper_is_refused(checkpoint: Checkpoint, feature: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"head 'copper' uses {feature}.*does not evaluate"
    ) as info:
        checkpoint.head("copper")
    assert "\n" not in str(info.value)
    assert checkpoint.heads["copper"].weights == {}
    assert_same_head(checkpoint.head("water"), read(SEPARATE).heads["water"])


def test_a_refused_head_has_no_say_in_the_dialect(changed: Writer) -> None:
    def change(content: Content) -> None:
        head_configs(content)["copper"]["descriptor"]["type"] = "dpa4"
        content["model"]["model.copper.atomic_model.descriptor.block.w"] = torch.zeros(1)

    assert_only_copper_is_refused(read(changed(SEPARATE, change)), "the descriptor 'dpa4'")


# --- bad input ----------------------------------------------------------------------------------------------


def test_not_there_or_a_directory(tmp_path: Path) -> None:
    raises_one_line(tmp_path / "none.pt", "no such file: .*none.pt")
    raises_one_line(tmp_path, "is a directory; expected a training checkpoint")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text('{"model": "not this"}')
    raises_one_line(path, "is not a checkpoint: it begins with")
    path.write_bytes(b"")
    raises_one_line(path, "is not a checkpoint: it is empty")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    raises_one_line(tmp_path / "arrays.npz", "is a zip file but no training checkpoint")
    torch.save({"weights": {"a": torch.zeros(3)}}, path)
    raises_one_line(path, "no training checkpoint: it lacks the model with its configuration")
    torch.save([1, 2], path)
    raises_one_line(path, r"model\.pt': the file is no training checkpoint")
    torch.save(torch.load(SEPARATE, weights_only=True), path, _use_new_zipfile_serialization=False)
    raises_one_line(path, r"format of torch before 1\.6, .* save it anew: torch\.save\(torch\.load")


def test_frozen_model_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "frozen.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"frozen/{name}", b"")
    raises_one_line(path, r"no training checkpoint \(a frozen or exported model\?\)")


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.99])
def test_truncated(tmp_path: Path, fraction: float) -> None:
    data = SEPARATE.read_bytes()
    path = tmp_path / "short.pt"
    path.write_bytes(data[: int(len(data) * fraction)])
    raises_one_line(path, "truncated or damaged")


def test_one_wrong_bit(tmp_path: Path) -> None:
    with zipfile.ZipFile(SEPARATE) as archive:
        tensors = [record for record in archive.infolist() if "/data/" in record.filename]
    largest = max(tensors, key=lambda record: record.file_size)
    data = bytearray(SEPARATE.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    raises_one_line(path, "is damaged: the checksum of '.*/data/.*' is wrong")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A zip file says of every name whether it is in UTF-8."""
    data = bytearray(SEPARATE.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 9] |= 0x08
    data[entry + 46] = 0xFF
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    raises_one_line(path, "truncated or damaged")


def test_what_a_configuration_says_of_the_mask_has_no_effect(changed: Writer) -> None:
    def change(content: Content) -> None:
        head_configs(content)["copper"]["fitting_net"]["exclude_types"] = [0]

    assert "exclude_types" not in read(changed(SEPARATE, change)).heads["copper"].config["fitting_net"]


def test_missing_numbers(tmp_path: Path) -> None:
    path = tmp_path / "hole.pt"
    with zipfile.ZipFile(SEPARATE) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if not name.endswith("/data/3"):
                new.writestr(name, old.read(name))
    raises_one_line(path, "truncated or damaged")


def test_code_is_not_run(malicious: tuple[Path, Path]) -> None:
    path, marker = malicious
    raises_one_line(path, r"contains code that would be run on loading \(posix.mkdir\) and was not read")
    assert not marker.exists()


def test_unknown_weight(changed: Writer) -> None:
    def change(content: Content) -> None:
        content["model"]["model.copper.atomic_model.surprise"] = torch.zeros(1)

    raises_one_line(changed(SEPARATE, change), "head 'copper' has the unknown weight 'atomic_model.surprise'")


def test_weights_of_no_head(changed: Writer) -> None:
    def change(content: Content) -> None:
        del head_configs(content)["copper"]

    raises_one_line(changed(SEPARATE, change), "'model.copper.*belongs to no head.*heads: water, clusters")


@pytest.mark.parametrize("key", ["loss.water.scale", "model.water", "models.water.atomic_model.out_bias"])
def test_weights_outside_the_heads(changed: Writer, key: str) -> None:
    def change(content: Content) -> None:
        content["model"][key] = torch.zeros(1)

    raises_one_line(changed(SEPARATE, change), f"'{key}' belongs to no head")


def test_head_without_weights(changed: Writer) -> None:
    def change(content: Content) -> None:
        head_configs(content)["ice"] = head_configs(content)["water"] | {"model_branch_alias": []}

    raises_one_line(changed(SEPARATE, change), "head 'ice' is in the configuration but has no weights")


def test_differing_copies_of_a_collection(changed: Writer) -> None:
    key = "model.water.atomic_model.fitting_net.filter_layers.{}.0.layers.0.matrix"

    def differ(content: Content) -> None:
        content["model"][key.format("_networks")] = content["model"][key.format("networks")] + 1.0

    def equal(content: Content) -> None:
        content["model"][key.format("_networks")] = content["model"][key.format("networks")].clone()

    raises_one_line(changed(SEPARATE, differ), "must be the same weight but hold different numbers")
    assert_same_head(read(changed(SEPARATE, equal)).heads["water"], read(SEPARATE).heads["water"])


@pytest.mark.parametrize("dropped", ["networks", "_networks"])
def test_one_copy_of_a_collection_is_enough(changed: Writer, dropped: str) -> None:
    def change(content: Content) -> None:
        for key in [key for key in content["model"] if f".{dropped}." in key]:
            del content["model"][key]

    assert_same_head(read(changed(SEPARATE, change)).heads["water"], read(SEPARATE).heads["water"])


def test_ambiguous_dialect(changed: Writer) -> None:
    def change(content: Content) -> None:
        content["model"]["model.water.atomic_model.x.w"] = torch.zeros(1)

    raises_one_line(changed(SEPARATE, change), "ambiguous dialect: both")


def test_clashing_aliases(changed: Writer) -> None:
    def two_heads(content: Content) -> None:
        head_configs(content)["copper"]["model_branch_alias"] = ["H2O"]

    def other_head(content: Content) -> None:
        head_configs(content)["copper"]["model_branch_alias"] = ["clusters"]

    raises_one_line(changed(SEPARATE, two_heads), "alias 'H2O' of head 'copper' clashes with head 'water'")
    raises_one_line(
        changed(SEPARATE, other_head), "alias 'clusters' of head 'copper' clashes with head 'clusters'"
    )


@pytest.mark.parametrize("part", ["type_map", "descriptor", "fitting_net"])
def test_incomplete_configuration(changed: Writer, part: str) -> None:
    def change(content: Content) -> None:
        del head_configs(content)["copper"][part]

    raises_one_line(changed(SEPARATE, change), f"the configuration of head 'copper' has no valid '{part}'")


def test_configuration_that_is_not_plain(changed: Writer) -> None:
    def change(content: Content) -> None:
        head_configs(content)["copper"]["descriptor"]["rcut"] = torch.tensor(6.0)

    raises_one_line(changed(SEPARATE, change), "the configuration of head 'copper' is not plain data")


def test_reading_leaves_the_allow_list_as_it_was() -> None:
    before = set(torch.serialization.get_safe_globals())
    read(SEPARATE)
    assert set(torch.serialization.get_safe_globals()) == before


# --- weights against a model --------------------------------------------------------------------------------


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "min_nbor_dist": torch.tensor(-1.0),
        "out_bias": torch.zeros(1, 3, 1),
        "descriptor.mean": torch.ones(2),
    }


@pytest.fixture
def expected(weights: dict[str, torch.Tensor]) -> dict[str, ParameterSpec]:
    return {name: ParameterSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}


Weights = dict[str, torch.Tensor]
Expected = dict[str, ParameterSpec]


def test_weights_as_expected(weights: Weights, expected: Expected) -> None:
    weights["min_nbor_dist"] = torch.tensor(torch.inf)  # stored for information only
    check_weights("ice", weights, expected)


def test_missing_weight(weights: Weights, expected: Expected) -> None:
    del weights["out_bias"]
    with pytest.raises(CheckpointError) as info:
        check_weights("ice", weights, expected)
    assert str(info.value) == (
        "head 'ice' lacks the weight 'out_bias': its configuration asks for shape (1, 3, 1), float32"
    )
    with pytest.raises(CheckpointError, match=r"lacks the weight 'min_nbor_dist' \(and 2 more\)"):
        check_weights("ice", {}, expected)


def test_extra_weight(weights: Weights, expected: Expected) -> None:
    with pytest.raises(CheckpointError, match=r"head 'ice' has the weight 'x', shape \(4,\), that its conf"):
        check_weights("ice", weights | {"x": torch.zeros(4)}, expected)


def test_wrong_shape_or_dtype(weights: Weights, expected: Expected) -> None:
    with pytest.raises(
        CheckpointError, match=r"'out_bias' of head 'ice' has shape \(1, 3\), float32.*\(1, 3, 1\)"
    ):
        check_weights("ice", weights | {"out_bias": torch.zeros(1, 3)}, expected)
    with pytest.raises(CheckpointError, match=r"'out_bias' of head 'ice' has .*float64; .* float32"):
        check_weights("ice", weights | {"out_bias": weights["out_bias"].double()}, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(weights: Weights, expected: Expected, value: float) -> None:
    weights["descriptor.mean"][1] = value
    with pytest.raises(
        CheckpointError, match=r"'descriptor.mean' of head 'ice' holds NaN .* in 1 of 2 numbers"
    ):
        check_weights("ice", weights, expected)


def test_nan_in_both_copies_of_a_weight_is_found_by_the_check(changed: Writer) -> None:
    key = "model.water.atomic_model.fitting_net.filter_layers.{}.0.layers.0.bias"

    def change(content: Content) -> None:
        for collection in ("networks", "_networks"):
            tensor = content["model"][key.format(collection)].clone()
            tensor[0] = torch.nan
            content["model"][key.format(collection)] = tensor

    found = read(changed(SEPARATE, change)).heads["water"].weights
    specs = {name: ParameterSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    with pytest.raises(CheckpointError, match=r"'fitting_net.nets.0.layers.0.b' of head 'water' holds NaN"):
        check_weights("water", found, specs)
    in_file = key.format("networks").removeprefix("model.water.")
    with pytest.raises(CheckpointError, match=f"the weight '{in_file}' of head 'water' holds NaN"):
        check_weights("water", found, specs, dialect="pt")


def test_hybrid_members_keep_their_place() -> None:
    for dialect in ("pt", "ptexpt"):
        weights = read(DATA / f"checkpoints/hybrid-{dialect}.pt").heads["water"].weights
        assert weights["descriptor.descrpt_list.0.se_atten.attention.0.in_proj.w"].shape == (4, 12)
        assert weights["descriptor.descrpt_list.1.embeddings.2.layers.0.w"].dtype == torch.float32
        assert weights["descriptor.descrpt_list.2.repformers.layers.0.h2_residual.0"].shape == (1,)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(1).expand(10**12), "repeats 4 bytes of the file"),
        (torch.zeros(2, 3).to_sparse(), "is torch.sparse_coo; expected one with numbers"),
        (torch.zeros(2, 3, device="meta"), "is a meta tensor; expected one with numbers"),
    ],
)
def test_what_only_looks_like_an_array(changed: Writer, tensor: torch.Tensor, text: str) -> None:
    def add(content: Content) -> None:
        content["model"]["model.water.min_nbor_dist"] = tensor

    raises_one_line(changed(SEPARATE, add), text)
