"""Reads of large values: replies are bounded while they are read, and what is under way at a time is bounded too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, until

from agi.core.dht.client.batches import Batch, Kind
from agi.core.dht.client.pacing import PACED_BYTES, PART_BYTES, WINDOW_BYTES, Pacing
from agi.core.dht.clock import SystemClock
from agi.core.dht.errors import DHTError, Overloaded, Unavailable, from_wire
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.messages import Get, GetReply, Message, ReplicaRead, ReplicaReadReply, WireError
from agi.core.dht.protocol.record import pack
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.replica import REMOTE_READ_KEYS, Replica
from agi.core.dht.ring import token_bytes
from agi.core.dht.sessions import cut
from agi.core.dht.storage.base import Batch as Stored
from agi.core.dht.storage.memory import MemoryStore
from agi.core.dht.storage.rocksdb import RocksStore
from agi.core.dht.types import BATCH_BYTES_MAX, Consistency

MIB = 1 << 20
LARGE = {f"k{i}": bytes([i]) * MIB for i in range(16)}


class Heard:
    """A sink that notes what it is told."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.failed: list[int] = []

    def ok(self, places: Sequence[int] | None, results: Sequence[Any]) -> None:
        self.places += range(len(results)) if places is None else places

    def fail(self, places: Iterable[int], error: DHTError) -> None:
        self.failed += places


def batch(keys: int, sink: Heard, deadline: float = 10.0) -> Batch:
    made = Batch(Kind.GET, Consistency.QUORUM, deadline, 0, sink)
    made.keys = [b"k%d" % i for i in range(keys)]
    return made


def paced(record_bytes: int) -> tuple[Pacing, list[Batch]]:
    """After a record of that size, and what it has sent."""
    sent: list[Batch] = []
    pacing = Pacing(sent.append)
    pacing.sizes.learn([b"x" * record_bytes])
    return pacing, sent


# --- the client's parts


def test_small_reads_go_as_they_are() -> None:
    pacing, sent = paced(100)
    assert not pacing.takes(batch(1000, Heard())) and not sent
    assert not Pacing(sent.append).takes(batch(10_000, Heard()))


def test_large_reads_go_in_parts_within_the_window() -> None:
    pacing, sent = paced(MIB)
    sink = Heard()
    assert pacing.takes(batch(64, sink))
    most = PART_BYTES // MIB
    assert [len(part.keys) for part in sent] == [most] * (WINDOW_BYTES // (most * MIB))
    seen = 0
    while seen < len(sent):  # each that ends makes room for the next
        assert pacing.under_way <= WINDOW_BYTES
        part = sent[seen]
        if seen % 3:
            part.ok([None] * len(part.keys))
        else:
            part.part([0]).ok([None])  # it comes in two
            part.part(range(1, len(part.keys))).fail(Unavailable("late"))
        seen += 1
    assert sorted(sink.places + sink.failed) == list(range(64)) and sink.failed
    assert pacing.under_way == 0 and pacing.takes(batch(1, sink)) and len(sent) == seen + 1


def test_the_rest_of_a_part_is_counted_with_it() -> None:
    pacing, sent = paced(MIB)
    assert pacing.takes(batch(3, Heard())) and len(sent) == 1
    rest = sent[0].part([1, 2])
    assert not pacing.takes(rest)
    under_way = pacing.under_way
    sent[0].part([0]).ok([None])
    assert pacing.under_way == under_way
    rest.ok([None, None])
    assert pacing.under_way == 0


def test_one_part_may_always_go_and_the_deadline_of_what_waits_is_kept() -> None:
    pacing, sent = paced(8 * MIB)
    early, late = Heard(), Heard()
    assert pacing.takes(batch(2, early, deadline=1.0)) and pacing.takes(batch(2, late, deadline=9.0))
    assert [len(part.keys) for part in sent] == [1, 1]
    assert pacing.expired(0.5) == []
    assert pacing.takes(batch(1, early, deadline=1.0))
    assert [part.deadline for part in pacing.expired(2.0)] == [1.0]
    assert [part.deadline for part in pacing.end()] == [9.0, 9.0] and pacing.end() == []


def test_parts_that_end_at_once_are_followed_by_the_next_without_nesting() -> None:
    sink = Heard()
    pacing = Pacing(lambda part: part.fail(Unavailable("no node is reachable")))
    pacing.sizes.learn([b"x" * 4 * MIB])
    assert pacing.takes(batch(5000, sink))
    assert len(sink.failed) == 5000 and pacing.under_way == 0


async def test_many_callers_of_large_values_share_no_frame_that_is_too_large() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put_many(LARGE, consistency="ALL")
        await client.get("k0")  # how large they are is known from then on
        asked: list[int] = []
        unanswered: dict[int, int] = {}
        most = 0

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            nonlocal most
            if isinstance(message, ReplicaRead) and src == "client":
                asked.append(len(message.keys))
                unanswered[message.id] = len(message.keys)
                most = max(most, sum(unanswered.values()))
            elif isinstance(message, ReplicaReadReply):
                unanswered.pop(message.id, None)
            return None

        cluster.rule(rule)
        calls = [client.get(f"k{i % 16}") for i in range(64)]
        assert await asyncio.gather(*calls) == [LARGE[f"k{i % 16}"] for i in range(64)]
        assert max(asked) * MIB < PACED_BYTES * 4 and len(asked) >= 2 * 64 // 3
        assert most * MIB <= WINDOW_BYTES + PART_BYTES


# --- replies


@pytest.mark.parametrize("count", [3, 5])
async def test_the_client_takes_what_replicas_had_room_for_and_asks_again_for_the_rest(count: int) -> None:
    async with Cluster(count) as cluster:
        client = await cluster.client()
        await client.put_many(LARGE, consistency="ALL")
        replies: list[tuple[int, int]] = []
        coordinated: list[Message] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if dst == "client" and isinstance(message, ReplicaReadReply):
                replies.append((len(message.records), sum(len(record or b"") for record in message.records)))
            if isinstance(message, Get):
                coordinated.append(message)
            return None

        cluster.rule(rule)
        client._live().pacing.sizes.mean_bytes = 0.0  # as a client that has read nothing yet
        assert await client.get_many(LARGE) == LARGE
        assert not coordinated  # nothing differed
        assert all(size <= BATCH_BYTES_MAX for _, size in replies)
        assert sum(records for records, _ in replies) <= 2 * len(LARGE) + 8  # each was read about once by two


async def test_a_coordinator_answers_what_there_was_room_for_and_the_rest_as_truncated() -> None:
    async with Cluster(5) as cluster:
        client = await cluster.client()
        await client.put_many(LARGE, consistency="ALL")
        wire = await cluster.wire(0)
        left, rounds = list(LARGE), 0
        while left:
            reply = await wire.ask(Get(0, Consistency.ALL, 5000, [name.encode() for name in left]))
            assert reply.error is None
            failed = {place for place, _ in reply.errors or ()}
            assert 0 not in failed  # the first key always comes
            for place, name in enumerate(left):
                assert place in failed or reply.records[place].endswith(LARGE[name])
            left = [left[place] for place in sorted(failed)]
            rounds += 1
        assert 1 < rounds < len(LARGE)
        assert cluster.node(0).coordinator.pending == 0  # type: ignore[union-attr]
        assert await client.get_many(LARGE, consistency="ALL") == LARGE


def record(key: bytes, size: int) -> bytes:
    return pack(key, b"v" * size, 1 << 20, 7, 1, 0, 0)


def test_what_is_cut_has_at_least_one_record() -> None:
    small, large = b"s" * 10, b"l" * 100
    assert cut([small, None, small], 20) == [small, None, small]
    assert cut([small, small, None, small], 20) == [small, small, None]
    assert cut([large, small], 20) == [large] and cut([None, large], 20) == [None]


async def test_a_store_stops_reading_once_the_reply_is_full(tmp_path: Path) -> None:
    store = RocksStore(tmp_path, token_bytes("xxh3"))
    await store.open()
    try:
        records = {b"k%02d" % i: record(b"k%02d" % i, 1000) for i in range(40)}
        keys = list(records)
        store.write(Stored(records, keys))
        store._cache.clear()
        found = store.read_within(keys, 5000)
        assert found == list(records.values())[: len(found)] and 1 <= len(found) <= 6
        assert store.read_within([b"absent", *keys[:2]], 5000)[0] is None
        assert store.read_within(keys[:1], 1) == [records[keys[0]]]
        assert store.read(keys) == list(records.values())
    finally:
        await store.close()


class FarStore(MemoryStore):
    """In another process; `asked` is how many keys were asked for at a time."""

    local = False

    def __init__(self) -> None:
        super().__init__(token_bytes("xxh3"))
        self.asked: list[int] = []

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.asked.append(len(keys))
        return MemoryStore.read(self, keys)


async def test_a_far_store_is_asked_for_no_more_than_a_reply_holds() -> None:
    store = FarStore()
    await store.open()
    replica = Replica(store, HLC(), SystemClock(), Metrics(), max_clock_skew_ms=5000)
    try:
        keys = [b"k%04d" % i for i in range(1000)]
        MemoryStore.write(store, Stored({key: record(key, 64 * 1024) for key in keys}, keys))
        answers: list[tuple[list[bytes | None], WireError | None]] = []
        replica.read_batch(keys, lambda records, error: answers.append((records, error)))
        await until(lambda: answers)
        records, error = answers[0]
        assert error is None and records == MemoryStore.read(store, keys[: len(records)]) and len(records) == 63
        assert store.asked == [REMOTE_READ_KEYS]
        small = [b"s%04d" % i for i in range(1000)]
        MemoryStore.write(store, Stored({key: record(key, 10) for key in small}, small))
        store.asked.clear()
        replica.read_batch(small, lambda records, error: answers.append((records, error)))
        await until(lambda: len(answers) == 2)
        assert len(answers[1][0]) == 1000 and store.asked == [64, 256, 680]
    finally:
        await replica.stop()
        await store.close()


# --- admission


async def test_reads_are_admitted_by_what_they_are_expected_to_bring() -> None:
    async with Cluster(3, settings={"dht.requests.pending_bytes_max_mb": 16}) as cluster:
        client = await cluster.client()
        await client.put_many(LARGE, consistency="ALL")
        wire = await cluster.wire(0)
        keys = [name.encode() for name in LARGE]
        assert (await wire.ask(Get(0, Consistency.QUORUM, 5000, keys[:1]))).errors is None  # how large they are
        release = cluster.rule(lambda src, dst, m: () if isinstance(m, ReplicaReadReply) and dst == "n0" else None)
        calls = [asyncio.create_task(wire.ask(Get(0, Consistency.ALL, 1000, keys))) for _ in range(4)]
        replies: list[GetReply] = await asyncio.gather(*calls)
        refused = [reply for reply in replies if reply.error is not None]
        assert len(refused) == 3 and {type(from_wire(*r.error)) for r in refused if r.error} == {Overloaded}
        release()
        for _ in range(4):  # all of it was given back; and what is larger than the bound is read when it is alone
            reply = await wire.ask(Get(0, Consistency.ALL, 5000, keys))
            assert reply.error is None and reply.records[0] is not None
