"""Plain and conditional calls of the same keys, mixed, lose nothing, also where a coordinator's clock is far ahead."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from cluster import LOST, WAIT_S, Cluster, until

from agi.core.dht import BatchError, DHTClient, DHTError, VersionConflict
from agi.core.dht.protocol.consensus import is_register
from agi.core.dht.testing.conditional import record_failure
from agi.core.dht.testing.history import Function, Handle, History, Outcome
from agi.core.dht.testing.linearizability import Verdict, check
from agi.core.dht.types import Consistency

AHEAD_MS = 300_000
WORKERS = 6
TIMEOUT_S = 1.0
STRONG = (Consistency.QUORUM, Consistency.LINEARIZABLE)


class Worker:
    """Makes calls, one after the other, and records each. Every value is written once."""

    def __init__(self, name: str, client: DHTClient, keys: Sequence[str], history: History, seed: int) -> None:
        self.client = client
        self._name = name
        self._keys = keys
        self._history = history
        self._rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._seen: dict[str, bytes | None] = {}

    async def work(self, over: asyncio.Event) -> None:
        calls = (self._put, self._put_many, self._delete, self._delete_many, self._swap, self._swap, self._read)
        while not over.is_set():
            await self._rng.choice((*calls, self._read_many, self._over_version))()
            await asyncio.sleep(self._rng.uniform(0, 0.02))

    async def _put(self) -> None:
        key, value = self._key(), self._value()
        await self._write({key: value}, lambda level: self.client.put(key, value, consistency=level, timeout=TIMEOUT_S))

    async def _put_many(self) -> None:
        items = {key: self._value() for key in self._some()}
        await self._write(items, lambda level: self.client.put_many(items, consistency=level, timeout=TIMEOUT_S))

    async def _delete(self) -> None:
        key = self._key()
        await self._write({key: None}, lambda level: self.client.delete(key, consistency=level, timeout=TIMEOUT_S))

    async def _delete_many(self) -> None:
        keys = self._some()
        call = self.client.delete_many
        await self._write(dict.fromkeys(keys), lambda level: call(keys, consistency=level, timeout=TIMEOUT_S))

    async def _write(self, items: dict[str, Any], call: Callable[[Consistency], Awaitable[object]]) -> None:
        handles = {
            key: self._invoke(Function.DELETE if value is None else Function.WRITE, key, value and value.decode())
            for key, value in items.items()
        }
        failed: dict[str, DHTError] = {}
        try:
            await call(self._rng.choice(STRONG))
        except BatchError as error:
            failed = error.failed
        except DHTError as error:
            failed = dict.fromkeys(handles, error)
        for key, handle in handles.items():
            if key in failed:
                record_failure(handle, failed[key])
            else:
                handle.ok()
                self._seen[key] = items[key]

    async def _swap(self) -> None:
        key = self._key()
        expected, value = self._seen.get(key), self._rng.choice((self._value(), self._value(), None))
        handle = self._invoke(Function.CAS, key, [expected and expected.decode(), value and value.decode()])
        try:
            await self.client.compare_and_set(key, expected, value, timeout=TIMEOUT_S)
        except VersionConflict:
            handle.ok(False)
            await self._read(key)
        except DHTError as error:
            record_failure(handle, error)
        else:
            handle.ok()
            self._seen[key] = value

    async def _over_version(self) -> None:
        """A read, and a write bound to the version that it found: a compare-and-set, as no value comes twice."""
        key = self._key()
        read = self._invoke(Function.READ, key, None)
        try:
            entry = await self.client.get_entry(key, timeout=TIMEOUT_S)
        except DHTError as error:
            record_failure(read, error)
            return
        before, value = None if entry is None else entry.value.decode(), self._value()
        read.ok(before)
        bound: dict[str, Any] = {"if_absent": True} if entry is None else {"if_version": entry.version}
        swap = self._invoke(Function.CAS, key, [before, value.decode()])
        try:
            await self.client.put(key, value, timeout=TIMEOUT_S, **bound)
        except VersionConflict:
            swap.ok(False)
        except DHTError as error:
            record_failure(swap, error)
        else:
            swap.ok()

    async def _read(self, key: str = "") -> None:
        await self.read([key or self._key()], self._rng.choice(STRONG))

    async def _read_many(self) -> None:
        await self.read(self._some(), self._rng.choice(STRONG))

    async def read(self, keys: Sequence[str], level: Consistency, timeout: float = TIMEOUT_S) -> bool:
        """Whether all could be read."""
        handles = {key: self._invoke(Function.READ, key, None) for key in keys}
        found: dict[str, bytes | None] = {}
        try:
            found = await self.client.get_many(keys, consistency=level, timeout=timeout)
        except DHTError as error:
            for handle in handles.values():
                record_failure(handle, error)
        for key, value in found.items():
            self._seen[key] = value
            handles[key].ok(value and value.decode())
        return bool(found)

    def _key(self) -> str:
        return self._rng.choice(self._keys)

    def _some(self) -> list[str]:
        return self._rng.sample(self._keys, self._rng.randint(1, len(self._keys)))

    def _value(self) -> bytes:
        return f"{self._name}.{next(self._numbers)}".encode()

    def _invoke(self, function: Function, key: str, value: Any) -> Handle:
        # each call is a process of its own: one whose outcome is unknown may go on beside the next
        return self._history.invoke(f"{self._name}/{next(self._numbers)}", function, key, value)


async def disturb(cluster: Cluster, rng: random.Random, repairs: list[dict[str, Any]]) -> None:
    """A node is cut off and heals, another is killed and comes back, and replicas are compared meanwhile."""
    client = await cluster.client(timeout=TIMEOUT_S)
    cut = rng.randrange(3)
    await asyncio.sleep(0.2)
    heal = cluster.rule(lambda src, dst, message: LOST if f"n{cut}" in (src, dst) else None)
    await asyncio.sleep(0.5)
    heal()
    repairs.append(await client.repair())
    killed = rng.randrange(3)
    await cluster.down(killed)
    await asyncio.sleep(0.2)
    repairing = asyncio.create_task(client.repair())
    await cluster.up(killed, wait=False)
    repairs.append(await repairing)
    await asyncio.sleep(0.2)


async def jump(cluster: Cluster, rng: random.Random, over: asyncio.Event) -> None:
    """The first node's clock: ahead, and now and then right, or further ahead, for a moment."""
    while not over.is_set():
        cluster.clocks[0].ahead_ms = rng.choice((AHEAD_MS, AHEAD_MS, 0, AHEAD_MS + 100_000, -1000))
        await asyncio.sleep(0.05)


def done_by_function(history: History, keys: Sequence[str]) -> list[int]:
    done = Counter((op.f, op.key) for op in history.operations if op.outcome is Outcome.OK and op.result is not False)
    return [done[f, key] for f in (Function.READ, Function.WRITE, Function.DELETE, Function.CAS) for key in keys]


def jitter(cluster: Cluster, rng: random.Random) -> None:
    """Messages take up to 3 ms, so that calls overlap in many ways."""
    cluster.rule(lambda src, dst, message: (rng.uniform(0, 0.003),))


def keys_by_first_holder(cluster: Cluster) -> list[str]:
    """A key for each node to decide on while all of them are there."""
    found: dict[int, str] = {}
    for number in itertools.count():
        found.setdefault(cluster.holders(f"k{number}")[0], f"k{number}")
        if len(found) == cluster.count:
            return list(found.values())
    raise AssertionError


@pytest.mark.parametrize("seed", [1, 2])
async def test_mixed_calls_of_keys_under_consensus_are_linearizable_whatever_the_clocks_show(seed: int) -> None:
    rng, history, repairs = random.Random(seed), History(time.monotonic_ns), list[dict[str, Any]]()
    async with Cluster(3, hasty=True, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        cluster.clocks[0].ahead_ms = AHEAD_MS
        keys = keys_by_first_holder(cluster)
        clients = [await cluster.client(i) for i in range(3)]
        for key in keys:
            handle = history.invoke("first", Function.CAS, key, [None, f"first {key}"])
            await clients[0].put(key, f"first {key}".encode(), if_absent=True)
            handle.ok()
        workers = [Worker(f"w{i}", clients[i % 3], keys, history, seed * 100 + i) for i in range(WORKERS)]
        jitter(cluster, rng)
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group, asyncio.timeout(3 * WAIT_S):
            for worker in workers:
                group.create_task(worker.work(over))
            group.create_task(jump(cluster, rng, over))
            try:
                await disturb(cluster, rng, repairs)
                await until(lambda: all(count >= 10 for count in done_by_function(history, keys)))
            finally:
                over.set()
        await cluster.connected()
        for worker in workers[:3]:
            for level in STRONG:
                assert await worker.read(keys, level, WAIT_S)
        for key in keys:
            assert sum(record is not None and is_register(record) for record in cluster.held(key)) >= 2
    result = check(history.operations)
    assert result.verdict is Verdict.LINEARIZABLE, result.describe()
    assert len(repairs) == 2


@pytest.mark.parametrize("seed", [3, 4])
async def test_a_key_that_comes_under_consensus_amid_plain_puts_loses_none_that_counts(seed: int) -> None:
    """Each key is created by a conditional call, while others put and delete it plainly through whatever clock."""
    rng, history = random.Random(seed), History(time.monotonic_ns)
    async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        clients = [await cluster.client(i) for i in range(3)]
        jitter(cluster, rng)

        async def plain(who: int, key: str) -> None:
            await asyncio.sleep(rng.uniform(0, 0.01))
            value = f"{who}"
            handle = history.invoke(f"{key}/{who}", Function.WRITE, key, value)
            # until the key is under consensus a put that is superseded may have taken effect before, and does so anew
            history.invoke(f"{key}/{who} again", Function.WRITE, key, value).info()
            await clients[who].put(key, value.encode(), timeout=WAIT_S)
            handle.ok()
            await read(who, key)

        async def create(who: int, key: str) -> None:
            handle = history.invoke(f"{key}/{who}", Function.CAS, key, [None, "created"])
            try:
                await clients[who].put(key, b"created", if_absent=True, timeout=WAIT_S)
            except VersionConflict:
                handle.ok(False)
            else:
                handle.ok()
            await read(who, key)

        async def read(who: int, key: str) -> None:
            handle = history.invoke(f"{key}/{who}", Function.READ, key, None)
            value = await clients[who].get(key, timeout=WAIT_S)
            handle.ok(value and value.decode())

        async def race(key: str) -> None:
            creator = rng.randrange(3)
            calls = [create(who, key) if who == creator else plain(who, key) for who in range(3)]
            await asyncio.gather(*calls)
            for who in range(3):
                await read(who, key)

        over = asyncio.Event()
        jumping = asyncio.create_task(jump(cluster, rng, over))
        try:
            for batch in range(10):
                await asyncio.gather(*(race(f"new {batch} {number}") for number in range(10)))
        finally:
            over.set()
            await jumping
    result = check(history.operations)
    assert result.verdict is Verdict.LINEARIZABLE, result.describe()
    assert result.objects == 100
