"""An asyncio event loop in virtual time, on which programs of many hosts run, die and stop without their cooperation.

Time stands still while anything is ready and then jumps to the next timer, so a simulated hour costs what its callbacks
cost. There are no sockets and no threads. Everything runs in one order that the program and its seed decide.

Who owns a callback. A context variable names the process whose code is running. asyncio copies the context into every
handle, task and future callback, so each inherits its owner from the code that made it, not from whoever happens to
trigger it: when host B sets the result of a future that host A awaits, A's wake-up is A's. Hence killing a process
needs nothing from its code: the loop drops every handle whose owner is dead and prunes its timers.

A killed process runs no line of code any more. Its tasks are not cancelled, for that would run their `finally` blocks;
they are kept, suspended for ever, until the simulation is over and nobody is left to see what the blocks do (`bury`).
What shared objects (network, disk) hold for it is their business: the host's kill hooks tell them (host.py).

Objects that serve several hosts must not let one host's context leak into another: whatever calls into a host (the
delivery of a message, the end of a connection) must run in the context in which that host registered its handler
(`contextvars.copy_context()` then, `call_later(..., context=...)` later), or through `Host.run`.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from typing import Any, NoReturn, TypeVar, TypeVarTuple

from agi.core.dht.testing.clock import SimClock
from agi.core.dht.testing.process import Handle, Process, State, Tasks, Timer, context_of, owner_var
from agi.core.dht.testing.trace import Trace

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
STEPS_MAX = 50_000_000
"""Callbacks of one simulation, at some 2 us each."""
STEPS_AT_ONE_TIME_MAX = 1_000_000
"""Callbacks without the clock moving; more is a loop that never waits."""
EXECUTOR_DELAY_S_MAX = 0.001
PENDING_SHOWN_MAX = 50
"""Tasks listed in a Deadlock or LimitReached."""
_CANCELLED_TIMERS_MIN = 200
_CLOSE_ATTEMPTS_MAX = 16


class SimulationError(Exception):
    """The simulation cannot go on, or something in it went wrong that nobody handled."""


class Deadlock(SimulationError):
    """Nothing is ready, no timer is set, and the main coroutine is not done."""


class LimitReached(SimulationError):
    """Virtual time or the number of callbacks passed its limit."""


class SimLoop(asyncio.BaseEventLoop):
    """The loop. Use `run_simulation` (simulation.py), which also sees to what is left at the end.

    Args:
        rng: draws the virtual time that `run_in_executor` takes.
        trace: told of every jump of the clock; it also holds the time.
        limit_s: virtual seconds after which the simulation fails.
        steps_max: callbacks after which it fails.
    """

    def __init__(self, rng: random.Random, trace: Trace, *, limit_s: float, steps_max: int = STEPS_MAX) -> None:
        super().__init__()
        self.trace = trace
        self.now = 0.0
        """Virtual seconds since the start: the true time, whatever the hosts' clocks show."""
        self.steps = 0
        """Callbacks run so far."""
        self.tasks = Tasks()
        """Tasks that belong to no host."""
        self.processes: list[Process] = []
        """Every process that was started, the dead included."""
        self._rng = rng
        self._limit_s = limit_s
        self._steps_max = steps_max
        self._steps_before_jump = 0
        self._thread = threading.get_ident()
        self._soon: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_count = 0
        self._timers_cancelled = 0
        self._task_count = 0
        self._failures: list[BaseException] = []
        self._over = False
        self._late: list[asyncio.Task[Any]] = []
        self._world = context_of(None)

    # Scheduling.

    def time(self) -> float:
        """Seconds as the running host counts them; the true virtual time outside of hosts."""
        owner = owner_var.get()
        return self.now if owner is None else owner.clock.monotonic()

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None) -> Any:
        if context is None:
            handle = Handle(callback, args, copy_context(), owner_var.get())
        else:
            handle = Handle(callback, args, context, context.get(owner_var))
        if not self._over:
            self._soon.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Any:
        """`when` is by the clock of the caller, as `time()` showed it; the owner is the context's."""
        caller = owner_var.get()
        if context is None:
            timer = Timer(callback, args, copy_context(), caller, when, self)
        else:
            timer = Timer(callback, args, context, context.get(owner_var), when, self)
        if self._over:
            return timer
        self._timer_count += 1
        heappush(self._timers, (when if caller is None else caller.clock.true_time(when), self._timer_count, timer))
        return timer

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Runs the action at this true time, in no host's context; actions of equal times in the order of calls."""
        self._timer_count += 1
        heappush(self._timers, (when, self._timer_count, Timer(action, (), self._world, None, when, self)))

    def call_into(self, process: Process, context: Context, callback: Callable[..., object], *args: object) -> None:
        """Calls a function of a process from outside, in a context of `context_of(process)` that is not entered yet:
        now if it runs, at its resume if it is paused, never if it is dead. An exception fails the simulation."""
        if process.state:
            handle = Handle(callback, args, context, process)
            (process.parked if process.state is State.PAUSED else process.grave).append(handle)
            return
        try:
            context.run(callback, *args)
        except Exception as error:  # noqa: BLE001  # ends the simulation
            self.fail(error)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        """As asyncio's, with names that do not depend on what else ran in this interpreter."""
        owner = owner_var.get() if context is None else context.get(owner_var)
        self._task_count += 1
        task = asyncio.Task(coro, loop=self, name=str(name or f"task-{self._task_count}"), context=context)
        (self if owner is None else owner).tasks.add(task)
        if self._over:
            self._late.append(task)
        return task

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Any:
        """Only from the loop's own thread: threads have no place in a simulation. Raises SimulationError."""
        if threading.get_ident() != self._thread:
            raise SimulationError("a simulated program may not use threads: call_soon_threadsafe from another thread")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: object, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Runs `func` in the loop itself after a drawn delay of at most EXECUTOR_DELAY_S_MAX; never in a thread."""
        future: asyncio.Future[T] = self.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001  # travels to whoever awaits it, as an executor's does
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self._rng.uniform(0.0, EXECUTOR_DELAY_S_MAX), run)
        return future

    # Running.

    def _run_once(self) -> None:
        """One turn: jump if nothing is ready, then run what is ready now (asyncio calls this until it is stopped)."""
        soon, timers = self._soon, self._timers
        if not soon:
            while timers and timers[0][2]._cancelled:
                heappop(timers)[2]._queued = False
                self._timers_cancelled -= 1
            if not timers:
                self._raise_deadlock()
            if timers[0][0] > self.now:
                self._jump(timers[0][0])
        now = self.now
        while timers and timers[0][0] <= now:
            timer = heappop(timers)[2]
            timer._queued = False
            if timer._cancelled:
                self._timers_cancelled -= 1
            else:
                soon.append(timer)
        count = len(soon)
        self.steps += count
        if self.steps - self._steps_before_jump > STEPS_AT_ONE_TIME_MAX or self.steps > self._steps_max:
            self._raise_steps()
        popleft = soon.popleft
        for _ in range(count):
            handle = popleft()
            if handle._cancelled:
                continue
            owner = handle._owner
            if owner is not None and owner.state:
                (owner.parked if owner.state is State.PAUSED else owner.grave).append(handle)
                continue
            try:
                handle._context.run(handle._callback, *handle._args)  # type: ignore[arg-type]  # set unless cancelled
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001  # raised again as the simulation's failure
                self._raise_from_callback(handle, error)
        if self._failures:
            failure = self._failures.pop(0)
            raise SimulationError(f"at {self.now:.6f} s: {failure}") from failure

    def _jump(self, when: float) -> None:
        if when > self._limit_s:
            raise LimitReached(f"the main coroutine is not done after {self._limit_s} s; {self._pending()}")
        self.now = when
        self._steps_before_jump = self.steps
        self.trace.advance(when, self.steps)

    def _timer_cancelled(self) -> None:
        self._timers_cancelled += 1
        if self._timers_cancelled > _CANCELLED_TIMERS_MIN and self._timers_cancelled * 2 > len(self._timers):
            self._drop_timers(lambda timer: timer._cancelled)
            self._timers_cancelled = 0

    def _drop_timers(self, unwanted: Callable[[Timer], bool]) -> list[Timer]:
        """In place, for `_run_once` holds the list."""
        dropped = [entry[2] for entry in self._timers if unwanted(entry[2])]
        self._timers[:] = [entry for entry in self._timers if not unwanted(entry[2])]
        heapify(self._timers)
        for timer in dropped:
            timer._queued = False
        return dropped

    # Failing.

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Whatever asyncio would log (an exception nobody retrieved, a task destroyed while pending) ends the run."""
        if not self._over:
            what = context.get("task") or context.get("future")
            name = what.get_name() if isinstance(what, asyncio.Task) else type(what).__name__
            failure = SimulationError(f"{context['message']} ({name})")
            failure.__cause__ = context.get("exception")
            self._failures.append(failure)

    def failures(self) -> list[BaseException]:
        """What went wrong unseen so far: reports to the exception handler, and failed tasks that nobody has asked."""
        living = [process.tasks for process in self.processes if process.state is not State.DEAD]
        tasks = [task for owned in (self.tasks, *living) for task in owned.failed()]
        return self._failures + [error for task in tasks if (error := task.exception()) is not None]

    def fail(self, error: BaseException) -> None:
        """Ends the simulation with this error after the present turn."""
        self._failures.append(error)

    def _raise_from_callback(self, handle: Handle, error: BaseException) -> NoReturn:
        name = getattr(handle._callback, "__qualname__", type(handle._callback).__name__)
        host = "" if handle._owner is None else f" of {handle._owner.name}"
        raise SimulationError(f"at {self.now:.6f} s: callback {name}{host} raised {error!r}") from error

    def _raise_deadlock(self) -> NoReturn:
        raise Deadlock(f"at {self.now:.6f} s nothing is ready and no timer is set; {self._pending()}")

    def _raise_steps(self) -> NoReturn:
        handle = self._soon[0]
        name = getattr(handle._callback, "__qualname__", type(handle._callback).__name__)
        spent = f"{self.steps} callbacks, {self.steps - self._steps_before_jump} of them at {self.now:.6f} s"
        raise LimitReached(f"{spent}, next {name}; {self._pending()}")

    def _pending(self) -> str:
        lines = [f"{task.get_name()}: {_where(task)}" for task in self.tasks.pending()]
        for process in self.processes:
            if process.state is not State.DEAD:
                state = process.state.name.lower()
                lines += [f"{task.get_name()} ({state}): {_where(task)}" for task in process.tasks.pending()]
        more = [f"... and {len(lines) - PENDING_SHOWN_MAX} more"] if len(lines) > PENDING_SHOWN_MAX else []
        return f"{len(lines)} tasks pending" + "".join(f"\n  {line}" for line in lines[:PENDING_SHOWN_MAX] + more)

    # Processes.

    def start(self, name: str, clock: SimClock) -> Process:
        """A new process, which has no code yet: give it some by `create_task(..., context=context_of(process))`."""
        process = Process(name, clock)
        self.processes.append(process)
        return process

    def end(self, process: Process) -> None:
        """kill -9: from here on nothing of the process runs; see the head of this module."""
        process.state = State.DEAD
        for task in process.tasks.pending():
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant to vanish
            process.grave.append(task)
        process.grave += process.parked
        process.parked = []
        timers = self._drop_timers(lambda timer: timer._owner is process)
        self._timers_cancelled -= sum(timer._cancelled for timer in timers)
        process.grave += timers

    def pause(self, process: Process) -> None:
        """SIGSTOP: what becomes ready from now on waits."""
        process.state = State.PAUSED

    def resume(self, process: Process) -> None:
        """SIGCONT: all that waited is ready now, in order."""
        process.state = State.RUNNING
        self._soon.extend(process.parked)
        process.parked = []

    def run_next(self, callback: Callable[[], object], context: Context) -> None:
        """Runs before everything else that is ready, right after the present callback."""
        self._soon.appendleft(Handle(callback, (), context, None))

    # The end.

    def bury(self) -> None:
        """Disposes of all that is suspended and closes the loop. Cleanup code runs now: whatever it schedules is
        forgotten, and whatever it raises is of no interest."""
        self._over = True
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        asyncio._set_running_loop(self)  # cleanup code may ask for it
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # coroutines that cleanup code makes and never awaits
                for task in tasks:
                    _dispose(task)
                for task in self._late:
                    _dispose(task)
                for process in self.processes:
                    process.grave.clear()
                    process.parked.clear()
                self._soon.clear()
                self._timers.clear()
        finally:
            asyncio._set_running_loop(None)
            self.close()


_immortal: list[object] = []


def _dispose(task: asyncio.Task[Any]) -> None:
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant to vanish
    coro = task.get_coro()
    for _ in range(_CLOSE_ATTEMPTS_MAX if inspect.iscoroutine(coro) else 0):
        try:
            coro.close()
        except RuntimeError:  # it awaits again in its cleanup: close it there
            continue
        except BaseException:  # noqa: BLE001  # the last words of a dead program
            return
        return
    _immortal.append(coro)  # it refuses to end, and would complain when it is collected


def _where(task: asyncio.Task[Any]) -> str:
    coro = task.get_coro()
    while inspect.iscoroutine(inner := getattr(coro, "cr_await", None)):
        coro = inner
    frame = getattr(coro, "cr_frame", None)
    return "?" if frame is None else f"{frame.f_code.co_qualname}, {frame.f_code.co_filename}:{frame.f_lineno}"


def _refuse(name: str) -> Callable[..., object]:
    def refuse(self: SimLoop, *args: object, **kwargs: object) -> NoReturn:
        raise SimulationError(f"{name} has no place in a simulation: use the simulated network, disk and clock")

    refuse.__name__ = name
    return refuse


for _name in (
    "add_reader",
    "add_signal_handler",
    "add_writer",
    "connect_accepted_socket",
    "connect_read_pipe",
    "connect_write_pipe",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "create_unix_connection",
    "create_unix_server",
    "getaddrinfo",
    "getnameinfo",
    "sendfile",
    "sock_accept",
    "sock_connect",
    "sock_recv",
    "sock_sendall",
    "start_tls",
    "subprocess_exec",
    "subprocess_shell",
):
    setattr(SimLoop, _name, _refuse(_name))
