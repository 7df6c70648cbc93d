"""memcached through emcache: an upper line. One process, no replica, nothing on a disk."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.base import CALL_TIMEOUT_S, Calls, Facts, Running
from bench.peers.processes import HOST, Servers, free_ports

MEMORY_MIB = 1024
CONNECTIONS = 32
"""emcache opens two unless told; with one for each of 256 callers it is slower."""


class Missing(Exception):
    """A key that was just stored is not there."""


@dataclass(frozen=True)
class Memcached:
    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        import emcache

        async with Servers(folder) as servers:
            (port,) = free_ports(1)
            await servers.spawn(
                "memcached", "memcached", "-l", HOST, "-p", port, "-U", 0, "-m", MEMORY_MIB, "-u", getpass.getuser()
            )
            await servers.listening("memcached", port)
            client = await emcache.create_client(
                [emcache.MemcachedHostAddress(HOST, port)],
                timeout=CALL_TIMEOUT_S,
                max_connections=CONNECTIONS,
                min_connections=CONNECTIONS,
            )
            try:
                yield Running(_calls(client), servers.pids)
            finally:
                await client.close()


def _calls(client: Any) -> Calls:
    async def get(key: str) -> bytes | None:
        found = await client.get(key.encode())
        return None if found is None else found.value

    async def put(key: str, value: bytes) -> None:
        await client.set(key.encode(), value)

    async def get_many(keys: list[str]) -> list[bytes | None]:
        names = [key.encode() for key in keys]
        found = await client.get_many(names)
        return [found[name].value if name in found else None for name in names]

    async def put_many(items: dict[str, bytes]) -> None:
        await asyncio.gather(*(client.set(key.encode(), value) for key, value in items.items()))

    async def token(key: str) -> int:
        found = await client.gets(key.encode())
        if found is None:
            raise Missing(key)
        return int(found.cas)

    async def create(key: str, value: bytes) -> int:
        await put(key, value)
        return await token(key)

    async def swap(key: str, expected: int, value: bytes) -> int:
        await client.cas(key.encode(), value, expected)
        return await token(key)

    return Calls(get=get, put=put, get_many=get_many, put_many=put_many, swap_begin=create, swap=swap)


PEERS = (
    Memcached(
        Facts(
            name="memcached",
            title="memcached (upper line)",
            guarantee="one server, no replica",
            durability="memory of 1 node",
            against="ours-memory",
            modules=("emcache",),
            distributions=("emcache",),
            programs=("memcached",),
            packages=("memcached",),
            replicated=False,
            value_bytes_max=1_000_000,
            lacks={"lock": "no recipe in its client", "scan": "memcached has none"},
            note="a batch put is 1,000 sets at once; a swap is cas, then gets for the next token",
        )
    ),
)
