"""How far a long command has come, on stderr: a bar on a terminal, else a few plain lines, never more than bounded."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Self

from agi.core.dht.cli import output

FIRST_COUNT = 10_000
"""Of an amount that nobody knows, the first plain line comes after so many, the next at twice that, and so on."""
TENTHS = 10
"""Plain lines of an amount that is known."""


class Progress:
    """
    Args:
        what: the verb: "loaded", "dumped".
        total: how many items there are; None where nobody knows.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._next = FIRST_COUNT if total is None else max(FIRST_COUNT // TENTHS, -(-total // TENTHS))
        self._bar: Any = None
        self.done = 0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif self.done >= self._next:
            if self._total is None:
                self._next *= 2
                output.note(f"{self._what} {self.done}")
            else:
                self._next += max(FIRST_COUNT // TENTHS, -(-self._total // TENTHS))
                output.note(f"{self._what} {self.done} of {self._total}")

    def note(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self._bar is None:
            output.note(text)
            return
        from rich.text import Text

        with contextlib.suppress(BrokenPipeError):
            self._bar.console.print(Text(output.printable(text, keep_backslash=True)), soft_wrap=True)
