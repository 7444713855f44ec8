"""mtinfer: run any head of a multitask deep-potential checkpoint through one compiled graph."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import MtinferError

if TYPE_CHECKING:
    from .calculator import MTCalculator
    from .inputs import Prediction
    from .loading import load
    from .potential import Potential

__version__ = "0.1.0"
__all__ = ["MTCalculator", "MtinferError", "Potential", "Prediction", "__version__", "load"]

#: public name -> module that defines it; imported on first use, so that `import mtinfer` stays free of torch
_HOMES = {
    "MTCalculator": ".calculator",
    "Potential": ".potential",
    "Prediction": ".inputs",
    "load": ".loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
