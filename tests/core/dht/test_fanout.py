"""More nodes than replicas: what the groups of a batch ask of a peer is one message, and each group keeps its rules."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster import LOST, Cluster, until

from agi.core.dht.errors import Unavailable
from agi.core.dht.protocol.messages import (
    REPAIR,
    Delete,
    Get,
    Message,
    Put,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    ReplicaWriteReply,
)
from agi.core.dht.protocol.record import HEADER, hlc_of
from agi.core.dht.types import BULK_VALUE_BYTES, Consistency

QUORUM, ALL = Consistency.QUORUM, Consistency.ALL
UNHEDGED = {"dht.requests.hedge_budget": 0.0}
"""Nobody is asked because another is late."""
NAMES = [f"k{i}" for i in range(60)]
KEYS = [name.encode() for name in NAMES]


def put(values: Sequence[bytes], keys: Sequence[bytes] = KEYS, timeout_ms: int = 2000) -> Put:
    return Put(0, QUORUM, timeout_ms, list(keys), list(values))


def spy(cluster: Cluster, kind: type[Message]) -> list[tuple[str, Any]]:
    """Messages of a kind between nodes, as (destination, message)."""
    seen: list[tuple[str, Any]] = []

    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        if isinstance(message, kind) and src != "client":
            seen.append((dst, message))
        return None

    cluster.rule(rule)
    return seen


def values_of(records: Sequence[bytes | None]) -> list[bytes | None]:
    return [None if record is None else record[HEADER:] for record in records]


async def test_each_peer_gets_one_message_with_the_keys_that_it_holds() -> None:
    async with Cluster(5, settings=UNHEDGED) as cluster:
        writes, reads = spy(cluster, ReplicaWrite), spy(cluster, ReplicaRead)
        wire = await cluster.wire(0)
        reply = await wire.ask(put([b"%d" % i for i in range(60)], timeout_ms=60_000))
        assert reply.errors is None and len(set(reply.versions)) == 60
        assert Counter(dst for dst, _ in writes) == dict.fromkeys(["n1", "n2", "n3", "n4"], 1)
        for dst, message in writes:
            assert set(message.keys) == {key for key in KEYS if int(dst[1]) in cluster.holders(key.decode())}
        await until(lambda: cluster.node(0).coordinator.pending == 0)  # type: ignore[union-attr]
        for name, version in zip(NAMES, reply.versions, strict=True):
            held = cluster.held(name)
            assert [i for i, record in enumerate(held) if record is not None] == sorted(cluster.holders(name))
            assert {hlc_of(record) for record in held if record is not None} == {version}
        got = await wire.ask(Get(0, QUORUM, 2000, KEYS))
        assert values_of(got.records) == [b"%d" % i for i in range(60)] and got.errors is None
        assert max(Counter(dst for dst, _ in reads).values()) == 1
        assert cluster.node(0).coordinator.pending == 0  # type: ignore[union-attr]


async def test_a_read_asks_few_peers() -> None:
    async with Cluster(5, settings=UNHEDGED) as cluster:
        wire = await cluster.wire(0)
        assert (await wire.ask(put([b"1"] * 60))).errors is None
        reads = spy(cluster, ReplicaRead)
        asked = set()
        for _ in range(8):
            reads.clear()
            assert values_of((await wire.ask(Get(0, QUORUM, 2000, KEYS))).records) == [b"1"] * 60
            assert len(reads) <= 3  # of its four peers one is never needed
            asked |= {dst for dst, _ in reads}
        assert len(asked) == 4


async def test_a_link_that_breaks_leaves_nothing_behind() -> None:
    async with Cluster(5) as cluster:
        wire = await cluster.wire(0)
        cluster.rule(lambda src, dst, m: LOST if src == "n1" and isinstance(m, ReplicaWriteReply) else None)
        reply = await wire.ask(put([b"1"] * 60, timeout_ms=60_000))
        assert reply.errors is None and cluster.node(0).coordinator.pending  # type: ignore[union-attr]
        await cluster.down(1)
        await until(lambda: cluster.node(0).coordinator.pending == 0)  # type: ignore[union-attr]


async def test_groups_are_by_the_set_of_replicas_not_by_their_order() -> None:
    async with Cluster(5, settings={"dht.ring.virtual_nodes": 64}) as cluster:
        coordinator = cluster.node(0).coordinator
        assert coordinator is not None
        entered: list[object] = []
        enter = coordinator._requests.enter_until
        coordinator._requests.enter_until = lambda group, deadline: (  # type: ignore[method-assign]  # the test listens
            entered.append(group),
            enter(group, deadline),
        )[1]
        keys = [b"key%d" % i for i in range(1000)]
        wire = await cluster.wire(0)
        assert len((await wire.ask(Get(0, QUORUM, 5000, keys))).records) == 1000
        assert len(entered) == 10 + 1  # five choose three, and what they share


async def test_each_key_hears_what_is_in_its_own_way() -> None:
    async with Cluster(5, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        cluster.clocks[0].ahead_ms = -300_000
        wires = [await cluster.wire(i) for i in range(2)]
        lost = cluster.rule(lambda src, dst, m: LOST if dst == "n0" and isinstance(m, ReplicaWrite) else None)
        newer = KEYS[5:40:7]
        first = await wires[1].ask(put([b"newer"] * len(newer), newer))
        assert first.errors is None
        lost()
        batch = await wires[0].ask(put([b"%d" % i for i in range(60)]))
        assert batch.errors is None
        assert all(batch.versions[KEYS.index(key)] > old for key, old in zip(newer, first.versions, strict=True))
        got = await wires[1].ask(Get(0, ALL, 2000, KEYS))
        assert values_of(got.records) == [b"%d" % i for i in range(60)]
        assert [hlc_of(record) for record in got.records] == batch.versions
        assert cluster.node(0).metrics.restamps == len(newer)
        others = [version for key, version in zip(KEYS, batch.versions, strict=True) if key not in newer]
        assert max(others) < min(first.versions)  # nobody else was stamped anew


async def test_a_delete_tells_of_each_key_whether_it_existed() -> None:
    async with Cluster(5) as cluster:
        wire = await cluster.wire(0)
        there = KEYS[::3]
        assert (await wire.ask(put([b"v"] * len(there), there))).errors is None
        await until(lambda: all(cluster.held(k.decode()).count(None) == 2 for k in there))
        reply = await wire.ask(Delete(0, QUORUM, 2000, KEYS))
        assert reply.errors is None and reply.existed == [key in there for key in KEYS]


async def test_who_missed_a_batch_gets_a_hint_of_its_keys_alone() -> None:
    async with Cluster(5) as cluster:
        wire = await cluster.wire(0)
        missed: list[str] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if isinstance(message, ReplicaWrite) and dst == "n2" and not missed:
                missed.append(dst)
                return LOST
            return None

        cluster.rule(rule)
        reply = await wire.ask(put([b"1"] * 60, timeout_ms=300))
        assert reply.errors is None and missed
        theirs = [name for name in NAMES if 2 in cluster.holders(name)]
        await until(lambda: all(cluster.held(name)[2] is not None for name in theirs))
        assert all(cluster.held(name)[2] is None for name in NAMES if name not in theirs)
        assert cluster.node(0).coordinator.pending == 0  # type: ignore[union-attr]


async def test_a_lost_peer_fails_where_it_was_asked_and_nowhere_else() -> None:
    async with Cluster(5, settings=UNHEDGED) as cluster:
        wire = await cluster.wire(0)
        assert (await wire.ask(put([b"1"] * 60))).errors is None
        await until(lambda: cluster.node(0).coordinator.pending == 0)  # type: ignore[union-attr]
        reads = spy(cluster, ReplicaRead)
        cluster.rule(lambda src, dst, m: LOST if src == "n1" and isinstance(m, ReplicaReadReply) else None)
        for _ in range(8):
            call = asyncio.create_task(wire.ask(Get(0, QUORUM, 3000, KEYS)))
            await asyncio.sleep(0.02)
            if any(dst == "n1" for dst, _ in reads):
                break
            await call
        assert not call.done()
        await cluster.down(1)
        got = await call
        assert got.errors is None and values_of(got.records) == [b"1"] * 60
        # of two lost replicas' keys a write tells that they fell short, and of no other
        await cluster.down(2)
        short = {name for name in NAMES if {1, 2} <= set(cluster.holders(name))}
        reply = await wire.ask(put([b"2"] * 60, timeout_ms=500))
        assert short and {NAMES[place] for place, _ in reply.errors} == short
        assert {wire[0] for _, wire in reply.errors} == {Unavailable.code}


async def test_doubled_and_late_replies_do_no_harm() -> None:
    async with Cluster(5) as cluster:
        cluster.rule(
            lambda src, dst, m: (0.0, 0.004, 0.1) if isinstance(m, ReplicaReadReply | ReplicaWriteReply) else None
        )
        wire = await cluster.wire(0)
        for round_ in range(4):
            assert (await wire.ask(put([b"%d" % round_] * 60))).errors is None
            got = await wire.ask(Get(0, QUORUM, 2000, KEYS))
            assert values_of(got.records) == [b"%d" % round_] * 60
        assert cluster.network.duplicated > 20 and not wire.closed
        assert all(len(node.peers.connected) == 4 for node in cluster.living())


async def test_a_read_repairs_the_keys_that_differ_at_the_replicas_that_are_behind() -> None:
    async with Cluster(5) as cluster:
        wire = await cluster.wire(0)
        for name in NAMES:
            for i in cluster.holders(name):
                cluster.plant(i, name, b"old", at_ms=1000, writer=1)
        newest = {name: cluster.plant(cluster.holders(name)[1], name, b"new", at_ms=2000) for name in NAMES[::6]}
        repairs = spy(cluster, ReplicaWrite)
        got = await wire.ask(Get(0, ALL, 2000, KEYS))
        assert values_of(got.records) == [b"new" if name in newest else b"old" for name in NAMES]
        for name, record in newest.items():
            assert [held for held in cluster.held(name) if held is not None] == [record] * 3
        for _, message in repairs:
            assert message.mode == REPAIR and {key.decode() for key in message.keys} <= newest.keys()


async def test_large_records_of_one_key_keep_a_message_of_their_own() -> None:
    """It is encoded once for all of its replicas."""
    async with Cluster(5) as cluster:
        writes = spy(cluster, ReplicaWrite)
        wire = await cluster.wire(0)
        values = [b"v" * BULK_VALUE_BYTES if i == 7 else b"small" for i in range(60)]
        assert (await wire.ask(put(values))).errors is None
        large = [message for _, message in writes if KEYS[7] in message.keys]
        assert len(large) >= 2 and len({tuple(message.keys) for message in large}) == 1
        assert Counter(dst for dst, m in writes if KEYS[7] not in m.keys).most_common(1)[0][1] == 1
        got = await wire.ask(Get(0, QUORUM, 2000, KEYS))
        assert values_of(got.records) == values
