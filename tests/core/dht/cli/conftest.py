"""Clusters of real processes for the command line, and ways to run it: here in this process, or as one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import pytest

from agi.core.dht import DHTClient, cli
from agi.core.dht.local import LocalCluster

T = TypeVar("T")
WAIT_S = 30.0


class Background:
    """An event loop in a thread, for clusters that live as long as several tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster-loop")
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


class Started(NamedTuple):
    cluster: LocalCluster
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    @property
    def connect(self) -> str:
        return ",".join(self.cluster.addresses)


async def _all_connected(cluster: LocalCluster) -> bool:
    """A node is ready once it has peers for quorums; these tests count on all of them."""
    async with DHTClient() as client:
        await client.connect(cluster.addresses)
        states = (await client.status()).values()
    peers = [peer for state in states for peer in state.get("peers", {}).values()]
    return len(peers) == len(cluster.nodes) * (len(cluster.nodes) - 1) and all(peer["connected"] for peer in peers)


@contextlib.contextmanager
def local_cluster(
    count: int, folder: Path, *, start: int | None = None, per_node: Mapping[int, Mapping[str, str]] | None = None
) -> Iterator[Started]:
    """Nodes of memory; only the first `start` of them run, and are not waited for, where that is given."""
    background = Background()
    try:

        async def begin() -> LocalCluster:
            cluster = LocalCluster(count, folder, storage="memory", per_node=per_node)
            if start is None:
                return await cluster.__aenter__()
            for i in range(start):
                await cluster.start_node(i)
            return cluster

        cluster = background.run(begin())
        try:
            if start is None:
                until(lambda: background.run(_all_connected(cluster)))
            yield Started(cluster, background.run)
        finally:
            background.run(cluster.stop())
    finally:
        background.close()


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Three nodes that nobody harms; each test has keys of its own."""
    with local_cluster(3, tmp_path_factory.mktemp("nodes")) as started:
        yield started


class Run(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)

    @property
    def lines(self) -> list[Any]:
        return [msgspec.json.decode(line) for line in self.out.splitlines()]


class Runner(Protocol):
    def __call__(self, *arguments: str, stdin: bytes | None = None) -> Run: ...


@pytest.fixture
def run_cli(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs a command in this process. Without `stdin` there is a terminal."""
    for name in [name for name in os.environ if name.startswith("DHT_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str, stdin: bytes | None = None) -> Run:
        given = io.TextIOWrapper(io.BytesIO(stdin or b""))
        if stdin is None:
            monkeypatch.setattr(given, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", given)
        capsysbinary.readouterr()
        code = cli.main(list(arguments))
        out, err = capsysbinary.readouterr()
        return Run(code, out, err.decode())

    return run


@pytest.fixture
def dht(cluster: Started, run_cli: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """`run_cli` that knows where the cluster is."""
    monkeypatch.setenv("AGI_DHT_CONNECT", cluster.connect)
    return run_cli


def command(*arguments: str | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "agi.core.dht.cli", *arguments]


def process(connect: str, *arguments: str | bytes, stdin: bytes = b"") -> Run:
    """Runs a command as a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DHT_")}
    done = subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        timeout=WAIT_S,
        env={**environment, "AGI_DHT_CONNECT": connect},
    )
    return Run(done.returncode, done.stdout, done.stderr.decode())


def until(check: Callable[[], T]) -> T:
    """What the check gives as soon as it gives something true."""
    deadline = time.monotonic() + WAIT_S
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not come true"
    return found


class Helpers(NamedTuple):
    local_cluster: Any
    process: Callable[..., Run]
    command: Callable[..., list[str | bytes]]
    until: Callable[..., Any]


@pytest.fixture(scope="session")
def helpers() -> Helpers:
    return Helpers(local_cluster, process, command, until)
