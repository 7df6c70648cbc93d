"""What a user sees while members come and go, and while replicas are repaired: on real processes, under load.

    python bench/changes.py [--keys 100000] [--value-bytes 1000] [--callers 16] [--json FILE]

Three nodes with RocksDB, N=3, QUORUM, are filled. While callers read and write, a fourth joins and leaves again, one is
killed and another takes its place, and each is stopped and started in its turn. Then one node misses a hundredth of all
keys and is repaired by an order, and another time by itself. Said are: calls, errors and latency before and during each
change (a newcomer's process starts before it joins, and takes a processor for that), how long it took, the bytes that
it moved against the share that a newcomer must get, and what the repair sent against what differed; how long it takes
without an order; and how fast a newcomer is filled without load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from agi.core.dht.bench import Load, preload
from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.local import LocalCluster

CALM_S = 8.0
WAIT_S = 600.0
DIVERGENT = 0.01
YOUNG_S = 6.0
"""Past the request deadline: what is younger may just be on its way and is no difference."""
RECORD_HEADER = 40
PHASES = (
    "before",
    "start",
    "join",
    "four nodes",
    "leave",
    "after",
    "kill",
    "replace",
    "replaced",
    "rolling restart",
)


class Callers:
    """Loops of reads and writes, one after the other; `cut` gives what was seen since the last cut."""

    def __init__(self, client: DHTClient, load: Load, count: int) -> None:
        self._client = client
        self._load = load
        self._latencies: list[float] = []
        self._errors: Counter[str] = Counter()
        self._since = time.perf_counter()
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(count)]

    async def _call(self, number: int) -> None:
        rng = random.Random(number)
        value = rng.randbytes(self._load.value_bytes)
        while True:
            key = self._load.key(rng.randrange(self._load.keys))
            start = time.perf_counter()
            try:
                if rng.random() < 0.5:
                    await self._client.get(key)
                else:
                    await self._client.put(key, value)
            except DHTError as error:
                self._errors[type(error).__name__] += 1
            self._latencies.append(time.perf_counter() - start)

    def cut(self) -> dict[str, Any]:
        latencies, self._latencies = sorted(self._latencies), []
        errors, self._errors = dict(self._errors), Counter()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return {
            "seconds": round(seconds, 2),
            "calls_per_s": round(len(latencies) / seconds),
            "errors": errors,
            "p50_ms": _quantile_ms(latencies, 0.5),
            "p99_ms": _quantile_ms(latencies, 0.99),
            "max_ms": _quantile_ms(latencies, 1.0),
        }

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _quantile_ms(ordered: list[float], q: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * q))] * 1000, 2) if ordered else 0.0


async def measure(load: Load, callers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        settings = {"repair.interval_ms": "3600000"}
        cluster = LocalCluster(3, Path(folder), settings=settings, per_node={4: {"cluster.replaces": "n2"}})
        async with cluster, DHTClient(timeout=30.0) as client:
            await client.connect(cluster.addresses)
            await preload(client, load)
            callers_ = Callers(client, load, callers)
            try:
                await asyncio.sleep(1.0)
                callers_.cut()
                await asyncio.sleep(CALM_S)
                found["before"] = callers_.cut()
                await cluster.add_node()
                found["start"] = callers_.cut()
                await _changed(client, 4)
                found["join"] = callers_.cut()
                found["join"].update(await _moved(client, load))
                await asyncio.sleep(CALM_S)
                found["four nodes"] = callers_.cut()
                await client.leave("n3")
                found["leave"] = callers_.cut()
                await asyncio.sleep(CALM_S)
                found["after"] = callers_.cut()
                await cluster.kill(2)
                await asyncio.sleep(CALM_S)  # until it is known dead: only then it may be replaced
                found["kill"] = callers_.cut()
                await cluster.add_node()
                await _changed(client, 3, "n4")
                found["replace"] = callers_.cut()
                await asyncio.sleep(CALM_S)
                found["replaced"] = callers_.cut()
                for i in (0, 1, 4):
                    await cluster.stop_node(i)
                    await cluster.start_node(i)
                    await client.wait_healthy(WAIT_S)
                found["rolling restart"] = callers_.cut()
            finally:
                await callers_.stop()
    return found


async def _changed(client: DHTClient, count: int, newcomer: str = "") -> None:
    """No change is under way any more, and there are so many members, with the newcomer among them."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(DHTError):
                members = (await client.topology())["members"]
                names = [member["node_id"] for member in members]
                normal = all(member["state"] == "normal" for member in members)
                if len(members) == count and normal and (not newcomer or newcomer in names):
                    return
            await asyncio.sleep(0.2)


async def _moved(client: DHTClient, load: Load) -> dict[str, Any]:
    change = (await client.status())["n3"]["change"]
    record = len(load.key(0)) + RECORD_HEADER + load.value_bytes
    ideal = load.keys * record * 3 / 4
    return {
        "keys_moved": change["keys"],
        "bytes_moved": change["bytes"],
        "of_ideal_share": round(change["bytes"] / ideal, 3),
    }


async def stream(load: Load) -> dict[str, Any]:
    """A newcomer is filled without load: from the epoch that takes it in to the one that it serves in."""
    settings = {"repair.interval_ms": "3600000"}
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        async with LocalCluster(3, Path(folder), settings=settings) as cluster, DHTClient(timeout=30.0) as client:
            await client.connect(cluster.addresses)
            await preload(client, load)
            await asyncio.sleep(CALM_S)
            adding = asyncio.create_task(cluster.add_node())
            async with asyncio.timeout(WAIT_S):
                while not (await client.topology())["in_transition"]:  # noqa: ASYNC110  # only asking tells
                    await asyncio.sleep(0.02)
                began = time.perf_counter()
                while (await client.topology())["in_transition"]:  # noqa: ASYNC110  # as above
                    await asyncio.sleep(0.05)
                seconds = time.perf_counter() - began
            await adding
            moved = await _moved(client, load)
    return {"seconds": round(seconds, 2), "mb_per_s": round(moved["bytes_moved"] / 1e6 / seconds, 1)} | moved


async def repair(load: Load) -> dict[str, Any]:
    """n2 misses some writes, of which nobody keeps a hint; then it is repaired, and once more when all is equal."""
    settings = {"repair.interval_ms": "0", "hints.bytes_max_mb": "0"}
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        async with LocalCluster(3, Path(folder), settings=settings) as cluster, DHTClient(timeout=30.0) as client:
            await client.connect(cluster.addresses)
            keys = await _diverge(cluster, client, load)
            await asyncio.sleep(YOUNG_S)
            async with asyncio.timeout(WAIT_S):
                while any(  # noqa: ASYNC110  # only asking tells
                    node["repair"]["unknown_ranges"] for node in (await client.status()).values()
                ):
                    await asyncio.sleep(0.1)
            missed = len(keys) * (len(keys[0]) + RECORD_HEADER + load.value_bytes)
            began = time.perf_counter()
            first = await client.repair("n2")
            seconds = time.perf_counter() - began
            again = await client.repair("n2")
    return {
        "differing_keys": len(keys),
        "differing_bytes": missed,
        "seconds": round(seconds, 2),
        "differences_found": first["n2"]["differences"],
        "bytes": _bytes(first["n2"]),
        "of_differing_bytes": round(_bytes(first["n2"]) / missed, 2),
        "when_equal_differences": again["n2"]["differences"],
        "when_equal_bytes_a_peer": _bytes(again["n2"]) // again["n2"]["peers"],
    }


async def heal(load: Load) -> dict[str, Any]:
    """The same with the settings that are shipped, but for hints, and without an order."""
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        settings = {"hints.bytes_max_mb": "0"}
        async with LocalCluster(3, Path(folder), settings=settings) as cluster, DHTClient(timeout=30.0) as client:
            await client.connect(cluster.addresses)
            await _diverge(cluster, client, load)
            began = time.perf_counter()
            await client.wait_healthy(WAIT_S)
            seconds = time.perf_counter() - began
            left = await client.repair("n2")
    return {"seconds": round(seconds, 1), "differences_left": left["n2"]["differences"]}


async def _diverge(cluster: LocalCluster, client: DHTClient, load: Load) -> list[str]:
    """Stores all keys, and a share of them anew while n2 is away; it is back then."""
    await preload(client, load)
    rng = random.Random(1)
    keys = [load.key(number) for number in rng.sample(range(load.keys), int(load.keys * DIVERGENT))]
    await cluster.kill(2)
    await client.put_many(dict.fromkeys(keys, rng.randbytes(load.value_bytes)))
    await cluster.start_node(2)
    await cluster.wait_ready()
    return keys


def _bytes(report: dict[str, Any]) -> int:
    return int(report["bytes_sent"] + report["bytes_received"])


def show(found: dict[str, Any]) -> None:
    for name in PHASES:
        part = found[name]
        errors = ", ".join(f"{count} {error}" for error, count in part["errors"].items()) or "no errors"
        print(
            f"{name:>15}  {part['seconds']:6.1f} s  {part['calls_per_s']:>7,} calls/s  p50 {part['p50_ms']} ms  "
            f"p99 {part['p99_ms']} ms  longest {part['max_ms']} ms  {errors}"
        )
    join = found["join"]
    print(
        f"the newcomer was brought {join['keys_moved']:,} keys, {join['bytes_moved'] / 1e6:.1f} MB, "
        f"{join['of_ideal_share']:.2f} of the ideal share, {join['bytes_moved'] / 1e6 / join['seconds']:.1f} MB/s over "
        "the whole join"
    )
    idle = found["join without load"]
    print(f"without load: {idle['bytes_moved'] / 1e6:.1f} MB in {idle['seconds']} s, {idle['mb_per_s']} MB/s")
    healed = found["repair without an order"]
    print(f"without an order: {healed['seconds']} s, then {healed['differences_left']} differences")
    print("repair: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in found["repair"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--value-bytes", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    given = parser.parse_args()
    load = Load(keys=given.keys, value_bytes=given.value_bytes)
    load.check()
    print(f"{os.cpu_count()} CPUs, {platform.platform()}, Python {platform.python_version()}", file=sys.stderr)
    found = uvloop.run(measure(load, given.callers))
    found["join without load"] = uvloop.run(stream(load))
    found["repair"] = uvloop.run(repair(load))
    found["repair without an order"] = uvloop.run(heal(load))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
