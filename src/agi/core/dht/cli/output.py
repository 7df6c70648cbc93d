"""What a command prints: results to stdout as bytes, notes to stderr, one form for people and one for programs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence

import msgspec

CLOSED_EXIT_CODE = 141
"""128 + SIGPIPE: how a shell sees a program whose reader has gone."""
NOT_CHECKED = "not checked, since repair.interval_ms is 0: whether replicas miss anything at "
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


class Closed(Exception):
    """Whoever read stdout has closed it, as `head` does."""


def write(data: bytes) -> None:
    """To stdout. Raises Closed; OSError where it cannot be written otherwise (disk full)."""
    try:
        sys.stdout.buffer.write(data)
    except OSError as error:
        raise _give_up(error) from None


def flush() -> None:
    """Raises as `write` does."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _give_up(error) from None


def _give_up(error: OSError) -> Exception:
    """What to raise. What is still buffered goes nowhere, so that the interpreter cannot trip over it at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return Closed() if isinstance(error, BrokenPipeError) else OSError(error.errno, error.strerror, "stdout")


def line(text: str) -> None:
    write(text.encode("utf-8", "backslashreplace") + b"\n")


def document(value: object) -> None:
    """One JSON value on a line."""
    write(msgspec.json.encode(value) + b"\n")


def note_document(value: object) -> None:
    """One JSON value on a line of stderr, where stdout is another's."""
    sys.stderr.write(f"{msgspec.json.encode(value).decode()}\n")
    sys.stderr.flush()


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{printable(text, keep_backslash=True)}\n")
    sys.stderr.flush()


def printable(text: str, *, keep_backslash: bool = False) -> str:
    r"""The text on one line, harmless to a terminal.

    >>> print(printable("a\nb\\c\x1b[1m\udcff"))
    a\nb\\c\x1b[1m\xff
    """

    def escape(match: re.Match[str]) -> str:
        found = match[0]
        if found == "\\" and keep_backslash:
            return found
        if "\udc80" <= found <= "\udcff":  # a byte that was not UTF-8 (PEP 383)
            return f"\\x{ord(found) - 0xDC00:02x}"
        return _SHORT.get(found) or (f"\\x{ord(found):02x}" if ord(found) < 0x80 else f"\\u{ord(found):04x}")

    return _CONTROL.sub(escape, text)


def encodable(text: str) -> str:
    """The text for JSON: bytes of a file name that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def value_text(value: bytes) -> str:
    """A value on one line for people."""
    return printable(value.decode("utf-8", "surrogateescape"))


def value_field(value: bytes) -> dict[str, str]:
    """A value for JSON: text where it is UTF-8, else base64 under another name. `load` reads both."""
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        from base64 import b64encode

        return {"value_base64": b64encode(value).decode()}


def time_text(milliseconds: int | None) -> str:
    """A time for people, in UTC."""
    if not milliseconds:
        return "never"
    from datetime import UTC, datetime, timedelta

    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)).strftime("%Y-%m-%d %H:%M:%S UTC")


def size_text(count: int) -> str:
    """Bytes for people.

    >>> size_text(999), size_text(1536), size_text(3 << 30)
    ('999 B', '1.5 KiB', '3.0 GiB')
    """
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024 or unit == "TiB":
            break
    return f"{size:.1f} {unit}"


def keys_text(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under headings. On a terminal long cells fold; elsewhere a row is a line, whatever its length."""
    import io

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    terminal = sys.stdout.isatty()
    for column in columns:
        shown.add_column(column, overflow="fold", no_wrap=not terminal)
    for row in rows:
        shown.add_row(*(Text(printable(cell, keep_backslash=True)) for cell in row))
    text = io.StringIO()
    width = None if terminal else 1_000_000
    Console(file=text, force_terminal=terminal, width=width, highlight=False).print(shown)
    write("".join(f"{each.rstrip()}\n" for each in text.getvalue().splitlines()).encode("utf-8", "backslashreplace"))
