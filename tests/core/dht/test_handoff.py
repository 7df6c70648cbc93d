"""Hinted handoff in clusters: a replica that was away gets what it missed, by itself, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cluster import LOST, Cluster, KeptStore, Wire, until
from contract.storage_harness import Site

from agi.core.dht import handoff
from agi.core.dht.errors import OutcomeUnknown, Overloaded, StorageFull, Unavailable, from_wire
from agi.core.dht.identity import Ledger
from agi.core.dht.node import Node
from agi.core.dht.protocol.hints import Hint
from agi.core.dht.protocol.messages import (
    HINT,
    Delete,
    Message,
    Put,
    ReplicaRead,
    ReplicaWrite,
    ReplicaWriteReply,
)
from agi.core.dht.protocol.record import FLAGS, TOMBSTONE, expires_ms_of
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.base import Batch, StorageBackend
from agi.core.dht.storage.rocksdb import RocksStore
from agi.core.dht.testing import Scenario, SimCluster, Simulation, quiet_logs, run_simulation
from agi.core.dht.topology import Topology
from agi.core.dht.types import Consistency

ONE, QUORUM, ALL = Consistency.ONE, Consistency.QUORUM, Consistency.ALL


def pending(cluster: Cluster) -> dict[str, int]:
    """Hints by target, over all nodes that are up."""
    found: dict[str, int] = {}
    for node in cluster.living():
        for target in node.handoff.hints.pending():
            found[target.node] = found.get(target.node, 0) + target.hints
    return found


def dropped(node: Node) -> dict[str, int]:
    return {why.value: count for why, count in node.handoff.hints.dropped.items() if count}


def is_hint(message: Message) -> bool:
    return isinstance(message, ReplicaWrite) and message.trace.startswith("hints:")


def watch(cluster: Cluster, kind: Callable[[Message], bool]) -> list[tuple[str, Any]]:
    """(destination, message) of what passes from now on."""
    seen: list[tuple[str, Any]] = []

    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        if kind(message):
            seen.append((dst, message))
        return None

    cluster.rule(rule)
    return seen


class Through:
    """Writes that this node coordinates, whatever the keys."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def put_many(
        self, values: Mapping[str, bytes], *, level: Consistency = QUORUM, timeout: float = 5.0, ttl_seconds: int = 0
    ) -> None:
        keys = [key.encode() for key in values]
        _check(
            await self._wire.ask(Put(0, level, int(timeout * 1000), keys, list(values.values()), ttl_seconds * 1000))
        )

    async def put(self, key: str, value: bytes, **options: Any) -> None:
        await self.put_many({key: value}, **options)

    async def delete_many(self, keys: Sequence[str]) -> None:
        _check(await self._wire.ask(Delete(0, QUORUM, 5000, [key.encode() for key in keys])))


def _check(reply: Any) -> None:
    for wire in [reply.error] if reply.error else [wire for _, wire in reply.errors or ()]:
        raise from_wire(*wire)


async def through(cluster: Cluster, i: int) -> Through:
    return Through(await cluster.wire(i))


def gated(core: handoff.Handoff) -> asyncio.Event:
    """What a batch's acknowledgement waits for."""
    gate = asyncio.Event()
    send = core._send

    async def slow(node: str, batch: list[Hint]) -> None:
        await send(node, batch)
        await gate.wait()

    core._send = slow  # type: ignore[method-assign]  # this one's only
    return gate


class Limited(KeptStore):
    """Takes no more records, or no hints, while told so."""

    full = False
    hints_full = False
    hints_refused = 0

    def write(self, batch: Batch) -> None:
        if self.full:
            raise StorageFull("no space left")
        super().write(batch)

    async def save_hints(self, hints: Sequence[Hint], gone: Sequence[bytes], *, synced: bool = False) -> None:
        if self.hints_full:
            self.hints_refused += 1
            raise StorageFull("no space left")
        await super().save_hints(hints, gone, synced=synced)


def limited(_: int) -> StorageBackend:
    return Limited(token_bytes("xxh3"))


def rocks(folder: Path) -> Callable[[int], StorageBackend]:
    return lambda i: RocksStore(folder / f"n{i}", token_bytes("xxh3"))


# --- what a replica that was away gets


async def test_a_node_that_was_down_gets_everything_without_any_read() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(0, 1)
        await client.put_many({f"gone{i}": b"old" for i in range(20)}, consistency="ALL")
        await cluster.down(2)
        await client.put_many({f"k{i}": b"value %d" % i for i in range(50)})
        for i in range(10):
            await client.put(f"k{i}", b"newer")
            await client.put(f"ttl{i}", b"short", ttl_seconds=1000)
        await client.delete_many([f"gone{i}" for i in range(20)])
        await client.delete("never there")
        assert set(pending(cluster)) == {"n2"}
        keys = [f"k{i}" for i in range(50)] + [f"ttl{i}" for i in range(10)] + [f"gone{i}" for i in range(20)]
        reads = watch(cluster, lambda message: isinstance(message, ReplicaRead))
        writes = watch(cluster, lambda message: isinstance(message, ReplicaWrite))
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        for key in [*keys, "never there"]:
            held = cluster.held(key)
            assert held[0] is not None and held == [held[0]] * 3, key
        assert reads == [] and {dst for dst, _ in writes} == {"n2"} and {m.mode for _, m in writes} == {HINT}
        (tombstone, expiring) = cluster.stores[2].read([b"gone3", b"ttl3"])
        assert tombstone is not None and tombstone[FLAGS] & TOMBSTONE
        assert expiring is not None and expires_ms_of(expiring) > cluster.clocks[0].wall_ms()
        counts = [node.handoff.hints for node in cluster.living()]
        assert sum(core.stored for core in counts) >= sum(core.replayed for core in counts) >= len(keys) + 1
        assert all(dropped(node) == {} for node in cluster.living())


async def test_replay_is_in_the_order_of_the_writes_and_sends_only_the_newest_of_a_key() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        for key in ("c", "a", "b", "a"):
            await client.put(key, key.encode())
        seen = watch(cluster, is_hint)
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert [message.keys for _, message in seen] == [[b"c", b"b", b"a"]]


async def test_no_hint_where_all_replicas_answered_or_had_something_newer() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await client.put_many({f"k{i}": b"v" for i in range(20)}, level=ALL)
        newer = cluster.plant(2, "k0", b"newer", at_ms=cluster.clocks[0].wall_ms() + 2000)
        await client.put_many({"k0": b"w", "k1": b"w"})
        coordinator = cluster.node(0).coordinator
        assert coordinator is not None
        await until(lambda: not coordinator.pending)
        assert cluster.held("k0")[2] == newer and cluster.held("k1")[2] == cluster.held("k1")[0]
        assert all(node.handoff.hints.stored == 0 for node in cluster.living())


async def test_a_hint_does_not_replace_what_is_newer() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put("k", b"older")
        await client.put("l", b"newer")
        now_ms = cluster.clocks[0].wall_ms()
        newest = cluster.plant(2, "k", b"newest", at_ms=now_ms + 1000)
        cluster.plant(2, "l", b"oldest", at_ms=now_ms - 1000)
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert cluster.held("k")[2] == newest
        assert cluster.held("l")[2] == cluster.held("l")[0]
        assert sum(node.handoff.hints.replayed for node in cluster.living()) == 2  # superseded is as good as delivered


async def test_hints_are_not_held_against_the_clock_of_their_target() -> None:
    """V3: `max_clock_skew` is for fresh writes. The target's clock may have been set back meanwhile."""
    async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": 1000}) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put("k", b"v")
        cluster.clocks[2].ahead_ms = -3_600_000
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert cluster.held("k")[2] == cluster.held("k")[0] is not None


# --- which failures leave a hint


async def _missed_then_delivered(cluster: Cluster, put: Callable[[], Any], heal: Callable[[], Any]) -> None:
    await put()
    await until(lambda: pending(cluster).get("n2"))
    assert cluster.stores[2].read([b"k"]) == [None]
    healed = heal()
    if healed is not None:
        await healed
    await until(lambda: not pending(cluster))
    assert cluster.held("k")[2] == cluster.held("k")[0] is not None


async def test_a_replica_whose_link_breaks_before_it_answers_gets_a_hint() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        lose = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWrite) and dst == "n2" else None)

        async def put() -> None:
            await client.put("k", b"v")
            assert pending(cluster) == {}  # it may still answer
            await cluster.down(2)

        async def heal() -> None:
            lose()
            await cluster.up(2)

        await _missed_then_delivered(cluster, put, heal)


async def test_a_replica_that_is_silent_until_the_deadline_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "REPLY_TIMEOUT_S", 0.1)
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        lose = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWrite) and dst == "n2" else None)
        await _missed_then_delivered(cluster, lambda: client.put("k", b"v", timeout=0.3), lose)


async def test_a_replica_that_has_no_space_gets_a_hint_and_so_does_the_coordinator_itself() -> None:
    for full in (0, 2):
        async with Cluster(3, store=limited) as cluster:
            client = await through(cluster, 0)
            store = cluster.stores[full]
            assert isinstance(store, Limited)
            store.full = True
            await client.put("k", b"v")
            await client.put("k", b"w")
            name = f"n{full}"
            await until(lambda name=name: pending(cluster) == {name: 1})  # type: ignore[misc]  # mypy and defaults of lambdas
            assert store.read([b"k"]) == [None]
            store.full = False
            await until(lambda: not pending(cluster))
            assert len(set(cluster.held("k"))) == 1


async def test_a_replica_that_refuses_retryably_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        replica = cluster.node(2).replica
        write = replica.write

        def overloaded(mode: int, keys: Any, records: Any, live: bool, done: Any, headers: Any = None) -> None:
            done(None, None, Overloaded("enough").to_wire())

        monkeypatch.setattr(replica, "write", overloaded)
        await _missed_then_delivered(
            cluster, lambda: client.put("k", b"v"), lambda: monkeypatch.setattr(replica, "write", write)
        )


async def test_a_write_that_failed_leaves_no_hint() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        lose = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWrite) else None)
        with pytest.raises(OutcomeUnknown):  # this node may have it
            await client.put("k", b"v", timeout=0.2)
        lose()
        await cluster.down(1)
        with pytest.raises(Unavailable):
            await client.put("l", b"v", timeout=0.2)
        with pytest.raises(Unavailable):
            await client.put("m", b"v", level=ALL, timeout=0.2)
        await until(lambda: cluster.node(0).coordinator and not cluster.node(0).coordinator.pending)
        assert cluster.node(0).handoff.hints.stored == 0
        await client.put("k", b"v", level=ONE)  # acknowledged, if only by one
        assert pending(cluster) == {"n1": 1, "n2": 1}
        await cluster.up(1)
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert cluster.held("l") == cluster.held("m") == [None] * 3


async def test_a_key_that_is_stamped_anew_is_hinted_as_it_was_acknowledged() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        cluster.plant(1, "k", b"ahead", at_ms=cluster.clocks[0].wall_ms() + 2000)
        await client.put_many({"j": b"v", "k": b"v", "l": b"v"})
        assert cluster.node(0).metrics.restamps == 1
        (target,) = cluster.node(0).handoff.hints.pending()
        assert target.hints == 3 and cluster.node(0).handoff.hints.stored == 3
        hinted = {hint.key: hint.record for hint in cluster.node(0).handoff.hints.batch("n2", 1 << 20, 10)}
        for key in ("j", "k", "l"):
            assert cluster.held(key)[:2] == [hinted[key.encode()]] * 2


async def test_only_replicas_of_a_key_get_hints_for_it() -> None:
    async with Cluster(5) as cluster:
        client = await through(cluster, 0)
        await cluster.down(4)
        await client.put_many({f"k{i}": b"v" for i in range(60)})
        mine = {f"k{i}" for i in range(60) if 4 in cluster.holders(f"k{i}")}
        assert 0 < len(mine) < 60 and pending(cluster) == {"n4": len(mine)}
        await cluster.up(4)
        await until(lambda: not pending(cluster))
        assert {f"k{i}" for i in range(60) if cluster.stores[4].read([b"k%d" % i])[0] is not None} == mine
        for key in mine:
            assert len({record for record in cluster.held(key) if record is not None}) == 1


# --- bounds and pace


async def test_past_its_bytes_a_target_loses_its_oldest_hints() -> None:
    async with Cluster(3, settings={"dht.hints.bytes_max_mb": 1}) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        for i in range(30):
            await client.put(f"k{i}", b"x" * 100_000)
        (target,) = cluster.node(0).handoff.hints.pending()
        assert target.hints == 10 and target.bytes <= 1 << 20
        assert dropped(cluster.node(0)) == {"full": 20}
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        there = [i for i in range(30) if cluster.held(f"k{i}")[2] is not None]
        assert there == list(range(20, 30))


async def test_past_their_age_hints_are_given_up_also_for_a_node_that_stays_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff, "AGE_CHECK_S", 0.01)
    async with Cluster(3, settings={"dht.hints.age_max_s": 10}) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put("k", b"v")
        for clock in cluster.clocks:
            clock.ahead_ms = 9_000
        await client.put("l", b"v")
        assert pending(cluster) == {"n2": 2}
        cluster.clocks[0].ahead_ms = 11_000
        await until(lambda: pending(cluster) == {"n2": 1})
        assert dropped(cluster.node(0)) == {"old": 1}
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert cluster.held("k")[2] is None and cluster.held("l")[2] is not None


async def test_one_bounded_batch_is_under_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "BATCH_BYTES_MAX", 10_000)
    monkeypatch.setattr(handoff, "BATCH_HINTS_MAX", 40)
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(1)
        await client.put_many({f"small{i}": b"" for i in range(100)})
        await cluster.up(1)
        await until(lambda: not pending(cluster))
        await cluster.down(2)
        await client.put_many({f"small{i}": b"" for i in range(100)})
        await client.put_many({f"large{i}": b"x" * 3000 for i in range(20)})
        await client.put("huge", b"x" * 50_000)
        under_way: set[int] = set()
        sizes: list[tuple[int, int]] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if is_hint(message):
                assert isinstance(message, ReplicaWrite) and not under_way
                under_way.add(message.id)
                sizes.append((len(message.keys), sum(map(len, message.keys)) + sum(map(len, message.records))))
                return (0.002,)
            if isinstance(message, ReplicaWriteReply):
                under_way.discard(message.id)
            return None

        cluster.rule(rule)
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert [count for count, _ in sizes] == [40, 40, 22, 3, 3, 3, 3, 3, 3, 1]
        assert all(size <= 10_000 or count == 1 for count, size in sizes)
        assert cluster.held("huge")[2] == cluster.held("huge")[0]


def test_replay_keeps_to_its_bytes_a_second() -> None:
    """On virtual time: in no window of time does a node send more than its share and one batch."""
    rate, count, size = 20_000, 200, 5_000
    sent: dict[str, list[tuple[float, int]]] = {}

    async def main(sim: Simulation) -> None:
        drawn = Scenario.draw(1)
        cluster = SimCluster(sim, replace(drawn, settings={**drawn.settings, "hints.replay_bytes_per_s": rate}))
        policy = cluster.network.policy

        def seen(src: str, dst: str, message: Message) -> Sequence[float]:
            if is_hint(message):
                assert isinstance(message, ReplicaWrite)
                part = sum(map(len, message.keys)) + sum(map(len, message.records))
                sent.setdefault(src, []).append((sim.now, part))
            return policy(src, dst, message)

        def held() -> int:
            return sum(len(node.handoff.hints) for node in cluster.running.values())

        assert await cluster.wait_converged() is None
        cluster.network.policy = seen
        away, *others = drawn.nodes
        sim.hosts[away].kill(power_loss=False)
        host = cluster.client_host("app")

        async def app() -> None:
            async with cluster.client(host, sim.stream("app")) as client:
                await client.connect([f"{name}:7000" for name in others])
                for i in range(count):
                    await client.put(f"k{i}", b"x" * size, timeout=5.0)

        host.boot(app)
        await host.wait_end()
        assert held() > 40 and sent == {}
        cluster.boot(away)
        async with asyncio.timeout(120):
            while held():  # noqa: ASYNC110  # virtual time
                await asyncio.sleep(0.1)

    with quiet_logs():
        run_simulation(main, seed=1)
    for parts in sent.values():
        for first, (begin, _) in enumerate(parts):
            for last, (end, _) in enumerate(parts[first:], first):
                window = sum(part for _, part in parts[first : last + 1])
                assert window <= rate * (end - begin) * 1.02 + rate, (begin, end)  # clocks drift by 1 %
        total = sum(part for _, part in parts)
        assert parts[-1][0] - parts[0][0] <= total / rate * 1.05  # and it does not dawdle
    assert max(len(parts) for parts in sent.values()) > 3


async def test_who_does_not_take_them_keeps_its_hints_and_is_tried_again_ever_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff, "REPLY_TIMEOUT_S", 0.02)
    monkeypatch.setattr(handoff, "BACKOFF_FIRST_S", 0.01)
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put("k", b"v")
        core = cluster.node(0).handoff
        tries: list[tuple[float, bool]] = []

        def note(src: str, dst: str, message: Message) -> None:
            if is_hint(message):
                delay_s, due = core._retry.get("n2", (0.0, 0.0))
                tries.append((delay_s, time.monotonic() >= due))

        cluster.rule(note)
        lose = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) and src == "n2" else None)
        await cluster.up(2)
        await until(lambda: len(tries) >= 5)
        assert pending(cluster) == {"n2": 1}
        assert tries[:5] == [(delay_s, True) for delay_s in (0.0, 0.01, 0.02, 0.04, 0.08)]
        assert cluster.held("k")[2] == cluster.held("k")[0]  # it has it, but nobody knows
        lose()
        await until(lambda: not pending(cluster))
        assert core.hints.replayed == 1 and core._retry == {}


async def test_a_target_that_is_slow_does_not_keep_another_from_its_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "REPLY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(handoff, "BATCH_HINTS_MAX", 1)
    async with Cluster(5, factor=5) as cluster:
        client = await through(cluster, 0)
        await cluster.down(3)
        await cluster.down(4)
        await client.put_many({f"k{i}": b"v" for i in range(10)})
        assert pending(cluster) == {"n3": 10, "n4": 10}
        lose = cluster.rule(lambda src, dst, m: LOST if is_hint(m) and dst == "n3" else None)
        await cluster.up(3)
        await cluster.up(4)
        await until(lambda: pending(cluster) == {"n3": 10})
        lose()
        await until(lambda: not pending(cluster))


async def test_a_stopping_node_ends_the_batch_under_way_and_begins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "BATCH_HINTS_MAX", 2)
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put_many({f"k{i}": b"v" for i in range(6)})
        seen = watch(cluster, is_hint)
        node = cluster.node(0)
        gate = gated(node.handoff)
        await cluster.up(2)
        await until(lambda: node.handoff.busy)
        cluster._doors[0].node = cluster.nodes[0] = None
        stop = asyncio.create_task(node.stop(drain_s=5.0))
        await until(lambda: node.handoff.stopping)
        gate.set()
        await stop
        assert len(seen) == 1 and node.handoff.hints.replayed == 2 and len(node.handoff.hints) == 4
        assert isinstance(cluster.stores[0], KeptStore) and len(cluster.stores[0]._hints) == 4  # saved at the end


# --- restarts, disks, damage


async def test_hints_outlive_a_restart_of_their_holder(tmp_path: Path) -> None:
    async with Cluster(3, store=rocks(tmp_path)) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put_many({f"k{i}": b"v" for i in range(10)})
        await client.put("k0", b"w")
        await client.delete_many(["k1"])
        await cluster.down(0)
        assert pending(cluster) == {}
        node = await cluster.up(0)
        assert pending(cluster) == {"n2": 10} and node.handoff.hints.stored == 0
        client = await through(cluster, 0)
        await client.put("k2", b"w")  # what is new follows what was kept
        assert pending(cluster) == {"n2": 10}
        assert node.handoff.hints.batch("n2", 1 << 20, 100)[-1].key == b"k2"
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        for i in range(10):
            held = cluster.held(f"k{i}")
            assert held[0] is not None and held == [held[0]] * 3
        await cluster.down(0)
        await cluster.up(0)
        assert pending(cluster) == {}  # and what was delivered does not come back


async def test_a_damaged_hint_is_not_served_but_counted(tmp_path: Path) -> None:
    async with Cluster(3, store=rocks(tmp_path)) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put_many({f"k{i}": b"v" for i in range(3)})
        core = cluster.node(0).handoff
        names = [hint.name for hint in core.hints.batch("n2", 1 << 20, 10)]
        await core._save()
        await Site("rocksdb", tmp_path, "").damage_hint(cluster.stores[0], names[1])
        await cluster.down(0)
        node = await cluster.up(0)
        assert pending(cluster) == {"n2": 2} and dropped(node) == {"damaged": 1}
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        held = [cluster.held(f"k{i}")[2] for i in range(3)]
        assert [record is None for record in held] == [False, True, False]
        await cluster.down(0)
        assert dropped(await cluster.up(0)) == {}  # it was removed


async def test_hints_that_the_store_does_not_take_are_kept_in_memory_and_saved_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff, "SAVE_RETRY_S", 0.01)
    async with Cluster(3, store=limited) as cluster:
        client = await through(cluster, 0)
        store = cluster.stores[0]
        assert isinstance(store, Limited)
        await cluster.down(2)
        store.hints_full = True
        await client.put("k", b"v")
        assert pending(cluster) == {"n2": 1}
        await client.put("k", b"w")
        await until(lambda: store.hints_refused >= 4)
        assert store._hints == {}
        store.hints_full = False
        await until(lambda: len(store._hints) == 1)
        (kept,) = store._hints.values()
        assert kept.record == cluster.held("k")[0]
        await cluster.up(2)
        await until(lambda: not store._hints)
        assert cluster.held("k")[2] == cluster.held("k")[0]


async def test_a_node_with_another_disk_gets_no_hints_of_the_old_one() -> None:
    async with Cluster(3) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put_many({f"k{i}": b"v" for i in range(5)})
        cluster.stores[2] = store = KeptStore(token_bytes("xxh3"))
        await store.open()
        ledger = Ledger(store)
        identity = await ledger.open("n2", cluster.config(2), cluster.rng, cluster.addresses[2])

        def replaced(base: Topology) -> Topology | None:
            members = [
                msgspec.structs.replace(member, disk_id=identity.disk_id) if member.node_id == "n2" else member
                for member in base.members
            ]
            return None if tuple(members) == base.members else base.next(members, "n2 replaced", 0)

        agreement = cluster.node(0).epochs.agreement
        assert agreement is not None
        topology = await agreement.propose(replaced, 5.0)
        assert pending(cluster) == {} and dropped(cluster.node(0)) == {"other_disk": 5}
        await ledger.store_topology(topology, cluster.addresses)
        seen = watch(cluster, is_hint)
        await cluster.up(2)
        await client.put("new", b"v", level=ALL)
        assert seen == [] and cluster.held("k0")[2] is None and cluster.held("new")[2] is not None


async def test_hints_for_a_node_that_is_no_member_are_dropped() -> None:
    async with Cluster(4) as cluster:
        client = await through(cluster, 0)
        await cluster.down(3)
        await client.put_many({f"k{i}": b"v" for i in range(20)})
        count = pending(cluster)["n3"]
        assert cluster.topology is not None
        holders = [node for node in cluster.living() if node.handoff.hints.pending()]
        for node in holders:
            node.handoff.adopt(cluster.topology.next(cluster.topology.members[:3], "n3 removed", 0))
            node.handoff.missed("n3", [b"k"], [b"r"])
        assert pending(cluster) == {} and sum(dropped(node)["no_member"] for node in holders) == count


async def test_hints_of_an_arc_or_a_target_can_be_dropped_for_good(tmp_path: Path) -> None:
    async with Cluster(3, store=rocks(tmp_path)) as cluster:
        client = await through(cluster, 0)
        await cluster.down(1)
        await client.put_many({f"k{i}": b"v" for i in range(40)})
        node = cluster.node(0)
        assert node.ring is not None
        token, middle = node.ring.token, 1 << 63
        low = [i for i in range(40) if token(b"k%d" % i) <= middle]
        assert await node.handoff.drop(lambda hint: token(hint.key) <= middle) == len(low) > 0
        assert pending(cluster) == {"n1": 40 - len(low)} and dropped(node) == {"topology": len(low)}
        await cluster.down(0)
        node = await cluster.up(0)
        assert pending(cluster) == {"n1": 40 - len(low)}
        await node.handoff.drop(lambda hint: hint.node == "n1")
        await cluster.down(0)
        await cluster.up(0)
        assert pending(cluster) == {}


async def test_a_drop_waits_for_what_is_under_way_and_tells_of_a_store_that_fails() -> None:
    async with Cluster(3, store=limited) as cluster:
        client = await through(cluster, 0)
        await cluster.down(2)
        await client.put("k", b"v")
        core = cluster.node(0).handoff
        gate = gated(core)
        await cluster.up(2)
        await until(lambda: core.busy)
        drop = asyncio.create_task(core.drop(lambda hint: True))
        await asyncio.sleep(0)
        assert not drop.done() and len(core.hints) == 1
        gate.set()
        assert await drop == 0  # it was delivered meanwhile
        assert not core.busy and core.hints.replayed == 1
        store = cluster.stores[0]
        assert isinstance(store, Limited)
        store.hints_full = True
        with pytest.raises(StorageFull):
            await core.drop(lambda hint: True)


# --- what is told


async def test_status_tells_when_no_hint_is_left() -> None:
    async with Cluster(3) as cluster:
        client, writer = await cluster.client(0), await through(cluster, 0)
        assert {name: state["hints"] for name, state in (await client.status()).items()} == {
            "n0": {}, "n1": {}, "n2": {},
        }  # fmt: skip
        await cluster.down(2)
        await writer.put_many({f"k{i}": b"v" for i in range(5)})
        status = await client.status()
        assert status["n0"]["hints"] == {"n2": 5} and status["n1"]["hints"] == {} and "error" in status["n2"]
        await cluster.up(2)
        await until(lambda: not pending(cluster))
        assert [state["hints"] for state in (await client.status()).values()] == [{}, {}, {}]


async def test_a_settled_cluster_does_nothing_about_hints() -> None:
    """No timer runs and no store is written while there is nothing to keep."""
    async with Cluster(3) as cluster:
        node = cluster.node(0)
        now = node.clock.monotonic()
        assert node.handoff._next(now) == (None, None)
        client = await through(cluster, 0)
        await client.put_many({f"k{i}": b"v" for i in range(50)}, level=ALL)
        assert node.handoff._next(now) == (None, None) and not node.handoff._unsaved.is_set()
