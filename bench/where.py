"""Where an operation's microseconds go: the CPU time of a client and of its nodes, by part of the code.

    python bench/where.py [--storage memory,rocksdb] [--seconds 6] [--docs docs/performance.md] [--json FILE]

Three nodes, N=3, QUORUM, 100-byte values, TCP on loopback; half puts, half gets, and puts bound to a version. While a
workload runs, py-spy samples one of the nodes, which share the work evenly, and the client. The share of each part of
the code in the samples of a process, times the CPU time that the process took for an operation by the kernel's account,
is what the table says. A system call, and what runs in C, counts for the Python function that called it. Sampling
itself costs the processes a few hundredths.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from agi.core.dht.bench import Load, measure, preload
from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster

RATE = 500
"""Samples a second."""
WORKLOADS = (
    ("1 caller", "a", 1),
    ("32 callers", "a", 32),
    ("256 callers", "a", 256),
    ("compare-and-set, 32 callers", "cas", 32),
    ("put of 1,000", "batch_put", 1),
    ("get of 1,000", "batch_get", 1),
)
LOAD = Load(keys=10_000, value_bytes=100, batch=1000)
LOOP, OTHER = "event loop", "everything else"
PARTS = {
    "sockets and frames": ("transport/native", "transport/base", "transport/handshake", "transport/memory"),
    "encoding and decoding": ("transport/codec", "protocol/messages", "proto/"),
    "records and versions": ("protocol/record", "protocol/versioning", "protocol/consensus", "clock"),
    "client: calls and batches": ("client/",),
    "ring and placement": ("ring", "joint", "topology", "client/routing"),
    "coordination and quorums": (
        "coordinator", "registers",
        "requests", "reads", "writes", "fanout", "calls", "peers", "sessions", "node", "client_requests",
        "replica_requests", "protocol/quorum", "protocol/dedup", "protocol/timers", "protocol/admission",
        "protocol/latency",
    ),
    "replica and storage": (
        "replica", "acceptor", "storage/", "protocol/commit", "protocol/hints", "treekeeper", "protocol/merkle",
    ),
    "metrics": ("observability/",),
    "the benchmark's callers": ("bench",),
    LOOP: ("server",),
}  # fmt: skip
"""Part -> modules below agi.core.dht, by the beginning of their names; the longest that fits counts."""
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"


@dataclass(slots=True)
class Cost:
    """Of one process kind in one workload: microseconds of CPU time an operation, by part."""

    total_us: float
    parts: dict[str, float]


@dataclass(slots=True)
class Row:
    ops_per_s: float
    client: Cost
    nodes: Cost


def part_of(stack: str) -> str:
    """The part that the innermost frame of ours belongs to; py-spy writes a stack as `name (file:line);...`."""
    for frame in reversed(stack.split(";")):
        file = frame.rpartition(" (")[2].rpartition(":")[0]
        _, found, module = file.rpartition("dht/")
        if not found or "site-packages" in file:
            continue
        module = module.removesuffix(".py")
        fitting = [(len(name), part) for part, names in PARTS.items() for name in names if module.startswith(name)]
        return max(fitting)[1] if fitting else OTHER
    return LOOP


async def sampled(pid: int, seconds: float, folder: Path) -> Counter[str]:
    """Samples of a process by part."""
    raw = folder / f"{pid}.raw"
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if spy is None:
        raise SystemExit("py-spy is not installed: `make profile` does so, or pip install py-spy")
    words = [spy, "record", "--pid", str(pid), "--rate", str(RATE), "--duration", f"{max(1, round(seconds))}"]
    process = await asyncio.create_subprocess_exec(
        *words, "--format", "raw", "--full-filenames", "--output", str(raw), "--nonblocking",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await asyncio.wait_for(process.communicate(), seconds + 30)
    if process.returncode:
        raise SystemExit(f"py-spy: {said.decode(errors='replace').strip()}")
    found: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        found[part_of(stack)] += int(count)
    return found


def cost(total_us: float, samples: Counter[str]) -> Cost:
    each = total_us / max(1, samples.total())
    return Cost(round(total_us, 2), {part: round(count * each, 2) for part, count in samples.most_common()})


async def profile(storage: str, seconds: float) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as name:
        folder = Path(name)
        client = DHTClient(unix=False, timeout=10)
        async with LocalCluster(3, folder, storage=storage) as cluster, client:
            await client.connect(cluster.addresses)
            await preload(client, LOAD)
            await measure(client, LOAD, "a", 32, 1.0)  # warm
            pid = cluster.node(0).process.pid
            for title, workload, callers in WORKLOADS:
                sample, theirs, ours = await asyncio.gather(
                    measure(client, LOAD, workload, callers, seconds + 1),
                    sampled(pid, seconds, folder),
                    sampled(os.getpid(), seconds, folder),
                )
                if sample.errors:
                    raise SystemExit(f"errors under load: {sample.errors}")
                nodes_us = sum(node.cpu_us_per_op for node in sample.nodes.values())
                client_us = sample.client_cpu_us_per_op
                rows[title] = Row(sample.ops_per_s, cost(client_us, ours), cost(nodes_us, theirs))
                print(f"{storage}, {title}: {sample.ops_per_s:,.0f}/s", file=sys.stderr, flush=True)
    return rows


def table(rows: dict[str, Row]) -> list[str]:
    """Markdown: a column for each workload."""
    lines = ["| us of CPU an operation | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for who in ("client", "nodes"):
        costs = [getattr(row, who) for row in rows.values()]
        totals = " | ".join(f"**{each.total_us:.1f}**" for each in costs)
        lines.append(f"| **{'client' if who == 'client' else 'the three nodes together'}** | {totals} |")
        shares: defaultdict[str, float] = defaultdict(float)
        for each in costs:
            for part, us in each.parts.items():
                shares[part] += us / max(each.total_us, 0.01)
        for part in sorted(shares, key=shares.__getitem__, reverse=True):
            lines.append(f"| {part} | " + " | ".join(f"{each.parts.get(part, 0.0):.1f}" for each in costs) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="memory,rocksdb")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--docs", type=Path, help=f"write the tables into this file, between {BEGIN} and {END}")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {storage: uvloop.run(profile(storage, given.seconds)) for storage in given.storage.split(",")}
    machine = f"{os.cpu_count()} CPUs, {platform.platform()}, Python {platform.python_version()}"
    lines = [f"`make profile` on {machine}; three nodes and their client share the processors.", ""]
    for storage, rows in found.items():
        lines += [f"### {'RocksDB, `wal_sync: group`' if storage == 'rocksdb' else 'Memory'}", "", *table(rows), ""]
    text = "\n".join(lines)
    print(text)
    if given.docs is not None:
        before, begin, rest = given.docs.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            parser.error(f"{given.docs} has no place for it between {BEGIN} and {END}")
        given.docs.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    if given.json is not None:
        plain = {storage: {title: asdict(row) for title, row in rows.items()} for storage, rows in found.items()}
        given.json.write_text(json.dumps({"machine": machine, "found": plain}, indent=1))


if __name__ == "__main__":
    main()
