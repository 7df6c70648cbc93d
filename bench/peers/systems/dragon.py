"""DragonHPC's distributed dictionary: three managers in shared memory, no replicas.

Its clients have to be processes of Dragon's own runtime. So the load runs in a process that Dragon's launcher starts
(dragon_load.py), with the same code, and tells its samples over a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from bench.peers.base import Facts, PeerFailed, Running
from bench.peers.loads import BATCH_KEYS, CELL_GRACE_S, FILL_TIMEOUT_S, Cell, Plan, Sample
from bench.peers.processes import HOST, ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S, Servers

LAUNCHER = "dragon"
SEGMENTS, SEGMENT = Path("/dev/shm"), "DD*"
CALLERS_MAX = 32
"""Each attaches by itself, which takes it a good part of a second."""
LINE_BYTES_MAX = 1 << 20


class Order(msgspec.Struct, frozen=True):
    """What the load process is told: without a cell, to store the keys."""

    plan: Plan
    cell: Cell | None = None
    seed: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What it says: a sample, an error, or neither when the keys are stored."""

    sample: Sample | None = None
    error: str = ""


@dataclass(frozen=True)
class Dragon:
    """A dictionary in Dragon's runtime on this machine."""

    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue(1)
        listener = await asyncio.start_server(
            lambda reader, writer: connected.put_nowait((reader, writer)), HOST, 0, limit=LINE_BYTES_MAX
        )
        port = listener.sockets[0].getsockname()[1]
        with _shared_memory():
            async with listener, Servers(folder) as servers:
                # The launcher looks for its parts, and for `python3`, along PATH.
                path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
                load = Path(__file__).parents[1] / "dragon_load.py"
                # As the leader of a session the launcher waits for ever.
                process = await servers.spawn(
                    "dragon", launcher(), "-s", load, port, env={"PYTHONPATH": str(ROOT), "PATH": path}, session=False
                )
                try:
                    async with asyncio.timeout(START_TIMEOUT_S):
                        reader, writer = await connected.get()
                except TimeoutError:
                    raise PeerFailed(f"dragon did not start: {servers.tail('dragon')}") from None

                async def order(what: Order, timeout_s: float) -> Sample | None:
                    writer.write(msgspec.json.encode(what) + b"\n")
                    try:
                        async with asyncio.timeout(timeout_s):
                            line = await reader.readline()
                    except TimeoutError:
                        raise PeerFailed(f"no answer within {timeout_s:g} s") from None
                    if not line:
                        raise PeerFailed(f"dragon ended: {servers.tail('dragon')}")
                    answer = msgspec.json.decode(line, type=Answer)
                    if answer.error:
                        raise PeerFailed(answer.error)
                    return answer.sample

                async def fill(plan: Plan) -> None:
                    await order(Order(plan), FILL_TIMEOUT_S)

                async def measure(plan: Plan, cell: Cell, seed: int) -> Sample:
                    sample = await order(Order(plan, cell, seed), plan.seconds + 2 * CELL_GRACE_S)
                    assert sample is not None  # an order with a cell is answered by one, or by an error
                    return sample

                try:
                    yield Running(None, servers.pids, fill, measure)
                finally:
                    writer.close()  # upon which it destroys the dictionary and ends
                    await _ended(process)


@contextlib.contextmanager
def _shared_memory() -> Iterator[None]:
    """Removes the segments that a runtime leaves when it is killed."""
    before = set(SEGMENTS.glob(SEGMENT))
    try:
        yield
    finally:
        for path in set(SEGMENTS.glob(SEGMENT)) - before:
            path.unlink(missing_ok=True)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Gives it the time to take its runtime down; what does not end is ended as the other servers are."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()


def launcher() -> str:
    """Beside this interpreter, where its package puts it."""
    return shutil.which(LAUNCHER, path=str(Path(sys.executable).parent)) or LAUNCHER


PEERS = (
    Dragon(
        Facts(
            name="dragon",
            title="DragonHPC DDict",
            guarantee="one copy, by hash on one of 3 managers",
            durability="shared memory of one machine",
            against="ours-memory",
            modules=("dragon",),
            distributions=("dragonhpc",),
            replicated=False,
            threads=True,
            callers_max=CALLERS_MAX,
            keys_max=BATCH_KEYS,
            lacks={
                "batch_get": "one key a call",
                "cas": "it has none",
                "lock": "it has none",
                "scan": "its keys have no order, all of them or none",
            },
            note="the load runs in its runtime, whose processes poll: made for many cores; 1,000 keys of each size",
        )
    ),
)
