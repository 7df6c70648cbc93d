"""load and dump: folders and JSON lines, in and out, and what is said of what did not go."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agi.core.dht import BatchError, SyncDHTClient, Unavailable
from agi.core.dht.cli import load
from agi.core.dht.cli.progress import Progress


def _tree(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, float | None]]:
    """Every put_many: its keys, bytes and time to live."""
    seen: list[tuple[list[str], int, float | None]] = []
    real = SyncDHTClient.put_many

    def put_many(self: SyncDHTClient, items: dict[str, bytes], *, ttl_seconds: float | None = None) -> dict[str, int]:
        seen.append((list(items), sum(map(len, items.values())), ttl_seconds))
        return real(self, items, ttl_seconds=ttl_seconds)

    monkeypatch.setattr(SyncDHTClient, "put_many", put_many)
    return seen


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of what files can hold and be called."""
    folder = tmp_path / "files"
    for name, value in {
        "a.txt": b"text\n",
        "sub/raw": bytes(range(256)),
        "sub/deep/empty": b"",
        "sub.txt": b"sorts before sub/",
        "with space é\n'\"": b"v",
        ".hidden": b"h",
        "%41": b"no escape",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)
    return folder


def test_a_folder_goes_in_and_comes_out_the_same(dht: Any, files: Path, tmp_path: Path) -> None:
    went = dht("load", str(files), "--prefix", "t:f/")
    assert went == (0, b"loaded 7 keys, 289 B\n", "")
    assert dht("get", "t:f/sub/raw").out == bytes(range(256)) and dht("get", "t:f/sub/deep/empty").out == b""
    out = tmp_path / "out"
    assert dht("dump", "t:f/", "--to", str(out)) == (0, b"dumped 7 keys, 289 B\n", "")
    assert _tree(out) == _tree(files)
    assert dht("dump", "t:f/", "--to", str(tmp_path / "json"), "--json").json == {
        "dumped": 7, "bytes": 289, "refused": 0, "refused_keys": []
    }  # fmt: skip
    whole = dht("dump", "t:f/")
    assert whole.code == 0 and whole.err == "dumped 7 keys, 289 B\n"
    again = dht("load", "-", "--prefix", "t:copy/", stdin=whole.out)
    assert again.code == 0
    copied = [{**line, "key": line["key"].removeprefix("t:copy/")} for line in dht("dump", "t:copy/").lines]
    assert copied == whole.lines and [line["key"] for line in copied] == sorted(f"t:f/{name}" for name in _tree(files))
    assert dht("dump", "t:copy/t:f/", "--to", str(tmp_path / "third")).code == 0
    assert _tree(tmp_path / "third") == _tree(files)


def test_what_a_folder_holds_besides_is_named(
    dht: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    (files / "out").symlink_to(outside)
    (files / "in").symlink_to("a.txt")
    os.mkfifo(files / "pipe")
    (files / "big").write_bytes(bytes((8 << 20) + 1))
    (files / "bad\udcff").write_bytes(b"")
    (files / "closed").write_bytes(b"")
    real = os.open

    def denied(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    went = dht("load", str(files), "--prefix", "t:n/")
    assert went.code == 26 and went.text == "loaded 8 keys, 294 B, 2 skipped\n"
    assert went.err.splitlines() == [
        "failed: bad\\xff: a key must be valid Unicode: surrogates not allowed at index 7",
        "failed: big: a value has at most 8388608 bytes; this file has more",
        "failed: closed: Permission denied",
        "skipped: out: a link out of the folder",
        "skipped: pipe: no regular file",
        "error: 3 failed, see above",
    ]
    assert dht("get", "t:n/in").out == b"text\n" and dht("get", "t:n/out").code == 3
    went = dht("load", str(files), "--prefix", "t:n/", "--json")
    assert went.code == 26
    assert went.json == {
        "loaded": 8,
        "bytes": 294,
        "failed": [
            {"source": "bad\\udcff", "error": "a key must be valid Unicode: surrogates not allowed at index 7"},
            {"source": "big", "error": "a value has at most 8388608 bytes; this file has more"},
            {"source": "closed", "error": "Permission denied"},
        ],
        "skipped": [
            {"source": "out", "reason": "a link out of the folder"},
            {"source": "pipe", "reason": "no regular file"},
        ],
        "stopped": None,
    }
    for name in ("big", "bad\udcff", "closed"):
        (files / name).unlink()
    assert dht("load", str(files), "--prefix", "t:n/").code == 0  # what is no file is no failure
    assert dht("load", str(files), "--prefix", "t:g/", "--glob", "*.txt").text == "loaded 2 keys, 22 B\n"
    assert dht("scan", "t:g/", "--keys-only").text == "t:g/a.txt\nt:g/sub.txt\n"


def test_lines_go_in_and_each_wrong_one_is_named(dht: Any, tmp_path: Path) -> None:
    lines = [
        b'{"key": "t:l/text", "value": "caf\xc3\xa9 \\u2028 \\ud83d\\ude00"}',
        b'{"key": "t:l/raw", "value_base64": "/wA="}',
        b"",
        b'{"key": "t:l/ttl", "value": "v", "ttl_seconds": 500}',
        b'{"key": "t:l/none"}',
        b'{"key": "t:l/both", "value": "v", "value_base64": "/w=="}',
        b'{"key": "t:l/64", "value_base64": "*"}',
        b'{"key": "", "value": "v"}',
        b'{"key": "t:l/more", "value": "v", "version": 1}',
        b'{"key": "t:l/past", "value": "v", "ttl_seconds": -1}',
        b'{"key": "t:l/half", "value": "\\ud800"}',
        b'{"key": "t:l/\xff", "value": "v"}',
        b"key,value",
        b'{"key": "t:l/' + b"k" * 1025 + b'", "value": "v"}',
        b'{"key": "t:l/twice", "value": "1"}',
        b'{"key": "t:l/twice", "value": "2", "ttl_seconds": null}\r',
        b'{"value": "last", "key": "t:l/last"}',
    ]
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n".join(lines))
    went = dht("load", str(file))
    assert went.code == 26 and went.text == "loaded 6 keys, 23 B\n"
    named = [line.split(": ")[1] for line in went.err.splitlines() if line.startswith("failed: ")]
    assert named == [f"{file}:{number}" for number in (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)]
    assert went.err.splitlines()[-1] == "error: 10 failed, see above"
    assert dht("get", "t:l/text").text == "café \u2028 😀" and dht("get", "t:l/raw").out == b"\xff\0"
    assert dht("get", "t:l/twice").out == b"2" and dht("get", "t:l/last").out == b"last"
    assert dht("get", "t:l/ttl", "--json").json["expires_at"] is not None
    assert dht("get", "t:l/twice", "--json").json["expires_at"] is None
    assert dht("load", str(file), "--json").json["failed"][0] == {
        "source": f"{file}:5", "error": 'a line has either "value" or "value_base64"'
    }  # fmt: skip


def test_a_line_that_never_ends_is_skipped_whole(dht: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LINE_BYTES_MAX", 50)
    long = b'{"key": "t:long", "value": "' + b"x" * 500 + b'"}\n'
    went = dht("load", "-", stdin=long + b'{"key": "t:short", "value": "v"}\n' + long)
    assert went.code == 26 and went.err.splitlines()[:2] == [
        "failed: -:1: the line is too long",
        "failed: -:3: the line is too long",
    ]
    assert dht("get", "t:short").out == b"v"


def test_batches_keep_their_limits_and_what_expires_goes_apart(dht: Any, puts: list[Any]) -> None:
    def line(key: str, value: bytes, **more: object) -> bytes:
        return msgspec.json.encode({"key": key, "value_base64": base64.b64encode(value).decode(), **more}) + b"\n"

    many = b"".join(line(f"t:b/{i:05}", b"v") for i in range(2500))
    assert dht("load", "-", stdin=many).code == 0
    assert [len(keys) for keys, _, _ in puts] == [1000, 1000, 500]
    puts.clear()
    large = b"".join(line(f"t:large/{i}", bytes(900_000)) for i in range(5)) + line("t:large/5", bytes(8 << 20))
    assert dht("load", "-", stdin=large).code == 0
    assert [(len(keys), size) for keys, size, _ in puts] == [(2, 1_800_000), (2, 1_800_000), (1, 900_000), (1, 8 << 20)]
    puts.clear()
    mixed = b"".join(line(f"t:m/{i}", b"v", ttl_seconds=[None, 60, 90.5][i % 3]) for i in range(9))
    assert dht("load", "-", stdin=mixed).code == 0
    assert [(len(keys), ttl) for keys, _, ttl in puts] == [(3, None), (3, 60.0), (3, 90.5)]
    assert dht("delete", *(f"t:large/{i}" for i in range(6))).code == 0


def test_a_key_that_a_batch_failed_is_named_and_the_rest_is_loaded(dht: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SyncDHTClient.put_many

    def put_many(self: SyncDHTClient, items: dict[str, bytes], **options: Any) -> Any:
        real(self, {key: value for key, value in items.items() if key not in bad}, **options)
        if failed := {key: Unavailable("too few", needed=2, answered=1) for key in items if key in bad}:
            raise BatchError(failed)

    monkeypatch.setattr(SyncDHTClient, "put_many", put_many)
    lines = b"".join(b'{"key": "t:p/%04d", "value": "v"}\n' % i for i in range(3000))
    bad = {"t:p/0007", "t:p/2999"}
    went = dht("load", "-", stdin=lines)
    why = "too few (needed 2 replicas, 1 answered)"
    assert went.code == 26 and went.text == "loaded 2998 keys, 2.9 KiB\n"
    assert went.err == (
        f"failed: -:8 (t:p/0007): {why}\nfailed: -:3000 (t:p/2999): {why}\nerror: 2 failed, see above\n"
    )
    bad = {f"t:p/{i:04}" for i in range(1000, 2000)}
    went = dht("load", "-", stdin=lines)
    assert went.code == 26 and went.text == "loaded 1000 keys, 1000 B\n"
    assert went.err.splitlines() == [
        f"failed: all 1000 from -:1001 (t:p/1000) to -:2000 (t:p/1999): {why}",
        "error: 1000 failed, see above",
        f"error: stopped after 2000: {why}",
    ]
    told = dht("load", "-", "--json", stdin=lines).json
    assert told["stopped"] == why and len(told["failed"]) == 1000
    assert told["failed"][-1] == {"source": "-:2000 (t:p/1999)", "error": why}


def test_a_file_of_another_kind_ends_early(dht: Any, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(b"1,2,3\n" * 5000)
    went = dht("load", str(file))
    assert went.code == 26 and went.text == "loaded 0 keys, 0 B\n"
    assert went.err.count("\n") == load.FAILURES_MAX + 2
    assert went.err.splitlines()[-1] == "error: stopped after 1000: 1000 failures"


HOSTILE = {
    "t:h/../up": "a path segment . or ..",
    "t:h//abs": "an empty path segment",
    "t:h/a//b": "an empty path segment",
    "t:h/slash/": "an empty path segment",
    "t:h/.": "a path segment . or ..",
    "t:h/nul\0": "a NUL character",
    "t:h/" + "n" * 300: "a path segment is too long for this file system",
    "t:h/file/below": "one of its folders is a file or a link already",
    "t:h/": "nothing is left of the key without the prefix",
}


def test_hostile_keys_are_refused_in_a_folder_and_kept_in_lines(dht: Any, cluster: Any, tmp_path: Path) -> None:
    fine = {"t:h/file": b"1", "t:h/ok/deep": b"2", "t:h/~": b"3", "t:h/\\": b"4"}
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        client.put_many({**dict.fromkeys(HOSTILE, b"evil"), **fine})
    out = tmp_path / "in" / "out"
    went = dht("dump", "t:h/", "--to", str(out), "--json")
    assert went.code == 26
    assert _tree(tmp_path) == {f"in/out/{key[4:]}": value for key, value in fine.items()}
    told = went.json
    assert (told["dumped"], told["bytes"], told["refused"]) == (4, 4, len(HOSTILE))
    assert {each["key"]: each["reason"] for each in told["refused_keys"]} == HOSTILE
    assert went.err.count("refused: ") == len(HOSTILE)
    assert "error: 9 keys without a place in the folder: --to FILE.jsonl takes every key" in went.err
    file = tmp_path / "all.jsonl"
    assert dht("dump", "t:h/", "--to", str(file)) == (0, b"dumped 13 keys, 40 B\n", "")
    first = file.read_bytes()
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        client.delete_many([*HOSTILE, *fine])
    assert dht("scan", "t:h/").out == b""
    assert dht("load", str(file)).code == 0
    assert dht("dump", "t:h/", "--to", str(file)).code == 0 and file.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "in"]


def test_a_folder_that_is_not_empty_is_written_to_when_asked(dht: Any, tmp_path: Path) -> None:
    dht("put", "t:o/file", "new")
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_bytes(b"old")
    (out / "other").write_bytes(b"other")
    went = dht("dump", "t:o/", "--to", str(out))
    assert went.code == 10 and went.out == b"" and "the folder is not empty" in went.err
    assert dht("dump", "t:o/", "--to", str(out), "--overwrite").code == 0
    assert _tree(out) == {"file": b"new", "other": b"other"}


def test_what_is_left_of_a_life_is_kept_in_lines_and_its_loss_told_in_folders(dht: Any, tmp_path: Path) -> None:
    dht("put", "t:e/1", "v", "--ttl", "1000")
    dht("put", "t:e/2", "v")
    first, second = dht("dump", "t:e/").lines
    assert 990 < first.pop("ttl_seconds") <= 1000
    assert first == {"key": "t:e/1", "value": "v"} and second == {"key": "t:e/2", "value": "v"}
    went = dht("dump", "t:e/", "--to", str(tmp_path / "out"))
    assert went.code == 0 and went.err == "files do not keep that 1 key will expire: JSON lines do\n"


def test_a_dump_that_fails_leaves_the_old_file(dht: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.jsonl"
    dht("put", "t:k/1", "v")
    assert dht("dump", "t:k/", "--to", str(file)).code == 0
    real = SyncDHTClient.iterate_entries

    def broken(self: SyncDHTClient, prefix: str) -> Any:
        yield from real(self, prefix)
        raise Unavailable("a part of the ring is not covered", needed=2, answered=1)

    monkeypatch.setattr(SyncDHTClient, "iterate_entries", broken)
    before = file.read_bytes()
    went = dht("dump", "t:k/", "--to", str(file))
    assert went.code == 12 and went.out == b"" and went.err.startswith("error: a part of the ring is not covered")
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["file.jsonl"]


def test_progress_is_few_plain_lines_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    def lines(work: Callable[[Progress], None], total: int | None) -> list[str]:
        with Progress("loaded", total) as progress:
            work(progress)
        return capsys.readouterr().err.splitlines()

    def all_of(count: int) -> Callable[[Progress], None]:
        return lambda progress: [progress.advance(1) for _ in range(count)] and None

    assert lines(all_of(900), 900) == []
    tenths = lines(all_of(100_000), 100_000)
    assert len(tenths) == 10 and tenths[0] == "loaded 10000 of 100000" and tenths[-1] == "loaded 100000 of 100000"
    assert lines(all_of(100_000), None) == [f"loaded {10_000 * 2**i}" for i in range(4)]
    assert len(lines(lambda progress: progress.advance(10**9), None)) == 1


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("loaded", 10) as progress:
        progress.advance(4)
        progress.note("skipped: [red]\x1b[1m: a pipe")
        progress.advance(6)
    shown = terminal.getvalue()
    assert "10/10" in shown and "skipped: [red]\\x1b[1m: a pipe\n" in shown
