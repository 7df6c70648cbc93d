"""Registers of absent keys are taken away by all replicas alike, and nothing old of them comes back (R8)."""

from __future__ import annotations

import asyncio

import pytest
from cluster import LOST, Cluster, until
from test_reclaim import SETTINGS, now_ms, round_, written

from agi.core.dht.errors import InvalidRequest
from agi.core.dht.protocol.consensus import ADD, BALLOT_BYTES, State, ballot, is_register, register_of, state_of
from agi.core.dht.protocol.floors import promise_of
from agi.core.dht.protocol.messages import (
    HINT,
    REPAIR,
    ArcListReply,
    Op,
    ReclaimStep,
    Update,
)
from agi.core.dht.reclaim import FREE, RETIRE
from agi.core.dht.storage.base import Batch
from agi.core.dht.types import Consistency


async def gone(cluster: Cluster, key: str = "k") -> bytes:
    """A key that was under consensus and is absent, at every node; what they all hold of it."""
    client = await cluster.client()
    await client.incr(key)
    await client.delete(key)
    await until(lambda: len(set(cluster.held(key))) == 1)
    record = cluster.held(key)[0]
    assert is_register(record) and state_of(record).value is None
    return record


async def retired(cluster: Cluster, key: str = "k") -> None:
    """Two rounds: what the look after the first found is taken away by the second."""
    for _ in range(2):
        assert await round_(cluster)
    assert cluster.held(key) == [None] * cluster.count


def promised(cluster: Cluster, key: str = "k") -> list[bytes]:
    return [node.replica.promises.get(key.encode(), b"") for node in cluster.living()]


async def test_a_key_that_is_absent_leaves_nothing_behind_and_is_a_plain_key_again() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        before = state_of(await gone(cluster)).version
        await client.incr("stays")
        await retired(cluster)
        assert promised(cluster) == [b""] * 3
        assert all(is_register(record) for record in cluster.held("stays"))
        assert [node.reclaimer.retired for node in cluster.living()] == [1] * 3
        assert await client.get("k", consistency=Consistency.LINEARIZABLE) is None
        assert await client.put("k", b"v", consistency=Consistency.ALL) > before
        assert not any(map(is_register, cluster.held("k")))
        await client.delete("k")
        assert await client.incr("k", 5) == 5
        assert state_of(max(record for record in cluster.held("k") if record)).version > before
        reports = [await cluster.node(0).antientropy.exchange(name) for name in ("n1", "n2")]
        assert [report.differences for report in reports] == [0, 0]


async def test_a_key_that_has_expired_and_that_nobody_looks_at_goes_too() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put("k", b"v", if_absent=True, ttl_seconds=0.05)
        await client.put("stays", b"v", if_absent=True, ttl_seconds=60)
        await asyncio.sleep(0.1)
        await round_(cluster)
        await until(lambda: all(record and state_of(record).value is None for record in cluster.held("k")))
        await retired(cluster)
        assert all(record and state_of(record).value == b"v" for record in cluster.held("stays"))


async def test_a_coordinator_without_the_key_makes_no_version_below_what_was_taken_away() -> None:
    async with Cluster(5, settings={**SETTINGS, "dht.replication.factor": 3}) as cluster:
        client = await cluster.client()
        key = next(key for key in map("k{}".format, range(100)) if 4 not in cluster.holders(key))
        await client.incr(key)
        await client.delete(key)
        before = max(state_of(record).version for record in cluster.held(key) if record)
        for _ in range(2):
            await asyncio.sleep(0.003)
            for node in cluster.living():
                await node.reclaimer.round()
            for node in cluster.living():
                await node.reclaimer.clear()
        assert not any(cluster.held(key))
        cluster.clocks[4].ahead_ms = -3_600_000
        cluster.node(4)._hlc.last = 0
        wire = await cluster.wire(4)
        reply = await wire.ask(Update(0, 2000, [Op(bytes(15) + b"1", key.encode(), ADD, delta=1)]))
        assert reply.error is None and reply.results[0].error is None and reply.results[0].version > before


async def test_what_a_fence_marks_stays() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        async with client.lock("l", ttl=30) as lock:
            await client.put("k", b"v", fence=lock)
            await client.delete("k", fence=lock)
        for _ in range(3):
            await round_(cluster)
        assert all(is_register(record) for record in cluster.held("k"))


async def test_a_round_of_the_past_can_neither_prepare_nor_be_accepted_any_more() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        record = await gone(cluster)
        await retired(cluster)
        old = ballot(now_ms() - 60_000, 7)
        value = register_of(b"k", record[:BALLOT_BYTES], State(5, b"old"))
        acceptor, refused = cluster.node(1).acceptor, list[object]()
        acceptor.accept([b"k"], [value], lambda refusals, error: refused.append(refusals))
        acceptor.accept([b"k"], [record], lambda refusals, error: refused.append(refusals))
        acceptor.prepare([b"k"], [old], lambda held, refusals, error: refused.append(refusals))
        await until(lambda: len(refused) == 3)
        assert all(refused)
        for mode in (REPAIR, HINT):
            await written(cluster, 1, mode, "k", record)
        assert cluster.held("k") == [None] * 3


async def test_until_all_have_taken_it_away_plain_writes_stay_under_consensus() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await gone(cluster)
        await round_(cluster)
        stop = cluster.rule(
            lambda src, dst, message: (
                LOST if isinstance(message, ReclaimStep) and message.step == RETIRE and dst == "n2" else None
            )
        )
        leading = asyncio.ensure_future(cluster.node(0).reclaimer.round())
        await until(lambda: cluster.held("k")[:2] == [None] * 2)
        assert all(promise[8:] == promise_of(0)[8:] for promise in promised(cluster)[:2])
        assert cluster.held("k")[2] is not None
        await client.put("k", b"v", consistency=Consistency.ALL)
        assert all(map(is_register, cluster.held("k")))
        assert await client.get("k") == b"v"
        stop()
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)


async def test_who_leads_dies_in_the_midst_and_the_key_is_settled_and_taken_away_later() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await gone(cluster)
        await round_(cluster)
        stop = cluster.rule(
            lambda src, dst, message: LOST if isinstance(message, ReclaimStep) and message.step == FREE else None
        )
        leading = asyncio.ensure_future(cluster.node(0).reclaimer.round())
        await until(lambda: cluster.held("k") == [None] * 3 and promised(cluster)[1])
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        stop()
        await cluster.down(1)
        await cluster.up(1)  # it has not forgotten what it promised
        await until(lambda: cluster.node(1).serving)
        await until(lambda: promised(cluster) == [b""] * 3)  # a round of their own has ended it
        assert await client.get("k") is None
        await until(lambda: not cluster.node(1).antientropy.keeper.unknown)
        await retired(cluster)


async def test_a_replica_that_holds_something_else_keeps_it_from_being_set_free() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        record = await gone(cluster)
        version = await round_(cluster)
        step = ReclaimStep(0, 1, RETIRE, version, [], [b"k"], [b"\xff" * BALLOT_BYTES])
        assert await cluster.node(0).reclaimer._step("n0", step, wait=True) == [0]
        assert cluster.held("k")[0] == record
        step.ballots = [record[:BALLOT_BYTES]]
        assert await cluster.node(0).reclaimer._step("n0", step, wait=True) == []
        assert cluster.held("k") == [None, record, record]


@pytest.mark.parametrize(
    "step",
    [
        ReclaimStep(0, 1, RETIRE, 1, [], [b"k", b"k"], [b"\x80" * 16] * 2),
        ReclaimStep(0, 1, RETIRE, 1, [], [b"k"], []),
        ReclaimStep(0, 1, FREE, 1, [], [b"k"], [b"\0" * 16]),
        ReclaimStep(0, 1, RETIRE, now_ms() << 16, [], [b"k"], [b"\x80" * 16]),
    ],
)
async def test_bad_orders_change_nothing(step: ReclaimStep) -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        record = await gone(cluster)
        with pytest.raises(InvalidRequest):
            await cluster.node(0).calls.call("n1", step)
        assert cluster.held("k") == [record] * 3


async def test_a_repair_of_what_was_taken_away_does_not_hide_what_came_after() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        record = await gone(cluster)
        await retired(cluster)
        await client.put("k", b"v", consistency=Consistency.ALL)
        plain = cluster.held("k")
        assert (await written(cluster, 1, REPAIR, "k", record)).error is None
        assert cluster.held("k") == plain and await client.get("k") == b"v"
        cluster.stores[2].write(Batch({b"k": record}))
        for node in cluster.living():
            node.antientropy.keeper.forget()
        await until(lambda: all(not node.antientropy.keeper.unknown for node in cluster.living()))
        await cluster.node(1).antientropy.exchange("n2", young_from=0)
        assert cluster.held("k")[:2] == plain[:2]


async def test_a_replica_without_a_vote_keeps_its_registers_and_the_round_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        record = await gone(cluster)
        await round_(cluster)
        monkeypatch.setattr(cluster.node(1).store, "voting_refusal", "it may forget")
        asked: list[str] = []

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, ReclaimStep) and message.step in (RETIRE, FREE):
                asked.append(dst)
            return None

        stop = cluster.rule(rule)
        assert await round_(cluster)
        stop()
        assert sorted(asked) == ["n1", "n2"] and cluster.held("k")[1] == record
        assert promised(cluster)[0] and promised(cluster)[2]


async def test_a_change_waits_until_no_promise_is_without_its_register() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        await gone(cluster)
        await round_(cluster)
        stop = cluster.rule(
            lambda src, dst, message: LOST if isinstance(message, ReclaimStep) and message.step == FREE else None
        )
        leading = asyncio.ensure_future(cluster.node(0).reclaimer.round())
        await until(lambda: cluster.held("k") == [None] * 3 and all(promised(cluster)[1:]))
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        stop()
        early: list[str] = []

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, ArcListReply) and message.error is None:
                node = int(src[1:])
                if promised(cluster)[node] and cluster.held("k")[node] is None:
                    early.append(src)
            return None

        cluster.rule(rule)
        await cluster.add()
        await until(lambda: cluster.node(3).topology and cluster.node(3).serving and promised(cluster) == [b""] * 4)
        assert all(is_register(record) for record in cluster.held("k") if record) and early == []
