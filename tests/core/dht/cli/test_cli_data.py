"""get, put, delete, cas, incr, scan on three real nodes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agi.core.dht import SyncDHTClient


def test_put_prints_the_version_and_get_the_bytes(dht: Any) -> None:
    stored = dht("put", "d:1", "hello")
    assert stored.code == 0 and stored.err == "" and stored.text.endswith("\n")
    assert dht("get", "d:1") == (0, b"hello", "")
    shown = dht("get", "d:1", "--json").json
    assert shown.pop("created_at") == shown.pop("updated_at") == int(stored.text) >> 16
    assert shown == {
        "key": "d:1",
        "found": True,
        "value": "hello",
        "version": int(stored.text),
        "expires_at": None,
    }
    second = dht("put", "d:1", "again", "--json").json
    assert second == {"key": "d:1", "version": second["version"], "bytes": 5} and second["version"] > int(stored.text)


def test_a_value_comes_from_one_source_byte_for_byte(dht: Any, tmp_path: Path) -> None:
    raw = bytes(range(256))
    file = tmp_path / "value"
    file.write_bytes(raw)
    for arguments, stdin in (
        (["--file", str(file)], None),
        ([], raw),
        (["-"], raw),
        (["--file", "-"], raw),
    ):
        assert dht("put", "d:source", *arguments, stdin=stdin).code == 0
        assert dht("get", "d:source").out == raw, arguments
        assert dht("put", "d:source", "").code == 0 and dht("get", "d:source").out == b""
    assert dht("put", "d:source", "--", "-42").code == 0 and dht("get", "d:source").out == b"-42"
    assert dht("put", "d:source", "é\udcff\udc80").code == 0  # as the interpreter passes bytes that are not UTF-8
    assert dht("get", "d:source").out == "é".encode() + b"\xff\x80"
    assert dht("get", "d:source", "--json").json["value_base64"] == "w6n/gA=="
    for arguments, stdin in ((["v", "--file", str(file)], None), ([], None), (["-", "--file", str(file)], b"")):
        refused = dht("put", "d:source", *arguments, stdin=stdin)
        assert refused.code == 2 and refused.out == b"" and "Error: " in refused.err
    assert dht("get", "d:source").out == "é".encode() + b"\xff\x80"


def test_a_missing_key_has_an_exit_code_of_its_own(dht: Any, tmp_path: Path) -> None:
    assert dht("get", "d:none") == (3, b"", "not found: 'd:none'\n")
    missing = dht("get", "d:none", "--json")
    assert missing.code == 3 and missing.json == {"key": "d:none", "found": False}
    out = tmp_path / "out"
    out.write_bytes(b"old")
    assert dht("get", "d:none", "--out", str(out)).code == 3 and out.read_bytes() == b"old"


def test_a_value_into_a_file(dht: Any, tmp_path: Path) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    out.write_bytes(b"old")
    link.symlink_to(out)
    dht("put", "d:out", stdin=b"\0new")
    assert dht("get", "d:out", "--out", str(link)) == (0, b"", "")
    assert out.read_bytes() == b"\0new" and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    for target in (tmp_path, tmp_path / "nowhere" / "out"):
        refused = dht("get", "d:out", "--out", str(target))
        assert refused.code == 10 and refused.err.startswith(f"error: {target}: ") and refused.out == b""
    assert dht("get", "d:out", "--out", str(out), "--json").code == 2


def test_on_a_terminal_a_value_without_an_end_of_line_gets_one_on_stderr(
    dht: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dht("put", "d:tty", "text")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert dht("get", "d:tty") == (0, b"text", "\n")


def test_a_time_to_live(dht: Any) -> None:
    before = time.time()
    assert dht("put", "d:ttl", "v", "--ttl", "1000.5").code == 0
    shown = dht("get", "d:ttl", "--json").json
    assert before + 1000 < shown["expires_at"] / 1000 < time.time() + 1001


def test_delete_says_what_there_was(dht: Any) -> None:
    dht("put", "d:del1", "v")
    gone = dht("delete", "d:del1", "d:del\n2", "d:del1")
    assert gone == (0, b"deleted\td:del1\nnot found\td:del\\n2\n", "")
    assert dht("get", "d:del1").code == 3
    dht("put", "d:del1", "v")
    assert dht("delete", "d:none", "d:del1", "--json").json == {"existed": {"d:none": False, "d:del1": True}}


def test_put_under_a_condition(dht: Any) -> None:
    first = dht("put", "d:if", "1", "--if-absent", "--ttl", "1000").text.strip()
    refused = dht("put", "d:if", "x", "--if-absent")
    assert refused == (27, b"", f"error: the key exists: the key is at version {first}\n")
    shown = dht("put", "d:if", "x", "--if-absent", "--json")
    assert shown.code == 27 and shown.json == {"key": "d:if", "conflict": True, "version": int(first)}
    second = dht("put", "d:if", "22", "--if-version", first, "--json").json
    assert second == {"key": "d:if", "version": second["version"], "bytes": 2} and second["version"] > int(first)
    refused = dht("put", "d:if", "x", "--if-version", first)
    assert (
        refused.code == 27 and refused.out == b"" and f"at version {second['version']}, not at {first}\n" in refused.err
    )
    shown = dht("put", "d:if", "x", "--if-version", first, "--json")
    assert shown.code == 27 and shown.json["version"] == second["version"] and shown.err == refused.err
    shown = dht("get", "d:if", "--json", "--consistency", "linearizable").json
    assert (shown["value"], shown["version"], shown["expires_at"]) == ("22", second["version"], None)


def test_delete_of_a_version(dht: Any) -> None:
    first, second = (dht("put", "d:del-if", value).text.strip() for value in "12")
    assert dht("delete", "d:del-if", "--if-version", first).code == 27 and dht("get", "d:del-if").out == b"2"
    assert dht("delete", "d:del-if", "--if-version", second) == (0, b"deleted\td:del-if\n", "")
    assert dht("get", "d:del-if").code == 3
    gone = dht("delete", "d:del-if", "--if-version", second)
    assert gone.code == 27 and gone.err == f"error: the key is absent, not at {second}\n"
    shown = dht("delete", "d:del-if", "--if-version", second, "--json")
    assert shown.code == 27 and shown.json == {"key": "d:del-if", "conflict": True, "version": 0}
    third = dht("put", "d:del-if", "3").text.strip()
    assert dht("delete", "d:del-if", "--if-version", third, "--json").json == {"existed": {"d:del-if": True}}


def test_cas_stores_over_what_is_expected(dht: Any, tmp_path: Path) -> None:
    assert dht("cas", "d:cas", "1", "2") == (27, b"", "error: the value is another: the key is absent\n")
    assert dht("cas", "d:cas", "1", "2", "--json").json == {"key": "d:cas", "conflict": True, "version": 0}
    first = dht("cas", "d:cas", "--absent", "1")
    refused = dht("cas", "d:cas", "2", "3")
    assert refused == (27, b"", f"error: the value is another: the key is at version {first.text.strip()}\n")
    assert first.code == 0 and dht("get", "d:cas", "--json").json["version"] == int(first.text)
    assert dht("cas", "d:cas", "--absent", "2").code == dht("cas", "d:cas", "", "2").code == 27
    second = dht("cas", "d:cas", "1", "-", "--json", "--ttl", "1000", stdin=b"\0two").json
    assert second == {"key": "d:cas", "version": second["version"], "bytes": 4} and second["version"] > int(first.text)
    assert dht("get", "d:cas").out == b"\0two" and dht("get", "d:cas", "--json").json["expires_at"]
    dht("put", "d:cas", "\udcff")  # a byte that is not UTF-8
    file = tmp_path / "value"
    file.write_bytes(b"from a file")
    assert dht("cas", "d:cas", "\udcff", "--file", str(file)).code == 0
    assert dht("get", "d:cas").out == b"from a file"
    assert dht("put", "d:cas", "").code == 0
    assert dht("cas", "d:cas", "--", "", "-1").code == 0 and dht("get", "d:cas").out == b"-1"


def test_incr_counts(dht: Any) -> None:
    assert dht("incr", "d:n") == (0, b"1\n", "")
    assert dht("incr", "d:n", "41") == (0, b"42\n", "")
    assert dht("incr", "d:n", "--json", "--", "-50").json == {"key": "d:n", "value": -8}
    assert dht("get", "d:n").out == b"-8" and dht("get", "d:n", "--json").json["expires_at"] is None
    dht("incr", "d:n", "0", "--ttl", "1000")
    assert dht("get", "d:n", "--json").json["expires_at"]
    dht("put", "d:word", "word")
    refused = dht("incr", "d:word")
    assert refused == (10, b"", "error: the value is no counter\n") and dht("get", "d:word").out == b"word"


def test_scan_shows_keys_sizes_or_values_in_order(dht: Any) -> None:
    for key, value in {"s:b": b"two\nlines\\", "s:a": b"1", "s:\xe9": b"\xff", "s:\x1b[1m": b""}.items():
        dht("put", key, stdin=value)
    assert dht("scan", "s:").text == "s:\\x1b[1m\t0\ns:a\t1\ns:b\t10\ns:é\t1\n"
    assert dht("scan", "s:", "--keys-only").text == "s:\\x1b[1m\ns:a\ns:b\ns:é\n"
    assert dht("scan", "s:", "--values").text == "s:\\x1b[1m\t\ns:a\t1\ns:b\ttwo\\nlines\\\\\ns:é\t\\xff\n"
    assert dht("scan", "s:", "--keys-only", "--json").lines == [
        {"key": key} for key in ("s:\x1b[1m", "s:a", "s:b", "s:é")
    ]
    shown = dht("scan", "s:", "--json").lines
    assert [(line["key"], line["bytes"], line["expires_at"]) for line in shown] == [
        ("s:\x1b[1m", 0, None), ("s:a", 1, None), ("s:b", 10, None), ("s:é", 1, None)
    ]  # fmt: skip
    with_values = dht("scan", "s:", "--json", "--values").lines
    assert [line.get("value", line.get("value_base64")) for line in with_values] == ["", "1", "two\nlines\\", "/w=="]
    assert all(set(line) - {"value", "value_base64"} == set(shown[0]) for line in with_values)
    assert dht("scan", "s:", "--values", "--keys-only").code == 2
    assert dht("scan", "s:nothing") == (0, b"", "")


def test_scan_pages_through_everything_and_stops_at_the_limit(dht: Any, cluster: Any) -> None:
    keys = [f"page:{i:05}" for i in range(2500)]
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        client.put_many(dict.fromkeys(keys, b"v"))
    for options in (["--keys-only"], []):
        found = dht("scan", "page:", *options).text.splitlines()
        assert [line.split("\t")[0] for line in found] == keys
        for limit in (1, 999, 1001, 2499):
            found = dht("scan", "page:", *options, "--limit", str(limit)).text.splitlines()
            assert [line.split("\t")[0] for line in found] == keys[:limit]
    ranged = dht("scan", "--start", "page:00010", "--end", "page:00012", "--keys-only")
    assert ranged.text == "page:00010\npage:00011\n"
    assert dht("scan", "page:", "--start", "page:02499", "--keys-only").text == "page:02499\n"


LONG = "k" * 1025


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["get", ""], 10, "a key may not be empty"),
        (["get", LONG], 10, "a key has at most 1024 bytes"),
        (["get", "\udcff"], 10, "a key must be valid Unicode"),
        (["put", "\ud800", "v"], 10, "a key must be valid Unicode"),
        (["put", "k", "\ud800"], 10, "the value cannot be encoded"),
        (["put", LONG, "v"], 10, "a key has at most"),
        (["put", "k", "v", "--ttl", "-1"], 10, "ttl_seconds must be above 0"),
        (["put", "k", "v", "--ttl", "0"], 10, "ttl_seconds must be above 0"),
        (["put", "k", "v", "--ttl", "nan"], 10, "ttl_seconds must be above 0"),
        (["put", "k", "v", "--ttl", "1e300"], 10, "ttl_seconds must be above 0"),
        (["put", "k", "v", "--consistency", "TWO"], 10, "unknown consistency 'TWO'"),
        (["put", "k", "v", "--if-version", "0"], 10, "a version is a positive number"),
        (["put", "k", "v", "--if-version", "-1"], 10, "a version is a positive number"),
        (["put", "k", "v", "--if-version", str(1 << 63)], 10, "a version is a positive number"),
        (["put", "k", "v", "--if-absent", "--ttl", "-1"], 10, "ttl_seconds must be above 0"),
        (["delete", "k", "--if-version", "0"], 10, "a version is a positive number"),
        (["cas", "", "1", "2"], 10, "a key may not be empty"),
        (["cas", "k", "\ud800", "2"], 10, "the value cannot be encoded"),
        (["cas", "k", "1", "\ud800"], 10, "the value cannot be encoded"),
        (["cas", "k", "1", "2", "--ttl", "0"], 10, "ttl_seconds must be above 0"),
        (["cas", "k", "1", "--file", "/nowhere/at/all"], 10, "/nowhere/at/all: No such file"),
        (["incr", LONG], 10, "a key has at most"),
        (["incr", "k", str(1 << 63)], 10, "a number of 64 bits"),
        (["incr", "k", "--ttl", "nan"], 10, "ttl_seconds must be above 0"),
        (["put", "k", "--file", "/"], 10, "/: Is a directory"),
        (["put", "k", "--file", "/nowhere/at/all"], 10, "/nowhere/at/all: No such file"),
        (["delete", "a", ""], 10, "a key may not be empty"),
        (["delete", "\udc80"], 10, "a key must be valid Unicode"),
        (["scan", LONG], 10, "a key has at most"),
        (["scan", "--start", "\udcff"], 10, "a key must be valid Unicode"),
        (["scan", "--end", LONG], 10, "a key has at most"),
        (["locate", ""], 10, "a key may not be empty"),
        (["get", "k", "--timeout", "0"], 10, "a timeout is above 0"),
        (["get", "k", "--timeout", "nan"], 10, "a timeout is above 0"),
        (["status", "--timeout", "-1"], 10, "a timeout is above 0"),
        (["get", "k", "--connect", "nohost"], 10, "'nohost' is not host:port"),
        (["get", "k", "--connect", "::1:7000"], 10, "write an IPv6 address as [::1]:7000"),
        (["get", "k", "--connect", "[::1]:99999"], 10, "the port must be 1 to 65535"),
        (["get", "k", "--connect", "h\udcff:1"], 10, "is not host:port"),
        (["get", "k", "--connect", ", ,"], 10, "--connect takes HOST:PORT"),
        (["status", "--connect", "h:p"], 10, "'h:p' is not host:port"),
        (["load", "/nowhere/at/all"], 10, "/nowhere/at/all: No such file"),
        (["load", "/", "--prefix", "\udcff"], 10, "a key must be valid Unicode"),
        (["dump", LONG], 10, "a key has at most"),
        (["dump", "zz:", "--to", "/nowhere/at/all.jsonl"], 10, "/nowhere/at/all.jsonl: No such file"),
        (["dump", "zz:", "--to", "/dev/null/folder"], 10, "/dev/null/folder: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_an_exit_code(
    dht: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    if "--to" not in arguments:  # all else is found out before a cluster is looked for
        monkeypatch.setenv("AGI_DHT_CONNECT", "127.0.0.1:1")
    ended = dht(*arguments, stdin=b"")
    assert ended.code == code and ended.out == b""
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and said in ended.err, ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"], ["get", "a", "b"], ["put"], ["delete"], ["nothing"], ["get", "k", "--nothing"], ["load"],
        ["scan", "--limit", "0"], ["scan", "--limit", "x"], ["put", "k", "v", "--ttl", "soon"], ["config"], [],
        ["put", "k", "v", "--if-version", "1", "--if-absent"], ["put", "k", "v", "--if-version", "one"],
        ["delete", "a", "b", "--if-version", "1"], ["cas", "k"], ["cas", "k", "--absent", "1", "2"],
        ["cas", "k", "1", "2", "3"], ["cas", "k", "1", "2", "--file", "f"], ["incr"], ["incr", "k", "one"],
        ["get", "k", "--timeout", "soon"], ["load", "-", "--glob", "*"], ["config", "nothing"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(dht: Any, arguments: list[str]) -> None:
    ended = dht(*arguments, stdin=b"")
    assert ended.code == 2 and "Usage: agi-dht" in ended.err + ended.text and "Traceback" not in ended.err


def test_a_value_over_the_limit_is_refused_before_it_is_sent(dht: Any, tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(bytes((8 << 20) + 1))
    refused = dht("put", "d:big", "--file", str(file))
    assert refused.code == 10 and "at most 8388608 bytes; this file has more" in refused.err
    assert dht("put", "d:big", stdin=file.read_bytes()).code == 10
    assert dht("get", "d:big").code == 3
    file.write_bytes(bytes(8 << 20))
    assert dht("put", "d:big", "--file", str(file)).code == 0
    assert dht("get", "d:big").out == bytes(8 << 20)
    dht("delete", "d:big")


def test_nobody_answers(dht: Any) -> None:
    ended = dht("get", "k", "--connect", "127.0.0.1:1", "--timeout", "0.3")
    assert ended.code == 23 and ended.out == b"" and ended.err.startswith("error: ") and "127.0.0.1:1" in ended.err
    assert ended.err.count("\n") == 1 and "Connection refused" in ended.err  # not that the last try was cut short


def test_the_levels_and_a_dead_address_before_a_live_one(dht: Any, cluster: Any) -> None:
    for level in ("one", "QUORUM", "All", "linearizable"):
        assert dht("put", "d:level", level, "--consistency", level).code == 0
        assert dht("get", "d:level", "--consistency", level).out == level.encode()
    assert dht("get", "d:level", "--connect", f"127.0.0.1:1, {cluster.cluster.addresses[1]}").out == b"linearizable"
