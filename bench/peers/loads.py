"""The workloads, and one measurement of one of them.

a, b and c are YCSB's with uniform keys, as in agi.core.dht.bench: half reads, 95 % reads, reads alone. `put` is writes
alone. A batch is one call for 1,000 keys, a scan one call for the 1,000 keys under a prefix; their operations are keys.
`cas` is a compare-and-set that holds, each caller on a key of its own; `lock` is acquire and release of a lock that
nobody else wants. A caller is a loop of such calls, one after the other.

Every answer is looked at: a value of another length, a scan that lacks keys, is an error of the peer.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from bench.peers.base import Calls, Facts, PeerFailed
from bench.peers.processes import cost
from bench.peers.stats import quantile

from agi.core.dht.bench import WORKLOADS as READ_SHARES

BATCH_KEYS = 1000
SMALL, MEDIUM, LARGE = 100, 1024, 65_536
"""Bytes of a value."""
FILL_BYTES_MAX = 16 << 20
"""Of all values of one size; large values have fewer keys."""
FILL_CALL_BYTES_MAX = 256 << 10
"""Of one call that fills, below every peer's limit of a message."""
FILL_TIMEOUT_S = 150.0
CELL_GRACE_S = 30.0
"""For the last calls of a cell: a batch may take seconds where each write is synced alone."""
ERRORS_MAX = 20
"""A caller gives up after so many."""
ERROR_SHARE_MAX = 0.01
"""Of all calls: beyond it a figure would tell how fast a peer fails."""
SHARES = {**READ_SHARES, "put": 0.0}


class WrongAnswer(Exception):
    """A peer returned something else than was stored."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure."""

    workload: str
    value_bytes: int
    callers: int

    @property
    def name(self) -> str:
        return f"{self.workload}/{self.value_bytes}/{self.callers}"


class Sample(msgspec.Struct, frozen=True):
    """What one measurement gave. Latencies are of calls; CPU and memory of servers (all together) and of the client."""

    ops_per_s: float
    operations: int
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    client_cpu_us: float
    server_rss_mib: float
    client_rss_mib: float
    errors: dict[str, int]

    @property
    def cpu_us(self) -> float:
        """Of all processes, per operation."""
        return self.server_cpu_us + self.client_cpu_us


FULL = tuple(
    [Cell(load, size, callers) for size in (SMALL, MEDIUM, LARGE) for load in "abc" for callers in (1, 32, 256)]
    + [Cell(load, SMALL, callers) for load in ("put", "cas", "lock") for callers in (1, 32, 256)]
    + [Cell(load, SMALL, 1) for load in ("batch_put", "batch_get", "scan")]
)
QUICK = tuple(
    [Cell("a", SMALL, callers) for callers in (1, 32, 256)]
    + [Cell("b", SMALL, 32), Cell("c", SMALL, 32), Cell("a", MEDIUM, 32), Cell("a", LARGE, 32)]
    + [Cell(load, SMALL, callers) for load in ("put", "cas") for callers in (1, 32)]
    + [Cell("lock", SMALL, 1)]
    + [Cell(load, SMALL, 1) for load in ("batch_put", "batch_get", "scan")]
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a turn consists of."""

    cells: tuple[Cell, ...]
    keys: int
    """Of each size of value, as far as FILL_BYTES_MAX goes."""
    seconds: float

    def keys_of(self, value_bytes: int) -> int:
        return max(1, min(self.keys, FILL_BYTES_MAX // value_bytes))

    def names(self, value_bytes: int) -> list[str]:
        """Dots, since they are what every peer's keys may hold, and where two of them have a hierarchy."""
        return [f"v{value_bytes}.{number:06d}" for number in range(self.keys_of(value_bytes))]


def refusal(facts: Facts, calls: Calls | None, cell: Cell) -> str:
    """Why a peer cannot do a cell, or nothing. Without `calls`, which then are in another process, its facts tell."""
    if cell.workload in facts.lacks:
        return facts.lacks[cell.workload]
    if cell.value_bytes > facts.value_bytes_max:
        return f"values of at most {facts.value_bytes_max:,} bytes"
    if cell.callers > facts.callers_max:
        return f"at most {facts.callers_max} callers"
    if calls is None:
        return ""
    needs: dict[str, tuple[object, ...]] = {
        "c": (calls.get,),
        "put": (calls.put,),
        "batch_put": (calls.put_many,),
        "batch_get": (calls.get_many,),
        "cas": (calls.swap_begin, calls.swap),
        "lock": (calls.lock,),
        "scan": (calls.scan,),
    }
    return "not offered" if None in needs.get(cell.workload, (calls.get, calls.put)) else ""


async def fill(calls: Calls, facts: Facts, plan: Plan) -> None:
    """Stores every key that the cells read. Raises PeerFailed when it takes too long."""
    store = calls.fill or calls.put_many
    try:
        async with asyncio.timeout(FILL_TIMEOUT_S):
            for size in sorted({cell.value_bytes for cell in plan.cells}):
                if size > facts.value_bytes_max:
                    continue
                names, value = plan.names(size), _value(size)
                if size == SMALL and any(cell.workload == "scan" for cell in plan.cells) and calls.scan is not None:
                    names = [*names, *(f"scan.{number:06d}" for number in range(BATCH_KEYS))]
                step = max(1, min(BATCH_KEYS, FILL_CALL_BYTES_MAX // size))
                for first in range(0, len(names), step):
                    part = names[first : first + step]
                    if store is not None:
                        await store(dict.fromkeys(part, value))
                    elif calls.put is not None:
                        await asyncio.gather(*(calls.put(name, value) for name in part))
    except TimeoutError:
        raise PeerFailed(f"storing the keys took more than {FILL_TIMEOUT_S:g} s") from None


async def measure(calls: Calls, pids: tuple[int, ...], plan: Plan, cell: Cell, seed: int) -> Sample:
    """One measurement. Raises PeerFailed where calls do not end or too many fail, and what preparing them raises."""
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    texts: dict[str, str] = {}
    caller = _caller(calls, plan, cell)
    pairs = [caller(number, random.Random(f"{seed}.{cell.name}.{number}")) for number in range(cell.callers)]
    counts = [0] * cell.callers

    async def call(number: int, step: Step, until: float) -> None:
        clock, add, failures = time.perf_counter, latencies.append, 0
        began = clock()
        while failures < ERRORS_MAX:  # once at least, however slow the machine
            try:
                counts[number] += await step()
            except Exception as error:  # noqa: BLE001  # whatever a client raises is counted under its name
                failures += 1
                errors[type(error).__name__] += 1
                texts.setdefault(type(error).__name__, str(error)[:200])
            ended = clock()
            add(ended - began)
            if ended >= until:
                return
            began = ended

    try:
        async with asyncio.timeout(plan.seconds + CELL_GRACE_S):
            await asyncio.gather(*(prepare() for prepare, _ in pairs))
            gc.collect()  # a peer does not pay for what the one before it left
            before, cpu_before = cost(pids), _cpu_s()
            start = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for number, (_, step) in enumerate(pairs):
                    group.create_task(call(number, step, start + plan.seconds))
    except TimeoutError:
        raise PeerFailed(f"{cell.name}: calls did not end within {CELL_GRACE_S:g} s more") from None
    elapsed = time.perf_counter() - start
    cpu_after, after = _cpu_s(), cost(pids)
    operations = sum(counts)
    if not operations or errors.total() > ERROR_SHARE_MAX * len(latencies):
        raise PeerFailed(f"{cell.name}: {errors.total():,} of {len(latencies):,} calls failed: {texts}")
    latencies.sort()
    return Sample(
        ops_per_s=round(operations / elapsed, 1),
        operations=operations,
        p50_ms=round(quantile(latencies, 0.5) * 1000, 4),
        p99_ms=round(quantile(latencies, 0.99) * 1000, 4),
        server_cpu_us=round((after.cpu_s - before.cpu_s) * 1e6 / operations, 2),
        client_cpu_us=round((cpu_after - cpu_before) * 1e6 / operations, 2),
        server_rss_mib=round(after.rss_bytes / (1 << 20), 1),
        client_rss_mib=round(_rss_bytes() / (1 << 20), 1),
        errors=dict(errors),
    )


Step = Callable[[], Awaitable[int]]
"""One call; returns the operations that it was."""
Caller = Callable[[int, random.Random], tuple[Callable[[], Awaitable[None]], Step]]


def _caller(calls: Calls, plan: Plan, cell: Cell) -> Caller:
    names, size = plan.names(cell.value_bytes), cell.value_bytes
    value = _value(size)
    make = {"cas": _swaps, "lock": _locks, "scan": _scans, "batch_put": _batch_puts, "batch_get": _batch_gets}
    if cell.workload in make:
        return make[cell.workload](calls, cell, names, value)
    get, put, share = calls.get, calls.put, SHARES[cell.workload]

    def single(_: int, rng: random.Random) -> tuple[Callable[[], Awaitable[None]], Step]:
        draw, randrange, count = rng.random, rng.randrange, len(names)

        async def step() -> int:
            name = names[randrange(count)]
            if draw() < share:
                found = await get(name)
                if found is None or len(found) != size:
                    raise WrongAnswer(f"{name} holds {found if found is None else len(found)}")
            else:
                await put(name, value)  # type: ignore[misc]  # `refusal` has let through who has it
            return 1

        return _nothing, step

    return single


async def _nothing() -> None:
    return None


def _swaps(calls: Calls, cell: Cell, names: list[str], value: bytes) -> Caller:
    begin, swap = calls.swap_begin, calls.swap
    assert begin is not None and swap is not None

    def make(number: int, _: random.Random) -> tuple[Callable[[], Awaitable[None]], Step]:
        name = f"cas.{cell.callers}-{number}"
        expected: object = None

        async def prepare() -> None:
            nonlocal expected
            expected = await begin(name, value)

        async def step() -> int:
            nonlocal expected
            expected = await swap(name, expected, value)
            return 1

        return prepare, step

    return make


def _locks(calls: Calls, cell: Cell, names: list[str], value: bytes) -> Caller:
    lock = calls.lock
    assert lock is not None

    def make(number: int, _: random.Random) -> tuple[Callable[[], Awaitable[None]], Step]:
        name = f"lock.{cell.callers}-{number}"

        async def step() -> int:
            await lock(name)
            return 1

        return _nothing, step

    return make


def _scans(calls: Calls, cell: Cell, names: list[str], value: bytes) -> Caller:
    scan = calls.scan
    assert scan is not None

    def make(_: int, __: random.Random) -> tuple[Callable[[], Awaitable[None]], Step]:
        async def step() -> int:
            _check(await scan("scan."), len(value))
            return BATCH_KEYS

        return _nothing, step

    return make


def _batch_puts(calls: Calls, cell: Cell, names: list[str], value: bytes) -> Caller:
    put_many = calls.put_many
    assert put_many is not None

    def make(_: int, rng: random.Random) -> tuple[Callable[[], Awaitable[None]], Step]:
        async def step() -> int:
            first = rng.randrange(len(names) - BATCH_KEYS + 1)
            await put_many(dict.fromkeys(names[first : first + BATCH_KEYS], value))
            return BATCH_KEYS

        return _nothing, step

    return make


def _batch_gets(calls: Calls, cell: Cell, names: list[str], value: bytes) -> Caller:
    get_many = calls.get_many
    assert get_many is not None

    def make(_: int, rng: random.Random) -> tuple[Callable[[], Awaitable[None]], Step]:
        async def step() -> int:
            first = rng.randrange(len(names) - BATCH_KEYS + 1)
            _check(await get_many(names[first : first + BATCH_KEYS]), len(value))
            return BATCH_KEYS

        return _nothing, step

    return make


def _check(found: list[bytes] | list[bytes | None], size: int) -> None:
    right = sum(1 for each in found if each is not None and len(each) == size)
    if right != BATCH_KEYS or len(found) != BATCH_KEYS:
        raise WrongAnswer(f"{right} right values of {len(found)}")


def _value(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
