"""One compiled graph for all heads of an architecture; `*_code` and `lowerings` know the compiler, too.

A graph is a function of tensors: data first, then weights. It is traced once with symbolic data axes and
fixed weight shapes, compiled once, and kept on disk, so that it serves every head, every structure size and
every later process. Nothing of it is ever attached to a model or written into a checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import GraphWarning, first_line, user_level
from .graph_store import GraphStore, cache_directory, graph_key
from .inputs import ParameterSpec
from .loaded_graph import LoadedGraph, require_loadable
from .models.layout import Argument

__all__ = [
    "Compilation",
    "CompileMode",
    "SharedGraph",
    "compile_mode",
    "require_declared",
    "signed",
    "trace",
]

#: "off": eager. "stored": a graph that is stored already, else eager. "wait": compiled from the first call
#: on. "background": a stored graph is used from the first call on; else calls are answered eagerly while one
#: is compiled, which takes over when it has passed its self-check.
CompileMode = Literal["off", "wait", "background", "stored"]

#: evaluations answered eagerly before graphs are compiled in the background: a single-point script never pays
_ANSWERS_BEFORE_BACKGROUND = 3
#: largest difference between a graph and eager that its self-check accepts, by the precision of the weights
#: and relative to the largest value of an output (plus a floor, for outputs that vanish)
_SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_SELF_CHECK_FLOOR = 0.01
#: sizes to trace with: all different and none small, since the compiler may take what coincides for a rule
_EXAMPLE_SIZES = (61, 97, 53, 71, 83, 59, 101, 67, 89, 79, 73, 103, 107, 109, 113, *range(127, 6000, 2))
_OPTIONS = {
    # of floats, where `cpu_code` has no tanh of its own
    "cpp.use_decompose_tanh": True,
    # code that fits any number of threads; else the number at hand is part of it, down to the size of buffers
    "cpp.dynamic_threads": True,
    # in this thread: at the end of a process, which waits for it, there are no pools to compile in
    "compile_threads": 1,
    # they would be shared through a directory below /tmp that anyone can make first
    "aot_inductor.precompile_headers": False,
    # the wrapper only calls the kernels; optimizing it would take most of the compile time
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


#: process -> its lock: only one thread at a time may compile; a forked process may inherit a lock that is
#: held, hence one for each process
_compilers: dict[int, threading.Lock] = {}


def _require_compiler() -> None:
    """Raise where the compiler that torch calls is not there (asking torch takes a second)."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", usual)
    if shutil.which(name) is None:
        raise FileNotFoundError(f"no C++ compiler {name!r}; install one, or name it in CXX")


def compile_mode(compile: bool | CompileMode) -> CompileMode:
    """Return the mode that an argument names; raises ValueError for another one."""
    if isinstance(compile, bool):
        return "background" if compile else "off"
    if compile not in (allowed := get_args(CompileMode)):
        raise ValueError(
            f"compile={compile!r} is unknown; allowed are True, False, {', '.join(map(repr, allowed))}"
        )
    return compile


def trace(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[Argument],
    weights: Sequence[Tensor],
    *,
    sizes: Sequence[int] = _EXAMPLE_SIZES,
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Trace ``function(*data, *weights)`` with symbolic data axes.

    Parameters
    ----------
    function
        a plain function of tensors.
    arguments
        declarations of the data; axes of one name get one size.
    weights
        arguments whose shapes are part of the architecture.
    sizes
        example sizes of the data axes; nothing of them may stay in the graph.

    Returns
    -------
    graph module and the fake arguments that it was traced with
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    names = sorted({axis for argument in arguments for axis in argument.axes if isinstance(axis, str)})
    size = dict(zip(names, sizes, strict=False))
    mode = FakeTensorMode(
        shape_env=ShapeEnv(duck_shape=False, specialize_zero_one=False),
        allow_non_fake_inputs=True,  # constants that `function` makes
    )
    fakes: list[Any] = []
    for position, argument in enumerate(arguments):
        shape = [axis if isinstance(axis, int) else size[axis] for axis in argument.axes]
        dynamic = [
            DimDynamic.STATIC if isinstance(axis, int) else DimDynamic.DYNAMIC for axis in argument.axes
        ]
        fakes.append(
            mode.from_tensor(
                torch.empty(shape, dtype=argument.dtype, device=weights[0].device),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
                source=ConstantSource(f"data{position}"),
            )
        )
    fakes += [mode.from_tensor(tensor.contiguous(), static_shapes=True) for tensor in weights]
    with mode:
        # anonymous: annotations of `function` would keep the compiler from storing the graph (torch 2.13)
        return make_fx(lambda *values: function(*values), tracing_mode="real")(*fakes), fakes


@cache
def _keep_freed_memory() -> None:
    """Keep memory that a call frees for the next call, once per process.

    glibc gives freed memory back to the system as soon as it exceeds twice the largest block that was ever
    freed, and then pays a page fault for every 4 KiB of the next call: up to 10,000 a step, a third of its
    time. Freeing one block of the largest size that it adapts to (never touched, so it costs nothing) raises
    that limit to 64 MiB, more than the calls of a graph need. Other allocators take no notice.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def signed(architecture: str, weights: Mapping[str, Tensor] | Mapping[str, ParameterSpec]) -> str:
    """Signature of a graph: its architecture, and name, shape and dtype of its weights, in their order."""
    return "\n".join([architecture, *(f"{name} {tuple(w.shape)} {w.dtype}" for name, w in weights.items())])


#: acquired by the first thread that says that the end of the process waits, so that it is said once
_said = threading.Lock()


def _say_what_is_waited_for(worker: threading.Thread) -> None:
    """Say, at the end of the process, that it waits for a graph."""
    threading.main_thread().join()
    if worker.is_alive() and _said.acquire(blocking=False):
        print(
            "mtinfer: compiling for later runs, up to a minute or two a graph; Ctrl-C leaves it out …",
            file=sys.stderr,
            flush=True,
        )


@dataclass
class Compilation:
    """When graphs are compiled; all graphs of a potential have the same one."""

    #: see `CompileMode`
    mode: CompileMode
    #: evaluations that were asked of the potential; "background" waits for a few
    n_answers: int = 0


@dataclass
class SharedGraph:
    """A function of tensors that is compiled once and called with any data and any weights.

    Parameters
    ----------
    function
        ``function(*data, *weights) -> tuple of tensors``.
    signature
        text that determines the compiled code: architecture, outputs, dtypes. Torch and mtinfer versions,
        device and machine are added to it.
    arguments
        declarations of the data.
    weights
        example weights: their shapes and dtypes are part of the architecture.
    compilation
        when it is compiled.
    n_sums
        last outputs that are sums of terms of about one and may cancel: compared on that scale at least.
    """

    function: Callable[..., tuple[Tensor, ...]]
    signature: str
    arguments: Sequence[Argument]
    weights: Sequence[Tensor]
    compilation: Compilation
    n_sums: int = 0
    #: graphs compiled in this process (loading a stored one does not count)
    n_compiled: int = field(default=0, init=False)
    _compiled: LoadedGraph | None = field(default=None, init=False)
    #: outputs that were zero in all calls so far and say nothing about the graph; None before the first call
    _unconfirmed: frozenset[int] | None = field(default=None, init=False)
    _is_looked_up: bool = field(default=False, init=False)
    _is_given_up: bool = field(default=False, init=False)
    #: process -> its thread that compiles, which a forked process has not inherited
    _workers: dict[int, threading.Thread] = field(default_factory=dict, init=False)

    @classmethod
    def of_named(
        cls,
        function: Callable[[tuple[Tensor, ...], dict[str, Tensor]], tuple[Tensor, ...]],
        signature: str,
        arguments: Sequence[Argument],
        weights: Mapping[str, Tensor],
        compilation: Compilation,
        n_sums: int = 0,
    ) -> SharedGraph:
        """Make the graph of ``function(data, named weights)``; weights are handed over in this order."""
        names, n_data = tuple(weights), len(arguments)

        def of_all(*values: Tensor) -> tuple[Tensor, ...]:
            return function(values[:n_data], dict(zip(names, values[n_data:], strict=True)))

        return cls(of_all, signature, arguments, list(weights.values()), compilation, n_sums)

    def __post_init__(self) -> None:
        if self.weights[0].device.type == "cpu":
            _keep_freed_memory()

    def __call__(self, data: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluate, compiled where a graph is at hand, else eagerly."""
        if self._compiled is None and self.mode != "off":
            self._prepare(data[0].device)
        compiled = self._compiled  # another thread may give it up
        if compiled is None or self.mode == "off":
            return self.function(*data, *weights)
        require_declared(self.arguments, data, self.weights[0].device)
        if self._unconfirmed is None:
            return self._check(compiled, data, weights)
        outputs = compiled(*data, *weights)
        if any(bool(outputs[k].any()) for k in self._unconfirmed):
            return self._check(compiled, data, weights)
        return outputs

    @property
    def mode(self) -> CompileMode:
        """The mode of its compilation, or "off" after it was given up and until `again`."""
        return "off" if self._is_given_up else self.compilation.mode

    def again(self) -> None:
        """Try a graph again that was given up, as when there is a compiler by now."""
        if self._is_given_up:
            self._is_given_up = self._is_looked_up = False
            self._workers.pop(os.getpid(), None)

    @property
    def is_compiled(self) -> bool:
        """Whether the next call runs compiled code."""
        return self._compiled is not None and self.mode != "off"

    def join(self) -> None:
        """Wait for a compilation in the background."""
        worker = self._workers.get(os.getpid())
        if worker is not None and worker.ident is not None:  # it was started
            worker.join()

    def _prepare(self, device: torch.device) -> None:
        if self.mode == "wait":
            self._obtain(device)
        elif not self._is_looked_up:
            self._is_looked_up = True
            self._obtain(device, compile_missing=False)
        elif (
            self.mode == "background"
            and os.getpid() not in self._workers
            and self.compilation.n_answers > _ANSWERS_BEFORE_BACKGROUND
        ):
            # the compiler imports it, which Python 3.11 forbids once a process has come to its end
            import concurrent.futures.process  # noqa: F401

            worker = threading.Thread(target=self._obtain, args=(device,), name="mtinfer-compile")
            if self._workers.setdefault(os.getpid(), worker) is worker:  # else another thread was faster
                worker.start()
                threading.Thread(target=_say_what_is_waited_for, args=(worker,), daemon=True).start()

    def _obtain(self, device: torch.device, *, compile_missing: bool = True) -> None:
        try:
            store = GraphStore(cache_directory(), graph_key(self.signature, device))
            compiled = _stored(store, device)
            if compiled is None and self.mode in ("wait", "background"):
                _require_compiler()  # at once: not after the calls that are eager in any case
            if compiled is None and compile_missing:
                with _compilers.setdefault(os.getpid(), threading.Lock()), store.alone():
                    if self.mode not in ("wait", "background"):
                        self._workers.pop(os.getpid(), None)  # another may be wanted, later
                        return
                    compiled = self._compiled or _stored(store, device) or self._compile(store)
                    self._compiled = compiled  # for threads that wait for the compiler
        except Exception as err:  # the compiler raises many types; whatever it is, eager is right
            if not threading.main_thread().is_alive():
                return  # the process ends before the compiler was imported, and nobody waits for the graph
            self._give_up(f"there is no compiled graph ({first_line(err)})")
            return
        if compiled is not None:  # else another thread may have one
            self._compiled = compiled

    def _compile(self, store: GraphStore) -> LoadedGraph:
        from torch._inductor import aot_compile
        from torch._inductor.package.package import package_aoti

        # torch 2.13 warns of itself, and on a GPU recommends a precision that is none
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        module, fakes = trace(self.function, self.arguments, self.weights)
        # of what the compiler writes the graph is kept, and what it found out about the processor or GPU
        with (
            tempfile.TemporaryDirectory(prefix="mtinfer-") as folder,
            _files_of_compiler(store.of_compiler if store.make() else Path(folder) / "inductor"),
            _own_code(self.weights[0].device),
        ):
            options = {**_OPTIONS, "aot_inductor.package": True, "aot_inductor.output_path": folder}
            files = aot_compile(module, tuple(fakes), options=options)
            package = Path(folder) / "graph.pt2"
            assert isinstance(files, list)
            package_aoti(str(package), files)
            require_loadable(package, self.weights[0].device)
            loaded = LoadedGraph(package, self.weights[0].device)  # else it is not stored
            self.n_compiled += 1
            try:
                store.save(package, self.signature)
            except OSError as err:
                warnings.warn(
                    f"the compiled graph could not be stored ({first_line(err)}); "
                    "it serves this process only",
                    GraphWarning,
                    stacklevel=user_level(),
                )
            return loaded

    def _check(
        self, compiled: LoadedGraph, data: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Compare every output with eager: at the first call, and again when one is first not all zero.

        A graph that passes gives the answer, so that the first call of a process has the bits of later ones.
        """
        expected = self.function(*data, *weights)
        if not all(bool(torch.isfinite(output).all()) for output in expected):
            return expected  # atoms on top of each other say nothing about the graph
        try:
            outputs = compiled(*data, *weights)
            floors = [_SELF_CHECK_FLOOR] * (len(expected) - self.n_sums) + [1.0] * self.n_sums
            differences = starmap(_difference, zip(outputs, expected, floors, strict=True))
            worst = max(differences) / self._tolerance
        except Exception as err:
            self._give_up(f"the compiled graph failed ({first_line(err)})")
            return expected
        if not worst <= 1.0:
            self._give_up(
                f"the compiled graph differs from eager by {worst:.1g} times the accepted tolerance; "
                f"please report this with the model's configuration, and empty {cache_directory()}"
            )
            return expected
        zero = frozenset(k for k, output in enumerate(expected) if not bool(output.any()))
        self._unconfirmed = zero if self._unconfirmed is None else zero & self._unconfirmed
        return outputs

    @property
    def _tolerance(self) -> float:
        """Of the self-check. A float32 model has float64 outputs too, of no more than float32 precision."""
        return max(_SELF_CHECK_TOLERANCE.get(weight.dtype, 0.0) for weight in self.weights)

    def _give_up(self, reason: str) -> None:
        self._is_given_up, self._compiled = True, None
        text = f"{reason}; evaluating eagerly, which is slower but right"
        warnings.warn(text, GraphWarning, stacklevel=user_level())


@contextmanager
def _files_of_compiler(folder: Path) -> Iterator[None]:
    """Have Inductor write into a folder, and Triton below it where the user named none."""
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    own = {} if "TRITON_CACHE_DIR" in os.environ else {"TRITON_CACHE_DIR": str(folder / "triton")}
    with temporary_cache_dir(str(folder)):
        os.environ.update(own)  # Inductor would do the same, for good
        try:
            yield
        finally:
            for name in own:
                os.environ.pop(name, None)


def _own_code(device: torch.device) -> AbstractContextManager[None]:
    """What is changed in the compiler's code for a device; imported with the compiler."""
    if device.type == "cpu":
        from .cpu_code import cpu_code

        return cpu_code()
    from .gpu_code import gpu_code

    return gpu_code()


def _difference(got: Tensor, expected: Tensor, floor: float) -> float:
    """Largest difference relative to the largest value and a floor."""
    if not expected.numel():
        return 0.0
    scale = floor + float(expected.abs().max())
    difference = float((got - expected).abs().max())
    return math.inf if math.isnan(difference) else difference / scale


def require_declared(arguments: Sequence[Argument], data: Sequence[Tensor], device: torch.device) -> None:
    """Raise ValueError unless shapes, dtypes and devices are as declared: compiled code does not look."""
    sizes: dict[str | int, int] = {}
    for position, (argument, tensor) in enumerate(zip(arguments, data, strict=True)):
        is_declared = tensor.dtype == argument.dtype and tensor.device == device
        for axis, size in zip(argument.axes, tensor.shape, strict=True):
            if size != (axis if isinstance(axis, int) else sizes.setdefault(axis, size)):
                is_declared = False
        if not is_declared:
            expected = tuple(sizes.get(axis, axis) for axis in argument.axes)
            raise ValueError(
                f"argument {position} of a graph is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                f"it must be {expected} {argument.dtype} ({', '.join(map(str, argument.axes))}) on {device}"
            )


def _stored(store: GraphStore, device: torch.device) -> LoadedGraph | None:
    """Load a stored graph; None where there is none, or none that can be loaded here, as after an update."""
    package = store.find()
    if package is None:
        return None
    try:
        return LoadedGraph(package, device)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile):  # it is compiled anew
        return None
