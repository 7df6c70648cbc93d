"""One measurement: callers that get, or put, one key after the other, and what that costs all processes."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import time
from collections import Counter

import msgspec
from bench.growth.plan import Cell
from bench.growth.site import POOL_BYTES, cpu_s

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError

GET, PUT = "get", "put"
WARM_SHARE = 0.25
"""Of the time of a measurement, before it."""
REFUSED_PAUSE_S = 0.01
"""What a caller waits after a refusal: one that came at once would else be followed by the next at once."""
GRACE_S = 60.0
"""For the last calls."""


class WrongAnswer(Exception):
    """A value has not the length that was stored."""


class Sample(msgspec.Struct, frozen=True):
    """What one measurement gave. Latencies are of calls that succeeded; `refused` are the others, by error."""

    seconds: float
    operations: int
    ops_per_s: float
    p50_ms: float
    p99_ms: float
    node_cpu_us: float
    """Of all nodes together, for one operation; what refused calls cost counts in."""
    client_cpu_us: float
    refused: dict[str, int]

    @property
    def cpu_us(self) -> float:
        return self.node_cpu_us + self.client_cpu_us


async def measure(client: DHTClient, cell: Cell, kind: str, seconds: float, seed: int) -> Sample:
    """Warms up, then measures. Raises WrongAnswer."""
    await _run(client, cell, kind, seconds * WARM_SHARE, seed, [], Counter())
    latencies: list[float] = []
    refused: Counter[str] = Counter()
    gc.collect()  # one measurement does not pay for what the one before left
    before, own_before = cpu_s(await client.stats()), _own_cpu_s()
    start = time.perf_counter()
    await _run(client, cell, kind, seconds, seed + 1, latencies, refused)
    elapsed = time.perf_counter() - start
    own, after = _own_cpu_s() - own_before, cpu_s(await client.stats())
    latencies.sort()
    count = len(latencies)
    return Sample(
        round(elapsed, 3),
        count,
        round(count / elapsed, 1),
        round(quantile(latencies, 0.5) * 1000, 3),
        round(quantile(latencies, 0.99) * 1000, 3),
        round((after - before) * 1e6 / max(1, count), 2),
        round(own * 1e6 / max(1, count), 2),
        dict(refused),
    )


async def _run(
    client: DHTClient, cell: Cell, kind: str, seconds: float, seed: int, latencies: list[float], refused: Counter[str]
) -> None:
    data, clock = cell.data, time.perf_counter
    pool = random.Random(seed).randbytes(POOL_BYTES + data.value_bytes)
    until = clock() + seconds

    async def caller(number: int) -> None:
        rng = random.Random(f"{seed}.{number}")
        randrange, size, key_of = rng.randrange, data.value_bytes, data.key
        while (began := clock()) < until:
            key = key_of(randrange(data.keys))
            try:
                if kind == GET:
                    found = await client.get(key)
                    if found is None or len(found) != size:
                        raise WrongAnswer(f"{key} holds {'nothing' if found is None else f'{len(found)} bytes'}")
                else:
                    at = randrange(POOL_BYTES)
                    await client.put(key, pool[at : at + size])
            except DHTError as error:
                refused[type(error).__name__] += 1
                await asyncio.sleep(REFUSED_PAUSE_S)
            else:
                latencies.append(clock() - began)

    async with asyncio.timeout(seconds + GRACE_S), asyncio.TaskGroup() as group:
        for number in range(cell.callers):
            group.create_task(caller(number))


def quantile(ordered: list[float], q: float) -> float:
    """Of sorted values; 0 where there are none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
