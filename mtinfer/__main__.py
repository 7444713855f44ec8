"""``python -m mtinfer`` is the command line."""

from .cli import main

main(prog_name="mtinfer")
