"""Read the structure of a checkpoint without torch and without running anything that the file says.

A pickle names the functions that rebuild its objects. Here every such name leads to an inert stand-in, and
a name that training never writes ends the reading.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

__all__ = ["TensorStub", "load_structure"]

#: storage class of torch -> dtype of its elements
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
#: numpy type code -> struct code
SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}


@dataclass(frozen=True)
class TensorStub:
    """A tensor of the file, not read."""

    #: which stored block of numbers, and where in it: equal for tensors that share memory
    storage: tuple[str, int]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


class _NumpyType:
    """Stand-in for a numpy dtype; carries only what a scalar needs."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], *_: object) -> TensorStub:
    return TensorStub((storage.key, offset), storage.dtype, tuple(shape))


def _rebuild_parameter(tensor: TensorStub, *_: object) -> TensorStub:
    return tensor


def _scalar(dtype: _NumpyType, raw: bytes) -> Any:
    return struct.unpack(dtype.order + SCALARS[dtype.code], raw)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(encoding)
    return text.encode("latin1")


#: everything that a checkpoint may name -> what stands for it
ALLOWED: dict[tuple[str, str], Callable[..., Any] | _StorageType | str] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    # a learning rate that old versions stored as a numpy scalar
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _NumpyType,
    ("_codecs", "encode"): _encode,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{("torch", dtype): dtype for dtype in STORAGES.values()},
}


class _Foreign(Exception):
    """The pickle names something outside `ALLOWED`."""


class _StructureUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Foreign(f"{module}.{name}")
        found = ALLOWED[module, name]
        # a pickle may change what it is given: that must not be what the next one is given
        return functools.partial(found) if callable(found) else copy.copy(found)

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(str(key), kind.dtype)


def load_structure(data: bytes, source: str) -> Any:
    """Rebuild the dicts and scalars of a pickle, with a `TensorStub` for each tensor.

    Parameters
    ----------
    data
        Pickled structure.
    source
        Name of the file, for error messages.

    Returns
    -------
    object
        What training saved, with stand-ins for tensors.

    Raises
    ------
    CheckpointError
        The pickle names code that is not part of a checkpoint, or is damaged.
    """
    try:
        return _StructureUnpickler(io.BytesIO(data)).load()
    except _Foreign as err:
        raise CheckpointError(
            f"{source!r} contains code that would be run on loading ({err}) and was not read; "
            "a training checkpoint holds only tensors and plain data"
        ) from None
    except Exception as err:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{source!r} is damaged: its pickled structure can't be read ({err})") from err
