"""Tables on a terminal."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["print_table"]


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, but no narrower than 80: lines that wrap lose nothing."""
    from rich.console import Console

    width = max(80, shutil.get_terminal_size().columns) if sys.stdout and sys.stdout.isatty() else 120
    Console(width=width).print(table)
