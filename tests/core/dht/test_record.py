"""Packed records: round trip, damage, and the order that makes merging `max()`."""

from __future__ import annotations

import doctest
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht.errors import StorageCorrupt
from agi.core.dht.protocol import record as r

KEY = b"agent:1"
u64 = st.integers(0, (1 << 64) - 1)
u56 = st.integers(0, (1 << 56) - 1)
keys = st.binary(min_size=1, max_size=20)
flags = st.sampled_from([0, r.TOMBSTONE])
records = st.builds(
    r.pack,
    st.just(KEY),
    st.sampled_from([b"", b"a", b"b", b"ab"]),
    hlc=st.integers(1, 3) | u64,
    writer=st.integers(1, 3) | u64,
    created_ms=st.integers(0, 2),
    expires_ms=st.integers(0, 2),
    flags=flags,
)


# --- round trip


@given(keys, st.binary(max_size=200), u64, u64, u56, u64, flags)
def test_round_trip(key: bytes, value: bytes, hlc: int, writer: int, created: int, expires: int, flag: int) -> None:
    packed = r.pack(key, value, hlc=hlc, writer=writer, created_ms=created, expires_ms=expires, flags=flag)
    assert r.verify(key, packed) is packed
    assert packed[r.HEADER :] == value and len(packed) == r.HEADER + len(value)
    assert r.hlc_of(packed) == hlc
    assert int.from_bytes(packed[8:16], "big") == writer
    assert r.created_ms_of(packed) == created
    assert r.expires_ms_of(packed) == expires
    assert packed[r.FLAGS] == flag | (r.EXPIRES if expires else 0)


@given(st.lists(st.tuples(keys, st.binary(max_size=20)), max_size=5), st.integers(1, 1 << 60), u64, u56, u64, flags)
def test_pack_batch_is_pack_of_each(
    items: list[tuple[bytes, bytes]], hlc: int, writer: int, created: int, expires: int, flag: int
) -> None:
    batch = r.pack_batch([k for k, _ in items], [v for _, v in items], hlc, writer, created, expires, flag)
    assert batch == [
        r.pack(key, value, hlc=hlc + i, writer=writer, created_ms=created, expires_ms=expires, flags=flag)
        for i, (key, value) in enumerate(items)
    ]


def test_layout_stays_the_same_across_versions() -> None:
    """Stored data relies on these bytes."""
    packed = r.pack(b"key", b"value", hlc=0x0102030405060708, writer=0x1112131415161718, created_ms=5, expires_ms=6)
    assert packed.hex() == GOLDEN


GOLDEN = "0102030405060708111213141516171802000000000000059dffb41b49fceee2000000000000000676616c7565"


# --- damage


@settings(max_examples=30, deadline=None)
@given(keys, st.binary(max_size=24), u64, u64, u56, u64, flags)
def test_every_flipped_bit_is_detected(
    key: bytes, value: bytes, hlc: int, writer: int, created: int, expires: int, flag: int
) -> None:
    packed = r.pack(key, value, hlc=hlc, writer=writer, created_ms=created, expires_ms=expires, flags=flag)
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StorageCorrupt):
            r.verify(key, bytes(damaged))
    for bit in range(8 * len(key)):
        other = bytearray(key)
        other[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StorageCorrupt):
            r.verify(bytes(other), packed)


@given(keys, st.binary(max_size=24))
def test_every_cut_and_every_addition_is_detected(key: bytes, value: bytes) -> None:
    packed = r.pack(key, value, hlc=1, writer=1)
    for damaged in (*(packed[:length] for length in range(len(packed))), packed + b"\0", b"\0" + packed):
        with pytest.raises(StorageCorrupt):
            r.verify(key, damaged)


def test_the_error_names_the_key_but_not_all_of_a_long_one() -> None:
    with pytest.raises(StorageCorrupt, match=r"key b'k{64}' fails"):
        r.verify(b"k" * 100, b"")


# --- order


@given(records, records)
def test_order_is_hlc_then_writer_then_content(a: bytes, b: bytes) -> None:
    hlc_a, hlc_b = r.hlc_of(a), r.hlc_of(b)
    writer_a, writer_b = a[8:16], b[8:16]
    if hlc_a != hlc_b:
        assert (a < b) == (hlc_a < hlc_b)
    elif writer_a != writer_b:
        assert (a < b) == (writer_a < writer_b)
    else:
        assert (a == b) == (a[16:] == b[16:])
    assert a == b or max(a, b) is max(b, a)


def test_the_same_version_with_other_content_has_one_winner() -> None:
    a, b = (r.pack(KEY, value, hlc=1, writer=1) for value in (b"a", b"b"))
    assert a != b and max(a, b) == max(b, a)
    delete = r.pack(KEY, b"", hlc=1, writer=1, flags=r.TOMBSTONE)
    assert max(a, b, delete) == delete


@given(st.lists(records, min_size=1, max_size=4))
def test_merge_is_commutative_associative_and_idempotent(versions: list[bytes]) -> None:
    expected = max(versions)
    for order in permutations(versions):
        merged = order[0]
        for version in order:
            merged = max(merged, version)
        assert merged == expected
    assert max(expected, expected) == expected
    if len(versions) > 2:
        a, b, c = versions[:3]
        assert max(max(a, b), c) == max(a, max(b, c))


# --- liveness


@pytest.mark.parametrize(
    ("expires", "now", "live"),
    [(0, 0, True), (0, 1 << 60, True), (1000, 999, True), (1000, 1000, False), (1000, 1001, False), (1, 0, True)],
)
def test_is_live(expires: int, now: int, live: bool) -> None:
    assert r.is_live(r.pack(KEY, b"v", hlc=1, writer=1, expires_ms=expires), now) is live


def test_what_is_never_live() -> None:
    assert r.is_live(None, 0) is False
    assert r.is_live(r.pack(KEY, b"", hlc=1, writer=1, flags=r.TOMBSTONE), 0) is False
    assert r.is_live(r.pack(KEY, b"", hlc=1, writer=1, flags=r.TOMBSTONE, expires_ms=10), 0) is False
    assert r.is_live(r.shrink(KEY, r.pack(KEY, b"v", hlc=1, writer=1, expires_ms=10)), 0) is False
    assert r.is_live(r.pack(KEY, b"", hlc=1, writer=1), 0) is True  # an empty value is a value


# --- shrinking


@given(keys, st.binary(max_size=40), u64, u64, u56, st.integers(1, (1 << 64) - 1), flags)
def test_shrink(key: bytes, value: bytes, hlc: int, writer: int, created: int, expires: int, flag: int) -> None:
    expired = r.pack(key, value, hlc=hlc, writer=writer, created_ms=created, expires_ms=expires, flags=flag)
    shrunk = r.shrink(key, expired)
    assert r.verify(key, shrunk) is shrunk
    assert len(shrunk) == r.HEADER and shrunk[r.FLAGS] == expired[r.FLAGS] | r.SHRUNK
    assert shrunk > expired and max(shrunk, expired) == shrunk  # a repair with the original cannot bring it back
    assert r.shrink(key, shrunk) == shrunk
    assert shrunk[:16] == expired[:16]  # the same write, to every other version of the key
    assert (r.created_ms_of(shrunk), r.expires_ms_of(shrunk)) == (created, expires)


@given(records, records)
def test_shrinking_does_not_change_the_order_of_different_writes(a: bytes, b: bytes) -> None:
    if a[:16] != b[:16]:
        assert (r.shrink(KEY, a) < b) == (a < b)
        assert (r.shrink(KEY, a) < r.shrink(KEY, b)) == (a < b)


def test_doctest() -> None:
    result = doctest.testmod(r)
    assert result.attempted > 0 and result.failed == 0
