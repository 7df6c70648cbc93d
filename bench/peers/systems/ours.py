"""Our own cluster: three node processes, N=3, QUORUM writes and reads, over TCP as the peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.peers.base import CALL_TIMEOUT_S, Calls, Facts, Running
from bench.peers.loads import BATCH_KEYS

from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster

LOCK_TTL_S = 10.0
NODES = 3


@dataclass(frozen=True)
class Ours:
    """One variant: where the records lie, and when they are synced."""

    facts: Facts
    storage: str
    wal_sync: str = ""

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        settings = {"storage.wal_sync": self.wal_sync} if self.wal_sync else {}
        client = DHTClient(unix=False, timeout=CALL_TIMEOUT_S)
        async with LocalCluster(NODES, folder, storage=self.storage, settings=settings) as cluster, client:
            await client.connect(cluster.addresses)
            pids = tuple(cluster.node(i).process.pid for i in range(NODES))
            yield Running(_calls(client), pids)


def _calls(client: DHTClient) -> Calls:
    async def get_many(keys: list[str]) -> list[bytes | None]:
        return list((await client.get_many(keys)).values())

    async def create(key: str, value: bytes) -> int:
        return await client.put(key, value, if_absent=True)

    async def swap(key: str, expected: int, value: bytes) -> int:
        return await client.put(key, value, if_version=expected)

    async def lock(name: str) -> None:
        async with client.lock(name, ttl=LOCK_TTL_S):
            return

    async def scan(prefix: str) -> list[bytes]:
        return [value for _, value in await client.scan(prefix, BATCH_KEYS)]

    return Calls(
        get=client.get,
        put=client.put,
        get_many=get_many,
        put_many=client.put_many,
        swap_begin=create,
        swap=swap,
        lock=lock,
        scan=scan,
    )


def _facts(name: str, title: str, durability: str) -> Facts:
    return Facts(
        name=name,
        title=title,
        guarantee="QUORUM writes and reads of 3 replicas; cas and locks by consensus; ordered scan",
        durability=durability,
        against=name,
        distributions=("agi-hpc",),
    )


PEERS = (
    Ours(_facts("ours-memory", "ours, memory", "memory of 2 of 3 nodes"), "memory"),
    Ours(
        _facts("ours-interval", "ours, interval", "2 of 3 nodes; fsync within wal_sync_interval_ms"),
        "rocksdb",
        "interval",
    ),
    Ours(_facts("ours-group", "ours, group", "fsync on 2 of 3 nodes before the answer"), "rocksdb", "group"),
)
