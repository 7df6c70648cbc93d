"""How a command of this package ends: with its result, or with one line on stderr and the error's exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from agi.core.dht.errors import DHTError


def run(app: typer.Typer, arguments: Sequence[str] | None = None, *, name: str) -> int:
    """Runs a typer app; returns the exit code: errors.py has one for each kind of error, wrong usage is 2."""
    try:
        typer.main.get_command(app)(args=None if arguments is None else list(arguments), prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except DHTError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0
