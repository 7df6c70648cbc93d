"""The cache of warm records: bounded, and never older than the store."""

from __future__ import annotations

import tracemalloc

from agi.core.dht.storage.record_cache import ENTRY_OVERHEAD_BYTES, RECORD_BYTES_MAX, RecordCache


def look(cache: RecordCache, key: bytes) -> bytes | None:
    return cache.young.get(key) or cache.old(key)


def test_it_keeps_what_was_put_last() -> None:
    cache = RecordCache(1 << 16)
    cache.put({b"a": b"1", b"b": b"2"})
    cache.put({b"a": b"3"})
    assert (look(cache, b"a"), look(cache, b"b"), look(cache, b"c")) == (b"3", b"2", None)
    assert len(cache) == 2


def test_what_is_used_survives_and_what_is_not_goes() -> None:
    cache = RecordCache(200 * (ENTRY_OVERHEAD_BYTES + 100))
    cache.put({b"hot": b"h" * 100, b"cold": b"c" * 100})
    for number in range(500):
        cache.put({b"%d" % number: b"x" * 100})
        if b"hot" not in cache.young:
            kept = cache.old(b"hot")
            assert kept is not None
            cache.put({b"hot": kept})
    assert look(cache, b"hot") == b"h" * 100
    assert look(cache, b"cold") is None
    assert len(cache) <= 200


def test_a_record_that_grew_too_large_leaves_no_old_version_behind() -> None:
    cache = RecordCache(1 << 16)
    cache.put({b"a": b"old", b"b": b"old"})
    cache.put({b"a": b"x" * (RECORD_BYTES_MAX + 1), b"b": b"new"})
    assert (look(cache, b"a"), look(cache, b"b")) == (None, b"new")


def test_a_batch_over_the_budget_leaves_no_old_version_behind() -> None:
    cache = RecordCache(8 * (ENTRY_OVERHEAD_BYTES + 10))
    cache.put({b"1": b"old"})
    cache.put({b"%d" % number: b"new" for number in range(100)})
    assert look(cache, b"1") is None
    assert len(cache) == 0


def test_an_overwrite_hides_the_old_generation() -> None:
    cache = RecordCache(20 * (ENTRY_OVERHEAD_BYTES + 100))
    cache.put({b"a": b"old"})
    for number in range(10):
        cache.put({b"%d" % number: b"x" * 100})
    assert cache.old(b"a") == b"old"
    cache.put({b"a": b"new"})
    assert look(cache, b"a") == b"new"
    cache.drop([b"a"])
    assert look(cache, b"a") is None


def test_memory_stays_within_the_budget() -> None:
    budget = 2 << 20
    cache = RecordCache(budget)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(0, 30_000, 100):
        cache.put({b"key:%08d" % at: b"%08d" % at * 15 for at in range(number, number + 100)})
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert budget / 4 < used <= budget
