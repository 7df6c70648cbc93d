"""`dump`: keys become files or JSON lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import typer

from agi.core.dht.cli import files, output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, Level, Timeout, connected
from agi.core.dht.cli.load import REQUEST_TIMEOUT_S
from agi.core.dht.cli.progress import Progress
from agi.core.dht.errors import BatchError
from agi.core.dht.types import Entry, encode_key

REFUSED_SHOWN = 1000
"""Refused keys that are named; the rest is counted."""


class Sink(Protocol):
    """Where a dump goes."""

    def write(self, entry: Entry) -> None:
        """Raises files.Refused where the key has no place there."""


class _Lines:
    """JSON lines as `load` reads them."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def write(self, entry: Entry) -> None:
        self._write(line_of(entry, time.time()))


class _Folder:
    def __init__(self, writer: files.FolderWriter, prefix: str) -> None:
        self._writer = writer
        self._prefix = prefix
        self.expiring = 0

    def write(self, entry: Entry) -> None:
        self._writer.write(entry.key[len(self._prefix) :], entry.value)
        self.expiring += entry.expires_at is not None


def line_of(entry: Entry, now_s: float) -> bytes:
    """A key as a line of JSON, with the life that is left to it: at least a millisecond."""
    shown: dict[str, object] = {"key": entry.key, **output.value_field(entry.value)}
    if entry.expires_at is not None:
        shown["ttl_seconds"] = max(1, entry.expires_at - round(now_s * 1000)) / 1000
    return msgspec.json.encode(shown) + b"\n"


def dump(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Default: all keys.", show_default=False)] = "",
    to: Annotated[str, typer.Option(metavar="FOLDER|FILE.jsonl|-", help="Where to; - is stdout, as JSON lines.")] = "-",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that is not empty, over what is there.")
    ] = False,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Write keys to a folder, or to a JSONL file.

    The inverse of load, in order of keys. JSON lines are {"key", "value" or "value_base64", and for a key that expires
    "ttl_seconds", what is left of its life}. A name that ends in .jsonl is a file: it takes its place at the end, in
    one step.

    In a folder each key is a file of its own, whose path is the key without the prefix; a key's end of life is not
    kept. Keys that are no plain relative path there are refused, and named: with . or .. or empty segments, a slash at
    the beginning or end, NUL, segments too long for the file system, or a file where another key needs a folder.
    Nothing is written outside the folder, through links neither. Exit code 26: keys were refused; JSON lines take
    every key.

    --json prints {"dumped", "bytes", "refused": number, "refused_keys": [{"key", "reason"}] (the first 1000)}, except
    with -, whose output is JSON already.

    Examples:

        agi-dht dump > backup.jsonl

        agi-dht dump prompt: --to ./prompts

        agi-dht dump agent: --to agents.jsonl
    """
    if prefix:
        encode_key(prefix)
    count = size = refused = 0
    named: list[dict[str, str]] = []
    with contextlib.ExitStack() as opened:
        client = opened.enter_context(
            connected(connect, timeout, consistency, request_timeout=REQUEST_TIMEOUT_S, pool_size=2)
        )
        sink = opened.enter_context(_sink(to, prefix, overwrite))
        progress = opened.enter_context(Progress("dumped", None))
        for entry in client.iterate_entries(prefix):
            try:
                sink.write(entry)
            except files.Refused as why:
                refused += 1
                if refused <= REFUSED_SHOWN:
                    named.append({"key": entry.key, "reason": str(why)})
                    progress.note(f"refused: {entry.key!r}: {why}")
            else:
                count += 1
                size += len(entry.value)
            progress.advance(1)
    if isinstance(sink, _Folder) and sink.expiring:
        output.note(f"files do not keep that {output.keys_text(sink.expiring)} will expire: JSON lines do")
    if as_json and to != "-":
        output.document({"dumped": count, "bytes": size, "refused": refused, "refused_keys": named})
    else:
        summary = f"dumped {output.keys_text(count)}, {output.size_text(size)}"
        output.note(summary) if to == "-" else output.line(summary)
    if refused:
        output.note(
            f"error: {output.keys_text(refused)} without a place in the folder: --to FILE.jsonl takes every key"
        )
        raise typer.Exit(BatchError.exit_code)


@contextlib.contextmanager
def _sink(to: str, prefix: str, overwrite: bool) -> Iterator[Sink]:
    path = Path(to)
    if to == "-":
        yield _Lines(output.write)
    elif not path.is_dir() and (path.suffix == ".jsonl" or path.exists()):
        with files.replacing(path) as file:
            yield _Lines(file.write)
    else:
        writer = files.FolderWriter(path, overwrite=overwrite)
        with contextlib.closing(writer):
            yield _Folder(writer, prefix)
