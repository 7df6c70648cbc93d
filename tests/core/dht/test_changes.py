"""Nodes that join, leave and are removed while the cluster runs: who may, what moves, and what requests see of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
from cluster import LOST, Cluster, until
from structlog.testing import capture_logs

from agi.core.dht.changes import Changes
from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ChangeRefused, DHTError, InvalidRequest, NotReady, Removed, Unavailable
from agi.core.dht.protocol.messages import (
    ArcListReply,
    EpochAccept,
    EpochPrepare,
    Hello,
    Message,
    Put,
    Scan,
    TopologyDigest,
    TopologyNews,
)
from agi.core.dht.protocol.view import GONE
from agi.core.dht.topology import Topology
from agi.core.dht.types import Consistency, MemberStatus

pytestmark = pytest.mark.usefixtures("hurried")
KEYS = [f"key:{number}" for number in range(120)]
HASTY = {
    "dht.health.heartbeat_interval_ms": 50,
    "dht.health.probe_timeout_ms": 20,
    "dht.health.failure_threshold": 1,
    "dht.health.suspicion_mult": 1,
    "dht.health.suspicion_max_mult": 1,
}


async def filled(cluster: Cluster) -> DHTClient:
    """A client that has put every key."""
    client = await cluster.client()
    await client.put_many({key: key.encode() for key in KEYS}, consistency=Consistency.ALL)
    return client


def placed(cluster: Cluster) -> bool:
    """Every key is held, alike, by each of its replicas of now."""
    for key in KEYS:
        held = cluster.held(key)
        records = {held[i] for i in cluster.holders(key)}
        if len(records) != 1 or None in records:
            return False
    return True


def blocked(src: str, dst: str, message: Message) -> tuple[float, ...] | None:
    """Nobody learns what others hold: no change comes to its end."""
    return () if isinstance(message, ArcListReply) else None


async def test_a_node_that_joins_gets_its_keys_and_no_others() -> None:
    async with Cluster(3) as cluster:
        client = await filled(cluster)
        await cluster.add()
        topology = cluster.node(0).known_topology
        assert [member.node_id for member in topology.members] == ["n0", "n1", "n2", "n3"]
        assert {member.state for member in topology.members} == {"normal"}
        assert topology.epoch == 3
        assert placed(cluster)
        own = {key for key in KEYS if 3 in cluster.holders(key)}
        assert 0 < len(own) < len(KEYS)
        assert {key for key in KEYS if cluster.held(key)[3] is not None} == own
        assert cluster.node(3).migration.keys == len(own)  # each came once
        assert await client.get_many(KEYS) == {key: key.encode() for key in KEYS}


async def test_a_node_joins_a_cluster_of_one_and_then_another() -> None:
    async with Cluster(1) as cluster:
        await filled(cluster)
        await cluster.add()
        await cluster.add()
        assert placed(cluster)
        assert all(None not in cluster.held(key) for key in KEYS)


async def test_a_node_that_leaves_hands_over_what_it_held_and_ends() -> None:
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        after = await client.leave("n3")
        assert [member["node_id"] for member in after["members"]] == ["n0", "n1", "n2"]
        await until(lambda: cluster.fatal)
        assert isinstance(cluster.fatal[0], Removed)
        await cluster.down(3)
        assert placed(cluster)
        assert await client.get_many(KEYS) == {key: key.encode() for key in KEYS}


async def test_a_dead_node_is_removed_and_its_replicas_are_made_anew() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        client = await filled(cluster)
        with pytest.raises(ChangeRefused, match="n4 is not held to be dead"):
            await client.remove("n4")
        await cluster.down(4)
        await until(lambda: all(node.detector.status("n4") is MemberStatus.DEAD for node in cluster.living()))
        with pytest.raises(ChangeRefused, match="n4 is dead: remove it"):
            await client.leave("n4")
        await client.remove("n4")
        await cluster.settled()
        assert placed(cluster)


async def test_a_dead_node_is_replaced_in_one_change() -> None:
    async with Cluster(4, settings=HASTY, per_node={4: {"dht.cluster.replaces": "n3"}}) as cluster:
        await filled(cluster)
        await cluster.down(3)
        joiner = await cluster.add()
        topology = cluster.node(0).known_topology
        assert topology.by_id.keys() == {"n0", "n1", "n2", "n4"}
        assert topology.note == "done: n4 replaces n3"
        assert placed(cluster)
        assert joiner.migration.keys > 0


async def test_a_node_that_lives_is_not_replaced() -> None:
    async with Cluster(3, per_node={3: {"dht.cluster.replaces": "n2"}}) as cluster:
        joiner = await cluster.add(wait=False)
        await until(lambda: "n3 is to replace n2, which is not held to be dead" in joiner.waiting_for)
        assert cluster.node(0).epoch == 1
        assert joiner.topology is None


async def test_a_plan_changes_nothing_and_foretells_what_moves() -> None:
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        before = {i: {key for key in KEYS if i in cluster.holders(key)} for i in range(4)}
        plan = await client.plan("leave", "n3")
        assert cluster.node(0).epoch == 1
        assert plan["note"] == "n3 leaves"
        await client.leave("n3")
        await until(lambda: cluster.fatal)
        await cluster.down(3)
        gained = {f"n{i}": sum(i in cluster.holders(key) and key not in before[i] for key in KEYS) for i in range(3)}
        assert plan["moves"].keys() == {name for name, keys in gained.items() if keys}
        assert sum(move["share"] for move in plan["moves"].values()) == pytest.approx(0.75, abs=0.15)
        for name, move in plan["moves"].items():
            assert move["keys"] == pytest.approx(gained[name], abs=25)


async def test_a_plan_tells_what_giving_a_node_up_for_lost_moves() -> None:
    async with Cluster(7, settings=HASTY) as cluster:
        client = await filled(cluster)
        await cluster.down(5)
        await cluster.down(6)
        await away(cluster, 5, 6)
        with pytest.raises(ChangeRefused, match="too few replicas are reachable"):
            await client.plan("remove", "n6")
        plan = await client.plan("remove", "n6", lose_data=True)
        assert plan["note"] == "n6 given up for lost" and plan["moves"] and "n6" not in plan["moves"]
        assert plan["shares"]["n6"]["before"] > 0 and plan["shares"]["n6"]["after"] == 0
        assert cluster.node(0).epoch == 1


async def away(cluster: Cluster, *indexes: int) -> None:
    """All nodes that are up hold these to be dead, or to have stopped."""
    names = [f"n{i}" for i in indexes]
    await until(lambda: all(node.detector.status(name) in GONE for node in cluster.living() for name in names))


async def noted(cluster: Cluster, i: int) -> None:
    """Every node that is up counts for how long that one is away."""
    await until(lambda: all(f"n{i}" in node.changes._away_since for node in cluster.living()))


def events(logs: list[MutableMapping[str, Any]], name: str) -> list[MutableMapping[str, Any]]:
    return [line for line in logs if line["event"] == name]


async def test_who_is_dead_for_long_is_evicted_unless_others_are_dead_too() -> None:
    settings = {**HASTY, "dht.migration.eviction_timeout_ms": 1000}
    async with Cluster(6, settings=settings) as cluster:
        await filled(cluster)
        await cluster.down(5)
        await cluster.settled()
        await until(lambda: "n5" not in cluster.node(0).known_topology.by_id)
        await cluster.settled()
        assert placed(cluster)
        epoch = cluster.node(0).epoch
        with capture_logs() as logs:
            await cluster.down(3)
            await cluster.down(4)
            await until(lambda: events(logs, "eviction_suspended"))
            await asyncio.sleep(0.5)
            assert cluster.node(0).epoch == epoch
        said = events(logs, "eviction_suspended")
        assert {line["reason"] for line in said} == {"n3, n4 are away at the same time"}
        assert len(said) <= 3  # once for each voter that lives, though each looks many times a second


async def test_evictions_go_on_when_only_one_is_left_that_is_away() -> None:
    settings = {**HASTY, "dht.migration.eviction_timeout_ms": 2500}
    async with Cluster(6, settings=settings) as cluster:
        await filled(cluster)
        with capture_logs() as logs:
            await cluster.down(4)
            await noted(cluster, 4)
            await cluster.down(5)
            await until(
                lambda: events(logs, "eviction_suspended")
            )  # though they went apart: n5 would have to take part
            assert cluster.node(0).epoch == 1
            await cluster.up(5)
            await until(lambda: "n4" not in cluster.node(0).known_topology.by_id)
        await cluster.settled()
        assert placed(cluster)


@pytest.mark.parametrize("timeout_ms", [2500, 0])
async def test_who_stopped_by_itself_and_stays_away_is_evicted_too(timeout_ms: int) -> None:
    """As long as it is away for less, as in a rolling restart, nothing happens."""
    async with Cluster(5, settings={**HASTY, "dht.migration.eviction_timeout_ms": timeout_ms}) as cluster:
        await filled(cluster)
        await cluster.node(4).stop()
        await cluster.down(4)
        await noted(cluster, 4)
        assert {node.detector.status("n4") for node in cluster.living()} == {MemberStatus.LEFT}
        await cluster.up(4)
        assert cluster.node(0).epoch == 1
        await cluster.node(4).stop()
        await cluster.down(4)
        if not timeout_ms:
            await asyncio.sleep(0.5)  # many looks
            assert cluster.node(0).epoch == 1
            return
        await until(lambda: "n4" not in cluster.node(0).known_topology.by_id)
        await cluster.settled()
        assert placed(cluster)


async def test_why_nobody_is_evicted_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuses(changes: Changes, change: object) -> Topology:
        raise ChangeRefused("too few replicas are reachable")

    settings = {**HASTY, "dht.migration.eviction_timeout_ms": 300}
    async with Cluster(5, settings=settings) as cluster:
        with capture_logs() as logs, monkeypatch.context() as broken:
            broken.setattr(Changes, "_propose", refuses)
            await cluster.down(4)
            await until(lambda: events(logs, "not_evicted"))
            await asyncio.sleep(0.5)
        said = events(logs, "not_evicted")
        assert len(said) <= 4 and said[0]["error"] == "too few replicas are reachable"  # once for each voter
    async with Cluster(3, settings=settings) as cluster:
        with capture_logs() as logs:
            await cluster.down(2)
            await until(lambda: events(logs, "eviction_suspended"))
        assert "without n2 fewer nodes than replicas" in events(logs, "eviction_suspended")[0]["reason"]


async def test_who_may_not_leave() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        with pytest.raises(ChangeRefused, match="2 nodes for 3 replicas"):
            await client.leave("n2")
        with pytest.raises(InvalidRequest, match="no node 'n9'"):
            await client.leave("n9")
        assert cluster.node(0).epoch == 1
        await client.leave("n2", force=True)
        await until(lambda: cluster.node(0).known_topology.by_id.keys() == {"n0", "n1"})
    async with Cluster(1, factor=1) as cluster:
        client = await cluster.client()
        with pytest.raises(ChangeRefused, match="the only node"):
            await client.leave("n0", force=True)


async def test_one_change_at_a_time_and_it_can_be_cancelled() -> None:
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        cluster.rule(blocked)
        await cluster.add(wait=False)
        await until(lambda: cluster.node(0).known_topology.in_transition)
        with pytest.raises(ChangeRefused, match="another change is under way: n4 joins"):
            await client.leave("n3")
        await until(lambda: "joining" in cluster.node(4).waiting_for)
        with pytest.raises(Unavailable, match="n4 is joining"):
            await client.wait_healthy(0.3)
        topology = await client.cancel_change()
        assert [member["node_id"] for member in topology["members"]] == ["n0", "n1", "n2", "n3"]
        await until(lambda: cluster.fatal)
        assert isinstance(cluster.fatal[0], Removed)
        await cluster.down(4)
        await client.wait_healthy(5)


async def test_a_leave_that_is_cancelled_is_no_success() -> None:
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        end = cluster.rule(blocked)
        leaving = asyncio.create_task(client.leave("n3"))
        await until(lambda: cluster.node(0).known_topology.in_transition)
        after = await client.cancel_change()
        assert after["note"] == "given up by order: n3 leaves"
        end()
        with pytest.raises(ChangeRefused, match=r"n3 is still a member at epoch 3 \(given up by order: n3 leaves\)"):
            await leaving
        assert (await client.cancel_change())["epoch"] == after["epoch"]  # nothing is under way
        assert (await client.leave("n3"))["epoch"] == 5


async def test_a_leave_that_is_given_up_for_a_member_that_died_is_no_success() -> None:
    async with Cluster(5, settings={**HASTY, "dht.migration.join_timeout_ms": 1000}) as cluster:
        client = await filled(cluster)
        cluster.rule(blocked)
        leaving = asyncio.create_task(client.leave("n4"))
        await until(lambda: all(node.known_topology.in_transition for node in cluster.living()))
        await cluster.down(3)
        with pytest.raises(ChangeRefused, match=r"n4 is still a member at epoch 3 \(given up: n4 leaves\)"):
            await leaving


async def test_who_waits_for_a_replacement_hears_that_it_was_cancelled() -> None:
    async with Cluster(4, settings=HASTY, per_node={4: {"dht.cluster.replaces": "n3"}}) as cluster:
        client = await filled(cluster)
        await cluster.down(3)
        await away(cluster, 3)
        waiting = asyncio.create_task(client.wait_replaced("n3", timeout=20))
        cluster.rule(blocked)
        await cluster.add(wait=False)
        await until(lambda: cluster.node(0).known_topology.in_transition)
        await asyncio.sleep(0.5)  # it has looked at the topology meanwhile
        await client.cancel_change()
        with pytest.raises(ChangeRefused, match=r"n3 is still a member at epoch 3 \(given up by order: n4 replaces n3"):
            await waiting


async def test_an_eviction_is_told_by_the_voter_whose_proposal_was_chosen() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        await filled(cluster)
        await cluster.down(4)
        await away(cluster, 4)
        with capture_logs() as logs:
            await asyncio.gather(*(node.changes._remove("n4", 3.0, 0.0) for node in cluster.living()))
        assert [(line["member"], line["away_s"]) for line in events(logs, "evicted")] == [("n4", 3)]
        await cluster.settled()


async def test_a_change_is_given_up_when_the_joiner_is_dead_for_long() -> None:
    settings = {**HASTY, "dht.migration.join_timeout_ms": 1000}
    async with Cluster(3, settings=settings) as cluster:
        cluster.rule(blocked)
        await cluster.add(wait=False)
        await until(lambda: all(node.topology and node.topology.in_transition for node in cluster.living()))
        await cluster.down(3)
        await cluster.settled()
        assert "given up" in cluster.node(0).known_topology.note
        assert "n3" not in cluster.node(0).known_topology.by_id


async def test_a_member_dies_amid_a_join_and_all_of_it_ends_by_itself() -> None:
    """n3 would have to fill itself for the change: it is given up, n3 evicted, and the joiner taken in when it asks
    again, as its process does (server.py)."""
    settings = {**HASTY, "dht.migration.join_timeout_ms": 1000, "dht.migration.eviction_timeout_ms": 5000}
    async with Cluster(5, settings=settings) as cluster:
        client = await filled(cluster)
        end = cluster.rule(blocked)
        await cluster.add(wait=False)
        await until(lambda: all(node.topology and node.topology.in_transition for node in cluster.living()))
        await cluster.down(3)
        end()
        await until(lambda: cluster.fatal)
        error = cluster.fatal.pop()
        assert isinstance(error, Removed) and error.asks_again and "given up: n5 joins" in str(error)
        await cluster.down(5)
        joiner = await cluster.renewed(5)

        def members() -> Collection[str]:
            return cluster.node(0).known_topology.by_id.keys()

        await until(lambda: "n3 would have to take part, but is away" in joiner.waiting_for or "n3" not in members())
        await cluster.settled()
        topology = cluster.node(0).known_topology
        assert topology.by_id.keys() == {"n0", "n1", "n2", "n4", "n5"}
        notes = [past.note for past in await cluster.node(0).epochs.history()]
        assert notes[1:] == [
            "n5 joins",
            "given up: n5 joins",
            "n3 is removed",
            "done: n3 is removed",
            "n5 joins",
            "done: n5 joins",
        ]
        assert not cluster.fatal
        assert placed(cluster)
        assert await client.get_many(KEYS) == {key: key.encode() for key in KEYS}


async def test_a_member_that_comes_back_in_time_completes_the_change() -> None:
    settings = {**HASTY, "dht.migration.join_timeout_ms": 8000, "dht.migration.eviction_timeout_ms": 300}
    async with Cluster(5, settings=settings) as cluster:
        await filled(cluster)
        end = cluster.rule(blocked)
        await cluster.add(wait=False)
        await until(lambda: all(node.topology and node.topology.in_transition for node in cluster.living()))
        await cluster.down(3)
        end()
        await away(cluster, 3)
        await asyncio.sleep(0.6)  # nobody is evicted in a transition
        await cluster.up(3)
        await cluster.settled()
        assert cluster.node(0).epoch == 3
        assert placed(cluster)


async def test_a_node_that_leaves_need_not_live_to_the_end_of_it() -> None:
    settings = {**HASTY, "dht.migration.join_timeout_ms": 1000}
    async with Cluster(5, settings=settings) as cluster:
        client = await filled(cluster)
        end = cluster.rule(blocked)
        leaving = asyncio.create_task(client.leave("n4"))
        await until(lambda: all(node.topology and node.topology.in_transition for node in cluster.living()))
        await cluster.down(4)
        await away(cluster, 4)
        await asyncio.sleep(1.5)
        assert cluster.node(0).known_topology.in_transition
        end()
        assert (await leaving)["note"] == "done: n4 leaves"
        assert placed(cluster)


async def test_no_change_is_begun_that_needs_who_is_away_for_long() -> None:
    settings = {**HASTY, "dht.migration.join_timeout_ms": 1000}
    async with Cluster(6, factor=1, settings=settings) as cluster:
        client = await cluster.client()
        await cluster.down(5)
        await until(
            lambda: all(node.changes._away_s(node.clock.monotonic()).get("n5", 0) > 1 for node in cluster.living())
        )
        with pytest.raises(ChangeRefused, match="n5 would have to take part, but is away for long"):
            await client.leave("n4")
        assert cluster.node(0).epoch == 1


async def test_a_recovery_is_not_given_up_when_another_member_dies() -> None:
    settings = {**HASTY, "dht.migration.join_timeout_ms": 1000}
    async with Cluster(5, settings=settings) as cluster:
        client = await filled(cluster)
        await cluster.down(4)
        await away(cluster, 4)
        end = cluster.rule(blocked)
        change = asyncio.create_task(client.remove("n4", lose_data=True))
        await until(lambda: all(node.known_topology.recovering for node in cluster.living()))
        await cluster.down(3)
        await away(cluster, 3)
        with capture_logs() as logs:
            await asyncio.sleep(1.5)
        assert cluster.node(0).known_topology.recovering
        assert not events(logs, "change_not_ended")  # nothing is tried that is bound to be refused
        end()
        await cluster.up(3)
        assert (await change)["note"] == "done: n4 given up for lost"
        await cluster.settled()


async def test_who_is_cancelled_does_not_ask_again() -> None:
    async with Cluster(3) as cluster:
        client = await filled(cluster)
        cluster.rule(blocked)
        await cluster.add(wait=False)
        await until(lambda: cluster.node(3).topology is not None)
        await client.cancel_change()
        await until(lambda: cluster.fatal)
        error = cluster.fatal[0]
        assert isinstance(error, Removed) and not error.asks_again


async def test_no_final_epoch_before_every_node_holds_its_part() -> None:
    """n1 takes part in the change too: while it cannot learn what others hold, a full newcomer is not enough."""
    async with Cluster(3) as cluster:
        await filled(cluster)
        end = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ArcListReply) and dst == "n1" else None)
        await cluster.add(wait=False)
        await until(lambda: cluster.node(3).topology is not None and cluster.node(3).migration.ready)
        await asyncio.sleep(0.5)  # many looks
        assert cluster.node(0).known_topology.in_transition
        end()
        await cluster.settled()


async def test_a_source_that_has_not_adopted_the_change_is_not_copied() -> None:
    async with Cluster(3) as cluster:
        await filled(cluster)
        told = TopologyNews | TopologyDigest | Hello | EpochPrepare | EpochAccept
        end = cluster.rule(lambda src, dst, m: LOST if "n2" in (src, dst) and isinstance(m, told) else None)
        await cluster.add(wait=False)
        await until(lambda: cluster.node(3).topology is not None)
        await until(lambda: cluster.node(3).migration.ready)
        assert cluster.node(2).epoch == 1
        assert cluster.node(0).known_topology.in_transition  # n2 is to hold what the change gives it, too
        end()
        await cluster.settled()
        assert placed(cluster)


async def test_who_cannot_be_reached_where_it_says_does_not_join() -> None:
    async with Cluster(3) as cluster:
        node = await cluster.add(wait=False, address="nowhere:7000")
        await until(lambda: "cannot connect to nowhere:7000" in node.waiting_for)
        assert cluster.node(0).epoch == 1
        assert node.topology is None


async def test_no_call_fails_while_nodes_join_and_leave() -> None:
    async with Cluster(3) as cluster:
        client = await filled(cluster)
        failures: list[BaseException] = []
        calls = 0
        stop = False

        async def load(number: int) -> None:
            nonlocal calls
            turn = 0
            while not stop:
                key = KEYS[(number * 31 + turn) % len(KEYS)]
                turn += 1
                value = f"{number}:{turn}".encode()
                try:
                    await client.put(key, value)
                    assert await client.get(key) is not None
                    if turn % 20 == 0:
                        assert len(await client.scan("key:", limit=200)) == len(KEYS)
                except (DHTError, AssertionError) as error:
                    failures.append(error)
                calls += 1
                await asyncio.sleep(0)

        workers = [asyncio.create_task(load(number)) for number in range(4)]
        await cluster.add()
        await cluster.add()
        await client.leave("n0")
        await until(lambda: cluster.fatal)
        await cluster.down(0)
        await asyncio.sleep(0.2)
        stop = True
        await asyncio.gather(*workers)
        assert calls > 100
        assert failures == []


async def test_a_folder_that_was_let_go_is_a_stranger() -> None:
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        await client.leave("n3")
        await until(lambda: cluster.fatal)
        await cluster.down(3)
        cluster.fatal.clear()
        with contextlib.suppress(NotReady):
            await cluster.up(3, wait=False)
        await until(lambda: cluster.fatal)
        assert isinstance(cluster.fatal[0], Removed)
        assert "n3" not in cluster.node(0).known_topology.by_id


async def test_who_is_to_gain_arcs_makes_room_before_the_change_and_not_while_requests_wait_for_it() -> None:
    async with Cluster(3) as cluster:
        client = await filled(cluster)
        await cluster.add()
        await cluster.settled()
        left_over = sum(cluster.held(key)[i] is not None for key in KEYS for i in {0, 1, 2} - set(cluster.holders(key)))
        assert left_over > len(KEYS) / 4
        with capture_logs() as logs:
            await client.leave("n3")
        assert not [entry for entry in logs if entry["event"] in ("room_made", "room_not_made")]
        assert placed(cluster)
        assert sum(node.reclaimer.dropped for node in cluster.living()) == left_over


async def test_a_client_that_hears_that_a_node_does_not_serve_asks_others_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agi.core.dht.client.session.REFRESH_MIN_S", 1000.0)
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        session = client._session
        assert session is not None
        cluster.node(3)._leaving = True
        asked: list[str] = []
        waited: list[DHTError] = []
        session._later = lambda _, error: waited.append(error)  # type: ignore[method-assign]  # to see it
        cluster.rule(lambda src, dst, message: asked.append(dst) if isinstance(message, Put | Scan) else None)
        for key in KEYS:
            await client.put(key, b"new")
            assert len(await client.scan(key, 1)) == 1
        assert not waited and len(asked) >= 2 * len(KEYS)
        assert asked.count("n3") == 1  # until the topology is asked for again


async def test_a_node_fills_itself_without_pause_unless_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3) as cluster:
        client = await filled(cluster)
        migration = cluster.node(0).migration
        me, paused, sleep = asyncio.current_task(), list[float](), asyncio.sleep

        async def noted(delay: float, result: object = None) -> object:
            if asyncio.current_task() is me and delay > 0.02:
                paused.append(delay)
            return await sleep(delay, result)

        monkeypatch.setattr(asyncio, "sleep", noted)
        await migration._requests_first()
        paused.clear()
        monkeypatch.setattr(migration, "_clock", SimpleNamespace(monotonic=lambda: 0.0))
        migration._resumed = -0.1
        await migration._requests_first()
        assert paused == []
        for filling, pause_s in ((1, 0.15), (2, 0.2), (30, 0.25)):
            migration._filling = filling
            await client.get_many(KEYS, consistency=Consistency.ALL)
            migration._resumed = -0.1
            await migration._requests_first()
            assert paused == [pytest.approx(pause_s)]
            paused.clear()


async def test_a_client_gives_a_leaving_node_no_more_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.client.session.REFRESH_S", 0.02)
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        end = cluster.rule(blocked)
        leaving = asyncio.ensure_future(client.leave("n3"))
        await until(lambda: client._session is not None and client._session._unready == {"n3"})
        asked: list[str] = []
        watching = cluster.rule(lambda src, dst, message: asked.append(dst) if isinstance(message, Put) else None)
        for key in KEYS:
            await client.put(key, b"new")
        watching()
        assert len(asked) >= len(KEYS) and "n3" not in asked
        end()
        await leaving
