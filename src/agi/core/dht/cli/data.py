"""Single keys and ranges: get, put, delete, cas, incr, scan."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from agi.core.dht.cli import files, output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, Level, Timeout, connected
from agi.core.dht.errors import InvalidRequest, InvalidValue, VersionConflict
from agi.core.dht.protocol.consensus import COUNTER_MAX, COUNTER_MIN
from agi.core.dht.types import SCAN_LIMIT_MAX, VALUE_BYTES_MAX, Fence, encode_key, ttl_to_ms

NOT_FOUND_EXIT_CODE = 3

Ttl = Annotated[
    float | None, typer.Option("--ttl", metavar="SECONDS", help="Let it expire after so long.", show_default=False)
]
ValueFile = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="Take the value from a file; - is stdin.", show_default=False),
]
IfVersion = Annotated[
    int | None,
    typer.Option("--if-version", metavar="V", help="Only if the key is at this version.", show_default=False),
]

Fenced = Annotated[
    str | None,
    typer.Option(
        "--fence",
        metavar="LOCK:TOKEN",
        help="Only if no later holder of that lock has been at the key.",
        show_default=False,
    ),
]


def get(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the value to a file, in one step.", show_default=False)
    ] = None,
    fence: Fenced = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Print the value of a key.

    The bytes of the value and nothing else go to stdout. Exit code 3: the key holds no value.

    With --fence it is a step of its own among the key's writes, whatever --consistency says: earlier holders of the
    lock can change the key no more. Exit code 28: a later holder was there.

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
    shown_fence = _fence(fence)
    with connected(connect, timeout, consistency) as client:
        entry = client.get_entry(key, fence=shown_fence)
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
    file: ValueFile = None,
    ttl: Ttl = None,
    if_version: IfVersion = None,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Only if the key holds no value.")] = False,
    fence: Fenced = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Store a value; print its version.

    The value is VALUE, or what the file holds, or what comes on stdin: byte for byte, at most 8 MiB. A VALUE or FILE of
    - is stdin.

    With --if-version, --if-absent or --fence it goes through consensus, whatever --consistency says. Exit code 27: the
    condition did not hold, and the error tells the key's version; 28: a later holder of the lock was there; nothing was
    changed.

    --json prints {"key", "version", "bytes"}; on a conflict {"key", "conflict": true, "version": the key's, 0 where it
    is absent}.

    Examples:

        agi-dht put greeting hello

        agi-dht put session:7 --ttl 3600 --file session.bin

        date | agi-dht put now

        agi-dht put answer -- -42

        agi-dht put leader n7 --if-absent --ttl 30
    """
    if if_absent and if_version is not None:
        raise typer.BadParameter("--if-version and --if-absent exclude each other")
    encode_key(key)
    ttl_to_ms(ttl)
    _check_version(if_version)
    shown = _fence(fence)
    data = _value(value, file)
    with connected(connect, timeout, consistency) as client, _conflict_shown(key, as_json=as_json):
        version = client.put(key, data, ttl_seconds=ttl, if_version=if_version, if_absent=if_absent, fence=shown)
    _stored(key, version, data, as_json=as_json)


def _check_version(version: int | None) -> None:
    """Before a cluster is looked for. Raises InvalidRequest."""
    if version is not None:
        from agi.core.dht.client.conditional import checked_version

        checked_version(version)


def _fence(text: str | None) -> Fence | None:
    """Raises InvalidRequest."""
    if text is None:
        return None
    lock, _, token = text.rpartition(":")
    if not token.isascii() or not token.isdigit() or len(token) > 19:
        raise InvalidRequest(f"--fence takes LOCK:TOKEN, not {text!r}")
    return Fence(lock, int(token))


@contextlib.contextmanager
def _conflict_shown(key: str, *, as_json: bool) -> Iterator[None]:
    """A conflict shows what the key is at now, so that a script can go on from there."""
    try:
        yield
    except VersionConflict as conflict:
        if as_json:
            output.document({"key": key, "conflict": True, "version": conflict.version})
        now = f"the key is at version {conflict.version}" if conflict.version else "the key is absent"
        if conflict.message.startswith(now):
            raise
        raise VersionConflict(f"{conflict.message}: {now}", version=conflict.version) from None


def _stored(key: str, version: int, data: bytes, *, as_json: bool) -> None:
    if as_json:
        output.document({"key": key, "version": version, "bytes": len(data)})
    else:
        output.line(str(version))


def _value(value: str | None, file: Path | None) -> bytes:
    """The value from the one source that was given."""
    if value is not None and file is not None:
        raise typer.BadParameter("a value comes from VALUE or from --file, not from both")
    if value is not None and value != "-":
        return _typed(value)
    if file is not None and str(file) != "-":
        return files.read_value(file)
    if sys.stdin.isatty() and value is None and file is None:
        raise typer.BadParameter("give VALUE, or --file, or the value on stdin")
    return _limited(sys.stdin.buffer)


def _typed(value: str) -> bytes:
    """The bytes as they were typed, whatever they mean."""
    try:
        return os.fsencode(value)
    except UnicodeEncodeError as error:
        raise InvalidValue(f"the value cannot be encoded: {error.reason} at index {error.start}") from None


def _limited(stream: BinaryIO) -> bytes:
    data = stream.read(VALUE_BYTES_MAX + 1)
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidValue(f"a value has at most {VALUE_BYTES_MAX} bytes; stdin has more")
    return data


def cas(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    expected: Annotated[
        str | None, typer.Argument(metavar="EXPECTED", help="What the key has to hold.", show_default=False)
    ] = None,
    value: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="Without it, or -: --file or stdin.", show_default=False)
    ] = None,
    absent: Annotated[
        bool, typer.Option("--absent", help="Instead of EXPECTED: the key has to hold no value.")
    ] = False,
    file: ValueFile = None,
    ttl: Ttl = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Store a value if the key holds a certain other; print its version.

    It goes through consensus: of several that compare and set at a time, one succeeds. Exit code 27: the key holds
    something else, and nothing was changed; the error tells its version. VALUE is taken as by put, EXPECTED as it
    stands.

    --json prints {"key", "version", "bytes"}; on a conflict {"key", "conflict": true, "version": the key's, 0 where it
    is absent}.

    Examples:

        agi-dht cas job:7 queued running

        agi-dht cas job:8 --absent queued

        agi-dht cas model:weights v1 --file weights.bin
    """
    if absent:
        if value is not None:
            raise typer.BadParameter("--absent stands in the place of EXPECTED: give KEY and VALUE")
        expected, value = None, expected
    elif expected is None:
        raise typer.BadParameter("give EXPECTED, or --absent")
    encode_key(key)
    ttl_to_ms(ttl)
    wanted = None if expected is None else _typed(expected)
    data = _value(value, file)
    with connected(connect, timeout) as client, _conflict_shown(key, as_json=as_json):
        version = client.compare_and_set(key, wanted, data, ttl_seconds=ttl)
    _stored(key, version, data, as_json=as_json)


def incr(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    delta: Annotated[int, typer.Argument(metavar="DELTA", help="What is added.")] = 1,
    ttl: Ttl = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Add to a counter; print what it is then.

    A counter is a decimal number of 64 bits, as text; a key without a value counts from 0. It goes through consensus:
    nothing that is added is lost, or counted twice. Its TTL stays unless one is given.

    --json prints {"key", "value"}.

    Examples:

        agi-dht incr visits

        agi-dht incr credit -- -5
    """
    encode_key(key)
    ttl_to_ms(ttl)
    if not COUNTER_MIN <= delta <= COUNTER_MAX:
        raise InvalidRequest(f"a counter changes by a number of 64 bits, not {delta}")
    with connected(connect, timeout) as client:
        number = client.incr(key, delta, ttl_seconds=ttl)
    if as_json:
        output.document({"key": key, "value": number})
    else:
        output.line(str(number))


def delete(
    keys: Annotated[list[str], typer.Argument(metavar="KEY", show_default=False)],
    if_version: IfVersion = None,
    fence: Fenced = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    consistency: Level = None,
    as_json: AsJson = False,
) -> None:
    """Delete keys.

    A key that held no value is no error. Where some could not be deleted, the others are. With --if-version, which goes
    through consensus, exit code 27 says that the key is at another version, or absent, and nothing was changed; with
    --fence, 28 that a later holder of the lock was there.

    --json prints {"existed": {key: whether it held a value}}; on a conflict {"key", "conflict": true, "version"}.

    Examples:

        agi-dht delete agent:42 agent:43

        agi-dht scan tmp: --keys-only | xargs -d '\\n' agi-dht delete

        agi-dht delete job:7 --if-version 117700839942717440
    """
    if (if_version is not None or fence is not None) and len(keys) > 1:
        raise typer.BadParameter("--if-version and --fence are for a single key")
    for key in keys:
        encode_key(key)
    _check_version(if_version)
    shown = _fence(fence)
    with connected(connect, timeout, consistency) as client:
        if if_version is None and shown is None:
            existed = client.delete_many(dict.fromkeys(keys))
        else:
            with _conflict_shown(keys[0], as_json=as_json):
                existed = {keys[0]: client.delete(keys[0], if_version=if_version, fence=shown)}
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
