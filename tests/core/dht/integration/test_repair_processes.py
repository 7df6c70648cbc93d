"""Anti-entropy between processes: a node that was killed gets what it missed, read by nobody."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster
from agi.core.dht.protocol.record import EXPIRES, FLAGS, TOMBSTONE
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.rocksdb import RocksStore

WAIT_S = 60.0
YOUNG_S = 0.5


async def _round(client: DHTClient, nodes: int) -> None:
    """Until every node has been compared with all others, in full, from now on."""
    began = time.monotonic()
    async with asyncio.timeout(WAIT_S):
        while True:
            asked = time.monotonic()
            ages = [state.get("repair", {}).get("last_round_s") for state in (await client.status()).values()]
            if len(ages) == nodes and all(age is not None and age + 0.1 < asked - began for age in ages):
                return
            await asyncio.sleep(0.05)


async def _reads(client: DHTClient) -> int:
    return sum(stats["gets"] + stats["scans"] + stats["read_repairs"] for stats in (await client.stats()).values())


async def _contents(folder: Path) -> dict[bytes, bytes]:
    """Everything that a stopped node holds."""
    store = RocksStore(folder, token_bytes("xxh3"))
    await store.open()
    try:
        page = await store.scan(b"", None, 100_000, 1 << 30)
        assert page.complete
        return dict(page.items)
    finally:
        await store.close()


@pytest.mark.parametrize("hints_mb", [0, 256])
async def test_after_kill_9_and_a_return_all_replicas_become_equal_without_a_read(
    tmp_path: Path, hints_mb: int
) -> None:
    settings = {
        "repair.interval_ms": "500",
        "network.timeout_ms": str(int(YOUNG_S * 1000)),
        "hints.bytes_max_mb": str(hints_mb),
    }
    async with LocalCluster(3, tmp_path, settings=settings) as cluster:
        async with DHTClient(timeout=10) as client:
            await client.connect(cluster.addresses)
            await client.put_many({f"k{i}": b"v" * 100 for i in range(2000)}, consistency="ALL")
            await cluster.kill(2)
            await client.delete_many([f"k{i}" for i in range(100)])
            await client.put_many({f"k{i}": b"w" * 100 for i in range(100, 300)}, ttl_seconds=3600)
            await client.put_many({f"new{i}": b"n" for i in range(100)})
            await cluster.start_node(2)
            await asyncio.sleep(YOUNG_S)  # what was written last is left alone for so long
            for _ in range(2):  # one more, for what a node learnt after it had been compared with another
                await _round(client, 3)
            assert await _reads(client) == 0
        assert [await cluster.stop_node(i) for i in range(3)] == [0, 0, 0]
        held = [await _contents(tmp_path / f"n{i}") for i in range(3)]
    assert held[0] == held[1] == held[2] and len(held[0]) == 2100
    assert all(held[2][b"k%d" % i][FLAGS] == TOMBSTONE for i in range(100))
    assert all(held[2][b"k%d" % i][FLAGS] == EXPIRES for i in range(100, 300))
