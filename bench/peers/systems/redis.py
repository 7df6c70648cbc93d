"""Redis: one server, and a cluster of three primaries with a replica each, with and without WAIT.

A write to a cluster is acknowledged by the primary alone; a primary that dies takes with it what it had not sent yet.
WAIT 1 after each write, on the same connection, holds the caller until a replica has it in memory. There is no ordered
scan: SCAN walks every key of every primary and filters, then the values are fetched.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.peers.base import CALL_TIMEOUT_S, CALLERS_MAX, Calls, Facts, PeerFailed, Running, program
from bench.peers.loads import BATCH_KEYS
from bench.peers.processes import HOST, START_TIMEOUT_S, Servers, free_ports

PRIMARIES, REPLICAS = 3, 1
BUS_ABOVE = 10_000
"""A cluster's nodes talk to each other on their port plus this."""
NODE_TIMEOUT_MS = 5000
WAIT_MS = 5000
LOCK_TTL_S = 10.0
CONNECTIONS_MAX = 2 * CALLERS_MAX
"""Of each node of a cluster: redis-py raises where a pool is used up."""
POLL_S = 0.1
SWAP = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) return 1 end return 0"
"""Compare-and-set, as Redis documents it: a script, since it has no command for that."""


class Overtaken(Exception):
    """The key held something else."""


class NotReplicated(Exception):
    """WAIT ended without a replica."""


@dataclass(frozen=True)
class Standalone:
    """One server without replicas."""

    facts: Facts
    fsync: str

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        import redis.asyncio as client_library

        async with Servers(folder) as servers:
            (port,) = free_ports(1)
            await _spawn(servers, "redis", port, self.fsync)
            await servers.listening("redis", port)
            pool = client_library.BlockingConnectionPool(
                host=HOST,
                port=port,
                max_connections=CALLERS_MAX,
                timeout=CALL_TIMEOUT_S,
                socket_timeout=CALL_TIMEOUT_S,
            )
            async with client_library.Redis(connection_pool=pool) as client:
                yield Running(_standalone_calls(client, await client.script_load(SWAP)), servers.pids)
            await pool.aclose()


def _standalone_calls(client: Any, script: str) -> Calls:
    async def create(key: str, value: bytes) -> int:
        await client.set(key, _state(0, value))
        return 0

    async def swap(key: str, expected: int, value: bytes) -> int:
        if not await client.evalsha(script, 1, key, _state(expected, value), _state(expected + 1, value)):
            raise Overtaken(key)
        return expected + 1

    async def lock(name: str) -> None:
        async with client.lock(name, timeout=LOCK_TTL_S):
            return

    async def scan(prefix: str) -> list[bytes]:
        keys = [key async for key in client.scan_iter(match=f"{prefix}*", count=BATCH_KEYS)]
        return list(await client.mget(keys))

    return Calls(
        get=client.get,
        put=client.set,
        get_many=client.mget,
        put_many=client.mset,
        swap_begin=create,
        swap=swap,
        lock=lock,
        scan=scan,
    )


@dataclass(frozen=True)
class Cluster:
    """Three primaries, each with one replica."""

    facts: Facts
    fsync: str
    wait: bool

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        import redis.asyncio as client_library

        async with Servers(folder) as servers:
            ports = free_ports(PRIMARIES * (1 + REPLICAS), also=BUS_ABOVE)
            options: list[str | int] = ["--cluster-enabled", "yes", "--cluster-node-timeout", NODE_TIMEOUT_MS]
            for number, port in enumerate(ports):
                await _spawn(servers, f"redis-{number}", port, self.fsync, *options)
            for number, port in enumerate(ports):
                await servers.listening(f"redis-{number}", port)
            await _form(ports)
            client = client_library.RedisCluster(
                host=HOST, port=ports[0], max_connections=CONNECTIONS_MAX, socket_timeout=CALL_TIMEOUT_S
            )
            async with client:
                await _replicating(client)
                yield Running(await (_waiting_calls if self.wait else _cluster_calls)(client), servers.pids)


async def _cluster_calls(client: Any) -> Calls:
    plain = _standalone_calls(client, await client.script_load(SWAP))

    async def scan(prefix: str) -> list[bytes]:
        keys = [key async for key in client.scan_iter(match=f"{prefix}*", count=BATCH_KEYS)]
        return list(await client.mget_nonatomic(keys))

    return replace(plain, get_many=client.mget_nonatomic, put_many=client.mset_nonatomic, scan=scan)


async def _waiting_calls(client: Any) -> Calls:
    """A pipeline travels to a node on one connection, so WAIT in it waits for what stands before it."""

    async def confirmed(pipe: Any, nodes: list[Any]) -> list[Any]:
        for node in nodes:
            pipe.execute_command("WAIT", REPLICAS, WAIT_MS, target_nodes=[node])
        results = list(await pipe.execute())
        if any(copies < REPLICAS for copies in results[-len(nodes) :]):
            raise NotReplicated
        return results

    async def put(key: str, value: bytes) -> None:
        pipe = client.pipeline()
        pipe.set(key, value)
        await confirmed(pipe, [client.get_node_from_key(key)])

    async def put_many(items: dict[str, bytes]) -> None:
        slots: dict[int, list[str | bytes]] = {}
        for key, value in items.items():
            slots.setdefault(client.keyslot(key), []).extend((key, value))
        pipe = client.pipeline()
        for pairs in slots.values():  # as mset_nonatomic does, but that one ends without WAIT
            pipe.execute_command("MSET", *pairs, target_nodes=[client.get_node_from_key(pairs[0])])
        await confirmed(pipe, client.get_primaries())

    async def create(key: str, value: bytes) -> int:
        await put(key, _state(0, value))
        return 0

    async def swap(key: str, expected: int, value: bytes) -> int:
        pipe = client.pipeline()  # which takes EVAL, not EVALSHA
        pipe.eval(SWAP, 1, key, _state(expected, value), _state(expected + 1, value))
        if not (await confirmed(pipe, [client.get_node_from_key(key)]))[0]:
            raise Overtaken(key)
        return expected + 1

    return replace(await _cluster_calls(client), put=put, put_many=put_many, swap_begin=create, swap=swap, lock=None)


def _state(number: int, value: bytes) -> bytes:
    """What a key holds after so many swaps: a value of the same length that is never the same twice."""
    return number.to_bytes(8) + value[8:]


async def _spawn(servers: Servers, name: str, port: int, fsync: str, *options: str | int) -> None:
    folder = servers.folder / name
    await asyncio.to_thread(folder.mkdir)
    basic: list[str | Path | int] = ["--port", port, "--bind", HOST, "--dir", folder, "--save", ""]
    await servers.spawn(name, "redis-server", *basic, "--appendonly", "yes", "--appendfsync", fsync, *options)


async def _form(ports: list[int]) -> None:
    nodes = [f"{HOST}:{port}" for port in ports]
    command = [program("redis-cli") or "redis-cli", "--cluster", "create", *nodes]
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, "--cluster-replicas", str(REPLICAS), "--cluster-yes"],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise PeerFailed(f"redis-cli --cluster create failed: {done.stdout[-300:]}{done.stderr[-300:]}")


async def _replicating(client: Any) -> None:
    """Until every primary has its replica in step."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await client.initialize()
            while True:
                states = [await client.info("replication", target_nodes=node) for node in client.get_primaries()]
                if len(states) == PRIMARIES and all(_in_step(state) for state in states):
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerFailed("the replicas are not in step with their primaries") from None


def _in_step(state: dict[str, Any]) -> bool:
    replicas = [value for key, value in state.items() if key.startswith("slave") and isinstance(value, dict)]
    return len(replicas) == REPLICAS and all(each["state"] == "online" for each in replicas)


FSYNC = {"everysec": "fsync within a second", "always": "fsync before the answer"}
AGAINST = {"everysec": "ours-interval", "always": "ours-group"}
NO_LOCK = {"lock": "redis-py's Lock does not WAIT"}


def _facts(kind: str, title: str, guarantee: str, fsync: str, where: str, *, replicated: bool, wait: bool) -> Facts:
    return Facts(
        name=f"redis-{kind}-{fsync}",
        title=f"{title}, {fsync}",
        guarantee=guarantee,
        durability=f"{where}; {FSYNC[fsync]}",
        against=AGAINST[fsync],
        modules=("redis", "hiredis"),
        distributions=("redis", "hiredis"),
        programs=("redis-server", "redis-cli"),
        packages=("redis-server", "redis-tools"),
        replicated=replicated,
        lacks=NO_LOCK if wait else {},
        note="cas is a script; scan is SCAN over all keys, unordered, then MGET",
    )


def _peers() -> tuple[Standalone | Cluster, ...]:
    one = "one server, no replica"
    loose = "asynchronous replication: a failover loses acknowledged writes"
    waited = "WAIT 1 after each write: a replica has it too, though a failover may still lose it; reads of the primary"
    peers: list[Standalone | Cluster] = []
    for fsync in FSYNC:
        peers.append(
            Standalone(_facts("standalone", "Redis", one, fsync, "1 node", replicated=False, wait=False), fsync)
        )
        plain = _facts("cluster", "Redis Cluster 3+3", loose, fsync, "1 primary", replicated=True, wait=False)
        peers.append(Cluster(plain, fsync, wait=False))
        both = _facts(
            "cluster-wait", "Redis Cluster 3+3, WAIT 1", waited, fsync, "1 primary and its replica's memory",
            replicated=True, wait=True,
        )  # fmt: skip
        peers.append(Cluster(both, fsync, wait=True))
    return tuple(peers)


PEERS = _peers()
