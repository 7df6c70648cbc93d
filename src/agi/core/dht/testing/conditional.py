"""Work on keys under consensus in a simulated cluster: every call is recorded for the linearizability checker.

Registers take compare-and-set, conditional and plain writes, deletes and reads; counters take additions and reads. A
plain write of a key that may not be under consensus yet can take effect twice (V2): its history has a second one of
unknown outcome. Where keys are `fresh`, new ones come into being all the time, while others still use the old.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from enum import StrEnum

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ClockSkew, DHTError, InvalidRequest, Unavailable, VersionConflict
from agi.core.dht.testing.checks import Finding
from agi.core.dht.testing.history import Function, Handle, History
from agi.core.dht.testing.linearizability import Verdict, check
from agi.core.dht.types import Consistency

CHECK_LIMIT = 200_000
"""Configurations that the checker may look at for one key."""


class _Do(StrEnum):
    CAS = "cas"
    CREATE = "create"
    READ = "read"
    READ_LINEARIZABLE = "read linearizable"
    WRITE = "write"
    PLAIN_WRITE = "plain write"
    DELETE = "delete"
    VERSIONED = "versioned"


_WEIGHTS = {
    _Do.CAS: 5.0,
    _Do.CREATE: 1.0,
    _Do.READ: 2.0,
    _Do.READ_LINEARIZABLE: 1.0,
    _Do.WRITE: 1.0,
    _Do.PLAIN_WRITE: 1.5,
    _Do.DELETE: 0.7,
    _Do.VERSIONED: 2.0,
}


class ConditionalWork:
    """What one worker does to registers and counters.

    Args:
        value_of: makes a value that nobody has written before.
        fresh_s: how long a register is used before the next of its name; 0 for ever.
    """

    def __init__(
        self,
        process: str,
        history: History,
        registers: Sequence[str],
        counters: Sequence[str],
        rng: random.Random,
        value_of: Callable[[], bytes],
        fresh_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._process = process
        self._history = history
        self._registers = list(registers)
        self._counters = list(counters)
        self.rng = rng
        self._value_of = value_of
        self._fresh_s = fresh_s
        self._now_s = now_s
        self._seen: dict[str, bytes | None] = {}
        self._established: set[str] = set()
        self._calls = 0

    async def perform(self, client: DHTClient, timeout: float) -> None:
        """One call, recorded."""
        key = self.rng.choice([*self._registers, *self._counters])
        if self._fresh_s and key not in self._counters:
            key = f"{key}.{int(self._now_s() / self._fresh_s)}"
        if key in self._counters:
            await self._count(client, key, timeout)
            return
        what = self.rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        twice = what in (_Do.PLAIN_WRITE, _Do.DELETE) and key not in self._established
        match what:
            case _Do.READ:
                await self.read(client, key, Consistency.QUORUM, timeout)
            case _Do.READ_LINEARIZABLE:
                await self.read(client, key, Consistency.LINEARIZABLE, timeout)
            case _Do.WRITE | _Do.PLAIN_WRITE:
                value = self._value_of()
                level = Consistency.LINEARIZABLE if what is _Do.WRITE else Consistency.QUORUM
                handle = self._invoke(Function.WRITE, key, value.decode())
                if twice:
                    self._invoke(Function.WRITE, key, value.decode()).info()
                try:
                    await client.put(key, value, consistency=level, timeout=timeout)
                except DHTError as error:
                    _failed(handle, error)
                else:
                    handle.ok()
                    self._knows(key, value)
            case _Do.DELETE:
                handle = self._invoke(Function.DELETE, key, None)
                if twice:
                    self._invoke(Function.DELETE, key, None).info()
                try:
                    await client.delete(key, timeout=timeout)
                except DHTError as error:
                    _failed(handle, error)
                else:
                    handle.ok()
                    self._knows(key, None)
            case _Do.VERSIONED:
                await self._versioned(client, key, timeout)
            case _:
                expected = None if what is _Do.CREATE else self._seen.get(key)
                value = self._value_of()
                handle = self._invoke(
                    Function.CAS, key, [None if expected is None else expected.decode(), value.decode()]
                )
                try:
                    if what is _Do.CREATE and self.rng.getrandbits(1):
                        await client.put(key, value, if_absent=True, timeout=timeout)
                    else:
                        await client.compare_and_set(key, expected, value, timeout=timeout)
                except VersionConflict:
                    handle.ok(False)
                    self._established.add(key)
                except DHTError as error:
                    _failed(handle, error)
                else:
                    handle.ok()
                    self._knows(key, value)

    async def _versioned(self, client: DHTClient, key: str, timeout: float) -> None:
        """Reads, then writes over the version read, which is a compare-and-set from the value read: none is written
        twice."""
        handle = self._invoke(Function.READ, key, None)
        try:
            entry = await client.get_entry(key, timeout=timeout)
        except DHTError as error:
            _failed(handle, error)
            return
        handle.ok(None if entry is None else entry.value.decode())
        if entry is None:
            return
        value = self._value_of()
        handle = self._invoke(Function.CAS, key, [entry.value.decode(), value.decode()])
        try:
            await client.put(key, value, if_version=entry.version, timeout=timeout)
        except VersionConflict:
            handle.ok(False)
        except DHTError as error:
            _failed(handle, error)
        else:
            handle.ok()
            self._knows(key, value)

    async def read(self, client: DHTClient, key: str, level: Consistency, timeout: float) -> bool:
        """A read, recorded; whether it succeeded."""
        handle = self._invoke(Function.READ, key, None)
        try:
            value = await client.get(key, consistency=level, timeout=timeout)
        except DHTError as error:
            _failed(handle, error)
            return False
        self._seen[key] = value
        if key in self._counters:
            handle.ok(None if value is None else int(value))
        else:
            handle.ok(None if value is None else value.decode())
        return True

    async def _count(self, client: DHTClient, key: str, timeout: float) -> None:
        if self.rng.random() < 0.2:
            await self.read(client, key, Consistency.QUORUM, timeout)
            return
        delta = self.rng.choice((1, 1, 2, -1))
        handle = self._invoke(Function.INCR, key, delta)
        try:
            total = await client.incr(key, delta, timeout=timeout)
        except DHTError as error:
            _failed(handle, error)
        else:
            handle.ok(total)

    def _invoke(self, function: Function, key: str, value: str | int | list[str | None] | None) -> Handle:
        # a call whose outcome is unknown may still go on: it is a process of its own
        self._calls += 1
        given = list(value) if isinstance(value, list) else value
        return self._history.invoke(f"{self._process}.{self._calls}", function, key, given)  # type: ignore[arg-type]  # a list of str is a list of values

    def _knows(self, key: str, value: bytes | None) -> None:
        self._seen[key] = value
        self._established.add(key)


def _failed(handle: Handle, error: DHTError) -> None:
    if isinstance(error, Unavailable | InvalidRequest | ClockSkew):
        handle.fail()
    else:
        handle.info()


def judge(history: History) -> list[Finding]:
    """What is not linearizable, or could not be decided."""
    result = check(history.operations, limit=CHECK_LIMIT)
    if result.verdict is Verdict.LINEARIZABLE:
        return []
    kind = "linearizable" if result.verdict is Verdict.VIOLATION else "undecided"
    return [Finding(kind, result.describe())]
