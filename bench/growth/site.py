"""One cluster of processes on loopback: formed and filled once, then started and stopped in every round.

Every start times one node, the last, while the others run already: from the start of the process until it listens,
until `/readyz` says yes, and until its hash trees are built. The others build their trees as fast as they can, so as
not to be waited for; the last one does so at the rate that is shipped.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from bench.growth.plan import Data, Site

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import BatchError, DHTError, OutcomeUnknown, Overloaded
from agi.core.dht.local import LocalCluster

CALL_TIMEOUT_S = 30.0
"""Of a client's call: large values by many callers take their time."""
READY_TIMEOUT_S = 120.0
TREES_TIMEOUT_S = 3600.0
SETTLE_TIMEOUT_S = 300.0
SETTLE_LOOK_S = 1.0
IDLE_CPU_SHARE = 0.1
"""Nodes that use less of a processor, all together, have nothing left to do."""
POLL_S = 0.01
LOG_TAIL_BYTES = 3000
FILL_CALLERS = 4
FILL_KEYS, FILL_BYTES = 2500, 1 << 20
"""Of one batch that fills: more keys gain nothing."""
FILL_PAUSE_S, FILL_TIMEOUT_S = 0.05, 120.0
"""Between two tries of a batch that was refused, and for all of them."""
POOL_BYTES = 1 << 20
SETTINGS = {
    "storage.wal_sync": "group",
    "network.timeout_ms": str(int(CALL_TIMEOUT_S * 1000)),
    "reclaim.interval_ms": "0",  # a look through the whole store, in the middle of a measurement or not
    "repair.interval_ms": "600000",
}
FAST_TREES = {"repair.build_keys_per_s": "10000000"}


class Start(msgspec.Struct, frozen=True):
    """Seconds from the start of a process. `trees_s`: None where nobody waited for it."""

    listens_s: float
    ready_s: float
    trees_s: float | None = None


class Filled(msgspec.Struct, frozen=True):
    """What storing every key once took, and the memory of a node before it."""

    seconds: float
    keys: int
    empty_rss_bytes: int


class Cluster:
    """The processes of a site; they keep their ports and, but for the memory store, their data while it lives."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site = site
        self._folder = folder
        self._last = site.nodes - 1
        self._cluster = self._make()
        self.filled: Filled | None = None

    def _make(self) -> LocalCluster:
        self._folder.mkdir(parents=True, exist_ok=True)
        return LocalCluster(
            self.site.nodes,
            self._folder,
            storage=self.site.storage,
            settings={**SETTINGS, "replication.factor": str(self.site.factor)},
            per_node=dict.fromkeys(range(self._last), FAST_TREES),
        )

    @property
    def keeps(self) -> bool:
        return self.site.storage != "memory"

    async def form(self) -> Filled:
        """Starts all nodes for the first time and stores every key."""
        if not self.keeps and self.filled is not None:  # it has forgotten everything, and its name is a stranger's
            await self._cluster.stop()
            self._cluster = self._make()
        await asyncio.gather(*(self._cluster.start_node(i) for i in range(self.site.nodes)))
        await self._cluster.wait_ready(READY_TIMEOUT_S)
        async with self.client() as client:
            empty = rss_bytes(await client.stats())
            began = time.perf_counter()
            for data in self.site.data:
                await fill(client, data)
            seconds = time.perf_counter() - began
            await settle(client)
        self.filled = Filled(round(seconds, 3), sum(data.keys for data in self.site.data), empty)
        return self.filled

    async def start(self) -> Start:
        """Starts all nodes on their data, the last one alone; returns when nothing is left to do."""
        await asyncio.gather(*(self._cluster.start_node(i) for i in range(self._last)))
        if self._last:
            await self._cluster.wait_ready(READY_TIMEOUT_S)
            async with self.client(range(self._last)) as client:
                await trees_built(client, range(self._last))
                await settle(client)
        began = time.perf_counter()
        start = await self._start_last(began)
        await self._cluster.wait_ready(READY_TIMEOUT_S)
        async with self.client() as client:
            await trees_built(client, [self._last])
            trees_s = time.perf_counter() - began
            await settle(client)
        return msgspec.structs.replace(start, trees_s=round(trees_s, 3))

    async def restart_killed(self) -> Start:
        """Kills the last node with SIGKILL and starts it again; returns once it is ready."""
        await self._cluster.kill(self._last)
        return await self._start_last(time.perf_counter())

    async def _start_last(self, began: float) -> Start:
        node = await self._cluster.start_node(self._last)
        listens_s = time.perf_counter() - began
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await _is_ready(node.announced["http_address"]):  # noqa: ASYNC110  # only asking tells
                await asyncio.sleep(POLL_S)
        return Start(round(listens_s, 3), round(time.perf_counter() - began, 3))

    @asynccontextmanager
    async def client(self, nodes: range | None = None) -> AsyncIterator[DHTClient]:
        """One that is connected to the cluster, over TCP, as from another machine."""
        async with DHTClient(unix=False, timeout=CALL_TIMEOUT_S) as client:
            await client.connect([self._cluster.addresses[i] for i in nodes or range(self.site.nodes)])
            yield client

    async def stop(self) -> None:
        """SIGTERM to all nodes. Raises DHTError where one does not end well."""
        codes = await asyncio.gather(*(self._cluster.stop_node(i) for i in range(self.site.nodes)))
        if any(codes):
            raise DHTError(f"nodes of {self.site.name} ended with {codes}")

    def disk_bytes(self) -> int:
        """What the data folders take, all together."""
        folders = (self._folder / f"n{i}" for i in range(self.site.nodes))
        return sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*") if path.is_file())

    def log_tails(self) -> str:
        """The end of what each node has logged."""
        said = []
        for i in range(self.site.nodes):
            log = self._cluster.log(i)
            text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if log.is_file() else ""
            said.append(f"--- {self.site.name}, n{i}\n{text}")
        return "\n".join(said)

    async def end(self) -> None:
        """Ends what runs and gives up the ports."""
        await self._cluster.stop()


async def fill(client: DHTClient, data: Data) -> None:
    """Stores every key once. Values do not compress, nor do two of them resemble each other."""
    rng = random.Random(data.value_bytes)
    pool = rng.randbytes(POOL_BYTES + data.value_bytes)
    step = max(1, min(FILL_KEYS, FILL_BYTES // (data.value_bytes + 64)))
    batches: Iterator[range] = (range(at, min(at + step, data.keys)) for at in range(0, data.keys, step))

    async def caller() -> None:
        for numbers in batches:  # which all callers share
            items = {}
            for number in numbers:
                at = rng.randrange(POOL_BYTES)
                items[data.key(number)] = pool[at : at + data.value_bytes]
            await _store(client, items)

    async with asyncio.TaskGroup() as group:
        for _ in range(FILL_CALLERS):
            group.create_task(caller())


async def _store(client: DHTClient, items: dict[str, bytes]) -> None:
    """Puts them, as often as it takes: again where it is not known whether it was done, too, as that does no harm here.
    Raises what no pause helps against, and BatchError after FILL_TIMEOUT_S."""
    until = time.perf_counter() + FILL_TIMEOUT_S
    while items:
        try:
            await client.put_many(items)
            return
        except BatchError as error:
            again = (failure.retryable or isinstance(failure, OutcomeUnknown) for failure in error.failed.values())
            if time.perf_counter() > until or not all(again):
                raise
            items = {key: items[key] for key in error.failed}
        except Overloaded:
            if time.perf_counter() > until:
                raise
        await asyncio.sleep(FILL_PAUSE_S)


async def trees_built(client: DHTClient, nodes: range | list[int]) -> None:
    """Until these nodes know all their ranges. They are ready."""
    names = {f"n{i}" for i in nodes}
    async with asyncio.timeout(TREES_TIMEOUT_S):
        while True:
            said = [state for name, state in (await client.status()).items() if name in names]
            if len(said) == len(names) and not any(
                "error" in state or state["repair"]["unknown_ranges"] for state in said
            ):
                return
            await asyncio.sleep(0.05)


async def settle(client: DHTClient) -> None:
    """Until the nodes have nothing more to do: compactions have ended, changes are folded in."""
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        used = cpu_s(await client.stats())
        while True:
            await asyncio.sleep(SETTLE_LOOK_S)
            now = cpu_s(await client.stats())
            if now - used < IDLE_CPU_SHARE * SETTLE_LOOK_S:
                return
            used = now


def cpu_s(stats: dict[str, dict[str, Any]]) -> float:
    """Processor time of all nodes that answered."""
    return float(sum(node.get("cpu_s", 0.0) for node in stats.values()))


def rss_bytes(stats: dict[str, dict[str, Any]]) -> int:
    """Of the node that has the most."""
    return max(int(node.get("rss_bytes", 0)) for node in stats.values())


async def _is_ready(address: str) -> bool:
    """Asks `/readyz` once."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    try:
        writer.write(f"GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


def free_bytes(folder: Path) -> int:
    """What a user may still write there."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize
