"""Requests while keys change hands: quorums of both replica sets (T5), and a fresh start at every change (T3)."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import pytest
from cluster import LOST, Cluster, Wire, until

from agi.core.dht.clock import SystemClock
from agi.core.dht.errors import DHTError, OutcomeUnknown, StorageFull, Unavailable, from_wire
from agi.core.dht.joint import JointSet
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.messages import (
    ArcListReply,
    Delete,
    Get,
    GetReply,
    Message,
    Put,
    PutReply,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaScan,
    ReplicaWrite,
    ReplicaWriteReply,
    Scan,
    TopologyDigest,
    TopologyNews,
)
from agi.core.dht.protocol.record import HEADER
from agi.core.dht.requests import Operation, Requests
from agi.core.dht.topology import LEAVING, Member, Topology
from agi.core.dht.types import Consistency

ONE, QUORUM, ALL = Consistency.ONE, Consistency.QUORUM, Consistency.ALL


def leaving(topology: Topology, name: str = "n3") -> Topology:
    """The epoch in which a node is on its way out."""
    members = [
        msgspec.structs.replace(member, state=LEAVING) if member.node_id == name else member
        for member in topology.members
    ]
    return topology.next(members, f"{name} leaves", 0)


class Moving(NamedTuple):
    """A key whose replica `gone` hands over to `comes`; `kept` are replicas before and after."""

    key: str
    gone: str
    comes: str
    kept: list[str]


def moving(topology: Topology, coordinator: str) -> Moving:
    """Such a key, of which that node is a replica before and after."""
    ring = topology.ring()
    for number in range(1000):
        replicas = ring.replicas(b"k%d" % number)
        if isinstance(replicas, JointSet) and coordinator in {*replicas.old} & {*replicas.new}:
            (gone,), (comes,) = {*replicas.old} - {*replicas.new}, {*replicas.new} - {*replicas.old}
            kept = [name for name in replicas.old if name not in (gone, coordinator)]
            return Moving(f"k{number}", gone, comes, kept)
    raise AssertionError("no key moves")


async def adopt(cluster: Cluster, topology: Topology, *skipped: str) -> None:
    for node in cluster.living():
        if node.node_id not in skipped:
            await node.epochs.adopt(topology)


async def changing(cluster: Cluster, *skipped: str) -> Topology:
    """All (but these) adopt an epoch in which n3 leaves, and which does not end."""
    cluster.rule(lambda src, dst, m: LOST if isinstance(m, ArcListReply) else None)
    assert cluster.topology is not None
    topology = leaving(cluster.topology)
    await adopt(cluster, topology, *skipped)
    return topology


def put(key: str, value: bytes, level: int = QUORUM, timeout_ms: int = 2000) -> Put:
    return Put(0, level, timeout_ms, [key.encode()], [value])


def get(key: str, level: int = QUORUM, timeout_ms: int = 2000) -> Get:
    return Get(0, level, timeout_ms, [key.encode()])


def error_of(reply: Any) -> DHTError:
    wire = reply.error or (reply.errors[0][1] if reply.errors else None)
    assert wire is not None, reply
    return from_wire(*wire)


def value_of(reply: GetReply) -> bytes | None:
    assert reply.error is None and reply.errors is None, reply
    record = reply.records[0]
    return None if record is None else record[HEADER:]


def silent(cluster: Cluster, kinds: Any, *names: str) -> Any:
    """These nodes do not get such messages of others."""
    return cluster.rule(lambda src, dst, m: LOST if dst in names and isinstance(m, kinds) else None)


# --- both sets


async def test_a_write_needs_a_quorum_of_both_sets() -> None:
    async with Cluster(4) as cluster:
        moved = moving(await changing(cluster), "n0")
        wire = await cluster.wire(0)
        for missing in (moved.gone, moved.comes, *moved.kept):  # one of each set may be away
            quiet = silent(cluster, ReplicaWrite, missing)
            assert (await wire.ask(put(moved.key, b"1"))).errors is None
            quiet()
        for missing in (moved.gone, moved.comes):  # then three of the four hold it, but one set has one holder
            quiet = silent(cluster, ReplicaWrite, missing, moved.kept[0])
            error = error_of(await wire.ask(put(moved.key, b"2", timeout_ms=200)))
            assert type(error) is OutcomeUnknown and (error.needed, error.answered) == (2, 1)
            quiet()
        quiet = silent(cluster, ReplicaWrite, moved.comes)
        error = error_of(await wire.ask(put(moved.key, b"3", ALL, timeout_ms=200)))
        assert type(error) is OutcomeUnknown and (error.needed, error.answered) == (3, 2)
        quiet()
        reply = await wire.ask(Delete(0, ALL, 2000, [moved.key.encode()]))
        assert reply.errors is None and reply.existed == [True]
        assert len(set(cluster.held(moved.key))) == 1


async def test_what_a_replica_of_either_set_missed_becomes_a_hint() -> None:
    async with Cluster(4) as cluster:
        moved = moving(await changing(cluster), "n0")
        wire = await cluster.wire(0)
        hints = cluster.node(0).handoff.hints
        for missing in (moved.gone, moved.comes):
            silent(cluster, ReplicaWrite, missing)
            assert (await wire.ask(put(moved.key, missing.encode(), timeout_ms=100))).errors is None
        await until(lambda: {target.node for target in hints.pending()} == {moved.gone, moved.comes})


async def test_a_write_is_made_anew_above_what_one_of_the_new_replicas_holds() -> None:
    async with Cluster(4, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        moved = moving(await changing(cluster), "n0")
        wire = await cluster.wire(0)
        ahead_ms = cluster.clocks[0].wall_ms() + 60_000
        for name in (moved.comes, moved.kept[0]):
            cluster.plant(int(name[1]), moved.key, b"ahead", at_ms=ahead_ms)
        reply = await wire.ask(put(moved.key, b"mine", ALL))
        assert reply.errors is None and reply.versions[0] > ahead_ms << 16
        assert {(record or b"")[HEADER:] for record in cluster.held(moved.key)} == {b"mine"}
        assert cluster.node(0).metrics.restamps == 1


async def test_a_read_repairs_a_quorum_of_both_sets_before_it_answers() -> None:
    async with Cluster(4) as cluster:
        moved = moving(await changing(cluster), "n0")
        holders = ["n0", moved.gone, *moved.kept]
        for name in holders:
            cluster.plant(int(name[1]), moved.key, b"old", at_ms=1000)
        new = cluster.plant(int(moved.comes[1]), moved.key, b"new", at_ms=2000)
        quiet = silent(cluster, ReplicaRead, moved.kept[0])  # then the three others are just enough
        wire = await cluster.wire(0)
        assert value_of(await wire.ask(get(moved.key))) == b"new"
        held = dict(zip(cluster.names, cluster.held(moved.key), strict=True))
        assert [name for name in held if held[name] == new] == sorted({"n0", moved.gone, moved.comes})
        quiet()


async def test_a_read_asks_only_who_is_in_both_sets_and_all_others_once_one_of_those_fails() -> None:
    async with Cluster(4, settings={"dht.requests.hedge_budget": 0.0}) as cluster:
        moved = moving(await changing(cluster), "n0")
        for name in ("n0", moved.gone, *moved.kept):
            cluster.plant(int(name[1]), moved.key, b"v", at_ms=1000)
        wire = await cluster.wire(0)
        asked: list[str] = []
        quiet: set[str] = set()

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if not isinstance(message, ReplicaRead):
                return None
            asked.append(dst)
            return LOST if dst in quiet else None

        cluster.rule(rule)
        for _ in range(10):
            assert value_of(await wire.ask(get(moved.key))) == b"v"
        assert asked == moved.kept * 10
        assert cluster.held(moved.key)[int(moved.comes[1])] is None  # so nothing had to be repaired either
        quiet.add(moved.kept[0])
        call = asyncio.create_task(wire.ask(get(moved.key)))
        await until(lambda: len(asked) == 11)
        await cluster.down(int(moved.kept[0][1]))
        assert value_of(await call) == b"v"
        assert {*asked[11:]} == {moved.gone, moved.comes}


@pytest.mark.parametrize("lacking", ["gone", "comes"])
async def test_a_read_that_repairs_only_one_set_returns_neither_value(lacking: str) -> None:
    async with Cluster(4) as cluster:
        moved = moving(await changing(cluster), "n0")
        newest, stale = (moved.comes, moved.gone) if lacking == "gone" else (moved.gone, moved.comes)
        for name in cluster.names:
            cluster.plant(int(name[1]), moved.key, b"old", at_ms=1000)
        for name in (newest, "n0"):
            cluster.plant(int(name[1]), moved.key, b"new", at_ms=2000)
        silent(cluster, ReplicaRead, moved.kept[0])
        silent(cluster, ReplicaWrite, stale, moved.kept[0])
        wire = await cluster.wire(0)
        error = error_of(await wire.ask(get(moved.key, timeout_ms=200)))
        assert type(error) is Unavailable and "newest value could not be stored" in str(error)
        assert (error.needed, error.answered) == (2, 1)


@pytest.mark.parametrize("lacking", ["gone", "comes"])
async def test_a_read_needs_a_quorum_of_both_sets(lacking: str) -> None:
    async with Cluster(4) as cluster:
        moved = moving(await changing(cluster), "n0")
        silent(cluster, ReplicaRead, getattr(moved, lacking), moved.kept[0])
        wire = await cluster.wire(0)
        error = error_of(await wire.ask(get(moved.key, timeout_ms=200)))
        assert type(error) is Unavailable and (error.needed, error.answered) == (2, 1)


async def test_a_read_at_one_does_not_take_the_word_of_a_replica_that_is_still_being_filled() -> None:
    async with Cluster(4) as cluster:
        moved = moving(await changing(cluster), "n0")
        for name in ("n0", moved.gone, *moved.kept):
            cluster.plant(int(name[1]), moved.key, b"old", at_ms=1000)
        cluster.rule(lambda src, dst, m: (0.05,) if isinstance(m, ReplicaReadReply) else None)
        wire = await cluster.wire(int(moved.comes[1]))
        assert value_of(await wire.ask(get(moved.key, ONE))) == b"old"


async def test_requests_fail_at_once_where_too_few_of_one_set_are_connected() -> None:
    async with Cluster(4, factor=2) as cluster:
        topology = await changing(cluster)
        moved = moving(topology, "n0")
        await cluster.down(int(moved.comes[1]))
        wire = await cluster.wire(0)
        started = time.monotonic()
        for request in (put(moved.key, b"1"), get(moved.key)):
            error = error_of(await wire.ask(request))
            assert type(error) is Unavailable and (error.needed, error.answered) == (2, 1)
            assert "too few replicas are reachable" in str(error)
        assert time.monotonic() - started < 1
        assert cluster.held(moved.key) == [None] * 4
        assert value_of(await wire.ask(get(moved.key, ONE))) is None


async def test_sets_with_the_same_names_in_different_roles_are_kept_apart() -> None:
    weights = (0.25, 0.5, 2.0, 4.0)
    members = [Member(f"n{i}", f"d{i}", f"h{i}:1", next_weight=weight) for i, weight in enumerate(weights)]
    topology = Topology("c", 1, 2, 2, 64, "xxh3", tuple(members), ("n0",), "x")
    ring = topology.ring()
    none: Any = None
    requests = Requests(
        "n0",
        topology,
        ring,
        none,
        none,
        SystemClock(),
        Metrics(),
        hint=none,
        first_id=0,
        pending_bytes_max=1 << 20,
        queue_s=0.5,
        slow_s=0,
    )
    keys = [b"k%d" % i for i in range(500)]
    operation = Operation(Get(1, QUORUM, 1000, keys), none, "t", 0.0, 0)
    parts = requests.parts(operation, None, keys)
    roles: dict[tuple[str, ...], set[object]] = {}
    for _, part_keys, replicas in parts:
        for key in part_keys:
            found = ring.replicas(key)
            assert isinstance(found, JointSet) == isinstance(replicas, JointSet) and set(found) == set(replicas)
            if isinstance(found, JointSet) and isinstance(replicas, JointSet):
                assert (set(found.old), set(found.new)) == (set(replicas.old), set(replicas.new))
                assert found.sources == replicas.sources
        roles.setdefault(tuple(replicas), set()).add(
            frozenset(replicas.new) if isinstance(replicas, JointSet) else None
        )
    assert any(len(role) > 1 for role in roles.values())  # else this test looks at nothing
    assert operation.left == len(parts) and operation.results == [None] * 500
    assert sorted(place for places, _, _ in parts for place in places or ()) == list(range(500))


# --- a change while requests are under way


def spy(cluster: Cluster, epoch: int, kinds: Any) -> list[tuple[str, Any]]:
    """Messages of this kind and epoch are lost; what was sent is noted, of any epoch, as (destination, message)."""
    seen: list[tuple[str, Any]] = []

    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        if not isinstance(message, kinds):
            return None
        seen.append((dst, message))
        return LOST if message.epoch == epoch else None  # type: ignore[attr-defined]

    cluster.rule(rule)
    return seen


async def test_a_write_under_way_starts_again_with_the_same_record_under_the_new_topology() -> None:
    async with Cluster(4) as cluster:
        assert cluster.topology is not None
        moved = moving(leaving(cluster.topology), "n0")
        seen = spy(cluster, 1, ReplicaWrite)
        wire = await cluster.wire(0)
        call = asyncio.create_task(wire.ask(put(moved.key, b"1", timeout_ms=5000)))
        await until(lambda: len(seen) == 2)
        await changing(cluster)
        reply = await call
        assert reply.errors is None
        assert len({bytes(message.records[0]) for _, message in seen}) == 1
        assert {dst for dst, message in seen if message.epoch == 2} == {moved.gone, moved.comes, *moved.kept}
        assert reply.versions[0] == int.from_bytes(seen[0][1].records[0][:8], "big")


async def test_answers_given_before_the_change_do_not_count() -> None:
    async with Cluster(4) as cluster:
        assert cluster.topology is not None
        moved = moving(leaving(cluster.topology), "n0")
        wire = await cluster.wire(0)
        # both old replicas store it, but are heard only after the change
        delayed = cluster.rule(lambda src, dst, m: (0.3,) if isinstance(m, ReplicaWriteReply) else None)
        call = asyncio.create_task(wire.ask(put(moved.key, b"1", timeout_ms=1000)))
        await until(lambda: sum(record is not None for record in cluster.held(moved.key)) == 3)
        delayed()
        silent(cluster, ReplicaWrite, moved.gone, moved.comes, *moved.kept)
        await changing(cluster)
        error = error_of(await call)
        assert type(error) is OutcomeUnknown and error.answered == 1  # this node itself


@pytest.mark.parametrize("factor", [3, 4])
async def test_a_batch_that_falls_apart_at_a_change_is_answered_whole(factor: int) -> None:
    """With a factor of 4 all keys have the same replicas before the change."""
    async with Cluster(4, factor=factor) as cluster:
        keys = [b"k%d" % i for i in range(100)]
        values = [b"v%d" % i for i in range(100)]
        seen = spy(cluster, 1, ReplicaWrite | ReplicaRead)
        wire, other = await cluster.wire(0), await cluster.wire(0, "other")
        before = [cluster.plant(i, f"r{j}", b"r%d" % j, at_ms=1000) for j in range(100) for i in range(4)][::4]
        write = asyncio.create_task(wire.ask(Put(0, QUORUM, 5000, keys, values)))
        read = asyncio.create_task(other.ask(Get(0, QUORUM, 5000, [b"r%d" % j for j in range(100)])))
        await until(lambda: {type(message) for _, message in seen} == {ReplicaWrite, ReplicaRead})
        await changing(cluster)
        written: PutReply = await write
        found: GetReply = await read
        assert written.error is None and written.errors is None
        assert len(set(written.versions)) == 100 and 0 not in written.versions
        assert found.errors is None and [r and r[HEADER:] for r in found.records] == [r[HEADER:] for r in before]
        reply = await wire.ask(Get(0, QUORUM, 2000, keys))
        assert [record[HEADER:] for record in reply.records] == values
        assert [int.from_bytes(record[:8], "big") for record in reply.records] == written.versions
        assert len({message.id for _, message in seen if message.epoch == 2}) > 2
        assert cluster.node(0).coordinator.pending == 0  # type: ignore[union-attr]


async def test_a_restart_has_the_deadline_of_its_request() -> None:
    async with Cluster(4) as cluster:
        seen: list[Message] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if not isinstance(message, ReplicaWrite | ReplicaRead):
                return None
            seen.append(message)
            return LOST

        cluster.rule(rule)
        wires = [await cluster.wire(0, name) for name in ("a", "b")]
        started = time.monotonic()
        calls = [
            asyncio.create_task(wires[0].ask(put("k", b"1", timeout_ms=600))),
            asyncio.create_task(wires[1].ask(get("k", timeout_ms=600))),
        ]
        await asyncio.sleep(0.4)
        await changing(cluster)
        assert type(error_of(await calls[0])) is OutcomeUnknown
        assert type(error_of(await calls[1])) is Unavailable
        assert 0.55 < time.monotonic() - started < 0.85
        assert {message.epoch for message in seen} == {1, 2}  # type: ignore[attr-defined]


async def test_what_is_past_its_deadline_does_not_start_again() -> None:
    async with Cluster(4) as cluster:
        seen = spy(cluster, 1, ReplicaWrite | ReplicaRead)
        wires = [await cluster.wire(0, name) for name in ("a", "b")]
        coordinator = cluster.node(0).coordinator
        assert coordinator is not None and cluster.topology is not None
        calls = [
            asyncio.create_task(wires[0].ask(put("k", b"1", timeout_ms=100))),
            asyncio.create_task(wires[1].ask(get("k", timeout_ms=100))),
        ]
        await until(lambda: coordinator.pending == 2)
        coordinator.advance = lambda now: None  # the node does not get round to ending them
        await asyncio.sleep(0.15)
        topology = leaving(cluster.topology)
        coordinator.adopt(topology, topology.ring())
        assert coordinator.pending == 0
        assert type(error_of(await calls[0])) is OutcomeUnknown
        assert type(error_of(await calls[1])) is Unavailable
        assert {message.epoch for _, message in seen} == {1}


async def test_what_starts_again_waits_for_replicas_that_are_not_connected_yet() -> None:
    async with Cluster(4) as cluster:
        assert cluster.topology is not None
        topology = leaving(cluster.topology)
        moved = moving(topology, "n0")
        cluster.plant(0, moved.key, b"0", at_ms=1000)
        seen = spy(cluster, 1, ReplicaWrite | ReplicaRead)
        wires = [await cluster.wire(0, name) for name in ("a", "b")]
        calls = [
            asyncio.create_task(wires[0].ask(put(moved.key, b"1", ALL, timeout_ms=5000))),
            asyncio.create_task(wires[1].ask(get(moved.key, ALL, timeout_ms=5000))),
        ]
        await until(lambda: {type(message) for _, message in seen} == {ReplicaWrite, ReplicaRead})
        coordinator, usable = cluster.node(0).coordinator, cluster.node(0).peers.usable
        assert coordinator is not None
        away = {name: usable.pop(name) for name in ("n1", "n2", "n3")}
        coordinator.adopt(topology, topology.ring())
        assert coordinator.pending == 2
        assert not any(message.epoch == 2 for _, message in seen)
        usable.update(away)
        await changing(cluster)
        reply = await calls[0]
        assert reply.errors is None and value_of(await calls[1]) in (b"0", b"1")
        assert cluster.held(moved.key).count(cluster.held(moved.key)[0]) == 4


async def test_a_write_that_all_refuse_after_a_restart_may_be_stored_all_the_same() -> None:
    async with Cluster(4) as cluster:
        assert cluster.topology is not None
        moved = moving(leaving(cluster.topology), "n0")
        wire = await cluster.wire(0)
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) else None)
        call = asyncio.create_task(wire.ask(put(moved.key, b"1", timeout_ms=5000)))
        await until(lambda: sum(record is not None for record in cluster.held(moved.key)) == 3)
        cluster._rules.clear()

        def refuse(*arguments: Any, **_: Any) -> None:
            full = StorageFull("no space").to_wire()
            done = arguments[4]
            asyncio.get_running_loop().call_soon(lambda: done(None, None, full))

        for node in cluster.living():
            node.replica.write = refuse  # type: ignore[method-assign]
        await changing(cluster)
        error = error_of(await call)
        assert type(error) is OutcomeUnknown and "no space" in str(error)


async def test_replicas_still_waited_for_at_a_change_get_hints_for_what_is_answered() -> None:
    async with Cluster(4) as cluster:
        assert cluster.topology is not None
        moved = moving(leaving(cluster.topology), "n0")
        late = moved.kept[0]
        silent(cluster, ReplicaWrite, late)
        wire = await cluster.wire(0)
        assert (await wire.ask(put(moved.key, b"1", timeout_ms=60_000))).errors is None
        node = cluster.node(0)
        assert node.coordinator is not None and node.coordinator.pending == 1
        assert node.handoff.hints.pending() == []
        await changing(cluster)
        assert node.coordinator.pending == 0
        assert [target.node for target in node.handoff.hints.pending()] == [late]


async def test_a_read_in_repair_starts_again_as_a_read() -> None:
    async with Cluster(4) as cluster:
        assert cluster.topology is not None
        moved = moving(leaving(cluster.topology), "n0")
        for name in cluster.names:
            cluster.plant(int(name[1]), moved.key, b"old", at_ms=1000)
        new = cluster.plant(0, moved.key, b"new", at_ms=2000)
        repairs = spy(cluster, 1, ReplicaWrite)
        wire = await cluster.wire(0)
        call = asyncio.create_task(wire.ask(get(moved.key, timeout_ms=5000)))
        await until(lambda: repairs)
        await changing(cluster)
        assert value_of(await call) == b"new"
        ring = leaving(cluster.topology).ring()
        replicas = ring.replicas(moved.key.encode())
        assert isinstance(replicas, JointSet)
        holders = {name for name, record in zip(cluster.names, cluster.held(moved.key), strict=True) if record == new}
        assert len(holders & set(replicas.old)) >= 2 and len(holders & set(replicas.new)) >= 2


async def test_a_coordinator_that_missed_the_change_is_told_and_starts_again() -> None:
    async with Cluster(4) as cluster:
        await changing(cluster, "n0")
        wire = await cluster.wire(0)
        node = cluster.node(0)
        assert node.epoch == 1
        reply = await wire.ask(put("k", b"1", timeout_ms=5000))
        assert reply.errors is None and node.epoch == 2
        assert value_of(await wire.ask(get("k"))) == b"1"
        assert node.metrics.replica_errors == 0


@pytest.mark.parametrize("request_", [put("k", b"1", timeout_ms=300), get("k", timeout_ms=300)], ids=["put", "get"])
async def test_a_refusal_for_the_epoch_is_no_failure_but_asks_for_the_topology(request_: Any) -> None:
    async with Cluster(4) as cluster:
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, TopologyNews) and dst == "n0" else None)
        asked: Counter[str] = Counter()

        def note(src: str, dst: str, message: Message) -> None:
            if isinstance(message, TopologyDigest) and src == "n0":
                asked[dst] += 1

        await changing(cluster, "n0")
        cluster.rule(note)
        wire = await cluster.wire(0)
        started = time.monotonic()
        error = error_of(await wire.ask(msgspec.structs.replace(request_, id=0)))
        assert type(error) is (OutcomeUnknown if isinstance(request_, Put) else Unavailable)
        assert time.monotonic() - started >= 0.25 and "deadline" in str(error)
        assert len(asked) >= 1 and cluster.node(0).metrics.replica_errors == 0


# --- scans


async def scan(wire: Wire, level: int = QUORUM, timeout_ms: int = 3000) -> Any:
    return await wire.ask(Scan(0, level, timeout_ms, b"", b"", 1000))


async def test_a_scan_covers_and_repairs_both_sets() -> None:
    async with Cluster(4) as cluster:
        topology = await changing(cluster)
        moved = moving(topology, "n0")
        for name in cluster.names:
            cluster.plant(int(name[1]), moved.key, b"old", at_ms=1000)
        new = cluster.plant(int(moved.comes[1]), moved.key, b"new", at_ms=2000)
        wire = await cluster.wire(0)
        for missing in (moved.gone, moved.comes):
            quiet = silent(cluster, ReplicaScan, missing, moved.kept[0])
            error = error_of(await scan(wire, timeout_ms=600))
            assert type(error) is Unavailable and error.needed == 2
            quiet()
        silent(cluster, ReplicaScan, moved.kept[0])
        reply = await scan(wire)
        assert reply.error is None and reply.keys == [moved.key.encode()] and reply.records == [new]
        held = dict(zip(cluster.names, cluster.held(moved.key), strict=True))
        assert [name for name in held if held[name] == new] == sorted({"n0", moved.gone, moved.comes})


async def test_a_scan_with_one_replica_for_each_key_repairs_the_one_that_takes_over() -> None:
    async with Cluster(4, factor=1) as cluster:
        topology = await changing(cluster)
        ring = topology.ring()
        key = next(k for k in (b"k%d" % i for i in range(1000)) if ring.replicas(k)[0] == "n3")
        replicas = ring.replicas(key)
        record = cluster.plant(3, key.decode(), b"1", at_ms=1000)
        wire = await cluster.wire(0)
        reply = await scan(wire, ONE)
        assert reply.keys == [key] and cluster.held(key.decode()).count(record) == 1
        reply = await scan(wire)
        assert reply.error is None and reply.keys == [key]
        assert {name for name, r in zip(cluster.names, cluster.held(key.decode()), strict=True) if r} == {*replicas}


async def test_a_scan_at_one_asks_the_replicas_that_are_filled() -> None:
    async with Cluster(4, factor=1) as cluster:
        await changing(cluster)
        seen: list[str] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if isinstance(message, ReplicaScan):
                seen.append(dst)
            return None

        cluster.rule(rule)
        wire = await cluster.wire(0)
        assert (await scan(wire, ONE)).error is None
        assert sorted(seen) == ["n1", "n2", "n3"]  # each is the only one of some keys before the change


@pytest.mark.parametrize("late", ["told", "refused"])
async def test_a_scan_under_way_begins_again_at_a_change(late: str) -> None:
    """`refused`: the node that coordinates it hears of the change only by that."""
    async with Cluster(4) as cluster:
        client = await cluster.client()
        items = {f"k{i:03}": b"%d" % i for i in range(50)}
        await client.put_many(items, consistency="ALL")
        wire = await cluster.wire(0)
        seen = spy(cluster, 1 if late == "told" else 0, ReplicaScan)
        if late == "told":
            call = asyncio.create_task(scan(wire))
            await until(lambda: seen)
            await changing(cluster)
            reply = await call
        else:
            await changing(cluster, "n0")
            reply = await scan(wire)
        assert reply.error is None and reply.keys == [key.encode() for key in items]
        assert {message.epoch for _, message in seen} == {1, 2}
        assert cluster.node(0).epoch == 2
