"""Holds a three-node cluster against a reference program, in the same minutes, on the same machine.

    python bench/limit.py [--bare PROGRAM] [--rounds 7] [--seconds 3] [--storage memory,rocksdb] [--json FILE]

The reference is any program that takes `--store memory|rocksdb-fsync --seconds S --json` and prints one JSON object
with `ops_per_s` for "1", "32", "256" callers (half puts, half gets), "batch_put" and "batch_get". Rounds are
interleaved, since a shared machine drifts; medians are compared. Without a reference the ratio is "not measured".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from agi.core.dht.bench import Load, measure, preload
from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster

SECTIONS = [
    ("1", "a", 1),
    ("32", "a", 32),
    ("256", "a", 256),
    ("batch_put", "batch_put", 1),
    ("batch_get", "batch_get", 1),
]
STORES = {"memory": "memory", "rocksdb": "rocksdb-fsync"}
"""Our store -> the reference's."""
LOAD = Load(keys=10_000, value_bytes=100, batch=1000)


class Figures:
    """What was measured of one program with one store."""

    def __init__(self) -> None:
        self.ops: dict[str, list[float]] = {name: [] for name, _, _ in SECTIONS}
        self.details: dict[str, list[Any]] = {name: [] for name, _, _ in SECTIONS}
        self.cpu_us: list[float] = []
        """CPU of all processes per operation, over a whole round."""

    def as_dict(self) -> dict[str, Any]:
        return {"ops_per_s": self.ops, "cpu_us_per_op": self.cpu_us, "details": self.details}


async def ours(client: DHTClient, seconds: float, figures: Figures) -> None:
    cpu = operations = 0.0
    for name, workload, callers in SECTIONS:
        sample = await measure(client, LOAD, workload, callers, seconds if workload == "a" else seconds / 2)
        if sample.errors:
            raise SystemExit(f"errors under load: {sample.errors}")
        figures.ops[name].append(sample.ops_per_s)
        figures.details[name].append(
            {
                "p50_ms": sample.p50_ms,
                "p99_ms": sample.p99_ms,
                "client_cpu_us": sample.client_cpu_us_per_op,
                "node_cpu_us": round(sum(node.cpu_us_per_op for node in sample.nodes.values()), 2),
                "rss_mib": max(node.rss_mib for node in sample.nodes.values()),
            }
        )
        cpu += (
            figures.details[name][-1]["client_cpu_us"] + figures.details[name][-1]["node_cpu_us"]
        ) * sample.operations
        operations += sample.operations
    figures.cpu_us.append(round(cpu / operations, 2))


def reference(program: Path, store: str, seconds: float, figures: Figures) -> None:
    process = subprocess.Popen(
        [sys.executable, str(program), "--store", store, "--seconds", str(seconds), "--json"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    out = process.stdout.read()
    _, code, used = os.wait4(process.pid, 0)  # covers the children that it waited for
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"the reference program ended with {process.returncode}")
    result = json.loads(out)
    operations = 0.0
    for name, workload, _ in SECTIONS:
        figures.ops[name].append(result[name]["ops_per_s"])
        figures.details[name].append({k: v for k, v in result[name].items() if k != "ops_per_s"})
        operations += result[name]["ops_per_s"] * (seconds if workload == "a" else seconds / 2)
    figures.cpu_us.append(round((used.ru_utime + used.ru_stime) * 1e6 / operations, 2))


async def compare(storage: str, bare: Path | None, rounds: int, seconds: float) -> tuple[Figures, Figures | None]:
    mine, theirs = Figures(), Figures() if bare is not None else None
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        client = DHTClient(unix=False, timeout=10)  # TCP, as the reference
        async with LocalCluster(3, Path(folder), storage=storage) as cluster, client:
            await client.connect(cluster.addresses)
            await preload(client, LOAD)
            await measure(client, LOAD, "a", 32, 1.0)  # warm
            for number in range(rounds):
                if bare is not None and theirs is not None:
                    await asyncio.to_thread(reference, bare, STORES[storage], seconds, theirs)
                await ours(client, seconds, mine)
                print(f"{storage}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return mine, theirs


def spread(values: list[float]) -> str:
    return f"{median(values):>9,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def show(storage: str, mine: Figures, theirs: Figures | None) -> None:
    print(f"\n{storage}, wal_sync group" if storage == "rocksdb" else f"\n{storage}")
    head = f"{'callers':>10}  {'cluster: ops/s (spread)':>34}  {'reference':>34}  {'ratio':>12}"
    print(f"{head}  p50/p99 ms  CPU us/op nodes+client")
    for name, _, _ in SECTIONS:
        ratio, other = "not measured", ""
        if theirs is not None:
            ratio, other = f"{median(mine.ops[name]) / median(theirs.ops[name]):.2f}", spread(theirs.ops[name])
        cost = mine.details[name]
        of = {key: median(row[key] for row in cost) for key in cost[0]}
        print(
            f"{name:>10}  {spread(mine.ops[name]):>34}  {other:>34}  {ratio:>12}  {of['p50_ms']:.2f}/{of['p99_ms']:.2f}"
            f"  {of['node_cpu_us']:.1f}+{of['client_cpu_us']:.1f}"
        )
    rss = max(row["rss_mib"] for rows in mine.details.values() for row in rows)
    other = f", reference {median(theirs.cpu_us):.1f}" if theirs is not None else ""
    print(f"CPU of all processes: {median(mine.cpu_us):.1f} us an operation over all rounds{other}")
    print(f"largest node: {rss:.0f} MiB")


def hardware() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()} ({sys.executable})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--storage", default="memory,rocksdb")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.bare is not None and not options.bare.is_file():
        parser.error(f"{options.bare} is no file")
    print(hardware())
    load = f"{LOAD.keys} keys of {LOAD.value_bytes} bytes"
    print(f"3 nodes, N=3, QUORUM, {load}, TCP, {options.rounds} rounds of {options.seconds:g} s")
    everything: dict[str, Any] = {"hardware": hardware(), "command": sys.argv}
    for storage in options.storage.split(","):
        mine, theirs = uvloop.run(compare(storage, options.bare, options.rounds, options.seconds))
        show(storage, mine, theirs)
        everything[storage] = {"cluster": mine.as_dict(), "reference": theirs.as_dict() if theirs is not None else None}
    if options.json is not None:
        options.json.write_text(json.dumps(everything, indent=1))


main()
