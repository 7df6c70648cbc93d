"""When replication is whole, and who says so: `wait_healthy`, `/readyz` and `agi-dht status` tell of what a replica
missed although no hint is left that could bring it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cluster import LOST, Cluster, until

from agi.core.dht import antientropy, cli
from agi.core.dht.admin.replication import not_whole
from agi.core.dht.cli import asking
from agi.core.dht.client import DHTClient
from agi.core.dht.client.changes import wait_healthy
from agi.core.dht.errors import Unavailable
from agi.core.dht.node import Node
from agi.core.dht.protocol.messages import ArcListReply, Message, Put, Query, ReplicaWrite, TreeRoot
from agi.core.dht.ring import Ring
from agi.core.dht.topology import Member as Place
from agi.core.dht.types import Consistency
from agi.core.dht.types import Node as Member

QUICK = {
    "dht.repair.interval_ms": 200,
    "dht.network.timeout_ms": 300,
    "dht.versions.max_clock_skew_ms": 100,
}
NO_HINTS = {**QUICK, "dht.hints.bytes_max_mb": 0}
NEVER = {"dht.repair.interval_ms": 86_400_000, "dht.hints.bytes_max_mb": 0}
"""Exchanges only where the test begins them."""
KEYS = [f"k{i}" for i in range(50)]


def uncompared(src: str, dst: str, message: Message) -> Any:
    """No comparison comes about."""
    return LOST if isinstance(message, TreeRoot) else None


def unwritten(src: str, dst: str, message: Message) -> Any:
    """n2 takes no write of n0."""
    return LOST if isinstance(message, ReplicaWrite) and (src, dst) == ("n0", "n2") else None


async def put_at(cluster: Cluster, i: int, keys: list[str], value: bytes = b"v") -> None:
    """Through this coordinator and no other."""
    raw = [key.encode() for key in keys]
    reply = await (await cluster.wire(i, keys[0])).ask(Put(0, Consistency.QUORUM, 2000, raw, [value] * len(raw)))
    assert reply.error is None and reply.errors is None


def lacking(cluster: Cluster, i: int, keys: list[str]) -> int:
    return sum(cluster.held(key)[i] is None for key in keys)


def held_by_others(cluster: Cluster) -> list[str]:
    """Keys of all nodes but n0."""
    names = (f"key{i}" for i in range(10_000))
    return [key for key in names if 0 not in cluster.holders(key)][:20]


async def compared(node: Node, *names: str) -> None:
    for name in names:
        await node.antientropy.exchange(name)


async def known(cluster: Cluster) -> None:
    """The hash trees are built."""
    await until(lambda: all(node.antientropy.keeper.unknown == 0 for node in cluster.living()))


# --- what no hint brings


@pytest.mark.parametrize(
    ("settings", "size", "given_up"),
    [({"dht.hints.bytes_max_mb": 0}, 1, 50), ({"dht.hints.bytes_max_mb": 1}, 100_000, 40)],
)
async def test_what_a_node_missed_without_hints_is_waited_for(
    settings: dict[str, object], size: int, given_up: int
) -> None:
    async with Cluster(3, settings={**QUICK, **settings}) as cluster:
        client = await cluster.client()
        await cluster.down(2)
        for first in range(0, 50, 10):
            await put_at(cluster, 0, KEYS[first : first + 10], b"x" * size)
        assert sum(node.handoff.hints.lost.get("n2", 0) for node in cluster.living()) == given_up
        heal = cluster.rule(uncompared)
        await cluster.up(2)
        await until(lambda: not any(len(node.handoff.hints) for node in cluster.living()))
        with pytest.raises(Unavailable, match="n2 has not compared all ranges yet with n0, n1"):
            await client.wait_healthy(1)
        assert lacking(cluster, 2, KEYS) == given_up
        heal()
        assert await client.wait_healthy(10) == []
        assert lacking(cluster, 2, KEYS) == 0
        assert not cluster.fatal


async def test_what_a_node_missed_while_it_was_up_is_waited_for() -> None:
    """Nothing came back, so nobody has a reason to compare but that the coordinator tells of its loss."""
    async with Cluster(4, settings=NO_HINTS) as cluster:
        client = await cluster.client(1, 3)
        assert await client.wait_healthy(10) == []
        n2 = cluster.node(2)
        keys = held_by_others(cluster)
        untold = cluster.rule(lambda src, dst, m: LOST if isinstance(m, Query) and m.what == "missed" else None)
        hold = cluster.rule(uncompared)
        heal = cluster.rule(unwritten)
        await put_at(cluster, 0, keys)
        await until(lambda: cluster.node(0).handoff.hints.lost)
        heal()
        with pytest.raises(Unavailable, match=f"n0 gave up {len(keys)} hints for n2, which does not know of it yet"):
            await client.wait_healthy(0.5)
        assert lacking(cluster, 2, keys) == len(keys) and n2.antientropy.not_compared == []
        untold()
        cluster.node(0).calls.peer_lost("n2", Unavailable("the question was lost"))
        await until(lambda: not cluster.node(0).handoff.hints.lost)
        assert n2.antientropy.not_compared == ["n0", "n1", "n3"]
        assert not_whole(n2) == ["not all ranges were compared yet with n0, n1, n3"]
        hold()
        assert await client.wait_healthy(10) == []
        assert lacking(cluster, 2, keys) == 0


async def test_hints_that_died_with_their_coordinator_are_made_up_for() -> None:
    async with Cluster(4, settings=QUICK) as cluster:
        client = await cluster.client(1, 3)
        assert await client.wait_healthy(10) == []

        async def unsaved(*_: object, **__: object) -> None:
            """A disk that never gets them."""

        cluster.stores[0].save_hints = unsaved  # type: ignore[method-assign]  # only of this one
        keys = held_by_others(cluster)
        hold = cluster.rule(uncompared)
        cluster.rule(unwritten)
        await put_at(cluster, 0, keys)
        await until(lambda: len(cluster.node(0).handoff.hints) == len(keys))
        await cluster.down(0)
        await cluster.up(0)
        assert lacking(cluster, 2, keys) == len(keys) and not cluster.node(0).handoff.hints
        assert cluster.node(2).antientropy.not_compared == ["n0", "n1", "n3"]
        hold()
        assert await client.wait_healthy(10) == []
        assert lacking(cluster, 2, keys) == 0


async def test_a_member_that_is_gone_takes_its_hints_along() -> None:
    async with Cluster(4, settings=NEVER) as cluster:
        client = await cluster.client()
        await known(cluster)
        for node in cluster.living():
            await compared(node, *(name for name in cluster.names if name != node.node_id))
        assert all(node.antientropy.not_compared == [] for node in cluster.living())
        cluster.rule(uncompared)
        await client.leave("n3")
        await until(lambda: all("n3" not in node.known_topology.by_id for node in cluster.living()[:3]))
        assert cluster.node(0).antientropy.not_compared == ["n1", "n2"]


# --- what counts as compared


async def test_a_change_leaves_compared_what_was_and_nothing_where_something_was_not() -> None:
    async with Cluster(3, settings=NEVER) as cluster:
        cluster.rule(uncompared)
        await known(cluster)
        n0, n1 = cluster.node(0), cluster.node(1)
        now = time.monotonic()
        n0.antientropy._covered = {"n1": now, "n2": now}
        n1.antientropy._covered = {"n0": now}
        assert n0.ring is not None
        grown = Ring([*n0.ring.nodes, Member("n3", "h", 7003, virtual_nodes=8)], "xxh3", 3)
        for node in (n0, n1):
            topology = node.known_topology
            topology = topology.next([*topology.members, Place("n3", "disk", "h:7003")], "n3 joined", 0)
            node.antientropy.adopt(topology, grown)
            assert "n3" in node.antientropy.keeper.partners
        assert n0.antientropy.not_compared == []  # a change brings everything to n3
        assert n1.antientropy.not_compared == ["n0", "n2", "n3"]  # who held what n1 lacks may be another now


async def test_what_was_too_young_for_the_first_comparison_has_another_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antientropy, "SOON_S", 0.2)
    monkeypatch.setattr(antientropy, "ASKING", 0.0)
    settings = {**NO_HINTS, "dht.repair.interval_ms": 20_000, "dht.network.timeout_ms": 1000}
    async with Cluster(3, settings=settings) as cluster:
        await cluster.down(2)
        await put_at(cluster, 0, KEYS)
        await cluster.up(2)
        await until(lambda: not cluster.node(2).antientropy.not_compared)
        assert lacking(cluster, 2, KEYS) == 0


async def test_who_came_back_is_compared_soon_however_long_the_interval_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antientropy, "SOON_S", 0.5)
    monkeypatch.setattr(antientropy, "AT_MOST_S", 1.0)
    settings = {**NO_HINTS, "dht.repair.interval_ms": 86_400_000, "dht.network.timeout_ms": 300}
    async with Cluster(3, settings=settings) as cluster:
        for _ in range(2):
            await cluster.down(2)
            await put_at(cluster, 0, KEYS)
            await cluster.up(2)
            await until(lambda: all(not node.antientropy.not_compared for node in cluster.living()))
            assert lacking(cluster, 2, KEYS) == 0


async def test_what_is_young_is_compared_once_it_is_old() -> None:
    async with Cluster(2, factor=2, settings={**NEVER, "dht.network.timeout_ms": 2000}) as cluster:
        node = cluster.node(0)
        await known(cluster)
        cluster.plant(0, "k", b"v", at_ms=int(time.time() * 1000))
        node.antientropy.keeper.forget()
        await known(cluster)
        report = await node.antientropy.exchange("n1")
        assert report.young == 1 and node.antientropy.not_compared == ["n1"]
        cluster.clocks[0].ahead_ms = 3000
        report = await node.antientropy.exchange("n1")
        assert (report.young, report.sent) == (0, 1) and node.antientropy.not_compared == []


async def test_writes_that_never_end_keep_nobody_waiting() -> None:
    """An exchange leaves alone what is young: it still settles all that is older than that, by any clock."""
    settings = {**NEVER, "dht.network.timeout_ms": 300, "dht.versions.max_clock_skew_ms": 200}
    async with Cluster(2, factor=2, settings=settings) as cluster:
        repair = cluster.node(0).antientropy
        await known(cluster)
        cluster.plant(0, "k", b"v", at_ms=int(time.time() * 1000))
        repair.keeper.forget()
        await known(cluster)
        repair._young = lambda above: lambda hlc: True  # type: ignore[method-assign]  # another write each time
        repair.missed()
        assert (await repair.exchange("n1")).young == 1
        assert repair.not_compared == ["n1"]
        since = time.monotonic()
        await until(lambda: time.monotonic() > since + 0.5)
        assert (await repair.exchange("n1")).young == 1
        assert repair.not_compared == []


async def test_who_loses_hints_all_the_time_is_not_compared_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antientropy, "SOON_S", 0.01)
    async with Cluster(2, factor=2, settings={**NO_HINTS, "dht.repair.interval_ms": 1000}) as cluster:
        repair = cluster.node(0).antientropy
        await until(lambda: repair.totals.exchanges >= 2)
        before, began = repair.totals.exchanges, time.monotonic()

        def lost() -> bool:
            repair.missed()
            return time.monotonic() > began + 1.5

        await until(lost)
        took = time.monotonic() - began
        assert 1 <= repair.totals.exchanges - before <= 1 + took / (antientropy.AT_MOST * 1.0)


# --- where nothing is wrong, or nothing is looked at


async def test_a_cluster_that_has_just_formed_is_whole_within_seconds() -> None:
    async with Cluster(3, formed=False, settings={"dht.repair.interval_ms": 20_000}) as cluster:
        await cluster.connected()
        client = await cluster.client()
        assert await client.wait_healthy(8) == []  # 4 s, of an interval of 20


async def test_nodes_that_compare_nothing_are_named_and_not_waited_for() -> None:
    async with Cluster(3, settings=QUICK, per_node={1: {"dht.repair.interval_ms": 0}}) as cluster:
        client = await cluster.client()
        assert await client.wait_healthy(10) == ["n1"]
    async with Cluster(3) as cluster:
        cluster.rule(uncompared)
        client = await cluster.client()
        assert await client.wait_healthy(5) == cluster.names
        assert all(not_whole(node) == [] for node in cluster.living())


async def test_one_look_that_finds_nothing_is_not_enough() -> None:
    """What one node was just told of another's loss may be in neither's answer."""
    async with Cluster(2, factor=2) as cluster:
        client = await cluster.client()
        looks = [False, True, False, False]
        asked = 0

        async def status() -> dict[str, dict[str, Any]]:
            nonlocal asked
            states = await client.status()
            states["n0"]["hints_lost"] = {"n1": 1} if looks[asked] else {}
            asked += 1
            return states

        await wait_healthy(client.topology, status, 5)
        assert asked == len(looks)


# --- who says so


async def test_a_node_tells_every_reason_that_it_knows() -> None:
    settings = {
        **QUICK,
        "dht.health.heartbeat_interval_ms": 50,
        "dht.health.probe_timeout_ms": 20,
        "dht.health.failure_threshold": 1,
        "dht.health.suspicion_mult": 1,
        "dht.health.suspicion_max_mult": 1,
    }
    async with Cluster(4, settings=settings) as cluster:
        client = await cluster.client(0)
        n0 = cluster.node(0)
        await client.wait_healthy(10)
        assert not_whole(n0) == []
        hold = cluster.rule(uncompared)
        await cluster.down(2)
        await until(lambda: "n2 is DEAD" in not_whole(n0))
        await put_at(cluster, 0, KEYS)
        await until(lambda: any(" hints wait for n2" in line for line in not_whole(n0)))
        await cluster.up(2)
        await until(lambda: not_whole(n0) == ["not all ranges were compared yet with n1, n2, n3"])
        hold()
        await client.wait_healthy(10)
        assert not_whole(n0) == []
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ArcListReply) else None)
        await cluster.add(wait=False)
        await until(lambda: "a change is under way: n4 joins" in not_whole(n0))
        assert not_whole(cluster.node(4))


class Shown:
    """`agi-dht status` over a cluster in memory."""

    def __init__(
        self, client: DHTClient, capsys: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._client = client
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self.code = 0
        self.text = ""
        self.json: dict[str, Any] = {}

    async def look(self) -> None:
        topology, states = await self._client.topology(), dict[str, Any](await self._client.status())
        for name, state in states.items():
            if "error" in state:
                states[name] = Unavailable(state["error"])
        found = asking.Survey(topology, states)
        self._monkeypatch.setattr(asking, "survey", lambda *_: found)
        for arguments in (["status"], ["status", "--json"]):
            self._capsys.readouterr()
            self.code = cli.main(arguments)
            out, _ = self._capsys.readouterr()
            if len(arguments) == 1:
                self.text = out.decode()
            else:
                self.json = msgspec.json.decode(out)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            await self.look()
            while not condition():
                await asyncio.sleep(0.02)
                await self.look()


@pytest.mark.usefixtures("hurried")
async def test_status_says_what_is_missing(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(4, settings=NO_HINTS) as cluster:
        client = await cluster.client(0)
        await client.put_many(dict.fromkeys(KEYS, b"v"), consistency="ALL")
        shown = Shown(client, capsysbinary, monkeypatch)
        await client.wait_healthy(10)
        await shown.look()
        assert shown.code == 0 and shown.json["missing"] == [] and shown.json["failures_tolerated"] == 1
        assert shown.text.splitlines()[5:] == [
            "failures tolerated now: 1 (quorums are 2 of 3 replicas)",
            "replication is whole",
        ]
        go_on = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ArcListReply) else None)
        with pytest.raises(Unavailable, match="is not over"):
            await client.set_weight("n1", 2, timeout=0.1)
        await until(lambda: all(node.known_topology.in_transition for node in cluster.living()))
        await shown.look()
        assert shown.code == 0 and shown.json["ready"]  # requests go on
        assert shown.json["missing"][0] == "a change is under way: n1 gets weight 2 instead of 1"
        assert any(" has filled 0 of " in line for line in shown.json["missing"])
        assert shown.text.splitlines()[6:] == ["replication is not whole:", *shown.json["missing"]]
        go_on()
        await cluster.settled()
        await client.wait_healthy(10)
        hold = cluster.rule(uncompared)
        await cluster.down(2)
        await shown.until(lambda: shown.json["failures_tolerated"] == 0)
        assert shown.code == 13 and "\nfailures tolerated now: 0 (quorums are 2 of 3 replicas)\n" in shown.text
        [silent] = [line for line in shown.json["missing"] if "n2" in line]
        assert silent.startswith("n2 does not answer: ")  # once is enough
        assert "\nn0 to n2: " in shown.text
        await cluster.down(3)
        await shown.until(lambda: shown.json["failures_tolerated"] == -1)
        assert "(quorums are 2 of 3 replicas; some keys have no quorum)" in shown.text
        await cluster.up(3)
        await cluster.up(2)
        await shown.until(lambda: "n2 has not compared all ranges yet with n0, n1, n3" in shown.json["missing"])
        hold()


async def test_status_says_that_two_nodes_tolerate_no_failure(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(2, factor=3) as cluster:
        shown = Shown(await cluster.client(), capsysbinary, monkeypatch)
        await shown.look()
        assert shown.json["failures_tolerated"] == 0 and shown.json["unchecked"] == ["n0", "n1"]
        too_few = "2 of 3 replicas exist: 1 more node is needed"
        assert shown.json["missing"] == not_whole(cluster.node(0)) == [too_few]
        assert shown.text.splitlines()[3:] == [
            "failures tolerated now: 0 (quorums are 2 of 2 replicas, as there are too few nodes for 3)",
            "replication is not whole:",
            too_few,
            "not checked, since repair.interval_ms is 0: whether replicas miss anything at n0, n1",
        ]


async def test_one_node_of_three_replicas_serves_and_is_waited_for_no_longer(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(1, factor=3) as cluster:
        client = await cluster.client()
        assert await client.wait_healthy(5) == ["n0"]
        shown = Shown(client, capsysbinary, monkeypatch)
        await shown.look()
        assert (shown.code, shown.json["ready"]) == (0, True) and not cluster.node(0).waiting_for
        assert shown.json["missing"] == ["1 of 3 replicas exist: 2 more nodes are needed"]
        assert not_whole(cluster.node(0)) == shown.json["missing"]
        [state] = shown.json["nodes"]  # and nobody has counted tombstones yet
        assert state["reclaim"]["tombstones"] is state["reclaim"]["oldest_tombstone_s"] is None
        assert shown.text.splitlines()[1].split()[-2:] == ["-", "0/0"]
