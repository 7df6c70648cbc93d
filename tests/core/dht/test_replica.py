"""One replica over a store whose syncs end when the test says so: what it tells, and when (D1, D2, V2 to V4)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cluster import Cluster, until

from agi.core.dht.acceptor import Acceptor
from agi.core.dht.errors import ClockSkew, DHTError, StorageClosed, StorageError, StorageFull, from_wire
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.consensus import State, ballot, register_of
from agi.core.dht.protocol.floors import promise_of
from agi.core.dht.protocol.messages import FRESH, REPAIR, ReplicaRead, ReplicaWrite
from agi.core.dht.protocol.record import FLAGS, HEADER, SHRUNK, TOMBSTONE, hlc_of, pack
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.replica import Replica
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.base import Batch, Page, SyncDone
from agi.core.dht.storage.memory import MemoryStore

NOW_MS = 1_000_000
SKEW_MS = 5000


class DiskStore(MemoryStore):
    """A store with group commit. `land` ends the sync under way; `full` makes writes fail."""

    group_sync = True

    def __init__(self) -> None:
        super().__init__(token_bytes("xxh3"))
        self.syncs: list[SyncDone] = []
        self.full = False

    def write(self, batch: Batch) -> None:
        if self.full:
            raise StorageFull("no space left on device")
        super().write(batch)

    def sync(self, done: SyncDone) -> None:
        self.syncs.append(done)

    def land(self, error: Exception | None = None) -> None:
        self.syncs.pop(0)(error)


class ManualClock:
    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic(self) -> float:
        return 0.0

    def boottime(self) -> float:
        return 0.0


async def turn() -> None:
    """What has come together departs."""
    for _ in range(2):
        await asyncio.sleep(0)


class Bench:
    """A replica, and what it answered in order."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.clock = ManualClock()
        self.hlc = HLC()
        self.metrics = Metrics()
        self.replica = Replica(store, self.hlc, self.clock, self.metrics, max_clock_skew_ms=SKEW_MS)
        self.fatal: list[DHTError] = []
        self.replica.on_store_failed = self.fatal.append

    async def land(self, error: Exception | None = None) -> None:
        assert isinstance(self.store, DiskStore)
        await turn()
        self.store.land(error)
        await turn()

    def write(self, *records: tuple[bytes, bytes], mode: int = FRESH, want_live: bool = False) -> list[Any]:
        """The list that the answer will be put into."""
        answer: list[Any] = []
        keys, packed = [key for key, _ in records], [record for _, record in records]
        self.replica.write(
            mode, keys, packed, want_live, lambda superseded, live, error: answer.append((superseded, live, error))
        )
        return answer

    def read(self, *keys: bytes) -> list[Any]:
        answer: list[Any] = []
        self.replica.read(list(keys), lambda records, error: answer.append((records, error)))
        return answer

    async def scan(self) -> list[Any]:
        answer: list[Any] = []
        await self.replica.scan(b"", b"", 100, 1 << 20, lambda page, error: answer.append((page, error)))
        return answer


def record(key: bytes, value: bytes, ms: int, **more: int) -> tuple[bytes, bytes]:
    return key, pack(key, value, ms << 16, 1, **more)


@pytest.fixture
async def disk() -> Any:
    store = DiskStore()
    await store.open()
    yield Bench(store)
    await store.close()


@pytest.fixture
async def memory() -> Any:
    store = MemoryStore(token_bytes("xxh3"))
    await store.open()
    yield Bench(store)
    await store.close()


OK = (None, None, None)


# --- merging


async def test_only_what_is_newer_is_stored_and_the_sender_hears_of_the_rest(memory: Bench) -> None:
    old, new = record(b"a", b"old", 1000), record(b"a", b"new", 2000)
    assert memory.write(new, record(b"b", b"1", 1000)) == [OK]
    assert memory.write(old, record(b"b", b"2", 3000)) == [([(0, 2000 << 16)], None, None)]
    assert memory.store.read([b"a"]) == [new[1]] and memory.read(b"b")[0][0][0][HEADER:] == b"2"
    assert memory.write(new) == [OK]  # the same write again is an acknowledgement
    assert memory.metrics.replica_superseded == 1


async def test_any_order_ends_in_the_same_records(memory: Bench) -> None:
    versions = [(b"k", pack(b"k", b"%d" % i, (1000 + i % 4) << 16, i)) for i in range(8)]
    for order in (versions, versions[::-1], versions[::2] + versions[1::2]):
        for each in order:
            memory.write(each, mode=REPAIR)
        assert memory.store.read([b"k"]) == [max(packed for _, packed in versions)]


async def test_one_key_twice_in_a_batch_keeps_the_newer(memory: Bench) -> None:
    first, second = record(b"k", b"1", 1000), record(b"k", b"2", 2000)
    assert memory.write(first, second) == [OK]
    assert memory.store.read([b"k"]) == [second[1]]
    assert memory.write(record(b"j", b"2", 2000), record(b"j", b"1", 1000)) == [([(1, 2000 << 16)], None, None)]
    page = await memory.store.scan(b"", None, 10, 1 << 20)
    assert [key for key, _ in page.items] == [b"j", b"k"]  # indexed once


async def test_want_live_tells_what_a_reader_would_have_seen(memory: Bench) -> None:
    memory.write(
        record(b"live", b"1", 1000),
        record(b"dead", b"", 1000, flags=TOMBSTONE),
        record(b"expired", b"1", 1000, expires_ms=NOW_MS - 1),
        record(b"ttl", b"1", 1000, expires_ms=NOW_MS + 1),
    )
    deletes = [record(key, b"", 2000, flags=TOMBSTONE) for key in (b"live", b"dead", b"expired", b"ttl", b"absent")]
    assert memory.write(*deletes, want_live=True) == [(None, [0, 3], None)]


async def test_a_fresh_version_far_ahead_is_refused_as_a_whole_and_a_repair_is_not(memory: Bench) -> None:
    fine, ahead = record(b"a", b"1", NOW_MS), record(b"b", b"1", NOW_MS + SKEW_MS + 1)
    ((superseded, live, error),) = memory.write(fine, ahead)
    assert (superseded, live) == (None, None) and isinstance(from_wire(*error), ClockSkew)
    assert memory.store.read([b"a", b"b"]) == [None, None]
    assert memory.write(record(b"b", b"1", NOW_MS + SKEW_MS)) == [OK]
    assert memory.write(ahead, mode=REPAIR) == [OK]
    # what was seen moves the limit: a clock that steps back does not stop writes (V3)
    memory.clock.now_ms -= 3_600_000
    assert memory.write(record(b"a", b"2", NOW_MS + SKEW_MS + 2)) == [OK]


# --- expiry


async def test_expired_records_are_shown_shrunk_once_the_skew_has_passed(memory: Bench) -> None:
    key, packed = record(b"k", b"value", 1000, expires_ms=NOW_MS)
    memory.write((key, packed))
    for ahead_ms in (0, SKEW_MS):
        memory.clock.now_ms = NOW_MS + ahead_ms
        assert memory.read(b"k") == [([packed], None)]  # the coordinator judges by its clock
    memory.clock.now_ms = NOW_MS + SKEW_MS + 1
    ((records, _),) = memory.read(b"k")
    assert records[0][FLAGS] & SHRUNK and len(records[0]) == HEADER and hlc_of(records[0]) == 1000 << 16
    ((page, _),) = await memory.scan()
    assert page.items == [(b"k", records[0])]
    assert memory.store.read([b"k"]) == [packed]  # reading does not write
    assert await memory.replica.sweep(10) == 1
    assert memory.store.read([b"k"]) == records
    assert await memory.replica.sweep(10) == 0
    # a replica that has not swept yet does not bring the value back
    assert memory.write((key, packed), mode=REPAIR) == [([(0, 1000 << 16)], None, None)]
    assert memory.store.read([b"k"]) == records


async def test_a_sweep_does_not_take_what_was_written_meanwhile(memory: Bench) -> None:
    memory.write(record(b"k", b"old", 1000, expires_ms=NOW_MS), record(b"j", b"old", 1000, expires_ms=NOW_MS))
    memory.clock.now_ms = NOW_MS + SKEW_MS + 1
    new = record(b"k", b"new", 2000)
    memory.write(new)
    assert await memory.replica.sweep(10) == 1
    assert memory.store.read([b"k"]) == [new[1]]


# --- group commit


async def test_an_acknowledgement_leaves_after_its_sync(disk: Bench) -> None:
    first = disk.write(record(b"a", b"1", 1000))
    await turn()
    second = disk.write(record(b"b", b"1", 1001))
    third = disk.write(record(b"b", b"2", 1002))
    assert first == second == third == [] and len(disk.store.syncs) == 1
    await disk.land()
    assert first == [OK] and second == third == [] and len(disk.store.syncs) == 1
    await disk.land()
    assert second == third == [OK] and disk.store.syncs == [] and not disk.replica.unsynced
    assert disk.metrics.group_commits.sum == 2  # groups of one key each: b was written once for both


async def test_a_read_of_what_is_not_synced_waits_and_others_do_not(disk: Bench) -> None:
    disk.write(record(b"old", b"1", 999))
    await disk.land()
    flying, opened = record(b"a", b"1", 1000), record(b"b", b"1", 1001)
    disk.write(flying)
    await turn()
    disk.write(opened)
    assert disk.read(b"old", b"absent") == [([disk.store.read([b"old"])[0], None], None)]
    of_flying, of_open, of_both = disk.read(b"a"), disk.read(b"b"), disk.read(b"a", b"b")
    scanned = await disk.scan()
    superseded = disk.write(record(b"b", b"0", 500))
    repeated = disk.write(flying)
    assert of_flying == of_open == of_both == scanned == superseded == repeated == []
    await disk.land()
    assert of_open == of_both == superseded == []
    await disk.land()
    assert of_flying == [([flying[1]], None)] and of_open == [([opened[1]], None)]
    assert of_both == [([flying[1], opened[1]], None)] and superseded == [([(0, 1001 << 16)], None, None)]
    assert repeated == [OK]
    assert isinstance(scanned[0][0], Page) and scanned[0][1] is None


async def test_a_failed_sync_fails_all_that_waited_and_stops_the_store(disk: Bench) -> None:
    disk.write(record(b"safe", b"1", 999))
    await disk.land()
    flying = record(b"a", b"1", 1000)
    waiting = [disk.write(flying)]
    await turn()
    waiting += [disk.write(record(b"b", b"1", 1001)), disk.write(record(b"a", b"0", 500))]
    reads = [disk.read(b"a"), disk.read(b"b"), await disk.scan()]
    await disk.land(StorageError("the disk is gone"))
    for answer in waiting:
        assert len(answer) == 1 and isinstance(from_wire(*answer[0][2]), StorageError)
    for answer in reads:
        assert len(answer) == 1 and isinstance(from_wire(*answer[0][1]), StorageError)
    assert [str(error) for error in disk.fatal] == ["the disk is gone"]
    # nothing is acknowledged again, not even what looks as if it were stored already; and nothing of it is shown
    for answer in (disk.write(flying), disk.write(record(b"a", b"0", 500)), disk.write(record(b"c", b"1", 2000))):
        assert isinstance(from_wire(*answer[0][2]), StorageError)
    for answer in (disk.read(b"a"), disk.read(b"safe", b"a"), await disk.scan()):
        assert answer[0][1] is not None and isinstance(from_wire(*answer[0][1]), StorageError)
    assert disk.store.syncs == [] and len(disk.fatal) == 1


async def test_a_full_disk_refuses_writes_serves_reads_and_recovers(disk: Bench) -> None:
    before = record(b"a", b"1", 1000)
    disk.write(before)
    await disk.land()
    disk.store.full = True
    answer = disk.write(record(b"a", b"2", 2000))
    await turn()
    assert isinstance(from_wire(*answer[0][2]), StorageFull)
    assert disk.read(b"a") == [([before[1]], None)] and disk.fatal == []
    disk.store.full = False
    after = record(b"a", b"3", 3000)
    answer = disk.write(after)
    await disk.land()
    assert answer == [OK] and disk.read(b"a") == [([after[1]], None)]


async def test_what_a_released_reply_causes_joins_the_next_group(disk: Bench) -> None:
    answers: list[str] = []

    def done(*_: object) -> None:
        answers.append("first")
        disk.replica.write(FRESH, [b"b"], [record(b"b", b"1", 2000)[1]], False, lambda *_: answers.append("second"))

    disk.replica.write(FRESH, [b"a"], [record(b"a", b"1", 1000)[1]], False, done)
    await turn()
    third = disk.write(record(b"c", b"1", 1500))
    await disk.land()
    assert answers == ["first"] and third == []
    await disk.land()
    assert third == [OK] and answers == ["first", "second"] and disk.store.syncs == []


async def test_what_has_not_departed_when_the_store_closes_fails_and_nobody_calls_it_broken(disk: Bench) -> None:
    answer = disk.write(record(b"a", b"1", 1000))
    await disk.store.close()
    await turn()
    assert isinstance(from_wire(*answer[0][2]), StorageClosed) and disk.fatal == []


async def test_a_register_that_is_taken_away_and_the_promise_for_it_reach_the_disk_together(disk: Bench) -> None:
    acceptor = Acceptor(disk.replica, disk.clock)
    disk.replica.token_of = lambda key: 0
    taken = register_of(b"k", ballot(1, 7), State(1))
    disk.write((b"k", taken), mode=REPAIR)
    await disk.land()
    disk.write(record(b"a", b"1", 1000))
    await turn()  # a sync is under way, which may take with it all that is written from now on
    retiring = asyncio.ensure_future(acceptor.retire([b"k"], [taken[:16]], 1 << 20))
    await turn()
    assert disk.store.read([b"k"]) == [None]
    assert dict((await disk.store.load_promises(b"", 10)).items) == {b"k": promise_of(1 << 20)}
    await disk.land()
    await disk.land()
    assert await retiring == []


async def test_registers_are_synced_and_in_order_where_plain_writes_are_not(disk: Bench) -> None:
    disk.replica._grouped, disk.replica.token_of = False, lambda key: 0
    assert disk.write(record(b"plain", b"1", 1000)) == [OK] and disk.store.syncs == []
    older, newer = (register_of(b"k", ballot(ms, 7), State(ms, b"v")) for ms in (1, 2))
    answers = [disk.write((b"k", older), mode=REPAIR), disk.write((b"k", newer), mode=REPAIR)]
    assert answers == [[], []]
    await disk.land()
    assert answers == [[OK], [OK]] and disk.store.read([b"k"]) == [newer]


# --- a store in another process


class FarStore(MemoryStore):
    """Answers a turn later; `gate` holds everything up."""

    local = False

    def __init__(self) -> None:
        super().__init__(token_bytes("xxh3"))
        self.gate = asyncio.Event()
        self.gate.set()

    async def get_many(self, keys: Any) -> list[bytes | None]:
        await self.gate.wait()
        await asyncio.sleep(0)
        return list(map(self._records.get, keys))

    async def apply(self, batch: Batch) -> None:
        await asyncio.sleep(0)
        MemoryStore.write(self, batch)


async def test_a_far_store_merges_in_order_and_never_backwards() -> None:
    store = FarStore()
    await store.open()
    bench = Bench(store)
    bench.replica.start()
    try:
        answers = [bench.write(record(b"k", b"%d" % i, 1000 + (7 * i) % 20)) for i in range(20)]
        await until(lambda: all(answers))
        assert bench.store._records[b"k"] == record(b"k", b"17", 1019)[1]
        newest = 0
        for i, ((superseded, _, error),) in enumerate(answers):
            version = 1000 + (7 * i) % 20
            assert error is None and (superseded is None) == (version > newest)
            newest = max(newest, version)
        read = bench.read(b"k", b"absent")
        await until(lambda: read)
        assert read[0][0][0][HEADER:] == b"17" and read[0][0][1] is None
    finally:
        await bench.replica.stop()
        await store.close()


async def test_a_store_whose_sync_fails_stops_acknowledging_and_the_cluster_goes_on() -> None:
    stores = [DiskStore() for _ in range(3)]
    async with Cluster(3, store=stores.__getitem__) as cluster:
        alive = asyncio.create_task(_land_all(stores))
        try:
            client = await cluster.client()
            await client.put("k", b"1", consistency="ALL")
            alive.cancel()
            call = asyncio.create_task(client.put("k", b"2"))
            await until(lambda: all(store.syncs for store in stores))
            stores[1].land(StorageError("input/output error"))
            assert [str(error) for error in cluster.fatal] == ["input/output error"]
            assert not call.done()
            alive = asyncio.create_task(_land_all(stores))
            await call
            assert await client.get("k") == b"2"
            assert cluster.node(1).waiting_for == "input/output error"
            wire = await cluster.wire(1, hello=cluster.node(0).hello())
            reply = await wire.ask(ReplicaWrite(0, 1, "t", REPAIR, [b"x"], [record(b"x", b"1", 1)[1]]))
            assert isinstance(from_wire(*reply.error), StorageError)
            reply = await wire.ask(ReplicaRead(0, 1, "t", [b"k"]))
            assert isinstance(from_wire(*reply.error), StorageError)
        finally:
            alive.cancel()


async def _land_all(stores: list[DiskStore]) -> None:
    while True:
        for store in stores:
            while store.syncs:
                store.land()
        await asyncio.sleep(0.001)


# --- purging (G1)


async def test_a_purge_takes_nothing_that_is_under_way_to_the_disk(disk: Bench) -> None:
    key, dead = record(b"k", b"", 1000, flags=TOMBSTONE)
    waiting, other = record(b"w", b"", 1000, flags=TOMBSTONE)
    disk.write((key, dead))
    await turn()
    disk.write((waiting, other))
    assert disk.store.read([key, waiting]) == [dead, None]
    assert await disk.replica.purge([key, waiting], [dead, other]) == 0  # the next write takes both to be there
    await disk.land()
    await disk.land()
    assert await disk.replica.purge([key, waiting], [dead, other]) == 2
    assert disk.store.read([key, waiting]) == [None, None] and (await disk.store.count()).records == 0
    disk.write(record(b"k", b"v", 2000))
    await disk.land()
    assert (await disk.scan())[0][0].items == [record(b"k", b"v", 2000)]
