"""What compare-and-set, increments and locks cost beside plain puts, and how long they wait when a node is cut off.

    python bench/consensus.py [--storage rocksdb] [--rounds 5] [--seconds 2] [--isolations 10] [--json FILE]

Speed: three nodes, N=3, the same callers one after the other: each puts to a key of its own, then compares and sets,
increments, and takes and gives back a lock; rounds take turns, medians are said. Nobody else wants the keys.

Isolation, in a network namespace of the run's own (skipped where the machine allows none): 32 callers compare and set
keys of their own without a pause. One node after the other is cut off from everybody, without a word to anybody, and
comes back. Said is, over all callers and isolations, the longest time of each without an answer that it was done.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError, VersionConflict
from agi.core.dht.local import LocalCluster
from agi.core.dht.testing.chaos.network import CLIENTS, Network, namespace, obstacle, unshare
from agi.core.dht.testing.chaos.nodes import Nodes

CALLERS = (1, 32, 256)
VALUE = b"x" * 100
CUT_OFF_S, CALM_S = 6.0, 4.0
FORM_S = 60.0
CALL_TIMEOUT_S = 2.0
Call = Callable[[int], Awaitable[object]]


async def measured(call: Call, callers: int, seconds: float) -> tuple[float, float, float]:
    """Calls a second, and their p50 and p99 in ms."""
    latencies: list[float] = []
    start = time.perf_counter()
    until = start + seconds

    async def caller(number: int) -> None:
        while (began := time.perf_counter()) < until:
            await call(number)
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*map(caller, range(callers)))
    elapsed = time.perf_counter() - start
    latencies.sort()
    return len(latencies) / elapsed, 1e3 * _quantile(latencies, 0.5), 1e3 * _quantile(latencies, 0.99)


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


async def speed(storage: str, rounds: int, seconds: float) -> dict[str, Any]:
    found: dict[str, dict[int, list[tuple[float, float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        client = DHTClient(unix=False, timeout=10)
        async with LocalCluster(3, Path(folder), storage=storage) as cluster, client:
            await client.connect(cluster.addresses)
            versions: dict[int, int] = {}
            for number in range(max(CALLERS)):
                versions[number] = await client.put(f"cas:{number}", VALUE, if_absent=True)

            async def cas(number: int) -> None:
                versions[number] = await client.put(f"cas:{number}", VALUE, if_version=versions[number])

            async def lock(number: int) -> None:
                async with client.lock(f"lock:{number}", ttl=10):
                    pass

            calls: dict[str, Call] = {
                "put": lambda number: client.put(f"plain:{number}", VALUE),
                "compare-and-set": cas,
                "increment": lambda number: client.incr(f"count:{number}", 1),
                "lock and unlock": lock,
            }
            for call in calls.values():
                await measured(call, max(CALLERS), 0.5)
            for number in range(rounds):
                for name, call in calls.items():
                    for callers in CALLERS:
                        each = await measured(call, callers, seconds)
                        found.setdefault(name, {}).setdefault(callers, []).append(each)
                print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        name: {
            callers: dict(
                zip(("per_s", "p50_ms", "p99_ms"), (median(column) for column in zip(*rows, strict=True)), strict=True)
            )
            for callers, rows in by_callers.items()
        }
        for name, by_callers in found.items()
    }


async def isolation(count: int, came_from: str) -> dict[str, Any]:
    """The longest wait of each caller in each isolation, seen from the side of the majority."""
    network = Network(came_from)
    await network.open()
    gaps: list[float] = []
    errors: Counter[str] = Counter()
    calm: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        died: list[str] = []
        nodes = Nodes(Path(folder), network, lambda name, what: died.append(f"{name}: {what}"), lambda name, what: None)
        for number in range(3):
            await nodes.add(f"n{number}")
        nodes.first = [node.address for node in nodes.all.values()]
        for node in nodes.all.values():
            node.wanted = True
        supervisor = asyncio.create_task(nodes.supervise())
        client = DHTClient(unix=False, timeout=CALL_TIMEOUT_S)
        try:
            await client.connect(nodes.first, timeout=FORM_S)
            await client.wait_healthy(timeout=FORM_S)
            done = [time.perf_counter()] * 32
            longest = [0.0] * 32

            async def caller(number: int) -> None:
                key, version = f"cas:{number}", 0
                while True:
                    try:
                        version = (
                            await client.put(key, VALUE, if_version=version)
                            if version
                            else await client.put(key, VALUE, if_absent=True)
                        )
                    except VersionConflict as conflict:  # an earlier try of unknown outcome was done after all
                        version = conflict.version
                        continue
                    except DHTError as error:
                        errors[type(error).__name__] += 1
                        continue
                    now = time.perf_counter()
                    longest[number] = max(longest[number], now - done[number])
                    done[number] = now

            callers = [asyncio.create_task(caller(number)) for number in range(32)]
            await asyncio.sleep(CALM_S)
            for number in range(count):
                longest[:] = [0.0] * 32
                await asyncio.sleep(CALM_S)
                calm += longest
                name = f"n{number % 3}"
                others = [other for other in (*nodes.all, CLIENTS) if other != name]
                cuts = [(name, other) for other in others] + [(other, name) for other in others]
                longest[:] = [0.0] * 32
                await network.cut(cuts)
                await asyncio.sleep(CUT_OFF_S)
                now = time.perf_counter()
                gaps += [max(gap, now - at) for gap, at in zip(longest, done, strict=True)]
                await network.mend(cuts)
                await client.wait_healthy(timeout=FORM_S)
                print(f"isolation {number + 1} of {count}: {max(gaps[-32:]):.2f} s", file=sys.stderr, flush=True)
            for task in callers:
                task.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
        finally:
            await client.close()
            supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor
            await nodes.kill_all()
            await network.close()
        if died:
            raise SystemExit(f"nodes died: {died}")
    gaps.sort()
    calm.sort()
    return {
        "isolations": count,
        "callers": 32,
        "longest_wait_s": {
            name: round(_quantile(gaps, share), 3) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        },
        "longest_wait_before_s": {
            name: round(_quantile(calm, share), 3) for name, share in (("p50", 0.5), ("max", 1.0))
        },
        "errors": dict(errors),
    }


def show(found: dict[str, Any]) -> None:
    plain = found["speed"]["put"]
    print(
        f"\n{'':>16}  {'callers':>7}  {'calls/s':>9}  {'of put':>6}  {'p50 ms':>7}  {'p99 ms':>7}  {'of put p50':>10}"
    )
    for name, by_callers in found["speed"].items():
        for callers, row in by_callers.items():
            share, times = row["per_s"] / plain[callers]["per_s"], row["p50_ms"] / plain[callers]["p50_ms"]
            print(
                f"{name:>16}  {callers:>7}  {row['per_s']:>9,.0f}  {share:>6.2f}  {row['p50_ms']:>7.2f}"
                f"  {row['p99_ms']:>7.2f}  {times:>10.2f}"
            )
    print("\none node of three cut off: " + json.dumps(found["isolation"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="rocksdb", choices=("rocksdb", "memory"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--isolations", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--came-from", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    why = obstacle()
    if not why and not options.came_from:
        words = [*unshare(), sys.executable, *sys.argv, "--came-from", namespace()]
        os.execvp(words[0], words)
    found: dict[str, Any] = {"command": sys.argv, "isolation": f"not measured: {why}"}
    if not why:
        found["isolation"] = uvloop.run(isolation(options.isolations, options.came_from))
    found["speed"] = uvloop.run(speed(options.storage, options.rounds, options.seconds))
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
