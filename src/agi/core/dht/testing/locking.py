"""Clients of a simulated cluster that compete for locks, and what is asked of them (PROTOCOLS L1 to L3).

Each contender has a host of its own, with a clock that is wrong, that drifts and jumps, and that may be stopped for
longer than a lease. Who has a lock writes to what it protects, showing its fence, for as long as it likes, sometimes
long after it has lost or released it; nobody looks whether a lock is held still. Calls go to the linearizability
checker: tokens rise, nobody gives back what is another's, and no former holder's write comes after a later one's. What
the checker cannot see is judged here: that two never believe at one moment to hold a lock, and that in the end each
lock can be had.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable

from agi.core.dht.client import DHTClient
from agi.core.dht.client.locks import Lock
from agi.core.dht.errors import DHTError, FenceRejected, LockHeld, LockLost
from agi.core.dht.testing.conditional import record_failure
from agi.core.dht.testing.history import Function, Handle, History, Outcome, Value
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.workload import Locking, connected
from agi.core.dht.types import Fence, lock_key

SKEW_MS_MAX = 3_600_000
DRIFT = 0.045
"""Two clocks may differ by a tenth, and the margin of a lease is for that."""
WRITES_MAX = 4
"""Of one holder."""
BLOCK_SHARE = 0.3
"""Of the acquisitions, those for a block, which ends when the lock is lost. The others go on as if nothing had been."""
LATE_SHARE = 0.5
"""Of the holders, those that write once more when they have released the lock, or found it lost, for a lease or so."""
END_S = 20.0
"""For the last calls of a contender once all is healed: a lock that is waited for, and steps of whoever gets it."""


class Exclusion:
    """Who believes to hold which lock.

    Args:
        find: told where two do.
    """

    def __init__(self, find: Callable[[str], None]) -> None:
        self._find = find
        self._locks: defaultdict[str, list[Lock]] = defaultdict(list)
        self.entered = 0
        self.lost = 0
        self.late = 0
        """Fenced writes that were sent by who held the lock no more."""

    def enter(self, lock: Lock) -> None:
        """This lock was acquired just now."""
        self.entered += 1
        self._locks[lock.name].append(lock)
        self.look(lock.name)

    def look(self, name: str) -> None:
        """Judges this moment. Locks that are over are looked at too: none may come to be held once more."""
        held = [lock for lock in self._locks[name] if lock.held]
        if len(held) > 1:
            self._find(f"{name} is held at one time by holders of {', '.join(str(lock.token) for lock in held)}")


class Contender:
    """One host of the competition; `main` is its program, which ends soon after `stop` was set.

    Args:
        value_of: makes a value that nobody has written before.
    """

    def __init__(
        self,
        host: Host,
        make: Callable[[], DHTClient],
        addresses: list[str],
        locking: Locking,
        history: History,
        rng: random.Random,
        value_of: Callable[[], bytes],
        exclusion: Exclusion,
    ) -> None:
        self.host = host
        self.stop = False
        self._make = make
        self._addresses = addresses
        self._locking = locking
        self._history = history
        self._rng = rng
        self._value_of = value_of
        self._exclusion = exclusion
        self._calls = 0

    async def main(self) -> None:
        client = await connected(self._make, self._addresses, lambda: self.stop)
        if client is None:
            return
        async with asyncio.TaskGroup() as group:
            for _ in range(self._locking.tasks):
                group.create_task(self._compete(client))
        await client.close()

    async def _compete(self, client: DHTClient) -> None:
        rng, locking = self._rng, self._locking
        while True:
            await asyncio.sleep(rng.expovariate(1.0 / locking.think_s))
            if self.stop:
                return
            name = rng.choice(locking.names)
            if rng.random() < BLOCK_SHARE:
                await self._in_block(client, name, rng.uniform(0.0, locking.wait_s))
            else:
                await self._by_hand(client, name)

    async def _in_block(self, client: DHTClient, name: str, wait_s: float) -> bool:
        """Waits for the lock; its loss cancels whatever is under way. Whether it was had."""
        handle = self._invoke(Function.LOCK, name)
        lock = client.lock(name, ttl=self._locking.lease_s, timeout=wait_s)
        try:
            async with lock:
                handle.ok(lock.token)
                self._exclusion.enter(lock)
                await self._use(client, lock)
                await self._release(lock)
        except LockHeld:
            handle.fail()
        except LockLost:
            self._exclusion.lost += 1
        except DHTError:
            handle.info()  # only the acquisition raises these
        if handle.operation.outcome is not Outcome.OK:
            return False
        await self._come_late(client, lock)
        return True

    async def _by_hand(self, client: DHTClient, name: str) -> None:
        """Takes the lock if it is free; its loss goes unnoticed."""
        handle = self._invoke(Function.LOCK, name)
        try:
            lock = await client.try_lock(name, ttl=self._locking.lease_s)
        except DHTError:
            handle.info()
            return
        if lock is None:
            handle.fail()
            return
        handle.ok(lock.token)
        self._exclusion.enter(lock)
        await self._use(client, lock)
        await self._release(lock)
        await self._come_late(client, lock)

    async def _come_late(self, client: DHTClient, lock: Lock) -> None:
        if self._rng.random() < LATE_SHARE:
            await asyncio.sleep(self._rng.expovariate(1.0 / self._locking.lease_s))
            await self._write(client, lock)

    async def _use(self, client: DHTClient, lock: Lock) -> None:
        for _ in range(self._rng.randint(1, WRITES_MAX)):
            await asyncio.sleep(self._rng.expovariate(1.0 / self._locking.hold_s))
            if self._rng.getrandbits(2) == 0:
                await self._read(client, lock)
            await self._write(client, lock)

    async def _release(self, lock: Lock) -> None:
        handle = self._invoke(Function.UNLOCK, lock.name, lock.token)
        try:
            await lock.release()
        except LockLost:
            self._exclusion.lost += 1
            handle.fail()
        except BaseException as error:
            handle.info()  # tries before the one that failed may have had effect
            if not isinstance(error, DHTError):
                raise
        else:
            handle.ok()

    async def _write(self, client: DHTClient, lock: Lock) -> None:
        key, value = self._locking.resource_of(lock.name), self._value_of()
        self._exclusion.look(lock.name)
        handle = self._invoke(Function.FENCED_WRITE, key, [lock.token, value.decode()])
        self._exclusion.late += not lock.held
        try:
            await client.put(key, value, fence=Fence(lock.name, lock.token), timeout=self._locking.timeout_s)
        except FenceRejected:
            handle.ok(False)
        except BaseException as error:
            record_failure(handle, error)
            if not isinstance(error, DHTError):
                raise
        else:
            handle.ok()

    async def _read(self, client: DHTClient, lock: Lock) -> None:
        key = self._locking.resource_of(lock.name)
        handle = self._invoke(Function.READ, key)
        try:
            value = await client.get(key, timeout=self._locking.timeout_s)
        except BaseException as error:
            record_failure(handle, error)
            if not isinstance(error, DHTError):
                raise
        else:
            handle.ok(None if value is None else value.decode())

    async def locks_left(self) -> list[str]:
        """At rest: takes each lock once and uses it. Which could not be had, though there was time for every lease."""
        client = await connected(self._make, self._addresses, lambda: False)
        assert client is not None  # nobody tells it to stop
        left = [name for name in self._locking.names if not await self._in_block(client, name, END_S)]
        await client.close()
        return left

    def _invoke(self, function: Function, name: str, value: Value = None) -> Handle:
        # a call whose outcome is unknown may still go on: it is a process of its own
        self._calls += 1
        key = lock_key(name).decode() if function in (Function.LOCK, Function.UNLOCK) else name
        return self._history.invoke(f"{self.host.name}.{self._calls}", function, key, value)
