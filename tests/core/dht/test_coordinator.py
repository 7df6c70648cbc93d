"""What one coordinator does with one request: quorums, repair, versions, hedges, retries, bounds, refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from cluster import LOST, Cluster, until

from agi.core.dht.errors import (
    ClockSkew,
    DHTError,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    ProtocolMismatch,
    StaleEpoch,
    Unavailable,
    from_wire,
)
from agi.core.dht.protocol.messages import (
    FRESH,
    REPAIR,
    Delete,
    Get,
    GetReply,
    Message,
    Put,
    PutReply,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    ReplicaWriteReply,
    Scan,
    WireError,
)
from agi.core.dht.protocol.record import HEADER, hlc_of, pack
from agi.core.dht.types import KEY_BYTES_MAX, Consistency

ONE, QUORUM, ALL = Consistency.ONE, Consistency.QUORUM, Consistency.ALL


def get(key: str = "k", level: int = QUORUM, timeout_ms: int = 2000) -> Get:
    return Get(0, level, timeout_ms, [key.encode()])


def put(value: bytes, key: str = "k", level: int = QUORUM, timeout_ms: int = 2000, number: int = 0) -> Put:
    return Put(number, level, timeout_ms, [key.encode()], [value])


def error_of(reply: GetReply | PutReply) -> DHTError:
    """The one error of a reply."""
    wire: WireError | None = reply.error if reply.error is not None else reply.errors[0][1] if reply.errors else None
    assert wire is not None, reply
    return from_wire(*wire)


def value_of(reply: GetReply) -> bytes | None:
    assert reply.error is None and reply.errors is None, reply
    record = reply.records[0]
    return None if record is None else record[HEADER:]


# --- repair


async def test_a_quorum_read_stores_what_it_returns_on_a_quorum_first() -> None:
    async with Cluster(3) as cluster:
        for i in range(3):
            cluster.plant(i, "k", b"old", at_ms=1000)
        new = cluster.plant(1, "k", b"new", at_ms=2000)
        wires = [await cluster.wire(i) for i in range(3)]
        for _ in range(8):
            value = value_of(await wires[0].ask(get()))
            if value == b"new":
                break
            assert cluster.held("k").count(new) == 1  # it asked n2, which agreed with n0
        assert value == b"new"
        assert cluster.held("k").count(new) >= 2
        for i in range(12):  # monotonic: whoever is asked
            assert value_of(await wires[i % 3].ask(get())) == b"new"


@pytest.mark.parametrize("kind", ["value", "tombstone", "absent"])
async def test_repair_brings_whatever_is_newest(kind: str) -> None:
    async with Cluster(3) as cluster:
        if kind != "absent":
            cluster.plant(0, "k", b"old", at_ms=1000)
        newest = cluster.plant(1, "k", b"" if kind == "tombstone" else b"new", at_ms=2000, flags=kind == "tombstone")
        wire = await cluster.wire(0)
        reply = await wire.ask(get(level=ALL))
        assert value_of(reply) == (None if kind == "tombstone" else b"new")
        assert cluster.held("k") == [newest] * 3


async def test_a_read_whose_repair_fails_returns_neither_value() -> None:
    async with Cluster(3) as cluster:
        for i in range(3):
            cluster.plant(i, "k", b"old", at_ms=1000)
        cluster.plant(0, "k", b"new", at_ms=2000)
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWrite) else None)
        wire = await cluster.wire(0)
        started = time.monotonic()
        error = error_of(await wire.ask(get(timeout_ms=300)))
        assert type(error) is Unavailable and error.needed == 2 and "newest value could not be stored" in str(error)
        assert time.monotonic() - started < 0.5


async def test_a_repair_moves_on_when_the_stale_replica_is_lost() -> None:
    async with Cluster(3) as cluster:
        for i in range(3):
            cluster.plant(i, "k", b"old", at_ms=1000)
        new = cluster.plant(0, "k", b"new", at_ms=2000)
        repaired: list[str] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if isinstance(message, ReplicaWrite):
                repaired.append(dst)
                if len(repaired) == 1:
                    return LOST
            return None

        cluster.rule(rule)
        wire = await cluster.wire(0)
        call = asyncio.create_task(wire.ask(get()))
        await until(lambda: repaired)
        await cluster.down(int(repaired[0][1]))
        assert value_of(await call) == b"new"
        assert len(set(repaired)) == 2 and cluster.held("k").count(new) == 2


async def test_doubled_replies_do_no_harm() -> None:
    """Also during a repair, when a second copy of a stale replica's answer arrives before its acknowledgement."""
    async with Cluster(3) as cluster:
        for i in range(3):
            cluster.plant(i, "k", b"old", at_ms=1000)

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if isinstance(message, ReplicaReadReply):
                return (0.0, 0.005, 0.3)
            return (0.02, 0.03) if isinstance(message, ReplicaWriteReply | PutReply | GetReply) else None

        cluster.rule(rule)
        wire = await cluster.wire(0)
        for round_ in range(4):
            new = cluster.plant(0, "k", b"new%d" % round_, at_ms=2000 + round_)
            assert value_of(await wire.ask(get(timeout_ms=1000))) == b"new%d" % round_
            assert cluster.held("k").count(new) >= 2
            reply = await wire.ask(put(b"%d" % round_, "other"))
            assert reply.error is None and reply.errors is None
        assert cluster.network.duplicated > 20 and not wire.closed
        assert all(len(node.peers.connected) == 2 for node in cluster.living())


async def test_a_read_at_one_does_not_wait_for_repair() -> None:
    async with Cluster(3) as cluster:
        cluster.plant(0, "k", b"mine", at_ms=1000)
        cluster.plant(1, "k", b"newer", at_ms=2000)
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaRead | ReplicaWrite) else None)
        wire = await cluster.wire(0)
        assert value_of(await wire.ask(get(level=ONE))) == b"mine"


async def test_late_replies_do_no_harm() -> None:
    async with Cluster(3) as cluster:
        delay = cluster.rule(
            lambda src, dst, m: (0.3,) if isinstance(m, ReplicaWriteReply | ReplicaReadReply) else None
        )
        wire = await cluster.wire(0)
        assert type(error_of(await wire.ask(put(b"1", timeout_ms=100)))) is OutcomeUnknown
        assert type(error_of(await wire.ask(get(timeout_ms=100)))) is Unavailable
        delay()
        for i in range(50):
            reply = await wire.ask(put(b"%d" % i))
            assert reply.errors is None and value_of(await wire.ask(get())) == b"%d" % i
            await asyncio.sleep(0.01)
        assert not wire.closed


# --- versions


@pytest.mark.parametrize("ahead_s", [300, -300])
async def test_a_put_begun_after_an_acknowledged_one_wins_whatever_the_clocks_say(ahead_s: int) -> None:
    async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        cluster.clocks[0].ahead_ms = ahead_s * 1000
        wires = [await cluster.wire(i) for i in range(3)]
        versions = []
        for i in range(12):
            reply = await wires[i % 3].ask(put(b"%d" % i))
            assert reply.errors is None
            versions.append(reply.versions[0])
            assert value_of(await wires[(i + 1) % 3].ask(get())) == b"%d" % i
        assert versions == sorted(versions)


async def test_a_coordinator_that_missed_the_newer_write_writes_again_above_it() -> None:
    async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        cluster.clocks[0].ahead_ms = -300_000
        cut = cluster.rule(lambda src, dst, m: LOST if dst == "n0" and isinstance(m, ReplicaWrite) else None)
        wires = [await cluster.wire(i) for i in range(3)]
        first = await wires[1].ask(put(b"first"))
        assert first.errors is None and cluster.held("k")[0] is None
        cut()
        second = await wires[0].ask(put(b"second"))
        assert second.errors is None and second.versions[0] > first.versions[0]
        assert cluster.node(0).metrics.restamps == 1
        assert value_of(await wires[1].ask(get(level=ALL))) == b"second"
        # only the keys that were in the way are written again
        cluster.rule(lambda src, dst, m: LOST if dst == "n0" and isinstance(m, ReplicaWrite) else None)
        await wires[1].ask(put(b"first", "b"))
        batch = await wires[0].ask(Put(0, QUORUM, 2000, [b"a", b"b", b"c"], [b"1", b"2", b"3"]))
        assert batch.errors is None and batch.versions[1] > max(batch.versions[0], batch.versions[2])
        got = await wires[2].ask(Get(0, QUORUM, 2000, [b"a", b"b", b"c"]))
        assert [record[HEADER:] for record in got.records] == [b"1", b"2", b"3"]
        assert [hlc_of(record) for record in got.records] == batch.versions


async def test_a_coordinator_whose_clock_is_too_far_ahead_is_refused_by_the_replicas() -> None:
    async with Cluster(3) as cluster:
        cluster.clocks[0].ahead_ms = 300_000
        wire = await cluster.wire(0)
        error = error_of(await wire.ask(put(b"skewed")))
        assert isinstance(error, ClockSkew) and "ahead of this replica's clock" in str(error)
        assert cluster.held("k") == [None, None, None]
        other = await (await cluster.wire(1)).ask(put(b"fine", "other"))
        assert other.errors is None and other.versions[0] >> 16 <= cluster.clocks[1].wall_ms()


async def test_a_coordinator_that_holds_no_copy_writes_nothing_when_its_clock_is_refused() -> None:
    async with Cluster(4, settings={"dht.ring.virtual_nodes": 4}) as cluster:
        key = next(key for key in map(str, range(100)) if 0 not in cluster.holders(key))
        cluster.clocks[0].ahead_ms = 300_000
        error = error_of(await (await cluster.wire(0)).ask(put(b"skewed", key)))
        assert isinstance(error, ClockSkew) and "ahead of this replica's clock" in str(error)
        assert cluster.held(key) == [None] * 4
        client = await cluster.client()
        await client.put(key, b"1")
        assert await client.get(key) == b"1"


async def test_a_write_refused_for_its_clock_does_not_overrule_a_later_acknowledged_one() -> None:
    async with Cluster(3) as cluster:
        cluster.clocks[0].ahead_ms = 300_000
        wires = [await cluster.wire(i) for i in range(3)]
        assert error_of(await wires[0].ask(put(b"skewed"))).__class__ is ClockSkew
        assert cluster.held("k") == [None, None, None]
        assert (await wires[1].ask(put(b"fine"))).errors is None
        for i in range(3):
            assert value_of(await wires[i].ask(get(level=ALL))) == b"fine"


async def test_a_fresh_write_ahead_of_a_replica_is_refused_but_a_repair_is_not() -> None:
    async with Cluster(1, factor=1) as cluster:
        node = cluster.node(0)
        wire = await cluster.wire(0, hello=node.hello())
        ahead = pack(b"k", b"v", cluster.clocks[0].wall_ms() + 300_000 << 16, 1)
        reply = await wire.ask(ReplicaWrite(0, 1, "t", FRESH, [b"k"], [ahead]))
        assert from_wire(*reply.error).__class__ is ClockSkew and cluster.held("k") == [None]
        reply = await wire.ask(ReplicaWrite(0, 1, "t", REPAIR, [b"k"], [ahead]))
        assert reply.error is None and cluster.held("k") == [ahead]
        later = pack(b"k", b"w", (cluster.clocks[0].wall_ms() + 300_001 << 16), 1)
        reply = await wire.ask(ReplicaWrite(0, 1, "t", FRESH, [b"k"], [later]))  # near what it has seen: fine
        assert reply.error is None and cluster.held("k") == [later]


# --- hedging


async def test_a_slow_replica_does_not_hold_up_a_read_within_the_budget() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.wire(0)
        for i in range(200):  # earns credit, and teaches what is usual
            await client.ask(get(f"k{i}"))
        cluster.rule(lambda src, dst, m: (1.0,) if src == "n1" and isinstance(m, ReplicaReadReply) else None)
        metrics = cluster.node(0).metrics
        before = metrics.hedges
        started = time.monotonic()
        for _ in range(8):
            assert value_of(await client.ask(get())) is None
        assert time.monotonic() - started < 0.9  # one unrescued read would take a second
        assert metrics.hedges > before


async def test_hedges_keep_to_their_budget_when_all_replicas_are_slow() -> None:
    async with Cluster(3) as cluster:
        cluster.rule(lambda src, dst, m: (0.08,) if isinstance(m, ReplicaReadReply) else None)
        wire = await cluster.wire(0)
        reads = 400
        await asyncio.gather(*(wire.ask(get(f"k{i}")) for i in range(reads)))
        assert 1 <= cluster.node(0).metrics.hedges <= 1 + 0.05 * reads


async def test_no_hedge_without_a_budget() -> None:
    async with Cluster(3, settings={"dht.requests.hedge_budget": 0}) as cluster:
        cluster.rule(lambda src, dst, m: (0.08,) if isinstance(m, ReplicaReadReply) else None)
        wire = await cluster.wire(0)
        await asyncio.gather(*(wire.ask(get(f"k{i}")) for i in range(20)))
        assert cluster.node(0).metrics.hedges == 0


# --- retries


@pytest.mark.parametrize("kind", [Put, Delete])
async def test_a_retry_under_the_same_name_is_not_a_second_write(kind: type[Put] | type[Delete]) -> None:
    def request(retry: bool) -> Put | Delete:
        if kind is Put:
            return Put(7, QUORUM, 2000, [b"k"], [b"once"], 0, retry)
        return Delete(7, QUORUM, 2000, [b"k"], retry)

    async with Cluster(3) as cluster:
        wire = await cluster.wire(0, "writer")
        await wire.ask(put(b"before"))
        first = await wire.ask(request(False))
        again = await wire.ask(put(b"between"))
        held = cluster.held("k")
        other_link = await cluster.wire(0, "writer")
        for link in (wire, other_link):
            assert await link.ask(request(True)) == first
            assert await link.ask(request(False)) == first
        assert cluster.held("k") == held and again.versions == [hlc_of(held[0] or b"")]
        assert cluster.node(0).metrics.retries_deduplicated == 4
        stranger = await (await cluster.wire(0, "stranger")).ask(request(True))
        assert type(error_of(stranger)) is OutcomeUnknown and cluster.held("k") == held
        await (await cluster.wire(0, "stranger")).ask(request(False))
        assert cluster.held("k") != held  # the name is the client's, not the number alone


async def test_a_retry_while_the_first_try_runs_gets_its_answer() -> None:
    async with Cluster(3) as cluster:
        hold = cluster.rule(lambda src, dst, m: (0.2,) if isinstance(m, ReplicaWriteReply) else None)
        first = await cluster.wire(0, "writer")
        first.link.send(put(b"once", number=7))
        await until(lambda: None not in cluster.held("k"))
        held = cluster.held("k")
        first.link.close()
        second = await cluster.wire(0, "writer")
        reply = await second.ask(Put(7, QUORUM, 2000, [b"k"], [b"once"], 0, True))
        assert reply.errors is None and reply.versions == [hlc_of(held[0] or b"")] and cluster.held("k") == held
        hold()


@pytest.mark.parametrize("kind", [Put, Delete])
async def test_a_doubled_frame_is_not_taken_after_its_first_copy_was_refused(kind: type[Put] | type[Delete]) -> None:
    def request() -> Put | Delete:
        return Put(7, QUORUM, 500, [b"k"], [b"twice"]) if kind is Put else Delete(7, QUORUM, 500, [b"k"])

    async with Cluster(3) as cluster:
        wire = await cluster.wire(0, "writer")
        await wire.ask(put(b"before"))
        held = cluster.held("k")
        await cluster.down(1)
        await cluster.down(2)
        first = await wire.ask(request())
        assert type(error_of(first)) is Unavailable  # nothing was written, so the client is free to go elsewhere
        await cluster.up(1)
        await cluster.up(2)
        assert await wire.ask(request()) == first and cluster.held("k") == held
        assert (await wire.ask(put(b"after"))).errors is None


async def test_a_doubled_frame_is_not_taken_once_the_node_is_ready_or_has_room() -> None:
    async with Cluster(3) as cluster:
        node = cluster.node(0)
        assert node.coordinator is not None
        wire = await cluster.wire(0, "writer")
        node._leaving = True
        first = await wire.ask(put(b"twice", number=7))
        assert type(error_of(first)) is NotReady
        node._leaving = False
        assert type(error_of(await wire.ask(put(b"twice", number=7)))) is NotReady
        requests = node.coordinator._requests
        room, requests._bytes_max = requests._bytes_max, 0
        first = await wire.ask(put(b"twice", number=8))
        assert type(error_of(first)) is Overloaded
        requests._bytes_max = room
        assert await wire.ask(put(b"twice", number=8)) == first
        assert cluster.held("k") == [None] * 3
        assert (await wire.ask(put(b"once", number=9))).errors is None


async def test_what_has_left_the_table_is_refused_not_repeated() -> None:
    async with Cluster(1, factor=1, settings={"dht.requests.dedup_entries": 10}) as cluster:
        wire = await cluster.wire(0)
        await wire.ask(put(b"once", number=1))
        for i in range(12):
            await wire.ask(put(b"x", f"other{i}", number=100 + i))
        held = cluster.held("k")
        reply = await wire.ask(Put(1, QUORUM, 2000, [b"k"], [b"once"], 0, True))
        assert type(error_of(reply)) is OutcomeUnknown and cluster.held("k") == held


# --- bounds and refusals


async def test_past_the_bound_of_pending_bytes_requests_are_refused_until_others_end() -> None:
    async with Cluster(3, settings={"dht.requests.pending_bytes_max_mb": 16}) as cluster:
        cut = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) else None)
        wire = await cluster.wire(0)
        big = b"v" * (6 << 20)
        running = [asyncio.create_task(wire.ask(put(big, f"k{i}", timeout_ms=1500))) for i in range(2)]
        await until(lambda: None not in cluster.held("k1"))
        refused = await wire.ask(put(big, "k2"))
        assert type(error_of(refused)) is Overloaded and cluster.held("k2") == [None] * 3
        assert (await wire.ask(get("k2"))).error is None  # small requests still fit
        for reply in await asyncio.gather(*running):
            assert type(error_of(reply)) is OutcomeUnknown
        cut()
        for _ in range(4):  # nothing of the bound was lost on the way
            reply = await wire.ask(put(big, "k2"))
            assert reply.errors is None and reply.error is None


async def test_a_batch_too_large_for_a_frame_between_nodes_is_answered_with_an_error() -> None:
    """A record adds its header to the value, so what fitted the client's frame may not fit the next."""
    async with Cluster(3) as cluster:
        wire = await cluster.wire(0)
        pad = b"k" * (KEY_BYTES_MAX - 16)
        keys = [b"%08d" % i + pad for i in range(16_000)]
        for _ in range(20):  # and its bytes are not counted for ever
            reply = await wire.ask(Put(0, QUORUM, 5000, keys, [b""] * len(keys)))
            assert not wire.closed
            assert error_of(reply).__class__ in (InvalidRequest, Unavailable, OutcomeUnknown)
            break
        reply = await wire.ask(put(b"1"))
        assert reply.errors is None
        assert cluster.node(0).coordinator is not None
        await until(lambda: cluster.node(0).coordinator.pending == 0)  # type: ignore[union-attr]


async def test_requests_that_no_client_of_ours_sends_are_refused_and_the_link_lives() -> None:
    async with Cluster(3) as cluster:
        wire = await cluster.wire(0)
        long = b"x" * (KEY_BYTES_MAX + 1)
        cases: list[tuple[Message, type[DHTError]]] = [
            (Put(0, QUORUM, 1000, [b"k"], []), InvalidRequest),
            (Put(0, QUORUM, 1000, [b"k"], [b"1", b"2"]), InvalidRequest),
            (Put(0, QUORUM, 1000, [b"k"], [b"1"], -5), InvalidRequest),
            (Put(0, QUORUM, 1000, [b"k"], [b"v" * (8 * 1024 * 1024 + 1)]), InvalidRequest),
            (Put(0, QUORUM, 1000, [], []), InvalidRequest),
            (Put(0, QUORUM, 1000, [b""], [b"1"]), InvalidKey),
            (Put(0, QUORUM, 1000, [long], [b"1"]), InvalidKey),
            (Put(0, 9, 1000, [b"k"], [b"1"]), InvalidConsistency),
            (Get(0, 0, 1000, [b"k"]), InvalidConsistency),
            (Get(0, QUORUM, 1000, []), InvalidRequest),
            (Get(0, QUORUM, 1000, [long]), InvalidKey),
            (Delete(0, 5, 1000, [b"k"]), InvalidConsistency),
            (Scan(0, 7, 1000, b"", b"", 10), InvalidRequest),
            (Scan(0, QUORUM, 1000, b"", b"", 0), InvalidRequest),
            (Scan(0, QUORUM, 1000, b"", b"", 1001), InvalidRequest),
        ]
        for message, kind in cases:
            reply = await wire.ask(message)
            assert isinstance(error_of(reply), kind), message
        assert not wire.closed and cluster.held("k") == [None] * 3
        for timeout_ms in (0, -5):  # a deadline that has passed is no reason to hang
            reply = await wire.ask(Get(0, QUORUM, timeout_ms, [b"k"]))
            assert isinstance(reply, GetReply)
            assert isinstance(await wire.ask(Scan(0, QUORUM, timeout_ms, b"", b"", 10)), object)


async def test_a_message_of_another_epoch_is_refused_and_changes_nothing() -> None:
    async with Cluster(3) as cluster:
        held = cluster.plant(0, "k", b"1", at_ms=1000)
        newer = pack(b"k", b"2", 2000 << 16, 1)
        reader = await cluster.wire(0)
        peer = await cluster.wire(0, hello=cluster.node(1).hello())
        for wire, epoch in ((reader, 2), (reader, 0), (peer, 0)):  # what a member sends ahead of a node waits there
            reply = await wire.ask(ReplicaRead(0, epoch, "t", [b"k"]))
            assert from_wire(*reply.error).__class__ is StaleEpoch and reply.records == []
        reply = await peer.ask(ReplicaWrite(0, 0, "t", REPAIR, [b"k"], [newer]))
        assert from_wire(*reply.error).__class__ is StaleEpoch
        assert cluster.held("k")[0] == held
        assert (await peer.ask(ReplicaWrite(0, 1, "t", REPAIR, [b"k"], [newer]))).error is None
        assert cluster.held("k")[0] == newer


async def test_only_members_write_to_replicas() -> None:
    async with Cluster(3) as cluster:
        record = pack(b"k", b"2", 2000 << 16, 1)
        client = await cluster.wire(0)
        client.link.send(ReplicaWrite(1, 1, "t", REPAIR, [b"k"], [record]))
        await until(lambda: client.closed)
        stranger_hello = cluster.node(1).hello()
        stranger_hello.name, stranger_hello.disk_id, stranger_hello.topology = "n9", "d9", b""
        stranger = await cluster.wire(0, hello=stranger_hello)
        reply = await stranger.ask(ReplicaWrite(0, 1, "t", REPAIR, [b"k"], [record]))
        assert "not a member" in str(from_wire(*reply.error))
        assert cluster.held("k") == [None] * 3
        liar = await cluster.wire(0)
        liar.link.send(PutReply(1, [1]))
        await until(lambda: liar.closed)
        assert isinstance(ProtocolMismatch(), DHTError)


async def test_a_node_that_has_not_formed_says_so() -> None:
    async with Cluster(3, formed=False) as cluster:
        cluster.network.can_connect = lambda src, dst: src == "client"
        wire = await cluster.wire(0)
        for message in (get(), put(b"1"), Delete(0, QUORUM, 1000, [b"k"]), Scan(0, QUORUM, 1000, b"", b"", 10)):
            assert type(error_of(await wire.ask(message))) is NotReady


async def test_a_replica_that_fails_is_replaced_in_a_read_and_counted_in_a_write() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1", consistency="ALL")
        silent = cluster.rule(lambda src, dst, m: LOST if src == "n1" and dst == "n0" else None)
        wire = await cluster.wire(0)
        calls = [asyncio.create_task(wire.ask(get(timeout_ms=5000))) for _ in range(4)]
        write = asyncio.create_task(wire.ask(put(b"2", level=ALL, timeout_ms=5000)))
        await until(lambda: (cluster.held("k")[2] or b"")[HEADER:] == b"2")
        await cluster.down(1)
        for call in calls:
            assert value_of(await call) in (b"1", b"2")
        error = error_of(await write)
        assert type(error) is OutcomeUnknown and (error.needed, error.answered) == (3, 2)
        silent()
