"""Members that stay but change: another weight, another disk under the old name; and plans of what would come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cluster import Cluster, KeptStore, until
from structlog.testing import capture_logs
from test_changes import HASTY, KEYS, blocked, filled, placed

from agi.core.dht.client.changes import Watch
from agi.core.dht.errors import ChangeRefused, InvalidRequest, Removed
from agi.core.dht.ring import token_bytes
from agi.core.dht.topology import Member, Topology
from agi.core.dht.types import MemberStatus

pytestmark = pytest.mark.usefixtures("hurried")

# --- weights


async def test_a_node_with_twice_the_weight_holds_more_and_gives_it_back() -> None:
    async with Cluster(5, settings={"dht.ring.virtual_nodes": 32}) as cluster:
        client = await filled(cluster)
        plan = await client.plan("weight", "n1", weight=3)
        assert plan["note"] == "n1 gets weight 3 instead of 1" and set(plan["moves"]) == {"n1"}
        share = plan["shares"]["n1"]
        assert share["before"] == pytest.approx(0.6, abs=0.2) and share["ideal"] == 1.0
        assert share["after"] - share["before"] == pytest.approx(plan["moves"]["n1"]["share"])
        assert cluster.node(0).epoch == 1
        before = sum(1 in cluster.holders(key) for key in KEYS)
        after = await client.set_weight("n1", 3)
        assert [member["weight"] for member in after["members"]] == [1, 3, 1, 1, 1] and after["epoch"] == 3
        await cluster.settled()
        assert placed(cluster)
        assert sum(1 in cluster.holders(key) for key in KEYS) > before
        assert (await client.set_weight("n1", 3))["epoch"] == 3  # it has it already
        await client.set_weight("n1", 0.5)
        await cluster.settled()
        assert placed(cluster)
        assert await client.get_many(KEYS) == {key: key.encode() for key in KEYS}


async def test_a_weight_is_cancelled() -> None:
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        end = cluster.rule(blocked)
        change = asyncio.create_task(client.set_weight("n1", 4))
        await until(lambda: cluster.node(0).known_topology.in_transition)
        with pytest.raises(ChangeRefused, match="another change is under way: n1 gets weight 4"):
            await client.set_weight("n2", 2)
        assert (await client.topology())["in_transition"]
        await until(lambda: not client._live().direct_reads)  # coordinators know both replica sets, clients do not
        topology = await client.cancel_change()
        assert {member["weight"] for member in topology["members"]} == {1.0}
        with pytest.raises(ChangeRefused, match=r"n1 has weight 1 at epoch 3 \(given up by order: n1 gets weight 4"):
            await change
        end()
        await client.wait_healthy(5)
        assert placed(cluster)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e9])
async def test_weights_that_are_none(weight: float) -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        with pytest.raises(InvalidRequest, match="a weight is above 0 and at most 8192"):
            await client.set_weight("n1", weight)
        with pytest.raises(InvalidRequest, match="no node 'n9'"):
            await client.set_weight("n9", 1)
        assert cluster.node(0).epoch == 1


# --- what would come


async def test_what_a_new_node_would_get_and_what_it_then_gets() -> None:
    async with Cluster(4, settings={"dht.ring.virtual_nodes": 32}) as cluster:
        client = await filled(cluster)
        plan = await client.plan("join", "n4", weight=1)
        assert plan["note"] == "n4 joins" and list(plan["moves"]) == ["n4"]
        assert plan["shares"]["n4"] == {
            "before": 0.0,
            "after": pytest.approx(plan["moves"]["n4"]["share"]),
            "ideal": pytest.approx(0.6),
        }
        assert (await client.plan("join", weight=3))["moves"]["(new node)"]["share"] > plan["moves"]["n4"]["share"]
        assert cluster.node(0).epoch == 1
        await cluster.add()
        got = sum(4 in cluster.holders(key) for key in KEYS)
        assert got / len(KEYS) == pytest.approx(plan["moves"]["n4"]["share"], abs=0.15)
        for what, name, kind, said in (
            ("join", "n1", InvalidRequest, "there is a node 'n1' in the cluster already"),
            ("replace", "n1", ChangeRefused, "n1, which is not held to be dead"),
            ("replace", "n9", InvalidRequest, "'n9', which is no member"),
            ("grow", "", InvalidRequest, "unknown change 'grow'"),
        ):
            with pytest.raises(kind, match=said):
                await client.plan(what, name)


async def test_a_replacement_is_planned() -> None:
    async with Cluster(4, settings=HASTY) as cluster:
        client = await filled(cluster)
        await cluster.down(3)
        await until(lambda: all(node.detector.status("n3") is MemberStatus.DEAD for node in cluster.living()))
        plan = await client.plan("replace", "n3")
        assert plan["note"] == "(new node) replaces n3" and "(new node)" in plan["moves"]
        assert plan["shares"]["n3"]["after"] == 0.0


# --- another disk under the old name


async def wiped(cluster: Cluster, i: int, **settings: object) -> None:
    """The node starts on an empty disk under its name."""
    await cluster.down(i)
    cluster.stores[i] = KeptStore(token_bytes("xxh3"))
    cluster._per_node = {i: settings}
    await cluster.up(i, wait=False)


async def test_a_wiped_disk_under_a_known_name_is_told_what_to_do_and_counts_nothing() -> None:
    async with Cluster(3, settings=HASTY) as cluster:
        await filled(cluster)
        await wiped(cluster, 1)
        node = cluster.node(1)
        await until(lambda: "came with a disk that the cluster does not know" in node.waiting_for)
        assert "start it with `--replace n1`, or let `agi-dht remove n1` take it out first" in node.waiting_for
        await asyncio.sleep(0.3)
        assert node.topology is None and cluster.node(0).epoch == 1
        assert "n1" not in cluster.node(0).peers.connected


async def test_a_wiped_disk_takes_the_place_of_the_old_one() -> None:
    async with Cluster(4, settings=HASTY) as cluster:
        client = await filled(cluster)
        old = cluster.stores[1]
        await wiped(cluster, 1, **{"dht.cluster.replaces": "n1"})
        await cluster.settled()
        await cluster.connected()
        topology = cluster.node(0).known_topology
        assert topology.note == "done: n1 joins in its own place, with a new disk" and topology.lost == ()
        assert topology.by_id.keys() == {"n0", "n1", "n2", "n3"} and topology.epoch == 3
        assert placed(cluster)
        assert await client.get_many(KEYS, consistency="ALL") == {key: key.encode() for key in KEYS}
        await cluster.down(1)
        await cluster.up(1)  # with the same command line: it is who it is
        assert cluster.node(1).epoch == 3
        # the old disk is a stranger now
        await cluster.down(1)
        cluster.stores[1] = old
        await cluster.up(1, wait=False)
        await until(lambda: cluster.fatal)
        assert isinstance(cluster.fatal[0], Removed) and cluster.node(0).epoch == 3


async def test_a_live_node_is_not_replaced_by_its_own_name() -> None:
    async with Cluster(3, settings=HASTY) as cluster:
        client = await filled(cluster)
        mine = cluster.node(1).known_topology.by_id["n1"]
        topology = cluster.node(0).known_topology
        with pytest.raises(ChangeRefused, match="n1, which is not held to be dead"):
            cluster.node(0).changes._joined(Member("n1", "another", mine.address), "n1", topology)
        assert await client.get_many(KEYS, consistency="ALL") == {key: key.encode() for key in KEYS}


async def test_nothing_of_a_new_disk_counts_before_it_is_filled() -> None:
    """What a quorum of the old disk and another one had acknowledged is read, whoever else is empty (I1)."""
    async with Cluster(3, settings=HASTY) as cluster:
        client = await filled(cluster)
        at_ms = cluster.clocks[0].wall_ms() + 1000
        await cluster.down(1)
        planted = cluster.plant(0, KEYS[0], b"only n0 and the old disk have it", at_ms=at_ms)
        cluster.rule(blocked)
        cluster.stores[1] = KeptStore(token_bytes("xxh3"))
        cluster._per_node = {1: {"dht.cluster.replaces": "n1"}}
        await cluster.up(1, wait=False)
        await until(lambda: all(node.topology is not None and node.topology.in_transition for node in cluster.living()))
        await cluster.connected()
        assert cluster.node(2).known_topology.lost[0].node_id == "n1"
        for i in range(3):
            reader = await cluster.client(i)
            assert await reader.get(KEYS[0]) == b"only n0 and the old disk have it"
        assert planted
        topology = await client.cancel_change()
        assert topology["lost"] == [] and len(topology["members"]) == 3
        await until(lambda: cluster.fatal)
        assert isinstance(cluster.fatal[0], Removed)


async def test_with_one_replica_a_lost_disk_is_not_replaced_silently() -> None:
    async with Cluster(3, factor=1, settings=HASTY) as cluster:
        client = await filled(cluster)
        await wiped(cluster, 1, **{"dht.cluster.replaces": "n1"})
        await asyncio.sleep(1.0)
        assert cluster.node(0).epoch == 1
        await cluster.down(1)
        await until(lambda: all(node.detector.status("n1") is MemberStatus.DEAD for node in cluster.living()))
        with pytest.raises(ChangeRefused, match="too few replicas are reachable"):
            await client.remove("n1")
        await client.remove("n1", lose_data=True)
        assert cluster.node(0).known_topology.by_id.keys() == {"n0", "n2"}


def test_a_place_that_is_given_up_goes_back_to_the_old_disk() -> None:
    members = [Member(f"n{i}", f"disk{i}", f"n{i}:7000") for i in range(3)]
    first = Topology.first("dht", 3, 8, "xxh3", members)
    joiner = Member("n1", "new", "n1:7100", state="joining")
    change = first.next([members[0], members[2], joiner], "n1 joins in its own place", 0, lost=(members[1],))
    assert change.in_transition and not change.recovering and change.origin == first.origin
    assert change.undone(0).members == first.members
    assert {m.disk_id for m in change.finished(0).members} == {"disk0", "new", "disk2"}
    # a recovery amid it undoes it first
    assert {m.node_id: m.disk_id for m in change.recovered(["n1"], 0).members} == {"n0": "disk0", "n2": "disk2"}


# --- how far it is


async def test_how_far_a_change_is_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.client.changes.PROGRESS_S", 0.0)
    monkeypatch.setattr("agi.core.dht.changes.TELL_S", 0.05)
    async with Cluster(4) as cluster:
        client = await filled(cluster)
        told: list[dict[str, Any]] = []
        end = cluster.rule(blocked)
        with capture_logs() as logs:
            change = asyncio.create_task(client.leave("n3", on_progress=told.append))
            await until(lambda: len(told) > 1 and told[-1]["arcs"])
            assert told[-1]["note"] == "n3 leaves" and told[-1]["arcs_done"] == told[-1]["keys"] == 0
            await until(lambda: any(line["event"] == "change_under_way" for line in logs))
        line = next(line for line in logs if line["event"] == "change_under_way")
        assert line["note"] == "n3 leaves" and line["log_level"] == "info"
        assert {"arcs", "arcs_done", "keys", "bytes", "bytes_per_s", "ready"} <= line.keys()
        end()
        await change
        brought = sum(node.migration.keys for node in cluster.living() if node.node_id != "n3")
        assert brought > 0


def test_progress_is_summed_over_nodes_and_counted_from_the_beginning() -> None:
    async def nothing() -> dict[str, Any]:
        return {}

    watch = Watch(nothing, nothing)
    watch._before = {"a": {"keys": 10, "bytes": 100}, "b": {"keys": 50, "bytes": 500}}
    state = {"arcs": 4, "arcs_done": 1}
    found = watch._sum(
        "n3 leaves",
        {
            "a": {**state, "keys": 12, "bytes": 120},
            "b": {**state, "keys": 3, "bytes": 30},
            "c": {**state, "keys": 1, "bytes": 10},
        },
    )  # b has restarted meanwhile
    assert found == {"note": "n3 leaves", "arcs": 12, "arcs_done": 3, "keys": 6, "bytes": 60}
