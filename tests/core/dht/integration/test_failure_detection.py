"""Eight node processes: one is killed, one is stopped for a while, one is told to end; what the others hold of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable
from pathlib import Path

from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster
from agi.core.dht.types import MemberStatus

WAIT_S = 30.0
"""Far above what it takes, for machines that run much else."""


async def _until_held(client: DHTClient, wanted: dict[str, str], *, by: Iterable[str]) -> float:
    """Waits until these nodes all hold these members to be so; returns how long it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    by = list(by)
    while True:
        status = await client.status()
        held = {
            name: {
                other: status[name].get("peers", {}).get(other, {}).get("status") for other in wanted if other != name
            }
            for name in by
        }
        if all(held[name] == {o: s for o, s in wanted.items() if o != name} for name in by):
            return loop.time() - began
        assert loop.time() - began < WAIT_S, held
        await asyncio.sleep(0.05)


async def test_deaths_pauses_and_stops_of_real_processes(tmp_path: Path) -> None:
    async with (
        LocalCluster(8, tmp_path, storage="memory", settings={"health.preset": "local"}) as cluster,
        DHTClient(timeout=10) as client,
    ):
        heard: list[tuple[str, MemberStatus]] = []
        client.on_member_status(lambda member, status: heard.append((member, status)))
        await client.connect(cluster.addresses)
        everybody = [f"n{i}" for i in range(8)]
        await _until_held(client, dict.fromkeys(everybody, "ALIVE"), by=everybody)

        await cluster.kill(7)
        others = everybody[:7]
        took_s = await _until_held(client, {"n7": "DEAD"}, by=others)
        assert took_s < 10.0, "its links broke: nobody had to wait for a timeout of the operating system"
        await client.put("k", b"v")
        assert await client.get("k") == b"v"

        cluster.node(6).process.send_signal(signal.SIGSTOP)
        others = everybody[:6]
        await _until_held(client, {"n6": "DEAD", "n7": "DEAD"}, by=others)
        await client.put("k", b"w")
        cluster.node(6).process.send_signal(signal.SIGCONT)
        await _until_held(client, dict.fromkeys(everybody[:7], "ALIVE"), by=everybody[:7])

        assert await cluster.stop_node(5) == 0
        others = [name for name in everybody[:7] if name != "n5"]
        await _until_held(client, {"n5": "LEFT", "n6": "ALIVE"}, by=others)
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while ("n7", MemberStatus.DEAD) not in heard:  # the client asks every 2 s
            assert asyncio.get_running_loop().time() < deadline, heard
            await asyncio.sleep(0.05)
        logs = "".join(cluster.log(i).read_text() for i in range(5))
        assert '"member": "n5", "status": "DEAD"' not in logs
