"""What anybody tries first: three servers with nothing but `--port` and `--peers`, and five lines of client."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from process_harness import NodeProcess, environment, start

from agi.core.dht import DHTClient, SyncDHTClient

TRIES_MAX = 10
"""Nobody can hold a port for a server that binds it alone, so another program may be quicker: then others are tried."""
PORTS = range(10_000, 29_000)
"""Below the ports that systems give to outgoing connections."""


@contextmanager
def short_folder() -> Iterator[Path]:
    """For TMPDIR: a Unix socket's path has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dht"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def three_ports(rng: random.Random) -> list[int]:
    """Three neighbours that are free with the ports derived from them."""
    for _ in range(1000):
        base = rng.choice(PORTS)
        if all(is_free(base + i + derived) for i in range(3) for derived in (0, 1000, 2000)):
            return [base, base + 1, base + 2]
    raise AssertionError("no three neighbouring ports are free")


async def start_three(folder: Path, tmp: Path, ports: Sequence[int], order: Sequence[int]) -> list[NodeProcess]:
    """All three, or none where one does not start."""
    nodes: dict[int, NodeProcess] = {}
    try:
        for i in order:
            peers = ",".join(f"localhost:{port}" for port in ports if port != ports[i])
            nodes[i] = await start(
                folder, "--port", ports[i], "--peers", peers,
                environ=environment(TMPDIR=str(tmp)), log=folder / f"{ports[i]}.log",
            )  # fmt: skip
    except BaseException:
        await asyncio.gather(*(node.end() for node in nodes.values()))
        raise
    return [nodes[i] for i in range(3)]


@asynccontextmanager
async def three_servers(folder: Path, tmp: Path, order: Sequence[int]) -> AsyncIterator[list[int]]:
    rng = random.Random(os.getpid())
    for left in reversed(range(TRIES_MAX)):
        ports = three_ports(rng)
        try:
            nodes = await start_three(folder, tmp, ports, order)
        except AssertionError as error:
            if "in use" in str(error) and left:
                continue
            raise
        break
    try:
        yield ports
    finally:
        codes = await asyncio.gather(*(node.end() for node in nodes))
    assert codes == [0, 0, 0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
async def test_three_servers_and_a_client(tmp_path: Path, order: Sequence[int]) -> None:
    with short_folder() as tmp:
        async with three_servers(tmp_path, tmp, order) as ports:
            for port in ports:
                client = DHTClient()
                await client.connect([f"localhost:{port}"])
                await client.put("test:key", b"hello world")
                value = await client.get("test:key")
                await client.close()
                assert value == b"hello world"
        folders = sorted((tmp_path / "dht-data").iterdir())  # nothing else runs here
        assert [folder.name for folder in folders] == [f"127.0.0.1_{port}" for port in ports]


async def test_three_servers_and_a_synchronous_client(tmp_path: Path) -> None:
    def use(port: int) -> bytes | None:
        client = SyncDHTClient()
        client.connect([f"localhost:{port}"])
        client.put("test:key", b"hello world")
        value = client.get("test:key")
        client.close()
        return value

    with short_folder() as tmp:
        async with three_servers(tmp_path, tmp, (1, 2, 0)) as ports, asyncio.timeout(60):
            assert await asyncio.to_thread(use, ports[0]) == b"hello world"
