"""Load on a cluster, measured as its user sees it: operations a second and latency from one Python event loop.

Every operation is one `await` of a client call on a key drawn uniformly; nothing is cached. A caller is a loop of such
calls, one after the other. The workloads are YCSB's a, b, c (Cooper et al., "Benchmarking Cloud Serving Systems with
YCSB", 2010) with uniform keys, batches through `put_many` and `get_many`, and `cas`: puts bound to a version, each
caller on a key of its own.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import BatchError, ConfigError, DHTError
from agi.core.dht.types import Consistency

WORKLOADS = {"a": 0.5, "b": 0.95, "c": 1.0}
"""Share of reads; the rest are writes."""
BATCHES = ("batch_put", "batch_get")
CAS = "cas"
NAMES = (*WORKLOADS, *BATCHES, CAS)
CALLERS_MAX = 4096
PRELOAD_BATCH_BYTES = 1 << 20


class Load(msgspec.Struct, frozen=True):
    """What to do. `batch` is the number of keys of a call in the batch workloads."""

    keys: int = 10_000
    value_bytes: int = 100
    batch: int = 1000
    seed: int = 0

    def key(self, number: int) -> str:
        return f"bench:{number:08d}"

    def check(self) -> None:
        """Raises ConfigError."""
        if not (1 <= self.keys <= 100_000_000 and 0 <= self.value_bytes <= 8 << 20 and 1 <= self.batch <= self.keys):
            raise ConfigError(
                "a load has 1 to 100000000 keys, values of 0 to 8388608 bytes, batches of at most its keys"
            )


class NodeCost(msgspec.Struct, frozen=True):
    """What a node used meanwhile."""

    cpu_us_per_op: float
    rss_mib: float


class Sample(msgspec.Struct, frozen=True):
    """One measurement. Latencies are of calls: of a whole batch in the batch workloads, where operations are keys."""

    workload: str
    callers: int
    seconds: float
    operations: int
    ops_per_s: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    errors: dict[str, int]
    client_cpu_us_per_op: float
    nodes: dict[str, NodeCost]


async def preload(client: DHTClient, load: Load) -> None:
    """Writes every key once."""
    value = bytes(load.value_bytes)
    step = max(1, min(load.batch, PRELOAD_BATCH_BYTES // (load.value_bytes + 64)))
    for first in range(0, load.keys, step):
        await client.put_many({load.key(i): value for i in range(first, min(first + step, load.keys))})


async def measure(client: DHTClient, load: Load, workload: str, callers: int, seconds: float) -> Sample:
    """Runs one workload for so long. Raises ConfigError for an unknown one."""
    if not (1 <= callers <= CALLERS_MAX and 0.01 <= seconds <= 86_400):
        raise ConfigError(f"a measurement has 1 to {CALLERS_MAX} callers and takes 0.01 to 86400 seconds")
    make = _caller(client, load, workload)
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    before, cpu_before = await client.stats(), _cpu_s()
    start = time.perf_counter()
    until = start + seconds
    counts = await asyncio.gather(*(make(load.seed + i, until, latencies, errors) for i in range(callers)))
    elapsed = time.perf_counter() - start
    cpu_after, after = _cpu_s(), await client.stats()
    operations = sum(counts)
    latencies.sort()
    each = max(1, operations)
    return Sample(
        workload,
        callers,
        round(elapsed, 3),
        operations,
        round(operations / elapsed, 1),
        _quantile_ms(latencies, 0.5),
        _quantile_ms(latencies, 0.99),
        _quantile_ms(latencies, 0.999),
        dict(errors),
        round((cpu_after - cpu_before) * 1e6 / each, 2),
        {name: _cost(before.get(name, {}), stats, each) for name, stats in after.items() if "cpu_s" in stats},
    )


Caller = Callable[[int, float, list[float], Counter[str]], Awaitable[int]]


def _caller(client: DHTClient, load: Load, workload: str) -> Caller:
    value = random.Random(load.seed).randbytes(load.value_bytes)
    clock = time.perf_counter
    keys = [load.key(i) for i in range(load.keys)]
    put, get = client.put, client.get

    async def single(seed: int, until: float, latencies: list[float], errors: Counter[str]) -> int:
        rng = random.Random(seed)
        draw, randrange, add, reads = rng.random, rng.randrange, latencies.append, WORKLOADS[workload]
        count = 0
        while (start := clock()) < until:
            key = keys[randrange(load.keys)]
            try:
                if draw() < reads:
                    await get(key)
                else:
                    await put(key, value)
            except DHTError as error:
                errors[type(error).__name__] += 1
            else:
                count += 1
            add(clock() - start)
        return count

    async def batches(seed: int, until: float, latencies: list[float], errors: Counter[str]) -> int:
        rng = random.Random(seed)
        count = 0
        while (start := clock()) < until:
            first = rng.randrange(load.keys - load.batch + 1)
            names = keys[first : first + load.batch]
            try:
                if workload == "batch_put":
                    await client.put_many(dict.fromkeys(names, value))
                else:
                    await client.get_many(names)
            except BatchError as error:
                errors.update(type(failure).__name__ for failure in error.failed.values())
                count += load.batch - len(error.failed)
            else:
                count += load.batch
            latencies.append(clock() - start)
        return count

    async def conditional(seed: int, until: float, latencies: list[float], errors: Counter[str]) -> int:
        key, count = f"bench-cas:{seed:08d}", 0
        version = await put(key, value, consistency=Consistency.LINEARIZABLE)
        while (start := clock()) < until:
            try:
                version = await put(key, value, if_version=version)
            except DHTError as error:
                errors[type(error).__name__] += 1
                version = await put(key, value, consistency=Consistency.LINEARIZABLE)
            else:
                count += 1
            latencies.append(clock() - start)
        return count

    if workload in WORKLOADS:
        return single
    if workload in BATCHES:
        return batches
    if workload == CAS:
        return conditional
    raise ConfigError(f"unknown workload {workload!r}: use {', '.join(NAMES)}")


def _cost(before: dict[str, Any], after: dict[str, Any], operations: int) -> NodeCost:
    cpu_s = after["cpu_s"] - before.get("cpu_s", 0.0)
    return NodeCost(round(cpu_s * 1e6 / operations, 2), round(after["rss_bytes"] / (1 << 20), 1))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _quantile_ms(ordered: list[float], q: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * q))] * 1000, 3) if ordered else 0.0
