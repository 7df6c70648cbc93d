"""NATS JetStream key-value with three replicas, through nats-py.

A write is agreed by Raft and written to a majority's files before the answer; they are synced by the server's interval.
Reads are direct, from any replica, so they may be behind; so advised since server 2.9, and faster.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.base import CALL_TIMEOUT_S, Calls, Facts, PeerFailed, Running
from bench.peers.processes import HOST, START_TIMEOUT_S, Servers, free_ports

NODES = 3
BUCKET = "peers"
POLL_S = 0.2


@dataclass(frozen=True)
class Nats:
    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        async with Servers(folder) as servers:
            ports = free_ports(2 * NODES)
            clients, routes = ports[:NODES], ports[NODES:]
            for number in range(NODES):
                config = folder / f"n{number}.conf"
                config.write_text(_config(number, clients[number], routes[number], routes, folder))
                await servers.spawn(f"nats-{number}", "nats-server", "-c", config)
            for number, port in enumerate(clients):
                await servers.listening(f"nats-{number}", port)
            port = clients[await _leader(clients)]
            client = await _connect(port)
            try:
                bucket = await client.jetstream(timeout=CALL_TIMEOUT_S).key_value(BUCKET)
                yield Running(_calls(bucket), servers.pids)
            finally:
                await client.close()


def _config(number: int, client: int, route: int, routes: list[int], folder: Path) -> str:
    others = ", ".join(f'"nats://{HOST}:{port}"' for port in routes)
    return f"""
server_name: n{number}
listen: "{HOST}:{client}"
jetstream {{ store_dir: "{folder / f"n{number}"}" }}
cluster {{ name: peers, listen: "{HOST}:{route}", routes: [{others}] }}
"""


async def _connect(port: int) -> Any:
    import nats

    return await nats.connect(f"nats://{HOST}:{port}", connect_timeout=CALL_TIMEOUT_S, allow_reconnect=False)


async def _leader(ports: list[int]) -> int:
    """Makes the bucket; returns which node leads it: a client there saves a forward."""
    from nats.errors import Error
    from nats.js.api import KeyValueConfig, StorageType

    client = await _connect(ports[0])
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            stream = client.jetstream(timeout=CALL_TIMEOUT_S)
            while True:
                try:
                    await stream.create_key_value(
                        KeyValueConfig(bucket=BUCKET, history=1, storage=StorageType.FILE, replicas=NODES, direct=True)
                    )
                    break
                except Error:  # the cluster has no leader yet
                    await asyncio.sleep(POLL_S)
            while True:
                state = (await stream.stream_info(f"KV_{BUCKET}")).cluster
                if state is not None and state.leader and all(each.current for each in state.replicas or []):
                    return int(state.leader.removeprefix("n"))
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerFailed("JetStream has no leader") from None
    finally:
        await client.close()


def _calls(bucket: Any) -> Calls:
    async def get(key: str) -> bytes | None:
        return bytes((await bucket.get(key)).value)

    async def get_many(keys: list[str]) -> list[bytes | None]:
        return list(await asyncio.gather(*(get(key) for key in keys)))

    async def put_many(items: dict[str, bytes]) -> None:
        await asyncio.gather(*(bucket.put(key, value) for key, value in items.items()))

    async def swap(key: str, expected: int, value: bytes) -> int:
        return int(await bucket.update(key, value, last=expected))

    async def scan(prefix: str) -> list[bytes]:
        watcher = await bucket.watch(f"{prefix}>")
        found = []
        while (entry := await watcher.updates(timeout=CALL_TIMEOUT_S)) is not None:
            found.append(entry.value)
        await watcher.stop()
        return found

    return Calls(
        get=get,
        put=bucket.put,
        get_many=get_many,
        put_many=put_many,
        swap_begin=bucket.create,
        swap=swap,
        scan=scan,
    )


PEERS = (
    Nats(
        Facts(
            name="nats",
            title="NATS JetStream KV",
            guarantee="linearizable writes of 3 replicas (Raft); direct reads, which may be behind",
            durability="files of 2 of 3 nodes; fsync by the server's interval (2 minutes)",
            against="ours-interval",
            modules=("nats",),
            distributions=("nats-py",),
            programs=("nats-server",),
            packages=("nats-server",),
            value_bytes_max=1_000_000,
            lacks={"lock": "no recipe in its client"},
            note="batches are 1,000 calls at once; scan is a watch of the prefix until its first pause",
        )
    ),
)
