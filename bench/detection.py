"""How failure detection does on real processes: deaths, and nodes that get too little CPU.

    python bench/detection.py [--nodes 8] [--kills 20] [--minutes 30] [--starved 0.8] [--longest 2] [--json FILE]

First one node of eight is killed with SIGKILL, again and again, each time after it has come back: how long until all
others hold it dead? Then one node is starved for half an hour: it runs in bursts and stands still for the rest of the
time (SIGSTOP, SIGCONT), 0.1 to 2 s at a time; a death is false if it is declared of a node that runs, starved or not.
Two clusters stand side by side under the same bursts: one as shipped, one as plain SWIM, without Lifeguard (no
self-awareness, suspicion timeouts that do not depend on confirmations, which is what these settings do).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import uvloop

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.local import LocalCluster

PLAIN = {"health.awareness_max": "0", "health.suspicion_max_mult": "1"}
SETTINGS = {"health.preset": "lan", "observability.log_level": "warning"}
STILL_S = 0.1
"""The least time that a starved node stands still."""
WAIT_S = 60.0


def _settings(plain: bool) -> dict[str, str]:
    return {**SETTINGS, **(PLAIN if plain else {})}


async def kills(nodes: int, count: int) -> dict[str, Any]:
    """Seconds from a SIGKILL until every other node holds the victim dead."""
    took: list[float] = []
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        async with (
            LocalCluster(nodes, Path(folder), settings=_settings(False)) as cluster,
            DHTClient(timeout=10.0) as client,
        ):
            await client.connect(cluster.addresses)
            victim = nodes - 1
            for _ in range(count):
                await _until(client, victim, nodes, "ALIVE")
                await asyncio.sleep(random.Random(len(took)).uniform(0.5, 1.5))
                began = time.perf_counter()
                await cluster.kill(victim)
                await _until(client, victim, nodes, "DEAD")
                took.append(time.perf_counter() - began)
                await cluster.start_node(victim)
    took.sort()
    return {
        "kills": count,
        "p50_s": round(took[len(took) // 2], 2),
        "p99_s": round(took[min(len(took) - 1, int(len(took) * 0.99))], 2),
        "longest_s": round(took[-1], 2),
    }


async def _until(client: DHTClient, victim: int, nodes: int, wanted: str) -> None:
    name = f"n{victim}"
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(DHTError):
                states = await client.status()
                held = [states[f"n{i}"]["peers"][name]["status"] for i in range(nodes) if i != victim]
                if set(held) == {wanted}:
                    return
            await asyncio.sleep(0.05)


async def starve(nodes: int, minutes: float, share: float, longest_s: float) -> dict[str, Any]:
    """False deaths with one starved node, with Lifeguard and without."""
    with tempfile.TemporaryDirectory(prefix="dht-bench-") as folder:
        folders = [Path(folder) / name for name in ("lifeguard", "plain")]
        for each in folders:
            each.mkdir()
        async with (
            LocalCluster(nodes, folders[0], storage="memory", settings=_settings(False)) as guarded,
            LocalCluster(nodes, folders[1], storage="memory", settings=_settings(True)) as plain,
        ):
            await asyncio.sleep(3.0)
            pids = [cluster.node(nodes - 1).announced["pid"] for cluster in (guarded, plain)]
            rng = random.Random(0)
            until = time.perf_counter() + minutes * 60
            stood = 0.0
            began = time.perf_counter()
            try:
                while time.perf_counter() < until:
                    still_s = rng.uniform(STILL_S, longest_s)
                    for pid in pids:
                        os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(still_s)
                    stood += still_s
                    for pid in pids:
                        os.kill(pid, signal.SIGCONT)
                    await asyncio.sleep(still_s * (1 - share) / share)
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            minutes_run = (time.perf_counter() - began) / 60
            await asyncio.sleep(5.0)  # what is refuted now still counts
            deaths = {"lifeguard": await _deaths(guarded), "plain SWIM": await _deaths(plain)}
    return {
        "minutes": round(minutes_run, 1),
        "stood_still": round(stood / (minutes_run * 60), 2),
        "false_deaths": deaths,
    }


async def _deaths(cluster: LocalCluster) -> dict[str, int]:
    """Members that were held to be dead and then refuted it, as the node counts that saw the most of them: one of the
    sound nodes, and the starved one, which may wrong others."""
    seen = []
    for i in range(len(cluster.nodes)):
        address = cluster.node(i).announced["http_address"]
        text = await asyncio.to_thread(
            lambda at=address: urllib.request.urlopen(f"http://{at}/metrics", timeout=10).read().decode()
        )
        found = re.search(r"^dht_false_deaths_total (\S+)$", text, re.MULTILINE)
        assert found is not None
        seen.append(int(float(found[1])))
    return {"by_sound_nodes": max(seen[:-1]), "by_the_starved": seen[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--starved", type=float, default=0.8, help="share of the time that a node stands still")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds that it stands still at most at a time")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    given = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, {platform.platform()}, Python {platform.python_version()}", file=sys.stderr)
    found: dict[str, Any] = {}
    if given.kills:
        found["kills"] = uvloop.run(kills(given.nodes, given.kills))
        print(f"known to all others: {found['kills']}", flush=True)
    if given.minutes:
        found["starved"] = uvloop.run(starve(given.nodes, given.minutes, given.starved, given.longest))
        print(f"one node starved: {found['starved']}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
