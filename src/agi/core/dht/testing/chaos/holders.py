"""The processes that hold locks (holder.py), as the run sees them: started, frozen, killed, started again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agi.core.dht.testing.chaos.nodes import guard
from agi.core.dht.testing.chaos.plan import LEASE_S

PROGRAM = ("-m", "agi.core.dht.testing.chaos.holder")
"""What the interpreter is told to run."""
STOP_TIMEOUT_S = 40.0
"""After the end of its stdin; it ends its turn first."""
LOOK_S = 0.02
LOG_TAIL_BYTES = 1500


@dataclass(eq=False)
class Holding:
    """A process.

    Attributes:
        name: in the history.
        holds: the lock that it holds, as far as it has told.
        frozen: it is stopped right now.
    """

    name: str
    process: asyncio.subprocess.Process
    log: Path
    holds: str | None = None
    frozen: bool = False
    listener: asyncio.Task[None] | None = None

    @property
    def runs(self) -> bool:
        return self.process.returncode is None


class Holders:
    """
    Args:
        folder: for histories and logs.
        nodes: tells addresses of nodes that are to run.
        locks: names.
        on_raised: told (process, what) when one ends, or does not, as it should not.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Callable[[], Sequence[str]],
        locks: Sequence[str],
        seed: int,
        on_raised: Callable[[str, str], None],
    ) -> None:
        self.all: list[Holding] = []
        self.histories: list[Path] = []
        self.begun = 0
        """Processes so far."""
        self._folder = folder
        self._nodes = nodes
        self._locks = list(locks)
        self._seed = seed
        self._on_raised = on_raised

    async def add(self) -> Holding:
        """One more, which takes up its work at once."""
        name = f"holder-{self.begun}"
        self.begun += 1
        history, path = self._folder / f"{name}.jsonl", self._folder / f"{name}.log"
        self.histories.append(history)
        words = [*guard(), sys.executable, *PROGRAM]
        words += ["--name", name, "--nodes", ",".join(self._nodes()), "--locks", ",".join(self._locks)]
        words += ["--lease", str(LEASE_S), "--seed", str(self._seed), "--history", str(history)]
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={key: value for key, value in os.environ.items() if not key.startswith("DHT_")},
                start_new_session=True,
            )
        holding = Holding(name, process, path)
        holding.listener = asyncio.create_task(_listen(holding))
        self.all.append(holding)
        return holding

    async def holding(self, timeout_s: float, lock: str | None = None) -> list[Holding]:
        """Those that hold a lock, or this one, right now, once there are any; none if there are none in time."""
        until = asyncio.get_running_loop().time() + timeout_s
        while True:
            found = [each for each in self.all if each.runs and not each.frozen and each.holds is not None]
            if lock is not None:
                found = [each for each in found if each.holds == lock]
            if found or asyncio.get_running_loop().time() > until:
                return found
            await asyncio.sleep(LOOK_S)

    def freeze(self, holding: Holding) -> None:
        holding.frozen = True
        self._signal(holding, signal.SIGSTOP)

    def thaw(self, holding: Holding) -> None:
        holding.frozen = False
        self._signal(holding, signal.SIGCONT)

    async def kill(self, holding: Holding) -> None:
        """SIGKILL. Its history stays as far as it had come."""
        self.all.remove(holding)
        self._signal(holding, signal.SIGKILL)
        await self._ended(holding)

    async def stop(self) -> None:
        """Each ends its turn, and itself. All frozen ones are thawed."""
        await asyncio.gather(*map(self._stop, self.all))
        self.all.clear()

    async def kill_all(self) -> None:
        for holding in list(self.all):
            await self.kill(holding)

    async def _stop(self, holding: Holding) -> None:
        self.thaw(holding)
        if holding.process.stdin is not None:
            holding.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                code = await self._ended(holding)
        except TimeoutError:
            self._on_raised(holding.name, f"did not end within {STOP_TIMEOUT_S:g} s")
            self._signal(holding, signal.SIGKILL)
            await self._ended(holding)
            return
        if code:
            text = holding.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
            self._on_raised(holding.name, f"exit code {code}: {text}")

    async def _ended(self, holding: Holding) -> int:
        if holding.listener is not None:
            await holding.listener
        return await holding.process.wait()

    def _signal(self, holding: Holding, number: signal.Signals) -> None:
        if holding.runs:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                holding.process.send_signal(number)


async def _listen(holding: Holding) -> None:
    assert holding.process.stdout is not None
    while line := await holding.process.stdout.readline():
        holding.holds = json.loads(line)["holds"]
