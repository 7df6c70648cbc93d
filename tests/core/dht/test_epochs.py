"""Epochs of the topology: decided by the voters, stored before they count, heard of by everybody."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from cluster import LOST, Cluster, until

from agi.core.dht import agreement, epochs
from agi.core.dht.errors import ClusterError, FolderMismatch, OutcomeUnknown, StaleEpoch, Unavailable, from_wire
from agi.core.dht.identity import Ledger
from agi.core.dht.node import Node
from agi.core.dht.protocol.messages import (
    EpochAccept,
    EpochPrepare,
    EpochReply,
    Message,
    ReplicaRead,
    TopologyDigest,
    TopologyNews,
)
from agi.core.dht.topology import Member, Topology, choose_voters, unpack

TIMEOUT_S = 5.0


def noting(name: str) -> agreement.Change:
    """A change that gives every epoch this note once; it moves no data."""

    def change(base: Topology) -> Topology | None:
        return None if base.note == name else base.next(base.members, name, 0)

    return change


async def propose(node: Node, note: str, timeout_s: float = TIMEOUT_S) -> Topology:
    assert node.epochs.agreement is not None
    return await node.epochs.agreement.propose(noting(note), timeout_s)


async def everywhere(cluster: Cluster, epoch: int) -> None:
    await until(lambda: all(node.epoch == epoch for node in cluster.living()))


def test_voters_are_one_three_or_five_and_stay_while_they_can() -> None:
    nodes = [Member(f"n{i}", f"d{i}", f"h:{7000 + i}", zone=f"z{i % 3}") for i in range(9)]
    assert [len(choose_voters(nodes[:count], ())) for count in range(10)] == [0, 1, 1, 3, 3, 5, 5, 5, 5, 5]
    assert {"n1", "n7", "n8"} <= set(choose_voters(nodes, ("n7", "n8", "n1")))
    zones = [member.zone for member in nodes if member.node_id in choose_voters(nodes, ())]
    assert set(zones) == {"z0", "z1", "z2"}
    leaving = [msgspec.structs.replace(nodes[0], state="leaving"), *nodes[1:3]]
    assert choose_voters(leaving, ("n0", "n1", "n2")) == ("n1",)


async def test_an_epoch_is_decided_adopted_by_all_and_outlives_a_restart() -> None:
    async with Cluster(3) as cluster:
        assert cluster.topology is not None
        topology = await propose(cluster.node(0), "one")
        assert (topology.epoch, topology.note, topology.origin) == (2, "one", cluster.topology.digest)
        await everywhere(cluster, 2)
        for i in range(3):
            await cluster.down(i)
            node = await cluster.up(i)
            assert node.epoch == 2 and node.known_topology.digest == topology.digest
        ledger = Ledger(cluster.stores[1])
        assert [(past.epoch, past.note) for past in await ledger.history()] == [(1, "formed"), (2, "one")]
        promise = await ledger.promise()
        assert promise is None or (promise.epoch, unpack(promise.value).note) == (2, "one")
        assert sum([await Ledger(store).promise() is not None for store in cluster.stores]) >= 2  # a majority voted


async def test_proposals_at_once_become_one_epoch_each() -> None:
    async with Cluster(5, factor=3) as cluster:
        done = await asyncio.gather(*(propose(cluster.node(i), f"by n{i}", 20.0) for i in range(3)))
        assert max(topology.epoch for topology in done) >= 4
        await until(lambda: len({node.known_topology.digest for node in cluster.living()}) == 1)
        epochs_of = [(past.epoch, past.digest) for store in cluster.stores for past in await Ledger(store).history()]
        assert len(dict(epochs_of)) == len(set(epochs_of)), "an epoch has one value, wherever it was adopted"


async def test_a_minority_of_voters_may_be_down_and_no_more() -> None:
    async with Cluster(3) as cluster:
        await cluster.down(2)
        assert (await propose(cluster.node(0), "two of three")).epoch == 2
        await cluster.down(1)
        with pytest.raises((Unavailable, OutcomeUnknown)) as caught:
            await propose(cluster.node(0), "alone", 0.3)
        assert caught.value.needed == 2 and caught.value.answered <= 1
        assert cluster.node(0).epoch == 2
        await cluster.up(1)
        await cluster.up(2)
        await everywhere(cluster, 2)  # what was asked of one voter was chosen by nobody


async def test_whoever_missed_the_news_hears_of_it_by_the_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "EXCHANGE_S", 0.02)
    async with Cluster(3) as cluster:
        lost: list[Message] = []

        def lose_one(src: str, dst: str, message: Message) -> object:
            if dst == "n2" and (isinstance(message, EpochPrepare | EpochAccept) or not lost):
                if isinstance(message, TopologyNews):
                    lost.append(message)
                return LOST if isinstance(message, EpochPrepare | EpochAccept | TopologyNews) else None
            return None

        cluster.rule(lose_one)  # type: ignore[arg-type]
        await propose(cluster.node(0), "unheard")
        await everywhere(cluster, 2)
        assert lost


async def test_a_voter_finishes_what_a_dead_proposer_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "FINISH_S", 0.05)
    async with Cluster(3) as cluster:
        accepts: list[Message] = []

        def lose_replies(src: str, dst: str, message: Message) -> object:
            if isinstance(message, EpochAccept) and src == "n0":
                accepts.append(message)
            if dst == "n0" and isinstance(message, EpochReply) and accepts:
                return LOST
            return LOST if src == "n0" and isinstance(message, TopologyNews | TopologyDigest) else None

        cluster.rule(lose_replies)  # type: ignore[arg-type]
        task = asyncio.ensure_future(propose(cluster.node(0), "orphan"))
        await until(lambda: accepts)
        await cluster.down(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await everywhere(cluster, 2)
        assert {node.known_topology.note for node in cluster.living()} == {"orphan"}


async def test_a_node_that_moves_is_found_at_its_new_address() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(0)
        await client.put("k", b"1")
        await cluster.down(1)
        cluster.addresses[1] = "n1:7100"
        await cluster.up(1)
        await everywhere(cluster, 2)
        topology = cluster.node(0).known_topology
        assert topology.by_id["n1"].address == "n1:7100" and "moved from n1:7000 to n1:7100" in topology.note
        assert topology.placement == cluster.topology.placement  # type: ignore[union-attr]
        assert await client.put("k", b"2", consistency="ALL") > 0  # requests of the first epoch are still understood
        await cluster.down(0)
        cluster.addresses[0] = "n0:7200"
        known = cluster.addresses[1:]
        with pytest.raises(FolderMismatch):  # peers that nobody knows are another set
            cluster.addresses[1:] = ["n8:7000", "n9:7000"]
            await cluster.up(0)
        cluster.addresses[:] = ["n0:7201", known[0], "n9:7000"]  # but one may be new, or have left
        await cluster.up(0)
        cluster.addresses[1:] = known


async def test_messages_of_another_epoch_are_taken_where_they_mean_the_same() -> None:
    async with Cluster(3) as cluster:
        await propose(cluster.node(0), "harmless")
        await everywhere(cluster, 2)
        wire = await cluster.wire(1)
        old = await wire.ask(ReplicaRead(0, 1, "", [b"k"]))
        assert old.error is None and old.records == [None]
        new = await wire.ask(ReplicaRead(0, 3, "", [b"k"]))
        assert type(from_wire(*new.error)) is StaleEpoch


async def test_a_client_has_no_say_in_the_topology() -> None:
    async with Cluster(3) as cluster:
        topology = cluster.node(0).known_topology
        forged = topology.next(topology.members[:1], "forged", 0)
        for message in (TopologyNews(forged.packed), EpochPrepare(1, 2, (99, 1), topology.packed)):
            wire = await cluster.wire(0)
            wire.link.send(message)
            await until(lambda wire=wire: wire.closed)
        assert cluster.node(0).epoch == 1 and not cluster.fatal


async def test_a_topology_of_another_cluster_is_refused_and_two_of_one_epoch_stop_the_node() -> None:
    async with Cluster(3) as cluster:
        node = cluster.node(0)
        mine = node.known_topology
        stranger = Topology.first("dht", 3, 8, "xxh3", mine.members[:2]).next(mine.members, "stranger", 0)
        with pytest.raises(ClusterError, match="another cluster"):
            node.epochs.hear_of(stranger, "n1")
        with pytest.raises(ClusterError, match="another cluster"):
            await node.epochs.adopt(stranger)
        assert node.epoch == 1 and not cluster.fatal
        await propose(node, "ours")
        with pytest.raises(ClusterError, match="another epoch 2"):
            node.epochs.hear_of(mine.next(mine.members, "theirs", 0), "n1")
        assert cluster.fatal and isinstance(cluster.fatal[0], ClusterError)


async def test_a_promise_outlives_a_restart() -> None:
    async with Cluster(3) as cluster:
        base = cluster.node(1).known_topology
        agreed = cluster.node(1).epochs.agreement
        assert agreed is not None
        assert (await agreed.prepare(EpochPrepare(1, 2, (50, 7), base.packed))).granted
        await cluster.down(1)
        again = (await cluster.up(1)).epochs.agreement
        assert again is not None
        reply = await again.accept(EpochAccept(2, 2, (49, 9), base.next(base.members, "low", 0).packed))
        assert not reply.granted and reply.promised == (50, 7)


async def test_an_answer_that_could_not_be_stored_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3) as cluster:
        base = cluster.node(1).known_topology
        agreed = cluster.node(1).epochs.agreement
        assert agreed is not None
        value = base.next(base.members, "v", 0).packed

        async def full(promise: object) -> None:
            raise Unavailable("the disk is gone")

        with monkeypatch.context() as broken:
            broken.setattr(cluster.node(1)._ledger, "store_promise", full)
            for request in (EpochPrepare(1, 2, (5, 1), base.packed), EpochAccept(2, 2, (5, 1), value)):
                with pytest.raises(Unavailable, match="the disk is gone"):
                    await (agreed.prepare(request) if isinstance(request, EpochPrepare) else agreed.accept(request))
        reply = await agreed.prepare(EpochPrepare(3, 2, (6, 1), base.packed))
        assert reply.granted and reply.accepted == (0, 0) and reply.value == b""
