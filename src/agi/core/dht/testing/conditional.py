"""Work on keys under consensus in a simulated cluster: every call is recorded for the linearizability checker.

Registers take compare-and-set, conditional and plain writes, deletes and reads; counters take additions and reads; sets
have members added and removed, by compare-and-set and by `update`. A plain write of a key that may not be under
consensus yet can take effect twice (V2): its history has a second one of unknown outcome. Where keys are `fresh`, new
ones come into being all the time, while others still use the old.
"""

from __future__ import annotations

import asyncio
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
RACE_SHARE = 0.5
"""Of the first calls of a worker on a new key, those that are two at once: a create that makes it a register, a put."""
TWICE = b"~"
"""Values that begin so may have been written twice, and so be there at two versions."""
MEMBERS_MAX = 4
"""Of a set."""
REMOVE_SHARE = 0.3
"""Of the changes of a set with room, those that take a member out."""


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
    """What one worker does to registers, counters and sets.

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
        sets: Sequence[str] = (),
    ) -> None:
        self._process = process
        self._history = history
        self._registers = list(registers)
        self._counters = list(counters)
        self._sets = list(sets)
        self.rng = rng
        self._value_of = value_of
        self._fresh_s = fresh_s
        self._now_s = now_s
        self._seen: dict[str, bytes | None] = {}
        # keys that are certainly under consensus: a plain call that succeeded does not make a key so
        self._decided: set[str] = set()
        self._calls = 0

    async def perform(self, client: DHTClient, timeout: float) -> None:
        """One call, recorded."""
        key = self.rng.choice([*self._registers, *self._counters, *self._sets])
        if key in self._counters:
            await self._count(client, key, timeout)
            return
        if key in self._sets:
            await self._change_set(client, key, timeout)
            return
        if self._fresh_s:
            key = f"{key}.{int(self._now_s() / self._fresh_s)}"
            if key not in self._decided and self.rng.random() < RACE_SHARE:
                await asyncio.gather(
                    self._swap(client, key, None, self._value_of(), timeout, create=True),
                    self._write(client, key, Consistency.QUORUM, timeout),
                )
                return
        what = self.rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        match what:
            case _Do.READ:
                await self.read(client, key, Consistency.QUORUM, timeout)
            case _Do.READ_LINEARIZABLE:
                await self.read(client, key, Consistency.LINEARIZABLE, timeout)
            case _Do.WRITE:
                await self._write(client, key, Consistency.LINEARIZABLE, timeout)
            case _Do.PLAIN_WRITE:
                await self._write(client, key, Consistency.QUORUM, timeout)
            case _Do.DELETE:
                handle = self._invoke(Function.DELETE, key, None)
                if key not in self._decided:
                    self._invoke(Function.DELETE, key, None).info()
                try:
                    await client.delete(key, timeout=timeout)
                except DHTError as error:
                    record_failure(handle, error)
                else:
                    handle.ok()
                    self._seen[key] = None
            case _Do.VERSIONED:
                await self._versioned(client, key, timeout)
            case _:
                expected = None if what is _Do.CREATE else self._seen.get(key)
                create = what is _Do.CREATE and self.rng.getrandbits(1) == 1
                await self._swap(client, key, expected, self._value_of(), timeout, create=create)

    async def _write(self, client: DHTClient, key: str, level: Consistency, timeout: float) -> None:
        twice = level is not Consistency.LINEARIZABLE and key not in self._decided
        value = (TWICE if twice else b"") + self._value_of()
        handle = self._invoke(Function.WRITE, key, value.decode())
        if twice:
            self._invoke(Function.WRITE, key, value.decode()).info()
        try:
            await client.put(key, value, consistency=level, timeout=timeout)
        except DHTError as error:
            record_failure(handle, error)
        else:
            handle.ok()
            self._seen[key] = value
            if level is Consistency.LINEARIZABLE:
                self._decided.add(key)

    async def _swap(
        self,
        client: DHTClient,
        key: str,
        expected: bytes | None,
        value: bytes | None,
        timeout: float,
        *,
        create: bool = False,
    ) -> None:
        handle = self._invoke(Function.CAS, key, [_text(expected), _text(value)])
        try:
            if create and value is not None:
                await client.put(key, value, if_absent=True, timeout=timeout)
            else:
                await client.compare_and_set(key, expected, value, timeout=timeout)
        except VersionConflict:
            handle.ok(False)
            self._decided.add(key)
        except DHTError as error:
            record_failure(handle, error)
        else:
            handle.ok()
            self._knows(key, value)

    async def _change_set(self, client: DHTClient, key: str, timeout: float) -> None:
        """Adds a member, or takes one out, or reads."""
        drawn = self.rng.random()
        if drawn < 0.2:
            await self.read(client, key, Consistency.QUORUM, timeout)
        elif drawn < 0.6:
            before = self._seen.get(key)
            after = self._other(before)
            if before is not None or after is not None:
                await self._swap(client, key, before, after, timeout)
                self._seen.pop(key, None)  # if that failed, it is not known what is there: read it
                await self.read(client, key, Consistency.QUORUM, timeout)
        else:
            await self._update(client, key, timeout)

    async def _update(self, client: DHTClient, key: str, timeout: float) -> None:
        """Each try of an `update` is a read, and a compare-and-set from what was read. One that another came before
        changed nothing; but the value may be the same again by then, so that it is no observation."""
        read, swap = self._invoke(Function.READ, key, None), None

        def change(value: bytes | None) -> bytes | None:
            nonlocal read, swap
            if swap is not None:
                swap.fail()
            read.ok(_text(value))
            read, after = self._invoke(Function.READ, key, None), self._other(value)
            swap = self._invoke(Function.CAS, key, [_text(value), _text(after)])
            return after

        try:
            after = await client.update(key, change, timeout=timeout)
        except VersionConflict:
            if swap is not None:
                swap.fail()
        except DHTError as error:
            if swap is not None:
                record_failure(swap, error)
        else:
            assert swap is not None
            swap.ok()
            self._knows(key, after)
        read.fail()

    def _other(self, value: bytes | None) -> bytes | None:
        """The set with one member more or less; None for one without members."""
        members = [] if value is None else value.decode().split(",")
        if len(members) >= MEMBERS_MAX or (members and self.rng.random() < REMOVE_SHARE):
            members.remove(self.rng.choice(members))
        else:
            members.append(self._value_of().decode().rstrip("."))
        return ",".join(sorted(members)).encode() or None

    async def _versioned(self, client: DHTClient, key: str, timeout: float) -> None:
        """Reads, then writes over the version read, which is a compare-and-set from the value read. Where that may have
        been written twice, a conflict does not tell of another value."""
        handle = self._invoke(Function.READ, key, None)
        try:
            entry = await client.get_entry(key, timeout=timeout)
        except DHTError as error:
            record_failure(handle, error)
            return
        handle.ok(None if entry is None else entry.value.decode())
        if entry is None:
            return
        value = self._value_of()
        handle = self._invoke(Function.CAS, key, [entry.value.decode(), value.decode()])
        try:
            await client.put(key, value, if_version=entry.version, timeout=timeout)
        except VersionConflict:
            if entry.value.startswith(TWICE):
                handle.fail()
            else:
                handle.ok(False)
        except DHTError as error:
            record_failure(handle, error)
        else:
            handle.ok()
            self._knows(key, value)

    async def read(self, client: DHTClient, key: str, level: Consistency, timeout: float) -> bool:
        """A read, recorded; whether it succeeded."""
        handle = self._invoke(Function.READ, key, None)
        try:
            value = await client.get(key, consistency=level, timeout=timeout)
        except DHTError as error:
            record_failure(handle, error)
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
            record_failure(handle, error)
        else:
            handle.ok(total)

    def _invoke(self, function: Function, key: str, value: str | int | list[str | None] | None) -> Handle:
        # a call whose outcome is unknown may still go on: it is a process of its own
        self._calls += 1
        given = list(value) if isinstance(value, list) else value
        return self._history.invoke(f"{self._process}.{self._calls}", function, key, given)  # type: ignore[arg-type]  # a list of str is a list of values

    def _knows(self, key: str, value: bytes | None) -> None:
        """This worker wrote it, under consensus."""
        self._seen[key] = value
        self._decided.add(key)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def record_failure(handle: Handle, error: BaseException) -> None:
    """How an operation ended that raised this: only some errors promise that nothing was written (D3)."""
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
