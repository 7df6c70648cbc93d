"""Quorum reads by the client itself where not every node holds every key."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from cluster import Cluster, until

from agi.core.dht.client.routing import readers
from agi.core.dht.protocol.messages import Get, Message, ReplicaRead, ReplicaReadReply
from agi.core.dht.ring import Ring
from agi.core.dht.types import Node

NAMES = [f"k{i}" for i in range(40)]
ITEMS = {name: name.encode() * 3 for name in NAMES}


def asked(cluster: Cluster) -> list[tuple[str, ReplicaRead | Get]]:
    """What the client asks, as (destination, message)."""
    seen: list[tuple[str, ReplicaRead | Get]] = []

    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        if src == "client" and isinstance(message, ReplicaRead | Get):
            seen.append((dst, message))
        return None

    cluster.rule(rule)
    return seen


async def filled(cluster: Cluster) -> None:
    for name in NAMES:
        for i in cluster.holders(name):
            cluster.plant(i, name, ITEMS[name], at_ms=1000, writer=1)


async def test_a_batch_asks_each_node_once_and_a_quorum_of_each_keys_replicas() -> None:
    async with Cluster(5) as cluster:
        await filled(cluster)
        client = await cluster.client()
        seen = asked(cluster)
        idle = Counter[str]()
        for _ in range(10):
            seen.clear()
            assert await client.get_many(NAMES) == ITEMS
            assert all(isinstance(message, ReplicaRead) for _, message in seen)
            by_node = Counter(dst for dst, _ in seen)
            assert max(by_node.values()) == 1 and len(by_node) <= 4  # of three replicas one is not needed
            idle.update(set(cluster.names) - set(by_node))
            of_key = Counter(key for _, message in seen for key in message.keys)
            assert of_key == {name.encode(): 2 for name in NAMES}
            for dst, message in seen:
                assert all(int(dst[1]) in cluster.holders(key.decode()) for key in message.keys)
        assert len(idle) == 5  # each is left out in its turn


async def test_only_the_keys_on_which_replicas_differ_go_to_a_coordinator() -> None:
    async with Cluster(5) as cluster:
        await filled(cluster)
        client = await cluster.client()
        differ = NAMES[3:40:9]
        for _ in range(4):
            for name in differ:
                cluster.plant(cluster.holders(name)[0], name, b"newer", at_ms=2000)
                for i in cluster.holders(name)[1:]:
                    cluster.plant(i, name, b"older", at_ms=1000, writer=1)
            seen = asked(cluster)
            found = await client.get_many(NAMES)
            assert {name: value for name, value in found.items() if name not in differ} == {
                name: value for name, value in ITEMS.items() if name not in differ
            }
            assert {found[name] for name in differ} <= {b"newer", b"older"}
            fallen = {key.decode() for _, message in seen if isinstance(message, Get) for key in message.keys}
            assert fallen <= set(differ)
            newer = {name for name in differ if found[name] == b"newer"}
            assert newer <= fallen or not newer
            for name in newer:  # what was returned is on a quorum
                held = [record for record in cluster.held(name) if record is not None]
                assert sum(record.endswith(b"newer") for record in held) >= 2


async def test_what_hangs_on_a_clock_goes_to_a_coordinator_alone() -> None:
    async with Cluster(5) as cluster:
        client = await cluster.client()
        await client.put_many(ITEMS, consistency="ALL")
        await client.put("k7", b"short", ttl_seconds=60, consistency="ALL")
        await client.delete("k9", consistency="ALL")
        seen = asked(cluster)
        assert await client.get_many(NAMES) == {**ITEMS, "k7": b"short", "k9": None}
        assert [message.keys for _, message in seen if isinstance(message, Get)] == [[b"k7"]]


async def test_a_node_that_is_lost_or_late_costs_only_its_own_keys() -> None:
    async with Cluster(5) as cluster:
        await filled(cluster)
        client = await cluster.client()
        hold = cluster.rule(lambda src, dst, m: (0.6,) if src == "n1" and isinstance(m, ReplicaReadReply) else None)
        seen = asked(cluster)
        for _ in range(3):
            assert await client.get_many(NAMES) == ITEMS
        fallen = {key.decode() for _, message in seen if isinstance(message, Get) for key in message.keys}
        assert fallen and all(1 in cluster.holders(name) for name in fallen)
        hold()
        await cluster.down(1)
        await until(lambda: len(client._live().up) == 4)
        seen.clear()
        assert await client.get_many(NAMES) == ITEMS
        assert all(isinstance(message, ReplicaRead) for _, message in seen)
        await cluster.down(2)
        await until(lambda: len(client._live().up) == 3)
        both = [name for name in NAMES if not {1, 2} <= set(cluster.holders(name))]
        assert await client.get_many(both) == {name: ITEMS[name] for name in both}


async def test_where_all_are_late_they_are_not_all_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.client.direct.SPARED_MAX", 2.0)
    async with Cluster(3) as cluster:
        await filled(cluster)
        client = await cluster.client(timeout=20.0)
        late = cluster.rule(lambda src, dst, m: (0.4,) if isinstance(m, ReplicaReadReply) and dst == "client" else None)
        seen = asked(cluster)
        for _ in range(6):
            assert await client.get(NAMES[0]) == ITEMS[NAMES[0]]
        assert sum(isinstance(message, Get) for _, message in seen) == 2
        assert sum(isinstance(message, ReplicaRead) for _, message in seen) == 6 * 2
        late()
        assert await client.get(NAMES[0]) == ITEMS[NAMES[0]]
        await until(lambda: client._live().direct._credit >= 2)  # one that was in time lets two others be asked again
        cluster.rule(lambda src, dst, m: () if isinstance(m, ReplicaReadReply) and dst == "client" else None)
        seen.clear()
        assert await client.get(NAMES[0], timeout=4.0) == ITEMS[NAMES[0]]
        assert await client.get(NAMES[0], timeout=4.0) == ITEMS[NAMES[0]]
        assert await client.get(NAMES[0], timeout=4.0) == ITEMS[NAMES[0]]  # after half of its time
        assert sum(isinstance(message, Get) for _, message in seen) == 3


async def test_doubled_replies_do_not_count_for_two() -> None:
    async with Cluster(5) as cluster:
        await filled(cluster)
        client = await cluster.client()
        for name in NAMES:
            cluster.plant(cluster.holders(name)[0], name, b"newer", at_ms=2000)

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            return (0.0, 0.0, 0.01) if dst == "client" and isinstance(message, ReplicaReadReply) else None

        cluster.rule(rule)
        first = await client.get_many(NAMES)
        for _ in range(6):  # monotonic: what was returned once is returned from then on
            found = await client.get_many(NAMES)
            assert all(found[name] == b"newer" for name in NAMES if first[name] == b"newer")
            first = found


async def test_a_node_that_is_no_member_any_more_is_asked_nothing_from_that_moment() -> None:
    async with Cluster(5) as cluster:
        await filled(cluster)
        client = await cluster.client()
        session = client._live()
        members = [member for member in session.topology["members"] if member["node_id"] != "n4"]
        calls = [asyncio.create_task(client.get_many(NAMES)) for _ in range(3)]
        session.adopt({**session.topology, "members": members})
        assert sorted(remote.node_id for remote in session.up) == sorted(session.nodes) == ["n0", "n1", "n2", "n3"]
        seen = asked(cluster)
        await asyncio.gather(*calls)
        assert seen and all(dst != "n4" for dst, _ in seen)


def test_few_nodes_are_asked_and_none_where_a_key_has_too_few() -> None:
    nodes = [Node(f"n{i}", "127.0.0.1", 7000) for i in range(8)]
    ring = Ring(nodes, factor=3)
    names = [node.node_id for node in nodes]
    keys = [b"key%d" % i for i in range(200)]
    for needed in (1, 2, 3):
        for turn in range(8):
            by_node = readers(keys, names, ring, needed, turn)
            assert by_node is not None
            places = Counter(place for found in by_node.values() for place in found)
            assert places == dict.fromkeys(range(200), needed)
            assert all(name in ring.replicas(keys[place]) for name, found in by_node.items() for place in found)
            assert all(0 in found[:1] for found in by_node.values() if 0 in found)
            assert len(by_node) <= 5 + needed
    assert readers(keys, names[:6], ring, 2, 0) is None
    assert readers(keys, [], ring, 1, 3) is None
