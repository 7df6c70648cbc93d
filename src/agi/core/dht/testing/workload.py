"""Clients of a simulated cluster: real `DHTClient`s whose every call is recorded.

A client host runs a few workers, each with one call under way at a time. Values are unique in a history, so that what a
read returns names the write that it saw.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import BatchError, ClockSkew, DHTError, InvalidRequest, Unavailable
from agi.core.dht.protocol.timers import TICK_S
from agi.core.dht.testing.checks import Action, Call, History, Outcome
from agi.core.dht.testing.conditional import ConditionalWork
from agi.core.dht.testing.history import History as Decisions
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.simulation import Simulation
from agi.core.dht.types import Consistency

DEADLINE_SLACK_S = 2 * TICK_S
"""A deadline falls into a slot of the timer wheel (one tick), which is looked at every tick (another)."""
CONNECT_TIMEOUT_S = 3.0
WIDE_MIN = 8
"""Keys of a batch that counts as wide."""
PREFIX = "k"
TIMED, TTL_S = b"t", 30 * 86_400.0
"""Values that begin so were put with this TTL: no clock comes that far, and no record of them may lose it."""


class Operation(enum.StrEnum):
    """What a worker may do."""

    GET = "get"
    GET_ENTRY = "get_entry"
    GET_ONE = "get_one"
    """A read at consistency ONE, of which only the origin is judged."""
    PUT = "put"
    DELETE = "delete"
    GET_MANY = "get_many"
    PUT_MANY = "put_many"
    DELETE_MANY = "delete_many"
    SCAN = "scan"


@dataclass(frozen=True, slots=True)
class Locking:
    """How clients compete for locks.

    Attributes:
        contenders, tasks: hosts, and tasks of each that compete.
        locks: how many there are; each protects one key.
        lease_s: of every acquisition.
        wait_s: how long a lock is waited for, at most.
        hold_s: mean time that a holder takes before each of its writes.
        think_s: mean time between two acquisitions of a task.
        timeout_s: deadline of reads and writes.
    """

    contenders: int
    tasks: int
    locks: int
    lease_s: float
    wait_s: float
    hold_s: float
    think_s: float
    timeout_s: float

    @property
    def hosts(self) -> list[str]:
        return [f"l{number}" for number in range(1, self.contenders + 1)]

    @property
    def names(self) -> list[str]:
        return [f"lock:{number}" for number in range(self.locks)]

    @staticmethod
    def resource_of(name: str) -> str:
        """The key that a lock protects."""
        return f"under {name}"


@dataclass(frozen=True, slots=True)
class Workload:
    """What the clients of a cluster do.

    Attributes:
        clients, workers: client hosts, and calls that each has under way at a time.
        keys: how many keys there are; few of them make calls meet.
        weights: how often each operation is drawn, relative to the others.
        think_s: mean time between two calls of a worker.
        timeout_s: deadline of each call.
        batch_max: keys of a batch, at most.
        page_size: of scans.
        all_share: share of reads and writes at consistency ALL.
        registers, counters, sets: keys under consensus.
        deciders: workers of each client for those.
        fresh_s: how long registers are used before new ones take their place; 0 for ever.
        locking: what further clients do, if there are any.
    """

    clients: int
    workers: int
    keys: int
    weights: Mapping[Operation, float]
    think_s: float
    timeout_s: float
    batch_max: int
    page_size: int
    all_share: float
    registers: int = 0
    counters: int = 0
    deciders: int = 1
    fresh_s: float = 0.0
    sets: int = 0
    locking: Locking | None = None

    @property
    def names(self) -> list[str]:
        return [f"{PREFIX}{number:02d}" for number in range(self.keys)]

    @property
    def register_names(self) -> list[str]:
        """Without what `fresh_s` adds to them."""
        return [f"register:{number}" for number in range(self.registers)]

    @property
    def counter_names(self) -> list[str]:
        return [f"counter:{number}" for number in range(self.counters)]

    @property
    def set_names(self) -> list[str]:
        return [f"set:{number}" for number in range(self.sets)]

    @property
    def decides(self) -> bool:
        """Whether there are keys under consensus for every client."""
        return bool(self.registers or self.counters or self.sets)


class Recorder:
    """The one place that writes a history: `begin` before a call, `end` after it."""

    def __init__(self, sim: Simulation, history: History) -> None:
        self._sim = sim
        self.history = history
        self.wide = 0
        """Wide batches that have ended well."""

    def begin(
        self, client: str, action: Action, key: str, value: bytes | None, level: Consistency, limit_s: float
    ) -> Call:
        number = len(self.history.calls)
        call = Call(number, client, action, key, value, level, self._sim.now, limit_s)
        self.history.calls.append(call)
        self._sim.trace.record("call", f"{number} {client} {action} {key} {level.name}")
        return call

    def ok(self, call: Call, value: bytes | None, version: int = 0) -> None:
        if call.action is Action.READ:
            call.value = value
        call.version = version
        self._end(call, Outcome.OK)

    def failed(self, call: Call, error: DHTError) -> None:
        self._end(
            call, Outcome.UNKNOWN if _may_be_written(error) and call.action is not Action.READ else Outcome.FAILED
        )

    def _end(self, call: Call, outcome: Outcome) -> None:
        call.outcome = outcome
        call.returned = self._sim.now
        self._sim.trace.record("return", f"{call.number} {outcome} {call.version}")


def _may_be_written(error: DHTError) -> bool:
    """Whether the write may have happened, as the caller is told: only these errors promise the contrary (D3)."""
    return not isinstance(error, Unavailable | InvalidRequest | ClockSkew)


async def connected(
    make: Callable[[], DHTClient], addresses: Sequence[str], stopped: Callable[[], bool]
) -> DHTClient | None:
    """A connected client, as soon as a cluster answers; None if `stopped` before."""
    while not stopped():
        client = make()
        try:
            await client.connect(addresses, timeout=CONNECT_TIMEOUT_S)
        except DHTError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(0.1)
        else:
            return client
    return None


class Client:
    """One client host. `main` is its program; it ends after `stop` was set and every call has returned.

    Args:
        value_of: makes a value that nobody has written before.
    """

    def __init__(
        self,
        host: Host,
        make: Callable[[], DHTClient],
        addresses: Sequence[str],
        workload: Workload,
        recorder: Recorder,
        rng: random.Random,
        value_of: Callable[[], bytes],
        decisions: Decisions,
        decider: random.Random,
    ) -> None:
        self.host = host
        self.stop = False
        self._make = make
        self._addresses = list(addresses)
        self._workload = workload
        self._recorder = recorder
        self._rng = rng
        self._value_of = value_of
        self.decisions = ConditionalWork(
            host.name,
            decisions,
            workload.register_names,
            workload.counter_names,
            decider,
            value_of,
            workload.fresh_s,
            lambda: asyncio.get_running_loop().time(),
            workload.set_names,
        )

    async def main(self) -> None:
        client = await self.connected()
        if client is None:
            return
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workload.workers):
                group.create_task(self._work(client))
            if self._workload.decides:
                for _ in range(self._workload.deciders):
                    group.create_task(self._decide(client))
        await client.close()

    async def connected(self) -> DHTClient | None:
        """A connected client, as soon as a cluster answers; None if told to stop before."""
        return await connected(self._make, self._addresses, lambda: self.stop)

    async def _work(self, client: DHTClient) -> None:
        rng, workload = self._rng, self._workload
        names, weights = list(workload.weights), list(workload.weights.values())
        while True:
            await asyncio.sleep(rng.expovariate(1.0 / workload.think_s))
            if self.stop:
                return
            level = Consistency.ALL if rng.uniform(0.0, 1.0) < workload.all_share else Consistency.QUORUM
            await self.perform(client, rng.choices(names, weights)[0], level)

    async def _decide(self, client: DHTClient) -> None:
        while True:
            await asyncio.sleep(self.decisions.rng.expovariate(1.0 / self._workload.think_s))
            if self.stop:
                return
            await self.decisions.perform(client, self._workload.timeout_s)

    async def perform(self, client: DHTClient, operation: Operation, level: Consistency) -> None:
        """One call with drawn keys, recorded."""
        rng, workload = self._rng, self._workload
        key = rng.choice(workload.names)
        timeout = workload.timeout_s
        match operation:
            case Operation.GET:
                await self.get(client, key, level, timeout)
            case Operation.GET_ENTRY:
                await self.get_entry(client, key, level, timeout)
            case Operation.GET_ONE:
                await self.get(client, key, Consistency.ONE, timeout)
            case Operation.PUT:
                timed = rng.getrandbits(1) == 0
                call = self._begin(Action.PUT, key, (TIMED if timed else b"") + self._value_of(), level, timeout)
                ttl_s = TTL_S if timed else None
                try:
                    version = await client.put(
                        key, call.value or b"", ttl_seconds=ttl_s, consistency=level, timeout=timeout
                    )
                except DHTError as error:
                    self._recorder.failed(call, error)
                else:
                    self._recorder.ok(call, call.value, version)
            case Operation.DELETE:
                call = self._begin(Action.DELETE, key, None, level, timeout)
                try:
                    await client.delete(key, consistency=level, timeout=timeout)
                except DHTError as error:
                    self._recorder.failed(call, error)
                else:
                    self._recorder.ok(call, None)
            case Operation.SCAN:
                await self.scan(client, level, timeout)
            case _:
                await self._batch(client, operation, level, timeout)

    async def get(self, client: DHTClient, key: str, level: Consistency, timeout: float) -> Call:
        call = self._begin(Action.READ, key, None, level, timeout)
        try:
            value = await client.get(key, consistency=level, timeout=timeout)
        except DHTError as error:
            self._recorder.failed(call, error)
        else:
            self._recorder.ok(call, value)
        return call

    async def get_entry(self, client: DHTClient, key: str, level: Consistency, timeout: float) -> Call:
        call = self._begin(Action.READ, key, None, level, timeout)
        try:
            entry = await client.get_entry(key, consistency=level, timeout=timeout)
        except DHTError as error:
            self._recorder.failed(call, error)
        else:
            self._recorder.ok(call, *((None, 0) if entry is None else (entry.value, entry.version)))
        return call

    async def _batch(self, client: DHTClient, operation: Operation, level: Consistency, timeout: float) -> None:
        rng, workload = self._rng, self._workload
        keys = rng.sample(workload.names, rng.randint(1, min(workload.batch_max, workload.keys)))
        results: Mapping[str, object]
        if operation is Operation.PUT_MANY:
            values = {key: self._value_of() for key in keys}
            calls = [self._begin(Action.PUT, key, values[key], level, timeout) for key in keys]
        else:
            action = Action.READ if operation is Operation.GET_MANY else Action.DELETE
            calls = [self._begin(action, key, None, level, timeout) for key in keys]
        try:
            if operation is Operation.PUT_MANY:
                results = await client.put_many(values, consistency=level, timeout=timeout)
            elif operation is Operation.GET_MANY:
                results = await client.get_many(keys, consistency=level, timeout=timeout)
            else:
                results = await client.delete_many(keys, consistency=level, timeout=timeout)
        except BatchError as error:
            self._partly(calls, error.failed)
            return
        self._recorder.wide += len(keys) >= WIDE_MIN
        for call in calls:
            result = results[call.key]
            if call.action is Action.READ:
                self._recorder.ok(call, result if isinstance(result, bytes) else None)
            else:
                version = result if call.action is Action.PUT and isinstance(result, int) else 0
                self._recorder.ok(call, call.value, version)

    def _partly(self, calls: Iterable[Call], failed: Mapping[str, DHTError]) -> None:
        """Some keys of a batch failed. Of the others the client tells no results: only that they took effect."""
        for call in calls:
            error = failed.get(call.key)
            if error is not None:
                self._recorder.failed(call, error)
            elif call.action is Action.READ:
                self._recorder.failed(call, DHTError("another key of its batch failed"))
            else:
                self._recorder.ok(call, call.value)

    async def scan(self, client: DHTClient, level: Consistency, timeout: float) -> list[tuple[str, bytes]] | None:
        """A scan of all keys, recorded as a read of each. None if it failed."""
        workload = self._workload
        pages = 1 + workload.keys // workload.page_size
        calls = [self._begin(Action.READ, key, None, level, timeout * pages) for key in workload.names]
        found: list[tuple[str, bytes]] = []
        try:
            async for pair in client.iterate(PREFIX, page_size=workload.page_size, consistency=level, timeout=timeout):
                found.append(pair)
        except DHTError as error:
            for call in calls:
                self._recorder.failed(call, error)
            return None
        values = dict(found)
        for call in calls:
            self._recorder.ok(call, values.get(call.key))
        return found

    def _begin(self, action: Action, key: str, value: bytes | None, level: Consistency, timeout: float) -> Call:
        return self._recorder.begin(self.host.name, action, key, value, level, timeout + DEADLINE_SLACK_S)


def fresh_values() -> Callable[[], bytes]:
    """A source of values that are all different, of sizes that differ too."""
    count = 0

    def make() -> bytes:
        nonlocal count
        count += 1
        return f"v{count}".encode() + b"." * (count % 5 * 7)

    return make


def unfinished(calls: Iterable[Call]) -> list[Call]:
    """Calls that have not returned."""
    return [call for call in calls if call.outcome is Outcome.PENDING]
