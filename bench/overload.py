"""What a cluster does when it is asked for more than it can do.

    python bench/overload.py [--storage rocksdb] [--seconds 15] [--times 3] [--keys-per-call 1] [--json FILE]

Three nodes share one processor, the load comes from another. It is open: calls begin at a steady rate, whether
earlier ones have ended or not, as those of many independent users do. First the rate is raised step by step until more
brings no more: the most that was answered in a second is the capacity. Then the cluster gets `--times` that rate, and
after it half of the capacity: how much is answered, how long answers take, what is refused with which error, how large
the nodes and the client grow, and after how long calls are as fast as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from agi.core.dht.bench import Load, preload
from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.local import LocalCluster

STEP_S = 3.0
TICK_S = 0.002
CATCH_UP_S = 0.02
RAISE_BY = 1.3
RATES_MAX = 24
WITHIN = 0.03
"""A step that brings less than this share more is the last."""
CALM_SHARE, CALM_S = 0.5, 6.0
RECOVERY_S = 15.0
TOLERANCE = 2.0
"""Recovered: no quarter of a second has a p99 of more than so many times the worst one of calm times, or an error."""


class Second(msgspec.Struct):
    """What ended in a slice of time."""

    answered: int = 0
    latencies: list[float] = msgspec.field(default_factory=list)
    errors: Counter[str] = msgspec.field(default_factory=Counter)
    refusals: list[float] = msgspec.field(default_factory=list)


class Generator:
    """Begins calls at a rate. Slices are of a quarter of a second, counted from the first call.

    Attributes:
        late_s: by how much the generator itself was late at most. What it could not begin in time it does not make up
            for beyond CATCH_UP_S: it would be another load than was asked for.
        begun: calls.
    """

    SLICE_S = 0.25

    def __init__(self, client: DHTClient, load: Load, batch: int) -> None:
        self._client = client
        self._load = load
        self.batch = batch
        self._rng = random.Random(1)
        self._value = self._rng.randbytes(load.value_bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self.slices: list[Second] = []
        self.late_s = 0.0
        self.begun = 0
        self._began = 0.0

    async def run(self, keys_per_s: float, seconds: float) -> list[Second]:
        """Offers that rate for so long; the slices of this time, once everything has ended."""
        self.slices = []
        self.late_s = 0.0
        self.begun, given_up, start = 0, 0.0, time.perf_counter()
        self._began = start
        while True:
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                break
            due = elapsed * keys_per_s / self.batch - given_up
            most = CATCH_UP_S * keys_per_s / self.batch
            if due - self.begun > most:
                given_up += due - self.begun - most
                due = self.begun + most
            while self.begun < due:
                task = asyncio.create_task(self._call())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                self.begun += 1
            slept = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.late_s = max(self.late_s, time.perf_counter() - slept - TICK_S)
        while self._tasks:
            await asyncio.wait(self._tasks)
        return self.slices

    async def _call(self) -> None:
        rng, load = self._rng, self._load
        start = time.perf_counter()
        try:
            if self.batch == 1:
                key = load.key(rng.randrange(load.keys))
                await (self._client.get(key) if rng.random() < 0.5 else self._client.put(key, self._value))
            else:
                keys = [load.key(rng.randrange(load.keys)) for _ in range(self.batch)]
                if rng.random() < 0.5:
                    await self._client.get_many(keys)
                else:
                    await self._client.put_many(dict.fromkeys(keys, self._value))
        except DHTError as error:
            now = time.perf_counter()
            at = self._at(now)
            at.errors[type(error).__name__] += 1
            at.refusals.append(now - start)
        else:
            now = time.perf_counter()
            at = self._at(now)
            at.answered += self.batch
            at.latencies.append(now - start)

    def _at(self, now: float) -> Second:
        index = int((now - self._began) / self.SLICE_S)
        while len(self.slices) <= index:
            self.slices.append(Second())
        return self.slices[index]


def summary(slices: list[Second], seconds: float) -> dict[str, Any]:
    """Of the slices within the time of the load, without the first second; latencies of all."""
    first, last = int(1 / Generator.SLICE_S), int(seconds / Generator.SLICE_S)
    during = slices[first:last]
    latencies = sorted(latency for each in slices[first:] for latency in each.latencies)
    refusals = sorted(latency for each in slices[first:] for latency in each.refusals)
    errors: Counter[str] = sum((each.errors for each in slices), Counter())
    return {
        "answered_per_s": round(sum(each.answered for each in during) / max(1, len(during)) / Generator.SLICE_S),
        "p50_ms": quantile_ms(latencies, 0.5),
        "p99_ms": quantile_ms(latencies, 0.99),
        "max_ms": quantile_ms(latencies, 1.0),
        "errors": dict(errors),
        "refused_p99_ms": quantile_ms(refusals, 0.99),
    }


def offered(generator: Generator, rate: float, seconds: float) -> dict[str, Any]:
    """What was to be offered, and what the generator managed to."""
    return {
        "wanted_per_s": round(rate),
        "offered_per_s": round(generator.begun * generator.batch / seconds),
        "generator_late_ms": round(generator.late_s * 1000, 1),
    }


def quantile_ms(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(len(values) * share))] * 1000, 2) if values else 0.0


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


async def run(options: argparse.Namespace) -> dict[str, Any]:
    load = Load(keys=options.keys, value_bytes=options.value_bytes)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("needs two processors: one for the nodes, one for the load")
    os.sched_setaffinity(0, cores[:1])  # children inherit it
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with LocalCluster(3, Path(folder), storage=options.storage) as cluster:
            os.sched_setaffinity(0, cores[1:2])
            async with DHTClient(unix=False, timeout=options.timeout) as client:
                await client.connect(cluster.addresses)
                pids = [int(node.announced["pid"]) for node in cluster.nodes if node is not None]
                await preload(client, load)
                generator = Generator(client, load, options.keys_per_call)
                rate, best = options.first_rate, 0.0
                steps = []
                for _ in range(RATES_MAX):
                    step = summary(await generator.run(rate, STEP_S), STEP_S)
                    step.update(offered(generator, rate, STEP_S))
                    steps.append(step)
                    print(json.dumps(step), flush=True)
                    kept_up = step["answered_per_s"] > step["offered_per_s"] * (1 - WITHIN)
                    if not kept_up and step["answered_per_s"] < best * (1 + WITHIN):
                        break
                    best = max(best, float(step["answered_per_s"]))
                    rate *= RAISE_BY
                capacity = max(float(step["answered_per_s"]) for step in steps)
                found["steps"], found["capacity_per_s"] = steps, capacity
                await asyncio.sleep(CALM_S)  # the last step was too much
                slices = await generator.run(capacity * CALM_SHARE, CALM_S)
                calm = summary(slices, CALM_S)
                calm["worst_p99_ms"] = max(quantile_ms(sorted(each.latencies), 0.99) for each in slices[4:])
                found["calm"] = calm
                print("calm", json.dumps(calm), flush=True)
                over = summary(await generator.run(capacity * options.times, options.seconds), options.seconds)
                over.update(offered(generator, capacity * options.times, options.seconds))
                found["overload"] = over
                print("overload", json.dumps(over), flush=True)
                after = await generator.run(capacity * CALM_SHARE, RECOVERY_S)
                found["recovered_after_s"] = recovered_after_s(after, calm["worst_p99_ms"] / 1000)
                found["after"] = summary(after, RECOVERY_S)
                found["node_peak_mib"] = [rss_mib(pid) for pid in pids]
                found["client_peak_mib"] = rss_mib(os.getpid())
    return found


def recovered_after_s(slices: list[Second], worst_p99_s: float) -> float | None:
    """The end of the last slice that was not as in calm times; None if the last one was not."""
    bad = [
        index
        for index, each in enumerate(slices)
        if each.errors or quantile_ms(sorted(each.latencies), 0.99) > worst_p99_s * 1000 * TOLERANCE
    ]
    if not bad:
        return 0.0
    return None if bad[-1] == len(slices) - 1 else (bad[-1] + 1) * Generator.SLICE_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="rocksdb")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--keys-per-call", type=int, default=10)
    parser.add_argument("--first-rate", type=float, default=10_000)
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = uvloop.run(run(options))
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps({"command": sys.argv, **found}, indent=1))


if __name__ == "__main__":
    main()
