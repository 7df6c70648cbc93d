"""Anti-entropy between nodes: what a replica missed reaches it without anybody reading it; equal replicas cost nothing;
trees stay true to their stores through failed groups, restarts and changes of the ranges."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cluster import LOST, Cluster, until
from contract.storage_harness import redis_server
from structlog.testing import capture_logs
from test_replica import NOW_MS, Bench, DiskStore, record, turn

from agi.core.dht import treekeeper
from agi.core.dht.antientropy import REQUESTS
from agi.core.dht.calls import TreeReply
from agi.core.dht.errors import (
    InvalidRequest,
    Overloaded,
    StaleEpoch,
    StorageError,
    StorageFull,
    Unavailable,
    from_wire,
)
from agi.core.dht.joint import JointSet
from agi.core.dht.node import Node
from agi.core.dht.protocol.exchange import Report
from agi.core.dht.protocol.merkle import HashTrees
from agi.core.dht.protocol.messages import (
    REPAIR,
    ArcListReply,
    Delete,
    Message,
    Put,
    ReplicaWrite,
    TreeFetch,
    TreeNodes,
    TreeRecords,
    TreeRoot,
    TreeRootReply,
)
from agi.core.dht.protocol.record import EXPIRES, FLAGS, HEADER, SHRUNK, TOMBSTONE, shrink
from agi.core.dht.ring import Ring, token_bytes
from agi.core.dht.storage.base import Page
from agi.core.dht.storage.memory import MemoryStore
from agi.core.dht.storage.redis import RedisStore
from agi.core.dht.transport.codec import encode
from agi.core.dht.treekeeper import TreeKeeper, _cut
from agi.core.dht.types import Consistency
from agi.core.dht.types import Node as Member

OFTEN = {"dht.repair.interval_ms": 40, "dht.hints.bytes_max_mb": 0}
NEVER = {"dht.hints.bytes_max_mb": 0}
"""Exchanges only where the test begins them."""
OLD_MS = 60_000
"""What was written so long ago is not under way any more."""


def wall_ms() -> int:
    return int(time.time() * 1000)


async def built(cluster: Cluster, *, anew: bool = False) -> None:
    """Every node knows its ranges; `anew`: after what was planted behind their backs."""
    if anew:
        for node in cluster.living():
            node.antientropy.keeper.forget()
    await until(lambda: all(node.antientropy.keeper.unknown == 0 for node in cluster.living()))


def contents(cluster: Cluster, keys: list[str]) -> list[list[bytes | None]]:
    """Per key what each of its replicas holds, without reading through the cluster."""
    return [[cluster.stores[i].read([key.encode()])[0] for i in cluster.holders(key)] for key in keys]


def all_equal(cluster: Cluster, keys: list[str]) -> bool:
    return all(None not in held and len(set(held)) == 1 for held in contents(cluster, keys))


class Watch:
    """Counts the messages and bytes of comparisons and repairs between nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self.messages: Counter[str] = Counter()
        self.bytes = 0
        self.writes: list[ReplicaWrite] = []
        cluster.rule(self._see)

    def _see(self, src: str, dst: str, message: Message) -> None:
        if isinstance(message, (*REQUESTS, TreeReply)):
            self.messages[type(message).__name__] += 1
            self.bytes += len(encode(message))
        elif isinstance(message, ReplicaWrite) and message.mode == REPAIR:
            self.writes.append(message)
            self.bytes += len(encode(message))


# --- what was missed is brought


async def test_what_one_replica_lacks_reaches_it_without_a_read() -> None:
    async with Cluster(3, settings=OFTEN) as cluster:
        at_ms = wall_ms() - OLD_MS
        keys = [f"k{i}" for i in range(60)]
        newest: dict[str, bytes] = {}
        for i, key in enumerate(keys):
            for node in range(3):
                if (i + node) % 3:
                    planted = cluster.plant(node, key, b"v%d" % node, at_ms=at_ms + node)
                    newest[key] = max(planted, newest.get(key, b""))
        await built(cluster, anew=True)
        await until(lambda: all_equal(cluster, keys))
        assert [held[0] for held in contents(cluster, keys)] == [newest[key] for key in keys]
        assert sum(node.metrics.gets + node.metrics.scans for node in cluster.living()) == 0
        assert [node.metrics.read_repairs for node in cluster.living()] == [0, 0, 0]
        await until(lambda: all(node.antientropy.round_age_s is not None for node in cluster.living()))
        assert not cluster.fatal


async def test_after_a_partition_the_side_that_was_cut_off_catches_up() -> None:
    settings = {**OFTEN, "dht.network.timeout_ms": 300}
    async with Cluster(3, settings=settings) as cluster:
        client = await cluster.client(0, 1)
        await client.put("deleted", b"v", consistency="ALL")

        def cut(src: str, dst: str, message: Message) -> Any:
            writes = isinstance(message, ReplicaWrite) and dst == "n2"
            return LOST if writes or (isinstance(message, TreeRoot) and "n2" in (src, dst)) else None

        heal = cluster.rule(cut)
        keys = [f"k{i}" for i in range(50)]
        wire = await cluster.wire(0)  # no other node coordinates
        raw = [key.encode() for key in keys]
        assert (await wire.ask(Put(0, Consistency.QUORUM, 2000, raw, [b"v"] * 50))).errors is None
        assert (await wire.ask(Delete(0, Consistency.QUORUM, 2000, [b"deleted"]))).existed == [True]
        assert cluster.stores[2].read([b"k0"]) == [None]
        heal()
        await until(lambda: all_equal(cluster, [*keys, "deleted"]))
        held = contents(cluster, ["deleted"])[0][2]
        assert held is not None and held[FLAGS] == TOMBSTONE
        assert await client.get("deleted", consistency="ALL") is None


async def test_with_more_nodes_than_replicas_only_replicas_of_a_key_get_it() -> None:
    async with Cluster(5, settings=OFTEN) as cluster:
        keys = [f"k{i}" for i in range(80)]
        for i, key in enumerate(keys):
            cluster.plant(cluster.holders(key)[i % 3], key, b"v", at_ms=wall_ms() - OLD_MS)
        await built(cluster, anew=True)
        await until(lambda: all_equal(cluster, keys))
        for key in keys:
            assert [i for i, held in enumerate(cluster.held(key)) if held] == sorted(cluster.holders(key))
        for node in cluster.living():
            assert set(node.antientropy.keeper.partners) == set(cluster.names) - {node.node_id}


async def test_what_changes_hands_is_left_to_the_change() -> None:
    """Repair would send a newcomer, from each of its peers, what it is just being brought."""
    async with Cluster(3) as cluster:
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ArcListReply) else None)
        await cluster.add(wait=False)
        await until(lambda: all(node.topology is not None and node.topology.in_transition for node in cluster.living()))
        ring = cluster.node(0).known_topology.ring()
        for node in cluster.living():
            trees, partners = node.antientropy.keeper.trees.trees, node.antientropy.keeper.partners
            assert "n3" not in partners
            compared = {at for positions in partners.values() for at in positions}
            for at, tree in enumerate(trees):
                assert (at in compared) != isinstance(ring.replicas_at(tree.last), JointSet)


async def test_a_node_that_comes_back_is_compared_with_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"dht.repair.interval_ms": 86_400_000, "dht.hints.bytes_max_mb": 0}
    monkeypatch.setattr("agi.core.dht.antientropy.SOON_S", 0.1)
    async with Cluster(3, settings=settings) as cluster:
        client = await cluster.client(0, 1)
        await cluster.down(2)
        keys = [f"k{i}" for i in range(20)]
        await client.put_many(dict.fromkeys(keys, b"v"))
        for store in cluster.stores[:2]:  # long ago
            for key, held in list(store._records.items()):  # type: ignore[attr-defined]  # a MemoryStore
                old = (int.from_bytes(held[:8], "big") - (OLD_MS << 16)).to_bytes(8, "big")
                store._records[key] = old + held[8:]  # type: ignore[attr-defined]  # as above
        await built(cluster, anew=True)
        await cluster.up(2)
        await until(lambda: all_equal(cluster, keys))


async def test_a_record_is_repaired_whole_with_its_ttl() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        now_ms = wall_ms()
        planted = cluster.plant(0, "t", b"v", at_ms=now_ms - OLD_MS, flags=EXPIRES, expires_ms=now_ms + 3_600_000)
        await built(cluster, anew=True)
        watch = Watch(cluster)
        report = await cluster.node(0).antientropy.exchange("n1")
        assert (report.differences, report.sent) == (1, 1)
        assert cluster.held("t")[1] == planted and watch.writes[0].records == [planted]
        report = await cluster.node(2).antientropy.exchange("n1")
        assert (report.differences, report.received) == (1, 1) and cluster.held("t")[2] == planted


# --- what costs nothing


async def test_equal_replicas_cost_two_small_messages_and_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        client = await cluster.client()
        await client.put_many({f"k{i}": b"v" * 50 for i in range(2000)}, consistency="ALL")
        await client.delete_many([f"k{i}" for i in range(100)], consistency="ALL")
        await built(cluster)
        watch = Watch(cluster)

        async def scanned(*_: object) -> Page:
            raise AssertionError("the store was scanned")

        for name in ("scan_tokens", "scan"):
            monkeypatch.setattr(MemoryStore, name, scanned)
        for node in cluster.living():
            for other in cluster.names:
                if other != node.node_id:
                    report = await node.antientropy.exchange(other)
                    assert report.ranges > 100 and report.differing == report.unknown == 0
        assert watch.messages == {"TreeRoot": 6, "TreeRootReply": 6}
        assert watch.bytes < 6 * 200
        assert [node.antientropy.totals.differences for node in cluster.living()] == [0, 0, 0]


async def test_expired_records_that_only_one_replica_has_shrunk_are_no_difference() -> None:
    async with Cluster(2, factor=2, settings=NEVER) as cluster:
        now_ms = wall_ms()
        for i in range(50):
            for node in range(2):
                planted = cluster.plant(
                    node, f"k{i}", b"v", at_ms=now_ms - OLD_MS, flags=EXPIRES, expires_ms=now_ms - 30_000
                )
            if i % 2:  # the write's own bytes are the writer's: take the first node's
                cluster.stores[1]._records[b"k%d" % i] = cluster.stores[0]._records[b"k%d" % i]  # type: ignore[attr-defined]  # a MemoryStore
            else:
                cluster.stores[0]._records[b"k%d" % i] = planted  # type: ignore[attr-defined]  # as above
        await built(cluster, anew=True)
        assert await cluster.node(0).replica.sweep(1000) == 50
        held = cluster.held("k1")
        assert held[0] is not None and held[1] is not None
        assert (held[0][FLAGS], held[1][FLAGS]) == (EXPIRES | SHRUNK, EXPIRES)
        watch = Watch(cluster)
        for node, other in ((0, "n1"), (1, "n0")):
            assert (await cluster.node(node).antientropy.exchange(other)).differing == 0
        assert not watch.writes and watch.messages.total() == 4
        cluster.plant(0, "more", b"v", at_ms=now_ms - OLD_MS)
        await built(cluster, anew=True)
        report = await cluster.node(0).antientropy.exchange("n1")
        assert report.differences == report.sent == 1


async def test_writes_under_way_are_no_differences() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        client = await cluster.client()
        keys = [f"k{i}" for i in range(300)]
        await client.put_many(dict.fromkeys(keys, b"v" * 100))
        await built(cluster)
        watch = Watch(cluster)
        stop = False

        async def write() -> None:
            rng = random.Random(1)
            while not stop:
                await client.put_many(dict.fromkeys(rng.sample(keys, 30), b"w" * 100))
                await asyncio.sleep(0)

        writer = asyncio.create_task(write())
        for _ in range(10):
            for node, other in ((0, "n1"), (1, "n2"), (2, "n0")):
                report = await cluster.node(node).antientropy.exchange(other)
                assert report.differences == report.sent == report.received == 0
        stop = True
        await writer
        assert not watch.writes
        assert all(node.antientropy.keeper.unknown == 0 for node in cluster.living())


async def test_who_is_busy_is_not_compared_with_again_before_that_can_settle_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agi.core.dht.antientropy.SOON_S", 0.02)
    settings = {"dht.repair.interval_ms": 86_400_000, "dht.network.timeout_ms": 2000, **NEVER}
    async with Cluster(2, factor=2, settings=settings) as cluster:
        cluster.plant(0, "k", b"v", at_ms=wall_ms())
        await built(cluster, anew=True)
        both = [(cluster.node(0).antientropy, "n1"), (cluster.node(1).antientropy, "n0")]
        began = {each: each.totals.exchanges for each, _ in both}
        for each, _ in both:
            each.missed()
        await until(lambda: all(each.totals.exchanges > began[each] for each, _ in both))
        for each, other in both:
            assert each.not_compared == [other]
            assert each._due[other] >= each._since(other) + 2 + 5  # the timeout, and how far clocks may differ


@pytest.mark.parametrize("young_from", [None, 1], ids=["a turn", "a round"])
@pytest.mark.parametrize("skew_ms", [5000, 3_600_000])
async def test_a_clock_that_was_set_back_does_not_keep_old_records_young(skew_ms: int, young_from: int | None) -> None:
    settings = {**NEVER, "dht.versions.max_clock_skew_ms": skew_ms}
    async with Cluster(2, factor=2, settings=settings) as cluster:
        cluster.plant(0, "k", b"v", at_ms=wall_ms())
        cluster.plant(0, "l", b"v", at_ms=wall_ms() + 3_600_000)  # by a clock that was an hour ahead until now
        await built(cluster, anew=True)
        report = await cluster.node(0).antientropy.exchange("n1", young_from=young_from)
        assert (report.young, report.sent) == (1, 1)
        assert cluster.held("k")[1] is None and cluster.held("l")[1] is not None


async def test_who_lacks_what_a_clock_ahead_has_written_is_level_with_what_is_older() -> None:
    async with Cluster(2, factor=2, settings=NEVER) as cluster:
        version = wall_ms() << 16
        cluster.plant(0, "l", b"v", at_ms=wall_ms() + 3_600_000)
        await built(cluster, anew=True)
        report = await cluster.node(1).antientropy.exchange("n0", young_from=version)
        assert (report.differences, report.received, report.behind) == (1, 1, 0)
        cluster.plant(0, "m", b"v", at_ms=wall_ms() - OLD_MS)
        await built(cluster, anew=True)
        report = await cluster.node(1).antientropy.exchange("n0", young_from=version)
        assert (report.differences, report.received, report.behind) == (1, 1, 1)


async def test_traffic_keeps_to_its_rate() -> None:
    settings = {**NEVER, "dht.repair.bytes_per_s": 200_000}
    async with Cluster(2, factor=2, settings=settings) as cluster:
        for i in range(100):
            cluster.plant(0, f"k{i}", b"v" * 2000, at_ms=wall_ms() - OLD_MS)
        await built(cluster, anew=True)
        began = time.monotonic()
        report = await cluster.node(0).antientropy.exchange("n1")
        took = time.monotonic() - began
        totals = cluster.node(0).antientropy.totals
        spent = totals.bytes_sent + totals.bytes_received
        assert report.sent == 100 and 200_000 < spent < 250_000
        assert took > spent / 200_000 - 0.25 - 0.01  # all but the burst
        assert all_equal(cluster, [f"k{i}" for i in range(100)])


async def test_twenty_thousand_keys_one_percent_apart_cost_at_most_twice_what_differs() -> None:
    async with Cluster(3, settings={**NEVER, "dht.ring.virtual_nodes": 150}) as cluster:
        client = await cluster.client()
        keys = [f"bench:{i:08d}" for i in range(20_000)]
        for first in range(0, len(keys), 5000):
            await client.put_many(dict.fromkeys(keys[first : first + 5000], b"v" * 100), consistency="ALL")
        chosen = random.Random(5).sample(keys, 200)
        difference = 0
        for i, key in enumerate(chosen):
            at_ms = wall_ms() + 3_600_000
            for node in range(3):
                if node != i % 2:  # n0 or n1 is behind; n2 never
                    planted = cluster.plant(2, key, b"w" * 100, at_ms=at_ms)
                    cluster.stores[node]._records[key.encode()] = planted  # type: ignore[attr-defined]  # a MemoryStore
            difference += len(key) + len(planted)
        await built(cluster, anew=True)
        watch = Watch(cluster)
        report = await cluster.node(0).antientropy.exchange("n1")
        assert report.differences == 200 and all_equal(cluster, chosen)
        assert watch.bytes <= 2 * difference
        totals = cluster.node(0).antientropy.totals
        assert totals.bytes_sent + totals.bytes_received == pytest.approx(watch.bytes, rel=0.05)


# --- trees and their store


class Keeper:
    """A keeper over one replica, without a node."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.tasks: list[asyncio.Task[None]] = []
        ring = Ring([Member(f"n{i}", "h", 7000 + i, virtual_nodes=8) for i in range(3)], "xxh3", 3)
        self.keeper = TreeKeeper("n0", bench.replica, bench.clock, self._own, 1e9)
        self.keeper.start(ring)

    def _own(self, coroutine: Any, name: str) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def check(self) -> None:
        """The trees are those of what the store holds."""
        await until(lambda: self.keeper.unknown == 0)
        await self.keeper.fold()
        trees = self.keeper.trees
        fresh = HashTrees(token_bytes("xxh3"))
        fresh.adopt((tree.first, tree.last) for tree in trees.trees)
        everything = range(len(trees.trees))
        fresh.begin(everything, 0.0, ())
        page = await self.bench.store.scan_tokens(0, (1 << 64) - 1, 1_000_000)
        fresh.page(page.items)
        fresh.finish(everything)
        assert not trees.pending
        assert trees.total(everything) == fresh.total(everything)
        assert [tree.sums.total for tree in trees.trees] == [tree.sums.total for tree in fresh.trees]


@pytest.fixture
async def kept() -> AsyncIterator[Keeper]:
    store = DiskStore()
    await store.open()
    keeper = Keeper(Bench(store))
    yield keeper
    await keeper.stop()
    await store.close()


@pytest.mark.parametrize("seed", range(20))
async def test_trees_are_true_through_groups_that_fail_and_folds_at_any_time(kept: Keeper, seed: int) -> None:
    rng = random.Random(seed)
    store, bench = kept.bench.store, kept.bench
    assert isinstance(store, DiskStore)
    for _ in range(150):
        action = rng.random()
        if action < 0.5:
            count = rng.randint(1, 5)
            keys = [b"k%d" % rng.randrange(20) for _ in range(count)]
            bench.write(*(record(key, b"v", NOW_MS - rng.randrange(1000)) for key in keys), mode=rng.choice((0, 1)))
        elif action < 0.7 and store.syncs:
            store.land()
        elif action < 0.8:
            store.full = not store.full
        elif action < 0.95:
            await kept.keeper.fold()
        elif action < 0.97:
            kept.keeper.forget()
        else:
            await asyncio.sleep(0)
    store.full = False
    await turn()
    while store.syncs:
        await bench.land()
    await kept.check()


async def test_a_fold_does_not_take_what_is_only_merged_for_what_is_stored(kept: Keeper) -> None:
    store = kept.bench.store
    assert isinstance(store, DiskStore)
    await until(lambda: kept.keeper.unknown == 0)
    kept.bench.write(record(b"a", b"1", NOW_MS))  # flies
    await turn()
    kept.bench.write(record(b"a", b"2", NOW_MS + 1), record(b"b", b"1", NOW_MS))  # waits
    await kept.keeper.fold()
    assert sorted(kept.keeper.trees.pending) == [b"a", b"b"]
    store.full = True
    await kept.bench.land()  # the second group is refused
    await kept.keeper.fold()
    assert kept.keeper.pending == 0
    store.full = False
    await kept.check()


async def test_a_store_that_cannot_be_scanned_leaves_the_trees_unknown_until_it_can(
    kept: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(treekeeper, "RETRY_S", 0.01)
    kept.bench.write(*(record(b"k%d" % i, b"v", NOW_MS) for i in range(100)))
    await until(lambda: kept.keeper.unknown == 0)
    scan = kept.bench.store.scan_tokens
    fails = 3

    async def failing(*args: Any) -> Page:
        nonlocal fails
        fails -= 1
        if fails > 0:
            raise StorageError("no")
        return await scan(*args)

    monkeypatch.setattr(kept.bench.store, "scan_tokens", failing)
    with capture_logs() as logs:
        kept.keeper.forget()
        await kept.check()
    assert [line["event"] for line in logs if line["event"] == "hash_tree_not_built"] == ["hash_tree_not_built"] * 2


async def test_large_records_are_read_a_few_at_a_time(kept: Keeper) -> None:
    asked: list[int] = []
    scan = kept.bench.store.scan_tokens

    async def counted(first: int, last: int, limit: int, after: bytes | None = None) -> Page:
        asked.append(limit)
        return await scan(first, last, limit, after)

    kept.bench.store.scan_tokens = counted  # type: ignore[method-assign]  # to see what is asked
    kept.bench.write(*(record(b"k%d" % i, bytes(300_000), NOW_MS) for i in range(40)))
    await kept.bench.land()
    await until(lambda: kept.keeper.unknown == 0)
    kept.keeper.forget()
    await until(lambda: kept.keeper.unknown == 0)
    entries, up_to = await kept.keeper.listing([(0, (1 << 64) - 1)])
    assert len(entries) == 40 and up_to is None and {entry.size for entry in entries} > {300_042}
    assert asked[-1] <= 3
    keys, records, taken = await kept.keeper.records_at([entry.token for entry in entries])
    assert 0 < len(keys) == len(records) == taken <= 3  # SEND_BYTES are passed with the first page


@pytest.mark.parametrize("step", [1, 2, 40])
async def test_keys_are_found_by_their_tokens_side_by_side_or_far_apart(kept: Keeper, step: int) -> None:
    kept.bench.write(*(record(b"k%d" % i, b"v", NOW_MS) for i in range(1000)))
    await kept.bench.land()
    await until(lambda: kept.keeper.unknown == 0)
    entries, _ = await kept.keeper.listing([(0, (1 << 64) - 1)])
    chosen = entries[::step]
    tokens = [entry.token for entry in chosen]
    missing = [token + 1 for token in tokens[:3]]
    keys: list[bytes] = []
    asked = sorted([*tokens, *missing])
    while asked:
        some, _, taken = await kept.keeper.records_at(asked)
        keys += some
        asked = asked[taken:]
    assert keys == [entry.key for entry in chosen]
    assert sorted((await kept.keeper.records_at(tokens[::-1]))[0]) == sorted(keys)  # in whatever order they are named


async def test_what_is_not_synced_is_not_fetched(kept: Keeper) -> None:
    kept.bench.write(record(b"synced", b"v", NOW_MS))
    await kept.bench.land()
    kept.bench.write(record(b"flying", b"v", NOW_MS))
    await turn()
    await until(lambda: kept.keeper.unknown == 0)
    tokens = {entry.key: entry.token for entry in (await kept.keeper.listing([(0, (1 << 64) - 1)]))[0]}
    assert (await kept.keeper.records_at([tokens[b"synced"]]))[0] == [b"synced"]
    fetching = asyncio.ensure_future(kept.keeper.records_at([tokens[b"flying"]]))
    done, _ = await asyncio.wait([fetching], timeout=0.05)
    assert not done
    await kept.bench.land()
    assert (await fetching)[0] == [b"flying"]


async def test_what_is_changing_hands_has_no_trees_until_it_has_changed() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put_many({f"k{i}": b"v" for i in range(300)})
        await built(cluster)
        end = cluster.rule(lambda src, dst, message: LOST if isinstance(message, ArcListReply) else None)
        await cluster.add(wait=False)
        await until(lambda: all(node.topology and node.topology.in_transition for node in cluster.living()))
        for node in cluster.living():
            keeper, ring = node.antientropy.keeper, node.ring
            assert ring is not None and keeper.held
            settled = [span for span in keeper.held if not isinstance(ring.replicas_at(span[0]), JointSet)]
            assert [(tree.first, tree.last) for tree in keeper.trees.trees] == settled != keeper.held
        end()
        await cluster.settled()
        await built(cluster)
        for node in cluster.living():
            keeper = node.antientropy.keeper
            assert [(tree.first, tree.last) for tree in keeper.trees.trees] == keeper.held


async def test_many_changes_are_folded_without_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.protocol.merkle.FOLD_AT", 500)
    monkeypatch.setattr(treekeeper, "FOLD_AT", 500)
    async with Cluster(1, factor=1) as cluster:
        client = await cluster.client()
        keeper = cluster.node(0).antientropy.keeper
        await built(cluster)
        for first in range(0, 3000, 100):
            await client.put_many({f"k{i}": b"v" for i in range(first, first + 100)})
        await until(lambda: keeper.pending < 500)
        assert keeper.trees.total(range(len(keeper.trees.trees)))[1] + keeper.pending == 3000
        assert keeper.trees.lost == 0


async def test_a_range_that_outgrows_its_leaves_is_built_anew_while_it_serves() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        client = await cluster.client()
        await built(cluster)
        keeper = cluster.node(0).antientropy.keeper
        leaves = sum(len(tree.sums.leaves) for tree in keeper.trees.trees)
        for first in range(0, 60_000, 10_000):
            await client.put_many({f"k{i}": b"v" for i in range(first, first + 10_000)}, consistency="ALL")
        report = await cluster.node(0).antientropy.exchange("n1")
        assert report.unknown == 0
        await until(lambda: not keeper.trees.to_build(1))
        assert sum(len(tree.sums.leaves) for tree in keeper.trees.trees) > 1.5 * leaves and keeper.built
        assert (await cluster.node(0).antientropy.exchange("n1")).differing == 0


async def test_trees_are_built_after_a_restart_while_writes_go_on() -> None:
    settings = {**NEVER, "dht.repair.build_keys_per_s": 2000}
    async with Cluster(3, settings=settings) as cluster:
        client = await cluster.client(0, 1)
        keys = [f"k{i}" for i in range(2000)]
        await client.put_many(dict.fromkeys(keys, b"v"), consistency="ALL")
        await cluster.down(2)
        await cluster.up(2)
        keeper = cluster.node(2).antientropy.keeper
        assert keeper.unknown == len(keeper.trees.trees)
        report = await cluster.node(0).antientropy.exchange("n2")
        assert report.unknown and cluster.node(0).antientropy.round_age_s is None
        written = 0
        while keeper.unknown:
            await client.put_many({f"k{(written + i) % 3000}": b"w" for i in range(50)}, consistency="ALL")
            written += 50
            await asyncio.sleep(0.001)
        assert written > 500
        assert await _same_trees(cluster.node(2), cluster.node(0))


async def _same_trees(one: Node, two: Node) -> bool:
    totals = []
    for node in (one, two):
        keeper = node.antientropy.keeper
        await keeper.fold()
        totals.append([tree.sums.total for tree in keeper.trees.trees])
    return totals[0] == totals[1]


async def test_another_ring_keeps_the_ranges_that_stay() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        client = await cluster.client()
        await client.put_many({f"k{i}": b"v" for i in range(500)}, consistency="ALL")
        await built(cluster)
        node = cluster.node(0)
        keeper = node.antientropy.keeper
        await keeper.fold()
        assert node.topology is not None and node.ring is not None
        before = {(tree.first, tree.last): tree for tree in keeper.trees.trees}
        grown = Ring([*node.ring.nodes, Member("n3", "h", 7003, virtual_nodes=8)], "xxh3", 3)
        node.antientropy.adopt(node.topology, grown)
        after = {(tree.first, tree.last): tree for tree in keeper.trees.trees}
        kept = before.keys() & after.keys()
        assert kept and len(kept) < len(before)
        assert all(after[bounds] is before[bounds] and after[bounds].known for bounds in kept)
        assert set(keeper.partners) == {"n1", "n2", "n3"}
        assert 0 < keeper.unknown <= len(after) - len(kept)
        await built(cluster)
        node.antientropy.adopt(node.topology, node.ring)
        await built(cluster)
        assert (await node.antientropy.exchange("n1")).differing == 0


def test_ranges_are_cut_where_all_nodes_cut_them() -> None:
    ring = Ring([Member("n0", "h", 7000, virtual_nodes=2)], "xxh3", 1)
    cuts = [bounds for part in ring.partitions() for bounds in _cut(part)]
    assert sum(last - first + 1 for first, last in cuts) == 1 << 64
    assert max(last - first for first, last in cuts) < treekeeper.CUT_TOKENS
    ordered = sorted(cuts)
    assert all(a[1] + 1 == b[0] for a, b in pairwise(ordered))


async def test_trees_over_a_store_in_another_process(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        store = RedisStore(server.url, "n", token_bytes("xxh3"))
        await store.open()
        bench = Bench(store)  # type: ignore[arg-type]  # of any store
        bench.replica.start()
        kept = Keeper(bench)
        try:
            rng = random.Random(1)
            answers: list[list[Any]] = []
            for step in range(60):
                keys = [b"k%d" % rng.randrange(30) for _ in range(4)]
                answers.append(bench.write(*(record(key, b"v", NOW_MS - rng.randrange(1000)) for key in keys)))
                if step % 7 == 0:
                    await kept.keeper.fold()
                if step == 30:
                    kept.keeper.forget()
            await until(lambda: all(answers))
            assert all(answer[0][2] is None for answer in answers)
            await kept.check()
        finally:
            await kept.stop()
            await bench.replica.stop()
            await store.close()


# --- exchanges that fail


async def test_an_exchange_that_fails_is_counted_and_had_again() -> None:
    settings = {**OFTEN, "dht.network.timeout_ms": 50}
    async with Cluster(3, settings=settings) as cluster:
        cluster.plant(0, "k", b"v", at_ms=wall_ms() - OLD_MS)
        heal = cluster.rule(lambda src, dst, message: LOST if isinstance(message, TreeRootReply) else None)
        await built(cluster, anew=True)
        repair = cluster.node(0).antientropy
        with capture_logs() as logs:
            await until(lambda: repair.totals.failed > 2)
        assert [line["error"] for line in logs if line["event"] == "exchange_failed"][:1] == ["no answer in time"]
        assert repair.totals.exchanges >= repair.totals.failed and repair.round_age_s is None
        heal()
        await until(lambda: all_equal(cluster, ["k"]))
        await until(lambda: repair.round_age_s is not None)


async def test_ranges_that_change_during_an_exchange_end_it() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        for i in range(50):
            cluster.plant(0, f"k{i}", b"v", at_ms=wall_ms() - OLD_MS)
        await built(cluster, anew=True)
        node = cluster.node(0)
        assert node.topology is not None and node.ring is not None
        topology, grown = node.topology, Ring([*node.ring.nodes, Member("n3", "h", 7003, virtual_nodes=8)], "xxh3", 3)

        def change(src: str, dst: str, message: Message) -> None:
            if isinstance(message, TreeRecords):
                node.antientropy.adopt(topology, grown)

        stop = cluster.rule(change)
        with pytest.raises(StaleEpoch):
            await node.antientropy.exchange("n1")
        stop()
        node.antientropy.adopt(topology, node.ring)
        await built(cluster)
        assert (await node.antientropy.exchange("n1")).sent == 50


async def test_who_may_ask_and_what_a_refusal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        await built(cluster)
        wire = await cluster.wire(0)
        wire.link.send(TreeRoot(1, 1, "", 0, 1, 0, 0, 0))
        await until(lambda: wire.closed)  # a client compares nothing
        peer = cluster.node(1)
        one = await cluster.wire(0, "n1", peer.hello())
        everything = (0, (1 << 64) - 1)
        questions: list[Callable[[int], Any]] = [
            lambda epoch: TreeRoot(0, epoch, "", *everything, 1, 0, 0),
            lambda epoch: TreeNodes(0, epoch, "", *everything, 1, [9999], [0], [0], [0]),
            lambda epoch: TreeRecords(0, epoch, "", *everything, 1, [0], [0], [0], [1], b"", 0, 0),
            lambda epoch: TreeFetch(0, epoch, "", b""),
        ]
        for question in questions:
            reply = await one.ask(question(7))
            assert isinstance(from_wire(*reply.error), StaleEpoch)
            reply = await one.ask(question(1))
            assert isinstance(from_wire(*reply.error), StaleEpoch | InvalidRequest)
        monkeypatch.setattr("agi.core.dht.tree_answers.SERVING_MAX", 0)
        for question in questions:
            assert isinstance(from_wire(*(await one.ask(question(1))).error), Overloaded)


async def test_a_store_that_fails_is_told_to_who_asks() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        cluster.plant(0, "k", b"v", at_ms=wall_ms() - OLD_MS)
        await built(cluster, anew=True)

        async def failing(*_: object) -> Page:
            raise StorageFull("no")

        cluster.stores[1].scan_tokens = failing  # type: ignore[method-assign]  # a store that breaks
        with pytest.raises(StorageFull, match="no"):
            await cluster.node(0).antientropy.exchange("n1")
        assert cluster.node(0).antientropy.totals.failed == 1 and not cluster.fatal
        await cluster.down(2)
        with pytest.raises(Unavailable, match="n2 is not connected"):
            await cluster.node(0).antientropy.exchange("n2")


async def test_two_nodes_take_one_turn_between_them_and_both_know_of_it() -> None:
    async with Cluster(2, factor=2, settings={**NEVER, "dht.repair.interval_ms": 200}) as cluster:
        await built(cluster)
        both = [node.antientropy for node in cluster.living()]
        await until(lambda: sum(each.totals.exchanges for each in both) >= 6)
        assert sum(each.answers.served for each in both) == sum(each.totals.exchanges for each in both)
        began = time.monotonic()
        before = sum(each.totals.exchanges for each in both)
        await until(lambda: sum(each.totals.exchanges for each in both) >= before + 8)
        assert time.monotonic() - began > 8 * 0.75 * 0.2 - 0.2  # twice as fast if each took its own
        assert all(each.round_age_s is not None and each.round_age_s < 1 for each in both)


# --- ordered by an operator


async def test_a_repair_that_is_ordered_says_what_it_did() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        client = await cluster.client()
        keys = [f"k{i}" for i in range(40)]
        for i, key in enumerate(keys):
            cluster.plant(i % 3, key, b"v", at_ms=wall_ms() - OLD_MS)
        await client.put("young", b"v", consistency="ALL")
        await built(cluster, anew=True)
        seen: list[tuple[str, Mapping[str, Any]]] = []
        states = await client.repair(on_progress=lambda name, state: seen.append((name, state)))
        assert all_equal(cluster, keys)
        assert sorted(states) == cluster.names and [name for name, _ in seen][-1] == "n2"
        for state in states.values():
            assert not state["running"] and state["done"] == state["peers"] == 2 and state["failed"] == {}
        assert sum(state["differences"] for state in states.values()) == 80
        assert sum(state["keys_sent"] + state["keys_received"] for state in states.values()) == 80
        again = await client.repair("n1")
        assert list(again) == ["n1"] and again["n1"]["differences"] == again["n1"]["differing_ranges"] == 0


async def test_an_ordered_repair_of_a_part_of_the_ring_leaves_the_rest() -> None:
    async with Cluster(2, factor=2, settings=NEVER) as cluster:
        client = await cluster.client()
        keys = [f"k{i}" for i in range(60)]
        for key in keys:
            cluster.plant(0, key, b"v", at_ms=wall_ms() - OLD_MS)
        await built(cluster, anew=True)
        token_of = token_bytes("xxh3")
        middle = 1 << 63
        states = await client.repair("n0", (0, middle - 1))
        low = [key for key in keys if int.from_bytes(token_of(key.encode()), "big") < middle]
        held = [key for key in keys if cluster.held(key)[1] is not None]
        assert low and set(low) <= set(held) and len(held) < len(keys)
        assert states["n0"]["keys_sent"] == len(held)


async def test_what_an_ordered_repair_cannot_do_it_says() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        client = await cluster.client(0)
        await built(cluster)
        await cluster.down(2)
        states = await client.repair("n0")
        assert states["n0"]["failed"] == {"n2": "n2 is not connected"} and states["n0"]["done"] == 2
        states = await client.repair("n2")
        assert "error" in states["n2"]
        for wrong in ((5, 4), (-1, 4), (0, 1 << 64)):
            with pytest.raises(InvalidRequest):
                await client.repair("n0", wrong)
        with pytest.raises(InvalidRequest, match="no node 'n9'"):
            await client.repair("n9")


async def test_one_ordered_repair_at_a_time() -> None:
    async with Cluster(2, factor=2, settings=NEVER) as cluster:
        await built(cluster)
        hold = cluster.rule(lambda src, dst, message: (0.2,) if isinstance(message, TreeRoot) else None)
        repair = cluster.node(0).antientropy
        with pytest.raises(InvalidRequest, match="no repair was ordered"):
            repair.repair_state()
        first = repair.repair((0, (1 << 64) - 1))
        assert first["running"] and repair.repair((0, (1 << 64) - 1)) == first
        with pytest.raises(Overloaded, match="another range"):
            repair.repair((0, 5))
        await until(lambda: not repair.repair_state()["running"])
        hold()
        assert repair.repair((0, 5))["running"]
        await until(lambda: not repair.repair_state()["running"])


async def test_an_ordered_repair_waits_for_trees_that_are_not_built_yet() -> None:
    async with Cluster(2, factor=2, settings={**NEVER, "dht.repair.build_keys_per_s": 1000}) as cluster:
        client = await cluster.client()
        for i in range(800):
            cluster.plant(0, f"k{i}", b"v", at_ms=wall_ms() - OLD_MS)
        for node in cluster.living():
            node.antientropy.keeper.forget()
        states = await client.repair("n1")
        assert states["n1"]["keys_received"] == 800 and states["n1"]["failed"] == {}


async def test_shrunk_forms_travel() -> None:
    """A record that has been expired for long is sent as its tombstone: what it held is of no use any more."""
    async with Cluster(2, factor=2, settings=NEVER) as cluster:
        now_ms = wall_ms()
        planted = cluster.plant(0, "k", b"v" * 1000, at_ms=now_ms - OLD_MS, flags=EXPIRES, expires_ms=now_ms - 30_000)
        await built(cluster, anew=True)
        assert (await cluster.node(0).antientropy.exchange("n1")).sent == 1
        held = cluster.held("k")[1]
        assert held == shrink(b"k", planted) and len(held) == HEADER
        ranges = len(cluster.node(1).antientropy.keeper.trees.trees)
        assert await cluster.node(1).antientropy.exchange("n0") == Report(ranges=ranges)
