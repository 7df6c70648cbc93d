"""PySyncObj, Raft inside the program: two node processes, and the caller's own process is the third.

A write is in the memory of a majority when its callback runs; reads are of the caller's own memory, so they may be
behind. It works in a thread of its own, whose callbacks are handed over to the loop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.base import Calls, Facts, PeerFailed, Running
from bench.peers.processes import HOST, ROOT, START_TIMEOUT_S, Servers, free_ports

NODES = 3
POLL_S = 0.1
LOCK_TTL_S = 10.0


class Refused(Exception):
    """A command was not applied, with the library's reason."""


class Overtaken(Exception):
    """The key held something else."""


def make_store(port: int, others: list[int]) -> Any:
    """A node: a dictionary whose changes are replicated commands, as the library's guide shows. Also what the node
    processes run."""
    from pysyncobj import SyncObj, SyncObjConf, replicated
    from pysyncobj.batteries import ReplLockManager

    class Store(SyncObj):  # type: ignore[misc]  # an untyped library
        def __init__(self) -> None:
            self.locks = ReplLockManager(LOCK_TTL_S)
            # Entries are sent at once and not collected for the 100 ms that the default is: 0.8 ms a write, not 100.
            how = SyncObjConf(appendEntriesUseBatch=False)
            super().__init__(f"{HOST}:{port}", [f"{HOST}:{other}" for other in others], how, consumers=[self.locks])
            self.values: dict[str, bytes] = {}

        @replicated  # type: ignore[untyped-decorator]  # as above
        def store(self, key: str, value: bytes) -> None:
            self.values[key] = value

        @replicated  # type: ignore[untyped-decorator]  # as above
        def store_many(self, items: dict[str, bytes]) -> None:
            self.values.update(items)

        @replicated  # type: ignore[untyped-decorator]  # as above
        def swap(self, key: str, expected: bytes, value: bytes) -> bool:
            if self.values.get(key) != expected:
                return False
            self.values[key] = value
            return True

    return Store()


@dataclass(frozen=True)
class PySyncObj:
    """Three nodes, one of them here."""

    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        async with Servers(folder) as servers:
            mine, *ports = free_ports(NODES)
            for number, port in enumerate(ports):
                others = [mine, *(each for each in ports if each != port)]
                node: list[str | int] = [sys.executable, "-m", "bench.peers.nodes", "pysyncobj", port, *others]
                await servers.spawn(f"pysyncobj-{number}", *node, env={"PYTHONPATH": str(ROOT)})
            store = await asyncio.to_thread(make_store, mine, ports)
            try:
                await _ready(store)
                yield Running(_calls(store), servers.pids)
            finally:
                await asyncio.to_thread(store.destroy)


async def _ready(store: Any) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                if store.isReady() and store.getStatus()["partner_nodes_count"] == NODES - 1:
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerFailed("the nodes have no leader") from None


def _calls(store: Any) -> Calls:
    loop = asyncio.get_running_loop()

    async def applied(command: Any, *arguments: object) -> Any:
        """Awaits a command, whose callback comes from the library's thread."""
        future: asyncio.Future[Any] = loop.create_future()
        command(*arguments, callback=lambda result, why: loop.call_soon_threadsafe(_settle, future, result, why))
        return await future

    async def get(key: str) -> bytes | None:
        value: bytes | None = store.values.get(key)
        return value

    async def get_many(keys: list[str]) -> list[bytes | None]:
        return [store.values.get(key) for key in keys]

    async def create(key: str, value: bytes) -> bytes:
        await applied(store.store, key, value)
        return value

    async def swap(key: str, expected: bytes, value: bytes) -> bytes:
        changed = int.from_bytes(expected[:8]) + 1  # never the same twice
        value = (changed % (1 << 64)).to_bytes(8) + value[8:]
        if not await applied(store.swap, key, expected, value):
            raise Overtaken(key)
        return value

    async def lock(name: str) -> None:
        if not await applied(store.locks.tryAcquire, name):
            raise Refused("the lock was not to be had")
        await applied(store.locks.release, name)

    async def scan(prefix: str) -> list[bytes]:
        return [store.values[key] for key in sorted(store.values) if key.startswith(prefix)]

    return Calls(
        get=get,
        put=lambda key, value: applied(store.store, key, value),
        get_many=get_many,
        put_many=lambda items: applied(store.store_many, items),
        swap_begin=create,
        swap=swap,
        lock=lock,
        scan=scan,
    )


def _settle(future: asyncio.Future[Any], result: Any, why: int) -> None:
    if future.done():  # its caller was cancelled
        return
    if why:
        future.set_exception(Refused(f"reason {why}"))
    else:
        future.set_result(result)


PEERS = (
    PySyncObj(
        Facts(
            name="pysyncobj",
            title="PySyncObj",
            guarantee="linearizable writes of 3 replicas (Raft); reads of the caller's own memory, which may be behind",
            durability="memory of 2 of 3 nodes",
            against="ours-memory",
            modules=("pysyncobj",),
            distributions=("pysyncobj",),
            threads=True,
            note="the caller's process is one of the three nodes: a read is a look into its dictionary",
        )
    ),
)
