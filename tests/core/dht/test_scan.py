"""Scans over the whole cluster: ordered, complete or an error, merged from replicas that differ."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from cluster import LOST, WAIT_S, Cluster, until

from agi.core.dht.errors import Overloaded, Unavailable, from_wire
from agi.core.dht.protocol.messages import Message, ReplicaScan, ReplicaWrite, Scan, ScanReply
from agi.core.dht.protocol.record import TOMBSTONE
from agi.core.dht.scan import SCANS_MAX
from agi.core.dht.types import Consistency


@pytest.mark.parametrize("nodes", [1, 3, 5])
async def test_pairs_come_in_key_order_whole_by_prefix_and_by_range(nodes: int) -> None:
    async with Cluster(nodes) as cluster:
        client = await cluster.client()
        keys = [f"k{i}" for i in range(250)] + ["a", "k", "kä", "k\uffff", "k\U0001f600", "l", "z"]
        items = {key: key.encode() for key in keys}
        await client.put_many(items)
        await client.delete_many(["k13", "z"])
        del items["k13"], items["z"]
        order = sorted(items, key=str.encode)
        whole = await client.scan()
        assert [key for key, _ in whole] == order and dict(whole) == items
        assert [key for key, _ in await client.scan("k")] == [key for key in order if key.startswith("k")]
        assert [key for key, _ in await client.scan("k1")] == [key for key in order if key.startswith("k1")]
        assert await client.scan("nothing") == []
        wanted = [key for key in order if "k2" <= key < "k30"]
        assert [key for key, _ in await client.scan(start="k2", end="k30")] == wanted
        assert [key for key, _ in await client.scan("k1", start="k15", end="k3")] == [
            key for key in order if key.startswith("k1") and key >= "k15"
        ]
        assert await client.scan(start="k3", end="k2") == [] and await client.scan(start="k2", end="k2") == []
        assert [key for key, _ in await client.scan("k", 7)] == [key for key in order if key.startswith("k")][:7]
        for page_size in (1, 2, 100, 248, 1000):
            paged = [pair async for pair in client.iterate("k", page_size=page_size, start="k1")]
            assert [key for key, _ in paged] == [key for key in order if key.startswith("k") and key >= "k1"]


async def test_tombstones_do_not_cut_a_scan_short() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put_many({f"k{i:04}": b"1" for i in range(600)})
        await client.delete_many([f"k{i:04}" for i in range(590)])
        assert [key for key, _ in await client.scan("k", 10)] == [f"k{i:04}" for i in range(590, 600)]
        assert len([pair async for pair in client.iterate("k", page_size=3)]) == 10


async def test_replicas_that_differ_are_merged_and_repaired() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        for i in range(3):
            cluster.plant(i, "all", b"old", at_ms=1000)
            cluster.plant(i, "deleted", b"old", at_ms=1000)
        newest = cluster.plant(0, "all", b"new", at_ms=2000)
        gone = cluster.plant(1, "deleted", b"", at_ms=2000, flags=TOMBSTONE)
        alone = cluster.plant(2, "alone", b"1", at_ms=1000)
        assert await client.scan(consistency="ALL") == [("all", b"new"), ("alone", b"1")]
        assert cluster.held("all") == [newest] * 3 and cluster.held("deleted") == [gone] * 3
        assert cluster.held("alone") == [alone] * 3
        wire = await cluster.wire(0)
        cluster.plant(2, "b", b"1", at_ms=1000)  # at one replica: seen or not, but never seen and then not
        seen = False
        for _ in range(8):
            reply = await wire.ask(Scan(0, Consistency.QUORUM, 2000, b"b", b"c", 10))
            assert not seen or reply.keys == [b"b"]
            seen = seen or reply.keys == [b"b"]
        assert seen and sum(record is not None for record in cluster.held("b")) >= 2


@pytest.mark.parametrize("nodes", [3, 5])
async def test_a_scan_is_complete_with_one_node_down_and_fails_where_a_part_is_uncovered(nodes: int) -> None:
    async with Cluster(nodes) as cluster:
        client = await cluster.client(retry_count=0)
        items = {f"k{i:03}": b"%d" % i for i in range(300)}
        await client.put_many(items)
        await cluster.down(1)
        await client.put("k000", b"newer")
        items["k000"] = b"newer"
        for _ in range(nodes):  # whoever coordinates
            assert dict(await client.scan()) == items
        await cluster.up(1)
        await until(lambda: len(client._live().up) == nodes)
        for _ in range(2 * nodes):  # also with the one that missed a write
            assert dict(await client.scan()) == items
        await cluster.down(1)
        await cluster.down(2)
        with pytest.raises(Unavailable) as failed:
            await client.scan()
        assert failed.value.needed == 2 and failed.value.answered == 1 and "not covered" in str(failed.value)
        one = dict(await client.scan(consistency="ONE"))
        assert one.keys() == items.keys()


async def test_a_node_lost_in_the_midst_of_a_scan_is_replaced() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        items = {f"k{i:03}": b"%d" % i for i in range(100)}
        await client.put_many(items)
        asked: list[str] = []

        def hold(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, ReplicaScan):
                asked.append(dst)
                return LOST if len(asked) == 1 else None  # type: ignore[return-value]
            return None

        cluster.rule(hold)
        wire = await cluster.wire(0)
        call = asyncio.create_task(wire.ask(Scan(0, Consistency.QUORUM, 5000, b"", b"", 1000)))
        await until(lambda: asked)
        await cluster.down(int(asked[0][1]))
        reply = await call
        assert reply.error is None and len(reply.keys) == 100 and len(set(asked)) == 2


async def test_a_replica_that_never_answers_does_not_hang_a_scan() -> None:
    async with Cluster(3) as cluster:
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaScan) else None)
        wire = await cluster.wire(0)
        reply = await wire.ask(Scan(0, Consistency.QUORUM, 200, b"", b"", 10))
        assert isinstance(reply, ScanReply) and type(from_wire(*reply.error)) is Unavailable  # type: ignore[misc]


async def test_a_scan_whose_repair_fails_shows_nothing() -> None:
    async with Cluster(3) as cluster:
        cluster.plant(0, "k", b"new", at_ms=2000)
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWrite) else None)
        wire = await cluster.wire(0)
        reply = await wire.ask(Scan(0, Consistency.QUORUM, 200, b"", b"", 10))
        assert reply.keys == [] and type(from_wire(*reply.error)) is Unavailable


async def test_pages_are_cut_by_bytes_and_by_the_replica_that_spoke_least() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(timeout=20)
        items = {f"k{i:02}": bytes([i]) * (1 << 20) for i in range(20)}
        await client.put_many(items)
        for i in range(0, 20, 3):
            cluster.plant(i % 3, f"k{i:02}x", b"small", at_ms=1000)
            items[f"k{i:02}x"] = b"small"
        wire = await cluster.wire(0)
        reply = await wire.ask(Scan(0, Consistency.ALL, 5000, b"", b"", 1000))
        assert 1 <= len(reply.keys) < len(items) and reply.next > reply.keys[-1]
        paged = [pair async for pair in client.iterate(consistency="ALL", page_size=1000)]
        assert [key for key, _ in paged] == sorted(items) and dict(paged) == items


async def test_keys_alone_are_sent_where_only_keys_are_asked_for() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put_many({"a": b"1", "b": b"2"})
        wire = await cluster.wire(0)
        reply = await wire.ask(Scan(0, Consistency.QUORUM, 2000, b"", b"", 10, True))
        assert reply.keys == [b"a", b"b"] and reply.records == [b"", b""]


async def test_iterators_of_keys_and_of_entries_page_as_that_of_pairs_does() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        versions = await client.put_many({f"k{i:02}": b"%d" % i for i in range(50)})
        await client.put("k50", b"50", ttl_seconds=1000)
        for page_size in (1, 7, 1000):
            pairs = [pair async for pair in client.iterate("k", page_size=page_size, start="k10", end="k60")]
            keys = [key async for key in client.iterate_keys("k", page_size=page_size, start="k10", end="k60")]
            entries = [e async for e in client.iterate_entries("k", page_size=page_size, start="k10", end="k60")]
            assert keys == [key for key, _ in pairs] == [f"k{i}" for i in range(10, 51)]
            assert [(entry.key, entry.value) for entry in entries] == pairs
            assert {entry.key: entry.version for entry in entries[:-1]} == {key: versions[key] for key in keys[:-1]}
            assert entries == [await client.get_entry(key) for key in keys]
            assert entries[-1].expires_at is not None and entries[0].expires_at is None


async def test_scans_under_way_are_bounded() -> None:
    async with Cluster(3) as cluster:
        release = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaScan) else None)
        wire = await cluster.wire(0)
        running = [
            asyncio.create_task(wire.ask(Scan(i + 1, Consistency.QUORUM, 500, b"", b"", 10))) for i in range(SCANS_MAX)
        ]
        await until(lambda: cluster.node(0).metrics.frames_received > SCANS_MAX)
        refused = await wire.ask(Scan(0, Consistency.QUORUM, 500, b"", b"", 10))
        assert type(from_wire(*refused.error)) is Overloaded
        assert all(type(from_wire(*reply.error)) is Unavailable for reply in await asyncio.gather(*running))
        release()
        assert (await wire.ask(Scan(0, Consistency.QUORUM, 500, b"", b"", 10))).error is None


async def test_a_key_that_exists_throughout_is_returned_exactly_once_among_writers() -> None:
    async with Cluster(5) as cluster:
        client = await cluster.client(timeout=10)
        steady = [f"k{i:03}" for i in range(0, 200, 2)]
        await client.put_many(dict.fromkeys(steady, b"0"))
        stop = False

        async def churn() -> None:
            i = 0
            while not stop:
                i += 1
                await asyncio.gather(
                    client.put(f"k{(2 * i + 1) % 200:03}", b"x"),
                    client.put(steady[i % 100], b"%d" % i),
                    client.delete(f"k{(2 * i + 51) % 200:03}"),
                )

        churning = asyncio.create_task(churn())
        for _ in range(5):
            seen = [key async for key, _ in client.iterate("k", page_size=17)]
            assert seen == sorted(set(seen)) and set(steady) <= set(seen)
        stop = True
        await churning


async def test_a_stopping_node_ends_the_scans_that_it_had_begun() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"v")
        held: list[ReplicaScan] = []

        def hold(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if isinstance(message, ReplicaScan):
                held.append(message)
                return (0.2,)
            return None

        cluster.rule(hold)
        wire = await cluster.wire(0)
        wire.link.send(Scan(1, Consistency.QUORUM, 5000, b"", b"", 10))
        await until(lambda: held)
        stopping = asyncio.create_task(cluster.node(0).stop(drain_s=WAIT_S))
        cluster.nodes[0] = None  # the cluster need not stop it again
        await stopping
        (reply,) = [message for message in wire.heard if isinstance(message, ScanReply)]
        assert reply.error is None and reply.keys == [b"k"]
