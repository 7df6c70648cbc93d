"""Who owns what on the simulated loop: processes, and the handles and tasks that belong to them (loop.py explains)."""

from __future__ import annotations

import asyncio
import enum
import weakref
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any

from agi.core.dht.testing.clock import SimClock

if TYPE_CHECKING:
    from agi.core.dht.testing.loop import SimLoop


class State(enum.IntEnum):
    RUNNING = 0
    PAUSED = 1
    DEAD = 2


class Process:
    """One run of a program on a host, from boot to exit or kill. Made by `SimLoop.start`."""

    __slots__ = ("clock", "grave", "name", "parked", "state", "tasks")

    def __init__(self, name: str, clock: SimClock) -> None:
        self.name = name
        self.clock = clock
        self.state = State.RUNNING
        self.tasks = Tasks()
        self.parked: list[Handle] = []
        """What became ready while it was paused, in order."""
        self.grave: list[object] = []
        """What a dead process left, kept so that no finalizer of it runs."""


owner_var: ContextVar[Process | None] = ContextVar("simulated process", default=None)


def current_process() -> Process | None:
    """The process whose code is running; None in the test's own code."""
    return owner_var.get()


def context_of(process: Process | None) -> Context:
    """A new context whose code belongs to this process; to no host for None."""
    context = copy_context()
    context.run(owner_var.set, process)
    return context


class Tasks:
    """Weak references to an owner's tasks, oldest first: a task that nobody holds must die here as it does for real."""

    __slots__ = ("_limit", "_refs")

    def __init__(self) -> None:
        self._refs: list[weakref.ref[asyncio.Task[Any]]] = []
        self._limit = 64

    def add(self, task: asyncio.Task[Any]) -> None:
        refs = self._refs
        refs.append(weakref.ref(task))
        if len(refs) > self._limit:
            self._refs = [ref for ref in refs if (held := ref()) is not None and (not held.done() or _unseen(held))]
            self._limit = 64 + 2 * len(self._refs)

    def pending(self) -> list[asyncio.Task[Any]]:
        return [task for ref in self._refs if (task := ref()) is not None and not task.done()]

    def failed(self) -> list[asyncio.Task[Any]]:
        """Tasks that ended in an exception that nobody has looked at."""
        return [task for ref in self._refs if (task := ref()) is not None and task.done() and _unseen(task)]


def _unseen(task: asyncio.Task[Any]) -> bool:
    return bool(task._log_traceback)  # asyncio's own mark for "never retrieved"


class Handle:
    """What asyncio.Handle is, without what a simulation has no use for."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context", "_owner")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, owner: Process | None
    ) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._context = context
        self._owner = owner
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = None
        self._args = ()

    def cancelled(self) -> bool:
        return self._cancelled


class Timer(Handle):
    __slots__ = ("_loop", "_queued", "_when")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
        owner: Process | None,
        when: float,
        loop: SimLoop,
    ) -> None:
        self._callback = callback
        self._args = args
        self._context = context
        self._owner = owner
        self._cancelled = False
        self._when = when
        self._loop = loop
        self._queued = True

    def cancel(self) -> None:
        if not self._cancelled:
            super().cancel()
            if self._queued:
                self._loop._timer_cancelled()

    def when(self) -> float:
        return self._when
