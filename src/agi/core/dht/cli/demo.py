"""`demo`: three node processes, real data, and a node that dies in the midst of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import uvloop

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import AsJson
from agi.core.dht.cli.progress import Progress
from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.local import LocalCluster

T = TypeVar("T")

PREFIX = "file:"
CALLERS = 32
PAGE_KEYS = 200
KILL_PATIENCE_S = 300.0
TTL_S = 1.0
TTL_PATIENCE_S = 10.0
CALL_TIMEOUT_S = 15.0
"""Of each call: machines that also compile something should see a demo, not a timeout."""


class DemoFailed(DHTError):
    """Something that was stored did not come back."""


def demo(as_json: AsJson = False) -> None:
    """Start three nodes, store the standard library, kill a node, read everything back.

    Each `.py` file of this Python's standard library becomes a key. Half-way through, one node gets SIGKILL; writes go
    on at QUORUM, the node comes back, and every file is read and compared by its SHA-256. Exits with 0 only if all are
    equal. Leaves nothing behind.
    """
    folder = Path(tempfile.mkdtemp(prefix="agi-dht-demo-"))
    try:
        report = uvloop.run(_cancelled_by_sigterm(_run(folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        output.document(report)


async def _cancelled_by_sigterm(work: Awaitable[T]) -> T:
    """The nodes and the folder are cleaned up after SIGTERM too."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise DemoFailed("stopped") from None


async def _run(folder: Path) -> dict[str, object]:
    files = list(_library())
    total = sum(path.stat().st_size for _, path in files)
    empty = sum(not path.stat().st_size for _, path in files)
    output.note(f"{len(files)} files of the standard library, {output.size_text(total)}, {empty} of them empty")
    began = time.monotonic()
    async with LocalCluster(3, folder) as cluster:
        output.note(f"three nodes on {', '.join(cluster.addresses)}: RocksDB, 3 replicas, quorums of 2")
        # what is written is the same each time, so that a write of unknown outcome may be repeated
        async with DHTClient(timeout=CALL_TIMEOUT_S, retry_unknown=True) as client:
            await client.connect(cluster.addresses)
            report = await _main_job(cluster, client, files, total)
    report["seconds"] = round(time.monotonic() - began, 1)
    output.note(f"all {len(files)} files came back byte for byte, in {report['seconds']} s; nothing is left behind")
    return report


async def _main_job(
    cluster: LocalCluster, client: DHTClient, files: list[tuple[str, Path]], total: int
) -> dict[str, object]:
    sums: dict[str, bytes] = {}

    async def store(item: tuple[str, Path]) -> None:
        key, path = item
        value = path.read_bytes()
        await client.put(key, value)
        sums[key] = hashlib.sha256(value).digest()

    half = len(files) // 2
    with Progress("stored", len(files)) as progress:

        async def kill_halfway() -> float:
            async with asyncio.timeout(KILL_PATIENCE_S):
                while len(sums) < half:  # noqa: ASYNC110  # the callers do not stop for it
                    await asyncio.sleep(0)
            victim = cluster.node(2).process.pid
            await cluster.kill(2)
            progress.note(f"n2 (process {victim}) got SIGKILL at file {len(sums)}; writes go on")
            return time.perf_counter()

        started = time.perf_counter()
        killer = asyncio.create_task(kill_halfway())
        store_s = await _each(files, store, progress)
        first_s = await killer - started
    missed, back = len(files) - half, time.monotonic()
    await cluster.start_node(2)
    await cluster.wait_ready()
    output.note(f"n2 is back after {time.monotonic() - back:.1f} s and has missed about {missed} files")

    wrong: list[str] = []

    async def compare(item: tuple[str, Path]) -> None:
        value = await client.get(item[0])
        if value is None or hashlib.sha256(value).digest() != sums[item[0]]:
            wrong.append(item[0])

    with Progress("compared", len(files)) as progress:
        read_s = await _each(files, compare, progress)
    if wrong:
        raise DemoFailed(f"{len(wrong)} files came back wrong, such as {wrong[0]}")
    pages, scan_s = await _scan(client, sums)
    ttl_s = await _expire(client)
    stats = await client.stats()
    repaired = sum(node["read_repairs"] for node in stats.values())
    rates = {
        "stored": (half, first_s),
        "stored with a node down": (missed, store_s - first_s),
        "read and compared": (len(files), read_s),
        "scanned": (len(files), scan_s),
    }
    for what, (count, seconds) in rates.items():
        mib = total / len(files) * count / seconds / (1 << 20)
        output.note(f"  {what:<24} {count:>5} files in {seconds:5.2f} s: {count / seconds:7.0f}/s, {mib:6.1f} MiB/s")
    output.note(f"  {pages} pages of {PAGE_KEYS} keys in order; reads brought n2 {repaired} of the files")
    output.note(f"  a key with {TTL_S:g} s to live was gone after {ttl_s:.2f} s")
    return {
        "files": len(files),
        "bytes": total,
        "matched": len(files),
        "per_second": {what: round(count / seconds, 1) for what, (count, seconds) in rates.items()},
        "pages": pages,
        "read_repairs": repaired,
        "ttl_seconds": round(ttl_s, 2),
    }


def _library() -> Iterator[tuple[str, Path]]:
    """(key, file) of every module of the standard library, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file():
                yield PREFIX + path.relative_to(root).as_posix(), path


async def _each(
    items: list[tuple[str, Path]], work: Callable[[tuple[str, Path]], Awaitable[None]], progress: Progress
) -> float:
    """Does it to all of them, CALLERS at a time; returns the seconds that it took."""
    started = time.perf_counter()
    left = iter(items)

    async def caller() -> None:
        for item in left:
            await work(item)
            progress.advance(1)

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller())
    return time.perf_counter() - started


async def _scan(client: DHTClient, sums: dict[str, bytes]) -> tuple[int, float]:
    """Pages through all files; returns the pages and the seconds."""
    started = time.perf_counter()
    keys = [key async for key, _ in client.iterate(PREFIX, page_size=PAGE_KEYS)]
    if keys != sorted(sums, key=str.encode):
        raise DemoFailed(f"a scan found {len(keys)} of {len(sums)} keys, or not in order")
    return -(-len(keys) // PAGE_KEYS), time.perf_counter() - started


async def _expire(client: DHTClient) -> float:
    """How long a key with a time to live was there."""
    started = time.perf_counter()
    await client.put("demo:ttl", b"soon gone", ttl_seconds=TTL_S)
    if await client.get("demo:ttl") != b"soon gone":
        raise DemoFailed("a key with a time to live was gone at once")
    async with asyncio.timeout(TTL_PATIENCE_S):
        while await client.get("demo:ttl") is not None:  # noqa: ASYNC110  # that is what is shown
            await asyncio.sleep(0.01)
    return time.perf_counter() - started
