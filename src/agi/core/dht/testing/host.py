"""A simulated host: a name, a clock, and at most one process at a time that can be booted, killed and paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

from agi.core.dht.testing.clock import SimClock
from agi.core.dht.testing.loop import SimLoop, SimulationError
from agi.core.dht.testing.process import Process, State, context_of, current_process

T = TypeVar("T")
Main = Callable[[], Coroutine[Any, Any, object]]
EndHook = Callable[[bool], None]


class Host:
    """Runs real node code: `boot(main)` starts a process, and all that `main` starts belongs to it.

    The process ends when `main` returns or is cancelled (a clean exit: its other tasks die with it), when `kill` is
    called, or when `main` raises, which fails the simulation. Catch in `main` what may end a node.

    Attributes:
        name: stable, for traces.
        clock: the host's clock; it keeps its skew through restarts.
        incarnation: how many processes it has had.
        on_end: called with `power_loss` when a process has ended, in no host's context: what the network and the disks
            do about it. They are called in order, after which nothing of the process runs any more.
    """

    __slots__ = ("_ended", "_loop", "_process", "_root", "clock", "incarnation", "name", "on_end")

    def __init__(self, loop: SimLoop, name: str, clock: SimClock) -> None:
        self._loop = loop
        self.name = name
        self.clock = clock
        self.incarnation = 0
        self.on_end: list[EndHook] = []
        self._process: Process | None = None
        self._root: asyncio.Task[object] | None = None
        self._ended: asyncio.Future[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether a process runs or is paused."""
        return self._process is not None

    @property
    def paused(self) -> bool:
        return self._process is not None and self._process.state is State.PAUSED

    def boot(self, main: Main) -> None:
        """Starts a process. Raises SimulationError if one is there."""
        if self._process is not None:
            raise SimulationError(f"{self.name} is running already")
        self.incarnation += 1
        process = self._loop.start(self.name, self.clock)
        self._process = process
        self._ended = self._loop.create_future()
        self._loop.trace.record("boot", f"{self.name} {self.incarnation}")
        name = f"{self.name}.{self.incarnation}"
        self._root = self._loop.create_task(main(), name=name, context=context_of(process))
        self._root.add_done_callback(lambda task: self._main_done(process, task), context=context_of(None))

    def spawn(self, coro: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """One more task of the running process, which the caller must hold. It never ends once the process is killed,
        so await it only with a deadline. Raises SimulationError without a process."""
        if self._process is None:
            coro.close()
            raise SimulationError(f"{self.name} is not running")
        return self._loop.create_task(coro, name=name, context=context_of(self._process))

    def run(self, callback: Callable[..., T], *args: object) -> T:
        """Calls a function as the running process would, at once (even a paused one). Raises SimulationError."""
        if self._process is None:
            raise SimulationError(f"{self.name} is not running")
        return context_of(self._process).run(callback, *args)

    def kill(self, *, power_loss: bool = True) -> None:
        """Ends the process as kill -9 does, and with `power_loss` as a power cut does: the disks then lose what was not
        synced. Called by the process's own code it takes effect at the end of the running callback, before any other.
        Without a process nothing happens."""
        process = self._process
        if process is None:
            return
        if current_process() is process:
            self._loop.run_next(lambda: self._end(process, "kill", power_loss), context_of(None))
        else:
            context_of(None).run(self._end, process, "kill", power_loss)

    def pause(self) -> None:
        """SIGSTOP: nothing of the process runs until `resume`; the world goes on. Without a process nothing happens."""
        if self._process is not None and self._process.state is State.RUNNING:
            self._loop.trace.record("pause", self.name)
            self._loop.pause(self._process)

    def resume(self) -> None:
        """SIGCONT. Without a paused process nothing happens."""
        if self._process is not None and self._process.state is State.PAUSED:
            self._loop.trace.record("resume", self.name)
            self._loop.resume(self._process)

    async def wait_end(self) -> None:
        """Returns when the present process has ended, at once if there is none. For the test's own code."""
        if self._ended is not None:
            await asyncio.shield(self._ended)

    def _main_done(self, process: Process, task: asyncio.Task[object]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            failure = SimulationError(f"the main coroutine of {self.name} raised {error!r}")
            failure.__cause__ = error
            self._loop.fail(failure)
        self._end(process, "exit", False)

    def _end(self, process: Process, how: str, power_loss: bool) -> None:
        if self._process is not process:
            return
        self._loop.trace.record(how, f"{self.name} {self.incarnation} power_loss={power_loss}")
        self._loop.end(process)
        self._process = None
        self._root = None
        for hook in self.on_end:
            context = copy_context()
            context.run(hook, power_loss)
        if self._ended is not None:
            self._ended.set_result(None)
            self._ended = None
