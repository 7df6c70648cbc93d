"""etcd, three nodes, through two clients: aetcd, which is grpc.aio, and etcd-client-py, which is Rust underneath.

Every write is agreed by Raft and synced by a majority before the answer; reads are linearizable. The clients connect to
the leader, which saves a forward. `grpc-aio` is no peer but a bound: the smallest call that etcd answers (a read of an
absent key at the node's own copy) as raw bytes over grpc.aio, so that one sees what that client library can do at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.base import CALL_TIMEOUT_S, Calls, Facts, PeerFailed, Running
from bench.peers.loads import BATCH_KEYS, SMALL
from bench.peers.processes import HOST, START_TIMEOUT_S, Servers, free_ports

NODES = 3
LOCK_TTL_S = 10
POLL_S = 0.1


class Overtaken(Exception):
    """The key was at another version."""


class LockLost(Exception):
    """The lock was not to be had."""


@asynccontextmanager
async def _leader(folder: Path) -> AsyncIterator[tuple[Servers, int]]:
    """Three nodes that have a leader, and its client port."""
    async with Servers(folder) as servers:
        ports = free_ports(2 * NODES)
        clients, peers = ports[:NODES], ports[NODES:]
        members = ",".join(f"n{number}=http://{HOST}:{port}" for number, port in enumerate(peers))
        for number in range(NODES):
            client, peer = f"http://{HOST}:{clients[number]}", f"http://{HOST}:{peers[number]}"
            await servers.spawn(
                f"etcd-{number}", "etcd", "--name", f"n{number}", "--data-dir", folder / f"n{number}",
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", members, "--initial-cluster-state", "new",
                "--max-txn-ops", BATCH_KEYS, "--logger", "zap", "--log-level", "error",
            )  # fmt: skip
        for number, port in enumerate(clients):
            await servers.listening(f"etcd-{number}", port)
        yield servers, await _find_leader(clients)


async def _find_leader(ports: list[int]) -> int:
    import aetcd

    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                for port in ports:
                    async with aetcd.Client(HOST, port, timeout=CALL_TIMEOUT_S) as client:
                        try:
                            status = await client.status()
                        except aetcd.exceptions.ClientError:  # no leader yet
                            continue
                        if status.leader is not None and str(port) in str(status.leader.client_urls):
                            return port
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerFailed("etcd has no leader") from None


@dataclass(frozen=True)
class Aetcd:
    """Through aetcd."""

    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        import aetcd

        async with _leader(folder) as (servers, port), aetcd.Client(HOST, port, timeout=CALL_TIMEOUT_S) as client:
            yield Running(_aetcd_calls(client), servers.pids)


def _aetcd_calls(client: Any) -> Calls:
    transactions = client.transactions

    async def get(key: str) -> bytes | None:
        found = await client.get(key.encode())
        return None if found is None else found.value

    async def put(key: str, value: bytes) -> None:
        await client.put(key.encode(), value)

    async def put_many(items: dict[str, bytes]) -> None:
        puts = [transactions.put(key.encode(), value) for key, value in items.items()]
        await client.transaction(compare=[], success=puts, failure=[])

    async def get_many(keys: list[str]) -> list[bytes | None]:
        gets = [transactions.get(key.encode()) for key in keys]
        _, found = await client.transaction(compare=[], success=gets, failure=[])
        return [each[0][0] if each else None for each in found]

    async def create(key: str, value: bytes) -> int:
        await put(key, value)
        return int((await client.get(key.encode())).version)

    async def swap(key: str, expected: int, value: bytes) -> int:
        raw = key.encode()
        done, _ = await client.transaction(
            compare=[transactions.version(raw) == expected], success=[transactions.put(raw, value)], failure=[]
        )
        if not done:
            raise Overtaken(key)
        return expected + 1

    async def lock(name: str) -> None:
        held = client.lock(name.encode(), ttl=LOCK_TTL_S)
        if not await held.acquire() or not await held.release():
            raise LockLost(name)

    async def scan(prefix: str) -> list[bytes]:
        return [each.value for each in (await client.get_prefix(prefix.encode())).kvs]

    return Calls(
        get=get,
        put=put,
        get_many=get_many,
        put_many=put_many,
        swap_begin=create,
        swap=swap,
        lock=lock,
        scan=scan,
    )


@dataclass(frozen=True)
class Rust:
    """Through etcd-client-py."""

    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        import etcd_client

        async with _leader(folder) as (servers, port):
            options = etcd_client.ConnectOptions().with_timeout(CALL_TIMEOUT_S)
            library = etcd_client.Client([f"http://{HOST}:{port}"], options)
            async with library.connect() as client:
                yield Running(_rust_calls(client, library, etcd_client), servers.pids)


def _rust_calls(client: Any, connector: Any, library: Any) -> Calls:
    equal = library.CompareOp.EQUAL

    async def get(key: str) -> bytes | None:
        found = await client.get(key.encode())
        return None if found is None else bytes(found)

    async def put(key: str, value: bytes) -> None:
        await client.put(key.encode(), value)

    async def put_many(items: dict[str, bytes]) -> None:
        await client.txn(library.Txn().and_then([library.TxnOp.put(k.encode(), v) for k, v in items.items()]))

    async def get_many(keys: list[str]) -> list[bytes | None]:
        return list(await asyncio.gather(*(get(key) for key in keys)))

    async def create(key: str, value: bytes) -> int:
        await swap(key, 0, value)
        return 1

    async def swap(key: str, expected: int, value: bytes) -> int:
        raw = key.encode()
        held = library.Compare.version(raw, equal, expected)
        done = await client.txn(library.Txn().when([held]).and_then([library.TxnOp.put(raw, value)]))
        if not done.succeeded():
            raise Overtaken(key)
        return expected + 1

    async def lock(name: str) -> None:
        async with connector.with_lock(library.EtcdLockOption(name.encode(), ttl=LOCK_TTL_S)):
            return

    async def scan(prefix: str) -> list[bytes]:
        return [bytes(value) for _, value in await client.get_prefix(prefix.encode())]

    return Calls(
        get=get,
        put=put,
        get_many=get_many,
        put_many=put_many,
        swap_begin=create,
        swap=swap,
        lock=lock,
        scan=scan,
    )


@dataclass(frozen=True)
class Ceiling:
    """The smallest call, as raw bytes."""

    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        import grpc

        async with _leader(folder) as (servers, port), grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/etcdserverpb.KV/Range")
            request = b"\x0a\x01-\x38\x01"  # RangeRequest: key (field 1) "-", serializable (field 7) true
            value = bytes(SMALL)

            async def get(_: str) -> bytes:
                await call(request, timeout=CALL_TIMEOUT_S)
                return value

            yield Running(Calls(get=get), servers.pids)


def _facts(name: str, title: str, modules: tuple[str, ...], distributions: tuple[str, ...], note: str) -> Facts:
    return Facts(
        name=name,
        title=title,
        guarantee="linearizable writes and reads of 3 replicas (Raft); ordered scan",
        durability="fsync on 2 of 3 nodes before the answer",
        against="ours-group",
        modules=modules,
        distributions=distributions,
        programs=("etcd",),
        packages=("etcd-server",),
        note=note,
    )


PEERS = (
    Aetcd(
        _facts(
            "etcd",
            "etcd (aetcd)",
            ("aetcd",),
            ("aetcd", "grpcio"),
            "batches are one transaction; its reads stand beside the ceiling of grpc.aio below",
        )
    ),
    Rust(
        _facts(
            "etcd-rust",
            "etcd (etcd-client-py)",
            ("etcd_client", "aetcd"),
            ("etcd-client-py",),
            "its transactions return no values: a batch get is 1,000 calls at once; each lock opens a connection",
        )
    ),
    Ceiling(
        Facts(
            name="grpc-aio",
            title="bound: grpc.aio, empty call",
            guarantee="none: the smallest unary call as raw bytes, which no client on grpc.aio can beat",
            durability="none",
            against="",
            modules=("aetcd",),
            distributions=("grpcio",),
            programs=("etcd",),
            packages=("etcd-server",),
            replicated=False,
            value_bytes_max=SMALL,
            lacks=dict.fromkeys(
                ("a", "b", "put", "batch_put", "batch_get", "cas", "lock", "scan"), "a bound for calls"
            ),
        )
    ),
)
