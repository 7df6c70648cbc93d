"""Single keys and ranges: get, put, delete, scan."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from agi.core.dht.cli import files, output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, Level, Timeout, connected
from agi.core.dht.errors import InvalidValue
from agi.core.dht.types import SCAN_LIMIT_MAX, VALUE_BYTES_MAX, encode_key, ttl_to_ms

NOT_FOUND_EXIT_CODE = 3


def get(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the value to a file, in one step.", show_default=False)
    ] = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Print the value of a key.

    The bytes of the value and nothing else go to stdout. Exit code 3: the key holds no value.

    --json prints {"key", "found", "value" (text) or "value_base64", "version", "expires_at" (or null), "created_at",
    "updated_at"}; times are milliseconds since 1970.

    Examples:

        agi-dht get agent:42

        agi-dht get model:weights --out weights.bin

        agi-dht get agent:42 --consistency ONE --json
    """
    if out is not None and as_json:
        raise typer.BadParameter("--out and --json exclude each other")
    encode_key(key)
    with connected(connect, timeout, consistency) as client:
        entry = client.get_entry(key)
    if entry is None:
        if as_json:
            output.document({"key": key, "found": False})
        output.note(f"not found: {key!r}")
        raise typer.Exit(NOT_FOUND_EXIT_CODE)
    if as_json:
        shown = {"key": key, "found": True, **output.value_field(entry.value), "version": entry.version}
        times = {"expires_at": entry.expires_at, "created_at": entry.created_at, "updated_at": entry.updated_at}
        output.document({**shown, **times})
    elif out is not None:
        with files.replacing(out) as file:
            file.write(entry.value)
    else:
        output.write(entry.value)
        if sys.stdout.isatty() and entry.value and not entry.value.endswith(b"\n"):
            output.flush()
            output.note("")  # so that the prompt begins on a line of its own


def put(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    value: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="Without it, or -: --file or stdin.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the value from a file; - is stdin.", show_default=False)
    ] = None,
    ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Let it expire after so long.", show_default=False)
    ] = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Store a value; print its version.

    The value is VALUE, or what the file holds, or what comes on stdin: byte for byte, at most 8 MiB. A VALUE or FILE of
    - is stdin.

    --json prints {"key", "version", "bytes"}.

    Examples:

        agi-dht put greeting hello

        agi-dht put session:7 --ttl 3600 --file session.bin

        date | agi-dht put now

        agi-dht put answer -- -42
    """
    encode_key(key)
    ttl_to_ms(ttl)
    data = _value(value, file)
    with connected(connect, timeout, consistency) as client:
        version = client.put(key, data, ttl_seconds=ttl)
    if as_json:
        output.document({"key": key, "version": version, "bytes": len(data)})
    else:
        output.line(str(version))


def _value(value: str | None, file: Path | None) -> bytes:
    """The value from the one source that was given."""
    if value is not None and file is not None:
        raise typer.BadParameter("a value comes from VALUE or from --file, not from both")
    if value is not None and value != "-":
        try:
            return os.fsencode(value)  # the bytes as they were typed, whatever they mean
        except UnicodeEncodeError as error:
            raise InvalidValue(f"the value cannot be encoded: {error.reason} at index {error.start}") from None
    if file is not None and str(file) != "-":
        return files.read_value(file)
    if sys.stdin.isatty() and value is None and file is None:
        raise typer.BadParameter("give VALUE, or --file, or the value on stdin")
    return _limited(sys.stdin.buffer)


def _limited(stream: BinaryIO) -> bytes:
    data = stream.read(VALUE_BYTES_MAX + 1)
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidValue(f"a value has at most {VALUE_BYTES_MAX} bytes; stdin has more")
    return data


def delete(
    keys: Annotated[list[str], typer.Argument(metavar="KEY", show_default=False)],
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Delete keys.

    A key that held no value is no error. Where some could not be deleted, the others are.

    --json prints {"existed": {key: whether it held a value}}.

    Examples:

        agi-dht delete agent:42 agent:43

        agi-dht scan tmp: --keys-only | xargs -d '\\n' agi-dht delete
    """
    for key in keys:
        encode_key(key)
    with connected(connect, timeout, consistency) as client:
        existed = client.delete_many(dict.fromkeys(keys))
    if as_json:
        output.document({"existed": existed})
        return
    for key, held in existed.items():
        output.line(f"{'deleted' if held else 'not found'}\t{output.printable(key)}")


def scan(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Default: all keys.", show_default=False)] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N keys. Default: all.", show_default=False)
    ] = None,
    start: Annotated[str | None, typer.Option(metavar="KEY", help="First key.", show_default=False)] = None,
    end: Annotated[str | None, typer.Option(metavar="KEY", help="Key to stop before.", show_default=False)] = None,
    keys_only: Annotated[
        bool, typer.Option("--keys-only", help="Print keys alone; values stay where they are.")
    ] = False,
    values: Annotated[bool, typer.Option("--values", help="Print the values too.")] = False,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """List keys in order.

    Prints a line per key: the key, a tab, and the size of its value in bytes, or with --values the value. Control
    characters and backslashes are shown as \\n, \\\\, \\x00 and so on. It is complete or an error; what was printed
    before an error holds.

    --json prints a line of JSON per key: {"key", "bytes", "version", "expires_at" (or null)}, with --keys-only
    {"key"}, with --values also "value" (text) or "value_base64".

    Examples:

        agi-dht scan agent:

        agi-dht scan --start plan:2026-01 --end plan:2026-02 --limit 100 --values
    """
    if keys_only and values:
        raise typer.BadParameter("--keys-only and --values exclude each other")
    for key in (prefix, start, end):
        if key:
            encode_key(key)
    page_size = min(limit or SCAN_LIMIT_MAX, SCAN_LIMIT_MAX)
    with connected(connect, timeout, consistency) as client:
        if keys_only:
            for key in islice(client.iterate_keys(prefix, page_size=page_size, start=start, end=end), limit):
                if as_json:
                    output.document({"key": key})
                else:
                    output.line(output.printable(key))
            return
        for entry in islice(client.iterate_entries(prefix, page_size=page_size, start=start, end=end), limit):
            size = len(entry.value)
            if as_json:
                shown = {"key": entry.key, "bytes": size, "version": entry.version, "expires_at": entry.expires_at}
                output.document({**shown, **output.value_field(entry.value)} if values else shown)
            else:
                output.line(f"{output.printable(entry.key)}\t{output.value_text(entry.value) if values else size}")
