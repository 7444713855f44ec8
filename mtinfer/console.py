"""Tables on a terminal."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["if_shown", "print_table"]


def if_shown(write: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
    """Call what writes to the terminal; one that was closed, or a full disk behind it, is no error."""
    with contextlib.suppress(OSError):
        write(*arguments, **keywords)


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, but no narrower than 80: lines that wrap lose nothing."""
    from rich.console import Console

    width = max(80, shutil.get_terminal_size().columns) if sys.stdout and sys.stdout.isatty() else 120
    Console(width=width).print(table)
