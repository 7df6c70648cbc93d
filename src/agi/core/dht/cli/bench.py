"""`bench`: how fast a cluster is, as one Python client sees it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer
import uvloop

from agi.core.dht.bench import BATCHES, CALLERS_MAX, NAMES, Load, Sample, measure, preload
from agi.core.dht.cli import output
from agi.core.dht.cli.connection import AsJson, addresses
from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ConfigError
from agi.core.dht.local import LocalCluster

CONNECT_TIMEOUT_S = 10.0
ROUNDS_MAX = 1000


def bench(
    connect: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT,...",
            envvar="AGI_DHT_CONNECT",
            help="A running cluster, which gets keys named bench:... Default: one is started and removed.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster that is started.")] = 3,
    storage: Annotated[str, typer.Option(help="Its storage: rocksdb or memory.")] = "rocksdb",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Its other settings, such as storage.wal_sync=interval."),
    ] = None,
    workload: Annotated[
        str, typer.Option(help="a (half reads), b (95 % reads), c (reads), batch_put, batch_get, batch (both), cas.")
    ] = "a,b,c,batch",
    callers: Annotated[str, typer.Option(help="Concurrent callers; batches have one.")] = "1,32,256",
    keys: Annotated[int, typer.Option(help="Keys, all written beforehand.")] = 10_000,
    value_bytes: Annotated[int, typer.Option(help="Size of each value.")] = 100,
    batch: Annotated[int, typer.Option(help="Keys of one call in the batch workloads.")] = 1000,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 3.0,
    rounds: Annotated[int, typer.Option(help="Repetitions; the medians are shown.")] = 1,
    unix: Annotated[bool, typer.Option(help="Use a node's Unix socket where it runs on this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure throughput, latency, and the CPU and memory that it costs.

    One `await` of a client call per operation, from one event loop, without a cache.

    Examples:

        agi-dht bench --storage memory --workload a --callers 1,32

        agi-dht bench --connect localhost:7000 --value-bytes 1024 --json
    """
    load = Load(keys=keys, value_bytes=value_bytes, batch=batch)
    load.check()
    plan = _plan(workload, callers)
    if not 1 <= rounds <= ROUNDS_MAX:
        raise ConfigError(f"--rounds is 1 to {ROUNDS_MAX}, not {rounds}")
    chosen = _settings(settings or [])
    samples = uvloop.run(_run(connect, nodes, storage, chosen, load, plan, seconds, rounds, unix))
    if as_json:
        output.document([msgspec.to_builtins(sample) for sample in samples])
    else:
        _show(samples)


def _plan(workload: str, callers: str) -> list[tuple[str, int]]:
    """(workload, callers) of each measurement. Raises ConfigError."""
    counts = []
    for text in callers.split(","):
        if not text.strip().isdecimal() or not 1 <= int(text) <= CALLERS_MAX:
            raise ConfigError(f"--callers takes numbers from 1 to {CALLERS_MAX} separated by commas, not {text!r}")
        counts.append(int(text))
    plan: list[tuple[str, int]] = []
    for name in workload.split(","):
        if name in NAMES and name not in BATCHES:
            plan += [(name, count) for count in counts]
        elif name in BATCHES or name == "batch":
            plan += [(each, 1) for each in (BATCHES if name == "batch" else (name,))]
        else:
            raise ConfigError(f"unknown workload {name!r}: use {', '.join(NAMES)} or batch")
    return plan


def _settings(given: list[str]) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in given]
    for key, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {key!r}")
    return {key: value for key, _, value in pairs}


@contextlib.asynccontextmanager
async def _cluster(connect: str | None, nodes: int, storage: str, settings: dict[str, str]) -> AsyncIterator[list[str]]:
    """Addresses of the cluster to measure."""
    if connect is not None:
        yield addresses(connect)
        return
    folder = Path(tempfile.mkdtemp(prefix="agi-dht-bench-"))
    try:
        async with LocalCluster(nodes, folder, storage=storage, settings=settings) as cluster:
            yield cluster.addresses
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _run(
    connect: str | None,
    nodes: int,
    storage: str,
    settings: dict[str, str],
    load: Load,
    plan: list[tuple[str, int]],
    seconds: float,
    rounds: int,
    unix: bool,
) -> list[Sample]:
    samples = []
    async with _cluster(connect, nodes, storage, settings) as known, DHTClient(unix=unix) as client:
        await client.connect(known, timeout=CONNECT_TIMEOUT_S)
        await preload(client, load)
        for _ in range(rounds):
            for workload, callers in plan:
                sample = await measure(client, load, workload, callers, seconds)
                samples.append(sample)
                output.note(f"{workload}, {callers} callers: {sample.ops_per_s:,.0f} operations a second")
    return samples


def _show(samples: list[Sample]) -> None:
    rows: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        rows.setdefault((sample.workload, sample.callers), []).append(sample)
    output.table(
        [
            "workload",
            "callers",
            "ops/s",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "errors",
            "CPU us/op: client",
            "nodes",
            "RSS MiB",
        ],
        [
            [
                workload,
                str(callers),
                f"{median(sample.ops_per_s for sample in found):,.0f}",
                f"{median(sample.p50_ms for sample in found):.2f}",
                f"{median(sample.p99_ms for sample in found):.2f}",
                f"{median(sample.p999_ms for sample in found):.2f}",
                str(sum(sum(sample.errors.values()) for sample in found)),
                f"{median(sample.client_cpu_us_per_op for sample in found):.1f}",
                " ".join(
                    f"{median(sample.nodes[name].cpu_us_per_op for sample in found if name in sample.nodes):.1f}"
                    for name in sorted(found[-1].nodes)
                ),
                " ".join(f"{found[-1].nodes[name].rss_mib:.0f}" for name in sorted(found[-1].nodes)),
            ]
            for (workload, callers), found in rows.items()
        ],
    )
