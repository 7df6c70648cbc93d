"""Processes that join a running cluster and leave it, under load, by the commands that users have."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

from process_harness import ONE_CLOCK, environment, node, options, until

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.local import LocalCluster
from agi.core.dht.types import Consistency

VALUES = {f"k{i}": b"v" * 200 for i in range(1000)}


async def cli(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agi.core.dht.cli",
        *arguments,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_a_process_joins_under_load_and_leaves_again(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, settings=ONE_CLOCK) as cluster, DHTClient(timeout=10) as client:
        await client.connect(cluster.addresses)
        await client.put_many(VALUES, consistency=Consistency.ALL)
        failures: list[DHTError] = []
        written: dict[str, bytes] = {}
        stop = False

        async def load(number: int) -> None:
            turn = 0
            while not stop:
                turn += 1
                key, value = f"w{number}:{turn % 50}", str(turn).encode()
                try:
                    await client.put(key, value)
                    written[key] = value
                    assert await client.get(key) == value
                except DHTError as error:
                    failures.append(error)

        workers = [asyncio.create_task(load(number)) for number in range(8)]
        connect = ",".join(cluster.addresses)
        arguments = ("--peers", connect, "--node-id", "n3", *options(ONE_CLOCK))
        async with node(tmp_path, *arguments, name="n3", storage="rocksdb") as joiner:
            assert await cli("wait-healthy", "--connect", joiner.address, "--wait", "30") == (
                0,
                "replication is whole\n",
            )
            members = {member["node_id"]: member["state"] for member in (await client.topology())["members"]}
            assert members == dict.fromkeys(("n0", "n1", "n2", "n3"), "normal")
            located = await client.locate("k0")
            assert all(held["state"] == "live" for held in located["replicas"].values())
            code, said = await cli("leave", "n3", "--connect", connect)
            assert code == 0, said
            assert "done: n3 leaves" in said
            assert await joiner.ended() == 0
        stop = True
        await asyncio.gather(*workers)
        assert failures == []
        assert not (tmp_path / "n3").exists()
        assert (tmp_path / "n3.removed-1").is_dir()
        assert await client.get_many(VALUES, consistency=Consistency.ALL) == VALUES
        assert await client.get_many(written, consistency=Consistency.ALL) == written
        await client.wait_healthy(30)
        assert await cli("leave", "n2", "--connect", connect) == (
            17,
            "error: without n2 there are 2 nodes for 3 replicas: add one first, or force it\n",
        )


async def member_of(client: DHTClient, name: str) -> set[str]:
    """The members, once this node is one and no change is under way."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(DHTError):  # whoever was asked is no member yet
                topology = await client.topology()
                names = {member["node_id"] for member in topology["members"]}
                if name in names and not topology["in_transition"]:
                    return names
            await asyncio.sleep(0.1)


async def test_a_joiner_whose_change_another_node_spoils_asks_again_and_joins(tmp_path: Path) -> None:
    """Nobody does anything: n3 dies amid the join, is evicted, and the process that joins begins anew."""
    settings = {
        **ONE_CLOCK,
        "health.heartbeat_interval_ms": "200",
        "health.probe_timeout_ms": "100",
        "health.suspicion_mult": "2",
        "health.suspicion_max_mult": "2",
        "migration.join_timeout_ms": "2000",
        "migration.eviction_timeout_ms": "3000",
    }
    async with LocalCluster(5, tmp_path, settings=settings) as cluster, DHTClient(timeout=10) as client:
        await client.connect(cluster.addresses[:3])
        await client.put_many(VALUES, consistency=Consistency.ALL)
        slow = (*options(ONE_CLOCK), "--set", "migration.bytes_per_s=40000", "--set", "observability.log_format=json")
        joining = ("--peers", ",".join(cluster.addresses), "--node-id", "n5", *slow)
        async with node(tmp_path, *joining, name="n5", storage="rocksdb") as joiner:
            await until(lambda: joiner.events("topology_adopted"), "the transition")
            await cluster.kill(3)
            await until(lambda: joiner.events("asks_again"), "a second life")
            assert joiner.events("asks_again")[0]["address"] == joiner.address
            assert (tmp_path / "n5.removed-1").is_dir()
            assert await member_of(client, "n5") == {"n0", "n1", "n2", "n4", "n5"}
            assert await client.get_many(VALUES, consistency=Consistency.ALL) == VALUES
            assert await joiner.end() == 0
