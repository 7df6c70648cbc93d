"""A majority of the voters is lost for ever: what an operator may order, what comes of it, and of who comes back."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from cluster import LOST, Cluster, until
from test_changes import HASTY, KEYS, blocked, filled, placed

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import (
    ChangeRefused,
    ClusterError,
    DHTError,
    InvalidRequest,
    NotReady,
    OutcomeUnknown,
    Removed,
    Unavailable,
)
from agi.core.dht.joint import JointSet
from agi.core.dht.protocol.messages import ArcListReply, EpochAccept, EpochReply, Message, TopologyDigest, TopologyNews
from agi.core.dht.topology import GENERATION_EPOCHS
from agi.core.dht.types import MemberStatus

pytestmark = pytest.mark.usefixtures("hurried")


async def noticed(cluster: Cluster, *dead: int) -> None:
    """Until all who live hold these to be dead."""
    names = [f"n{i}" for i in dead]
    await until(
        lambda: all(
            node.detector.status(name) is MemberStatus.DEAD and name not in node.peers.usable
            for node in cluster.living()
            for name in names
        )
    )


async def maimed(cluster: Cluster, *dead: int) -> DHTClient:
    """A client of a full cluster that has lost these."""
    client = await filled(cluster)
    for i in dead:
        await cluster.down(i)
    await noticed(cluster, *dead)
    return client


def generations(cluster: Cluster) -> set[tuple[int, int]]:
    return {node.known_topology.order for node in cluster.living()}


async def test_three_of_five_are_lost_and_the_cluster_goes_on_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        client = await maimed(cluster, 2, 3, 4)
        with pytest.raises(ChangeRefused, match="too few replicas are reachable"):
            await client.remove("n4")
        with monkeypatch.context() as impatient:
            impatient.setattr("agi.core.dht.changes.PROPOSE_TIMEOUT_S", 1.0)
            with pytest.raises((Unavailable, OutcomeUnknown), match="epoch 2 could not be decided"):
                await client.remove("n4", lose_data=True)
        kept = [key for key in KEYS if any(i < 2 for i in cluster.holders(key))]
        gone = set(KEYS) - set(kept)
        plan = await client.plan("recover", lost=["n2", "n3", "n4"])
        assert (plan["generation"], plan["epoch"], plan["voters"]) == (2, 1 + GENERATION_EPOCHS, ["n0"])
        assert plan["lost"] == ["n2", "n3", "n4"] and plan["survivors"] == ["n0", "n1"]
        assert plan["gone_share"] == pytest.approx(len(gone) / len(KEYS), abs=0.1) and gone
        assert plan["gone_share"] < plan["doubtful_share"] < 1
        assert generations(cluster) == {(1, 1)}
        after = await client.recover(["n2", "n3", "n4"], confirm="dht")
        assert [member["node_id"] for member in after["members"]] == ["n0", "n1"] and after["generation"] == 2
        await cluster.settled()
        assert generations(cluster) == {(2, 2 + GENERATION_EPOCHS)}
        assert cluster.node(0).known_topology.lost == ()
        found = await client.get_many(KEYS)
        assert {key for key, value in found.items() if value is not None} == set(kept)
        assert all(None not in cluster.held(key)[:2] for key in kept)  # both hold all that is left
        await client.put_many(dict.fromkeys(KEYS, b"new"))
        await cluster.add()
        assert placed(cluster)
        assert set((await client.get_many(KEYS)).values()) == {b"new"}


async def test_a_leave_that_a_recovery_undid_is_no_success() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        client = await filled(cluster)
        end = cluster.rule(lambda src, dst, message: () if isinstance(message, ArcListReply) else None)
        leaving = asyncio.create_task(client.leave("n4"))
        await until(lambda: all(node.known_topology.in_transition for node in cluster.living()))
        for i in (0, 1, 2):
            await cluster.down(i)
        await noticed(cluster, 0, 1, 2)
        end()
        after = await client.recover(["n0", "n1", "n2"], confirm="dht")
        assert [member["node_id"] for member in after["members"]] == ["n3", "n4"]
        with pytest.raises(ChangeRefused, match=r"at epoch 1003 \(done: recovered without n0, n1, n2\)"):
            await leaving


async def test_what_cannot_be_a_lost_majority_is_refused_and_changes_nothing() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        client = await maimed(cluster, 3, 4)
        for lost, kind, said in (
            (["n3", "n4"], ChangeRefused, r"reaches a majority of the voters \(n0, n1, n2\)"),
            ([], InvalidRequest, "nobody is named"),
            (["n9"], InvalidRequest, "no node 'n9'"),
        ):
            with pytest.raises(kind, match=said):
                await client.plan("recover", lost=lost)
            with pytest.raises(kind, match=said):
                await client.recover(lost, confirm="dht")
        await cluster.down(2)
        await noticed(cluster, 2)
        for lost, kind, said in (
            (["n3", "n4"], ChangeRefused, "n2: neither named as lost nor reached from n[01]"),
            (["n1", "n2", "n3", "n4"], DHTError, "n1 cannot be lost: n0 is connected|n1 is asked itself"),
            (["n0", "n1", "n2", "n3", "n4"], InvalidRequest, "cannot be lost: ask a node that survives"),
        ):
            with pytest.raises(kind, match=said):
                await client.recover(lost, confirm="dht")
        with pytest.raises(InvalidRequest, match="confirmed by the cluster's name, which is not 'dth'"):
            await client.recover(["n2", "n3", "n4"], confirm="dth")
        assert generations(cluster) == {(1, 1)}


async def test_who_comes_back_from_the_dead_is_let_go() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        client = await maimed(cluster, 2, 3, 4)
        await client.recover(["n2", "n3", "n4"], confirm="dht")
        for i in (2, 3):  # a majority of the old voters they are not, and could not decide anything if they were
            with contextlib.suppress(NotReady):
                await cluster.up(i, wait=False)
            await until(lambda: cluster.fatal)
            assert isinstance(cluster.fatal[0], Removed) and "recovered without n2, n3, n4" in str(cluster.fatal[0])
            await cluster.down(i, noticed=False)
            cluster.fatal.clear()
        assert generations(cluster) == {(2, 2 + GENERATION_EPOCHS)}


async def test_two_operators_at_two_nodes_get_one_outcome() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        await maimed(cluster, 2, 3, 4)
        lost = ["n2", "n3", "n4"]
        end = cluster.rule(blocked)  # the recovery is not over before both know of it
        one, other = await asyncio.gather(*(cluster.node(i).epochs.recovery.propose(lost, 5.0) for i in range(2)))
        assert one.digest == other.digest
        end()
        await cluster.settled()
        assert generations(cluster) == {(2, 2 + GENERATION_EPOCHS)} and not cluster.fatal


async def test_two_halves_that_gave_each_other_up_stop_when_they_meet() -> None:
    async with Cluster(5, settings=HASTY, hasty=True) as cluster:
        await filled(cluster)
        await cluster.down(4)
        halves = ({"n0", "n1"}, {"n2", "n3"})
        end = cluster.rule(
            lambda src, dst, message: LOST if any((src in half) != (dst in half) for half in halves) else None
        )
        await until(
            lambda: all(
                node.peers.usable.keys() == half - {node.node_id} and len(node.peers.connected) == 1
                for node in cluster.living()
                for half in halves
                if node.node_id in half
            )
        )
        one = await cluster.node(0).epochs.recovery.propose(["n2", "n3", "n4"], 5.0)
        other = await cluster.node(2).epochs.recovery.propose(["n0", "n1", "n4"], 5.0)
        assert one.order == other.order and one.digest != other.digest
        assert not cluster.fatal
        end()
        cluster.node(0).epochs.hear_of(cluster.node(0).known_topology, "n1")
        with pytest.raises(ClusterError, match="has another epoch"):
            cluster.node(0).epochs.hear_of(cluster.node(2).known_topology, "n2")
        assert isinstance(cluster.node(0).fatal, ClusterError)


async def test_what_one_operator_began_the_next_one_completes() -> None:
    """The first one's node dies between the consents and their outcome."""
    async with Cluster(5, settings=HASTY) as cluster:
        await maimed(cluster, 3, 4)
        await cluster.down(2)
        await noticed(cluster, 2)
        replies: list[EpochReply] = []

        def unheard(src: str, dst: str, message: Message) -> tuple[float, ...] | None:
            if isinstance(message, EpochReply) and src == "n1" and message.accepted != (0, 0):
                replies.append(message)
                return ()
            return () if dst == "n1" and isinstance(message, TopologyNews | TopologyDigest) else None

        end = cluster.rule(unheard)
        with pytest.raises(OutcomeUnknown, match="generation 2 is not agreed"):
            await cluster.node(0).epochs.recovery.propose(["n2", "n3", "n4"], 0.1)
        assert replies and generations(cluster) == {(1, 1)}
        end()
        before = [await node._ledger.recovery() for node in cluster.living()]
        assert all(promise is not None and promise.value for promise in before)
        await cluster.down(1)
        await cluster.up(1)  # what it consented to outlives a restart
        topology = await cluster.node(1).epochs.recovery.propose(["n2", "n3", "n4"], 5.0)
        assert before[0] is not None and topology.packed == before[0].value  # the first one's, to the millisecond
        await cluster.settled()


async def test_a_consent_that_could_not_be_stored_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        await maimed(cluster, 2, 3, 4)

        async def full(promise: object) -> None:
            raise Unavailable("the disk is gone")

        with monkeypatch.context() as broken:
            broken.setattr(cluster.node(1)._ledger, "store_recovery", full)
            with pytest.raises(Unavailable, match="the disk is gone"):
                await cluster.node(0).epochs.recovery.propose(["n2", "n3", "n4"], 0.1)
        assert generations(cluster) == {(1, 1)}
        await cluster.node(0).epochs.recovery.propose(["n2", "n3", "n4"], 5.0)
        await cluster.settled()


async def test_a_survivor_that_knows_a_newer_epoch_is_not_overruled() -> None:
    async with Cluster(5, settings=HASTY) as cluster:
        await maimed(cluster, 2, 3, 4)
        base = cluster.node(0).known_topology
        await cluster.node(1).epochs.adopt(base.next(base.members, "n1 heard of it, n0 did not", 0))
        accept = EpochAccept(1, 1 + GENERATION_EPOCHS, (1, 1), base.recovered(["n2", "n3", "n4"], 0).packed, 2)
        with pytest.raises(ChangeRefused, match="n1 has come to epoch 2 meanwhile"):
            await cluster.node(1).epochs.recovery.vote(accept)
        topology = await cluster.node(0).epochs.recovery.propose(["n2", "n3", "n4"], 5.0)
        assert topology.epoch == 2 + GENERATION_EPOCHS  # built on what n1 knew


async def test_at_five_replicas_a_write_that_one_survivor_alone_holds_is_found_again() -> None:
    """Three of five had acknowledged it, two of them are lost: a majority of those left may not hold it."""
    async with Cluster(5, factor=5, settings=HASTY) as cluster:
        client = await cluster.client()
        for i in (2, 3, 4):
            await cluster.down(i)
        for i in (0, 3, 4):
            cluster.plant(i, "k", b"v", at_ms=cluster.clocks[0].wall_ms())
        await cluster.up(2)
        await noticed(cluster, 3, 4)
        end = cluster.rule(lambda src, dst, message: () if isinstance(message, ArcListReply) and src == "n0" else None)
        base = cluster.node(0).known_topology
        topology = base.without(["n3", "n4"], "n3, n4 given up for lost", 0)
        ring = topology.ring()
        assert all(isinstance(part.replicas, JointSet) and part.replicas.sources == 3 for part in ring.partitions())
        change = asyncio.create_task(client.remove("n4", lose_data=True, force=True))
        await until(lambda: cluster.node(0).known_topology.recovering)
        change2 = asyncio.create_task(client.remove("n3", lose_data=True, force=True))
        await until(lambda: len(cluster.node(0).known_topology.lost) == 2)
        await asyncio.sleep(0.5)
        assert not cluster.node(1).migration.ready  # n2 alone is not enough
        end()
        await asyncio.gather(change, change2)
        assert all(cluster.held("k")[:3])


async def test_too_few_replicas_are_left_though_the_voters_are_there() -> None:
    async with Cluster(7, settings=HASTY) as cluster:
        client = await maimed(cluster, 5, 6)
        with pytest.raises(ChangeRefused, match="too few replicas are reachable"):
            await client.remove("n6")
        end = cluster.rule(lambda src, dst, message: () if isinstance(message, ArcListReply) else None)
        first = asyncio.create_task(client.remove("n6", lose_data=True))
        await until(lambda: cluster.node(0).known_topology.recovering)
        with pytest.raises(ChangeRefused, match="a recovery cannot be undone"):
            await client.cancel_change()
        end()
        after = await client.remove("n5", lose_data=True)  # it goes on for both
        assert "n6, n5 given up for lost" in after["note"]
        assert (await first)["epoch"] == after["epoch"] and after["generation"] == 1
        await cluster.settled()
        found = await client.get_many(KEYS)
        assert {key for key, value in found.items() if value is None} == {
            key for key in KEYS if all(cluster.held(key)[i] is None for i in range(5))
        }
        assert placed(cluster) or None in found.values()
