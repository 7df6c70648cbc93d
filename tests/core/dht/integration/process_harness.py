"""Node processes for tests: one that runs, one that must refuse to; ports held free; a link that asks a node itself.

async with node(tmp_path, "--set", "node.id=a") as a:
    assert a.announced["node_id"] == "a"
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agi.core.dht.errors import DHTError
from agi.core.dht.protocol.messages import Hello, Query
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.handshake import greet
from agi.core.dht.transport.native import NativeTransport
from agi.core.dht.types import PROTOCOL_VERSION

WAIT_S = 20.0
"""For whatever a test waits for; far above what it takes."""
ONE_CLOCK = {"versions.max_clock_skew_ms": "200", "repair.interval_ms": "2000"}
"""Nodes of one machine need not wait for clocks that differ: replicas are held to be equal sooner after a change."""
ANY_PORTS = ("--set", "network.data_port=0", "--set", "network.http_port=0", "--set", "network.unix_socket=")


async def until(condition: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110  # nobody signals what tests look for
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S:g} s: {what}") from None


@dataclass
class NodeProcess:
    """A node that listens. `announced` is what it said on stdout, `log` the file that its stderr goes to."""

    process: asyncio.subprocess.Process
    log: Path
    announced: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return str(self.announced["address"])

    @property
    def data_address(self) -> str:
        return str(self.announced["data_address"])

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of one event."""
        lines = [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it, however it is; returns its exit code."""
        if self.process.returncode is None:
            self.send(signal.SIGCONT)  # it may be frozen
            self.send(how)
        try:
            return await self.ended()
        except TimeoutError:
            self.process.kill()
            return await self.process.wait()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "agi.core.dht.server", *map(str, arguments)]


def options(settings: Mapping[str, str]) -> list[str]:
    """Settings on the command line."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def environment(**more: str) -> dict[str, str]:
    """This process's, without settings of nodes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DHT_")} | more


async def start(
    folder: Path, *arguments: object, environ: Mapping[str, str] | None = None, log: Path | None = None
) -> NodeProcess:
    """A node started in that folder with exactly these arguments; returns once it listens. The caller ends it."""
    log = log or folder / "node.log"
    with log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command(*arguments),
            cwd=folder,
            env=dict(environ) if environ is not None else environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    started = NodeProcess(process, log)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            line = await process.stdout.readline()
        assert line, f"the node did not start: {started.said()}"
        started.announced = json.loads(line)
    except BaseException:
        await started.end(signal.SIGKILL)
        raise
    return started


@asynccontextmanager
async def node(
    folder: Path, *arguments: object, name: str = "n", storage: str = "memory"
) -> AsyncIterator[NodeProcess]:
    """A node on free ports, in memory unless told otherwise; its later arguments win over these."""
    first = ["--port", "0", "--storage", storage, "--path", folder / name, *ANY_PORTS]
    started = await start(folder, *first, *arguments, log=folder / f"{name}.log")
    try:
        yield started
    finally:
        await started.end()


@dataclass
class Refusal:
    """How a node that did not start ended."""

    code: int
    said: str

    @property
    def error(self) -> str:
        """The one line that tells people what was wrong; beside it there may be log lines, gRPC's own included."""
        lines = [line for line in self.said.splitlines() if not re.match(r"\{|E[0-9]{4} [0-9:.]+ ", line)]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.said
        return lines[0].removeprefix("error: ")


async def refused(folder: Path, *arguments: object, environ: Mapping[str, str] | None = None) -> Refusal:
    """Runs a node that must not start: it has to end by itself, in time, having announced nothing."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        cwd=folder,
        env=dict(environ) if environ is not None else environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(WAIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert out == b"", out
    assert process.returncode is not None
    return Refusal(process.returncode, err.decode())


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Free ports that nobody else can take meanwhile; a node with `network.reuse_port` can."""
    with ExitStack() as held:
        found = []
        for _ in range(count):
            each = held.enter_context(socket.socket())
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(("127.0.0.1", 0))
            found.append(int(each.getsockname()[1]))
        yield found


class Asker:
    """A link to one node's data wire, as a client without a mind of its own."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.closed = asyncio.Event()
        self.error: DHTError | None = None
        self.link: Link
        self.hello: Hello

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self.heard.append(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self.error = error
        self.closed.set()

    async def ask(self, message: Any) -> Any:
        """The reply to a message, which has an id of its own."""
        self.link.send(message)
        return await self.reply(message.id)

    async def reply(self, number: int) -> Any:
        await until(lambda: self.closed.is_set() or self.replies(number), f"a reply to {number}")
        return self.replies(number)[0]

    def replies(self, number: int) -> list[Any]:
        """Those that have come."""
        return [reply for reply in self.heard if getattr(reply, "id", 0) == number]

    async def query(self, what: str) -> dict[str, Any]:
        number = 1_000_000 + len(self.heard)
        reply = await self.ask(Query(number, what, 5000))
        assert reply.error is None, reply.error
        answer: dict[str, Any] = msgspec.msgpack.decode(reply.body)
        return answer

    async def until_status(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The node's status once it is so."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition(status := await self.query("status")):  # noqa: ASYNC110  # the node is another process
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"not within {WAIT_S:g} s: {status}") from None
        return status


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[Asker]:
    """A link to a data address, or to `unix:/path`."""
    asker = Asker()
    asker.link, asker.hello = await greet(NativeTransport(), address, Hello(PROTOCOL_VERSION, "client", "asker"), asker)
    try:
        yield asker
    finally:
        asker.link.close()
        async with asyncio.timeout(WAIT_S):
            await asker.closed.wait()
