"""Runs a coroutine in a simulation: one seed, one schedule, one trace hash.

    async def main(sim: Simulation) -> None:
        host = sim.host("a")
        host.boot(node_main)
        await asyncio.sleep(3600)       # takes as long as the node's callbacks do
        host.kill()

    run = run_simulation(main, seed=7, limit_s=7200)
    assert run.hash == run_simulation(main, seed=7, limit_s=7200).hash

A seed replays exactly if the program draws randomness from `Simulation.stream` only, reads time from its host's clock
or the loop, and does not depend on the order of a set of strings. To be on the safe side `os.urandom` (hence `uuid4`,
`secrets`) and the module-level `random` are drawn from the seed while a simulation runs, and the name of the host and
the id of the process are fixed.
"""

from __future__ import annotations

import gc
import os
import random
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from agi.core.dht.testing.clock import SimClock
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.loop import STEPS_MAX, SimLoop, SimulationError
from agi.core.dht.testing.trace import Trace

T = TypeVar("T")
LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Run(Generic[T]):
    """What a simulation ended with.

    Attributes:
        value: what the main coroutine returned.
        hash: the trace's hash.
        time_s: virtual seconds that passed.
        steps: callbacks that ran.
    """

    value: T
    hash: str
    time_s: float
    steps: int


class Simulation:
    """What the main coroutine gets.

    Attributes:
        seed, loop, trace: of this run.
        hosts: every host by name, in the order of their making.
    """

    def __init__(self, seed: int, loop: SimLoop, trace: Trace) -> None:
        self.seed = seed
        self.loop = loop
        self.trace = trace
        self.hosts: dict[str, Host] = {}

    @property
    def now(self) -> float:
        """True virtual seconds since the start."""
        return self.loop.now

    def stream(self, name: str) -> random.Random:
        """A random source of its own that only the seed and this name decide, so that one part of a simulation drawing
        more does not change what another part draws."""
        return random.Random(f"{self.seed}/{name}")

    def host(self, name: str, *, skew_ms: int = 0, rate: float = 1.0, offset_s: float = 0.0) -> Host:
        """A new host, not running anything; the clock as in SimClock. Raises SimulationError for a known name."""
        if name in self.hosts:
            raise SimulationError(f"there is a host {name} already")
        host = Host(self.loop, name, SimClock(self.trace, skew_ms=skew_ms, rate=rate, offset_s=offset_s))
        self.hosts[name] = host
        return host


def run_simulation(
    main: Callable[[Simulation], Coroutine[Any, Any, T]],
    *,
    seed: int,
    limit_s: float = LIMIT_S,
    steps_max: int = STEPS_MAX,
    trace_path: Path | None = None,
) -> Run[T]:
    """Runs `main(simulation)` to its end; whatever else runs then is thrown away.

    Args:
        limit_s: virtual seconds it may take.
        steps_max: callbacks it may take.
        trace_path: write the trace as text to this file.

    Raises what `main` raises, Deadlock, LimitReached, and SimulationError for an exception in a callback, for one in a
    task that nobody asked for it, and for the end of a host's main coroutine by one. A note names the seed, the virtual
    time and the trace hash, and whatever else had gone wrong.
    """
    trace = Trace(trace_path)
    loop = SimLoop(random.Random(f"{seed}/loop"), trace, limit_s=limit_s, steps_max=steps_max)
    simulation = Simulation(seed, loop, trace)
    with _own_garbage(), _seeded_entropy(seed):
        try:
            value = loop.run_until_complete(main(simulation))
            gc.collect()  # exceptions that nobody retrieved are reported when their future goes
            failures = loop.failures()
            if failures:
                raise SimulationError(
                    f"{len(failures)} failures were seen by nobody, first {failures[0]!r}"
                ) from failures[0]
            return Run(value, trace.hash(), loop.now, loop.steps)
        except BaseException as error:
            error.add_note(f"simulation seed {seed}, at {loop.now:.6f} s, trace {trace.hash()}")
            for failure in loop.failures():
                error.add_note(f"also failed: {failure!r}, caused by {failure.__cause__!r}")
            raise
        finally:
            trace.close()
            loop.bury()


@contextmanager
def _own_garbage() -> Iterator[None]:
    """No cyclic collection at moments that depend on what the interpreter did before; what is there is left alone, so
    that collecting afterwards costs only what the simulation left."""
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextmanager
def _seeded_entropy(seed: int) -> Iterator[None]:
    source = random.Random(f"{seed}/entropy")
    urandom, private, state = os.urandom, random._urandom, random.getstate()  # type: ignore[attr-defined]  # as below
    os.urandom = random._urandom = source.randbytes  # type: ignore[attr-defined]  # `secrets` uses the latter
    name, number = socket.gethostname, os.getpid
    socket.gethostname, os.getpid = lambda: "host", lambda: 1  # holders of locks are named after both
    random.seed(f"{seed}/module")
    try:
        yield
    finally:
        socket.gethostname, os.getpid = name, number
        os.urandom, random._urandom = urandom, private  # type: ignore[attr-defined]  # as above
        random.setstate(state)
