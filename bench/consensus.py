"""What compare-and-set, increments and locks cost beside plain puts, and how long they wait when a node is cut off.

    python bench/consensus.py [--storage rocksdb] [--rounds 5] [--seconds 2] [--isolations 10] [--json FILE]

Speed: three nodes, N=3, the same callers one after the other: each puts to a key of its own, then compares and sets,
increments, and takes and gives back a lock; rounds take turns, medians are said. Nobody else wants the keys.

Isolation, in a network namespace of the run's own (skipped where the machine allows none): 24 callers of each form of
compare-and-set (bound to a version; by value; increments) change keys of their own without a pause. One node after the
other is cut off from everybody, without a word to anybody, and comes back. Said is, for each form, over all its callers
and isolations, the longest time of each without an answer that it was done.
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
from agi.core.dht.types import Consistency

CALLERS = (1, 32, 256)
VALUE = b"x" * 100
CUT_OFF_S, CALM_S = 6.0, 4.0
FORM_S = 60.0
CALL_TIMEOUT_S = 2.0
FORM_CALLERS = 24
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


def forms(client: DHTClient) -> dict[str, Call]:
    """Compare-and-set in each of its forms; a call may find that the one before took effect after all."""
    versions: dict[int, int] = {}
    values: dict[int, bytes | None] = {}

    async def by_version(number: int) -> None:
        key = f"version:{number}"
        try:
            versions[number] = (
                await client.put(key, VALUE, if_version=versions[number])
                if number in versions
                else await client.put(key, VALUE, if_absent=True)
            )
        except VersionConflict as conflict:
            versions[number] = conflict.version
            raise

    async def by_value(number: int) -> None:
        key, before = f"value:{number}", values.get(number)
        after = b"%d" % (int(before or b"0") + 1)
        try:
            await client.compare_and_set(key, before, after)
        except VersionConflict:
            values[number] = await client.get(key, consistency=Consistency.LINEARIZABLE)
            raise
        values[number] = after

    return {
        "bound to a version": by_version,
        "by value": by_value,
        "increment": lambda number: client.incr(f"counter:{number}"),
    }


class Waits:
    """How long callers of one form went without a call that was done."""

    def __init__(self) -> None:
        self._done = [time.perf_counter()] * FORM_CALLERS
        self._longest = [0.0] * FORM_CALLERS
        self.errors: Counter[str] = Counter()

    async def call(self, form: Call, number: int) -> None:
        """Calls without a pause, for ever."""
        while True:
            try:
                await form(number)
            except VersionConflict:  # an earlier try of unknown outcome was done after all
                continue
            except DHTError as error:
                self.errors[type(error).__name__] += 1
                continue
            now = time.perf_counter()
            self._longest[number] = max(self._longest[number], now - self._done[number])
            self._done[number] = now

    def cut(self) -> list[float]:
        """The longest of each caller since the last cut, the one under way with it."""
        now = time.perf_counter()
        found = [max(gap, now - at) for gap, at in zip(self._longest, self._done, strict=True)]
        self._longest = [0.0] * FORM_CALLERS
        return found


async def isolation(count: int, came_from: str) -> dict[str, Any]:
    """The longest wait of each caller in each isolation, seen from the side of the majority."""
    network = Network(came_from)
    await network.open()
    gaps: dict[str, list[float]] = {}
    calm: dict[str, list[float]] = {}
    waits: dict[str, Waits] = {}
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
            callers = []
            for name, form in forms(client).items():
                waits[name] = Waits()
                callers += [asyncio.create_task(waits[name].call(form, number)) for number in range(FORM_CALLERS)]
            await asyncio.sleep(CALM_S)
            for number in range(count):
                for each in waits.values():
                    each.cut()
                await asyncio.sleep(CALM_S)
                for form_name, each in waits.items():
                    calm.setdefault(form_name, []).extend(each.cut())
                name = f"n{number % 3}"
                others = [other for other in (*nodes.all, CLIENTS) if other != name]
                cuts = [(name, other) for other in others] + [(other, name) for other in others]
                await network.cut(cuts)
                await asyncio.sleep(CUT_OFF_S)
                worst = []
                for form_name, each in waits.items():
                    found = each.cut()
                    gaps.setdefault(form_name, []).extend(found)
                    worst.append(f"{form_name} {max(found):.2f} s")
                await network.mend(cuts)
                await client.wait_healthy(timeout=FORM_S)
                print(f"isolation {number + 1} of {count}: {', '.join(worst)}", file=sys.stderr, flush=True)
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
    return {
        "isolations": count,
        "callers of each form": FORM_CALLERS,
        "timeout_s": CALL_TIMEOUT_S,
        "forms": {
            name: {
                "longest_wait_s": {
                    of: round(_quantile(sorted(found), share), 3)
                    for of, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
                },
                "longest_wait_before_s": round(max(calm[name]), 3),
                "errors": dict(waits[name].errors),
            }
            for name, found in gaps.items()
        },
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
    isolated = found["isolation"]
    if isinstance(isolated, str):
        print(f"\none node of three cut off: {isolated}")
        return
    print("\none node of three cut off, longest wait in s:")
    for name, row in isolated["forms"].items():
        waits, errors = row["longest_wait_s"], row["errors"] or "no errors"
        print(
            f"{name:>20}  p50 {waits['p50']}  p90 {waits['p90']}  p99 {waits['p99']}  longest {waits['max']}  "
            f"before {row['longest_wait_before_s']}  {errors}"
        )


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
