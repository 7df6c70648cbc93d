"""Links between nodes: who is let in, what happens when links break, which frames take which link."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec
import pytest
from cluster import LOST, Cluster, until

from agi.core.dht import peers
from agi.core.dht.errors import ClonedNode, ClusterError, ProtocolMismatch, UnknownDisk
from agi.core.dht.hello import ANSWER_S
from agi.core.dht.protocol.messages import Hello, Message, Put, Query, ReplicaWrite, ReplicaWriteReply
from agi.core.dht.topology import Topology
from agi.core.dht.types import BULK_VALUE_BYTES


def changed(hello: Hello, **fields: object) -> Hello:
    return msgspec.structs.replace(hello, **fields)


async def test_a_broken_link_is_noticed_and_made_again() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        node = cluster.node(0)
        for _ in range(3):
            peer = node.peers.connected["n1"]
            before = list(peer.links)
            cluster.network.cut(peer.links[-1])  # one of the pool: all of it is made anew
            await until(lambda old=before, now=peer: "n1" in node.peers.connected and not set(now.links) & set(old))
            assert all(link.closed for link in before) and peer.last_error == ""
            assert await client.put("k", b"1", consistency="ALL") > 0


async def test_a_peer_that_restarts_is_found_at_its_new_data_port() -> None:
    async with Cluster(3) as cluster:
        before = cluster.node(1).data_address
        await cluster.down(1)
        assert "n1" in cluster.node(0).peers.all and "n1" not in cluster.node(0).peers.connected
        assert cluster.node(0).peers.all["n1"].last_error
        await cluster.up(1)
        hello = cluster.node(0).peers.all["n1"].hello
        assert hello is not None and hello.data_address == cluster.node(1).data_address != before


async def test_a_silent_peer_is_given_up() -> None:
    async with Cluster(3, hasty=True) as cluster:
        cluster.rule(lambda src, dst, m: [] if "n2" in (src, dst) else None)
        await until(lambda: "n2" not in cluster.node(0).peers.connected)
        assert "silent" in cluster.node(0).peers.all["n2"].last_error
        assert "n1" in cluster.node(0).peers.connected


async def test_two_of_three_lost_is_told_by_readiness() -> None:
    async with Cluster(3) as cluster:
        assert cluster.node(0).waiting_for == ""
        await cluster.down(2)
        assert cluster.node(0).waiting_for == ""
        await cluster.down(1)
        assert "n1, n2 missing" in cluster.node(0).waiting_for
        await cluster.up(1)
        assert cluster.node(0).waiting_for == ""


async def test_a_peer_that_starts_again_is_not_left_to_the_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3) as cluster:
        monkeypatch.setattr(peers, "BACKOFF_FIRST_S", 3600.0)
        monkeypatch.setattr(peers, "BACKOFF_MAX_S", 3600.0)
        await cluster.down(1)
        await until(lambda: all("cannot" in node.peers.all["n1"].last_error for node in cluster.living()))
        await cluster.up(1)  # waits until all are connected


async def test_strangers_in_known_clothes_are_refused() -> None:
    async with Cluster(3) as cluster:

        def hello(**changes: object) -> Hello:
            known = cluster.node(1).hello()
            for name, value in changes.items():
                setattr(known, name, value)
            return known

        topology = cluster.topology
        assert topology is not None
        other = Topology.first("dht", 3, 8, "xxh3", topology.members[:2])
        cases: list[tuple[Hello, type[Exception], str]] = [
            (hello(disk_id="other"), UnknownDisk, "disk"),
            (hello(boot=1), ClonedNode, "boot counter"),
            (hello(run_id="other"), ClonedNode, "copied"),
            (hello(name="n0"), ClonedNode, "another process runs as n0"),
            (hello(topology=other.packed), ClusterError, "another cluster"),
            (hello(protocol=99), ProtocolMismatch, "protocol 99"),
            (hello(kind="admin"), ProtocolMismatch, "admin"),
        ]
        for changed, kind, words in cases:
            with pytest.raises(kind, match=words):
                await cluster.wire(0, hello=changed)
        wire = await cluster.wire(0, hello=hello())
        assert not wire.closed
        await cluster.down(1)
        await cluster.up(1)  # a real restart raises the counter, and is let in
        with pytest.raises(ClonedNode):
            await cluster.wire(0, hello=hello(boot=cluster.node(1).hello().boot - 1, run_id="old"))


async def test_a_copied_folder_is_known_by_its_starts_however_many() -> None:
    async with Cluster(3) as cluster:
        known = cluster.node(1).hello()
        await cluster.down(1)
        for boot in (known.boot + 1, known.boot + 2):
            copy = changed(known, boot=boot, run_id="copy", runs=["copy's"] * (boot - known.boot))
            with pytest.raises(ClonedNode, match=f"its start {known.boot} was another"):
                await cluster.wire(0, hello=copy)
        await cluster.up(1)
        boots = cluster.node(0)._boots
        await until(lambda: boots._stored == boots._known)  # what was seen outlives who saw it
        later = cluster.node(1).hello()
        assert (later.boot, later.runs) == (known.boot + 1, [known.run_id, *known.runs])
        await cluster.down(1)
        await cluster.down(0)
        await cluster.up(0, wait=False)
        with pytest.raises(ClonedNode, match="was another"):
            await cluster.wire(0, hello=changed(later, boot=later.boot + 1, run_id="copy", runs=["copy's"]))
        # older than all that a folder remembers: nothing speaks against it
        await cluster.wire(0, hello=changed(later, boot=later.boot + 2, run_id="new", runs=["one"]))


async def test_a_folder_that_is_copied_while_its_node_runs_is_refused_as_long_as_that_answers() -> None:
    async with Cluster(3) as cluster:
        known = cluster.node(1).hello()
        copy = changed(known, boot=known.boot + 1, run_id="copy", runs=[known.run_id, *known.runs])
        link = cluster.node(0).peers.all["n1"].links[0]
        for _ in range(3):
            with pytest.raises(ClonedNode, match="runs yet"):
                await cluster.wire(0, hello=copy)
            await until(lambda: not cluster.node(0)._boots._asked)
        assert not link.closed
        await cluster.down(1)
        await cluster.up(1)  # the copy was not taken for the last start
        # one that has no power any more leaves links that do not end, and answers nothing
        cluster.rule(lambda src, dst, message: LOST if src == "n1" else None)
        known = cluster.node(1).hello()
        assert cluster.node(0).peers.connected["n1"].hello.run_id == known.run_id  # type: ignore[union-attr]  # connected
        restarted = changed(known, boot=known.boot + 1, run_id="later", runs=[known.run_id, *known.runs])
        async with asyncio.timeout(2 * ANSWER_S):
            wire = None
            while wire is None:
                with contextlib.suppress(ClonedNode):
                    wire = await cluster.wire(0, hello=restarted)
                await asyncio.sleep(0.01)
        with pytest.raises(ClonedNode, match="boot counter"):
            await cluster.wire(0, hello=known)


async def test_a_strange_disk_may_bring_the_epoch_that_names_it() -> None:
    async with Cluster(3) as cluster:
        base = cluster.node(0).known_topology
        renewed = [
            msgspec.structs.replace(member, disk_id="new") if member.node_id == "n1" else member
            for member in base.members
        ]
        newer = base.next(renewed, "n1 has another disk", 1)
        known = cluster.node(1).hello()
        known.disk_id, known.topology = "new", newer.packed
        with pytest.raises(UnknownDisk):
            await cluster.wire(0, hello=known)  # as far as this node knew
        await until(lambda: cluster.node(0).known_topology.digest == newer.digest)
        await (await cluster.wire(0, hello=known)).ask(Query(0, "status", 1000))


async def test_the_first_message_is_a_hello_and_replies_are_no_requests() -> None:
    async with Cluster(1, factor=1) as cluster:
        wire = await cluster.wire(0)
        wire.link.send(ReplicaWriteReply(1))
        await until(lambda: wire.closed)
        from_start = await cluster.wire(0)
        transport = cluster._transport("client")
        raw = await transport.connect(cluster.node(0).data_address, from_start)
        raw.send(Put(1, 2, 1000, [b"k"], [b"1"]))
        await until(lambda: raw.closed)
        assert cluster.held("k") == [None]


async def test_large_frames_take_the_bulk_links_and_small_ones_do_not_wait_for_them() -> None:
    """A large record crawls; a small write begun later is acknowledged by the same replicas first."""
    async with Cluster(3, settings={"dht.network.timeout_ms": 10_000}) as cluster:
        client = await cluster.client()
        used: dict[bool, set[object]] = {True: set(), False: set()}

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if isinstance(message, ReplicaWrite):
                large = len(message.records[0]) >= BULK_VALUE_BYTES
                used[large].add((src, dst))
                return (0.3,) if large else None
            return None

        cluster.rule(rule)
        large = asyncio.create_task(client.put("large", b"v" * (2 * BULK_VALUE_BYTES), consistency="ALL"))
        await until(lambda: used[True])
        for i in range(20):
            await client.put(f"small{i}", b"1", consistency="ALL")
        assert not large.done()
        await large
        for node in cluster.living():
            for peer in node.peers.all.values():
                assert len(peer.links) == 2


async def test_frames_are_sent_on_the_link_of_their_size() -> None:
    async with Cluster(2) as cluster:
        peer = cluster.node(0).peers.connected["n1"]
        sent: list[tuple[int, bytes]] = []
        for number, link in enumerate(peer.links):
            send = link.send_frame
            link.send_frame = lambda frame, n=number, s=send: (sent.append((n, bytes(frame))), s(frame))[1]  # type: ignore[method-assign]
        wire = await cluster.wire(0)
        await wire.ask(Put(0, 3, 2000, [b"small"], [b"v" * 1000]))
        await wire.ask(Put(0, 3, 2000, [b"large"], [b"v" * BULK_VALUE_BYTES]))
        await wire.ask(Put(0, 3, 2000, [b"small"], [b"v" * 1000]))
        # The node's own upkeep asks on these links too, whenever it likes.
        puts = [(number, len(frame) >= BULK_VALUE_BYTES) for number, frame in sent if b"v" * 1000 in frame]
        assert puts == [(0, False), (1, True), (0, False)]
