"""The mapping view and its codecs."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from cluster import ThreadedCluster

from agi.core.dht import RAW, TEXT, Codec, InvalidKey, InvalidValue, Json, MessagePack, SyncDHTClient
from agi.core.dht.protocol.messages import Scan


class Agent(msgspec.Struct):
    name: str
    steps: int = 0


@dataclass
class Point:
    x: int
    y: int


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreadedCluster]:
    cluster = ThreadedCluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def client(nodes: ThreadedCluster) -> Iterator[SyncDHTClient]:
    with nodes.client() as client:
        yield client
        client.delete_many([key for key, _ in client.iterate()])


def test_it_is_a_dict_of_the_keys_under_a_prefix(client: SyncDHTClient) -> None:
    client.put_many({"a:1": b"one", "a:2": b"two", "b:1": b"other", "a": b"bare", "a;": b"after"})
    view = client.map("a:")
    assert isinstance(view, MutableMapping)
    assert view["1"] == b"one" and "1" in view and "3" not in view
    assert list(view) == ["1", "2"] and len(view) == 2 and bool(view)
    assert list(view.items()) == [("1", b"one"), ("2", b"two")] and list(view.values()) == [b"one", b"two"]
    assert view == {"1": b"one", "2": b"two"} and dict(view) == {"1": b"one", "2": b"two"}
    assert b"two" in view.values() and ("2", b"two") in view.items() and ("2", b"one") not in view.items()
    view["10"] = b"ten"
    assert client.get("a:10") == b"ten" and list(view) == ["1", "10", "2"]
    del view["1"]
    assert client.get("a:1") is None
    assert "'a:'" in repr(view)
    view.clear()
    assert len(view) == 0 and not view and view == {}
    assert client.scan() == [("a", b"bare"), ("a;", b"after"), ("b:1", b"other")]
    assert list(client.map()) == ["a", "a;", "b:1"]


def test_what_is_absent_is_a_key_error(client: SyncDHTClient) -> None:
    view = client.map("m:")
    with pytest.raises(KeyError, match="'x'"):
        view["x"]
    with pytest.raises(KeyError):
        del view["x"]
    with pytest.raises(KeyError):
        view.pop("x")
    with pytest.raises(KeyError):
        view.popitem()
    assert view.get("x") is None and view.get("x", b"d") == b"d" and view.pop("x", b"d") == b"d"


def test_pop_setdefault_and_update(client: SyncDHTClient) -> None:
    view = client.map("m:")
    assert view.setdefault("x", b"1") == b"1" and view.setdefault("x", b"2") == b"1"
    assert view.pop("x") == b"1" and "x" not in view
    view.update({"b": b"2", "a": b"1"}, c=b"3")
    view.update([("d", b"4")])
    assert list(view) == ["a", "b", "c", "d"]
    assert view.popitem() == ("a", b"1")
    view.update({f"k{i:04}": b"%d" % i for i in range(2500)})
    assert len(client.map("m:k")) == 2500
    view.clear()
    assert len(view) == 0


def test_keys_that_cannot_be(client: SyncDHTClient) -> None:
    view: Any = client.map("m:")
    for bad in (7, None, b"x", "\ud800", "x" * 2000):
        assert bad not in view
        with pytest.raises(InvalidKey):
            view[bad]
        with pytest.raises(InvalidKey):
            view[bad] = b"1"
    view[""] = b"the prefix itself"
    assert client.get("m:") == b"the prefix itself" and list(view) == [""]
    assert "" not in client.map()
    with pytest.raises(InvalidKey):
        client.map("\ud800")


@pytest.mark.parametrize(
    ("codec", "value", "stored"),
    [
        (RAW, b"\x00\xff", b"\x00\xff"),
        (TEXT, "schön", "schön".encode()),
        (Json(), {"a": [1, 2.5, None, "x"]}, b'{"a":[1,2.5,null,"x"]}'),
        (Json(type=Agent), Agent("ada", 3), b'{"name":"ada","steps":3}'),
        (Json(type=Point), Point(1, 2), b'{"x":1,"y":2}'),
        (MessagePack(), {"a": b"\x00", "n": -1}, msgspec.msgpack.encode({"a": b"\x00", "n": -1})),
        (MessagePack(type=Agent), Agent("ada"), msgspec.msgpack.encode(Agent("ada"))),
        (MessagePack(type=dict[str, tuple[int, ...]]), {"a": (1, 2)}, msgspec.msgpack.encode({"a": (1, 2)})),
    ],
)
def test_codecs(client: SyncDHTClient, codec: Codec[Any], value: Any, stored: bytes) -> None:
    view = client.map("c:", codec=codec)
    view["k"] = value
    assert client.get("c:k") == stored
    assert view["k"] == value and type(view["k"]) is type(value)
    assert list(view.items()) == [("k", value)] and view.pop("k") == value
    view.update(k=value)
    assert list(view.values()) == [value]


@pytest.mark.parametrize(
    ("codec", "bad_value", "bad_bytes"),
    [
        (TEXT, 7, b"\xff"),
        (TEXT, "\ud800", b"\xc3"),
        (RAW, "text", None),
        (Json(), object(), b"{"),
        (Json(), {1j: 1}, b"\xff\xfe"),
        (Json(type=Agent), {"x": object()}, b'{"name":7}'),
        (MessagePack(), object(), b"\xc1"),
        (MessagePack(), 1 << 70, b"\x92\x01"),
        (MessagePack(type=Agent), object(), msgspec.msgpack.encode({"steps": 1})),
    ],
)
def test_what_cannot_be_translated_is_a_typed_error_and_changes_nothing(
    client: SyncDHTClient, codec: Codec[Any], bad_value: Any, bad_bytes: bytes | None
) -> None:
    view = client.map("c:", codec=codec)
    with pytest.raises(InvalidValue):
        view["k"] = bad_value
    with pytest.raises(InvalidValue):
        view.update({"k": bad_value})
    assert client.get("c:k") is None
    if bad_bytes is not None:
        client.put("c:k", bad_bytes)
        with pytest.raises(InvalidValue):
            view["k"]
        with pytest.raises(InvalidValue):
            list(view.items())
        assert "k" in view and list(view) == ["k"]  # the key is there all the same
        view.clear()
        assert client.get("c:k") is None


def test_lengths_and_keys_do_not_fetch_values(
    nodes: ThreadedCluster, client: SyncDHTClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put_many({f"z:{i}": b"1" for i in range(20)})
    view = client.map("z:")
    keys_only: list[bool] = []
    for node in nodes.cluster.living():
        scanner = node.scanner
        assert scanner is not None

        def spy(request: Scan, reply: Any, trace: str, scan: Any = scanner.scan) -> None:
            keys_only.append(request.keys_only)
            scan(request, reply, trace)

        monkeypatch.setattr(scanner, "scan", spy)
    assert len(view) == 20 and keys_only == [True]
    assert len([*iter(view)]) == 20 and keys_only == [True, True]
    assert len([*iter(view.items())]) == 20 and keys_only == [True, True, False]
