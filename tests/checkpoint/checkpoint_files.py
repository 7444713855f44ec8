"""Real checkpoints of the tests, and changes to their content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
#: every checkpoint that the tests have
ALL_FILES = sorted(DATA.glob("**/checkpoints/*.pt"))
#: those that show every dialect, descriptor and layout
SAMPLE_FILES = [path for path in ALL_FILES if path.is_relative_to(DATA / "reference")]
SAMPLE_FILES += sorted((DATA / "checkpoints").glob("*.pt"))
SEPARATE = DATA / "reference/checkpoints/se_e2_a-separate-pt.pt"
SHARED = DATA / "reference/checkpoints/dpa1strip-shared-ptexpt.pt"
COMPILED = DATA / "reference/checkpoints/se_e2_a-shared-ptexpt-compiled.pt"
TASK_BUFFERS = DATA / "reference/checkpoints/se_e2_a-shared-ptexpt-taskbuffers.pt"

Content = dict[str, Any]
Change = Callable[[Content], Content | None]


def file_id(path: Path) -> str:
    return path.stem


def head_configs(content: Content) -> dict[str, Any]:
    configs: dict[str, Any] = content["model"]["_extra_state"]["model_params"]["model_dict"]
    return configs


def rename_heads(content: Content, names: dict[str, str]) -> None:
    """Give heads other names, in keys and configuration, keeping the order."""
    model = content["model"]
    params = model["_extra_state"]["model_params"]
    params["model_dict"] = {names.get(name, name): config for name, config in params["model_dict"].items()}
    for key in [key for key in model if key != "_extra_state"]:
        level, head, rest = key.split(".", 2)
        tensor = model.pop(key)
        model[f"{level}.{names.get(head, head)}.{rest}"] = tensor


def single_task(content: Content, head: str, prefix: str) -> Content:
    model = content["model"]
    params = model["_extra_state"]["model_params"]
    renamed = {
        prefix + key.removeprefix(f"model.{head}."): tensor
        for key, tensor in model.items()
        if key.startswith(f"model.{head}.")
    }
    extra = {**model["_extra_state"], "model_params": params["model_dict"][head]}
    return {"model": {**renamed, "_extra_state": extra}, "optimizer": {}}
