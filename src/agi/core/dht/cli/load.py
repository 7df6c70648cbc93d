"""`load`: files or JSON lines become keys."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import msgspec
import typer

from agi.core.dht.cli import files, output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, Level, Timeout, connected
from agi.core.dht.cli.progress import Progress
from agi.core.dht.errors import BatchError, DHTError, InvalidValue
from agi.core.dht.types import BATCH_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX, check_value, encode_key, ttl_to_ms

if TYPE_CHECKING:
    from agi.core.dht.client import SyncDHTClient

BATCH_KEYS = 1000
BATCH_BYTES = BATCH_BYTES_MAX // 2
REQUEST_TIMEOUT_S = 30.0
"""For a batch, where --timeout is not given: a slow disk is no reason to give a load up."""
FAILURES_MAX = 1000
"""Past it a load ends: then something is wrong with all of it, and each failure is a line on stderr."""
LINE_BYTES_MAX = 6 * (VALUE_BYTES_MAX + KEY_BYTES_MAX) + 4096
"""The longest line that can be right: each byte of key and value as \\u0000, and the rest."""


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a JSONL file."""

    key: str
    value: str | msgspec.UnsetType = msgspec.UNSET
    value_base64: bytes | msgspec.UnsetType = msgspec.UNSET
    ttl_seconds: float | None = None


@dataclass(slots=True)
class Item:
    """A key to store, or why it cannot be. `source` names it in reports."""

    source: str
    key: str = ""
    value: bytes = b""
    ttl_seconds: float | None = None
    error: str = ""
    skipped: str = ""


@dataclass(slots=True)
class Report:
    """What became of the items."""

    loaded: int = 0
    bytes: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    stopped: str = ""
    """Why the rest was not tried."""


def load(
    source: Annotated[str, typer.Argument(metavar="FOLDER|FILE.jsonl|-", show_default=False)],
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Put this before each key.", show_default=False)] = "",
    glob: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Only files whose name matches, or whose relative path does, where the pattern has a slash.",
            show_default=False,
        ),
    ] = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Store the files of a folder, or the lines of a JSONL file.

    Of a folder every file beneath it becomes a key: the prefix and the file's path relative to the folder, with
    slashes; the value is what the file holds. Links to files inside the folder are followed; other links, pipes and
    devices are skipped, and named.

    Of anything else (- is stdin) each line is {"key": ..., "value": text} or {"key": ..., "value_base64": ...}, both
    with "ttl_seconds" if the key is to expire.

    Exit code 26: something could not be read or stored; each such file, line or key is named, the others are stored. It
    ends early where a whole batch fails, or after 1000 failures, and says how far it came. What is there already is
    overwritten.

    --json prints {"loaded", "bytes", "failed": [{"source", "error"}], "skipped": [{"source", "reason"}], "stopped":
    null or why the rest was not tried}.

    Examples:

        agi-dht load ./prompts --prefix prompt: --glob '*.txt'

        agi-dht load backup.jsonl

        zcat backup.jsonl.gz | agi-dht load -
    """
    if prefix:
        encode_key(prefix)
    path = Path(source)
    with contextlib.ExitStack() as opened:
        if source != "-" and path.is_dir():
            total: int | None = sum(1 for _ in files.walk(path, glob))
            items = _from_folder(path, prefix, glob)
        elif glob is not None:
            raise typer.BadParameter("--glob is for folders")
        else:
            total = None
            stream = sys.stdin.buffer if source == "-" else opened.enter_context(_open(path))
            items = _from_lines(stream, "-" if source == "-" else str(path), prefix)
        client = opened.enter_context(
            connected(connect, timeout, consistency, request_timeout=REQUEST_TIMEOUT_S, retry_unknown=True, pool_size=2)
        )
        progress = opened.enter_context(Progress("loaded", total))
        report = _store(client, items, progress)
    _tell(report, as_json)
    if report.failed or report.stopped:
        raise typer.Exit(BatchError.exit_code)


def _tell(report: Report, as_json: bool) -> None:
    if as_json:
        output.document(
            {
                "loaded": report.loaded,
                "bytes": report.bytes,
                "failed": [{"source": output.encodable(s), "error": output.encodable(e)} for s, e in report.failed],
                "skipped": [{"source": output.encodable(s), "reason": output.encodable(e)} for s, e in report.skipped],
                "stopped": report.stopped or None,
            }
        )
    else:
        skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
        output.line(f"loaded {output.keys_text(report.loaded)}, {output.size_text(report.bytes)}{skipped}")
    if report.failed:
        output.note(f"error: {len(report.failed)} failed, see above")
    if report.stopped:
        output.note(f"error: stopped after {report.loaded + len(report.failed)}: {report.stopped}")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise files.failure(path, error) from None


def _from_folder(folder: Path, prefix: str, pattern: str | None) -> Iterator[Item]:
    for found in files.walk(folder, pattern):
        if found.error or found.skipped:
            yield Item(found.name, error=found.error, skipped=found.skipped)
            continue
        key = prefix + found.name
        try:
            encode_key(key)
            yield Item(found.name, key, files.read_value(found.path, follow=False))
        except DHTError as error:
            yield Item(found.name, error=error.message.rpartition(f"{found.path}: ")[2])


def _from_lines(stream: BinaryIO, name: str, prefix: str) -> Iterator[Item]:
    number = 0
    while line := stream.readline(LINE_BYTES_MAX):
        number += 1
        source = f"{name}:{number}"
        if len(line) == LINE_BYTES_MAX and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # the rest of it
                line = stream.readline(LINE_BYTES_MAX)
            yield Item(source, error="the line is too long")
        elif line.strip():
            yield _parse(line, source, prefix)


def _parse(line: bytes, source: str, prefix: str) -> Item:
    try:
        read = msgspec.json.decode(line, type=Line)
        if (read.value is msgspec.UNSET) == (read.value_base64 is msgspec.UNSET):
            raise InvalidValue('a line has either "value" or "value_base64"')
        value = read.value.encode() if isinstance(read.value, str) else read.value_base64
        ttl_to_ms(read.ttl_seconds)
        key = prefix + read.key
        encode_key(key)
        return Item(source, key, check_value(value), read.ttl_seconds)
    except (DHTError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return Item(source, error=str(error))


def _store(client: SyncDHTClient, items: Iterator[Item], progress: Progress) -> Report:
    report = Report()
    batch: dict[str, Item] = {}
    size = 0
    for item in items:
        if item.skipped:
            report.skipped.append((item.source, item.skipped))
            progress.note(f"skipped: {item.source}: {item.skipped}")
            progress.advance(1)
        elif item.error:
            _failed(report, progress, item.source, item.error)
        else:
            # a key that comes twice is stored twice, in this order
            full = len(batch) >= BATCH_KEYS or size + len(item.value) > BATCH_BYTES or item.key in batch
            if batch and full:
                _send(client, batch, report, progress)
                batch, size = {}, 0
            batch[item.key] = item
            size += len(item.value) + len(item.key)
        if not report.stopped and len(report.failed) >= FAILURES_MAX:
            report.stopped = f"{FAILURES_MAX} failures"
        if report.stopped:
            return report
    if batch:
        _send(client, batch, report, progress)
    return report


def _send(client: SyncDHTClient, batch: dict[str, Item], report: Report, progress: Progress) -> None:
    failed: dict[str, DHTError] = {}
    by_ttl: dict[float | None, dict[str, bytes]] = {}
    for key, item in batch.items():
        by_ttl.setdefault(item.ttl_seconds, {})[key] = item.value
    for ttl_seconds, values in by_ttl.items():
        try:
            client.put_many(values, ttl_seconds=ttl_seconds)
        except BatchError as error:
            failed |= error.failed
    stored = [item for key, item in batch.items() if key not in failed]
    report.loaded += len(stored)
    report.bytes += sum(len(item.value) for item in stored)
    progress.advance(len(stored))
    names = {key: f"{batch[key].source} ({key})" if key != batch[key].source else key for key in failed}
    if len(failed) > 1 and not stored and len({str(error) for error in failed.values()}) == 1:
        # one line says it all: the batch is what was read between the two
        first, *_, last = (names[key] for key in batch)
        why = str(failed[next(iter(batch))])
        progress.note(f"failed: all {len(batch)} from {first} to {last}: {why}")
        report.failed += [(names[key], why) for key in batch]
    else:
        for key, reason in failed.items():
            _failed(report, progress, names[key], str(reason))
    if failed and not stored:
        report.stopped = str(next(iter(failed.values())))


def _failed(report: Report, progress: Progress, source: str, error: str) -> None:
    report.failed.append((source, error))
    progress.note(f"failed: {source}: {error}")
    progress.advance(1)
