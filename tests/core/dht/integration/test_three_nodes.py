"""Three real node processes with RocksDB: the first thing that a user does."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ConnectFailed

START_S = 20.0


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """Three free ports, held by bound sockets until the test ends: nobody else can take them."""
    with ExitStack() as held:
        found = []
        for _ in range(3):
            each = held.enter_context(socket.socket())
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(("127.0.0.1", 0))
            found.append(int(each.getsockname()[1]))
        yield found


async def _start(port: int, peers: list[int], folder: Path) -> asyncio.subprocess.Process:
    log = (folder / f"{port}.log").open("ab")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agi.core.dht.server", "--port", str(port),
        "--peers", ",".join(f"127.0.0.1:{peer}" for peer in peers), "--path", str(folder / str(port)),
        "--set", "network.reuse_port=true", "--set", "network.data_port=0", "--set", "network.http_port=0",
        "--set", f"network.unix_socket={folder / str(port)}.sock",
        stdout=asyncio.subprocess.PIPE, stderr=log,
    )  # fmt: skip
    log.close()
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        assert json.loads(line)["port"] == port
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process


async def test_acknowledged_writes_survive_the_kill_of_a_node_and_its_return(tmp_path: Path, ports: list[int]) -> None:
    nodes: list[asyncio.subprocess.Process] = []
    client = DHTClient(retry_unknown=True, timeout=10)
    try:
        for port in ports:
            nodes.append(await _start(port, [other for other in ports if other != port], tmp_path))
        await client.connect([f"localhost:{ports[0]}"], timeout=START_S)
        await client.put("test:key", b"hello world")
        assert await client.get("test:key") == b"hello world"
        expected = {f"k{i}": b"%d" % i for i in range(500)}
        await client.put_many(expected)
        nodes[0].send_signal(signal.SIGKILL)  # the node that the client bootstrapped from
        await asyncio.wait_for(nodes[0].wait(), 10)
        for i in range(500, 700):
            await client.put(f"k{i}", b"%d" % i)
            expected[f"k{i}"] = b"%d" % i
        assert await client.get_many(expected) == expected
        nodes[0] = await _start(ports[0], ports[1:], tmp_path)
        assert await client.get_many(expected) == expected
        assert dict(await client.scan("k", 1000)) == expected
        assert await client.delete("k0")
        assert await client.get("k0") is None
    finally:
        await client.close()
        for node in nodes:
            if node.returncode is None:
                node.send_signal(signal.SIGTERM)
        codes = [await asyncio.wait_for(node.wait(), 20) for node in nodes]
    assert codes == [0, 0, 0]


async def test_a_port_in_use_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agi.core.dht.server", "--port", port, "--path", str(tmp_path / "data"),
            "--set", "network.data_port=0", "--set", "network.http_port=0", "--set", "network.unix_socket=",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode == ConnectFailed.exit_code and out == b""
    assert [line for line in err.decode().splitlines() if line.startswith("error: ")] == [
        f"error: cannot listen on 127.0.0.1:{port}: the port is in use or the address is not this machine's"
    ]
