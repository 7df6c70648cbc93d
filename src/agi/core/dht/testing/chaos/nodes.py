"""The node processes of a run. One task, `supervise`, starts those that are to run and do not, and sees how each ends.

Faults say what they want (`kill`, `release`); they never start a process themselves, so that several of them may hit
one node without a race. A node is killed by the kernel when this process dies, also one that is frozen (setpriv).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agi.core.dht.testing.chaos.disk import Disk
from agi.core.dht.testing.chaos.network import Network
from agi.core.dht.testing.chaos.skew import Clock

START_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 30.0
LOOK_S = 0.1
REFUSALS_MAX = 20
"""Starts that fail one after the other, after which a node is given up."""
FULL_S = 10.0
"""For so long after its disk was freed a node may still end for want of space."""
LOG_TAIL_BYTES = 1500
PORT = 7000
SERVER = ("-X", "faulthandler", "-m", "agi.core.dht.server")
"""What the interpreter is told to run."""
SETTINGS = {
    "replication.factor": "3",
    "network.unix_socket": "",
    "reclaim.interval_ms": "4000",  # far more often than one would, so that it meets all faults
    "reclaim.lag_ms": "1000",
}


@dataclass(eq=False)
class Node:
    """
    Attributes:
        wanted: it is to run, but for `held`.
        held: how many faults want it down right now.
        frozen: how many faults want it to stand still.
        killed: that the process ends is our doing.
        started_s: when its process was started last, by the loop's clock.
        refusals: starts that failed one after the other.
        disk: what its data lies on, if on one of the run's own.
        clock: what its wall clock shows, if that can be shifted.
    """

    name: str
    address: str
    path: Path
    log: Path
    disk: Disk | None = None
    clock: Clock | None = None
    wanted: bool = False
    held: int = 0
    frozen: int = 0
    killed: bool = False
    started_s: float = 0.0
    refusals: int = 0
    process: asyncio.subprocess.Process | None = None
    announced: dict[str, Any] | None = None
    held_port: socket.socket | None = None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def listens(self) -> bool:
        return self.runs and self.announced is not None


class Nodes:
    """
    Args:
        folder: for data and logs.
        network: None for the loopback, on free ports.
        on_died: told (node, what happened) when one ends that should not have.
        on_event: told (node, what happened) of ends that are as they should be.
        disk_of: makes the disk of a node, not opened yet; None for a folder like any other.
        clocks: whether wall clocks can be shifted.
    """

    def __init__(
        self,
        folder: Path,
        network: Network | None,
        on_died: Callable[[str, str], None],
        on_event: Callable[[str, str], None],
        disk_of: Callable[[str], Disk | None] = lambda name: None,
        *,
        clocks: bool = False,
    ) -> None:
        self.all: dict[str, Node] = {}
        self.first: list[str] = []
        """Addresses of the nodes that form the cluster, which every node gets as its peers."""
        self._folder = folder
        self._network = network
        self._on_died = on_died
        self._on_event = on_event
        self._disk_of = disk_of
        self._clocks = clocks

    async def add(self, name: str) -> Node:
        """A node with an address, which does not run yet."""
        held_port = None
        if self._network is None:
            held_port = _held_port()
            address = f"127.0.0.1:{held_port.getsockname()[1]}"
        else:
            address = f"{await self._network.attach(name)}:{PORT}"
        disk = self._disk_of(name)
        path = (disk.folder if disk is not None else self._folder) / f"data-{name}"
        clock = Clock(self._folder / f"clock-{name}") if self._clocks else None
        node = Node(name, address, path, self._folder / f"{name}.log", disk, clock, held_port=held_port)
        self.all[name] = node
        if disk is not None:
            await disk.open()
        return node

    def command(self, node: Node) -> list[str]:
        settings = dict(SETTINGS)
        inside: list[str] = []
        if self._network is None:
            settings |= {"network.reuse_port": "true", "network.data_port": "0", "network.http_port": "0"}
        else:
            inside = self._network.inside(node.name)
        host, _, port = node.address.rpartition(":")
        peers = ",".join(address for address in self.first if address != node.address)
        clock = node.clock.before() if node.clock is not None else []
        words = [*inside, *guard(), *clock, sys.executable, *SERVER, "--stop-with-stdin"]
        words += ["--host", host, "--port", port, "--peers", peers, "--node-id", node.name, "--path", str(node.path)]
        for key, value in settings.items():
            words += ["--set", f"{key}={value}"]
        return words

    def wanted(self) -> list[str]:
        """Addresses of those that are to run."""
        return [node.address for node in self.all.values() if node.wanted]

    # --- what faults want

    def kill(self, node: Node) -> None:
        """SIGKILL, and it stays down until released as often."""
        self.hold(node)
        self._signal(node, signal.SIGKILL)

    def hold(self, node: Node) -> None:
        """However it ends from now on is our doing, and it stays down until released as often."""
        node.held += 1
        node.killed = node.killed or node.runs

    async def gone(self, node: Node) -> None:
        """Ends it, however it stands, and waits until no process of it is left. It must be held."""
        self._signal(node, signal.SIGKILL)
        if (process := node.process) is not None:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()

    def release(self, node: Node) -> None:
        node.held -= 1

    def freeze(self, node: Node) -> None:
        node.frozen += 1
        self._signal(node, signal.SIGSTOP)

    def thaw(self, node: Node) -> None:
        node.frozen -= 1
        if not node.frozen:
            self._signal(node, signal.SIGCONT)

    def _signal(self, node: Node, number: signal.Signals) -> None:
        if node.process is not None and node.runs:
            node.process.send_signal(number)

    def running(self) -> list[Node]:
        """Those that listen, and that no fault wants down or still."""
        return [node for node in self.all.values() if node.listens and not node.held and not node.frozen]

    # --- processes

    async def supervise(self) -> None:
        """Runs until cancelled."""
        while True:
            for node in self.all.values():
                if node.process is not None and not node.runs:
                    self._ended(node, node.process.returncode or 0)
            absent = [node for node in self.all.values() if node.wanted and not node.held and node.process is None]
            await asyncio.gather(*(self._start(node) for node in absent))
            await asyncio.sleep(LOOK_S)

    async def _start(self, node: Node) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DHT_")}
        node.killed, node.announced, node.started_s = False, None, asyncio.get_running_loop().time()
        with node.log.open("ab") as log:
            node.process = await asyncio.create_subprocess_exec(
                *self.command(node),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is for this process alone
            )
        if node.held:  # a fault came while it was being made
            node.killed = True
            node.process.send_signal(signal.SIGKILL)
        if node.frozen:
            node.process.send_signal(signal.SIGSTOP)
        assert node.process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await node.process.stdout.readline()
        except TimeoutError:
            self._on_died(node.name, f"announced nothing within {START_TIMEOUT_S:g} s")
            return
        if line:
            node.announced = json.loads(line)
            node.refusals = 0
        else:
            await node.process.wait()

    def _ended(self, node: Node, code: int) -> None:
        """Its process is gone: by us, since the cluster let it go (0), for want of space, or else by a fault of its
        own."""
        was_announced = node.announced is not None
        node.process, node.announced = None, None
        if node.killed or not node.wanted:
            return
        if code == 0 and was_announced:
            node.wanted = False
            self._on_event(node.name, "was let go")
            return
        what = f"{'ended' if was_announced else 'did not start'}, exit code {code}: {self.tail(node)}"
        node.refusals += 1
        since_s = asyncio.get_running_loop().time() - FULL_S if was_announced else node.started_s
        if node.disk is not None and node.disk.was_full_since(since_s):
            self._on_event(node.name, f"{what} (its disk was full)")
        else:
            self._on_died(node.name, what)
        if node.refusals >= REFUSALS_MAX:
            node.wanted = False

    def tail(self, node: Node) -> str:
        """The error that its log ends with, or the log's end."""
        text = node.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        return errors[-1] if errors else text

    async def stop(self) -> dict[str, int]:
        """Ends every process in good order; returns the exit codes that are not 0, -6 of one that did not end in time.
        `supervise` must have ended."""
        codes = await asyncio.gather(*(self._stop(node, signal.SIGTERM) for node in self.all.values()))
        return {name: code for name, code in zip(self.all, codes, strict=True) if code}

    async def kill_all(self) -> None:
        """Ends every process at once, in whatever state; their disks go with them."""
        await asyncio.gather(*(self._stop(node, signal.SIGKILL) for node in self.all.values()))
        for node in self.all.values():
            if node.held_port is not None:
                node.held_port.close()
            if node.disk is not None:
                await node.disk.close()

    async def _stop(self, node: Node, how: signal.Signals) -> int:
        process = node.process
        if process is None:
            return 0
        node.wanted = False
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            process.send_signal(signal.SIGABRT)  # its log then tells where it hangs
            code = await process.wait()
        node.process = None
        return 0 if how is signal.SIGKILL else code


def guard() -> list[str]:
    """What comes before a command that is to end with this process."""
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def _held_port() -> socket.socket:
    """A free port that nobody else can take meanwhile; a node with `network.reuse_port` can."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held
