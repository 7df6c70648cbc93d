"""Rounds of turns: in each, every cluster is started, measured and stopped, beginning with another one every round."""

from __future__ import annotations

import asyncio
import datetime
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import msgspec
from bench.growth.measure import GET, PUT, Sample, measure
from bench.growth.plan import DIMENSIONS, Scope, Site
from bench.growth.site import Cluster, Filled, Start, rss_bytes
from bench.peers.machine import hardware


class Point(msgspec.Struct):
    """One point of a dimension: one sample, or figure, for each round."""

    x: int
    nodes: int
    factor: int
    value_bytes: int
    callers: int
    keys: int
    """Of the size that is read and written; `keys_held` of all of them."""
    keys_held: int
    get: list[Sample] = []
    put: list[Sample] = []
    rss_bytes: list[int] = []
    disk_bytes: list[int] = []
    starts: list[Start] = []
    killed: list[Start] = []
    filled: list[Filled] = []


class Results(msgspec.Struct):
    """A run, as it is stored."""

    hardware: list[str]
    command: str
    date: str
    load: float
    """Processes that wanted to run as it began, over one minute."""
    quick: bool
    seconds: float
    nodes: int
    factor: int
    value_bytes: int
    callers: int
    keys: int
    rounds: int = 0
    took_s: float = 0.0
    dimensions: dict[str, list[Point]] = {}


async def run(scope: Scope, sites: list[Site], folder: Path, budget_s: float, say: Callable[[str], None]) -> Results:
    """All rounds, or as many whole ones as the budget allows; the first in any case. The data goes into a folder of
    its own below `folder`, which is removed at the end."""
    began = time.monotonic()
    base = scope.base
    results = Results(
        hardware=await asyncio.to_thread(hardware),
        command=shlex.join(["python", "-m", "bench.growth", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        load=round(os.getloadavg()[0], 1),
        quick=scope.quick,
        seconds=scope.seconds,
        nodes=base.nodes,
        factor=base.factor,
        value_bytes=base.value_bytes,
        callers=base.callers,
        keys=base.keys,
        dimensions=_points(sites),
    )
    with tempfile.TemporaryDirectory(prefix="dht-growth-", dir=folder) as name:
        async with AsyncExitStack() as stack:
            clusters = []
            for site in sites:
                cluster = Cluster(site, Path(name) / site.name)
                stack.push_async_callback(cluster.end)
                clusters.append(cluster)
                if cluster.keeps:
                    with _told(cluster, say):
                        await _form(cluster, results)
                        await cluster.stop()
                    say(_filled(cluster))
            longest = 0.0
            for number in range(scope.rounds):
                start = time.monotonic()
                if number and start - began + longest > budget_s:
                    say("no time for a further round")
                    break
                shift = number * len(clusters) // scope.rounds
                for cluster in clusters[shift:] + clusters[:shift]:
                    turn = time.monotonic()
                    with _told(cluster, say):
                        await _turn(cluster, scope, number, results)
                    say(f"round {number + 1} of {scope.rounds}: {cluster.site.name}, {time.monotonic() - turn:.1f} s")
                longest = max(longest, time.monotonic() - start)
                results.rounds = number + 1
    results.took_s = round(time.monotonic() - began, 1)
    return results


@contextmanager
def _told(cluster: Cluster, say: Callable[[str], None]) -> Iterator[None]:
    """What fails here is told with what the nodes have logged, which is gone afterwards."""
    try:
        yield
    except Exception:
        say(cluster.log_tails())
        raise


def _points(sites: list[Site]) -> dict[str, list[Point]]:
    """In the order of DIMENSIONS, without a figure."""
    points: dict[str, list[Point]] = {name: [] for name in DIMENSIONS}
    for site in sites:
        held = sum(data.keys for data in site.data)
        for cell in site.cells:
            size, keys = cell.data.value_bytes, cell.data.keys
            points[cell.dimension].append(Point(cell.x, site.nodes, site.factor, size, cell.callers, keys, held))
    return {name: sorted(found, key=lambda point: point.x) for name, found in points.items() if found}


def _of(site: Site, results: Results) -> list[Point]:
    return [next(point for point in results.dimensions[cell.dimension] if point.x == cell.x) for cell in site.cells]


async def _form(cluster: Cluster, results: Results) -> None:
    filled = await cluster.form()
    for point in _of(cluster.site, results):
        point.filled.append(filled)


def _filled(cluster: Cluster) -> str:
    filled = cluster.filled
    assert filled is not None
    disk = cluster.disk_bytes()
    return (
        f"{cluster.site.name}: {filled.keys:,} keys stored in {filled.seconds:.1f} s, "
        f"{filled.keys / filled.seconds:,.0f} a second; {disk / 1e6:,.0f} MB of disk"
    )


async def _turn(cluster: Cluster, scope: Scope, number: int, results: Results) -> None:
    """Start, measure every cell, stop; and what can be seen of memory and disk meanwhile."""
    site = cluster.site
    points = _of(site, results)
    if not cluster.keeps:
        await _form(cluster, results)
        async with cluster.client() as client:
            rss = rss_bytes(await client.stats())
        for point in points:
            point.rss_bytes.append(rss)
        await cluster.stop()
        return
    disk = await asyncio.to_thread(cluster.disk_bytes)
    start = await cluster.start()
    async with cluster.client() as client:
        for cell, point in zip(site.cells, points, strict=True):
            seed = 2 * number
            point.get.append(await measure(client, cell, GET, scope.seconds, seed))
            point.put.append(await measure(client, cell, PUT, scope.seconds, seed))
        rss = rss_bytes(await client.stats())
    for point in points:
        point.starts.append(start)
        point.disk_bytes.append(disk)
        point.rss_bytes.append(rss)
        if site.starts:
            point.killed.append(await cluster.restart_killed())
    await cluster.stop()
