"""Rounds that take tombstones away: what they wait for, and that nothing old comes back afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from cluster import LOST, Cluster, until

from agi.core.dht.errors import ClockSkew, InvalidRequest, NotReady, StaleEpoch, Unavailable, from_wire
from agi.core.dht.protocol.messages import (
    FRESH,
    HINT,
    REPAIR,
    ArcListReply,
    ReclaimStep,
    ReplicaWrite,
    ReplicaWriteReply,
    TreeFetchReply,
)
from agi.core.dht.protocol.record import TOMBSTONE, hlc_of, pack
from agi.core.dht.protocol.versioning import from_ms
from agi.core.dht.reclaim import CALM_LOOKS, CLOSE, RECLAIM, SEAL, Reclaimer
from agi.core.dht.types import Consistency

pytestmark = pytest.mark.usefixtures("hurried")
SETTINGS = {"dht.reclaim.interval_ms": 0, "dht.reclaim.lag_ms": 0, "dht.hints.bytes_max_mb": 0}
KEYS = [f"key:{number}" for number in range(40)]


def now_ms() -> int:
    return int(time.time() * 1000)


async def round_(cluster: Cluster) -> int:
    """Node n0, which leads every arc of a cluster in which all hold all, leads one."""
    await asyncio.sleep(0.003)  # what was written just now is older than the round
    version = await cluster.node(0).reclaimer.round()
    for node in cluster.living():
        await node.reclaimer.clear()
    return version


async def written(cluster: Cluster, i: int, mode: int, key: str, record: bytes) -> ReplicaWriteReply:
    """What a node answers to another that writes to its replica."""
    other = cluster.node((i + 1) % cluster.count)
    message = ReplicaWrite(0, other.epoch, "t", mode, [key.encode()], [record])
    reply = await other.calls.call(cluster.names[i], message)
    assert isinstance(reply, ReplicaWriteReply)
    return reply


async def test_a_round_takes_what_was_deleted_and_what_has_expired_and_nothing_else() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put_many(dict.fromkeys(KEYS, b"v"), consistency=Consistency.ALL)
        await client.delete_many(KEYS[:10], consistency=Consistency.ALL)
        for i in range(3):
            cluster.plant(i, "gone", b"v", at_ms=now_ms() - 9000, expires_ms=now_ms() - 1000)
            cluster.plant(i, "short", b"v", at_ms=now_ms() - 9000, expires_ms=now_ms() + 60_000)
            cluster.node(i).antientropy.keeper.forget()
        await until(lambda: all(not node.antientropy.keeper.unknown for node in cluster.living()))
        await round_(cluster)
        assert cluster.held(KEYS[3]) == cluster.held("gone") == [None] * 3
        assert all(record is not None for key in [*KEYS[10:], "short"] for record in cluster.held(key))
        assert [node.reclaimer.reclaimed for node in cluster.living()] == [11] * 3
        assert await client.get(KEYS[3]) is None and await client.get(KEYS[20]) == b"v"
        for node in cluster.living():  # and the trees have followed
            await node.antientropy.keeper.fold()
        reports = [await cluster.node(0).antientropy.exchange(name) for name in ("n1", "n2")]
        assert [(report.differing, report.unknown) for report in reports] == [(0, 0)] * 2


async def test_a_replica_that_missed_the_delete_gets_it_before_any_loses_it() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put("k", b"v1", consistency=Consistency.ALL)
        stop = cluster.rule(
            lambda src, dst, message: LOST if isinstance(message, ReplicaWrite) and dst == "n2" else None
        )
        await client.delete("k")
        stop()
        assert cluster.held("k")[2] is not None
        await round_(cluster)
        assert cluster.held("k") == [None] * 3


async def test_no_round_while_a_replica_is_down_and_one_when_it_is_back() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put("k", b"v1", consistency=Consistency.ALL)
        await cluster.down(2)
        await client.delete("k")
        assert await round_(cluster) == 0
        assert [record is not None for record in cluster.held("k")] == [True] * 3
        await cluster.up(2)
        await until(lambda: cluster.node(2).serving and not cluster.node(2).antientropy.keeper.unknown)
        await round_(cluster)
        assert cluster.held("k") == [None] * 3


async def test_an_old_put_hint_or_repair_does_not_bring_back_what_was_reclaimed() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        old = pack(b"k", b"v1", from_ms(now_ms()), 7)
        await asyncio.sleep(0.003)
        await client.delete("k", consistency=Consistency.ALL)
        version = await round_(cluster)
        assert (await written(cluster, 0, FRESH, "k", old)).superseded == [(0, version)]
        assert (await written(cluster, 1, HINT, "k", old)).superseded is None
        assert (await written(cluster, 2, REPAIR, "k", old)).superseded is None
        assert cluster.held("k") == [None] * 3
        assert [node.metrics.replica_below_floor for node in cluster.living()] == [1, 1, 1]
        await cluster.down(1)
        await cluster.up(1)  # it has not forgotten
        await until(lambda: cluster.node(1).serving)
        await written(cluster, 1, REPAIR, "k", old)
        assert cluster.held("k") == [None] * 3
        await client.put("k", b"v2", consistency=Consistency.ALL)
        assert await client.get("k") == b"v2"


async def test_a_batch_of_which_a_part_comes_too_late_is_taken_for_the_rest() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        old = pack(b"k", b"v1", from_ms(now_ms()), 7)
        await asyncio.sleep(0.003)
        await client.delete("k", consistency=Consistency.ALL)
        await client.put("held", b"v", consistency=Consistency.ALL)
        await round_(cluster)
        for node in cluster.living():
            await node.antientropy.keeper.fold()  # from now on a look at the oldest record tells what is pending
        new = pack(b"held", b"w", from_ms(now_ms() + 5), 7)
        message = ReplicaWrite(0, 1, "t", HINT, [b"held", b"k"], [new, old])
        await cluster.node(0).calls.call("n1", message)
        assert cluster.held("k")[1] is None and cluster.held("held")[1] == new
        await cluster.node(1).antientropy.keeper.fold()
        assert not cluster.fatal


async def test_a_put_by_a_clock_that_lags_behind_the_seal_is_stamped_anew() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        version = await round_(cluster)
        wire = await cluster.client(1)
        cluster.clocks[1].ahead_ms = -60_000
        cluster.node(1)._hlc.last = 0
        assert hlc_of(pack(b"k", b"", from_ms(cluster.clocks[1].wall_ms()), 1)) < version
        await wire.put("k", b"v", consistency=Consistency.ALL)
        assert [hlc_of(record or bytes(8)) > version for record in cluster.held("k")] == [True] * 3


async def test_between_seal_and_close_a_repair_is_taken_and_a_hint_is_not() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        version = from_ms(now_ms())
        old = pack(b"k", b"v1", version - 5, 7)
        await asyncio.sleep(0.003)
        await step(cluster, 1, SEAL, version)
        await written(cluster, 1, HINT, "k", old)
        assert cluster.held("k")[1] is None
        await written(cluster, 1, REPAIR, "k", old)
        assert cluster.held("k")[1] == old


async def step(cluster: Cluster, i: int, what: int, version: int, leader: int = 0, epoch: int = 1) -> None:
    await cluster.node(leader).calls.call(cluster.names[i], ReclaimStep(0, epoch, what, version, []))


async def test_steps_out_of_order_or_of_the_future_are_refused() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        version = from_ms(now_ms() - 1)
        with pytest.raises(InvalidRequest, match="not closed"):
            await step(cluster, 1, RECLAIM, version)
        with pytest.raises(NotReady):
            await step(cluster, 1, CLOSE, version)  # refused in the background: it has not sealed
        await asyncio.sleep(0.05)
        assert cluster.node(1).replica.floors.spans == ()
        with pytest.raises(ClockSkew):
            await step(cluster, 1, SEAL, from_ms(now_ms() + 3_600_000))
        with pytest.raises(InvalidRequest, match="leads no arc"):
            await step(cluster, 1, SEAL, version, leader=2)
        with pytest.raises(StaleEpoch):
            await step(cluster, 1, SEAL, version, epoch=9)
        with pytest.raises(InvalidRequest, match="unknown step"):
            await step(cluster, 1, 7, version)
        assert cluster.node(1).replica.floors.spans == ()


async def test_a_round_that_cannot_close_everywhere_reclaims_nowhere() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.delete("k", consistency=Consistency.ALL)
        refused = cluster.rule(
            lambda src, dst, message: (
                LOST if isinstance(message, ReclaimStep) and (dst, message.step) == ("n2", CLOSE) else None
            )
        )
        waiting = asyncio.ensure_future(cluster.node(0).reclaimer.round())
        await until(lambda: cluster.node(1).replica.floors.at(0).closed)
        assert not cluster.node(2).replica.floors.at(0).closed
        for node in cluster.living():
            await node.reclaimer.clear()
        assert None not in cluster.held("k")
        waiting.cancel()
        refused()


async def test_a_replica_that_was_not_told_to_reclaim_is_told_by_the_next_round() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.delete("k", consistency=Consistency.ALL)
        unsaid = cluster.rule(
            lambda src, dst, message: (
                LOST if isinstance(message, ReclaimStep) and (dst, message.step) == ("n2", RECLAIM) else None
            )
        )
        waiting = asyncio.ensure_future(round_(cluster))
        await until(lambda: all(cluster.node(i).replica.floors.at(0).reclaimed for i in (0, 1)))
        waiting.cancel()
        unsaid()
        for node in cluster.living():
            await node.reclaimer.clear()
        assert [record is None for record in cluster.held("k")] == [True, True, False]
        report = await cluster.node(0).antientropy.exchange("n2")
        assert (report.differing > 0, report.differences) == (True, 0)
        await round_(cluster)
        assert cluster.held("k") == [None] * 3


async def test_a_leaders_rounds_run_by_themselves_and_status_shows_what_waits() -> None:
    settings = {**SETTINGS, "dht.reclaim.interval_ms": 30, "dht.reclaim.lag_ms": 1}
    async with Cluster(3, settings=settings) as cluster:
        client = await cluster.client()
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        await until(lambda: all(cluster.held(key) == [None] * 3 for key in KEYS))
        state = (await client.status())["n1"]["reclaim"]
        assert state["reclaimed"] == len(KEYS) and state["floor_age_s"] is not None
    lazy = {**SETTINGS, "dht.reclaim.interval_ms": 30, "dht.reclaim.lag_ms": 3_600_000}
    async with Cluster(3, settings=lazy) as cluster:
        client = await cluster.client()
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        node = cluster.node(1)
        await until(lambda: node.reclaimer.dead == len(KEYS))
        assert 0 <= node.reclaimer.state()["oldest_tombstone_s"] < 60  # type: ignore[operator]


@pytest.mark.parametrize("interval_ms", [0, 86_400_000])
async def test_tombstones_are_counted_though_no_round_runs(monkeypatch: pytest.MonkeyPatch, interval_ms: int) -> None:
    monkeypatch.setattr("agi.core.dht.reclaim.CALM_S", 0.1)
    monkeypatch.setattr("agi.core.dht.reclaim.COUNT_S", 0.2)
    async with Cluster(3, settings={**SETTINGS, "dht.reclaim.interval_ms": interval_ms}) as cluster:
        reclaimer = cluster.node(1).reclaimer
        assert reclaimer.state()["tombstones"] is reclaimer.state()["oldest_tombstone_s"] is None
        client = await cluster.client()
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        await until(lambda: reclaimer.dead == len(KEYS))
        assert 0 <= reclaimer.state()["oldest_tombstone_s"] < 60  # type: ignore[operator]  # status values are objects
        assert all(record is not None for record in cluster.held(KEYS[0]))  # counting takes nothing away
        await client.delete("one more", consistency=Consistency.ALL)
        await asyncio.sleep(0.6)
        assert reclaimer.dead == len(KEYS) + (not interval_ms)  # where rounds are due, they look


async def test_the_first_count_waits_while_requests_come_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.reclaim.CALM_S", 0.05)
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        reclaimer = cluster.node(1).reclaimer
        began = time.monotonic()
        while reclaimer.dead is None:
            await client.put("k", b"v", consistency=Consistency.ALL)
        assert 0.05 * (CALM_LOOKS - 2) < time.monotonic() - began < 10


async def test_a_newcomer_takes_the_floors_over_and_refuses_what_is_late() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        olds = {key: pack(key.encode(), b"v1", from_ms(now_ms()), 7) for key in KEYS}
        await asyncio.sleep(0.003)
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        await client.put("live", b"v", consistency=Consistency.ALL)
        version = await round_(cluster)
        await cluster.add()
        own = [key for key in KEYS if 3 in cluster.holders(key)]
        floors = cluster.node(3).replica.floors
        assert {floors.at(cluster.node(3).replica.token_of(key.encode())).closed for key in own} == {version}
        for key in own:
            for mode in (HINT, REPAIR):
                await cluster.node(0).calls.call(
                    "n3", ReplicaWrite(0, cluster.node(0).epoch, "t", mode, [key.encode()], [olds[key]])
                )
        assert own and all(cluster.held(key)[3] is None for key in own)
        await cluster.down(3)
        assert (await cluster.up(3)).replica.floors.spans == floors.spans


async def test_a_newcomer_goes_by_the_floors_before_it_holds_all() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        old = {key: pack(key.encode(), b"v1", from_ms(now_ms()), 7) for key in KEYS}
        await asyncio.sleep(0.003)
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        await client.put_many({f"live:{key}": b"v" for key in KEYS}, consistency=Consistency.ALL)
        version = await round_(cluster)
        fetched = cluster.rule(lambda src, dst, message: LOST if isinstance(message, TreeFetchReply) else None)
        await cluster.add(wait=False)
        await until(lambda: any(height.closed == version for _, _, height in cluster.node(3).replica.floors.spans))
        replica = cluster.node(3).replica
        own = [key for key in KEYS if replica.floors.at(replica.token_of(key.encode())).closed]
        for key in own:
            await cluster.node(0).calls.call("n3", ReplicaWrite(0, 2, "t", HINT, [key.encode()], [old[key]]))
        assert own and all(cluster.held(key)[3] is None for key in own)
        fetched()
        await cluster.settled()
        live = [f"live:{key}" for key in KEYS if 3 in cluster.holders(f"live:{key}")]
        assert live and all(cluster.held(key)[3] is not None for key in live)


async def test_a_newcomer_keeps_nothing_that_came_before_it_knew_the_floors() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        olds = {key: pack(key.encode(), b"v1", from_ms(now_ms()), 7) for key in KEYS}
        await asyncio.sleep(0.003)
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        await round_(cluster)
        blocked = cluster.rule(lambda src, dst, message: LOST if isinstance(message, ArcListReply) else None)
        await cluster.add(wait=False)
        await until(lambda: all(node.topology is not None and node.epoch == 2 for node in cluster.living()))
        await until(lambda: "n3" in cluster.node(0).peers.usable)
        for key in KEYS:
            message = ReplicaWrite(0, 2, "t", HINT, [key.encode()], [olds[key]])
            await cluster.node(0).calls.call("n3", message)
        assert all(cluster.held(key)[3] is not None for key in KEYS)
        blocked()
        await cluster.settled()
        for node in cluster.living():
            await node.reclaimer.clear()
        assert all(record is None for key in KEYS for record in cluster.held(key))


async def test_an_arc_that_comes_again_finds_no_old_data(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(4, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put_many(dict.fromkeys(KEYS, b"v1"), consistency=Consistency.ALL)
        before = {key: cluster.holders(key) for key in KEYS}
        await cluster.add()
        lost = {(key, i) for key in KEYS for i in before[key] if i not in cluster.holders(key)}
        await client.delete_many(KEYS, consistency=Consistency.ALL)
        with monkeypatch.context() as late:
            late.setattr(Reclaimer, "_drop", kept)
            await asyncio.sleep(0.003)
            for node in cluster.living():
                await node.reclaimer.round()
            for node in cluster.living():
                await node.reclaimer.clear()
        held = {(key, i) for key in KEYS for i, record in enumerate(cluster.held(key)) if record is not None}
        assert held == lost  # of what was deleted only they know nothing
        await client.leave("n4")
        await until(lambda: all(node.epoch == 5 for node in cluster.living()[:4]))
        assert sum(node.reclaimer.dropped for node in cluster.living()) == len(lost)
        assert all(cluster.held(key)[:4] == [None] * 4 for key in KEYS)


async def kept(self: Reclaimer, span: object, allowed: object) -> int:
    return 0


async def test_data_of_arcs_that_are_gone_is_dropped() -> None:
    async with Cluster(3, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put_many(dict.fromkeys(KEYS, b"v1"), consistency=Consistency.ALL)
        await cluster.add()
        assert any(cluster.held(key)[i] is not None and i not in cluster.holders(key) for key in KEYS for i in range(3))
        for node in cluster.living():
            await node.reclaimer.clear()
        for key in KEYS:
            assert [record is not None for record in cluster.held(key)] == [i in cluster.holders(key) for i in range(4)]
        assert await client.get_many(KEYS) == dict.fromkeys(KEYS, b"v1")


async def test_an_arc_that_comes_during_a_look_at_the_store_is_not_taken_for_one_that_is_gone() -> None:
    async with Cluster(4, settings=SETTINGS) as cluster:
        client = await cluster.client()
        await client.put_many(dict.fromkeys(KEYS, b"v1"), consistency=Consistency.ALL)
        assert any(2 not in cluster.holders(key) for key in KEYS)
        looking, changed = asyncio.Event(), asyncio.Event()
        node = cluster.node(2)
        walk = node.antientropy.keeper.walk

        async def slowly(span: tuple[int, int]) -> AsyncIterator[list[tuple[bytes, bytes]]]:
            async for page in walk(span):
                looking.set()
                await changed.wait()
                yield page

        node.antientropy.keeper.walk = slowly  # type: ignore[method-assign]  # so that much happens meanwhile
        clearing = asyncio.ensure_future(node.reclaimer.clear())
        await looking.wait()
        node.antientropy.keeper.walk = walk  # type: ignore[method-assign]  # as it was
        await client.leave("n3")
        await until(lambda: not node.known_topology.in_transition)
        changed.set()
        await clearing
        assert all(cluster.held(key)[2] is not None for key in KEYS)  # three nodes hold all


async def test_a_tombstone_that_is_overwritten_meanwhile_is_not_taken() -> None:
    async with Cluster(1, factor=1, settings=SETTINGS) as cluster:
        node = cluster.node(0)
        dead = cluster.plant(0, "k", b"", at_ms=now_ms() - 9000, flags=TOMBSTONE)
        client = await cluster.client()
        await client.put("k", b"v")
        assert await node.replica.purge([b"k"], [dead]) == 0
        assert await client.get("k") == b"v"
        held = cluster.held("k")[0]
        assert held is not None
        assert await node.replica.purge([b"k"], [held], lambda: False) == 0
        assert await node.replica.purge([b"k"], [held]) == 1
        assert await client.get("k") is None


def test_errors_of_steps_survive_the_wire() -> None:
    for error in (ClockSkew("a"), InvalidRequest("b"), NotReady("c"), Unavailable("d")):
        assert type(from_wire(*error.to_wire())) is type(error)
