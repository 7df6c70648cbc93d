"""The limits of keys, values, times to live and addresses, and the arithmetic of consistency levels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agi.core.dht.errors import InvalidAddress, InvalidConsistency, InvalidKey, InvalidTTL, InvalidValue
from agi.core.dht.proto import dht_pb2 as pb
from agi.core.dht.types import (
    KEY_BYTES_MAX,
    TTL_MS_MAX,
    VALUE_BYTES_MAX,
    Consistency,
    Node,
    check_value,
    encode_key,
    format_address,
    parse_address,
    ttl_to_ms,
)

# --- keys


@pytest.mark.parametrize("key", ["k", " ", "\0", "agent:1", "lock:é", "🔒", "k" * 1024, "é" * 512])
def test_keys(key: str) -> None:
    assert encode_key(key) == key.encode("utf-8")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "may not be empty"),
        ("k" * 1025, "at most 1024 bytes, this one 1025"),
        ("é" * 513, "at most 1024 bytes, this one 1026"),
        ("ab\ud800", "valid Unicode: surrogates not allowed at index 2"),
        ("\udfff", "valid Unicode"),
        (b"k", "a key is a str, not bytes"),
        (None, "a key is a str, not NoneType"),
        (7, "a key is a str, not int"),
    ],
)
def test_wrong_keys(key: object, message: str) -> None:
    with pytest.raises(InvalidKey, match=message):
        encode_key(key)


@given(st.text(max_size=400))
def test_a_key_is_taken_exactly_if_it_has_1_to_1024_bytes(key: str) -> None:
    raw = key.encode()
    if 0 < len(raw) <= KEY_BYTES_MAX:
        assert encode_key(key).decode() == key
    else:
        with pytest.raises(InvalidKey):
            encode_key(key)


# --- values


def test_values() -> None:
    assert check_value(b"") == b""
    for given_value in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        value = check_value(given_value)
        assert value == b"abc" and type(value) is bytes
    assert check_value(memoryview(b"abcdef")[::2]) == b"ace"
    largest = bytes(VALUE_BYTES_MAX)
    assert check_value(largest) is largest


def test_a_value_does_not_change_with_the_buffer_it_came_from() -> None:
    buffer = bytearray(b"abc")
    value = check_value(buffer)
    buffer[0] = 0
    assert value == b"abc"


def test_wrong_values() -> None:
    for value, name in (("text", "str"), (None, "NoneType"), ([1], "list"), (7, "int")):
        with pytest.raises(InvalidValue, match=f"a value is bytes, not {name}"):
            check_value(value)
    with pytest.raises(InvalidValue, match=f"at most {VALUE_BYTES_MAX} bytes, this one {VALUE_BYTES_MAX + 1}"):
        check_value(bytes(VALUE_BYTES_MAX + 1))


# --- times to live


@pytest.mark.parametrize(
    ("ttl", "ms"),
    [
        (None, 0),
        (1, 1000),
        (0.5, 500),
        (0.0014, 1),
        (1e-9, 1),
        (5e-324, 1),
        (TTL_MS_MAX // 1000, TTL_MS_MAX),
        (TTL_MS_MAX / 1000, TTL_MS_MAX),
    ],
)
def test_ttl(ttl: float | None, ms: int) -> None:
    assert ttl_to_ms(ttl) == ms
    assert type(ttl_to_ms(ttl)) is int


@pytest.mark.parametrize(
    "ttl", [0, -0.0, -1, -1e-9, math.nan, math.inf, -math.inf, TTL_MS_MAX // 1000 + 1, 1e300, 10**400, -(10**400)]
)
def test_ttl_out_of_range(ttl: float) -> None:
    with pytest.raises(InvalidTTL, match="above 0 and at most"):
        ttl_to_ms(ttl)


@pytest.mark.parametrize("ttl", [True, False, "1", b"1", [], 1j])
def test_ttl_of_another_type(ttl: object) -> None:
    with pytest.raises(InvalidTTL, match="is a number, not"):
        ttl_to_ms(ttl)


# --- addresses


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:7000", "localhost", 7000),
        ("n-1.rack_2.example:1", "n-1.rack_2.example", 1),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]:7000", "::1", 7000),
        ("[fe80::1:2]:80", "fe80::1:2", 80),
        ("[::ffff:10.0.0.1]:80", "::ffff:10.0.0.1", 80),
        ("  h:07000\n", "h", 7000),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert parse_address(format_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h", "is not host:port"),
        ("h:", "is not host:port"),
        (":7000", "is not host:port"),
        ("", "is not host:port"),
        ("h:x", "is not host:port"),
        ("h:-1", "is not host:port"),
        ("h:7000/x", "is not host:port"),
        ("http://h:7000", "is not host:port"),
        ("two words:7000", "is not host:port"),
        ("h:7000\nh:7001", "is not host:port"),
        ("::1:7000", r"write an IPv6 address as \[::1\]:7000"),
        ("[::1]", r"write an IPv6 address as \[::1\]:7000"),
        ("[host]:7000", "is not host:port"),
        ("h:0", "port must be 1 to 65535"),
        ("h:65536", "port must be 1 to 65535"),
        ("h:99999", "port must be 1 to 65535"),
        ("h:100000", "is not host:port"),
        (None, "is not host:port"),
        (7000, "is not host:port"),
        (b"h:7000", "is not host:port"),
    ],
)
def test_wrong_addresses(text: object, message: str) -> None:
    with pytest.raises(InvalidAddress, match=message):
        parse_address(text)  # type: ignore[arg-type]


# --- consistency


@pytest.mark.parametrize(("replicas", "quorum"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)])
def test_replies_needed(replicas: int, quorum: int) -> None:
    assert Consistency.ONE.needed(replicas) == 1
    assert Consistency.QUORUM.needed(replicas) == quorum
    assert Consistency.ALL.needed(replicas) == replicas
    assert Consistency.LINEARIZABLE.needed(replicas) == quorum
    assert 2 * quorum > replicas  # any two quorums share a replica


def test_parse_consistency() -> None:
    for level in Consistency:
        assert (
            Consistency.parse(level) is Consistency.parse(level.name) is Consistency.parse(level.name.lower()) is level
        )
    for wrong in ("", "TWO", "QUORUM ", 1, 2, None, True, b"ONE"):
        with pytest.raises(InvalidConsistency, match="use ONE, QUORUM, ALL or LINEARIZABLE"):
            Consistency.parse(wrong)


def test_consistency_numbers_are_those_of_the_wire() -> None:
    numbers = {"ONE": 1, "QUORUM": 2, "ALL": 3, "LINEARIZABLE": 4}
    assert {level.name: level.value for level in Consistency} == numbers
    contract = {name.removeprefix("CONSISTENCY_"): number for name, number in pb.Consistency.items()}
    assert contract == {"UNSPECIFIED": 0, **numbers}


def test_nodes_are_hashable_although_their_labels_are_not() -> None:
    one, other = Node("a", "h", 1, metadata={"rack": "r"}), Node("a", "h", 1, metadata={"rack": "s"})
    assert hash(one) == hash(other) and one != other
    assert Node("a", "h", 1).metadata is not Node("a", "h", 1).metadata
