"""One contract for every store (storage/base.py): memory, RocksDB, Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from storage_harness import (
    KINDS,
    TOKEN_MAX,
    Site,
    all_by_key,
    all_by_token,
    all_hints,
    all_promises,
    by_token,
    hint,
    inserts,
    many,
    promise,
    rec,
    redis_server,
    token,
    token_of,
)

from agi.core.dht.errors import StorageClosed, StorageCorrupt
from agi.core.dht.protocol.record import SHRUNK, TOMBSTONE, shrink, verify
from agi.core.dht.storage.base import Batch, Count, StorageBackend
from agi.core.dht.storage.promises import pack_promise

MIB = 1024 * 1024
KEYS = [
    b"plain",
    "astral \U0001f980\U00010348".encode(),
    "combining e\u0301 and \u00e9".encode(),
    b"nul\0inside",
    b"\0",
    b"\0\0",
    b"k" * 1024,
    "\u4e2d\u6587".encode() * 170,
    b"[bracket",
    b"(paren",
    b"-",
    b"+",
    b"line\r\nbreak",
    "\U0010ffff".encode(),
]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    return Site(request.param, tmp_path, url)


@pytest.fixture
async def store(site: Site) -> AsyncIterator[StorageBackend]:
    store = site.make()
    await store.open()
    yield store
    await store.close()


async def test_what_was_applied_is_read(store: StorageBackend) -> None:
    await store.apply(inserts({b"a": rec(b"a", b"1"), b"b": rec(b"b", b"2")}))
    assert await store.get(b"a") == rec(b"a", b"1")
    assert await store.get(b"c") is None
    assert await store.get_many([b"b", b"c", b"a", b"b"]) == [
        rec(b"b", b"2"),
        None,
        rec(b"a", b"1"),
        rec(b"b", b"2"),
    ]
    assert await store.get_many([]) == []


async def test_an_overwrite_replaces_and_an_insert_beside_it_counts(store: StorageBackend) -> None:
    await store.apply(inserts({b"a": rec(b"a", b"1")}))
    await store.apply(Batch({b"a": rec(b"a", b"2", hlc=2), b"b": rec(b"b")}, [b"b"]))
    assert await store.get(b"a") == rec(b"a", b"2", hlc=2)
    assert await store.count() == Count(2, True)
    assert await all_by_key(store, 10) == [(b"a", rec(b"a", b"2", hlc=2)), (b"b", rec(b"b"))]
    assert len(await all_by_token(store, 0, TOKEN_MAX, 10)) == 2


async def test_an_empty_batch_changes_nothing(store: StorageBackend) -> None:
    await store.apply(Batch())
    assert await store.count() == Count(0, True)
    assert await all_by_key(store, 10) == []


async def test_a_local_store_answers_at_once(store: StorageBackend) -> None:
    if not store.local:
        with pytest.raises(NotImplementedError, match="not a local store"):
            store.read([b"a"])
        return
    store.write(inserts({b"a": rec(b"a", b"1"), b"big": rec(b"big", b"x" * 10_000)}))
    assert store.read([b"a", b"none", b"big"]) == [rec(b"a", b"1"), None, rec(b"big", b"x" * 10_000)]
    headers = store.headers([b"big", b"none"])
    assert headers[1] is None
    assert headers[0] is not None
    assert headers[0][:40] == rec(b"big", b"x" * 10_000)[:40]
    store.write(Batch({b"a": rec(b"a", b"2", hlc=2), b"big": rec(b"big", b"y" * 20_000, hlc=2)}))
    assert store.read([b"a", b"big"]) == [rec(b"a", b"2", hlc=2), rec(b"big", b"y" * 20_000, hlc=2)]
    store.write(Batch(purges=[b"a", b"big"]))
    assert store.read([b"a", b"big"]) == [None, None]


async def test_tombstones_and_shrunk_records_are_records(store: StorageBackend) -> None:
    dead = rec(b"dead", b"", hlc=9, flags=TOMBSTONE)
    shrunk = shrink(b"old", rec(b"old", b"value", expires_ms=1000))
    await store.apply(inserts({b"dead": dead, b"old": shrunk}))
    assert await all_by_key(store, 10) == [(b"dead", dead), (b"old", shrunk)]
    assert await store.count() == Count(2, True)
    assert await store.expired(1 << 50, 10) == []


async def test_empty_and_large_values(store: StorageBackend) -> None:
    content = {b"empty": rec(b"empty", b""), b"large": rec(b"large", bytes(range(256)) * 4096)}
    await store.apply(inserts(content))
    assert await store.get_many(list(content)) == list(content.values())
    assert await all_by_key(store, 10) == list(content.items())


async def test_every_kind_of_key_in_binary_order(store: StorageBackend) -> None:
    content = {key: rec(key, b"of " + key[:8]) for key in KEYS}
    await store.apply(inserts(content))
    assert await store.get_many(KEYS) == [content[key] for key in KEYS]
    assert await all_by_key(store, 3) == sorted(content.items())
    assert await all_by_token(store, 0, TOKEN_MAX, 3) == by_token(content)
    for key in KEYS:
        assert (await store.scan(key, key + b"\0", 10, MIB)).items == [(key, content[key])]


async def test_bytes_order_above_ascii_is_unsigned(store: StorageBackend) -> None:
    content = {key: rec(key) for key in (b"\x7f", b"\x80", b"\xff", b"\xff\xff", b"\xfe\x00", b"a")}
    await store.apply(inserts(content))
    assert [key for key, _ in await all_by_key(store, 2)] == [b"a", b"\x7f", b"\x80", b"\xfe\x00", b"\xff", b"\xff\xff"]


async def test_scan_bounds_limit_and_bytes(store: StorageBackend) -> None:
    content = {key: rec(key, b"x" * 100) for key in (b"a", b"b", b"ba", b"c", b"d")}
    await store.apply(inserts(content))

    async def keys(start: bytes, end: bytes | None, limit: int = 10, bytes_max: int = MIB) -> tuple[list[bytes], bool]:
        page = await store.scan(start, end, limit, bytes_max)
        return [key for key, _ in page.items], page.complete

    assert await keys(b"b", b"c") == ([b"b", b"ba"], True)
    assert await keys(b"b", b"b") == ([], True)
    assert await keys(b"bb", None) == ([b"c", b"d"], True)
    assert await keys(b"e", None) == ([], True)
    assert await keys(b"", None, limit=5) == ([b"a", b"b", b"ba", b"c", b"d"], True)
    assert await keys(b"", None, limit=4) == ([b"a", b"b", b"ba", b"c"], False)
    assert await keys(b"", b"c", limit=3) == ([b"a", b"b", b"ba"], True)
    assert await keys(b"", None, bytes_max=1) == ([b"a"], False)
    assert await keys(b"", None, bytes_max=200) == ([b"a", b"b"], False)
    assert await keys(b"d", None, bytes_max=1) == ([b"d"], True)


async def test_large_records_page_by_bytes(store: StorageBackend) -> None:
    content = {b"%02d" % at: rec(b"%02d" % at, b"x" * (MIB // 4)) for at in range(20)}
    await store.apply(inserts(content))
    page = await store.scan(b"", None, 100, MIB)
    assert [key for key, _ in page.items] == [b"00", b"01", b"02", b"03"]
    assert not page.complete
    assert await all_by_key(store, 7) == sorted(content.items())


async def test_token_ranges(store: StorageBackend) -> None:
    content = many(500)
    await store.apply(inserts(content))
    tokens = sorted(token(key) for key in content)
    low, high = tokens[100], tokens[400]

    def expected(first: int, last: int) -> list[tuple[bytes, bytes]]:
        return by_token({key: record for key, record in content.items() if first <= token(key) <= last})

    for first, last in ((low, high), (low + 1, high - 1), (low, low), (0, low), (high, TOKEN_MAX), (0, TOKEN_MAX)):
        assert await all_by_token(store, first, last, 64) == expected(first, last), (first, last)
    assert (await store.scan_tokens(low + 1, low + 1, 10)).items == []
    assert (await store.scan_tokens(high, low, 10)).complete
    exact = await store.scan_tokens(low, high, 301)
    assert len(exact.items) == 301
    assert exact.complete
    below = await store.scan_tokens(low, high, 300)
    assert len(below.items) == 300
    assert not below.complete


async def test_the_last_token_of_the_ring(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {b"first": bytes(8), b"last": b"\xff" * 8, b"last too": b"\xff" * 8}
    store = site.make()
    monkeypatch.setattr(store, "_token_of", ends.__getitem__)
    if hasattr(store, "_scanner"):
        monkeypatch.setattr(store._scanner, "_token_of", ends.__getitem__)
    await store.open()
    content = {key: rec(key) for key in ends}
    await store.apply(inserts(content))
    assert await all_by_token(store, TOKEN_MAX, TOKEN_MAX, 1) == [(key, content[key]) for key in (b"last", b"last too")]
    assert await all_by_token(store, 0, 0, 1) == [(b"first", content[b"first"])]
    assert len(await all_by_token(store, 0, TOKEN_MAX, 1)) == 3
    await store.close()


async def test_expired_soonest_first_until_shrunk_or_overwritten(store: StorageBackend) -> None:
    times = {b"never": 0, b"late": 9000, b"third": 3000, b"first": 1000, b"second": 2000}
    content = {key: rec(key, expires_ms=at) for key, at in times.items()}
    await store.apply(inserts(content))
    assert [key for key, _ in await store.expired(5000, 10)] == [b"first", b"second", b"third"]
    assert [key for key, _ in await store.expired(5000, 2)] == [b"first", b"second"]
    assert await store.expired(1000, 10) == []  # strictly before
    assert await store.expired(1001, 10) == [(b"first", content[b"first"])]
    await store.apply(Batch({b"first": shrink(b"first", content[b"first"])}))
    assert [key for key, _ in await store.expired(5000, 10)] == [b"second", b"third"]
    later = rec(b"second", hlc=2, expires_ms=8000)
    await store.apply(Batch({b"second": later, b"third": rec(b"third", hlc=2)}))
    assert await store.expired(5000, 10) == []
    assert [key for key, _ in await store.expired(10_000, 10)] == [b"second", b"late"]
    sooner = rec(b"late", hlc=3, expires_ms=500)
    await store.apply(Batch({b"late": sooner}))
    assert await store.expired(5000, 10) == [(b"late", sooner)]
    await store.apply(Batch(purges=[b"late", b"second"]))
    assert await store.expired(1 << 50, 10) == []


async def test_expiry_is_bounded_by_live_records_not_by_overwrites(store: StorageBackend) -> None:
    """A session that is renewed thousands of times must not hide what expired after it."""
    await store.apply(inserts({b"session": rec(b"session", expires_ms=1), b"other": rec(b"other", expires_ms=9000)}))
    for at in range(0, 6000, 500):
        for renewed in range(at, at + 500):
            if store.local:
                store.write(Batch({b"session": rec(b"session", hlc=2 + renewed, expires_ms=2 + renewed)}))
        await store.apply(Batch({b"session": rec(b"session", hlc=1 << 20, expires_ms=20_000 + at)}))
    found: list[tuple[bytes, bytes]] = []
    for _ in range(10):
        found = await store.expired(10_000, 5)
        if found:
            break
    assert [key for key, _ in found] == [b"other"]
    if store.name == "memory":
        assert (await store.stats()).engine["expiry_heap_entries"] < 3000


async def test_a_purge_removes_every_trace(store: StorageBackend) -> None:
    content = many(300)
    await store.apply(inserts(content))
    gone = list(content)[::3]
    await store.apply(Batch(purges=[*gone, gone[0], b"never there"]))
    left = {key: record for key, record in content.items() if key not in set(gone)}
    assert await store.get(gone[0]) is None
    assert await all_by_key(store, 50) == sorted(left.items())
    assert await all_by_token(store, 0, TOKEN_MAX, 50) == by_token(left)
    assert await store.count() == Count(200, True)
    again = {key: rec(key, b"again", hlc=7) for key in gone}
    await store.apply(inserts(again))
    await store.apply(Batch(purges=gone[:50]))
    left |= {key: again[key] for key in gone[50:]}
    assert await all_by_key(store, 50) == sorted(left.items())
    assert await all_by_token(store, 0, TOKEN_MAX, 50) == by_token(left)
    assert await store.count() == Count(250, True)


async def test_a_hundred_thousand_keys(store: StorageBackend) -> None:
    content = many(100_000)
    items = list(content.items())
    for at in range(0, len(items), 5000):
        await store.apply(inserts(dict(items[at : at + 5000])))
    assert await store.count() == Count(100_000, True)
    assert await all_by_key(store, 5000) == items
    first, last = 1 << 62, 1 << 63
    expected = by_token(content, [key for key in content if first <= token(key) <= last])
    assert await all_by_token(store, first, last, 5000) == expected
    assert await store.get_many([b"key:000000", b"key:099999"]) == [items[0][1], items[-1][1]]
    stats = await store.stats()
    assert (stats.records, stats.exact) == (100_000, True)
    assert 3 * MIB < stats.bytes < 60 * MIB  # 7 MB of records, compressed or with a server's overhead
    assert all(isinstance(number, int) for number in stats.engine.values())


async def test_a_long_scan_lets_the_event_loop_run(store: StorageBackend) -> None:
    await store.apply(inserts(many(20_000)))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counter = asyncio.create_task(count_turns())
    await store.scan(b"", None, 20_000, 1 << 30)
    by_key = turns
    await store.scan_tokens(0, TOKEN_MAX, 20_000)
    counter.cancel()
    assert by_key >= 20_000 // 512
    assert turns - by_key >= 20_000 // 1024


async def test_a_write_between_pages_neither_hides_nor_doubles(store: StorageBackend) -> None:
    content = many(200)
    await store.apply(inserts(content))
    page = await store.scan(b"", None, 100, MIB)
    await store.apply(
        Batch(
            {b"key:000050a": rec(b"key:000050a"), b"key:000150a": rec(b"key:000150a")}, [b"key:000050a", b"key:000150a"]
        )
    )
    rest = await store.scan(page.items[-1][0] + b"\0", None, 1000, MIB)
    seen = [key for key, _ in page.items + rest.items]
    assert seen == sorted([*content, b"key:000150a"])


async def test_meta_is_apart_from_records(store: StorageBackend) -> None:
    assert await store.get_meta("identity") is None
    await store.put_meta("identity", b"\0binary\xff")
    await store.put_meta("topology", b"")
    await store.put_meta("identity", b"second")
    assert await store.get_meta("identity") == b"second"
    assert await store.get_meta("topology") == b""
    assert await store.count() == Count(0, True)
    assert await all_by_key(store, 10) == []


async def test_hints_are_apart_from_records_and_found_whole(store: StorageBackend) -> None:
    assert await all_hints(store) == ([], [])
    kept = [hint(1), hint(2, "n2"), hint(3)]
    await store.save_hints(kept, [])
    assert await all_hints(store) == (kept, [])
    assert await store.count() == Count(0, True)
    assert await all_by_key(store, 10) == await all_by_token(store, 0, TOKEN_MAX, 10) == []
    assert await store.get(kept[0].key) is None
    await store.apply(inserts(many(10)))
    await store.put_meta("identity", b"me")
    assert await all_hints(store) == (kept, [])


async def test_a_hint_is_replaced_by_name_and_removed_by_name(store: StorageBackend) -> None:
    old, other = hint(1), hint(1, "n2")
    await store.save_hints([old, other], [])
    newer = hint(1, value=b"newer")
    newer.number = 9
    await store.save_hints([newer], [])
    assert await all_hints(store) == ([other, newer], [])
    await store.save_hints([hint(2)], [newer.name, b"never there" * 3])
    assert await all_hints(store) == ([other, hint(2)], [])
    await store.save_hints([], [other.name, hint(2).name], synced=True)
    await store.save_hints([], [])
    assert await all_hints(store) == ([], [])


async def test_many_hints_are_loaded_in_pages(store: StorageBackend) -> None:
    kept = [hint(number, f"n{number % 3}") for number in range(2000)]
    for at in range(0, 2000, 500):
        await store.save_hints(kept[at : at + 500], [])
    assert await all_hints(store, 64) == (kept, [])
    await store.save_hints([], [each.name for each in kept[:1990]])
    assert await all_hints(store, 3) == (kept[1990:], [])


async def test_a_damaged_hint_is_named_and_not_returned(site: Site, store: StorageBackend) -> None:
    if not site.keeps:
        pytest.skip("nothing that is read again can be damaged in it")
    kept = [hint(number) for number in range(5)]
    await store.save_hints(kept, [])
    await site.damage_hint(store, kept[2].name)
    assert await all_hints(store, 2) == (kept[:2] + kept[3:], [kept[2].name])
    await store.save_hints([], [kept[2].name])
    assert await all_hints(store) == (kept[:2] + kept[3:], [])


async def test_hints_are_there_after_reopening(site: Site) -> None:
    store = site.make()
    await store.open()
    await store.save_hints([hint(1), hint(2)], [])
    await store.save_hints([hint(3)], [hint(1).name])
    await store.close()
    again = site.make()
    await again.open()
    assert await all_hints(again) == ([hint(2), hint(3)] if site.keeps else [], [])
    await again.close()


async def test_promises_are_kept_replaced_and_removed(store: StorageBackend) -> None:
    assert await all_promises(store) == {}
    await store.apply(Batch(promises={b"a": promise(1), b"b": promise(2), b"c": promise(3)}))
    assert await all_promises(store) == {b"a": promise(1), b"b": promise(2), b"c": promise(3)}
    await store.apply(Batch(promises={b"a": promise(9), b"b": b"", b"never there": b"", b"d": promise(4)}))
    assert await all_promises(store) == {b"a": promise(9), b"c": promise(3), b"d": promise(4)}
    await store.apply(Batch(promises=dict.fromkeys((b"a", b"c", b"d"), b"")))
    assert await all_promises(store) == {}
    if store.local:
        store.write(Batch(promises={b"a": promise(5)}))
        assert await all_promises(store) == {b"a": promise(5)}


async def test_promises_of_every_kind_of_key(store: StorageBackend) -> None:
    kept = {key: promise(at << 120 | at) for at, key in enumerate(KEYS)}
    await store.apply(Batch(promises=kept))
    assert await all_promises(store, 3) == kept
    await store.apply(Batch(promises=dict.fromkeys(KEYS[::2], b"")))
    assert await all_promises(store, 3) == {key: kept[key] for key in KEYS[1::2]}


async def test_promises_are_apart_from_records(store: StorageBackend) -> None:
    kept = {b"alone": promise(1), b"key:000003": promise(2)}
    await store.apply(Batch(promises=kept))
    assert await store.count() == Count(0, True)
    assert await all_by_key(store, 10) == await all_by_token(store, 0, TOKEN_MAX, 10) == []
    assert await store.get_many(list(kept)) == [None, None]
    assert await store.expired(1 << 62, 10) == []
    content = many(10) | {b"brief": rec(b"brief", expires_ms=5)}
    await store.apply(Batch(dict(content), list(content), promises={b"brief": promise(3)}))
    await store.put_meta("identity", b"me")
    await store.save_hints([hint(1)], [])
    kept[b"brief"] = promise(3)
    assert await all_promises(store) == kept
    assert await all_by_key(store, 3) == sorted(content.items())
    assert await all_by_token(store, 0, TOKEN_MAX, 3) == by_token(content)
    assert await store.count() == Count(11, True)
    assert (await store.stats()).records == 11
    assert await store.expired(1 << 62, 10) == [(b"brief", content[b"brief"])]
    assert await all_hints(store) == ([hint(1)], [])


async def test_a_purge_leaves_promises_alone_unless_told(store: StorageBackend) -> None:
    content = many(3)
    first, second, third = content
    await store.apply(Batch(dict(content), list(content), promises=dict.fromkeys(content, promise(1))))
    await store.apply(Batch(purges=[first, second], promises={second: b"", third: promise(2)}))
    assert await all_by_key(store, 10) == [(third, content[third])]
    assert await all_promises(store) == {first: promise(1), third: promise(2)}


@pytest.mark.parametrize("wrong", [b"x", bytes(15), bytes(17)])
async def test_a_batch_with_what_is_no_promise_is_refused_whole(store: StorageBackend, wrong: bytes) -> None:
    await store.apply(Batch(promises={b"kept": promise(1)}))
    batch = Batch({b"a": rec(b"a", expires_ms=1)}, [b"a"], promises={b"a": promise(2), b"b": wrong, b"kept": b""})
    with pytest.raises(ValueError, match="16 bytes"):
        await store.apply(batch)
    assert await all_promises(store) == {b"kept": promise(1)}
    assert await store.get(b"a") is None
    assert await store.count() == Count(0, True)


async def test_many_promises_are_loaded_in_pages(site: Site, store: StorageBackend) -> None:
    kept = {b"key:%06d" % number: promise(number) for number in range(2000)}
    items = list(kept.items())
    for at in range(0, 2000, 500):
        await store.apply(Batch(promises=dict(items[at : at + 500])))
    assert await all_promises(store, 64) == kept
    page = await store.load_promises(b"", 64)
    if site.keeps:
        assert 32 <= len(page.items) <= 128
        assert page.next
    await store.apply(Batch(promises=dict.fromkeys(list(kept)[:1990], b"")))
    assert await all_promises(store, 3) == dict(items[1990:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-1] + bytes([packed[-1] ^ 1]),
        lambda packed: bytes([packed[0] ^ 128]) + packed[1:],
        lambda packed: packed[:-1],
        lambda packed: packed + b"x",
        lambda _: b"",
        lambda _: pack_promise(b"another key", promise(3)),
    ],
    ids=["promise", "checksum", "short", "long", "empty", "of another key"],
)
async def test_a_damaged_promise_is_refused(
    site: Site, store: StorageBackend, damage: Callable[[bytes], bytes]
) -> None:
    if not site.keeps:
        pytest.skip("nothing that is read again can be damaged in it")
    kept = {b"key:%d" % number: promise(number) for number in range(5)}
    await store.apply(Batch(promises=kept))
    await site.damage_promise(store, b"key:3", damage)
    with pytest.raises(StorageCorrupt, match="promise of b'key:3'"):
        await all_promises(store, 2)
    await store.apply(Batch(promises={b"key:3": promise(3)}))
    assert await all_promises(store) == kept


async def test_promises_are_there_after_reopening(site: Site) -> None:
    store = site.make()
    await store.open()
    await store.apply(inserts({b"a": rec(b"a")}))
    await store.apply(Batch(promises={b"a": promise(1), b"b": promise(2), b"c": promise(3)}))
    await store.apply(Batch({b"a": rec(b"a", hlc=2)}, promises={b"a": b"", b"b": promise(4)}))
    await store.close()
    again = site.make()
    await again.open()
    assert await all_promises(again) == ({b"b": promise(4), b"c": promise(3)} if site.keeps else {})
    await again.close()


async def test_a_store_says_whether_it_may_keep_promises(site: Site, store: StorageBackend) -> None:
    """The suite's Redis server keeps no log; test_redis_store.py has those that do."""
    assert store.voting_refusal == (
        "the Redis server runs with `appendonly no`, not `appendonly yes`" if site.kind == "redis" else ""
    )


async def test_what_persists_is_there_after_reopening(site: Site) -> None:
    store = site.make()
    assert store.persistent == site.keeps
    await store.open()
    content = many(1000)
    await store.apply(inserts(content))
    await store.apply(Batch({b"key:000001": rec(b"key:000001", hlc=99, expires_ms=5)}, purges=[b"key:000000"]))
    await store.put_meta("identity", b"me")
    await store.close()
    await store.close()  # harmless
    again = site.make()
    await again.open()
    if site.keeps:
        del content[b"key:000000"]
        content[b"key:000001"] = rec(b"key:000001", hlc=99, expires_ms=5)
        assert await all_by_key(again, 300) == sorted(content.items())
        assert await all_by_token(again, 0, TOKEN_MAX, 300) == by_token(content)
        assert await again.expired(6, 10) == [(b"key:000001", content[b"key:000001"])]
        assert await again.count() == Count(999, True)
        assert await again.get_meta("identity") == b"me"
    else:
        assert await again.count() == Count(0, True)
        assert await again.get_meta("identity") is None
    await again.close()


@pytest.mark.parametrize("when", ["before open", "after close"])
async def test_a_closed_store_says_so(site: Site, when: str) -> None:
    store = site.make()
    if when == "after close":
        await store.open()
        await store.apply(inserts({b"a": rec(b"a")}))
        await store.close()
    for call in (
        store.get(b"a"),
        store.get_many([b"a"]),
        store.apply(inserts({b"b": rec(b"b")})),
        store.scan(b"", None, 1, 1),
        store.scan_tokens(0, 1, 1),
        store.expired(1, 1),
        store.count(),
        store.stats(),
        store.get_meta("a"),
        store.put_meta("a", b""),
        store.save_hints([hint(1)], []),
        store.load_hints(b"", 1),
        store.apply(Batch(promises={b"a": promise(1)})),
        store.load_promises(b"", 1),
    ):
        with pytest.raises(StorageClosed):
            await call
    if store.local:
        with pytest.raises(StorageClosed):
            store.read([b"a"])
        with pytest.raises(StorageClosed):
            store.write(inserts({b"b": rec(b"b")}))
    await store.close()


async def test_a_store_opens_again_after_close(site: Site) -> None:
    store = site.make()
    for round_number in range(3):
        await store.open()
        key = b"%d" % round_number
        await store.apply(inserts({key: rec(key)}))
        assert await store.get(key) == rec(key)
        await store.close()
    await store.open()
    assert (await store.count()).records == (3 if site.keeps else 0)
    await store.close()


SMALL_KEYS = st.sampled_from([b"a", b"b", b"b\0", b"c", b"\xff", b"\0", b"ab", b"abc"])
WRITES = st.dictionaries(
    SMALL_KEYS, st.tuples(st.binary(max_size=4), st.integers(0, 6), st.sampled_from([0, TOMBSTONE, SHRUNK])), max_size=5
)
PROMISES = st.dictionaries(SMALL_KEYS, st.builds(promise, st.integers(0, 9)) | st.just(b""), max_size=3)


class Model(RuleBasedStateMachine):
    """Any store beside a dict."""

    site: Site

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.content: dict[bytes, bytes] = {}
        self.promises: dict[bytes, bytes] = {}
        self.hlc = 0
        self.open()

    def open(self) -> None:
        self.store = self.site.make()
        self.runner.run(self.store.open())

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    @rule(writes=WRITES, purges=st.lists(SMALL_KEYS, max_size=3), promises=PROMISES)
    def apply(
        self, writes: dict[bytes, tuple[bytes, int, int]], purges: list[bytes], promises: dict[bytes, bytes]
    ) -> None:
        self.hlc += 1
        batch = Batch(purges=[key for key in purges if key not in writes], promises=promises)
        for key, (value, expires, flags) in writes.items():
            batch.records[key] = rec(key, value, hlc=self.hlc, expires_ms=expires, flags=flags)
            if key not in self.content:
                batch.inserts.append(key)
        self.runner.run(self.store.apply(batch))
        self.content |= batch.records
        for key in batch.purges:
            self.content.pop(key, None)
        self.promises = {key: packed for key, packed in (self.promises | promises).items() if packed}

    @rule(limit=st.integers(1, 4))
    def load_promises(self, limit: int) -> None:
        assert self.runner.run(all_promises(self.store, limit)) == self.promises

    @rule(keys=st.lists(SMALL_KEYS, max_size=6))
    def get(self, keys: list[bytes]) -> None:
        found = self.runner.run(self.store.get_many(keys))
        assert found == [self.content.get(key) for key in keys]
        for key, record in zip(keys, found, strict=True):
            assert record is None or verify(key, record)

    @rule(start=SMALL_KEYS | st.just(b""), end=SMALL_KEYS | st.none(), limit=st.integers(1, 4))
    def scan(self, start: bytes, end: bytes | None, limit: int) -> None:
        expected = [
            item for item in sorted(self.content.items()) if start <= item[0] and (end is None or item[0] < end)
        ]
        page = self.runner.run(self.store.scan(start, end, limit, MIB))
        assert (page.items, page.complete) == (expected[:limit], len(expected) <= limit)

    @rule(low=SMALL_KEYS, high=SMALL_KEYS, limit=st.integers(1, 4), after=st.none() | SMALL_KEYS)
    def scan_tokens(self, low: bytes, high: bytes, limit: int, after: bytes | None) -> None:
        first, last = token(low), token(high)
        expected = [
            (key, record)
            for key, record in by_token(self.content)
            if first <= token(key) <= last and (after is None or token_of(key) + key > token_of(after) + after)
        ]
        page = self.runner.run(self.store.scan_tokens(first, last, limit, after))
        assert (page.items, page.complete) == (expected[:limit], len(expected) <= limit)

    @rule(before=st.integers(0, 8), limit=st.integers(1, 9))
    def expired(self, before: int, limit: int) -> None:
        due = sorted(
            (expires, key)
            for key, record in self.content.items()
            if 0 < (expires := int.from_bytes(record[32:40], "big")) < before and not record[16] & SHRUNK
        )
        found = self.runner.run(self.store.expired(before, limit))
        assert found == [(key, self.content[key]) for _, key in due[:limit]]

    @rule()
    def count(self) -> None:
        assert self.runner.run(self.store.count()) == Count(len(self.content), True)

    @precondition(lambda self: self.site.keeps)
    @rule()
    def reopen(self) -> None:
        self.runner.run(self.store.close())
        self.open()


def test_a_store_behaves_like_a_dict(site: Site, tmp_path: Path) -> None:
    class Fresh(Model):
        def __init__(self) -> None:
            self.site = Site(site.kind, tmp_path, site.redis_url)
            super().__init__()

    examples = {"memory": 150, "rocksdb": 20, "redis": 30}[site.kind]
    run_state_machine_as_test(
        Fresh,
        settings=settings(
            max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
