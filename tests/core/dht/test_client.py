"""What callers of the asyncio client see: meaning of each call, batches, failures, deadlines."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from cluster import LOST, Cluster, until

import agi.core.dht
from agi.core.dht import (
    BatchError,
    ClientClosed,
    ConnectFailed,
    Consistency,
    DHTClient,
    HelloRefused,
    InvalidAddress,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    InvalidTTL,
    InvalidValue,
    OutcomeUnknown,
    Unavailable,
)
from agi.core.dht.errors import Overloaded, from_wire
from agi.core.dht.protocol.messages import (
    Delete,
    Get,
    Message,
    Put,
    PutReply,
    Query,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    ReplicaWriteReply,
)
from agi.core.dht.protocol.record import TOMBSTONE
from agi.core.dht.queries import QUERIES_MAX
from agi.core.dht.requests import ReplyTo
from agi.core.dht.types import BATCH_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX


def test_the_public_names() -> None:
    names = agi.core.dht.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(agi.core.dht, name) for name in names)
    errors = {name for name, value in vars(agi.core.dht.errors).items() if isinstance(value, type)}
    assert {name for name in errors if issubclass(getattr(agi.core.dht.errors, name), Exception)} <= set(names)
    assert set(names) - errors == {
        "RAW", "TEXT", "Codec", "Consistency", "DHTClient", "Entry", "Fence", "HashRing", "Json", "Lock", "LockStatus",
        "MappingView", "MessagePack", "MemberStatus", "Node", "Partition", "SyncDHTClient", "SyncLock",
    }  # fmt: skip
    public = {name for name in vars(agi.core.dht) if not name.startswith("_") and name not in names}
    assert all(type(getattr(agi.core.dht, name)).__name__ == "module" for name in public)


# --- single keys


async def test_the_first_put_of_a_key_succeeds_and_absent_is_an_answer() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        for level in Consistency:
            key = f"new:{level.name}"
            assert await client.get(key, consistency=level) is None
            assert not await client.exists(key, consistency=level)
            assert await client.get_entry(key, consistency=level) is None
            assert await client.put(key, b"1", consistency=level) > 0
            assert await client.get(key, consistency=Consistency.QUORUM) == b"1"
        assert sum(sum(node.metrics.failures.values()) for node in cluster.living()) == 0


@pytest.mark.parametrize("value", [b"", b"\0", b"x" * 100, bytes(range(256)) * 600])
async def test_values_come_back_as_they_were(value: bytes) -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("schlüssel/\u0000/鍵", value)
        assert await client.get("schlüssel/\u0000/鍵") == value
        assert await client.get("schlüssel/\u0000/鍵", consistency="all") == value


async def test_an_overwrite_keeps_created_at_and_a_delete_resets_it() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        first_version = await client.put("k", b"1")
        first = await client.get_entry("k")
        assert first is not None
        assert first.version == first_version and first.key == "k" and first.value == b"1" and first.expires_at is None
        assert first.created_at == first.updated_at == first_version >> 16
        for clock in cluster.clocks:
            clock.ahead_ms = 50
        second_version = await client.put("k", b"2")
        second = await client.get_entry("k")
        assert second is not None and second.version == second_version > first_version
        assert second.created_at == first.created_at
        assert second.updated_at >= first.updated_at + 40
        assert await client.delete("k")
        await client.put("k", b"3")
        third = await client.get_entry("k")
        assert third is not None and third.version > second_version
        assert third.created_at >= first.created_at + 40


async def test_versions_grow_whichever_node_coordinates() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        versions = [await client.put("k", b"%d" % i) for i in range(20)]
        assert versions == sorted(set(versions))
        assert len({node.metrics.puts > 0 for node in cluster.living()}) == 1  # all of them coordinated


async def test_delete_tells_whether_there_was_a_value() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        assert not await client.delete("k")
        await client.put("k", b"1")
        assert await client.delete("k")
        assert not await client.delete("k")
        assert await client.get("k") is None
        assert not await client.exists("k")
        assert await client.get_entry("k") is None
        records = cluster.held("k")
        assert all(record is not None and record[16] & TOMBSTONE for record in records)  # a tombstone, not nothing


async def test_a_deleted_key_does_not_come_back_from_a_replica_that_was_away() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1", consistency="ALL")
        await cluster.down(2)
        assert await client.delete("k")
        await cluster.up(2)
        for _ in range(6):
            assert await client.get("k") is None
        assert await client.scan() == []


async def test_a_value_with_a_ttl_expires_for_every_reader() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1", ttl_seconds=60)
        await client.put_many({"m1": b"1", "m2": b"2"}, ttl_seconds=60)
        await client.put("kept", b"1", ttl_seconds=60)
        await client.put("kept", b"2")  # a put without a TTL lifts it
        entry = await client.get_entry("k")
        assert entry is not None and entry.expires_at is not None
        assert abs(entry.expires_at - entry.updated_at - 60_000) <= 1
        for clock in cluster.clocks:
            clock.ahead_ms = 59_000
        assert await client.get("k") == b"1"
        for clock in cluster.clocks:
            clock.ahead_ms = 60_500
        for _ in range(3):
            assert await client.get("k") is None
            assert await client.get_many(["k", "m1", "m2", "kept"]) == {"k": None, "m1": None, "m2": None, "kept": b"2"}
        assert not await client.exists("k")
        assert [key for key, _ in await client.scan()] == ["kept"]
        assert not await client.delete("m1")  # nothing live any more
        await client.put("k", b"again")
        assert await client.get("k") == b"again"


# --- many keys


async def test_batches_answer_for_each_key() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        items = {f"k{i}": b"%d" % i for i in range(200)}
        versions = await client.put_many(items)
        assert list(versions) == list(items) and len(set(versions.values())) == 200
        assert await client.get_many([*items, "absent"]) == {**items, "absent": None}
        assert await client.delete_many(["k0", "absent", "k1"]) == {"k0": True, "absent": False, "k1": True}
        assert await client.get_many(["k0", "k1", "k2"]) == {"k0": None, "k1": None, "k2": b"2"}
        assert await client.get_many(["k2", "k2"]) == {"k2": b"2"}
        assert (
            await client.get_many([]) == {} and await client.put_many({}) == {} and await client.delete_many([]) == {}
        )


async def test_the_calls_of_one_turn_travel_in_few_frames() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        frames: Counter[str] = Counter()

        def count(src: str, dst: str, message: Message) -> None:
            if src == "client":
                frames[type(message).__name__] += 1

        cluster.rule(count)
        await asyncio.gather(*(client.put(f"k{i}", b"%d" % i) for i in range(300)))
        values = await asyncio.gather(*(client.get(f"k{i}") for i in range(300)))
        await asyncio.gather(*(client.delete(f"k{i}") for i in range(300)))
        assert values == [b"%d" % i for i in range(300)]
        assert frames["Put"] == frames["Delete"] == 1 and frames["Get"] + frames["ReplicaRead"] <= 2


async def test_what_one_turn_asks_is_cut_to_frames_that_fit() -> None:
    pad = "k" * (KEY_BYTES_MAX - 8)
    async with Cluster(1, factor=1, settings={"dht.requests.queue_ms": 20_000}) as cluster:
        client = await cluster.client(timeout=20, queue_s=20)
        sizes: list[int] = []
        cluster.rule(lambda src, dst, m: sizes.append(len(m.keys)) if isinstance(m, Get | Put | Delete) else None)
        keys = [f"{i:08}{pad}" for i in range(17_000)]  # 17 MiB of keys alone
        await asyncio.gather(*(client.put(key, b"") for key in keys))
        assert all(value == b"" for value in await asyncio.gather(*(client.get(key) for key in keys)))
        assert all(await asyncio.gather(*(client.delete(key) for key in keys)))
        assert len(sizes) >= 8 and sum(sizes) == 3 * len(keys)


async def test_values_beyond_one_frame_are_split_on_the_way_in_and_out() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(timeout=30)
        items = {f"k{i}": bytes([i]) * (2 << 20) for i in range(12)}  # 24 MiB
        frames: list[int] = []
        cluster.rule(
            lambda src, dst, m: (
                frames.append(sum(map(len, m.values))) if isinstance(m, Put) and src == "client" else None
            )
        )
        await client.put_many(items)
        assert max(frames) <= BATCH_BYTES_MAX and sum(frames) == 24 << 20
        assert await client.get_many(items) == items
        assert dict(await client.scan("k")) == items
        got = await asyncio.gather(*(client.get(key) for key in items))
        assert got == list(items.values())


async def test_the_largest_value_is_stored_and_one_byte_more_is_refused() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(timeout=30)
        value = b"v" * VALUE_BYTES_MAX
        await client.put("big", value)
        assert await client.get("big") == value
        assert await client.get("big", consistency="ALL") == value
        await client.put_many({"big1": value, "big2": value, "small": b"1"})
        assert await client.get_many(["big1", "big2", "small"]) == {"big1": value, "big2": value, "small": b"1"}
        assert dict(await client.scan("big")) == {"big": value, "big1": value, "big2": value}
        with pytest.raises(InvalidValue):
            await client.put("big", value + b"v")
        assert await client.get("big") == value


async def test_a_batch_that_fails_in_part_names_the_keys_and_keeps_the_rest() -> None:
    async with Cluster(5, settings={"dht.ring.virtual_nodes": 4}) as cluster:
        client = await cluster.client(retry_count=0)
        keys = [f"k{i}" for i in range(200)]
        await client.put_many(dict.fromkeys(keys, b"old"))
        lost = {key for key in keys if {3, 4} <= set(cluster.holders(key))}
        assert 0 < len(lost) < len(keys)
        await cluster.down(3)
        await cluster.down(4)
        with pytest.raises(BatchError) as put:
            await client.put_many(dict.fromkeys(keys, b"new"))
        assert set(put.value.failed) == lost
        for error in put.value.failed.values():
            assert type(error) is Unavailable and (error.needed, error.answered) == (2, 1)
        with pytest.raises(BatchError) as got:
            await client.get_many(keys)
        assert set(got.value.failed) == lost
        good = [key for key in keys if key not in lost]
        assert await client.get_many(good) == dict.fromkeys(good, b"new")
        with pytest.raises(BatchError) as deleted:
            await client.delete_many(keys)
        assert set(deleted.value.failed) == lost
        await cluster.up(3)
        await cluster.up(4)
        left = await client.get_many(keys, timeout=5)
        assert {key for key, value in left.items() if value is not None} == lost
        assert {left[key] for key in lost} == {b"old"}  # nothing was written where Unavailable was said


# --- bad input


async def test_bad_input_is_refused_and_changes_nothing() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1")
        before = cluster.held("k")
        sent: list[Message] = []
        cluster.rule(
            lambda src, dst, m: sent.append(m) if src == "client" and isinstance(m, Get | Put | Delete) else None
        )
        for bad in ["", "x" * (KEY_BYTES_MAX + 1), "\ud800", b"k", 7, None]:
            for call in (client.get, client.exists, client.get_entry, client.delete, client.locate):
                with pytest.raises(InvalidKey):
                    await call(bad)  # type: ignore[operator]
            with pytest.raises(InvalidKey):
                await client.put(bad, b"2")  # type: ignore[arg-type]
            for many in (client.get_many, client.delete_many):
                with pytest.raises(InvalidKey):
                    await many(["k", bad])  # type: ignore[list-item, operator]
            with pytest.raises(InvalidKey):
                await client.put_many({"k": b"2", bad: b"2"})  # type: ignore[dict-item]
        for value in ["text", 1, None, [b"2"]]:
            with pytest.raises(InvalidValue):
                await client.put("k", value)  # type: ignore[arg-type]
            with pytest.raises(InvalidValue):
                await client.put_many({"a": b"2", "k": value})  # type: ignore[dict-item]
        for ttl in [0, -1, float("nan"), float("inf"), True, "60", 1e12]:
            with pytest.raises(InvalidTTL):
                await client.put("k", b"2", ttl_seconds=ttl)  # type: ignore[arg-type]
            with pytest.raises(InvalidTTL):
                await client.put_many({"k": b"2"}, ttl_seconds=ttl)  # type: ignore[arg-type]
        for level in ["TWO", 9, "", 2.0]:
            with pytest.raises(InvalidConsistency):
                await client.put("k", b"2", consistency=level)  # type: ignore[arg-type]
            with pytest.raises(InvalidConsistency):
                await client.scan("k", consistency=level)  # type: ignore[arg-type]
        for timeout in [0, -1, float("nan"), 1e9, "1", True]:
            with pytest.raises(InvalidRequest):
                await client.put("k", b"2", timeout=timeout)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest):
                await client.get_many(["k"], timeout=timeout)  # type: ignore[arg-type]
        for limit in [0, -1, True, 1.5, None]:
            with pytest.raises(InvalidRequest):
                await client.scan("k", limit)  # type: ignore[arg-type]
        for page_size in [0, 1001, True, 2.5]:
            with pytest.raises(InvalidRequest):
                _ = [pair async for pair in client.iterate("k", page_size=page_size)]  # type: ignore[arg-type]
        assert sent == [] and cluster.held("k") == before
        assert await client.get_many(["k", "a"]) == {"k": b"1", "a": None}


async def test_construction_and_connection_are_checked() -> None:
    for options in [{"retry_count": -1}, {"connection_pool_size": 0}, {"timeout": 0}]:
        with pytest.raises(InvalidRequest):
            DHTClient(**options)  # type: ignore[arg-type]
    with pytest.raises(InvalidConsistency):
        DHTClient(read_consistency="TWO")
    async with Cluster(1, factor=1) as cluster:
        client = await cluster.client()
        with pytest.raises(InvalidRequest, match="already"):
            await client.connect(["n0:7000"])
    fresh = DHTClient()
    for addresses in ["n0:7000", []]:
        with pytest.raises(InvalidRequest):
            await fresh.connect(addresses)
    with pytest.raises(InvalidAddress):
        await fresh.connect(["n0"])
    await fresh.close()


async def test_a_client_of_another_cluster_is_refused() -> None:
    async with Cluster(1, factor=1) as cluster:
        with pytest.raises(HelloRefused, match="'dht'"):
            await cluster.client(cluster="other")
        assert await (await cluster.client(cluster="dht")).get("k") is None


async def test_connect_gives_up_in_time_where_nobody_answers() -> None:
    async with Cluster(1, factor=1) as cluster:
        client = DHTClient(seed_transport=cluster._transport("x"), data_transport=cluster._transport("x"))
        started = time.monotonic()
        with pytest.raises(ConnectFailed):
            await client.connect(["n7:7000"], timeout=0.3)
        assert time.monotonic() - started < 1.0
        with pytest.raises(ClientClosed):
            await client.get("k")
        await client.connect(["n0:7000"])  # a failed try does not spoil it
        assert await client.get("k") is None
        await client.close()


async def test_a_closed_client_says_so_and_fails_what_is_under_way() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        cluster.rule(lambda src, dst, m: LOST if dst == "client" and isinstance(m, PutReply) else None)
        small = asyncio.create_task(client.put("k", b"1", timeout=30))
        large = asyncio.create_task(client.put("k", b"1" * 200_000, timeout=30))
        await until(lambda: cluster.held("k") != [None] * 3)
        await client.close()
        await client.close()
        for call in (small, large):
            with pytest.raises(ClientClosed):
                await asyncio.wait_for(call, 1)
        for late in (client.get("k"), client.put("k", b"2"), client.delete("k"), client.get_many(["k"]), client.scan()):
            with pytest.raises(ClientClosed):
                await late


async def test_close_fails_calls_that_wait_for_another_try() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(retry_count=10)
        await cluster.down(1)
        await cluster.down(2)
        call = asyncio.create_task(client.put("k", b"1", timeout=60))
        await until(lambda: cluster.node(0).metrics.failures.get("Unavailable", 0) >= 5)
        await client.close()
        with pytest.raises(ClientClosed):
            await asyncio.wait_for(call, 0.2)


# --- failures


async def test_the_node_that_was_asked_first_may_go() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(0)
        await client.put("k", b"1")
        await cluster.down(0)
        for i in range(10):
            await client.put(f"k{i}", b"2")
            assert await client.get(f"k{i}") == b"2"
        assert await client.get("k") == b"1"
        await cluster.up(0)
        await until(lambda: len(client._live().up) == 3)  # and it is used again when it is back
        await cluster.down(1)
        assert await client.get("k") == b"1"


@pytest.mark.parametrize(
    ("down", "works"),
    [(0, {"ONE": True, "QUORUM": True, "ALL": True}), (1, {"ONE": True, "QUORUM": True, "ALL": False}),
     (2, {"ONE": True, "QUORUM": False, "ALL": False})],
)  # fmt: skip
async def test_consistency_levels_with_nodes_down(down: int, works: dict[str, bool]) -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(retry_count=0)
        await client.put("k", b"old", consistency="ALL")
        for i in range(down):
            await cluster.down(2 - i)
        for level, fine in works.items():
            if fine:
                await client.put("k", level.encode(), consistency=level)
                assert await client.get("k", consistency=level) == level.encode()
                continue
            before = cluster.held("k")
            needed = Consistency[level].needed(3)
            for call in (
                client.put("k", b"lost", consistency=level),
                client.delete("k", consistency=level),
                client.get("k", consistency=level),
                client.scan("k", consistency=level),
            ):
                with pytest.raises(Unavailable) as failed:
                    await call
                assert (failed.value.needed, failed.value.answered) == (needed, 3 - down)
                assert f"needed {needed} replicas, {3 - down} answered" in str(failed.value)
            assert cluster.held("k") == before


async def test_lost_acknowledgements_leave_the_outcome_unknown() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) else None)
        with pytest.raises(OutcomeUnknown) as failed:
            await client.put("k", b"1", timeout=0.4)
        assert (failed.value.needed, failed.value.answered) == (0, 0) or failed.value.needed == 2
        assert None not in cluster.held("k")  # it had happened: Unavailable would have been a lie
        with pytest.raises(OutcomeUnknown):
            await client.delete("k", timeout=0.4)
        with pytest.raises(BatchError) as many:
            await client.put_many({"a": b"1", "b": b"2"}, timeout=0.4)
        assert all(isinstance(error, OutcomeUnknown) for error in many.value.failed.values())


@pytest.mark.parametrize("silent", ["requests", "replies", "replicas"])
async def test_every_call_ends_by_its_deadline(silent: str) -> None:
    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        if silent == "requests":
            return LOST if src == "client" and type(message).__name__ not in ("Ping", "Pong", "Hello") else None
        if silent == "replies":
            return LOST if dst == "client" and type(message).__name__.endswith("Reply") else None
        return LOST if isinstance(message, ReplicaRead | ReplicaWrite) else None

    async with Cluster(3) as cluster:
        client = await cluster.client()
        cluster.rule(rule)
        for round_ in range(3):  # also when replicas have been slow for a while
            calls = [
                *(client.get(f"k{i}", timeout=0.3) for i in range(40)),
                client.get("k", timeout=0.3, consistency="ALL"),
                client.get_many([f"k{i}" for i in range(100)], timeout=0.3),
                client.put("k", b"1", timeout=0.3),
                client.put("k", b"1" * 200_000, timeout=0.3),
                client.delete("k", timeout=0.3),
            ]
            if silent != "replicas":
                calls.append(client.scan(timeout=0.3))
            started = time.monotonic()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - started < 0.3 + 0.25, round_
            kinds = {type(result) for result in results}
            assert kinds <= {Unavailable, OutcomeUnknown, BatchError}, kinds
            reads = results[:41]
            assert {type(result) for result in reads} == {Unavailable}


async def test_a_put_of_unknown_outcome_is_repeated_only_when_asked_for() -> None:
    async with Cluster(3) as cluster:
        careful = await cluster.client()
        careless = await cluster.client(retry_unknown=True)
        puts: list[str] = []
        cluster.rule(lambda src, dst, m: puts.append(dst) if isinstance(m, Put) else None)
        for client, tries in ((careful, 1), (careless, 2)):
            puts.clear()
            drop = cluster.rule(lambda src, dst, m: LOST if isinstance(m, PutReply) else None)
            call = asyncio.create_task(client.put("k", b"1", timeout=5))
            await until(lambda: puts)
            coordinator = int(puts[0][1])
            await until(lambda: None not in cluster.held("k"))
            drop()
            await cluster.down(coordinator)
            if tries == 1:
                with pytest.raises(OutcomeUnknown):
                    await call
            else:
                assert await call > 0
            assert len(puts) == tries
            await cluster.up(coordinator)


async def test_a_write_whose_link_broke_is_asked_for_again_at_the_same_node_and_written_once() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        puts: list[Put] = []
        cluster.rule(lambda src, dst, m: puts.append(m) if isinstance(m, Put) else None)
        drop = cluster.rule(lambda src, dst, m: LOST if isinstance(m, PutReply) else None)
        call = asyncio.create_task(client.put("k", b"1", timeout=5))
        await until(lambda: None not in cluster.held("k"))
        before = cluster.held("k")
        drop()
        for remote in list(client._live().up):
            cluster.network.cut(remote.links[0])
        version = await call
        assert [put.retry for put in puts] == [False, True] and puts[0].id == puts[1].id
        assert cluster.held("k") == before and before[0] is not None
        assert version == int.from_bytes(before[0][:8], "big")


async def test_a_doubled_reply_of_one_replica_does_not_count_for_two() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"old", consistency="ALL")
        await cluster.down(2)
        await client.put("k", b"new")
        await cluster.up(2)
        await until(lambda: len(client._live().up) == 3)
        stale: list[bool] = []

        def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
            if dst != "client" or not isinstance(message, ReplicaReadReply):
                return None
            if src == "n2":
                stale.append(True)
                return (0.0, 0.0)
            return (0.02,)

        cluster.rule(rule)
        for _ in range(6):
            assert await client.get("k") == b"new"
            cluster.plant(2, "k", b"old", at_ms=1)
        assert stale


# --- the cluster


async def test_five_nodes_and_three_replicas() -> None:
    async with Cluster(5) as cluster:
        client = await cluster.client()
        asked: list[tuple[str, Message]] = []
        cluster.rule(
            lambda src, dst, m: (
                asked.append((dst, m)) if src == "client" and isinstance(m, Get | Put | Delete | ReplicaRead) else None
            )
        )
        items = {f"k{i}": b"%d" % i for i in range(300)}
        await client.put_many(items)
        for key in list(items)[:30]:
            await client.put(key, items[key])
            assert await client.get(key) == items[key]
        assert await client.get_many(items) == items
        for dst, message in asked:
            for key in message.keys:  # type: ignore[attr-defined]
                assert int(dst[1]) in cluster.holders(key.decode())
        for key in items:
            held = [i for i, record in enumerate(cluster.held(key)) if record is not None]
            assert held == sorted(cluster.holders(key))
        await cluster.down(1)
        assert await client.get_many(items) == items
        assert (await client.put_many(items)).keys() == items.keys()
        assert await client.delete_many(items) == dict.fromkeys(items, True)
        assert set((await client.get_many(items)).values()) == {None}


async def test_questions_about_the_cluster() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1")
        topology = await client.topology()
        assert topology["cluster"] == "dht" and topology["epoch"] == 1 and topology["factor"] == 3
        assert [member["node_id"] for member in topology["members"]] == ["n0", "n1", "n2"]
        located = await client.locate("k")
        assert {name: held["state"] for name, held in located["replicas"].items()} == dict.fromkeys(
            ["n0", "n1", "n2"], "live"
        )
        await cluster.down(1)
        status = await client.status()
        assert status["n0"]["ready"] and "error" in status["n1"] and status["n2"]["keys"] == 1
        stats = await client.stats()
        assert sum(stats[name]["puts"] for name in ("n0", "n2")) <= 1 and "error" in stats["n1"]
        assert (await client.locate("k"))["replicas"]["n1"]["state"] == "unreachable"


async def test_a_large_value_does_not_delay_small_ones() -> None:
    """Large frames travel on links of their own, so that nothing small queues behind them."""
    async with Cluster(3, loopback=True) as cluster:
        client = await cluster.client(timeout=30)
        bulk = {f"big{i}": b"v" * (6 << 20) for i in range(4)}
        load = [asyncio.create_task(client.put(key, value)) for key, value in bulk.items()]
        links = {link for remote in client._live().up for link in remote.links}
        assert len(links) == 6
        small: list[float] = []
        while not all(task.done() for task in load):
            started = time.monotonic()
            await client.put("small", b"1")
            small.append(time.monotonic() - started)
        await asyncio.gather(*load)
        assert small
        for key, value in bulk.items():
            assert await client.get(key) == value


async def test_the_clients_retries_are_the_clusters_unless_it_names_its_own() -> None:
    """A replica that answers Overloaded is asked again as often as `network.retry_count` says."""
    for own, tries in [(None, 2), (0, 1)]:
        async with Cluster(1, factor=1, settings={"dht.network.retry_count": 1}) as cluster:
            client = await cluster.client(**({} if own is None else {"retry_count": own}))
            asked = []
            coordinator = cluster.node(0).coordinator
            assert coordinator is not None

            def refuse(request: Put, reply: ReplyTo, client: str, asked: list[Put] = asked) -> None:
                asked.append(request)
                reply(PutReply(request.id, [], None, Overloaded("full").to_wire()))

            coordinator.put = refuse  # type: ignore[method-assign]
            with pytest.raises(Overloaded):
                await client.put("k", b"v")
            assert len(asked) == tries


async def test_questions_under_way_at_a_node_are_bounded() -> None:
    async with Cluster(1, factor=1) as cluster:
        node, release = cluster.node(0), asyncio.Event()

        async def slow(what: str, key: bytes) -> bytes:
            await release.wait()
            return b"\x80"

        node.queries.answer = slow  # type: ignore[method-assign]
        wire = await cluster.wire(0)
        waiting = [asyncio.ensure_future(wire.ask(Query(0, "stats", 5000))) for _ in range(QUERIES_MAX)]
        await asyncio.sleep(0)
        reply = await wire.ask(Query(0, "stats", 5000))
        assert isinstance(from_wire(*reply.error), Overloaded)
        release.set()
        assert all(answer.error is None for answer in await asyncio.gather(*waiting))
        assert (await wire.ask(Query(0, "stats", 5000))).error is None
