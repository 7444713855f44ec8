"""How long the matrix products of a step take at the least, on the machine at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ase
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from .calculator import MTCalculator

__all__ = ["Roofline", "roofline"]


@dataclass(frozen=True)
class Roofline:
    """Matrix products of a step."""

    n_edges: int
    #: floating-point operations
    gflop: float
    #: what they read and write
    gbyte: float
    #: their time at the measured rate of a large product, or of a large copy, ms
    ms: float


def roofline(calculator: MTCalculator, atoms: ase.Atoms) -> Roofline:
    """Count the products of one evaluation of `atoms`, and measure the machine."""
    gflop, gbyte, n_edges = _count(calculator, atoms)
    rate = _matmul_gflops(*_largest_weight(calculator))
    copied = _copy_gbytes(calculator.potential.device)
    return Roofline(n_edges, gflop, gbyte, 1e3 * max(gflop / rate, gbyte / copied))


def _count(calculator: MTCalculator, atoms: ase.Atoms) -> tuple[float, float, int]:
    """Operations and bytes of the matrix products of one step (Gflop, GB), and number of pairs.

    Counted on fake tensors, on the function of the single graph: nothing is computed twice.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from .neighbors import find_candidates

    potential = calculator.potential
    state = potential.head(calculator.head)
    inputs = potential.inputs([atoms], [find_candidates(atoms, state.model.rcut)], state)
    layouts, _ = state.model.layouts(inputs)
    traffic = _Traffic()
    with FakeTensorMode() as fake, FlopCounterMode(display=False) as counter, traffic:
        for layout in layouts:
            data = (*layout.displacements, *layout.tensors, *state.weights[layout.group])
            state.graph.function(*map(fake.from_tensor, data))
    return counter.get_total_flops() / 1e9, traffic.n_bytes / 1e9, int(inputs.centers.shape[0])


class _Traffic(TorchDispatchMode):
    """Counts what matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            self.n_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)


def _copy_gbytes(device: torch.device) -> float:
    """Rate of a large copy, GB/s, read and written bytes together."""
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        float(target.copy_(source)[0])
        seconds.append(time.perf_counter() - began)
    return 2e-9 * source.numel() * source.element_size() / min(seconds)


def _largest_weight(calculator: MTCalculator) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the largest weight: those of most products."""
    weights = calculator.potential.head(calculator.head).weights[0]
    largest = max(weights, key=torch.Tensor.numel)
    return largest.device, largest.dtype


def _matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large matrix product, Gflop/s."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.rand(n, n, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - began)
    return 2e-9 * n**3 / min(seconds)
