"""kademlia, a hash table in memory over UDP: three nodes and a fourth in this process, which is how it is used.

It acknowledges a write when one node has taken it, and keeps its own copy of what is near it, so that reads of those
keys do not leave the process.
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
POLL_S = 0.2
VALUE_BYTES_MAX = 4096
"""It sends each message as one datagram of at most 8 KiB."""
CALLERS_MAX = 32
"""With more at once datagrams are lost, whereupon it forgets its neighbours and fails every call."""
FILL_AT_ONCE = 20


class NotStored(Exception):
    """No node took the value."""


@dataclass(frozen=True)
class Kademlia:
    """Its own server class, four times."""

    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        from kademlia.network import Server

        async with Servers(folder) as servers:
            *ports, mine = free_ports(NODES + 1, udp=True)
            for number, port in enumerate(ports):
                node: list[str | int] = [sys.executable, "-m", "bench.peers.nodes", "kademlia", port, *ports[:number]]
                await servers.spawn(f"kademlia-{number}", *node, env={"PYTHONPATH": str(ROOT)})
            server = Server()
            await server.listen(mine, interface=HOST)
            try:
                await _joined(server, ports)
                yield Running(_calls(server), servers.pids)
            finally:
                server.stop()


async def _joined(server: Any, ports: list[int]) -> None:
    """Until all nodes are known."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while len(server.bootstrappable_neighbors()) < NODES:
                await server.bootstrap([(HOST, port) for port in ports])
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerFailed("the nodes did not find each other") from None


def _calls(server: Any) -> Calls:
    async def put(key: str, value: bytes) -> None:
        if not await server.set(key, value):
            raise NotStored(key)

    async def fill(items: dict[str, bytes]) -> None:
        """A few at once: it loses datagrams beyond what a socket's buffer takes."""
        pairs = list(items.items())
        for first in range(0, len(pairs), FILL_AT_ONCE):
            await asyncio.gather(*(put(key, value) for key, value in pairs[first : first + FILL_AT_ONCE]))

    return Calls(get=server.get, put=put, fill=fill)


PEERS = (
    Kademlia(
        Facts(
            name="kademlia",
            title="kademlia",
            guarantee="a write is taken by one node or more; a read returns what most of those asked have",
            durability="memory of 1 to 4 nodes",
            against="ours-memory",
            modules=("kademlia",),
            distributions=("kademlia",),
            value_bytes_max=VALUE_BYTES_MAX,
            callers_max=CALLERS_MAX,
            lacks={
                "batch_put": "one key a call",
                "batch_get": "one key a call",
                "cas": "it has none",
                "lock": "it has none",
                "scan": "keys are hashed",
            },
            note="the caller is a node too: keys near to it are read from its own memory",
        )
    ),
)
