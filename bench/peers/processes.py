"""Server processes on loopback: started in a folder, ended by pid, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.peers.base import PeerFailed, program

START_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 10.0
PROBE_S = 0.05
PROBE_TIMEOUT_S = 2.0
LOG_TAIL_BYTES = 600
MARK = "BENCH_PEERS_TURN"
"""In the environment of every process that descends from ours, also of one that has left its parents."""
PORT_TRIES_MAX = 200
HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
"""Of this project: what a node process that is one of its modules needs on its path."""


class Servers:
    """The processes of one turn.

    async with Servers(folder) as servers:
        await servers.spawn("etcd-0", "etcd", "--data-dir", ...)
        await servers.listening("etcd-0", port)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(8)
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes.values())

    async def spawn(
        self, name: str, *command: str | Path | int, env: Mapping[str, str] | None = None, session: bool = True
    ) -> asyncio.subprocess.Process:
        """Starts a process whose output goes to NAME.log in the folder; without `session`, in that of this process."""
        path = program(str(command[0])) or str(command[0])
        with (self.folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *_ends_with_us(),
                path,
                *(str(part) for part in command[1:]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **(env or {}), MARK: self.mark},
                start_new_session=session,  # a Ctrl-C is for the harness, which stops its servers
            )
        self._processes[name] = process
        return process

    async def listening(self, name: str, port: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until a process takes connections. Raises PeerFailed with the end of its log."""
        process = self._processes[name]
        try:
            async with asyncio.timeout(timeout_s):
                while not await _connects(port):
                    if process.returncode is not None:
                        raise PeerFailed(f"{name} ended with {process.returncode}: {self.tail(name)}")
                    await asyncio.sleep(PROBE_S)
        except TimeoutError:
            raise PeerFailed(f"{name} does not listen after {timeout_s:g} s: {self.tail(name)}") from None

    def tail(self, name: str) -> str:
        """The end of what a process wrote, on one line."""
        text = (self.folder / f"{name}.log").read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())

    async def stop(self) -> None:
        """Ends every process; what does not end in time is killed, and so is what they have left behind."""
        await asyncio.gather(*(_end(process) for process in self._processes.values()))
        for pid in await asyncio.to_thread(marked, self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _ends_with_us() -> list[str]:
    """A prefix by which the kernel ends a server should the harness be killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


async def _connects(port: int) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(HOST, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def free_ports(count: int, *, also: int = 0, udp: bool = False) -> list[int]:
    """Ports that are free now; with `also`, so are those that much above. Raises PeerFailed."""
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    held: list[socket.socket] = []
    ports: list[int] = []
    try:
        for _ in range(PORT_TRIES_MAX):
            first = _bind(0, kind)
            assert first is not None  # the kernel chose it
            held.append(first)
            port = int(first.getsockname()[1])
            if also:
                second = _bind(port + also, kind) if port + also < 1 << 16 else _bind_low(also, kind, held)
                if second is None:
                    continue
                held.append(second)
                port = int(second.getsockname()[1]) - also
            ports.append(port)
            if len(ports) == count:
                return ports
    finally:
        for each in held:
            each.close()
    raise PeerFailed(f"no {count} free ports found")


def _bind_low(also: int, kind: socket.SocketKind, held: list[socket.socket]) -> socket.socket | None:
    """The kernel's own range may end too near the top: a pair from below, its first port held too."""
    second = _bind(0, kind)
    assert second is not None
    first = _bind(int(second.getsockname()[1]) - also, kind)
    if first is None:
        second.close()
        return None
    held.append(first)
    return second


def _bind(port: int, kind: socket.SocketKind) -> socket.socket | None:
    each = socket.socket(type=kind)
    try:
        each.bind((HOST, port))
    except OSError:
        each.close()
        return None
    return each


def marked(mark: str) -> tuple[int, ...]:
    """The processes of a turn, by pid."""
    entry = f"{MARK}={mark}".encode()
    return tuple(
        int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and entry in _environment(path)
    )


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


@dataclass(frozen=True, slots=True)
class Cost:
    """What processes have used so far, and the memory that they hold."""

    cpu_s: float
    rss_bytes: int


def cost(pids: tuple[int, ...]) -> Cost:
    """Of these processes with all their descendants, except this one, which may be one of them."""
    own = os.getpid()
    children: dict[int, list[int]] = defaultdict(list)
    stats: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(entry)):
            stats[int(entry.name)] = fields
            children[int(fields[1])].append(int(entry.name))
    ticks = pages = 0
    todo, seen = [pid for pid in pids if pid in stats], {own}
    while todo:
        if (pid := todo.pop()) in seen:
            continue
        seen.add(pid)
        ticks += sum(int(field) for field in stats[pid][11:15])  # with children that have ended: redis forks to save
        pages += int(stats[pid][21])
        todo += children[pid]
    return Cost(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"))


def _stat(entry: Path) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything; none if the process is gone."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
