"""What tests of devices share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda")


#: marks of what runs on a GPU
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, numbers in a CPU tensor excepted, as CUDA does."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func} on {' and '.join(sorted(devices))}")
        return func(*args, **(kwargs or {}))


def on_meta(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to("meta") for tensor in tensors]
