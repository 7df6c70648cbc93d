"""Every setting does what its documentation says, shown on something that runs: nodes in this process where links in
memory can show it, processes where only a process can.

`@effect_of` names the setting that a test is about; the last test of this file holds the names against the table of all
settings, so that a new one needs its test here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
import xxhash
from cluster import LOST, Cluster, until
from contract.storage_harness import redis_server
from integration.process_harness import ANY_PORTS, Asker, NodeProcess, asking, held_ports, node, refused
from redis.asyncio import Redis
from structlog.testing import capture_logs

from agi.core.dht.client import DHTClient
from agi.core.dht.config import KNOBS, Config, load_config
from agi.core.dht.errors import (
    ClockSkew,
    ConnectFailed,
    FolderMismatch,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    Unavailable,
    from_wire,
)
from agi.core.dht.gossip import MESSAGES as GOSSIP_MESSAGES
from agi.core.dht.local import LocalCluster
from agi.core.dht.protocol.messages import (
    ArcListReply,
    Claim,
    Get,
    Gossip,
    IndirectProbe,
    Message,
    Probe,
    Put,
    PutReply,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    ReplicaWriteReply,
    ViewDigest,
)
from agi.core.dht.protocol.record import EXPIRES, FLAGS, SHRUNK, TOMBSTONE, pack
from agi.core.dht.reads import HEDGE_CREDIT_MAX
from agi.core.dht.replica import Replica
from agi.core.dht.requests import KEYS_LEAST, ReplyTo
from agi.core.dht.server import _store
from agi.core.dht.storage.base import Batch, StorageBackend
from agi.core.dht.storage.rocksdb import RocksStore
from agi.core.dht.types import Consistency, MemberStatus

ONE, QUORUM, ALL = Consistency.ONE, Consistency.QUORUM, Consistency.ALL
KEYS = [f"k{i}" for i in range(200)]

Test = TypeVar("Test", bound=Callable[..., Any])
TESTS: dict[str, Callable[..., Any]] = {}


def effect_of(key: str) -> Callable[[Test], Test]:
    """Marks the test that shows what a setting does."""

    def mark(test: Test) -> Test:
        assert TESTS.setdefault(f"dht.{key}", test) is test, f"two tests of {key}"
        return test

    return mark


def put(number: int, key: str = "k", value: bytes = b"v", level: int = QUORUM, timeout_ms: int = 5000) -> Put:
    return Put(number, level, timeout_ms, [key.encode()], [value])


def get(number: int, key: str = "k", level: int = QUORUM) -> Get:
    return Get(number, level, 5000, [key.encode()])


def failure(reply: Any) -> Exception | None:
    """The error of a reply to one key."""
    wire = reply.error or (reply.errors[0][1] if reply.errors else None)
    return None if wire is None else from_wire(*wire)


def is_whole(status: dict[str, Any]) -> bool:
    """Whether that node is connected to all others."""
    return bool(status["peers"]) and all(peer["connected"] for peer in status["peers"].values())


def slow_replies(delay_s: float) -> Callable[[str, str, Message], tuple[float, ...] | None]:
    return lambda src, dst, message: (delay_s,) if isinstance(message, ReplicaReadReply) else None


# --- node


@effect_of("node.id")
async def test_the_node_id_names_the_node_and_belongs_to_its_folder(tmp_path: Path) -> None:
    async with (
        node(tmp_path, "--set", "node.id=alpha", storage="rocksdb") as named,
        asking(named.data_address) as asker,
    ):
        assert named.announced["node_id"] == asker.hello.name == "alpha"
        await asker.until_status(lambda status: status["ready"])
        assert [member["node_id"] for member in (await asker.query("topology"))["members"]] == ["alpha"]
    again = await refused(tmp_path, "--port", "0", "--path", tmp_path / "n", "--node-id", "beta", *ANY_PORTS)
    assert (again.code, again.error) == (
        FolderMismatch.exit_code,
        "the data folder belongs to node alpha, not beta",
    )
    async with node(tmp_path, name="unnamed") as unnamed:
        assert unnamed.announced["node_id"] == unnamed.address


@effect_of("node.advertise")
async def test_others_are_told_the_advertised_address(tmp_path: Path) -> None:
    with held_ports(1) as (port,):
        arguments = ["--port", port, "--set", "network.reuse_port=true", "--advertise", f"localhost:{port}"]
        async with node(tmp_path, *arguments) as advertising, DHTClient() as client:
            assert advertising.address == f"localhost:{port}"
            await client.connect([f"127.0.0.1:{port}"])
            await client.put("k", b"v")  # over that address: a client uses what the members say
            assert [member["address"] for member in (await client.topology())["members"]] == [f"localhost:{port}"]


@effect_of("node.weight")
async def test_a_heavier_node_has_more_of_the_ring_and_of_the_keys() -> None:
    async with Cluster(3, factor=1, formed=False, per_node={0: {"dht.node.weight": 4}}) as cluster:
        await cluster.connected()
        ring = cluster.node(1).ring
        assert ring is not None and ring.vnode_count == 8 * 4 + 8 + 8
        shares = ring.ownership()
        assert shares["n0"] > 0.5 > shares["n1"] + shares["n2"]
        client = await cluster.client()
        await client.put_many(dict.fromkeys(KEYS, b"v"))
        held = [sum(store.read([key.encode()])[0] is not None for key in KEYS) for store in cluster.stores]
        assert held[0] > len(KEYS) / 2 and sum(held) == len(KEYS)


async def _domains_of_holders(label: str) -> set[tuple[str, ...]]:
    """The domains in which the two copies of each key lie, with two nodes in each of the domains a and b."""
    domains = ["a", "a", "b", "b"]
    per_node = {i: {label: domain} for i, domain in enumerate(domains)} if label else None
    async with Cluster(4, factor=2, formed=False, per_node=per_node) as cluster:
        await cluster.connected()
        client = await cluster.client()
        await client.put_many(dict.fromkeys(KEYS, b"v"), consistency=ALL)
        return {tuple(domains[i] for i, record in enumerate(cluster.held(key)) if record is not None) for key in KEYS}


@effect_of("node.rack")
async def test_copies_lie_in_different_racks() -> None:
    assert await _domains_of_holders("") == {("a", "a"), ("a", "b"), ("b", "b")}
    assert await _domains_of_holders("dht.node.rack") == {("a", "b")}


@effect_of("node.zone")
async def test_copies_lie_in_different_zones_whatever_the_racks() -> None:
    assert await _domains_of_holders("dht.node.zone") == {("a", "b")}
    zoned = {i: {"dht.node.zone": zone, "dht.node.rack": rack} for i, (zone, rack) in enumerate(["xr", "xs", "yr"])}
    async with Cluster(3, factor=2, formed=False, per_node=zoned) as cluster:
        await cluster.connected()
        ring = cluster.node(0).ring
        assert ring is not None
        assert all("n2" in ring.replicas(key.encode()) for key in KEYS)  # n0 and n1 share a zone, though not a rack


# --- cluster


@effect_of("cluster.name")
async def test_nodes_of_two_names_refuse_each_other() -> None:
    async with Cluster(2, formed=False, per_node={1: {"dht.cluster.name": "other"}}) as cluster:
        for living in cluster.living():  # each knows which of them has which name, whoever refused
            await until(lambda: "cluster is " in living.waiting_for)  # noqa: B023  # awaited here
            assert "'dht' at n0" in living.waiting_for and "'other' at n1" in living.waiting_for
        assert not any(living.formed.is_set() for living in cluster.living())
    async with Cluster(2, formed=False, settings={"dht.cluster.name": "other"}) as cluster:
        await cluster.connected()


@effect_of("cluster.bootstrap_nodes")
async def test_nodes_that_list_each_other_are_one_cluster_and_others_are_not() -> None:
    async with Cluster(2, formed=False) as cluster:
        await cluster.connected()
        assert [len(living.topology.members) for living in cluster.living() if living.topology] == [2, 2]
    alone = {i: {"dht.cluster.bootstrap_nodes": ""} for i in range(2)}
    async with Cluster(2, formed=False, per_node=alone) as cluster:
        await until(lambda: all(living.formed.is_set() for living in cluster.living()))
        assert [len(living.topology.members) for living in cluster.living() if living.topology] == [1, 1]


@effect_of("cluster.force_start_without")
async def test_the_first_start_does_not_wait_for_those_declared_dead() -> None:
    async def without_n2(check: Callable[[Cluster], Awaitable[None]], **per_node: object) -> None:
        forced = {i: {f"dht.cluster.{name}": value for name, value in per_node.items()} for i in range(2)}
        async with Cluster(3, formed=False, per_node=forced) as cluster:
            cluster.network.can_connect = lambda src, dst: "n2" not in (src, dst)
            cluster.network.refuses = lambda src, dst: True
            await check(cluster)

    async def waits(cluster: Cluster) -> None:
        await until(lambda: all("n2:7000" in cluster.node(i).waiting_for for i in range(2)))
        assert not any(living.formed.is_set() for living in cluster.living())

    async def forms(cluster: Cluster) -> None:
        await until(lambda: all(cluster.node(i).formed.is_set() for i in range(2)))
        topology = cluster.node(0).topology
        assert topology is not None and sorted(topology.by_id) == ["n0", "n1"]
        assert not cluster.node(2).formed.is_set()

    await without_n2(waits)
    await without_n2(forms, force_start_without="n2:7000")


# --- replication


@effect_of("replication.factor")
async def test_so_many_nodes_hold_a_key() -> None:
    for factor in (1, 2, 3):
        async with Cluster(4, factor=factor, formed=False) as cluster:
            await cluster.connected()
            client = await cluster.client()
            await client.put_many(dict.fromkeys(KEYS[:20], b"v"), consistency=ALL)
            held = [4 - cluster.held(key).count(None) for key in KEYS[:20]]
            assert held == [factor] * 20


async def _works(client: DHTClient, kind: str) -> bool:
    """Whether a call without a level of its own succeeds."""
    try:
        await (client.put("k", b"new") if kind == "write" else client.get("k"))
    except Unavailable as error:
        assert error.needed > error.answered > 0
        return False
    return True


async def _levels(kind: str) -> dict[str, list[bool]]:
    """For each level, whether calls succeed with 0, 1 and 2 of 3 replicas down."""
    found = {}
    for level in Consistency:
        async with Cluster(3, settings={f"dht.replication.{kind}_consistency": level}) as cluster:
            client = await cluster.client(retry_count=0)
            found[level.name] = [await _works(client, kind)]
            for i in (2, 1):
                await cluster.down(i)
                found[level.name].append(await _works(client, kind))
    return found


LEVELS = {"ONE": [True, True, True], "QUORUM": [True, True, False], "ALL": [True, False, False]}
LEVELS["LINEARIZABLE"] = LEVELS["QUORUM"]


@effect_of("replication.read_consistency")
async def test_reads_wait_for_so_many_replies() -> None:
    assert await _levels("read") == LEVELS


@effect_of("replication.write_consistency")
async def test_writes_wait_for_so_many_replicas() -> None:
    assert await _levels("write") == LEVELS


# --- ring


@effect_of("ring.virtual_nodes")
async def test_each_node_has_so_many_points_on_the_ring() -> None:
    arcs = []
    for points in (1, 16):
        settings = {"dht.ring.virtual_nodes": points}
        async with Cluster(3, factor=1, formed=False, settings=settings) as cluster:
            await cluster.connected()
            ring = cluster.node(0).ring
            assert ring is not None and ring.vnode_count == 3 * points
            client = await cluster.client()
            session = client._live()
            assert session.ring is not None and session.ring.vnode_count == 3 * points  # clients compute the same
            arcs.append([client._live().ring.replicas(key.encode()) for key in KEYS])  # type: ignore[union-attr]
    assert arcs[0] != arcs[1]


@effect_of("ring.hash_algorithm")
async def test_tokens_are_of_that_hash() -> None:
    expected = {"md5": hashlib.md5(b"k").digest()[:8], "xxh3": xxhash.xxh3_64_digest(b"k")}
    for algorithm, token in expected.items():
        async with Cluster(1, factor=1, formed=False, settings={"dht.ring.hash_algorithm": algorithm}) as cluster:
            await cluster.connected()
            client = await cluster.client()
            assert (await client.locate("k"))["token"] == int.from_bytes(token, "big")
        store = store_of_config(load_config(None, {}, {"ring.hash_algorithm": algorithm, "storage.backend": "memory"}))
        await store.open()  # the store keeps the order of the ring
        await store.apply(Batch({b"k": pack(b"k", b"v", 1, 1)}, [b"k"]))
        at = int.from_bytes(token, "big")
        assert len((await store.scan_tokens(at, at, 10)).items) == 1
        await store.close()


# --- storage


@effect_of("storage.backend")
async def test_the_backend_is_where_records_are_kept(tmp_path: Path) -> None:
    for backend, kept in (("memory", None), ("rocksdb", b"v")):
        name = f"{backend}-node"
        arguments = ["--set", f"node.id={name}", "--set", f"storage.backend={backend}"]
        for put_first in (True, False):
            async with node(tmp_path, *arguments, name=name) as running, asking(running.data_address) as asker:
                assert (await asker.until_status(lambda status: status["ready"]))["storage"] == backend
                if put_first:
                    assert failure(await asker.ask(put(1))) is None
                else:
                    reply = await asker.ask(get(1))
                    assert [record and record[-1:] for record in reply.records] == [kept]
        assert (tmp_path / name).exists() == (backend == "rocksdb")


@effect_of("storage.path")
async def test_the_data_lies_at_the_path(tmp_path: Path) -> None:
    arguments = ["--node-id", "a/b", "--path", tmp_path / "deep" / "{node_id}" / "data"]
    async with node(tmp_path, *arguments, storage="rocksdb") as running, asking(running.data_address) as asker:
        await asker.until_status(lambda status: status["ready"])
        assert (tmp_path / "deep" / "a_b" / "data" / "CURRENT").is_file()
        assert not (tmp_path / "n").exists() and not (tmp_path / "dht-data").exists()


def store_of_config(config: Config, folder: Path = Path("unused")) -> StorageBackend:
    """The store that a node of this configuration has."""
    return _store(config, folder, "n0")


def store_with(folder: Path, **settings: object) -> RocksStore:
    """The RocksDB store of a node with these settings."""
    config = load_config(None, {}, {f"dht.storage.{name}": value for name, value in settings.items()})
    store = store_of_config(config, folder)
    assert isinstance(store, RocksStore)
    return store


@effect_of("storage.cache_size_mb")
async def test_the_caches_have_that_size(tmp_path: Path) -> None:
    for size_mb in (8, 64):
        store = store_with(tmp_path / str(size_mb), cache_size_mb=size_mb)
        await store.open()
        try:
            assert store._engine is not None
            blocks = store._engine.db.property_int_value("rocksdb.block-cache-capacity")
            assert blocks == size_mb * 3 << 18  # three quarters; the rest is the cache of records
        finally:
            await store.close()


class Counting:
    """A database that counts its syncs."""

    def __init__(self, db: Any) -> None:
        self.syncs = 0
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def flush_wal(self, sync: bool) -> None:
        self.syncs += sync
        self._db.flush_wal(sync)


@asynccontextmanager
async def node_on(store: RocksStore) -> AsyncIterator[tuple[DHTClient, Counting]]:
    """A client of a node on this store, and the syncs that the store has seen since."""
    async with Cluster(1, factor=1, formed=False, store=lambda _: store) as cluster:
        await cluster.connected()
        assert store._engine is not None
        counting = store._engine.db = Counting(store._engine.db)
        try:
            yield await cluster.client(), counting
        finally:
            store._engine.db = counting._db


@effect_of("storage.wal_sync")
async def test_the_mode_decides_when_writes_are_synced(tmp_path: Path) -> None:
    for mode, expected in (("group", [1, 2, 3]), ("interval", [0, 0, 0]), ("none", [0, 0, 0])):
        async with node_on(store_with(tmp_path / mode, wal_sync=mode, wal_sync_interval_ms=60_000)) as (
            client,
            counting,
        ):
            at_acknowledgement = []
            for i in range(3):
                await client.put(f"k{i}", b"v")
                at_acknowledgement.append(counting.syncs)
            assert at_acknowledgement == expected, mode
    async with node_on(store_with(tmp_path / "soon", wal_sync="interval", wal_sync_interval_ms=5)) as (
        client,
        counting,
    ):
        await client.put("k", b"v")
        await until(lambda: counting.syncs == 1)


@effect_of("storage.wal_sync_interval_ms")
async def test_a_shorter_interval_syncs_more_often(tmp_path: Path) -> None:
    stores = {ms: store_with(tmp_path / str(ms), wal_sync="interval", wal_sync_interval_ms=ms) for ms in (5, 60_000)}
    counting: dict[int, Counting] = {}
    try:
        for ms, store in stores.items():
            await store.open()
            assert store._engine is not None
            counting[ms] = store._engine.db = Counting(store._engine.db)
        for round_ in range(1, 4):
            for store in stores.values():
                store._dirty = True  # as a write leaves it
            await until(lambda: counting[5].syncs == round_)  # noqa: B023  # awaited here
        assert counting[60_000].syncs == 0
    finally:
        for ms, store in stores.items():
            if store._engine is not None and ms in counting:
                store._engine.db = counting[ms]._db
            await store.close()


@effect_of("storage.redis_url")
async def test_the_records_are_on_that_server(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        arguments = ["--set", f"storage.redis_url={server.url}/0", "--node-id", "r"]
        async with node(tmp_path, *arguments, storage="redis") as running, asking(running.data_address) as asker:
            assert (await asker.until_status(lambda status: status["ready"]))["storage"] == "redis"
            assert failure(await asker.ask(put(1, "on redis"))) is None
            client = Redis.from_url(server.url)
            try:
                assert await client.hkeys("dht:r:records") == [b"on redis"]  # type: ignore[misc]  # redis's types
            finally:
                await client.aclose()


# --- network


def answers(host: str, port: int) -> bool:
    """Whether anybody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@effect_of("network.host")
async def test_all_ports_are_on_that_interface(tmp_path: Path) -> None:
    for host, elsewhere in (("127.0.0.2", False), ("", True)):
        async with node(tmp_path, "--host", host, name=f"at{host}") as running:
            said = running.announced
            addresses = [said["address"], said["data_address"], said["http_address"]]
            assert {address.rpartition(":")[0] for address in addresses} == {host or "127.0.0.1"}
            for address in addresses:
                assert answers("127.0.0.2", port_of(address))
                assert answers("127.0.0.3", port_of(address)) == elsewhere  # any other address of this machine


@effect_of("network.port")
async def test_the_grpc_service_is_at_the_port(tmp_path: Path) -> None:
    with held_ports(1) as (port,):
        async with node(tmp_path, "--set", "network.reuse_port=true", "--set", f"network.port={port}") as running:
            assert running.announced["port"] == port and running.address == f"127.0.0.1:{port}"
            async with DHTClient() as client:
                await client.connect([f"127.0.0.1:{port}"])
                await client.put("k", b"v")


@effect_of("network.data_port")
async def test_the_native_wire_is_at_its_port(tmp_path: Path) -> None:
    with held_ports(1) as (port,):
        arguments = ["--set", "network.reuse_port=true", "--set", f"network.data_port={port}"]
        async with node(tmp_path, *arguments) as running, asking(f"127.0.0.1:{port}") as asker:
            assert running.data_address == f"127.0.0.1:{port}"
            assert asker.hello.data_address == running.data_address and asker.hello.address == running.address


@effect_of("network.http_port")
async def test_the_http_endpoints_are_at_their_port(tmp_path: Path) -> None:
    with held_ports(1) as (port,):
        async with node(tmp_path, "--set", "network.reuse_port=true", "--set", f"network.http_port={port}") as running:
            assert running.announced["http_address"] == f"127.0.0.1:{port}"
            async with asking(running.data_address) as asker:
                assert asker.hello.http_address == f"127.0.0.1:{port}"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(20):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
            await writer.wait_closed()


@effect_of("network.unix_socket")
async def test_the_native_wire_is_at_its_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "native.sock"
    async with node(tmp_path, "--set", f"network.unix_socket={path}") as running:
        assert running.announced["unix_socket"] == str(path)
        async with asking(f"unix:{path}") as asker:
            assert asker.hello.address == running.address and asker.hello.unix_path == str(path)
    assert not path.exists()
    async with node(tmp_path) as running, asking(running.data_address) as asker:
        assert running.announced["unix_socket"] == asker.hello.unix_path == ""


@effect_of("network.timeout_ms")
async def test_a_call_that_states_no_timeout_ends_by_this_one() -> None:
    async with Cluster(3, settings={"dht.network.timeout_ms": 250}) as cluster:
        client = await cluster.client()
        cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) else None)
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await client.put("k", b"v")
        assert 0.15 < time.monotonic() - started < 1.5  # the default would be 2 s
        with pytest.raises(OutcomeUnknown):
            await client.put("k", b"v", timeout=0.3)


@effect_of("network.retry_count")
async def test_so_many_tries_follow_a_retryable_error() -> None:
    for retries in (0, 2):
        async with Cluster(1, factor=1, settings={"dht.network.retry_count": retries}) as cluster:
            client = await cluster.client()
            asked: list[Put] = []
            coordinator = cluster.node(0).coordinator
            assert coordinator is not None

            def refuse(request: Put, reply: ReplyTo, client: str, asked: list[Put] = asked) -> None:
                asked.append(request)
                reply(PutReply(request.id, [], None, Overloaded("full").to_wire()))

            coordinator.put = refuse  # type: ignore[method-assign]
            with pytest.raises(Overloaded):
                await client.put("k", b"v")
            assert len(asked) == 1 + retries


@effect_of("network.connection_pool_size")
async def test_so_many_links_go_to_each_peer() -> None:
    for size in (1, 3):
        async with Cluster(2, settings={"dht.network.connection_pool_size": size}) as cluster:
            for here, there in ((0, 1), (1, 0)):
                assert len(cluster.node(here).peers.connected[f"n{there}"].links) == size
                accepted = cluster.node(here)._sessions["node", f"n{there}"].links
                await until(lambda: len(accepted) == size)  # noqa: B023  # the link that asked for the address has gone


@effect_of("network.reuse_port")
async def test_a_port_that_the_launcher_holds_is_bound_only_if_told_so(tmp_path: Path) -> None:
    with held_ports(2) as (port, data_port):
        arguments = ["--port", port, "--storage", "memory", "--set", f"network.data_port={data_port}"]
        arguments += ["--set", "network.http_port=0", "--set", "network.unix_socket="]
        refusal = await refused(tmp_path, *arguments)
        assert refusal.code == ConnectFailed.exit_code and f"127.0.0.1:{port}" in refusal.error
        refusal = await refused(tmp_path, *arguments, "--port", 0)
        assert refusal.code == ConnectFailed.exit_code and f"127.0.0.1:{data_port}" in refusal.error
        async with node(tmp_path, *arguments, "--set", "network.reuse_port=true") as running:
            assert answers("127.0.0.1", port) and running.data_address == f"127.0.0.1:{data_port}"


@asynccontextmanager
async def stopping_node(folder: Path, drain_timeout_ms: int) -> AsyncIterator[tuple[Process, Process, Asker]]:
    """(node, frozen node, link to the first): the first has begun the put 1, which needs the frozen one, and was told
    to stop."""
    settings = {"network.drain_timeout_ms": str(drain_timeout_ms)}
    async with LocalCluster(3, folder, storage="memory", settings=settings) as cluster:
        stopping, frozen = cluster.node(0), cluster.node(2)
        async with asking(stopping.announced["data_address"]) as asker:
            await asker.until_status(is_whole)
            frozen.process.send_signal(signal.SIGSTOP)
            try:
                asker.link.send(put(1, level=ALL, timeout_ms=60_000))
                # requests of a link are begun in their order: once this is answered, the put has begun
                assert failure(await asker.ask(get(2, level=ONE))) is None
                stopping.process.send_signal(signal.SIGTERM)
                yield stopping.process, frozen.process, asker
            finally:
                frozen.process.send_signal(signal.SIGCONT)


@effect_of("network.drain_timeout_ms")
async def test_a_stop_waits_that_long_for_what_was_begun(tmp_path: Path) -> None:
    async with stopping_node(tmp_path, 0) as (stopping, _, asker):
        async with asyncio.timeout(20):
            assert await stopping.wait() == 0  # although its put cannot end
            await asker.closed.wait()
        assert not asker.replies(1)


async def test_what_a_stopping_node_had_begun_is_answered(tmp_path: Path) -> None:
    """SIGTERM drains: the slow put under way ends well, what comes later is refused, the exit code is 0."""
    async with stopping_node(tmp_path, 60_000) as (stopping, frozen, asker):
        number = 3
        while failure(reply := await asker.ask(put(number, "late", level=ONE))) is None:
            number += 1  # the signal has not arrived yet
        assert isinstance(failure(reply), NotReady) and "stopping" in str(failure(reply))
        assert not asker.replies(1)
        frozen.send_signal(signal.SIGCONT)
        assert failure(await asker.reply(1)) is None
        async with asyncio.timeout(20):
            assert await stopping.wait() == 0


# --- versions, requests


@effect_of("versions.max_clock_skew_ms")
async def test_a_version_further_ahead_is_refused() -> None:
    for skew_ms, refusal in ((10_000, ClockSkew), (60_000, type(None))):
        async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": skew_ms}) as cluster:
            cluster.clocks[0].ahead_ms = 30_000
            wire = await cluster.wire(0)
            assert type(failure(await wire.ask(put(1)))) is refusal
            assert (cluster.held("k") == [None] * 3) == (refusal is ClockSkew)


@effect_of("requests.hedge_percentile")
async def test_a_read_is_hedged_once_it_is_later_than_this_percentile() -> None:
    hedges = {}
    for percentile in (0.5, 0.999):
        settings = {"dht.requests.hedge_percentile": percentile, "dht.requests.hedge_budget": 1}
        async with Cluster(3, settings=settings) as cluster:
            wire = await cluster.wire(0)
            for number in range(1, 301):  # teaches what is usual: a few milliseconds at most
                await wire.ask(get(number))
            before = cluster.node(0).metrics.hedges
            cluster.rule(slow_replies(0.015))  # slower than half of them, quicker than the slowest in a thousand
            for number in range(1001, 1021):
                await wire.ask(get(number))
            hedges[percentile] = cluster.node(0).metrics.hedges - before
    assert hedges[0.5] >= 12 and hedges[0.999] <= hedges[0.5] / 2, hedges


@effect_of("requests.hedge_budget")
async def test_hedges_are_at_most_this_share_of_reads() -> None:
    hedges = {}
    for budget in (0, 0.25, 1):
        async with Cluster(3, settings={"dht.requests.hedge_budget": budget}) as cluster:
            cluster.rule(slow_replies(0.15))
            wire = await cluster.wire(0)
            await asyncio.gather(*(wire.ask(get(number)) for number in range(1, 41)))
            hedges[budget] = cluster.node(0).metrics.hedges
    assert hedges[0] == 0
    assert 5 <= hedges[0.25] <= 1 + 0.25 * 40, hedges  # a start gives credit for one
    assert hedges[1] == HEDGE_CREDIT_MAX, hedges  # all at once, so no more than may follow each other


@effect_of("requests.dedup_entries")
async def test_so_many_results_are_remembered() -> None:
    for entries, known in ((2, False), (100, True)):
        async with Cluster(1, factor=1, settings={"dht.requests.dedup_entries": entries}) as cluster:
            wire = await cluster.wire(0)
            first = await wire.ask(put(1))
            for number in range(2, 7):
                await wire.ask(put(number, f"other{number}"))
            again = await wire.ask(Put(1, QUORUM, 5000, [b"k"], [b"v"], 0, True))
            assert (again == first) is known
            assert known or isinstance(failure(again), OutcomeUnknown)


@effect_of("requests.pending_bytes_max_mb")
async def test_past_so_many_bytes_under_way_requests_are_refused() -> None:
    value = b"v" * (6 << 20)
    for limit_mb, refusal in ((16, Overloaded), (32, type(None))):
        async with Cluster(2, factor=2, settings={"dht.requests.pending_bytes_max_mb": limit_mb}) as cluster:
            wire = await cluster.wire(0)
            hold = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) else None)
            for number in (1, 2):
                wire.link.send(put(number, f"k{number}", value, ALL, 60_000))
            assert type(failure(await wire.ask(put(3, "k3", value, ONE)))) is refusal
            hold()


@effect_of("requests.queue_ms")
async def test_past_so_long_a_queue_requests_are_refused() -> None:
    for queue_ms, refusal in ((10, Overloaded), (60_000, type(None))):
        async with Cluster(2, factor=2, settings={"dht.requests.queue_ms": queue_ms}) as cluster:
            wire = await cluster.wire(0)
            hold = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ReplicaWriteReply) else None)
            keys = [b"k%d" % n for n in range(KEYS_LEAST + 1)]
            wire.link.send(Put(1, ALL, 60_000, keys, [b"v"] * len(keys)))
            for number in (2, 3):
                wire.link.send(put(number, f"k{number}", b"v", ALL, 60_000))
                await asyncio.sleep(0.05)
            assert type(failure(await wire.ask(put(4, "k4", b"v", ONE)))) is refusal
            assert cluster.node(0).metrics.failures == ({} if refusal is not Overloaded else {"Overloaded": 2})
            hold()


# --- health


class Seen:
    """What the failure detectors of a cluster send: (when, from, to, message). `silent` members say nothing any more,
    though their links stay up."""

    def __init__(self, cluster: Cluster) -> None:
        self.messages: list[tuple[float, str, str, Message]] = []
        self.silent: set[str] = set()
        self._now = asyncio.get_running_loop().time
        cluster.rule(self._rule)

    def _rule(self, src: str, dst: str, message: Message) -> tuple[float, ...] | None:
        if isinstance(message, GOSSIP_MESSAGES):
            self.messages.append((self._now(), src, dst, message))
            return () if src in self.silent else None
        return None

    def of(self, kind: type[Message], src: str = "n0") -> list[tuple[float, str, str, Message]]:
        return [each for each in self.messages if isinstance(each[3], kind) and each[1] == src]

    def times(self, kind: type[Message], src: str = "n0", dst: str = "") -> list[float]:
        return [at for at, _, to, _ in self.of(kind, src) if not dst or to == dst]


@asynccontextmanager
async def detecting(
    count: int = 3, only: dict[str, object] | None = None, **settings: object
) -> AsyncIterator[tuple[Cluster, Seen]]:
    """Nodes whose failure detectors do what these settings say: `only` those of n0, and those of the others nothing."""
    idle = {"heartbeat_interval_ms": 600_000, "probe_timeout_ms": 100_000, "sync_interval_ms": 600_000}
    quick = {"heartbeat_interval_ms": 40, "probe_timeout_ms": 20, "awareness_max": 0, "sync_interval_ms": 600_000}

    def named(values: dict[str, object]) -> dict[str, object]:
        return {f"dht.health.{name}": value for name, value in values.items()}

    alone = only is not None
    async with Cluster(
        count,
        settings=named({**(idle if alone else quick), **settings}),
        per_node={0: named({**quick, **only})} if only is not None else None,
    ) as cluster:
        yield cluster, Seen(cluster)


async def _status_times(cluster: Cluster, seen: Seen) -> dict[MemberStatus, float]:
    """When n0 first held n1, which says nothing any more, to be suspected and dead."""
    at: dict[MemberStatus, float] = {}
    now = asyncio.get_running_loop().time
    cluster.node(0).on_member_status(lambda member, status: at.setdefault(status, now()) if member == "n1" else None)
    seen.silent = {"n1"}
    await until(lambda: MemberStatus.DEAD in at)
    return at


@effect_of("health.preset")
async def test_a_preset_sets_what_is_not_set() -> None:
    probes = {}
    for preset in ("local", "wan"):
        async with Cluster(2, settings={"dht.health.preset": preset}) as cluster:
            seen = Seen(cluster)
            await asyncio.sleep(1.5)  # several heartbeats of 0.2 s, at most one of 2 s
            probes[preset] = len(seen.of(Probe))
    assert probes["local"] > probes["wan"] and probes["wan"] <= 1
    quick = {"dht.health.heartbeat_interval_ms": 40, "dht.health.probe_timeout_ms": 20}
    async with Cluster(2, settings={"dht.health.preset": "wan", **quick}) as cluster:
        seen = Seen(cluster)
        await until(lambda: len(seen.of(Probe)) > 5)  # 10 s by the preset


@effect_of("health.heartbeat_interval_ms")
async def test_a_member_is_probed_every_heartbeat() -> None:
    for heartbeat_ms in (40, 200):
        async with detecting(heartbeat_interval_ms=heartbeat_ms) as (_, seen):
            await until(lambda seen=seen: len(seen.of(Probe)) > 4)
            times = seen.times(Probe)
            assert times[4] - times[0] >= 3 * heartbeat_ms / 1000


@effect_of("health.probe_timeout_ms")
async def test_helpers_are_asked_after_the_probe_timeout() -> None:
    for timeout_ms in (20, 150):
        async with detecting(heartbeat_interval_ms=300, probe_timeout_ms=timeout_ms) as (_, seen):
            seen.silent = {"n1"}
            await until(lambda seen=seen: seen.of(IndirectProbe))
            asked = seen.of(IndirectProbe)[0]
            probed = next(at for at, _, to, probe in seen.of(Probe) if to == "n1" and probe.seq == asked[3].seq)  # type: ignore[attr-defined]
            waited_ms = (asked[0] - probed) * 1000
            assert waited_ms >= timeout_ms / 2 and (timeout_ms > 20 or waited_ms < 140)


@effect_of("health.failure_threshold")
async def test_so_many_failed_probes_make_a_suspicion() -> None:
    for threshold in (1, 4):
        async with detecting(only={"failure_threshold": threshold, "suspicion_mult": 1}) as (cluster, seen):
            failed: list[set[int]] = []

            def report(member: str, status: MemberStatus, seen: Seen = seen, failed: list[set[int]] = failed) -> None:
                if member == "n1":  # each round of it had helpers asked
                    asked = seen.of(IndirectProbe)
                    failed.append({message.seq for _, _, _, message in asked if message.target == "n1"})  # type: ignore[attr-defined]

            cluster.node(0).on_member_status(report)
            seen.silent = {"n1"}
            await until(lambda failed=failed: failed)
            assert len(failed[0]) == threshold


@effect_of("health.indirect_probes")
async def test_so_many_others_are_asked_to_help() -> None:
    for helpers in (0, 1, 3):
        async with detecting(5, only={"indirect_probes": helpers, "failure_threshold": 100}) as (cluster, seen):
            seen.silent = {"n1"}
            rounds: dict[int, set[str]] = {}
            await until(lambda c=cluster: c.node(0).detector.core.failed_probes >= 5)  # type: ignore[union-attr]
            await until(lambda seen=seen: len(seen.times(Probe, dst="n1")) >= 3)
            for _, _, to, message in seen.of(IndirectProbe):
                if message.target == "n1":  # type: ignore[attr-defined]
                    rounds.setdefault(message.seq, set()).add(to)  # type: ignore[attr-defined]
            assert {len(asked) for asked in rounds.values()} == ({helpers} if helpers else set())


@effect_of("health.suspicion_mult")
async def test_a_suspicion_lasts_so_many_heartbeats() -> None:
    for mult in (1, 10):
        async with detecting(only={"suspicion_mult": mult, "suspicion_max_mult": 1}) as (cluster, seen):
            at = await _status_times(cluster, seen)
            assert at[MemberStatus.DEAD] - at[MemberStatus.SUSPECT] >= mult * 0.03


@effect_of("health.suspicion_max_mult")
async def test_a_suspicion_that_nobody_shares_lasts_so_many_times_longer() -> None:
    for mult in (1, 5):
        async with detecting(only={"suspicion_mult": 3, "suspicion_max_mult": mult}) as (cluster, seen):
            at = await _status_times(cluster, seen)
            lasted_s = at[MemberStatus.DEAD] - at[MemberStatus.SUSPECT]
            assert lasted_s >= mult * 3 * 0.03


@effect_of("health.recovery_timeout_ms")
async def test_a_dead_node_is_tried_again_so_often() -> None:
    for recovery_ms in (50, 400):
        async with detecting(recovery_timeout_ms=recovery_ms, suspicion_mult=1) as (cluster, seen):
            await _status_times(cluster, seen)
            known = len(seen.times(Probe, dst="n1"))
            await until(lambda seen=seen, known=known: len(seen.times(Probe, dst="n1")) >= known + 4)
            times = seen.times(Probe, dst="n1")[known:]
            assert times[3] - times[0] >= 2 * recovery_ms / 1000


def _told(seen: Seen) -> list[tuple[float, str]]:
    """When, and whom, n0 told of it."""
    sent = seen.of(Gossip)
    return [(at, to) for at, _, to, gossip in sent if any(claim.incarnation == 1 for claim in gossip.claims)]  # type: ignore[attr-defined]


@effect_of("health.gossip_interval_ms")
async def test_news_is_passed_on_every_so_often() -> None:
    for interval_ms in (10, 250):
        idle = {"heartbeat_interval_ms": 600_000, "probe_timeout_ms": 100_000}
        async with detecting(2, gossip_interval_ms=interval_ms, retransmit_mult=20, **idle) as (cluster, seen):
            _news(cluster, seen)
            await until(lambda seen=seen: len(_told(seen)) >= 3)
            times = [at for at, _ in _told(seen)]
            assert times[2] - times[0] >= interval_ms / 1000


def _news(cluster: Cluster, seen: Seen) -> None:
    """Lets n0 hear that n1 has refuted something, and n1 not contradict."""
    seen.silent = {"n1"}
    detector = cluster.node(0).detector
    assert detector.core is not None
    known = detector.core.view.get("n1")
    claim = Claim("n1", known.disk, known.boot, known.incarnation + 1, MemberStatus.ALIVE)
    detector.reply(cluster.node(0).peers.all["n1"], Gossip([claim]))


@effect_of("health.gossip_nodes")
async def test_news_is_sent_to_so_many_at_a_time() -> None:
    idle = {"heartbeat_interval_ms": 600_000, "probe_timeout_ms": 100_000}
    for nodes in (1, 3):
        async with detecting(5, gossip_nodes=nodes, retransmit_mult=20, **idle) as (cluster, seen):
            _news(cluster, seen)
            await until(lambda seen=seen: len(_told(seen)) >= 6)
            first, _ = _told(seen)[0]
            assert len({to for at, to in _told(seen) if at < first + 0.02}) == nodes
    async with detecting(5, gossip_nodes=0, retransmit_mult=1) as (cluster, seen):
        _news(cluster, seen)
        await until(lambda: any(probe.gossip for _, _, _, probe in seen.of(Probe)))  # type: ignore[attr-defined]
        assert seen.of(Gossip) == []


@effect_of("health.retransmit_mult")
async def test_news_is_passed_on_so_many_times() -> None:
    idle = {"heartbeat_interval_ms": 600_000, "probe_timeout_ms": 100_000}
    for mult in (1, 7):
        async with detecting(5, retransmit_mult=mult, gossip_interval_ms=10, **idle) as (cluster, seen):
            _news(cluster, seen)
            await until(lambda c=cluster: c.node(0).detector.core.queued == 0)  # type: ignore[union-attr]
            await asyncio.sleep(0)  # the last of it leaves
            assert len(_told(seen)) == mult  # times ceil(log10(5 + 1)) = 1


@effect_of("health.sync_interval_ms")
async def test_views_are_compared_every_so_often() -> None:
    async with detecting(sync_interval_ms=100) as (_, seen):
        await until(lambda: len(seen.of(ViewDigest)) >= 5)
        times = seen.times(ViewDigest)
        assert times[4] - times[0] >= 0.3
    async with detecting(sync_interval_ms=600_000) as (cluster, seen):
        await until(lambda: len(seen.of(Probe)) > 10)
        assert len(seen.of(ViewDigest)) <= 2 * len(cluster.names), "but when links come up"


@effect_of("health.awareness_max")
async def test_a_node_that_hears_nobody_slows_down_so_far() -> None:
    for highest in (0, 2):
        async with detecting(only={"awareness_max": highest, "failure_threshold": 100}) as (cluster, seen):
            core = cluster.node(0).detector.core
            assert core is not None
            seen.silent = {"n1", "n2"}
            await until(lambda core=core: core.failed_probes >= 6)
            assert core.awareness.score == highest
            probed = core.probes
            began = asyncio.get_running_loop().time()
            await until(lambda core=core, probed=probed: core.probes >= probed + 6)
            # two rounds a heartbeat: that of its turn and that of a member which failed before
            assert asyncio.get_running_loop().time() - began >= 0.04 * (1 + highest)


# --- hints


async def hinted(cluster: Cluster, count: int, size: int) -> None:
    """n1 misses so many records, which n0 coordinates."""
    wire = await cluster.wire(0)
    await cluster.down(1)
    for number in range(1, count + 1):
        assert failure(await wire.ask(put(number, f"k{number}", b"v" * size, ONE))) is None


@effect_of("hints.bytes_max_mb")
async def test_so_many_bytes_are_kept_for_a_node_that_is_away() -> None:
    for limit_mb, kept in ((0, 0), (1, 2), (2, 5)):
        async with Cluster(2, factor=2, settings={"dht.hints.bytes_max_mb": limit_mb}) as cluster:
            await hinted(cluster, 8, 400_000)
            assert len(cluster.node(0).handoff.hints) == kept


@effect_of("hints.age_max_s")
async def test_hints_are_kept_for_so_long() -> None:
    for age_s, kept in ((10, 1), (60, 4)):
        async with Cluster(2, factor=2, settings={"dht.hints.age_max_s": age_s}) as cluster:
            await hinted(cluster, 3, 1)
            cluster.clocks[0].ahead_ms = 30_000
            assert failure(await (await cluster.wire(0, "d")).ask(put(9, "new", b"v", ONE))) is None
            assert len(cluster.node(0).handoff.hints) == kept


@effect_of("hints.replay_bytes_per_s")
async def test_hints_are_brought_at_that_pace() -> None:
    for rate, batches in ((4096, [3, 3]), (1 << 30, [6])):
        async with Cluster(2, factor=2, settings={"dht.hints.replay_bytes_per_s": rate}) as cluster:
            await hinted(cluster, 6, 1000)
            sent: list[tuple[float, list[bytes]]] = []

            def watch(src: str, dst: str, message: Message, sent: Any = sent) -> None:
                if isinstance(message, ReplicaWrite) and message.trace == "hints:n0":
                    sent.append((time.monotonic(), message.records))

            cluster.rule(watch)
            await cluster.up(1)
            await until(lambda: not cluster.node(0).handoff.hints)
            assert [len(records) for _, records in sent] == batches
            for (before, records), (after, _) in pairwise(sent):
                assert after - before >= sum(map(len, records)) / rate


# --- repair


def missed(cluster: Cluster, count: int, size: int) -> list[str]:
    """Keys that only n0 holds, since long ago, behind the nodes' backs."""
    keys = KEYS[:count]
    for key in keys:
        cluster.plant(0, key, bytes(size), at_ms=cluster.clocks[0].wall_ms() - 60_000)
    for living in cluster.living():
        living.antientropy.keeper.forget()
    return keys


def has_all(cluster: Cluster, keys: list[str]) -> bool:
    return all(cluster.held(key)[1] is not None for key in keys)


async def knows_its_trees(cluster: Cluster) -> None:
    await until(lambda: not any(living.antientropy.keeper.unknown for living in cluster.living()))


@effect_of("repair.interval_ms")
async def test_replicas_are_compared_at_that_interval_or_only_when_ordered() -> None:
    async with Cluster(2, factor=2, settings={"dht.repair.interval_ms": 30}) as cluster:
        began = time.monotonic()
        keys = missed(cluster, 20, 10)
        await until(lambda: has_all(cluster, keys))
        exchanges = sum(living.antientropy.totals.exchanges for living in cluster.living())
        await until(lambda: sum(living.antientropy.totals.exchanges for living in cluster.living()) > exchanges + 10)
        assert time.monotonic() - began > 0.2  # about 30 ms each
    async with Cluster(2, factor=2, settings={"dht.repair.interval_ms": 0}) as cluster:
        keys = missed(cluster, 20, 10)
        await knows_its_trees(cluster)
        await asyncio.sleep(0.1)
        assert [living.antientropy.totals.exchanges for living in cluster.living()] == [0, 0]
        await (await cluster.client()).repair()
        assert has_all(cluster, keys)


@effect_of("repair.bytes_per_s")
async def test_repair_takes_so_many_bytes_a_second() -> None:
    seconds = []
    for rate in (100_000, 1 << 30):
        async with Cluster(2, factor=2, settings={"dht.repair.bytes_per_s": rate}) as cluster:
            keys = missed(cluster, 100, 1000)
            await knows_its_trees(cluster)
            began = time.monotonic()
            await cluster.node(0).antientropy.exchange("n1")
            seconds.append(time.monotonic() - began)
            assert has_all(cluster, keys)
    assert max(0.75, seconds[1]) < seconds[0]  # 100 records of 1 kB, less what may run ahead


@effect_of("repair.build_keys_per_s")
async def test_trees_are_built_at_that_pace_after_a_start() -> None:
    seconds = []
    for rate in (100, 10_000_000):
        async with Cluster(1, factor=1, settings={"dht.repair.build_keys_per_s": rate}) as cluster:
            for key in KEYS[:100]:
                cluster.plant(0, key, b"v", at_ms=1)
            await cluster.down(0)
            began = time.monotonic()
            await cluster.up(0)
            await knows_its_trees(cluster)
            seconds.append(time.monotonic() - began)
    assert max(0.7, seconds[1]) < seconds[0]  # 100 keys, less what may run ahead


# --- reclaim


async def reclaims(settings: dict[str, object], deleted_ms: int) -> bool:
    """Whether a tombstone of so long ago goes within a moment."""
    async with Cluster(1, factor=1, settings=settings) as cluster:
        at_ms = cluster.clocks[0].wall_ms() - deleted_ms
        cluster.plant(0, "k", b"", at_ms=at_ms, flags=TOMBSTONE)
        await knows_its_trees(cluster)
        try:
            async with asyncio.timeout(0.5):
                while cluster.held("k")[0] is not None:  # noqa: ASYNC110  # a round tells nobody
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return False
        return True


@effect_of("reclaim.interval_ms")
async def test_rounds_come_at_that_interval_or_not_at_all() -> None:
    lag = {"dht.reclaim.lag_ms": 0}
    assert await reclaims({**lag, "dht.reclaim.interval_ms": 20}, 1000)
    assert not await reclaims({**lag, "dht.reclaim.interval_ms": 0}, 1000)
    assert not await reclaims({**lag, "dht.reclaim.interval_ms": 3_600_000}, 1000)


@effect_of("reclaim.lag_ms")
async def test_only_what_was_deleted_before_the_lag_goes() -> None:
    settings: dict[str, object] = {"dht.reclaim.interval_ms": 20, "dht.reclaim.lag_ms": 60_000}
    assert await reclaims(settings, 61_000)
    assert not await reclaims(settings, 30_000)


# --- expiry


@effect_of("expiry.sweep_interval_ms")
async def test_expired_records_are_swept_at_that_interval() -> None:
    intervals = {0: {"dht.expiry.sweep_interval_ms": 10}, 1: {"dht.expiry.sweep_interval_ms": 3_600_000}}
    settings = {"dht.versions.max_clock_skew_ms": 1}
    async with Cluster(2, factor=2, settings=settings, per_node=intervals) as cluster:
        now_ms = cluster.clocks[0].wall_ms()
        for i in range(2):
            cluster.plant(i, "k", b"v", at_ms=now_ms - 1000, flags=EXPIRES, expires_ms=now_ms - 500)

        def flags() -> list[int]:
            return [record[FLAGS] for record in cluster.held("k") if record is not None]

        await until(lambda: flags()[0] & SHRUNK)
        assert flags()[1] == EXPIRES
        assert [living.metrics.expired_shrunk for living in cluster.living()] == [1, 0]


@effect_of("expiry.sweep_step")
async def test_one_sweep_shrinks_so_many_records(monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk: list[int] = []
    sweep = Replica.sweep

    async def counted(self: Replica, step: int) -> int:
        shrunk.append(await sweep(self, step))
        return shrunk[-1]

    monkeypatch.setattr(Replica, "sweep", counted)
    settings = {"dht.expiry.sweep_interval_ms": 10, "dht.expiry.sweep_step": 3, "dht.versions.max_clock_skew_ms": 1}
    async with Cluster(1, factor=1, settings=settings) as cluster:
        now_ms = cluster.clocks[0].wall_ms()
        for key in KEYS[:10]:
            cluster.plant(0, key, b"v", at_ms=now_ms - 1000, flags=EXPIRES, expires_ms=now_ms - 500)
        await until(lambda: sum(shrunk) == 10)
        assert [count for count in shrunk if count] == [3, 3, 3, 1]


# --- observability


async def _log(folder: Path, *settings: str) -> NodeProcess:
    """A node's log after it has formed and ended."""
    name = "-".join(settings).replace("=", "-")
    arguments = [part for setting in settings for part in ("--set", setting)]
    async with node(folder, *arguments, name=name) as running, asking(running.data_address) as asker:
        await asker.until_status(lambda status: status["ready"])
        await asker.ask(get(1))
    return running


@effect_of("observability.log_level")
async def test_only_lines_of_the_level_and_above_are_logged(tmp_path: Path) -> None:
    logs = {
        level: await _log(tmp_path, f"observability.log_level={level}", "observability.log_format=json")
        for level in ("debug", "info", "warning")
    }
    assert {level: bool(log.events("topology_adopted")) for level, log in logs.items()} == {
        "debug": True, "info": True, "warning": False,
    }  # fmt: skip
    assert {level: bool(log.events("get")) for level, log in logs.items()} == {
        "debug": True, "info": False, "warning": False,
    }  # fmt: skip
    nowhere = ("--peers", "127.0.0.1:1", "--set", "observability.log_format=json")
    for level, waits_loudly in (("warning", True), ("error", False)):
        arguments = (*nowhere, "--set", f"observability.log_level={level}")
        async with node(tmp_path, *arguments, name=level) as running, asking(running.data_address) as asker:
            await asker.until_status(lambda status: "127.0.0.1:1" in status["waiting_for"])
            assert bool(running.events("bootstrap_waiting")) is waits_loudly


async def _log_on_terminal(folder: Path, form: str) -> str:
    """What a node writes to a terminal, until its topology is there."""
    mine, its = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agi.core.dht.server", "--port", "0", "--storage", "memory", *ANY_PORTS,
            "--set", f"observability.log_format={form}", cwd=folder,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=its,
        )  # fmt: skip
    finally:
        os.close(its)
    said = b""
    os.set_blocking(mine, False)
    try:
        async with asyncio.timeout(20):
            while not (b"topology_adopted" in said and said.endswith(b"\n")):
                await _readable(mine)
                said += os.read(mine, 65536)
    finally:
        os.close(mine)
        process.kill()
        await process.wait()
    return said.decode()


async def _readable(descriptor: int) -> None:
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _is_json(log: str) -> bool:
    line = next(line for line in log.splitlines() if "topology_adopted" in line)
    try:
        return bool(json.loads(line)["event"] == "topology_adopted")
    except json.JSONDecodeError:
        return False


@effect_of("observability.log_format")
async def test_logs_are_for_programs_or_for_people(tmp_path: Path) -> None:
    in_file = {
        form: _is_json((await _log(tmp_path, f"observability.log_format={form}")).said())
        for form in ("json", "console", "auto")
    }
    assert in_file == {"json": True, "console": False, "auto": True}
    on_terminal = {form: _is_json(await _log_on_terminal(tmp_path, form)) for form in ("json", "auto")}
    assert on_terminal == {"json": True, "auto": False}


@effect_of("observability.slow_request_ms")
async def test_requests_that_took_this_long_are_logged() -> None:
    for slow_ms, logged in ((20, ["Get", "Put"]), (60_000, []), (0, [])):
        async with Cluster(3, settings={"dht.observability.slow_request_ms": slow_ms}) as cluster:
            wire = await cluster.wire(0)
            cluster.rule(lambda src, dst, m: (0.05,) if isinstance(m, ReplicaRead | ReplicaWrite) else None)
            with capture_logs() as logs:
                assert failure(await wire.ask(get(1))) is None
                assert failure(await wire.ask(put(2))) is None
            slow = [line for line in logs if line["event"] == "slow_request"]
            assert [line["kind"] for line in slow] == logged
            assert [line["trace"] for line in slow] == ["c:1", "c:2"][: len(slow)]
            assert all(line["ms"] >= 50 for line in slow)


# --- all of them


def test_every_setting_has_a_test_of_its_effect() -> None:
    assert sorted(TESTS) == sorted(KNOBS)
    for test in TESTS.values():
        assert test.__name__.startswith("test_") and globals()[test.__name__] is test  # collected, not overwritten


# --- changes of the members


@effect_of("migration.bytes_per_s")
async def test_a_joiner_takes_so_many_bytes_a_second() -> None:
    seconds = []
    for rate in (100_000, 1 << 30):
        async with Cluster(1, factor=2, settings={"dht.migration.bytes_per_s": rate}) as cluster:
            for key in KEYS[:100]:
                cluster.plant(0, key, bytes(1000), at_ms=1)
            began = time.monotonic()
            joiner = await cluster.add()
            seconds.append(time.monotonic() - began)
            assert joiner.migration.bytes > 100_000
    assert max(0.7, seconds[1]) < seconds[0]  # 100 records of 1 kB, less what may run ahead


@effect_of("migration.join_timeout_ms")
@pytest.mark.usefixtures("hurried")
async def test_a_change_is_given_up_when_a_joiner_is_dead_for_so_long() -> None:
    hasty = {
        "dht.health.heartbeat_interval_ms": 50,
        "dht.health.probe_timeout_ms": 20,
        "dht.health.failure_threshold": 1,
        "dht.health.suspicion_mult": 1,
        "dht.health.suspicion_max_mult": 1,
    }
    async with Cluster(3, settings={**hasty, "dht.migration.join_timeout_ms": 1000}) as cluster:
        cluster.rule(lambda src, dst, message: LOST if isinstance(message, ArcListReply) else None)
        await cluster.add(wait=False)
        await until(lambda: all(n.topology and n.topology.in_transition for n in cluster.living()))
        await cluster.down(3)
        began = time.monotonic()
        await cluster.settled()
        assert time.monotonic() - began > 0.9
        assert cluster.node(0).known_topology.by_id.keys() == {"n0", "n1", "n2"}


@effect_of("migration.eviction_timeout_ms")
@pytest.mark.usefixtures("hurried")
async def test_who_is_dead_for_so_long_is_evicted() -> None:
    hasty = {
        "dht.health.heartbeat_interval_ms": 50,
        "dht.health.probe_timeout_ms": 20,
        "dht.health.failure_threshold": 1,
        "dht.health.suspicion_mult": 1,
        "dht.health.suspicion_max_mult": 1,
    }
    for timeout_ms, evicted in ((500, True), (0, False)):
        async with Cluster(4, settings={**hasty, "dht.migration.eviction_timeout_ms": timeout_ms}) as cluster:
            began = time.monotonic()
            await cluster.down(3)
            if evicted:
                await until(lambda: "n3" not in cluster.node(0).known_topology.by_id)
                assert time.monotonic() - began > 0.5
            else:
                await asyncio.sleep(1.5)
                assert "n3" in cluster.node(0).known_topology.by_id


@effect_of("cluster.replaces")
@pytest.mark.usefixtures("hurried")
async def test_a_joiner_takes_the_place_of_that_member() -> None:
    async with Cluster(4, per_node={4: {"dht.cluster.replaces": "n3"}}) as cluster:
        await cluster.down(3)
        await cluster.add()
        assert cluster.node(0).known_topology.by_id.keys() == {"n0", "n1", "n2", "n4"}
