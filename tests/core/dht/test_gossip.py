"""The failure detector in real nodes: what they report, and what requests make of it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence

import msgspec
import pytest
from cluster import LOST, Cluster, ThreadedCluster, until
from structlog.testing import capture_logs

from agi.core.dht.client import session
from agi.core.dht.errors import OutcomeUnknown, Unavailable
from agi.core.dht.gossip import FailureDetector
from agi.core.dht.node import Node
from agi.core.dht.protocol.messages import (
    Get,
    Gossip,
    Message,
    Ping,
    Pong,
    Probe,
    ProbeAck,
    Put,
    ReplicaRead,
    ReplicaScan,
    ReplicaWrite,
    Scan,
)
from agi.core.dht.protocol.view import disk_tag
from agi.core.dht.types import Consistency, MemberStatus

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus
ALL, QUORUM = Consistency.ALL, Consistency.QUORUM
QUICK = {
    "dht.health.heartbeat_interval_ms": 100,
    "dht.health.probe_timeout_ms": 50,
    "dht.health.gossip_interval_ms": 10,
    "dht.health.recovery_timeout_ms": 100,
    "dht.health.awareness_max": 0,
}
SLOW = {
    "dht.health.heartbeat_interval_ms": 600_000,
    "dht.health.probe_timeout_ms": 300_000,
    "dht.health.sync_interval_ms": 3_600_000,
    "dht.health.gossip_nodes": 0,
}
"""Nothing happens unless a test says it: nobody hears what one node was told."""


def listen(node: Node, to: str) -> list[MemberStatus]:
    """What the node reports of that member."""
    heard: list[MemberStatus] = []
    node.on_member_status(lambda member, status: heard.append(status) if member == to else None)
    return heard


def silence(*names: str) -> object:
    """A rule: nothing comes from these any more, though their links stay up, as of a process that was stopped."""

    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        kept = isinstance(message, Ping | Pong)
        return LOST if src in names and not kept else None

    return rule


def told(cluster: Cluster, where: int, who: int, status: MemberStatus) -> None:
    """Lets a node believe something about another, as if a third had told it."""
    node = cluster.node(where)
    core = node.detector.core
    assert core is not None
    known = core.view.get(f"n{who}")
    third = next(name for name in cluster.names if name not in (f"n{where}", f"n{who}"))
    claim = type(known)(known.node, known.disk, known.boot, known.incarnation, status, third)
    node.detector._receive(third, Gossip([claim]), None)
    assert node.detector.status(f"n{who}") is status


async def test_a_killed_node_is_suspected_then_dead_and_alive_again_after_its_return() -> None:
    async with Cluster(3, settings=QUICK) as cluster:
        heard = [listen(cluster.node(0), "n2"), listen(cluster.node(1), "n2")]
        await cluster.down(2)
        await until(lambda: all(each[-1:] == [DEAD] for each in heard))
        assert heard[0] == [SUSPECT, DEAD]
        assert "n2" not in cluster.node(0).peers.usable
        await cluster.up(2)
        await until(lambda: all(each[-1:] == [ALIVE] for each in heard))
        await until(lambda: all(len(node.peers.usable) == 2 for node in cluster.living()))
        core = cluster.node(0).detector.core
        assert core is not None and core.false_deaths == 0, "it was dead: a restart refutes nothing"


async def test_a_silent_node_is_declared_dead_although_its_links_are_up_and_refutes_when_heard_again() -> None:
    async with Cluster(4, settings=QUICK) as cluster:
        heard = listen(cluster.node(0), "n3")
        lift = cluster.rule(silence("n3"))  # type: ignore[arg-type]  # a Rule
        await until(lambda: DEAD in heard)
        assert "n3" in cluster.node(0).peers.connected and "n3" not in cluster.node(0).peers.usable
        lift()
        await until(lambda: heard[-1] is ALIVE)
        assert "n3" in cluster.node(0).peers.usable
        core = cluster.node(3).detector.core
        assert core is not None and core.refutations > 0
        await until(lambda: all(node.detector.status(n) is ALIVE for node in cluster.living() for n in cluster.names))


async def test_a_node_that_stops_in_order_has_left_and_is_never_suspected() -> None:
    async with Cluster(3, settings=QUICK) as cluster:
        heard = listen(cluster.node(0), "n2")
        await cluster._stop(2, cluster.node(2))
        await cluster._seeds[2].close()
        await until(lambda: heard)
        await asyncio.sleep(0.3)  # several rounds
        assert heard == [LEFT]
        await cluster.up(2)
        await until(lambda: heard[-1] is ALIVE)


async def test_calls_that_wait_for_a_node_fail_over_when_it_is_declared_dead() -> None:
    async with Cluster(3, settings=SLOW) as cluster:
        await cluster.connected()
        cluster.rule(lambda src, dst, message: LOST if dst == "n2" and not isinstance(message, Ping | Pong) else None)
        wire = await cluster.wire(0)
        calls = [
            asyncio.create_task(wire.ask(message))
            for message in (
                Put(1, ALL, 60_000, [b"k"], [b"v"]),
                Get(2, ALL, 60_000, [b"k"]),
                Scan(3, ALL, 60_000, b"", b"", 10),
            )
        ]
        await until(lambda: cluster.node(0).coordinator.pending == 2)  # type: ignore[union-attr]  # it has formed
        await asyncio.sleep(0.05)
        assert not any(call.done() for call in calls)
        told(cluster, 0, 2, DEAD)
        put, get, scan = await asyncio.wait_for(asyncio.gather(*calls), 5)
        assert put.errors[0][1][0] == OutcomeUnknown.code, "it had been sent: the dead may hold it"
        assert "declared dead" in put.errors[0][1][1]
        assert get.errors[0][1][0] == Unavailable.code
        assert scan.error[0] == Unavailable.code


async def test_nothing_is_sent_to_the_dead_and_they_are_used_again_after_their_revival() -> None:
    async with Cluster(3, settings=SLOW) as cluster:
        await cluster.connected()
        sent: list[type[Message]] = []

        def watch(src: str, dst: str, message: Message) -> None:
            if dst == "n2" and isinstance(message, ReplicaRead | ReplicaWrite | ReplicaScan):
                sent.append(type(message))

        cluster.rule(watch)  # type: ignore[arg-type]  # it decides nothing
        wire = await cluster.wire(0)
        told(cluster, 0, 2, DEAD)
        assert cluster.node(0).waiting_for == ""
        for number in range(1, 11):
            assert (await wire.ask(Put(number, QUORUM, 5000, [b"k"], [b"v"]))).errors is None
            assert (await wire.ask(Get(100 + number, QUORUM, 5000, [b"k"]))).errors is None
            assert (await wire.ask(Scan(200 + number, QUORUM, 5000, b"", b"", 10))).error is None
        refused = await wire.ask(Put(50, ALL, 5000, [b"k"], [b"v"]))
        assert refused.errors[0][1][0] == Unavailable.code, "it is not even tried, and so certainly not stored"
        assert refused.errors[0][1][2:] == (3, 2)
        assert sent == []
        told(cluster, 0, 1, DEAD)
        assert cluster.node(0).waiting_for == "too few peers are connected for quorums: n1, n2 missing"
        cluster.node(0).detector.reply(cluster.node(0).peers.all["n2"], ProbeAck(0, 1, 0, [_alive(cluster, 2)]))
        assert (await wire.ask(Put(51, QUORUM, 5000, [b"k"], [b"v"]))).errors is None
        assert ReplicaWrite in sent


def _alive(cluster: Cluster, who: int) -> object:
    core = cluster.node(0).detector.core
    assert core is not None
    known = core.view.get(f"n{who}")
    return type(known)(known.node, known.disk, known.boot, known.incarnation + 1, ALIVE)


async def test_suspects_are_still_used_but_read_last() -> None:
    async with Cluster(3, settings={**SLOW, "dht.requests.hedge_budget": 0}) as cluster:
        await cluster.connected()
        asked: list[tuple[str, type[Message]]] = []

        def watch(src: str, dst: str, message: Message) -> None:
            if src == "n0" and isinstance(message, ReplicaRead | ReplicaWrite | ReplicaScan):
                asked.append((dst, type(message)))

        cluster.rule(watch)  # type: ignore[arg-type]  # it decides nothing
        wire = await cluster.wire(0)
        told(cluster, 0, 1, SUSPECT)
        for number in range(1, 21):
            assert (await wire.ask(Get(number, QUORUM, 5000, [b"k"]))).errors is None
            assert (await wire.ask(Scan(100 + number, QUORUM, 5000, b"", b"", 10))).error is None
        assert {name for name, _ in asked} == {"n2"}
        asked.clear()
        assert (await wire.ask(Put(50, QUORUM, 5000, [b"k"], [b"v"]))).errors is None
        assert (await wire.ask(Get(51, ALL, 5000, [b"k"]))).errors is None
        assert ("n1", ReplicaWrite) in asked and ("n1", ReplicaRead) in asked


async def test_messages_of_clients_and_strangers_say_nothing() -> None:
    async with Cluster(3, settings=SLOW) as cluster:
        await cluster.connected()
        wire = await cluster.wire(0)
        known = cluster.node(0).detector.core.view.get("n1")  # type: ignore[union-attr]  # it has formed
        wire.link.send(Gossip([type(known)("n1", known.disk, 99, 99, DEAD)]))
        wire.link.send(Probe(1, 1, 1))
        await wire.ask(Get(1, QUORUM, 5000, [b"k"]))
        assert cluster.node(0).detector.status("n1") is ALIVE
        assert not wire.closed and not any(isinstance(message, ProbeAck) for message in wire.heard)
        assert known.disk == disk_tag(cluster.node(1).identity.disk_id)


async def test_clients_hear_of_it_with_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REFRESH_S", 0.05)
    async with Cluster(3, settings=SLOW) as cluster:
        await cluster.connected()
        client = await cluster.client()
        heard: list[tuple[str, MemberStatus]] = []

        def broken(member: str, status: MemberStatus) -> None:
            raise RuntimeError("a bug of the program")

        client.on_member_status(broken)
        client.on_member_status(lambda member, status: heard.append((member, status)))
        await asyncio.sleep(0.2)
        assert heard == [], "nothing has changed since it connected"
        for where in (0, 2):
            told(cluster, where, 1, DEAD)
        await cluster.down(1)
        await until(lambda: heard)
        assert heard == [("n1", DEAD)]
        shown = {member["node_id"]: member["status"] for member in (await client.topology())["members"]}
        assert shown == {"n0": "ALIVE", "n1": "DEAD", "n2": "ALIVE"}
        assert (await client.status())["n0"]["peers"]["n1"]["status"] == "DEAD"
        await cluster.up(1)
        await until(lambda: heard[-1] == ("n1", ALIVE))


def test_clients_for_threads_hear_of_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REFRESH_S", 0.05)
    threaded = ThreadedCluster()
    try:
        with threaded.client() as client:
            heard: queue.SimpleQueue[tuple[str, MemberStatus]] = queue.SimpleQueue()
            client.on_member_status(lambda member, status: heard.put((member, status)))

            async def stop() -> None:
                await threaded.cluster._stop(1, threaded.cluster.node(1))

            threaded.run(stop())
            assert heard.get(timeout=10) == ("n1", LEFT)
    finally:
        threaded.stop()


async def test_a_callback_that_raises_is_logged_and_the_others_are_called() -> None:
    async with Cluster(3, settings=SLOW) as cluster:
        await cluster.connected()

        def broken(member: str, status: MemberStatus) -> None:
            raise RuntimeError("a bug of the program")

        cluster.node(0).on_member_status(broken)
        heard = listen(cluster.node(0), "n2")
        with capture_logs() as logs:
            told(cluster, 0, 2, DEAD)
        assert heard == [DEAD]
        assert [line["event"] for line in logs] == ["member_status", "member_status_callback_failed"]
        assert cluster.fatal == []


async def test_a_process_that_did_not_run_accuses_nobody_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs on while the node stands still, as after SIGSTOP: neither its probes under way nor the suspicions
    that it holds come due by that."""
    patient = {"dht.health.heartbeat_interval_ms": 2000, "dht.health.probe_timeout_ms": 1000}
    async with Cluster(3, settings=patient) as cluster:
        await cluster.connected()
        node = cluster.node(0)
        core = node.detector.core
        assert core is not None
        heard = listen(node, "n2")
        told(cluster, 0, 2, SUSPECT)
        clock, ahead_s = node.clock, 100.0
        real = type(clock).monotonic
        monkeypatch.setattr(clock, "monotonic", lambda: real(clock) + ahead_s)
        await until(lambda: node.detector.status("n2") is ALIVE)  # it refutes
        assert heard == [SUSPECT, ALIVE] and core.failed_probes == 0
        assert all(node.detector.status(name) is ALIVE for name in cluster.names)


async def test_a_node_that_has_not_formed_takes_no_part() -> None:
    async with Cluster(2, formed=False) as cluster:
        node = cluster.node(0)
        await until(node.formed.is_set)
        fresh = FailureDetector("x", node.peers, node.config.pace(), node.clock, node._rng, lambda name, error: None)
        fresh.leave()
        fresh.lost("n1")
        fresh.connected(node.peers.all["n1"])
        fresh.reply(node.peers.all["n1"], Probe(1, 1, 1))
        fresh.set_members(node.known_topology)
        assert fresh.status("n1") is ALIVE and fresh.messages == 0
        fresh.stop()


async def test_other_members_are_judged_anew() -> None:
    """A member whose disk was replaced is nobody of whom anything was heard, and who is removed is no suspect."""
    async with Cluster(4, settings=SLOW) as cluster:
        await cluster.connected()
        node = cluster.node(0)
        told(cluster, 0, 1, DEAD)
        told(cluster, 0, 2, SUSPECT)
        topology = node.known_topology
        members = [
            msgspec.structs.replace(member, disk_id="another") if member.node_id == "n1" else member
            for member in topology.members
            if member.node_id != "n2"
        ]
        node.detector.set_members(msgspec.structs.replace(topology, members=tuple(members)))
        assert node.detector.status("n1") is ALIVE and "n1" in node.peers.usable
        assert node.peers.suspects == set()
