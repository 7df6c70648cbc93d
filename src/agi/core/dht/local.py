"""A cluster of node processes on this machine's loopback: for demos, benchmarks and tests.

    async with LocalCluster(3, folder) as cluster:
        client = DHTClient()
        await client.connect(cluster.addresses)
        await cluster.kill(0)
        await cluster.start_node(0)

The gRPC ports are free ones that this process holds bound while the cluster lives, so that a node gets its own back
after a restart. The nodes hang on to this process by their stdin: they end when it ends, however it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ConfigError, DHTError, NotReady

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_BYTES = 2000
SOCKET_PATH_BYTES_MAX = 100


class NodeProcess:
    """One process. `announced` is what it said on stdout: its ports, addresses and pid."""

    def __init__(self, process: asyncio.subprocess.Process, announced: dict[str, Any]) -> None:
        self.process = process
        self.announced = announced

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class LocalCluster:
    """
    Args:
        count: nodes; their ids are n0, n1, ...
        folder: for their data, logs and sockets; it must exist, and stays.
        storage: rocksdb, memory or redis.
        settings: any others, by dotted key, for all nodes.
        per_node: settings of single nodes by index, over those for all.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        *,
        storage: str = "rocksdb",
        settings: Mapping[str, str] | None = None,
        per_node: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        if not 1 <= count <= 64:
            raise ConfigError(f"a local cluster has 1 to 64 nodes, not {count}")
        self.folder = folder
        self.nodes: list[NodeProcess | None] = [None] * count
        self._storage = storage
        self._settings = dict(settings or {})
        self._per_node = per_node or {}
        self._held = [_reserve_port() for _ in range(count)]
        self.addresses = [f"127.0.0.1:{held.getsockname()[1]}" for held in self._held]

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self.start_node(i) for i in range(len(self.nodes))))
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def log(self, i: int) -> Path:
        """What the node wrote to stderr, over all its starts."""
        return self.folder / f"n{i}.log"

    def node(self, i: int) -> NodeProcess:
        """The running process. Raises DHTError where there is none."""
        node = self.nodes[i]
        if node is None or not node.alive:
            raise DHTError(f"n{i} does not run")
        return node

    def command(self, i: int) -> list[str]:
        """The command line of a node."""
        settings = {
            "network.reuse_port": "true",
            "network.data_port": "0",
            "network.http_port": "0",
            "network.unix_socket": _socket_path(self.folder / f"n{i}.sock"),
            **self._settings,
            **self._per_node.get(i, {}),
        }
        others = [address for j, address in enumerate(self.addresses) if j != i]
        arguments = ["--port", self.addresses[i].rpartition(":")[2], "--peers", ",".join(others), "--node-id", f"n{i}"]
        arguments += ["--storage", self._storage, "--path", str(self.folder / f"n{i}"), "--stop-with-stdin"]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        return [sys.executable, "-m", "agi.core.dht.server", *arguments]

    async def start_node(self, i: int) -> NodeProcess:
        """Starts a node, anew or after `kill`; returns once it listens. Raises DHTError with the end of its log."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DHT_")}
        with self.log(i).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self.command(i),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is for the launcher, who stops its nodes
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await process.stdout.readline()
                if not line:
                    wrong = await process.wait() == ConfigError.exit_code
                    raise (ConfigError if wrong else DHTError)(f"n{i} did not start: {self._tail(i)}")
            node = self.nodes[i] = NodeProcess(process, json.loads(line))
        except BaseException:
            await _end(process, signal.SIGKILL)
            raise
        return node

    async def add_node(self) -> int:
        """Starts one more node, which asks to join; returns its index once it listens. Raises as `start_node`."""
        held = _reserve_port()
        self._held.append(held)
        self.addresses.append(f"127.0.0.1:{held.getsockname()[1]}")
        self.nodes.append(None)
        await self.start_node(len(self.nodes) - 1)
        return len(self.nodes) - 1

    async def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until every running node is ready and connected to all that run. Raises NotReady with what is missing."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        running = [i for i, node in enumerate(self.nodes) if node is not None and node.alive]
        async with DHTClient(unix=False, timeout=5.0) as client:
            await client.connect([self.addresses[i] for i in running], timeout=timeout_s)
            while waiting := _missing(await client.status(), [f"n{i}" for i in running]):
                if asyncio.get_running_loop().time() > deadline:
                    raise NotReady(f"not all nodes became ready: {waiting}")
                await asyncio.sleep(0.02)

    async def kill(self, i: int) -> None:
        """SIGKILL."""
        await _end(self.node(i).process, signal.SIGKILL)

    async def stop_node(self, i: int) -> int:
        """SIGTERM; returns the exit code."""
        return await _end(self.node(i).process, signal.SIGTERM)

    async def stop(self) -> None:
        """Ends every process; what does not stop in time is killed."""
        await asyncio.gather(
            *(_end(node.process, signal.SIGTERM) for node in self.nodes if node is not None and node.alive)
        )
        for held in self._held:
            held.close()

    def _tail(self, i: int) -> str:
        text = self.log(i).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else text


def _missing(status: dict[str, dict[str, Any]], running: list[str]) -> dict[str, str]:
    """What keeps the cluster from being whole, by node."""
    missing = {}
    for name in running:
        said = status.get(name, {"error": "not known yet"})
        if not said.get("ready"):
            missing[name] = str(said.get("waiting_for") or said.get("error"))
        elif apart := [peer for peer, link in said["peers"].items() if peer in running and not link["connected"]]:
            missing[name] = f"not connected to {', '.join(apart)}"
    return missing


def _socket_path(path: Path) -> str:
    """In the cluster's folder, so that nothing is left elsewhere; none where the name is too long for a socket."""
    return str(path) if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else ""


def _reserve_port() -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


async def _end(process: asyncio.subprocess.Process, how: signal.Signals) -> int:
    if process.returncode is None:
        process.send_signal(how)
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
