"""Hinted handoff between processes: kill -9 of a replica, and of those that keep its hints."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.rocksdb import RocksStore

WAIT_S = 30.0


async def _hints(client: DHTClient) -> dict[str, int]:
    """Hints by target, over all nodes."""
    found: dict[str, int] = {}
    for state in (await client.status()).values():
        for target, count in state.get("hints", {}).items():
            found[target] = found.get(target, 0) + count
    return found


async def _none_left(client: DHTClient, nodes: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while await _hints(client) or len(await _up(client)) < nodes:  # noqa: ASYNC110  # the nodes are other processes
            await asyncio.sleep(0.05)


async def _up(client: DHTClient) -> list[str]:
    """Nodes that are connected to all others."""
    status = await client.status()
    return [
        name
        for name, state in status.items()
        if state.get("ready") and all(peer["connected"] for peer in state["peers"].values())
    ]


async def _contents(folder: Path) -> dict[bytes, bytes]:
    """Everything that a stopped node holds."""
    store = RocksStore(folder, token_bytes("xxh3"))
    await store.open()
    try:
        page = await store.scan(b"", None, 100_000, 1 << 30)
        assert page.complete and (await store.load_hints(b"", 10)).hints == []
        return dict(page.items)
    finally:
        await store.close()


async def test_after_kill_9_of_one_of_three_during_writes_all_replicas_become_equal(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path) as cluster:
        async with DHTClient(timeout=10, retry_unknown=True) as client:
            await client.connect(cluster.addresses)
            await _none_left(client, 3)
            stop = False
            written = 0

            async def write() -> None:
                nonlocal written
                while not stop:
                    names = [f"k{written + i}" for i in range(50)]
                    await client.put_many(dict.fromkeys(names, b"v" * 100), ttl_seconds=1000 if written % 100 else None)
                    await client.delete_many(names[:5])
                    written += 50

            writer = asyncio.create_task(write())

            async def reached(count: int) -> None:
                async with asyncio.timeout(WAIT_S):
                    while written < count and not writer.done():  # noqa: ASYNC110  # the client's pace
                        await asyncio.sleep(0.01)

            await reached(200)
            await cluster.kill(2)
            at_death = written
            await reached(at_death + 1000)
            assert (await _hints(client))["n2"] > 0
            await cluster.start_node(2)
            await reached(written + 200)
            stop = True
            await writer
            await _none_left(client, 3)
        assert [await cluster.stop_node(i) for i in range(3)] == [0, 0, 0]
        contents = [await _contents(tmp_path / f"n{i}") for i in range(3)]
        assert contents[0] == contents[1] == contents[2]
        assert len(contents[0]) == written


async def test_hints_outlive_kill_9_of_their_holders(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path) as cluster:
        async with DHTClient(timeout=10, retry_unknown=True) as client:
            await client.connect(cluster.addresses)
            await _none_left(client, 3)
            await cluster.kill(2)
            await client.put_many({f"k{i}": b"v" for i in range(300)})
            async with asyncio.timeout(WAIT_S):
                while (await _hints(client)).get("n2") != 300:  # noqa: ASYNC110  # the nodes are other processes
                    await asyncio.sleep(0.02)
            for i in (0, 1):
                await cluster.kill(i)
        for i in range(3):
            await cluster.start_node(i)
        async with DHTClient(timeout=10) as client:
            await client.connect(cluster.addresses)
            await _none_left(client, 3)
            status: dict[str, Any] = await client.status()
            assert [state["hints"] for state in status.values()] == [{}, {}, {}]
        assert [await cluster.stop_node(i) for i in range(3)] == [0, 0, 0]
        contents = [await _contents(tmp_path / f"n{i}") for i in range(3)]
        assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 300
